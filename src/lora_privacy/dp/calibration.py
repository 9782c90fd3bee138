"""From a privacy target to the noise, the steps or the rank that meet it, with the proof.

A search only proposes a value. What is returned was accounted again at exactly that value, so a
certificate never rests on ε being monotone, on a tolerance or on the value before it was rounded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Any, Literal, Protocol, Self, cast

from lora_privacy import _notebook, _validate
from lora_privacy._notebook import Part
from lora_privacy.dp.events import Event
from lora_privacy.dp.pld import PldAccountant
from lora_privacy.dp.rdp import RdpAccountant
from lora_privacy.dp.result import PrivacyBound, bound_parts
from lora_privacy.errors import CalibrationError, UnsupportedEventError

__all__ = ["Accountant", "Calibration", "calibrate", "calibrate_rank", "calibrate_steps"]

Quantity = Literal["noise_multiplier", "steps", "rank"]

LEAST_NOISE, MOST_NOISE = 1e-2, 1e6
MOST_STEPS = 10**9
_DIGITS = 5  # of the returned noise multiplier: rounding adds at most 1e-4 of it
_RTOL, _ROUGH = 2e-5, 1e-2  # where a bisection of the noise stops: well below the rounding
# Tried in turn where rounding up misses: on a grid ε moves by up to 1 % with its choice.
_MORE = (1e-3, 5e-3, 2e-2)
_WIDE, _NARROW = 4.0, 1.25  # factor between guesses: without any idea, and near a good one


class Accountant(Protocol):
    """What a search needs of an accountant; ``RdpAccountant`` and ``PldAccountant`` have it."""

    def compose(self, event: Any, count: int = 1) -> Self:  # noqa: ANN401
        """Return an accountant that has also paid for ``count`` releases of ``event``."""
        ...

    def epsilon(self, delta: float) -> PrivacyBound:
        """Smallest ε proved at ``delta``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A value that meets a privacy target, and the bound that certifies it.

    Attributes:
        quantity: What was searched: ``"noise_multiplier"``, ``"steps"`` or ``"rank"``.
        value: The value, in units of the quantity: z = σ/C with five significant digits, or a
            whole number.
        target: The ε asked for, in nats.
        bound: Proved at ``value``, at the δ asked for; ``bound.epsilon <= target``.

    Raises:
        ValueError: The bound does not meet the target.
    """

    quantity: Quantity
    value: float
    target: float
    bound: PrivacyBound

    def __post_init__(self) -> None:
        if not self.bound.epsilon <= self.target:
            raise ValueError(
                f"bound must certify ε ≤ {self.target!r}, got ε = {self.bound.epsilon!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields."""
        return {
            "kind": "calibration",
            "quantity": self.quantity,
            "value": self.value,
            "target_epsilon": self.target,
            "bound": self.bound.to_dict(),
        }

    def __str__(self) -> str:
        """The value, then the paragraph of its bound."""
        return _notebook.paragraph(self._parts())

    def _repr_html_(self) -> str:
        return _notebook.box("Guarantee", self._parts())

    def _parts(self) -> list[Part]:
        name = self.quantity.replace("_", " ")
        return [f"{name} = {self.value!r} meets ε ≤ {self.target!r}:", *bound_parts(self.bound)]


