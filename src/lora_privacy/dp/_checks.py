"""Checks of what every event and accountant takes, and of ledgers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

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


# A float32 scalar would carry its rounding through the whole account, hence the floats.
def checked_delta(delta: float) -> float:
    """``delta`` as a float; ValueError unless it is in (0, 1)."""
    _validate.inside("delta", delta, 0, 1, "Gaussian noise gives no finite ε at δ = 0.")
    return float(delta)


def checked_epsilon(epsilon: float) -> float:
    """``epsilon`` as a float; ValueError unless it is finite and at least 0."""
    _validate.at_least("epsilon", epsilon, 0)
    return float(epsilon)


def checked_orders(orders: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Rényi orders as doubles; ValueError unless all are finite and above 1."""
    wanted = np.asarray(orders, dtype=np.float64)
    if not np.all((wanted > 1) & np.isfinite(wanted)):
        raise ValueError(f"orders must be finite and above 1, got {orders!r}.")
    return wanted


def checked_rates(fpr: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """False positive rates as doubles; ValueError unless all are in [0, 1]."""
    rates = np.asarray(fpr, dtype=np.float64)
    if not np.all((rates >= 0) & (rates <= 1)):
        raise ValueError(f"fpr must lie in [0, 1], got {fpr!r}.")
    return rates


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
