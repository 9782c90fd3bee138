"""Composed plain Gaussians are one Gaussian: its exact δ(ε), ε(δ) and trade-off curve, rounded.

μ² = Σ count · (distance / noise)²; Dong, Roth & Su, arXiv:1905.02383, Cor. 3.3 and 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy.dp._profiles import SampledPair

__all__ = ["crossing", "delta_interval", "epsilon_interval", "trade_off"]

Array = npt.NDArray[np.float64]

_WIDTH = 1e-13  # of ε, where the search stops


def delta_interval(low_mu: float, high_mu: float, epsilon: float) -> tuple[float, float]:
    """Lower and upper end of δ at ``epsilon`` for a μ between two ends; ``inf`` is allowed."""
    at = np.array([epsilon])
    if math.isinf(high_mu):
        return 0.0, 1.0
    lower = SampledPair(low_mu, 1.0).lower("remove", at).item()
    upper = SampledPair(high_mu, 1.0).upper("remove", at).item()
    return lower, min(1.0, upper)


def epsilon_interval(low_mu: float, high_mu: float, delta: float) -> tuple[float, float]:
    """Lower and upper end of the smallest ε at ``delta`` for a μ between two ends."""
    if math.isinf(high_mu):
        return 0.0, math.inf

    def end(which: int) -> tuple[float, float]:
        return crossing(
            lambda epsilon: delta_interval(low_mu, high_mu, epsilon)[which] <= delta,
            high_mu * (high_mu / 2 + 40.0),
        )

    return end(0)[0], end(1)[1]


def crossing(allowed: Callable[[float], bool], start: float) -> tuple[float, float]:
    """An ε that is not ``allowed`` and a little larger one that is; both 0 if 0 is allowed."""
    if allowed(0.0):
        return 0.0, 0.0
    low, high = 0.0, start
    while not allowed(high):
        low, high = high, 2 * high
        if math.isinf(high):
            return low, high
    while high - low > _WIDTH * high:
        middle = low + 0.5 * (high - low)
        if not low < middle < high:  # they are neighbours
            break
        low, high = (low, middle) if allowed(middle) else (middle, high)
    return low, high


def trade_off(high_mu: float, fpr: Array) -> Array:
    """Lower end of the smallest false negative rate, Φ(Φ⁻¹(1 - fpr) - μ)."""
    if math.isinf(high_mu):
        return np.where(fpr > 0, 0.0, 1.0)
    quantile = -special.ndtri(np.maximum(fpr, 1e-300))
    # Rounding of the quantile and of the difference, then of the tail.
    slack = 1e-14 * (np.abs(quantile) + 1 + high_mu)
    value = special.ndtr(quantile - high_mu - slack) * (1 - 1e-13)
    return np.where(fpr >= 1, 0.0, np.where(fpr <= 0, 1.0, value))
