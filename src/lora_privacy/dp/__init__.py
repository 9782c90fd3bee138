"""Privacy accounting: events, proven bounds, and readings that are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.dp.attestation import AttestedLedger, ProjectionAttestation
    from lora_privacy.dp.calibration import (
        Accountant,
        Calibration,
        calibrate,
        calibrate_rank,
        calibrate_steps,
    )
    from lora_privacy.dp.curve import PrivacyCurve, privacy_curve
    from lora_privacy.dp.events import (
        Event,
        GaussianEvent,
        ProjectedGaussian,
        SampledGaussian,
    )
    from lora_privacy.dp.families import VectorFamily
    from lora_privacy.dp.implicit import implied_noise_multiplier, implied_privacy
    from lora_privacy.dp.matrix_pairs import SketchRelease, matrix_projection
    from lora_privacy.dp.noised import NoisedProjection
    from lora_privacy.dp.pairwise import VectorProjection, vector_projection_bound
    from lora_privacy.dp.pld import PldAccountant
    from lora_privacy.dp.rdp import (
        RdpAccountant,
        event_rdp,
        sampled_gaussian_bounds,
        sampled_gaussian_rdp,
    )
    from lora_privacy.dp.result import (
        Adjacency,
        Aggregation,
        ImpliedPrivacy,
        PairDivergence,
        PrivacyBound,
    )

__all__ = [
    "Accountant",
    "Adjacency",
    "Aggregation",
    "AttestedLedger",
    "Calibration",
    "Event",
    "GaussianEvent",
    "ImpliedPrivacy",
    "NoisedProjection",
    "PairDivergence",
    "PldAccountant",
    "PrivacyBound",
    "PrivacyCurve",
    "ProjectedGaussian",
    "ProjectionAttestation",
    "RdpAccountant",
    "SampledGaussian",
    "SketchRelease",
    "VectorFamily",
    "VectorProjection",
    "calibrate",
    "calibrate_rank",
    "calibrate_steps",
    "event_rdp",
    "implied_noise_multiplier",
    "implied_privacy",
    "matrix_projection",
    "privacy_curve",
    "sampled_gaussian_bounds",
    "sampled_gaussian_rdp",
    "vector_projection_bound",
]

if not TYPE_CHECKING:  # checkers read the imports above; these would hide a misspelt name
    __getattr__, __dir__ = attach(
        __name__,
        {
            "Accountant": "calibration",
            "Adjacency": "result",
            "Aggregation": "result",
            "AttestedLedger": "attestation",
            "Calibration": "calibration",
            "Event": "events",
            "GaussianEvent": "events",
            "ImpliedPrivacy": "result",
            "NoisedProjection": "noised",
            "PairDivergence": "result",
            "PldAccountant": "pld",
            "PrivacyBound": "result",
            "PrivacyCurve": "curve",
            "ProjectedGaussian": "projected",
            "ProjectionAttestation": "attestation",
            "RdpAccountant": "rdp",
            "SampledGaussian": "events",
            "SketchRelease": "matrix_pairs",
            "VectorFamily": "families",
            "VectorProjection": "pairwise",
            "calibrate": "calibration",
            "calibrate_rank": "calibration",
            "calibrate_steps": "calibration",
            "event_rdp": "rdp",
            "implied_noise_multiplier": "implicit",
            "implied_privacy": "implicit",
            "privacy_curve": "curve",
            "matrix_projection": "matrix_pairs",
            "sampled_gaussian_bounds": "rdp",
            "sampled_gaussian_rdp": "rdp",
            "vector_projection_bound": "pairwise",
        },
    )
