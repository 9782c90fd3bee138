"""Intervals over targets for p1_leakage.py: means, trends with the rank, paired differences."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["at_level", "estimate", "slope", "tested"]

Array: TypeAlias = npt.NDArray[np.float64]


def estimate(values: Array) -> dict[str, float]:
    """Mean over targets, its standard error, and a 95 % interval by Student's law.

    Targets are taken as independent. They share references, which this leaves out.
    """
    count = len(values)
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(count))
    reach = float(stats.t.ppf(0.975, count - 1)) * error
    return {"mean": mean, "error": error, "low": mean - reach, "high": mean + reach}


def tested(values: Array) -> dict[str, float]:
    """As ``estimate``, and the two-sided p-value of Student's test that the mean is 0."""
    found = estimate(values)
    if found["error"] == 0:
        return {**found, "p": 1.0 if found["mean"] == 0 else 0.0}
    return {**found, "p": float(stats.ttest_1samp(values, 0.0).pvalue)}


def slope(values: Array, ranks: tuple[int, ...]) -> dict[str, float]:
    """Least-squares slope per doubling of the rank, one a target; ``values`` (targets, ranks)."""
    x = np.log2(ranks) - np.mean(np.log2(ranks))
    return tested(values @ x / (x @ x))


def at_level(values: Array, losses: Array, level: float) -> Array | None:
    """Each target's value where its training loss first falls to ``level``.

    Linear in the log of the loss between the checkpoints on both sides, (targets, checkpoints)
    each. None unless every target begins above the level and comes down to it.
    """
    if (losses[:, 0] <= level).any() or (losses.min(axis=1) > level).any():
        return None
    found = []
    for value, loss in zip(values, losses, strict=True):
        after = int(np.argmax(loss <= level))
        share = np.log(loss[after - 1] / level) / np.log(loss[after - 1] / loss[after])
        found.append(value[after - 1] + share * (value[after] - value[after - 1]))
    return np.array(found)
