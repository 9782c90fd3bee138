"""Checks of the parameters that every event has, and of ledgers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

from lora_privacy import _validate

_E = TypeVar("_E", bound=Hashable)


def check_sample_rate(sample_rate: float) -> None:
    """Raise ValueError unless ``sample_rate`` is in (0, 1]; NaN raises."""
    if not 0 < sample_rate <= 1:
        raise ValueError(
            f"sample_rate must lie in (0, 1], got {sample_rate!r}. It is the probability that "
            "one record takes part in a step, expected batch size over number of records."
        )


def check_noise_multiplier(noise_multiplier: float) -> None:
    """Raise ValueError unless ``noise_multiplier`` is positive and finite; NaN raises."""
    _validate.positive(
        "noise_multiplier", noise_multiplier, "A release without noise has no finite ε."
    )


def merged_ledger(events: Iterable[tuple[_E, int]]) -> tuple[tuple[_E, int], ...]:
    """Each event once, with the sum of its counts as Python integers, which never wrap around.

    Raises:
        TypeError: A count is no integer.
        ValueError: A count is below 1.
    """
    ledger: dict[_E, int] = {}
    for event, count in events:
        ledger[event] = ledger.get(event, 0) + _validate.integer("count", count, 1)
    return tuple(ledger.items())
