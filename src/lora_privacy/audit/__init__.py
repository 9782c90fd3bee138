"""What an attacker gets: attacks on plain arrays, and lower bounds on ε with their confidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.audit.bounds import epsilon_clopper_pearson, epsilon_from_counts, strongest
    from lora_privacy.audit.canary import (
        Exposure,
        GoodnessOfFit,
        exposure,
        exposure_p_value,
        gradient_canaries,
    )
    from lora_privacy.audit.membership import (
        attack_p,
        attack_r,
        lira,
        logit_confidence,
        rmia,
        tune_offline_a,
    )
    from lora_privacy.audit.one_run import (
        Guesses,
        epsilon_one_run,
        epsilon_one_run_scores,
        guess,
        one_run_p_value,
    )
    from lora_privacy.audit.one_run_gaussian import epsilon_one_run_fdp
    from lora_privacy.audit.projection import asymmetry, projection_attack
    from lora_privacy.audit.result import LeakageEstimate, RateEstimate
    from lora_privacy.audit.roc import RocCurve, auc, roc_curve, tpr_at_fpr
    from lora_privacy.audit.sequences import (
        mean_log_prob,
        min_k,
        min_k_plus_plus,
        reference_calibrated,
    )

__all__ = [
    "Exposure",
    "GoodnessOfFit",
    "Guesses",
    "LeakageEstimate",
    "RateEstimate",
    "RocCurve",
    "asymmetry",
    "attack_p",
    "attack_r",
    "auc",
    "epsilon_clopper_pearson",
    "epsilon_from_counts",
    "epsilon_one_run",
    "epsilon_one_run_fdp",
    "epsilon_one_run_scores",
    "exposure",
    "exposure_p_value",
    "gradient_canaries",
    "guess",
    "lira",
    "logit_confidence",
    "mean_log_prob",
    "min_k",
    "min_k_plus_plus",
    "one_run_p_value",
    "projection_attack",
    "reference_calibrated",
    "rmia",
    "roc_curve",
    "strongest",
    "tpr_at_fpr",
    "tune_offline_a",
]

if not TYPE_CHECKING:  # checkers read the imports above; these would hide a misspelt name
    __getattr__, __dir__ = attach(
        __name__,
        {
            "Exposure": "canary",
            "GoodnessOfFit": "canary",
            "Guesses": "one_run",
            "LeakageEstimate": "result",
            "RateEstimate": "result",
            "RocCurve": "roc",
            "asymmetry": "projection",
            "attack_p": "membership",
            "attack_r": "membership",
            "auc": "roc",
            "epsilon_clopper_pearson": "bounds",
            "epsilon_from_counts": "bounds",
            "epsilon_one_run": "one_run",
            "epsilon_one_run_fdp": "one_run_gaussian",
            "epsilon_one_run_scores": "one_run",
            "exposure": "canary",
            "exposure_p_value": "canary",
            "gradient_canaries": "canary",
            "guess": "one_run",
            "lira": "membership",
            "logit_confidence": "membership",
            "mean_log_prob": "sequences",
            "min_k": "sequences",
            "min_k_plus_plus": "sequences",
            "one_run_p_value": "one_run",
            "projection_attack": "projection",
            "reference_calibrated": "sequences",
            "rmia": "membership",
            "roc_curve": "roc",
            "strongest": "bounds",
            "tpr_at_fpr": "roc",
            "tune_offline_a": "membership",
        },
    )
