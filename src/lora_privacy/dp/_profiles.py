"""Privacy profiles: what an accountant of loss distributions needs to know of one release."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

__all__ = ["DIRECTIONS", "Direction", "Profile", "ProfiledEvent", "SampledPair"]

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
_TINY = 1e-300


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
        return self._value(direction, epsilons, epsilons, _EPS)

    def line(self, direction: Direction, threshold: Array, epsilons: Array) -> Array:
        """P(E) - e^ε Q(E), rounded down, with E the likelihood-ratio test at ``threshold`` >= 0.

        Linear in e^ε, never above the profile, and tangent to it at ε = ``threshold``. Entries of
        the two arrays are paired.
        """
        return self._value(direction, threshold, epsilons, -_EPS)

    def _value(self, direction: Direction, threshold: Array, at: Array, unit: float) -> Array:
        """The line of the test at ``threshold``, moved by its rounding error times sign(unit)."""
        p, same = self.rate, threshold is at
        if p == 1:
            ratio = np.ones(1) if same else np.exp(at - threshold)
            return self._line(threshold, ratio, unit)
        if direction == "remove":
            with np.errstate(over="ignore"):
                tau = np.where(
                    threshold < 1,
                    np.log1p(np.expm1(np.minimum(threshold, 1.0)) / p),
                    threshold - math.log(p) + np.log1p((p - 1) * np.exp(-threshold)),
                )
            if same:
                return p * self._line(tau, np.ones(1), unit)
            moved = p * np.exp(-at) - np.expm1(-at)
            moved /= p * np.exp(-threshold) - np.expm1(-threshold)
            return p * self._line(tau, np.exp(at - threshold) * moved, unit)
        # "add": the loss never exceeds -log(1-p); w(ε) = e^-ε - (1-p) falls to 0 there.
        fuzz = 4 * unit * p
        w_test = p + np.expm1(-threshold)
        inside = w_test + 4 * abs(unit) * p > 0 if unit > 0 else w_test > 4 * abs(unit) * p
        w_test = np.where(inside, w_test + max(fuzz, 0.0), p)
        share = np.expm1(-np.minimum(threshold, 40.0)) / p
        tau = np.where(share > -0.5, -np.log1p(np.maximum(share, -0.5)), -np.log(w_test / p))
        tau = np.maximum(tau, 0.0)
        if same:
            scale = np.exp(np.minimum(at, 40.0)) * w_test
            return np.where(inside, scale * self._line(tau, np.ones(1), unit), 0.0)
        w_at = p + np.expm1(-at) + fuzz
        positive = w_at > 0
        w_at = np.where(positive, w_at, p)
        found = np.exp(np.minimum(at, 40.0)) * w_at * self._line(tau, w_test / w_at, unit)
        # Past the end of the losses the line is negative wherever the test is not empty.
        return np.where(inside, np.where(positive, found, -1.0), 0.0)

    def _line(self, tau: Array, ratio: Array, unit: float) -> Array:
        """Φ(-a) - ratio e^τ Φ(-b), a = τ/μ - μ/2, b = a + μ, moved by its rounding error.

        e^τ φ(b) = φ(a), so with Mills' ratio R it is φ(a) (R(a) - ratio R(b)): no overflow.
        """
        a, b = tau / self.mu - self.mu / 2, tau / self.mu + self.mu / 2
        density = np.exp(-0.5 * a * a) / _ROOT_2PI
        second = density * ratio * _mills(b)
        first = np.where(a > -1, density * _mills(np.maximum(a, -1.0)), special.ndtr(-a))
        value = first - second
        spread = np.abs(tau) / self.mu + self.mu
        slack = 32 * (first + second) + 8 * spread * (np.abs(a * value) + density)
        # The last term covers underflow.
        return value * (1 + 4 * unit) + unit * slack + math.copysign(_TINY, unit)


def _mills(x: Array) -> Array:
    """(1 - Φ(x)) / φ(x)."""
    return math.sqrt(math.pi / 2) * special.erfcx(x / math.sqrt(2))
