"""Accounting by privacy-loss distributions: certified from above and from below."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self, TypeGuard

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.dp import _gaussian, _solve
from lora_privacy.dp._checks import (
    checked_delta,
    checked_epsilon,
    checked_rates,
    merged_ledger,
)
from lora_privacy.dp._profiles import Profile, ProfiledEvent, SampledPair
from lora_privacy.dp._replaced import ReplacedPair
from lora_privacy.dp.events import (
    GaussianEvent,
    ProjectedGaussian,
    SampledGaussian,
    assumptions_of,
    references_of,
)
from lora_privacy.dp.rdp import RdpAccountant
from lora_privacy.dp.result import ADJACENCIES, Adjacency, PrivacyBound
from lora_privacy.errors import UnsupportedEventError

__all__ = ["PldAccountant"]

Array = npt.NDArray[np.float64]
LossEvent = GaussianEvent | SampledGaussian | ProfiledEvent

_EPS = float(np.finfo(np.float64).eps)
# Outside of it the square of the distance leaves double precision.
_LEAST_MU, _MOST_MU = 1e-100, 1e100
_GRID = ("koskela-accountant-2020", "doroshenko-dots-2022", "zhu-dominating-2022")
_CLOSED = ("dong-gaussian-2022", "balle-wang-2018")
_LEVELS = 6  # curves that a trade-off is read from


@dataclass(frozen=True, slots=True)
class PldAccountant:
    """Composes privacy-loss distributions; a value, not a counter.

    Plain Gaussians alone are accounted in closed form. Anything else goes onto a grid, twice: one
    distribution is nowhere below the true one and one nowhere above it, and what truncation, the
    Fourier transform and floating-point arithmetic can add is bounded and added. The grid is
    refined until the two ends of ε differ by at most 1 % of it, as far as memory allows.

    Args:
        adjacency: ``"add-remove"`` or ``"replace"``; under the latter a plain Gaussian moves by
            2C, and a record that a Poisson sample holds is exchanged for another in it.
        events: The ledger: each event with its number of releases. Besides the events of this
            package any ``ProfiledEvent`` is taken under ``"add-remove"``.

    Raises:
        ValueError: A count is out of range.
        UnsupportedEventError: There is no proof for an event under this adjacency.

    References:
        Koskela, Jälkö & Honkela, arXiv:1906.03049 (Fourier accountant); Doroshenko, Ghazi, Kamath,
        Kumar & Manurangsi, arXiv:2207.04380 (connect the dots); Zhu, Dong & Wang,
        arXiv:2106.08567 (dominating pairs compose). Proofs in docs/theory/pld.md.

    >>> accountant = PldAccountant().compose(SampledGaussian(1.0, 0.01), 1000)
    >>> low, high = accountant.epsilon_interval(1e-5)
    >>> 1.81 < low < high < 1.84
    True
    """

    adjacency: Adjacency = "add-remove"
    events: tuple[tuple[LossEvent, int], ...] = ()

    def __post_init__(self) -> None:
        _validate.choice("adjacency", self.adjacency, ADJACENCIES)
        for event, _ in self.events:
            _refuse_unproved(event, self.adjacency)
        object.__setattr__(self, "events", merged_ledger(self.events))

    def compose(self, event: LossEvent, count: int = 1) -> Self:
        """Return a new accountant that has also paid for ``count`` releases of ``event``.

        Raises:
            UnsupportedEventError: There is no proof for ``event`` under this adjacency.
            TypeError: ``count`` is no integer.
            ValueError: ``count`` is below 1.
        """
        return type(self)(self.adjacency, (*self.events, (event, count)))

    def epsilon(self, delta: float) -> PrivacyBound:
        """Smallest ε proved at ``delta``, rounded up; ValueError unless 0 < delta < 1.

        Where the grid cannot reach a width of 1 % of ε, the Rényi bound is computed too, and the
        smaller of both is returned; ``method`` says which.
        """
        delta = checked_delta(delta)
        low, high = self.epsilon_interval(delta)
        method = self._method()
        if method == "pld" and not (math.isfinite(high) and high - low <= _solve.WIDTH * high):
            other = self._rdp()
            if other is not None and (bound := other.epsilon(delta)).epsilon < high:
                return bound
        return self._bound(high, delta, method)

    def delta(self, epsilon: float) -> PrivacyBound:
        """Smallest δ proved at ``epsilon``, rounded up and at least 5e-324.

        Raises:
            ValueError: ``epsilon`` is negative, infinite or NaN.
        """
        epsilon = checked_epsilon(epsilon)
        low, high = self.delta_interval(epsilon)
        method = self._method()
        if method == "pld" and high > 2 * low:
            other = self._rdp()
            if other is not None and (bound := other.delta(epsilon)).delta < high:
                return bound
        return self._bound(epsilon, min(1.0, math.nextafter(high, 2.0)), method)

    def epsilon_interval(self, delta: float) -> tuple[float, float]:
        """Certified ends of the smallest ε at ``delta``, both directions of the adjacency taken.

        The lower end is one of the worst case over neighbours, so that no accountant may print
        less. It is 0 with a ``ProfiledEvent``, such as ``ProjectedGaussian``, in the ledger, which
        gives upper profiles only.

        Raises:
            ValueError: ``delta`` is not in (0, 1).
        """
        delta = checked_delta(delta)
        if not self.events:
            return 0.0, 0.0
        mu, sources = self._sources()
        if not sources:
            return _gaussian.epsilon_interval(*_limits(mu), delta)
        return _solve.epsilon_interval(sources, delta)

    def delta_interval(self, epsilon: float) -> tuple[float, float]:
        """Certified ends of the smallest δ at ``epsilon`` >= 0; see ``epsilon_interval``."""
        epsilon = checked_epsilon(epsilon)
        if not self.events:
            return 0.0, 0.0
        mu, sources = self._sources()
        if not sources:
            return _gaussian.delta_interval(*_limits(mu), epsilon)
        return _solve.delta_interval(sources, epsilon)

    def trade_off(self, fpr: npt.ArrayLike) -> Array:
        """Lower bound of the false negative rate of any attack, at false positive rates ``fpr``.

        Whichever of the two neighbours the attack takes as its null hypothesis.

        Raises:
            ValueError: A rate is not in [0, 1].
        """
        rates = checked_rates(fpr)
        if not self.events:
            return 1.0 - rates
        mu, sources = self._sources()
        if not sources:
            return _gaussian.trade_off(_limits(mu)[1], rates)
        smallest = max(1e-12, float(np.min(rates[rates > 0], initial=1e-3)))
        levels = np.geomspace(0.3, 0.01 * smallest, _LEVELS)
        curves = [_solve.upper_points(sources, float(level)) for level in levels]
        remove, add = (
            (
                np.concatenate([curve[i][0] for curve in curves]),
                np.concatenate([curve[i][1] for curve in curves]),
            )
            for i in (0, 1)
        )
        flat = rates.ravel()
        found = np.minimum(_read(remove, add, flat), _read(add, remove, flat))
        return found.reshape(rates.shape)

    def tpr_bound(self, fpr: npt.ArrayLike) -> Array:
        """Upper bound of the true positive rate of any attack, at false positive rates ``fpr``."""
        return 1.0 - self.trade_off(fpr)

    def advantage(self) -> float:
        """Upper bound of true minus false positive rate of any attack: δ at ε = 0."""
        return self.delta_interval(0.0)[1]

    def _sources(self) -> tuple[float, list[tuple[_solve.Source, int]]]:
        """μ of the plain Gaussians, and what else there is; then the former are among it."""
        replace = self.adjacency == "replace"
        moved, pair = (2.0, ReplacedPair) if replace else (1.0, SampledPair)
        squares: list[float] = []
        sources: list[tuple[_solve.Source, int]] = []
        for event, count in self.events:
            if _is_plain(event):
                mu = max(moved / event.noise_multiplier, _LEAST_MU)
                squares.append(count * min(mu, 1e120) ** 2)
            elif isinstance(event, SampledGaussian):
                low, high = _limits(max(1 / event.noise_multiplier, _LEAST_MU))
                lower, upper = (pair(end, event.sample_rate) for end in (low, high))
                sources.append((_solve.sampled_source(lower, upper), count))
            elif isinstance(event, ProfiledEvent):
                remove, add = _profiles_of(event, self.adjacency)
                name = type(event).__name__
                sources.append((_solve.profiled_source(remove, add, name), count))
        mu = math.sqrt(math.fsum(squares))  # a plain sum of many terms leaves what _limits grants
        if mu > _MOST_MU or any(
            event.noise_multiplier < 1 / _MOST_MU
            for event, _ in self.events
            if isinstance(event, SampledGaussian)
        ):
            return math.inf, []
        if sources and mu > 0:
            lower, upper = (SampledPair(end, 1.0) for end in _limits(mu))
            sources.append((_solve.sampled_source(lower, upper), 1))
        return mu, sources

    def _method(self) -> str:
        return "gdp" if all(_is_plain(event) for event, _ in self.events) else "pld"

    def _rdp(self) -> RdpAccountant | None:
        try:
            return RdpAccountant(self.adjacency, events=self.events)  # pyright: ignore
        except UnsupportedEventError:
            return None

    def _bound(self, epsilon: float, delta: float, method: str) -> PrivacyBound:
        reason = None
        if math.isinf(epsilon):
            reason = (
                f"no finite ε is proved at δ = {delta!r}: losses may be infinite with a larger "
                "probability, or no grid that fits into memory holds them."
            )
        elif delta == 1:
            reason = f"no δ below 1 is proved at ε = {epsilon!r}."
        events = [event for event, _ in self.events]
        keys = _CLOSED if method == "gdp" else _GRID
        if self.adjacency == "replace" and any(map(_is_sampled, events)):
            keys = (*keys, "balle-subsampling-2018")
        return PrivacyBound(
            epsilon=epsilon,
            delta=delta,
            adjacency=self.adjacency,
            method=method,
            assumptions=assumptions_of(events),
            references=references_of(keys, events),
            reason=reason,
        )


def _read(ours: tuple[Array, Array], theirs: tuple[Array, Array], fpr: Array) -> Array:
    """Smallest false negative rate that points (ε, δ) of both directions allow at ``fpr``.

    FNR >= 1 - δ - e^ε FPR, and 1 - FPR <= e^ε FNR + δ in the other direction.
    """
    best = np.zeros(fpr.shape)
    with np.errstate(over="ignore"):
        rise, fall = np.exp(ours[0]), np.exp(-theirs[0])
    for i, rate in enumerate(fpr):
        first = float(np.max(1 - ours[1] - (rise * rate if rate > 0 else 0.0)))
        second = float(np.max(fall * (1 - theirs[1] - rate)))
        best[i] = max(0.0, first - 1e-15, second * (1 - 1e-15) - 1e-15)
    return np.minimum(best, 1 - fpr)


def _profiles_of(event: ProfiledEvent, adjacency: Adjacency) -> tuple[Profile, Profile]:
    """Of both directions; those of ``ProfiledEvent`` are for adding or removing a record."""
    if adjacency == "replace" and isinstance(event, ProjectedGaussian):
        both = event.profile("remove", adjacency=adjacency)
        return both, both
    return event.profile("remove"), event.profile("add")


def _limits(mu: float) -> tuple[float, float]:
    """Lower and upper end of a μ that a few operations on doubles gave."""
    return mu * (1 - 1e-14), mu * (1 + 1e-14)


def _is_plain(event: LossEvent) -> TypeGuard[GaussianEvent | SampledGaussian]:
    return isinstance(event, GaussianEvent) or (
        isinstance(event, SampledGaussian) and event.sample_rate == 1
    )


def _is_sampled(event: LossEvent) -> bool:
    return isinstance(event, SampledGaussian | ProjectedGaussian) and event.sample_rate < 1


def _refuse_unproved(event: LossEvent, adjacency: Adjacency) -> None:
    # The exact type: a subclass may mean something else.
    if type(event) in (GaussianEvent, SampledGaussian):
        return
    known = isinstance(event, ProfiledEvent)  # pyright: ignore[reportUnnecessaryIsInstance]
    if isinstance(event, GaussianEvent | SampledGaussian) or not known:
        raise UnsupportedEventError(
            f"PldAccountant has no proof for {type(event).__name__}; it knows GaussianEvent, "
            "SampledGaussian and events that give their profiles."
        )
    if adjacency == "replace" and type(event) is not ProjectedGaussian:
        raise UnsupportedEventError(
            f"PldAccountant has no proof for {type(event).__name__} under adjacency='replace': "
            "profiles are for adding or removing one record. Use adjacency='add-remove'."
        )
