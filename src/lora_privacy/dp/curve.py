"""Many bounds of one history: δ as a function of ε, and what it leaves to an attacker.

Every (ε, δ) of a history limits every test between two neighbours: with false-positive rate α its
false-negative rate β is at least 1 - δ - e^ε α and at least e^{-ε} (1 - δ - α). The best of
several such lines is a lower bound again, so a coarse curve is loose and never wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.dp import _solve
from lora_privacy.dp._checks import checked_rates
from lora_privacy.dp.pld import PldAccountant
from lora_privacy.dp.result import Adjacency, PrivacyBound
from lora_privacy.errors import UnsupportedEventError
from lora_privacy.references import cite

__all__ = ["PrivacyCurve", "privacy_curve"]

Array = npt.NDArray[np.float64]

_TINY = 5e-324  # the least positive rate

_REFERENCE = "kairouz-composition-2015"
_POINTS = 65
_RTOL = 1e-12  # of ε: more than rounding moves a point of a grid
_TOP, _MIDDLE = 0.3, 1e-3  # δ's that grids are built for, beside the one at the end


class _Profile(Protocol):
    def epsilon(self, delta: float) -> PrivacyBound: ...
    def delta(self, epsilon: float) -> PrivacyBound: ...


@dataclass(frozen=True, slots=True)
class PrivacyCurve:
    """Bounds (ε, δ) of one history, and the trade-off between an attacker's errors they prove.

    Args:
        bounds: Of one history and adjacency, by one method or several; vacuous ones are allowed.

    Raises:
        ValueError: There is no bound, or they differ in adjacency or unit.

    References:
        Kairouz, Oh & Viswanath, arXiv:1311.0776, Thm. 2.1: (ε, δ) as a region of error rates.
    """

    bounds: tuple[PrivacyBound, ...]

    def __post_init__(self) -> None:
        kinds = {(bound.adjacency, bound.unit) for bound in self.bounds}
        if len(kinds) != 1:
            raise ValueError(
                "bounds must be at least one, all of one adjacency and unit, got "
                f"{sorted(kinds)}. Bounds of different neighbours say nothing together."
            )

    @property
    def adjacency(self) -> Adjacency:
        """Neighbouring relation that all bounds hold under."""
        return self.bounds[0].adjacency

    @property
    def method(self) -> str:
        """What proved the bounds, such as ``"pld"``; an accountant may fall back on another."""
        return " or ".join(dict.fromkeys(bound.method for bound in self.bounds))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Of all bounds together."""
        return tuple(dict.fromkeys(text for bound in self.bounds for text in bound.assumptions))

    @property
    def references(self) -> tuple[str, ...]:
        """Keys into ``lora_privacy.references``."""
        keys = dict.fromkeys(key for bound in self.bounds for key in bound.references)
        return (*keys, _REFERENCE)

    def trade_off(self, fpr: npt.ArrayLike) -> Array:
        """Lower bound on the false-negative rate at false-positive rates ``fpr``, same shape.

        Raises:
            ValueError: A rate is outside [0, 1] or NaN.
        """
        rates = checked_rates(fpr)
        best = np.zeros(rates.shape)
        for epsilon, delta in self._pairs():
            # e^ε α with α = 0 must stay 0 where e^ε overflows.
            scaled = np.exp(np.minimum(epsilon + np.log(np.maximum(rates, _TINY)), 700.0))
            first = 1 - delta - np.where(rates > 0, scaled, 0.0)
            best = np.maximum(best, np.maximum(first, math.exp(-epsilon) * (1 - delta - rates)))
        # Rounded down: three operations on numbers of size 1.
        return np.maximum(0.0, best - 1e-15)

    def tpr_bound(self, fpr: npt.ArrayLike) -> Array:
        """Upper bound on the true-positive rate at false-positive rates ``fpr``, same shape."""
        return 1.0 - self.trade_off(fpr)

    def advantage(self) -> float:
        """Upper bound on true-positive minus false-positive rate of any attack, in [0, 1].

        At (ε, δ) the two lines meet at equal errors, where the advantage is
        (e^ε - 1 + 2δ)/(e^ε + 1).
        """
        values = [
            math.tanh(epsilon / 2) + delta * (1 - math.tanh(epsilon / 2))
            for epsilon, delta in self._pairs()
        ]
        return min([1.0, *(math.nextafter(value + 1e-15, 2.0) for value in values)])

    def _pairs(self) -> list[tuple[float, float]]:
        """What is proved; an infinite ε or a δ of 1 says nothing."""
        return [(b.epsilon, b.delta) for b in self.bounds if math.isfinite(b.epsilon)]

    def to_dict(self, fpr: tuple[float, ...] = (0.001, 0.01, 0.1)) -> dict[str, Any]:
        """JSON-safe: the points, an attacker's rates, and all that is needed to quote them."""
        first = self.bounds[0]
        return {
            "kind": "guarantee",
            "epsilon": [epsilon for epsilon, _ in self._pairs()],
            "delta": [delta for _, delta in self._pairs()],
            "advantage_at_most": self.advantage(),
            "true_positive_rate_at_most": [
                {"false_positive_rate": rate, "bound": float(self.tpr_bound(rate))} for rate in fpr
            ],
            "adjacency": first.adjacency,
            "unit": first.unit,
            "method": self.method,
            "assumptions": list(self.assumptions),
            "references": list(self.references),
            "citations": [cite(key) for key in self.references],
            "caveats": list(first.caveats),
        }


