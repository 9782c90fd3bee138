"""Rényi accounting of plain and Poisson-sampled Gaussian releases; every ε is rounded up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self, get_args

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.dp import _moments
from lora_privacy.dp.events import Event, GaussianEvent, SampledGaussian, check_sample_rate
from lora_privacy.dp.result import Adjacency, PrivacyBound
from lora_privacy.errors import UnsupportedEventError

__all__ = ["RdpAccountant", "rdp", "sampled_gaussian_rdp"]

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
# The lattice of orders 1 + 2^(k/96): neighbours lose less than 1e-5 of ε against the best order.
_PER_OCTAVE = 96
_LOWEST, _HIGHEST = -40 * _PER_OCTAVE, 60 * _PER_OCTAVE
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
        above it by about 1e-12 of it. ``inf`` where double precision or 4 million nodes do not do.

    Raises:
        ValueError: An argument is out of range or NaN.

    References:
        Mironov, Talwar & Zhang, arXiv:1908.10530, Thm. 4 (one dimension is enough), Thm. 5 (the
        direction) and Sec. 3.3 (integer orders).

    >>> sampled_gaussian_rdp([1.0, 2.0], 0.01, [2.0, 2.5, 32.0]).shape
    (2, 3)
    """
    noises = np.asarray(noise_multiplier, dtype=np.float64)
    wanted = _checked_orders(orders)
    check_sample_rate(sample_rate)
    for noise in noises.ravel():
        _validate.positive("noise_multiplier", float(noise))
    rows = [_one_noise(float(z), float(sample_rate), wanted.ravel()) for z in noises.ravel()]
    return np.reshape(np.array(rows, dtype=np.float64), noises.shape + wanted.shape)


def rdp(event: Event, orders: npt.ArrayLike, *, adjacency: Adjacency = "add-remove") -> Array:
    """Rényi divergences of one ``event``, an upper bound in nats, of the shape of ``orders``.

    Args:
        event: A plain or a Poisson-sampled Gaussian release.
        orders: Rényi orders, finite and > 1.
        adjacency: Under ``"replace"`` a plain Gaussian moves by 2C, twice the clip norm. The
            formula of the sampled Gaussian is proved for ``"add-remove"`` only.

    Raises:
        UnsupportedEventError: There is no proof for this event under this adjacency.
        ValueError: An order is out of range.
    """
    _validate.choice("adjacency", adjacency, get_args(Adjacency))
    wanted = _checked_orders(orders)
    _refuse_unproved(event, adjacency)
    moved = 2.0 if adjacency == "replace" else 1.0
    rate = event.sample_rate if isinstance(event, SampledGaussian) else 1.0
    return _one_noise(event.noise_multiplier / moved, rate, wanted.ravel()).reshape(wanted.shape)


