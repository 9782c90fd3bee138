"""Interleaved comparison of step times: CPU time, ratios within a round, a bootstrap interval."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

__all__ = ["MIN_PAIRS", "Ratio", "measure", "ratio"]

MIN_PAIRS = 100
_RESAMPLES = 2_000
_SLACK = 1.05  # a target is met when the upper end of the interval is within 5 % of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Median of paired ratios of CPU time.

    Attributes:
        median: Dimensionless.
        low: Lower end of the 95 % bootstrap interval of the median.
        high: Upper end.
        pairs: Number of pairs.
    """

    median: float
    low: float
    high: float
    pairs: int

    def meets(self, target: float) -> bool:
        """Whether the upper end of the interval is within 5 % of ``target``."""
        return self.high <= _SLACK * target

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def measure(
    works: Mapping[str, Callable[[], object]],
    pairs: int = MIN_PAIRS,
    warmup: int = 3,
    seed: int = 0,
) -> dict[str, npt.NDArray[np.float64]]:
    """CPU seconds of every work, one a round, (pairs,); each round runs all in a random order.

    Comparing within a round cancels slow drifts of the machine, and the random order what a
    work leaves behind in caches for the next.
    """
    rng = np.random.default_rng(seed)
    names = list(works)
    seconds = {name: np.empty(pairs) for name in names}
    for i in range(-warmup, pairs):
        for j in rng.permutation(len(names)):
            name = names[j]
            start = time.process_time()
            works[name]()
            if i >= 0:
                seconds[name][i] = time.process_time() - start
    return seconds


def ratio(work: npt.NDArray[np.float64], peer: npt.NDArray[np.float64], seed: int = 0) -> Ratio:
    """Median of ``work / peer`` by rounds, with a 95 % percentile bootstrap interval."""
    if work.shape != peer.shape or work.ndim != 1 or not len(work):
        raise ValueError(f"work and peer must be paired, got {work.shape} and {peer.shape}.")
    ratios = work / peer
    rng = np.random.default_rng(seed)
    draws = np.median(rng.choice(ratios, (_RESAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Ratio(
        median=float(np.median(ratios)), low=float(low), high=float(high), pairs=len(ratios)
    )