def privacy_curve(
    accountant: _Profile, *, least_delta: float = 1e-10, points: int = _POINTS
) -> PrivacyCurve:
    """Bounds of ``accountant`` at equally spaced ε, from 0 to where δ falls below ``least_delta``.

    Args:
        accountant: With the history composed already.
        least_delta: Where the curve ends. Taken 10 times larger, up to 0.1, as long as the
            accountant proves no finite ε at it.
        points: How many ε.

    Raises:
        ValueError: An argument is out of range or NaN.
        UnsupportedEventError: No finite ε is proved at any δ up to 0.1.
    """
    _validate.inside("least_delta", least_delta, 0, 1)
    points = _validate.integer("points", points, 2)
    end = accountant.epsilon(least_delta)
    while math.isinf(end.epsilon) and 10 * end.delta <= 0.1:
        end = accountant.epsilon(10 * end.delta)
    if math.isinf(end.epsilon):
        raise UnsupportedEventError(
            f"There is no curve: no finite ε is proved up to δ = {end.delta:g}. {end.reason}"
        )
    inner = np.linspace(0.0, end.epsilon, points)[:-1] if end.epsilon > 0 else np.zeros(1)
    if end.method == "pld" and isinstance(accountant, PldAccountant):
        return PrivacyCurve((*_from_grids(accountant, inner, end), end))
    return PrivacyCurve((*(accountant.delta(float(epsilon)) for epsilon in inner), end))


def _from_grids(
    accountant: PldAccountant, epsilons: Array, end: PrivacyBound
) -> list[PrivacyBound]:
    """Bounds at ``epsilons`` from a few grids, each of which holds a whole curve.

    ``accountant.delta`` would build grids for every ε anew. The points of a grid lie on or above
    the true curve, and so do the chords between them, because δ is convex in e^ε.
    """
    _, sources = accountant._sources()  # pyright: ignore[reportPrivateUsage]  (same package)
    best: Array = np.ones(epsilons.shape)
    for level in (end.delta, math.sqrt(end.delta * _MIDDLE), _MIDDLE, _TOP):
        if level == _TOP and best[0] < _TOP:
            break  # a δ that large is nowhere on the curve
        worst = np.zeros(epsilons.shape)
        for at, delta in _solve.upper_points(sources, level):
            found = _chord(at, delta, epsilons * (1 - _RTOL))
            worst = np.maximum(worst, found)
        best = np.minimum(best, worst)
    reason = "the grids prove no δ below 1 at this ε."
    return [
        replace(
            end,
            epsilon=epsilon,
            delta=min(1.0, max(delta, end.delta)),
            reason=reason if delta >= 1 else None,
        )
        for epsilon, delta in zip(epsilons.tolist(), best.tolist(), strict=True)
    ]


def _chord(at: Array, delta: Array, epsilons: Array) -> Array:
    """δ on the line, in e^ε, between the points around each ε; 1 before the first point."""
    before = np.searchsorted(at, epsilons, side="right") - 1
    k = np.clip(before, 0, max(len(at) - 2, 0))
    after = np.minimum(k + 1, len(at) - 1)
    width = np.maximum(np.expm1(at[after] - at[k]), 1e-300)
    share = np.clip(np.expm1(np.minimum(epsilons - at[k], 600.0)) / width, 0.0, 1.0)
    return np.where(before < 0, 1.0, delta[k] + share * (delta[after] - delta[k]))
