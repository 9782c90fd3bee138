"""Privacy accounting: events, proven bounds, and readings that are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.dp.calibration import (
        Accountant,
        Calibration,
        calibrate,
        calibrate_rank,
        calibrate_steps,
    )
    from lora_privacy.dp.events import Event, GaussianEvent, SampledGaussian
    from lora_privacy.dp.implicit import implied_noise_multiplier, implied_privacy
    from lora_privacy.dp.rdp import (
        RdpAccountant,
        event_rdp,
        sampled_gaussian_bounds,
        sampled_gaussian_rdp,
    )
    from lora_privacy.dp.result import Adjacency, Aggregation, ImpliedPrivacy, PrivacyBound

__all__ = [
    "Accountant",
    "Adjacency",
    "Aggregation",
    "Calibration",
    "Event",
    "GaussianEvent",
    "ImpliedPrivacy",
    "PrivacyBound",
    "RdpAccountant",
    "SampledGaussian",
    "calibrate",
    "calibrate_rank",
    "calibrate_steps",
    "event_rdp",
    "implied_noise_multiplier",
    "implied_privacy",
    "sampled_gaussian_bounds",
    "sampled_gaussian_rdp",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "Accountant": "calibration",
        "Adjacency": "result",
        "Aggregation": "result",
        "Calibration": "calibration",
        "Event": "events",
        "GaussianEvent": "events",
        "ImpliedPrivacy": "result",
        "PrivacyBound": "result",
        "RdpAccountant": "rdp",
        "SampledGaussian": "events",
        "calibrate": "calibration",
        "calibrate_rank": "calibration",
        "calibrate_steps": "calibration",
        "event_rdp": "rdp",
        "implied_noise_multiplier": "implicit",
        "implied_privacy": "implicit",
        "sampled_gaussian_bounds": "rdp",
        "sampled_gaussian_rdp": "rdp",
    },
)
