"""Poisson sampling when one record is exchanged for another: the worst pair, and its profile.

With x, x' the two records and p the rate, the outputs are (1-p)P₀ + pP_x and (1-p)P₀ + pP_x'. For
ε >= 0, d = (e^ε-1)(1-p)/p and any share w in [0, 1],

    δ(ε) <= p [w δ_G(log(e^ε/w); ‖x-x'‖) + (1-w) δ_G(log(d/(1-w)); ‖x‖)],

with equality at the best w if x' = -x. Proof in docs/theory/pld.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy.dp._profiles import Direction, SampledPair, mills

__all__ = ["ReplacedPair", "Split", "split"]

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_ROOT_2PI = math.sqrt(2 * math.pi)
_TINY = 1e-300  # covers underflow
# Others are taken for it, or for 0, towards a larger profile: products stay normal doubles.
_LEAST_RATE, _LEAST_EPSILON, _MOST_EPSILON = 1e-200, 1e-80, 1e40


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """How the profile is split into two of Gaussians; any split is an upper bound.

    Attributes:
        far: w, the share of the pair of the two records, rounded up.
        far_epsilon: log(e^ε/w) >= ε, rounded down.
        near: 1 - w, the share of the pair of one record and none, rounded up.
        near_epsilon: log(d/(1-w)), which may be negative, rounded down; 0 where ``near`` is 0.
    """

    far: Array
    far_epsilon: Array
    near: Array
    near_epsilon: Array


def split(mu: float, rate: float, epsilons: Array) -> Split:
    """The best split at ``epsilons`` >= 0 for centres at -μ, 0 and μ; sound for all others.

    It is that of the test y > t = (ε/2 + v)/μ, sinh v = d e^{μ²/2-ε/2}/2: w = e^{-2v}.
    """
    rate = max(rate, _LEAST_RATE)
    epsilons = np.where(epsilons < _LEAST_EPSILON, 0.0, np.minimum(epsilons, _MOST_EPSILON))
    # Whatever rounding did to v, shares and ε's are those of the double at hand.
    v = _half_log(mu, rate, epsilons)
    far, near = np.exp(-2 * v), -np.expm1(-2 * v)
    alive = near > 0
    near = np.where(alive, near, 1.0)
    small = np.minimum(epsilons, 1.0)
    with np.errstate(divide="ignore"):
        # A ratio first where it may be close to 1, so that its logarithm keeps its digits.
        close = np.log(np.expm1(small) * ((1 - rate) / rate) / near)
        apart = _log_rest(rate, np.maximum(epsilons, 1.0)) - np.log(near)
    close -= 16 * _EPS * (1 + np.abs(close))
    apart -= 16 * _EPS * (epsilons - math.log(rate) - math.log1p(-rate) - np.log(near) + 1)
    near_epsilon = np.where(epsilons < 1, close, apart)
    return Split(
        far * (1 + 8 * _EPS),
        (epsilons + 2 * v) * (1 - 4 * _EPS),
        np.where(alive, near * (1 + 8 * _EPS), 0.0),
        np.where(alive, near_epsilon, 0.0),
    )


@dataclass(frozen=True, slots=True)
class ReplacedPair:
    """(1-p) N(0,1) + p N(μ,1) against (1-p) N(0,1) + p N(-μ,1), the worst exchange of a record.

    The reflection at 0 swaps them, so both directions have the same profile.

    Args:
        mu: Distance of each centre from 0 in standard deviations, clip norm over noise, > 0.
        rate: p, in (0, 1).
    """

    mu: float
    rate: float

    def upper(self, _direction: Direction, epsilons: Array) -> Array:
        """The exact profile at ``epsilons`` >= 0, rounded up."""
        parts = split(self.mu, self.rate, epsilons)
        far = SampledPair(2 * self.mu, 1.0).upper("remove", parts.far_epsilon)
        near = SampledPair(self.mu, 1.0).upper("remove", parts.near_epsilon)
        total = parts.far * far + parts.near * near
        return np.minimum(1.0, max(self.rate, _LEAST_RATE) * total * (1 + 8 * _EPS) + _TINY)

    def lower(self, _direction: Direction, epsilons: Array) -> Array:
        """The exact profile at ``epsilons`` >= 0, rounded down."""
        near = np.minimum(epsilons, _MOST_EPSILON)
        return np.where(epsilons > near, 0.0, np.maximum(self.lines(near, (near,))[0], 0.0))

    def lines(self, epsilons: Array, others: tuple[Array, ...]) -> list[Array]:
        """P(E) - e^x Q(E) at each x in ``others``, rounded down; E is best at ``epsilons``.

        Negative values are not rounded.
        """
        mu, rate = self.mu, max(self.rate, _LEAST_RATE)
        # E is {y > t}, t = log_ratio/(2μ), a = t - μ. With Mills' ratio R its probabilities at the
        # centres μ, 0, -μ are φ(a) times R(a), e^{μ²/2-μt} R(t), e^{-2μt} R(t+μ).
        log_ratio = epsilons + 2 * _half_log(mu, rate, epsilons)
        t = log_ratio / (2 * mu)
        a, spread = t - mu, t + mu
        density = np.exp(-0.5 * a * a) / _ROOT_2PI
        clear = a > -1
        first = np.where(clear, density * mills(np.maximum(a, -1.0)), special.ndtr(-a))
        results: list[Array] = []
        for x in others:
            near = np.zeros(x.shape)
            some = x > 0
            log_rest, half = _log_rest(rate, x[some]), log_ratio[some] / 2
            size = np.abs(log_rest) + 2 * half + mu * mu - math.log(rate) - math.log1p(-rate)
            log_near = log_rest - half + mu * mu / 2 + 8 * _EPS * size
            near[some] = np.exp(np.minimum(log_near, 700.0))
            log_far = x - log_ratio + 8 * _EPS * (x + log_ratio)
            far = np.exp(np.minimum(log_far, 700.0))
            taken = density * (far * mills(t + mu) + near * mills(t))
            value = first - taken
            # As in ``SampledPair``: tails, then an error of a and t, then φ(a), a common factor.
            with np.errstate(over="ignore"):
                error = 48 * (first + taken) + 16 * spread * density * (1 + far + near)
                error += 16 * spread * np.abs(a) * np.where(clear, np.abs(value), first + taken)
            value = value - _EPS * error - _TINY
            results.append(self.rate * value * (1 - 4 * _EPS) - _TINY)
        return results


def _half_log(mu: float, rate: float, epsilons: Array) -> Array:
    """The v >= 0 with sinh v = d e^{μ²/2-ε/2}/2."""
    log_sinh = _log_rest(rate, epsilons) - math.log(2) + mu * mu / 2 - epsilons / 2
    # log(s + √(1 + s²)), which neither overflows nor loses a small s.
    return np.logaddexp(log_sinh, 0.5 * np.logaddexp(0.0, 2 * log_sinh))


def _log_rest(rate: float, epsilons: Array) -> Array:
    """Logarithm of d = (e^ε-1)(1-p)/p; -inf at 0."""
    with np.errstate(divide="ignore"):
        log_growth = epsilons + np.log(-np.expm1(-epsilons))
    return log_growth + (math.log1p(-rate) - math.log(rate))