def calibrate(
    event_of: Callable[[float], object],
    *,
    epsilon: float,
    delta: float,
    steps: int,
    accountant: Accountant | None = None,
) -> Calibration:
    """Smallest noise multiplier, to five digits, at which ``steps`` releases cost ``epsilon``.

    Args:
        event_of: The release at a noise multiplier, such as
            ``lambda z: SampledGaussian(z, 0.01)``.
        epsilon: Target ε in nats, positive and finite.
        delta: δ, in (0, 1).
        steps: Number of releases, at least 1.
        accountant: What proves the bound, and the adjacency. What it has composed already is part
            of the cost, so the search spends what is left. The default is an empty
            ``PldAccountant``.

    Returns:
        The value is rounded up in its fifth digit, and the bound is proved at the rounded value.
        It is within 1.2e-4 of where the accountant's own ε crosses the target. The slack of that
        ε, up to 1 % for ``PldAccountant``, is paid in noise, rarely twice.

    Raises:
        ValueError: A target is out of range or NaN.
        TypeError: ``steps`` is no integer.
        CalibrationError: The target is missed at a noise multiplier of 1e6, or met at 1e-2, where
            the noise is no longer what protects.
        UnsupportedEventError: The accountant has no proof for the event.

    >>> from lora_privacy.dp import RdpAccountant, SampledGaussian
    >>> found = calibrate(
    ...     lambda z: SampledGaussian(z, 0.01), epsilon=2.0, delta=1e-5, steps=1000,
    ...     accountant=RdpAccountant(),
    ... )
    >>> found.value, found.bound.epsilon <= 2.0
    (1.0223, True)
    """
    steps = _validate.integer("steps", steps, 1)
    prover = _checked(epsilon, delta, accountant)

    def prove(noise_multiplier: float) -> PrivacyBound:
        return prover.compose(event_of(noise_multiplier), steps).epsilon(delta)

    def met(noise_multiplier: float) -> bool:
        return prove(noise_multiplier).epsilon <= epsilon

    start, factor = 1.0, _WIDE
    if (scout := _scout(prover)) is not None:

        def rough(noise_multiplier: float) -> bool:
            event = cast("Event", event_of(noise_multiplier))
            return scout.compose(event, steps).epsilon(delta).epsilon <= epsilon

        with contextlib.suppress(UnsupportedEventError):
            _, start = _noise_between(rough, start, factor, _ROUGH)
            factor = _NARROW
    low, high = _noise_between(met, start, factor, _RTOL)
    if low == 0:
        raise CalibrationError(
            f"The target is met even at a noise multiplier of {LEAST_NOISE:g}: it is so loose "
            "that the noise is not what protects. Ask for a smaller ε or δ."
        )
    if math.isinf(high):
        raise CalibrationError(
            f"No noise multiplier up to {MOST_NOISE:g} meets the target: there "
            f"{_miss(prove(MOST_NOISE), epsilon)} Ask for a larger ε or δ, or take fewer steps."
        )
    value = _round_up(high)
    bound = prove(value)
    for more in _MORE:
        if bound.epsilon <= epsilon:
            break
        value = _round_up(high * (1 + more))
        bound = prove(value)
    if not bound.epsilon <= epsilon:
        raise CalibrationError(
            f"ε is {bound.epsilon!r} at noise_multiplier {value!r} but at most {epsilon!r} at "
            f"{high!r}: ε must not grow with the noise. Look at event_of."
        )
    return Calibration(
        quantity="noise_multiplier", value=value, target=float(epsilon), bound=bound
    )


def calibrate_steps(
    event: object, *, epsilon: float, delta: float, accountant: Accountant | None = None
) -> Calibration:
    """Largest number of releases of ``event`` that cost at most ``epsilon``.

    Args:
        event: One release.
        epsilon: Target ε in nats, positive and finite.
        delta: δ, in (0, 1).
        accountant: As in ``calibrate``.

    Raises:
        ValueError: A target is out of range or NaN.
        CalibrationError: One release misses the target, or 10⁹ releases meet it.
        UnsupportedEventError: The accountant has no proof for the event.

    >>> from lora_privacy.dp import RdpAccountant, SampledGaussian
    >>> event = SampledGaussian(1.0, 0.01)
    >>> calibrate_steps(event, epsilon=2.0, delta=1e-5, accountant=RdpAccountant()).value
    881
    """
    prover = _checked(epsilon, delta, accountant)

    def prove(steps: int) -> PrivacyBound:
        return prover.compose(event, steps).epsilon(delta)

    start = 1
    if (scout := _scout(prover)) is not None:
        with contextlib.suppress(UnsupportedEventError):
            start, _ = _largest(
                lambda n: scout.compose(cast("Event", event), n).epsilon(delta),
                epsilon,
                MOST_STEPS,
            )
    value, bound = _largest(prove, epsilon, MOST_STEPS, max(start, 1))
    if bound is None:
        raise CalibrationError(
            f"One release of {event!r} already misses the target: {_miss(prove(1), epsilon)}"
        )
    if value == MOST_STEPS:
        raise CalibrationError(
            f"{MOST_STEPS:,} releases of {event!r} still cost only ε = {bound.epsilon:.4g} at "
            f"δ = {delta!r}: the number of steps is not what limits ε ≤ {epsilon!r}."
        )
    return Calibration(quantity="steps", value=value, target=float(epsilon), bound=bound)


