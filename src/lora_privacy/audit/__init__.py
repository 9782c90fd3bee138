"""What an attacker gets: attacks on plain arrays, and lower bounds on ε with their confidence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.audit.result import LeakageEstimate, RateEstimate

__all__ = [
    "LeakageEstimate",
    "RateEstimate",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "LeakageEstimate": "result",
        "RateEstimate": "result",
    },
)
