"""What an attacker gets: attacks on plain arrays, and lower bounds on ε with their confidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.audit.bounds import epsilon_clopper_pearson, epsilon_from_counts, strongest
    from lora_privacy.audit.one_run import (
        Guesses,
        epsilon_one_run,
        epsilon_one_run_fdp,
        epsilon_one_run_scores,
        guess,
        one_run_p_value,
    )
    from lora_privacy.audit.result import LeakageEstimate, RateEstimate
    from lora_privacy.audit.roc import RocCurve, auc, roc_curve, tpr_at_fpr

__all__ = [
    "Guesses",
    "LeakageEstimate",
    "RateEstimate",
    "RocCurve",
    "auc",
    "epsilon_clopper_pearson",
    "epsilon_from_counts",
    "epsilon_one_run",
    "epsilon_one_run_fdp",
    "epsilon_one_run_scores",
    "guess",
    "one_run_p_value",
    "roc_curve",
    "strongest",
    "tpr_at_fpr",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "Guesses": "one_run",
        "LeakageEstimate": "result",
        "RateEstimate": "result",
        "RocCurve": "roc",
        "auc": "roc",
        "epsilon_clopper_pearson": "bounds",
        "epsilon_from_counts": "bounds",
        "epsilon_one_run": "one_run",
        "epsilon_one_run_fdp": "one_run",
        "epsilon_one_run_scores": "one_run",
        "guess": "one_run",
        "one_run_p_value": "one_run",
        "roc_curve": "roc",
        "strongest": "bounds",
        "tpr_at_fpr": "roc",
    },
)
