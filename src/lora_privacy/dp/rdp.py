"""Rényi accounting of plain, Poisson-sampled and projected Gaussians; every ε is rounded up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.dp import _moments
from lora_privacy.dp._checks import (
    check_sample_rate,
    checked_delta,
    checked_epsilon,
    checked_orders,
    merged_ledger,
)
from lora_privacy.dp._conversion import least_epsilon, least_log_delta
from lora_privacy.dp.events import (
    Event,
    GaussianEvent,
    ProjectedGaussian,
    SampledGaussian,
    assumptions_of,
    references_of,
)
from lora_privacy.dp.projected import refuse_unproved as refuse_unproved_projection
from lora_privacy.dp.result import ADJACENCIES, Adjacency, PrivacyBound
from lora_privacy.errors import UnsupportedEventError

__all__ = ["RdpAccountant", "event_rdp", "sampled_gaussian_bounds", "sampled_gaussian_rdp"]

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_REFERENCES = ("mironov-rdp-2017", "mironov-sampled-2019", "canonne-discrete-2020")


def sampled_gaussian_rdp(
    noise_multiplier: npt.ArrayLike, sample_rate: float, orders: npt.ArrayLike
) -> Array:
    """Rényi divergences of the Poisson-sampled Gaussian, add/remove, rounded up.

    Both directions are covered: D_α(mixture ‖ base) is the larger one at every order > 1.

    Args:
        noise_multiplier: z = σ/C, any shape, positive.
        sample_rate: Probability that a record takes part, in (0, 1].
        orders: Rényi orders, any shape, finite and > 1.

    Returns:
        Shape ``noise_multiplier.shape + orders.shape``, in nats; never below the true value, and
        above it by less than 1e-9 of it, plus (1e-12 p + 3e-20)/(α-1) at fractional orders. Where
        the formula for sampling leaves double precision, the value without sampling.

    Raises:
        ValueError: An argument is out of range or NaN.

    References:
        Mironov, Talwar & Zhang, arXiv:1908.10530, Sec. 3 (one dimension is enough, which direction
        is larger, integer orders); proofs in docs/theory/rdp.md.

    >>> sampled_gaussian_rdp([1.0, 2.0], 0.01, [2.0, 2.5, 32.0]).shape
    (2, 3)
    """
    noises = np.asarray(noise_multiplier, dtype=np.float64)
    wanted = checked_orders(orders)
    check_sample_rate(sample_rate)
    for noise in noises.ravel():
        _validate.positive("noise_multiplier", float(noise))
    flat = np.broadcast_to(wanted.ravel(), (noises.size, wanted.size))
    return _rows(noises.ravel(), sample_rate, flat).reshape(noises.shape + wanted.shape)


def event_rdp(
    event: Event, orders: npt.ArrayLike, *, adjacency: Adjacency = "add-remove"
) -> Array:
    """Rényi divergences of one ``event``, an upper bound in nats, of the shape of ``orders``.

    Args:
        event: A plain, a Poisson-sampled or a projected Gaussian release.
        orders: Rényi orders, finite and > 1.
        adjacency: Under ``"replace"`` a plain Gaussian moves by 2C, twice the clip norm. The
            formula of the sampled Gaussian is proved for ``"add-remove"`` only;
            ``PldAccountant`` takes it under both.

    Raises:
        UnsupportedEventError: There is no proof for this event under this adjacency.
        ValueError: An order is out of range.
    """
    _validate.choice("adjacency", adjacency, ADJACENCIES)
    wanted = checked_orders(orders)
    _refuse_unproved(event, adjacency)
    return _divergences(event, wanted.ravel(), adjacency).reshape(wanted.shape)


@dataclass(frozen=True, slots=True)
class RdpAccountant:
    """Adds up Rényi divergences and converts the sum to (ε, δ); a value, not a counter.

    Args:
        adjacency: ``"add-remove"`` or ``"replace"``, as in ``event_rdp``.
        orders: Rényi orders to minimise over: exactly these, to compare with another accountant.
            None, the default, searches a lattice that has no edge: it follows the best order
            from 1 + 1e-12 to 1e18.
        events: The ledger: each event with its number of releases.

    Raises:
        ValueError: An order or a count is out of range.
        UnsupportedEventError: There is no proof for an event under this adjacency.

    References:
        Mironov, arXiv:1702.07476, Prop. 1 (composition, adaptive too); Canonne, Kamath & Steinke,
        arXiv:2004.00010, Prop. 12 (conversion).

    >>> accountant = RdpAccountant().compose(SampledGaussian(1.0, 0.01), 1000)
    >>> round(accountant.epsilon(1e-5).epsilon, 3)
    2.101
    """

    adjacency: Adjacency = "add-remove"
    orders: tuple[float, ...] | None = None
    events: tuple[tuple[Event, int], ...] = ()

    def __post_init__(self) -> None:
        _validate.choice("adjacency", self.adjacency, ADJACENCIES)
        if self.orders is not None:
            grid = checked_orders(self.orders)
            if grid.ndim != 1 or not grid.size:
                raise ValueError(
                    f"orders must be a flat sequence, not empty, got {self.orders!r}. "
                    "Use orders=None to search for the best one."
                )
            if not np.all(grid[1:] > grid[:-1]):
                grid = np.unique(grid)  # ascending, so that the search may rely on it
            object.__setattr__(self, "orders", tuple(grid.tolist()))
        for event, _ in self.events:
            _refuse_unproved(event, self.adjacency)
        object.__setattr__(self, "events", merged_ledger(self.events))

    def compose(self, event: Event, count: int = 1) -> Self:
        """Return a new accountant that has also paid for ``count`` releases of ``event``.

        Raises:
            UnsupportedEventError: There is no proof for ``event`` under this adjacency.
            TypeError: ``count`` is no integer.
            ValueError: ``count`` is below 1.
        """
        return type(self)(self.adjacency, self.orders, (*self.events, (event, count)))

    def epsilon(self, delta: float) -> PrivacyBound:
        """Smallest ε proved at ``delta``, rounded up; ValueError unless 0 < delta < 1.

        Floating-point rounding is bounded and added, so an ε may be above the exact minimum by
        about 1e-11 of it, and never below.
        """
        delta = checked_delta(delta)
        value = 0.0
        if self.events:
            value = least_epsilon(self._cost, self._plain(), delta, self.orders).item()
        return _bound(value, delta, self.adjacency, [event for event, _ in self.events])

    def delta(self, epsilon: float) -> PrivacyBound:
        """Smallest δ proved at ``epsilon``, rounded up and at least 5e-324.

        Raises:
            ValueError: ``epsilon`` is negative, infinite or NaN.
        """
        epsilon, low = checked_epsilon(epsilon), -math.inf
        if self.events:
            low = least_log_delta(self._cost, self._plain(), epsilon, self.orders).item()
        value = min(1.0, math.nextafter(math.exp(min(low, 0.0)), 2.0))
        return _bound(epsilon, value, self.adjacency, [event for event, _ in self.events])

    def _cost(self, rows: npt.NDArray[np.int64], orders: Array) -> Array:
        """Composed divergence of the only row, rounded up."""
        total = np.zeros(orders.shape)
        alike: dict[float, list[tuple[float, int]]] = {}
        for event, count in self.events:
            if isinstance(event, ProjectedGaussian):
                total += count * _divergences(event, orders, self.adjacency)
            else:
                noise, rate = _noise_and_rate(event, self.adjacency)
                alike.setdefault(rate, []).append((noise, count))
        # One call for all of a rate: a call costs far more than the noise multipliers in it.
        for rate, group in alike.items():
            noises, counts = np.array(group, dtype=np.float64).T
            each = _rows(noises, rate, np.broadcast_to(orders, (len(group), orders.size)))
            total += counts @ each
        return total * (1 + 4 * _EPS * (len(self.events) + len(rows)))

    def _plain(self) -> Array:
        """Composed divergence at order 1 without sampling, about."""
        moved = 2.0 if self.adjacency == "replace" else 1.0
        noises = np.array([event.noise_multiplier for event, _ in self.events])
        counts = np.array([count for _, count in self.events], dtype=np.float64)
        with np.errstate(over="ignore"):
            total = np.sum(0.5 * counts * np.square(moved / noises))
        return np.clip([total], 1e-300, 1e300)


def sampled_gaussian_bounds(
    noise_multiplier: npt.ArrayLike,
    sample_rate: float,
    *,
    steps: int,
    delta: float,
    orders: tuple[float, ...] | None = None,
) -> list[PrivacyBound]:
    """Bounds of many runs that differ in their noise only, solved together.

    The same numbers as ``RdpAccountant().compose(SampledGaussian(z, p), steps).epsilon(delta)``
    one z at a time, several times faster.

    Args:
        noise_multiplier: z of each run, flat.
        sample_rate: Probability that a record takes part, in (0, 1].
        steps: Releases of each run, at least 1.
        delta: δ, in (0, 1).
        orders: As in ``RdpAccountant``.

    Raises:
        ValueError: An argument is out of range or NaN.
        TypeError: ``steps`` is no integer.
    """
    noises = np.atleast_1d(np.asarray(noise_multiplier, dtype=np.float64))
    if noises.ndim != 1:
        raise ValueError(f"noise_multiplier must be flat, got shape {noises.shape}.")
    events = [SampledGaussian(float(z), float(sample_rate)) for z in noises]
    steps = _validate.integer("steps", steps, 1)
    delta = checked_delta(delta)
    grid = RdpAccountant(orders=orders).orders

    def cost(rows: npt.NDArray[np.int64], wanted: Array) -> Array:
        return steps * _rows(noises[rows], sample_rate, wanted) * (1 + 8 * _EPS)

    with np.errstate(over="ignore"):
        plain = np.clip(steps * 0.5 / noises / noises, 1e-300, 1e300)
    values = least_epsilon(cost, plain, delta, grid) if events else np.zeros(0)
    return [
        _bound(float(value), delta, "add-remove", [event])
        for value, event in zip(values, events, strict=True)
    ]


def _bound(
    epsilon: float, delta: float, adjacency: Adjacency, events: Sequence[Event]
) -> PrivacyBound:
    reason = None
    if math.isinf(epsilon):
        reason = "the Rényi divergence is beyond double precision at every order tried."
    elif delta == 1:
        reason = f"the Rényi divergences prove no δ below 1 at ε = {epsilon!r}."
    return PrivacyBound(
        epsilon=epsilon,
        delta=delta,
        adjacency=adjacency,
        method="rdp",
        assumptions=assumptions_of(events),
        references=references_of(_REFERENCES, events),
        reason=reason,
    )


def _divergences(event: Event, orders: Array, adjacency: Adjacency) -> Array:
    """Divergences of one event, of the shape of ``orders``, rounded up."""
    if isinstance(event, ProjectedGaussian):
        return event.rdp(orders, adjacency=adjacency)
    noise, rate = _noise_and_rate(event, adjacency)
    return _rows(np.array([noise]), rate, orders.reshape(1, -1)).reshape(orders.shape)


def _noise_and_rate(
    event: GaussianEvent | SampledGaussian, adjacency: Adjacency
) -> tuple[float, float]:
    """Noise over the distance of the centres, and the sampling rate."""
    moved = 2.0 if adjacency == "replace" else 1.0
    rate = event.sample_rate if isinstance(event, SampledGaussian) else 1.0
    return event.noise_multiplier / moved, rate


def _rows(noises: Array, rate: float, orders: Array) -> Array:
    """Divergences of the sampled Gaussian, ``orders`` (rows, K), rounded up."""
    # 1e±150 keeps z² inside double precision; at the ends the plain value is used.
    with np.errstate(over="ignore"):
        plain = orders * (0.5 / noises / noises)[:, None]
    usual = (noises > 1e-150) & (noises < 1e150)
    result = plain.copy()
    if rate < 1 and usual.any():
        sampled = _moments.log_moment(noises[usual], rate, orders[usual]) / (orders[usual] - 1)
        # Sampling never costs more than no sampling, by joint quasi-convexity.
        result[usual] = np.minimum(sampled, plain[usual])
    return np.nextafter(result * (1 + 4 * _EPS), np.inf)


def _refuse_unproved(event: Event, adjacency: Adjacency) -> None:
    # The exact type: a subclass may mean something else.
    if type(event) not in (GaussianEvent, SampledGaussian, ProjectedGaussian):
        raise UnsupportedEventError(
            f"RdpAccountant has no proof for {type(event).__name__}; it knows GaussianEvent, "
            "SampledGaussian and ProjectedGaussian."
        )
    if isinstance(event, ProjectedGaussian):
        refuse_unproved_projection(event, adjacency)
    if adjacency == "replace" and isinstance(event, SampledGaussian) and event.sample_rate < 1:
        raise UnsupportedEventError(
            "RdpAccountant has no proof for SampledGaussian under adjacency='replace': the "
            "sampled formula is for adding or removing one record. Use PldAccountant, which has a "
            "proof, or adjacency='add-remove'."
        )