def calibrate_rank(
    event_of: Callable[[int], object],
    *,
    epsilon: float,
    delta: float,
    steps: int,
    max_rank: int,
    accountant: Accountant | None = None,
) -> Calibration:
    """Largest rank up to ``max_rank`` at which ``steps`` releases cost at most ``epsilon``.

    Args:
        event_of: The release at a rank, such as
            ``lambda rank: ProjectedGaussian(layers=[(768, rank)], noise_multiplier=1.0)``.
        epsilon: Target ε in nats, positive and finite.
        delta: δ, in (0, 1).
        steps: Number of releases, at least 1.
        max_rank: Largest rank to try. At ``in_features`` the projection keeps everything, and the
            event costs what the plain Gaussian costs.
        accountant: As in ``calibrate``.

    Returns:
        ``max_rank`` itself when that meets the target.

    Raises:
        ValueError: A target is out of range or NaN.
        TypeError: ``steps`` or ``max_rank`` is no integer.
        CalibrationError: Rank 1 misses the target.
        UnsupportedEventError: The accountant has no proof for the event.
    """
    steps = _validate.integer("steps", steps, 1)
    max_rank = _validate.integer("max_rank", max_rank, 1)
    prover = _checked(epsilon, delta, accountant)

    def prove(rank: int) -> PrivacyBound:
        return prover.compose(event_of(rank), steps).epsilon(delta)

    value, bound = _largest(prove, epsilon, max_rank)
    if bound is None:
        raise CalibrationError(
            f"Rank 1 already misses the target: {_miss(prove(1), epsilon)} "
            "Add noise or take fewer steps."
        )
    return Calibration(quantity="rank", value=value, target=float(epsilon), bound=bound)


def _checked(epsilon: float, delta: float, accountant: Accountant | None) -> Accountant:
    """Check the target, and that what is spent already leaves something of it."""
    _validate.positive("epsilon", epsilon, "It is the target, in nats.")
    _validate.inside("delta", delta, 0, 1)
    prover: Accountant = PldAccountant() if accountant is None else accountant
    spent = prover.epsilon(delta)
    if not spent.epsilon <= epsilon:
        raise CalibrationError(
            f"The accountant has spent ε = {spent.epsilon:.6g} at δ = {delta!r} already, more "
            f"than the target {epsilon!r}: nothing is left for further releases."
        )
    return prover


def _scout(prover: Accountant) -> RdpAccountant | None:
    """A cheap accountant of the same ledger, whose answer is a good first guess."""
    if not isinstance(prover, PldAccountant):
        return None
    scout = RdpAccountant(prover.adjacency)
    with contextlib.suppress(UnsupportedEventError):
        for event, count in prover.events:
            scout = scout.compose(cast("Event", event), count)
        return scout
    return None


def _noise_between(
    met: Callable[[float], bool], start: float, factor: float, tolerance: float
) -> tuple[float, float]:
    """A noise multiplier that misses and one that meets, with a ratio up to 1 + ``tolerance``.

    The first is 0 when all meet, the second is ``inf`` when none does.
    """
    low = high = min(max(start, LEAST_NOISE), MOST_NOISE)
    if met(high):
        while True:
            if high == LEAST_NOISE:
                return 0.0, high
            low = max(high / factor, LEAST_NOISE)
            if not met(low):
                break
            high, factor = low, min(factor * factor, _WIDE)
    else:
        while True:
            if low == MOST_NOISE:
                return low, math.inf
            high = min(low * factor, MOST_NOISE)
            if met(high):
                break
            low, factor = high, min(factor * factor, _WIDE)
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if met(middle) else (middle, high)
    return low, high


def _largest(
    prove: Callable[[int], PrivacyBound], epsilon: float, most: int, start: int = 1
) -> tuple[int, PrivacyBound | None]:
    """Largest whole number in 1..most that meets, with its bound; 0 and None when 1 misses.

    Doubles from ``start``, or halves its distance to 0 when it misses, and bisects.
    """
    low, best = 0, None
    guess, high = start, most + 1
    while high - low > 1:
        bound = prove(guess)
        if bound.epsilon <= epsilon:
            low, best = guess, bound
        else:
            high = guess
        # Until something misses there is no middle to go to.
        guess = min(max(low + 1, math.ceil(low * _NARROW if low == start else 2 * low)), most)
        if high <= most:
            guess = (low + high) // 2
    return low, best


def _miss(bound: PrivacyBound, epsilon: float) -> str:
    """Why a bound misses the target, as a sentence without its beginning."""
    if bound.reason is not None:
        return f"no ε is proved at δ = {bound.delta!r}: {bound.reason}"
    return (
        f"method {bound.method!r} proves ε = {bound.epsilon:.6g} at δ = {bound.delta!r}, not "
        f"{epsilon!r}."
    )


def _round_up(value: float) -> float:
    """Smallest decimal of five significant digits whose float is not below ``value``."""
    exact = Decimal(value)
    digit = Decimal(1).scaleb(exact.adjusted() + 1 - _DIGITS)
    # Rounding to the nearest float keeps order, so it is not below ``value``, which is a float.
    return float(exact.quantize(digit, rounding=ROUND_CEILING))
