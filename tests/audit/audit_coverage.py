"""How often a claim may be false in repeated runs, and known mechanisms to try it on."""

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

RUNS = 2_000
LEVEL = 1e-4  # of the test of the tests: a sound bound fails it once in 10⁴ seeds


def most(significance: float) -> int:
    """Largest number of false claims in RUNS that a sound bound makes but with chance LEVEL."""
    return int(stats.binom.isf(LEVEL, RUNS, significance))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of N(0, 1) against N(μ, 1) at δ, by bisection on the profile of Balle & Wang."""
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        first = stats.norm.cdf(mu / 2 - middle / mu)
        second = math.exp(middle) * stats.norm.cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if first - second > delta else (low, middle)
    return low


def worst_law(canaries: int, guesses: int, at: int, epsilon: float, delta: float) -> npt.NDArray:
    """P[k of g guesses right] under a mechanism that does all it may to have ``at`` of them right.

    With weight 1 - D it answers each coin by randomised response; with weight D it does the same
    on the event that at least ``at`` answers are right.
    """
    q = 1 / (1 + math.exp(-epsilon))
    k = np.arange(guesses + 1)
    plain = stats.binom.pmf(k, guesses, q)
    tail = np.where(k >= at, plain, 0.0) / stats.binom.sf(at - 1, guesses, q)
    share = canaries * delta * stats.binom.sf(at - 1, guesses, q) / (at * plain[at])
    return (1 - share) * plain + share * tail
