"""Binomial tails in logarithms, and exact confidence limits of a binomial rate, rounded up."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special

from lora_privacy.audit._arrays import Array

__all__ = ["log_below", "log_mass", "log_tail_ratio", "upper_limit"]

_ROUND_UP = 1.0 + 1e-9  # beta quantiles are good to 1e-10 or better


def log_mass(count: int, trials: int, epsilon: float) -> float:
    """Logarithm of P[W = count], W binomial with success probability 1/(1 + e^-ε)."""
    choose = -math.log1p(trials) - float(special.betaln(trials - count + 1, count + 1))
    return choose - (trials - count) * epsilon - trials * math.log1p(math.exp(-epsilon))


def log_tail_ratio(count: int, trials: int, epsilon: float) -> float:
    """Logarithm of P[W >= count] / P[W = count], which neither under- nor overflows."""
    step = np.arange(count, trials, dtype=np.float64)
    ratios = np.cumsum(np.log((trials - step) / (step + 1.0)) + epsilon)
    return float(special.logsumexp(np.concatenate([np.zeros(1), ratios])))


def log_below(count: int, trials: int, epsilon: float) -> Array:
    """Logarithms of P[W = count - i] / P[W = count] for i = 1 … count."""
    step = np.arange(count, 0, -1, dtype=np.float64)
    return np.cumsum(np.log(step / (trials - step + 1.0)) - epsilon)


def upper_limit(counts: npt.ArrayLike, trials: int, significance: float) -> Array:
    """Clopper–Pearson upper limits: the rate above which ``counts`` or fewer are too rare.

    P[rate > limit] <= significance for a binomial count, whatever the rate. Rounded up; 1 where
    every trial succeeded.
    """
    found = np.asarray(counts, dtype=np.float64)
    inside = np.minimum(found, trials - 1.0)
    limit = special.betainccinv(inside + 1.0, trials - inside, significance)
    return np.where(found >= trials, 1.0, np.minimum(1.0, limit * _ROUND_UP))
