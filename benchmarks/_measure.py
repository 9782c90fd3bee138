"""Interleaved comparison: CPU time, ratios within a round, a bootstrap interval."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import numpy.typing as npt

__all__ = ["BUDGET", "MIN_PAIRS", "SELDOM", "Median", "exponent", "measure", "median", "ratio"]

MIN_PAIRS = 100
BUDGET = 120.0  # CPU seconds of one comparison, so that all of `make bench` takes an hour
SELDOM = 4  # slow peers run in one round of so many
_LEAST_ROUNDS = 20  # whatever the budget
_RESAMPLES = 2_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Median:
    """Median of repeated measurements.

    Attributes:
        value: The median, in the unit of what was measured.
        low: Lower end of its 95 % percentile bootstrap interval.
        high: Upper end.
        count: Number of measurements; of a ratio, of pairs.
    """

    value: float
    low: float
    high: float
    count: int


def measure(
    works: Mapping[str, Callable[[], object]],
    pairs: int = MIN_PAIRS,
    *,
    warmup: int = 2,
    seed: int = 0,
    seldom: Collection[str] = (),
    budget: float = BUDGET,
) -> dict[str, npt.NDArray[np.float64]]:
    """CPU seconds of every work, one a round, (rounds,); each round runs all in a random order.

    Comparing within a round cancels slow drifts of the machine, and the random order what a
    work leaves behind in caches for the next. Those in ``seldom`` run in every fourth round and
    hold NaN for the others. After ``budget`` CPU seconds no further round begins, but 20 are made
    in any case, if so many are asked for.
    """
    rng = np.random.default_rng(seed)
    names = list(works)
    seconds = {name: np.full(pairs, np.nan) for name in names}
    begun = time.process_time()
    rounds = pairs
    for i in range(-warmup, pairs):
        if i >= _LEAST_ROUNDS and time.process_time() - begun > budget:
            rounds = i
            break
        for j in rng.permutation(len(names)):
            name = names[j]
            if i >= 0 and i % SELDOM and name in seldom:
                continue
            start = time.process_time()
            works[name]()
            if i >= 0:
                seconds[name][i] = time.process_time() - start
    return {name: values[:rounds] for name, values in seconds.items()}


def median(values: npt.NDArray[np.float64], seed: int = 0) -> Median:
    """Median of those of ``values`` (rounds,) that are not NaN, with its interval."""
    found = values[~np.isnan(values)]
    if found.ndim != 1 or not len(found):
        raise ValueError(f"values must be flat and hold a number, got shape {values.shape}.")
    rng = np.random.default_rng(seed)
    draws = np.median(rng.choice(found, (_RESAMPLES, len(found))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    value = float(np.median(found))
    if not math.isfinite(value):
        raise ValueError(f"values must be finite, got a median of {value}.")
    return Median(value=value, low=float(low), high=float(high), count=len(found))


def ratio(work: npt.NDArray[np.float64], peer: npt.NDArray[np.float64]) -> Median:
    """Median of ``work / peer`` by rounds, over the rounds that hold both."""
    if work.shape != peer.shape:
        raise ValueError(f"work and peer must be paired, got {work.shape} and {peer.shape}.")
    return median(work / peer)


def exponent(sizes: npt.ArrayLike, table: npt.NDArray[np.float64]) -> Median:
    """Exponent b of cost ~ size^b: least squares of logarithms within a round, (sizes, rounds)."""
    slopes = np.polyfit(np.log(np.asarray(sizes, np.float64)), np.log(table), 1)[0]
    return median(np.atleast_1d(slopes))