@dataclass(frozen=True, slots=True)
class RdpAccountant:
    """Adds up Rényi divergences and converts the sum to (ε, δ); a value, not a counter.

    Args:
        adjacency: ``"add-remove"`` or ``"replace"``, as in ``rdp``.
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
    2.102
    """

    adjacency: Adjacency = "add-remove"
    orders: tuple[float, ...] | None = None
    events: tuple[tuple[Event, int], ...] = ()

    def __post_init__(self) -> None:
        _validate.choice("adjacency", self.adjacency, get_args(Adjacency))
        if self.orders is not None:
            kept = tuple(sorted({float(order) for order in self.orders}))
            if not kept:
                raise ValueError("orders must name at least one order, got none. Use orders=None.")
            _checked_orders(kept)
            object.__setattr__(self, "orders", kept)
        for event, count in self.events:
            _refuse_unproved(event, self.adjacency)
            _validate.integer("count", count, 1)

    def compose(self, event: Event, count: int = 1) -> Self:
        """Return a new accountant that has also paid for ``count`` releases of ``event``.

        Raises:
            UnsupportedEventError: There is no proof for ``event`` under this adjacency.
            TypeError: ``count`` is no integer.
            ValueError: ``count`` is below 1.
        """
        _refuse_unproved(event, self.adjacency)
        ledger = dict(self.events)
        ledger[event] = ledger.get(event, 0) + _validate.integer("count", count, 1)
        return type(self)(self.adjacency, self.orders, tuple(ledger.items()))

    def epsilon(self, delta: float) -> PrivacyBound:
        """Smallest ε proved at ``delta``, rounded up; ValueError unless 0 < delta < 1.

        The minimum over orders α of R(α) + log((α-1)/α) - (log δ + log α)/(α-1), or 0 if that is
        negative, where R is the composed divergence.
        """
        _validate.inside("delta", delta, 0, 1, "Gaussian noise gives no finite ε at δ = 0.")
        log_delta = math.log(delta)

        def objective(orders: Array) -> Array:
            spread = orders - 1
            cost = self._total(orders)
            gain = np.log(spread) - np.log(orders)
            price = -(log_delta + np.log(orders)) / spread
            slack = 8 * _EPS * (cost - gain - (log_delta - np.log(orders)) / spread)
            return cost + gain + price + slack

        value = max(0.0, self._minimum(objective, -log_delta)) if self.events else 0.0
        return self._bound(value, delta, None if math.isfinite(value) else _OVERFLOW)

    def delta(self, epsilon: float) -> PrivacyBound:
        """Smallest δ proved at ``epsilon``, rounded up and at least 5e-324.

        Raises:
            ValueError: ``epsilon`` is negative, infinite or NaN.
        """
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"epsilon must be finite and at least 0, got {epsilon!r}.")

        def objective(orders: Array) -> Array:
            spread = orders - 1
            cost, gain = self._total(orders), np.log(spread) - np.log(orders)
            slack = 8 * _EPS * (spread * (cost + epsilon - gain) + np.log(orders))
            return spread * (cost - epsilon + gain) - np.log(orders) + slack

        low = self._minimum(objective, epsilon + 1.0) if self.events else -math.inf
        value = min(1.0, math.nextafter(math.exp(min(low, 0.0)), 2.0))
        vacuous = f"the Rényi divergences prove no δ below 1 at ε = {epsilon!r}."
        return self._bound(epsilon, value, None if value < 1 else vacuous)

    def _total(self, orders: Array) -> Array:
        """Composed divergence, rounded up."""
        total = np.zeros(orders.shape)
        for event, count in self.events:
            total += count * rdp(event, orders, adjacency=self.adjacency)
        return total * (1 + 4 * _EPS * (len(self.events) + 1))

    def _minimum(self, objective: Callable[[Array], Array], price: float) -> float:
        """Minimum over the orders; any order gives a bound, so a missed one costs tightness."""
        if self.orders is not None:
            fixed = np.array(self.orders)
            first, last = 0, len(fixed) - 1
            return _search(lambda k: objective(fixed[k]), first, last, last // 2, (12, 1))
        # Without sampling the best order is near 1 + √(price/cost); with sampling it is larger.
        moved = 2.0 if self.adjacency == "replace" else 1.0
        cost = sum(n * (moved / event.noise_multiplier) ** 2 / 2 for event, n in self.events)
        guess = 0.5 * _PER_OCTAVE * (math.log2(price) - math.log2(max(cost, 1e-300)))
        start = int(min(max(guess, _LOWEST), _HIGHEST))
        return _search(
            lambda k: objective(1.0 + np.exp2(k / _PER_OCTAVE)),
            _LOWEST,
            _HIGHEST,
            start,
            (_PER_OCTAVE, _PER_OCTAVE // 8, 1),
        )

    def _bound(self, epsilon: float, delta: float, reason: str | None) -> PrivacyBound:
        assumptions = ["each record's contribution to a release has norm at most the clip norm"]
        if any(isinstance(event, SampledGaussian) for event, _ in self.events):
            assumptions.append("batches are Poisson samples that stay secret")
        assumptions.append("the noise is Gaussian, fresh for each release and unknown to others")
        return PrivacyBound(
            epsilon=epsilon,
            delta=delta,
            adjacency=self.adjacency,
            method="rdp",
            assumptions=tuple(assumptions),
            references=_REFERENCES,
            reason=reason,
        )


_OVERFLOW = "the Rényi divergence is beyond double precision at every order tried."


def _search(
    objective: Callable[[npt.NDArray[np.int64]], Array],
    first: int,
    last: int,
    start: int,
    strides: Iterable[int],
) -> float:
    """Minimum of a unimodal ``objective`` over the whole numbers first..last.

    Unimodal because the numerator of ε(α) = N(α)/(α-1) is convex (docs/theory/rdp.md). Each round
    looks at 13 points and walks on while the best one is at an edge of its window.
    """
    best, value = start, math.inf
    for stride in strides:
        while True:
            points = best + stride * np.arange(-_HALF_WINDOW, _HALF_WINDOW + 1)
            points = np.unique(np.clip(points, first, last))
            values = objective(points)
            # An overflow says only that the order is too large, so it sends the search down.
            at = int(np.argmin(np.where(np.isnan(values), np.inf, values)))
            inner = 0 < at < len(points) - 1
            best = int(points[at])
            value = min(value, float(values[at]))
            if inner or best in (first, last):
                break
    return value


_HALF_WINDOW = 6


def _one_noise(z: float, p: float, orders: Array) -> Array:
    """Divergences at flat ``orders``, each rounded up by one unit in the last place at least."""
    scale = 0.5 / z / z if z > 1e-150 else math.inf
    if p == 1 or not math.isfinite(scale):
        return np.nextafter(orders * scale * (1 + 4 * _EPS), np.inf)
    whole = (orders == np.floor(orders)) & (orders <= _moments.MAX_INTEGER_ORDER)
    result = np.empty(orders.shape)
    if whole.any():
        result[whole] = _moments.log_moment_integer(z, p, orders[whole])
    if not whole.all():
        result[~whole] = _moments.log_moment(z, p, orders[~whole])
    # Sampling never costs more than no sampling (quasi-convexity), so the plain value caps it.
    plain = orders * scale
    return np.nextafter(np.minimum(result / (orders - 1), plain) * (1 + 4 * _EPS), np.inf)


def _checked_orders(orders: npt.ArrayLike) -> Array:
    wanted = np.asarray(orders, dtype=np.float64)
    if not np.all((wanted > 1) & np.isfinite(wanted)):
        raise ValueError(f"orders must be finite and above 1, got {orders!r}.")
    return wanted


def _refuse_unproved(event: Event, adjacency: Adjacency) -> None:
    if not isinstance(event, GaussianEvent | SampledGaussian):
        raise UnsupportedEventError(
            f"RdpAccountant has no proof for {type(event).__name__}; it knows GaussianEvent and "
            "SampledGaussian."
        )
    if adjacency == "replace" and isinstance(event, SampledGaussian) and event.sample_rate < 1:
        raise UnsupportedEventError(
            "RdpAccountant has no proof for SampledGaussian under adjacency='replace': the "
            "sampled formula is for adding or removing one record. Use adjacency='add-remove'."
        )
