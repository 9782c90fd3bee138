"""Privacy profiles: what an accountant of loss distributions needs to know of one release."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

__all__ = ["DIRECTIONS", "Direction", "Profile", "ProfiledEvent", "SampledPair", "mills"]

Array = npt.NDArray[np.float64]

Direction = Literal["remove", "add"]
DIRECTIONS: tuple[Direction, Direction] = ("remove", "add")


class Profile(Protocol):
    """Upper bound δ(ε) of one release in one direction of the adjacency, vectorised.

    ``profile(epsilons)`` takes finite ε >= 0 in nats, shape (K,), ascending, and returns shape
    (K,) in [0, 1], without NaN. It must satisfy, with P the law of the output when the record
    takes part and Q the law when it does not,

    * ``"remove"``: δ(ε) >= sup over all neighbours of sup_E P(E) - e^ε Q(E);
    * ``"add"``: δ(ε) >= sup over all neighbours of sup_E Q(E) - e^ε P(E);

    at the very ε it is asked for, rounding included, after everything public (such as the drawn
    projection) is part of the output. It need not be decreasing, nor convex in e^ε: the accountant
    takes the greatest convex minorant in e^ε of both together, which is still an upper bound
    because the true supremum is convex. Values at any set of ε must belong to one mechanism: an
    upper bound at each ε separately is enough, and so the maximum over layers may be taken at each
    ε. Composition is adaptive: the bounds must hold whatever was released before.
    """

    def __call__(self, epsilons: Array, /) -> Array: ...


@runtime_checkable
class ProfiledEvent(Protocol):
    """An event that brings its own proof: hashable, equal when the mechanism is equal.

    ``PldAccountant`` composes it under ``"add-remove"`` with any other event.
    """

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must be true of the run for the profiles to hold, one sentence each."""
        ...

    @property
    def references(self) -> tuple[str, ...]:
        """Keys into ``lora_privacy.references`` of the results behind the profiles."""
        ...

    def profile(self, direction: Direction) -> Profile:
        """The upper profile in one direction; see ``Profile``."""
        ...


_EPS = float(np.finfo(np.float64).eps)
_ROOT_2PI = math.sqrt(2 * math.pi)
_TINY = 1e-300  # covers underflow
_LONGEST_ADD = 40.0  # above -log(1-p) for every p < 1


@dataclass(frozen=True, slots=True)
class SampledPair:
    """The worst pair of a Poisson-sampled Gaussian: M = (1-p) N(0,1) + p N(μ,1) against N(0,1).

    ``"remove"`` is M against N(0,1), ``"add"`` N(0,1) against M; with ``rate`` 1 they are equal.

    Args:
        mu: Distance of the two centres in standard deviations, clip norm over noise, > 0.
        rate: p, in (0, 1].

    References:
        Theory and proofs in docs/theory/pld.md; Balle & Wang, arXiv:1805.06530, Thm. 8 (p = 1).
    """

    mu: float
    rate: float

    def upper(self, direction: Direction, epsilons: Array) -> Array:
        """The exact profile at ``epsilons`` >= 0, rounded up."""
        return self._profile(direction, epsilons, 1)

    def lower(self, direction: Direction, epsilons: Array) -> Array:
        """The exact profile at ``epsilons`` >= 0, rounded down."""
        return np.maximum(self._profile(direction, epsilons, -1), 0.0)

    def _profile(self, direction: Direction, epsilons: Array, sign: int) -> Array:
        p, unit = self.rate, sign * _EPS
        if p == 1:
            return self._gaussian(epsilons, sign)
        if direction == "remove":
            # p δ_Gauss(τ), e^τ = 1 + (e^ε - 1)/p
            tau = np.where(
                epsilons < 1,
                np.log1p(np.expm1(np.minimum(epsilons, 1.0)) / p),
                epsilons - math.log(p) + np.log1p((p - 1) * np.exp(-epsilons)),
            )
            return p * (1 + 4 * unit) * self._gaussian(tau, sign) + sign * _TINY
        # e^ε w δ_Gauss(τ), w = e^-ε - (1-p), e^-τ = w/p. It grows with w, which is rounded, and is
        # 0 where w is: the loss never exceeds -log(1-p).
        near = np.minimum(epsilons, _LONGEST_ADD)
        w, share = p + np.expm1(-near) + 4 * unit * p, np.expm1(-near) / p
        inside = w > 0
        w = np.where(inside, w, p)
        tau = np.where(share > -0.5, -np.log1p(np.maximum(share, -0.5)), -np.log(w / p))
        value = np.exp(near) * w * self._gaussian(np.maximum(tau, 0.0), sign)
        return np.where(inside, value * (1 + 8 * unit) + sign * _TINY, 0.0)

    def lines(self, tau: Array, ratios: tuple[Array, ...]) -> list[Array]:
        """Φ(-a) - ratio e^τ Φ(-b) for each ratio, rounded down; a = τ/μ - μ/2, b = a + μ.

        The test "beyond a" has probability Φ(-a) under N(μ, 1) and Φ(-b) under N(0, 1).
        """
        return self._differences(tau, ratios, -1)

    def _gaussian(self, tau: Array, sign: int) -> Array:
        """δ of N(μ, 1) against N(0, 1) at ``tau``, rounded (Balle & Wang, Thm. 8)."""
        return self._differences(tau, (np.ones(1),), sign)[0]

    def _differences(self, tau: Array, ratios: tuple[Array, ...], sign: int) -> list[Array]:
        """``lines``, moved by their rounding error up or down.

        e^τ φ(b) = φ(a), so with Mills' ratio R the tails are φ(a) R(a) and e^-τ φ(a) R(b): nothing
        overflows, and the difference keeps its relative precision far out.
        """
        a, b = tau / self.mu - self.mu / 2, tau / self.mu + self.mu / 2
        density = np.exp(-0.5 * a * a) / _ROOT_2PI
        near = a > -1
        first = np.where(near, density * mills(np.maximum(a, -1.0)), special.ndtr(-a))
        second = density * mills(np.maximum(b, -1.0))
        if b.min(initial=0.0) < -1:
            second = np.where(b < -1, np.exp(np.minimum(tau, 0.0)) * special.ndtr(-b), second)
        # In units of eps: each tail is off by a few; an error of a and b moves the tails by at
        # most the density; φ(a) is off by a factor, which multiplies the difference.
        spread = np.abs(tau) / self.mu + self.mu
        results: list[Array] = []
        for ratio in ratios:
            other = ratio * second
            value = first - other
            error = 36 * (first + other) + 4 * np.abs(tau) * other
            error += 8 * spread * density * (1 + ratio)
            error += 8 * spread * np.abs(a) * np.where(near, np.abs(value), first + other)
            results.append(value + sign * (_EPS * error + _TINY))
        return results


def mills(x: Array) -> Array:
    """(1 - Φ(x)) / φ(x)."""
    return math.sqrt(math.pi / 2) * special.erfcx(x / math.sqrt(2))
