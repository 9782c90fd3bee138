"""From releases to certified ends of ε(δ) and δ(ε): the choice of grid, tilt and direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_privacy.dp import _fourier, _grid
from lora_privacy.dp._fourier import Part
from lora_privacy.dp._gaussian import crossing
from lora_privacy.dp._profiles import DIRECTIONS, Profile, SampledPair
from lora_privacy.dp._replaced import ReplacedPair
from lora_privacy.errors import ConvergenceError

__all__ = [
    "Source",
    "delta_interval",
    "epsilon_interval",
    "profiled_source",
    "sampled_source",
    "upper_points",
]

Array = npt.NDArray[np.float64]

WIDTH = 0.01  # of ε: what the grid is refined to
_AIM = 0.6  # of the width: what a predicted width must meet
_RATIO = 1.05  # upper over lower end of δ
_SMALL = 1e-3  # deviations of the loss: a width below it is enough where ε is about 0
_TAIL_SHARE = 1e-4  # of δ: what the losses beyond the grid may cost in all
_START = 2048  # grid points of the widest release at first
_MAX_HALF = 1 << 18  # grid points of one release
_MAX_WORK = 1 << 26  # grid points of all transforms together
_ROUNDS = 16
_EPS = float(np.finfo(np.float64).eps)
_NOTHING = (np.zeros(1), np.ones(1))  # δ(0) <= 1


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of release: profiles above in both directions, and a pair below, if known."""

    profiles: tuple[Profile, Profile]
    pair: SampledPair | ReplacedPair | None


def profiled_source(remove: Profile, add: Profile, name: str) -> Source:
    """Of the profiles that the event ``name`` brings; what they return is checked at each use."""

    def checked(profile: Profile) -> Profile:
        def call(epsilons: Array, /) -> Array:
            found = np.asarray(profile(epsilons), dtype=np.float64)
            if found.shape != epsilons.shape or not np.all((found >= 0) & (found <= 1)):
                raise ConvergenceError(
                    f"A profile of {name} must return δ in [0, 1] for each ε; it "
                    "returned another shape, NaN or a number outside. Please report the event."
                )
            return found

        return call

    ours = checked(remove)
    return Source((ours, ours if add is remove else checked(add)), None)


def sampled_source(lower: SampledPair | ReplacedPair, upper: SampledPair | ReplacedPair) -> Source:
    """Of a sampled Gaussian whose distance of centres is known up to rounding."""

    def remove(epsilons: Array) -> Array:
        return upper.upper("remove", epsilons)

    def add(epsilons: Array) -> Array:
        return upper.upper("add", epsilons)

    return Source((remove, add), lower)


Sources = Sequence[tuple[Source, int]]


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """All releases on one grid: ``above[i]`` are the parts in direction i."""

    step: float
    halves: list[int]
    above: tuple[list[Part], list[Part]]


def epsilon_interval(sources: Sources, delta: float) -> tuple[float, float]:
    """Certified lower and upper end of ε at ``delta``; (0, inf) where no grid holds the losses."""
    if _variation(sources) <= delta:
        return 0.0, 0.0
    if _is_single(sources):
        low, _ = crossing(lambda epsilon: _single_delta(sources, epsilon)[0] <= delta, 1.0)
        _, high = crossing(lambda epsilon: _single_delta(sources, epsilon)[1] <= delta, 1.0)
        return low, high
    low, high = 0.0, math.inf
    plan = _Plan(sources, delta * _TAIL_SHARE)
    while grid := plan.build():
        bests = [_least_epsilon(parts, delta) for parts in grid.above]
        main = 0 if bests[0][0] >= bests[1][0] else 1
        proved, tilt = bests[main]
        below = plan.below(grid, main, tilt)
        goal = max(WIDTH * proved, _SMALL * _fourier.deviation(grid.above[main]))
        if plan.too_wide(_gap(grid.above[main], below, tilt) / tilt, _AIM * goal):
            continue
        curve = _fourier.compose(grid.above[main], tilt, upper=True)
        if curve is None:
            high = min(high, max(0.0, max(best for best, _ in bests)))
            if plan.coarsen():
                continue
            break
        top = max(0.0, min(proved, curve.epsilon(delta)))
        other, other_tilt = bests[1 - main]
        if not other < top:
            curve = _fourier.compose(grid.above[1 - main], other_tilt, upper=True)
            top = max(top, other if curve is None else min(other, curve.epsilon(delta)), 0.0)
        high = min(high, top)
        if below is None:
            break
        floor = _fourier.compose(below, tilt, upper=False)
        low = max(low, 0.0 if floor is None else floor.epsilon(delta))
        goal = max(WIDTH * high, _SMALL * _fourier.deviation(grid.above[main]))
        if not plan.too_wide(high - low, goal):
            break
    return low, high


def delta_interval(sources: Sources, epsilon: float) -> tuple[float, float]:
    """Certified lower and upper end of δ at ``epsilon``; (0, 1) where no grid holds the losses."""
    if _is_single(sources):
        return _single_delta(sources, epsilon)
    low, high = 0.0, min(1.0, _variation(sources))
    plan = _Plan(sources, 1e-12)
    while grid := plan.build():
        tilts = [_fourier.best_tilt(parts, epsilon) for parts in grid.above]
        proved = [
            _proved_delta(parts, tilt, epsilon)
            for parts, tilt in zip(grid.above, tilts, strict=True)
        ]
        main = 0 if proved[0] >= proved[1] else 1
        if plan.lower_tail(max(0.05 * _TAIL_SHARE * proved[main], 1e-299)):
            continue
        below = plan.below(grid, main, tilts[main])
        goal = math.log(_RATIO)
        if plan.too_wide(_gap(grid.above[main], below, tilts[main]), _AIM * goal):
            continue
        curves = [
            _fourier.compose(parts, tilt, upper=True)
            for parts, tilt in zip(grid.above, tilts, strict=True)
        ]
        tops = [
            bound if curve is None else min(bound, curve.delta(epsilon))
            for curve, bound in zip(curves, proved, strict=True)
        ]
        high = min(high, max(tops))
        if curves[main] is None and plan.coarsen():
            continue
        if below is None:
            break
        floor = _fourier.compose(below, tilts[main], upper=False)
        low = max(low, 0.0 if floor is None else floor.delta(epsilon))
        if high < 1e-290 or not plan.too_wide(math.log(high / low) if low else math.inf, goal):
            break
    return low, high


def upper_points(sources: Sources, delta: float) -> list[tuple[Array, Array]]:
    """Points (ε, δ) of upper curves in both directions, accurate near ``delta``."""
    plan = _Plan(sources, delta * _TAIL_SHARE)
    while grid := plan.build():
        bests = [_least_epsilon(parts, delta) for parts in grid.above]
        main = 0 if bests[0][0] >= bests[1][0] else 1
        proved, tilt = bests[main]
        below = plan.below(grid, main, tilt)
        goal = WIDTH * max(proved, 0.1 * _fourier.deviation(grid.above[main]))
        if plan.too_wide(_gap(grid.above[main], below, tilt) / tilt, _AIM * goal):
            continue
        curves = [
            _fourier.compose(parts, tilt, upper=True)
            for parts, (_, tilt) in zip(grid.above, bests, strict=True)
        ]
        if None in curves and plan.coarsen():
            continue
        return [_NOTHING if curve is None else curve.points() for curve in curves]
    return [_NOTHING, _NOTHING]


def _is_single(sources: Sources) -> bool:
    return [count for _, count in sources] == [1]


def _single_delta(sources: Sources, epsilon: float) -> tuple[float, float]:
    """Ends of δ of one release, from its profiles: no grid is needed."""
    source, at = sources[0][0], np.array([epsilon])
    high = max(profile(at).item() for profile in source.profiles)
    low = 0.0
    if source.pair is not None:
        low = max(source.pair.lower(direction, at).item() for direction in DIRECTIONS)
    return low, min(1.0, high)


def _variation(sources: Sources) -> float:
    """Upper bound of δ at any ε: total variations add."""
    return (1 + 1e-12) * math.fsum(count * _at_zero(source) for source, count in sources)


def _at_zero(source: Source) -> float:
    """δ(0), which is one number for both directions."""
    return source.profiles[0](np.zeros(1)).item()


def _least_epsilon(parts: list[Part], delta: float) -> tuple[float, float]:
    """ε that the moments prove at ``delta`` (may be negative, which proves 0), and its tilt."""
    rest = delta - _fourier.infinite_mass(parts)
    if rest <= 0:
        return math.inf, _fourier.chernoff_epsilon(parts, delta)[1]
    proved, tilt = _fourier.chernoff_epsilon(parts, rest)
    return proved + _rounding(parts, tilt) / tilt, tilt


def _proved_delta(parts: list[Part], tilt: float, epsilon: float) -> float:
    """δ that the moment at ``tilt`` proves."""
    log_delta = _fourier.log_deltas(parts, np.array([tilt]), epsilon).item()
    log_delta += _rounding(parts, tilt) + 1e-12 * (1 + tilt * epsilon)
    return min(1.0, math.exp(min(log_delta, 0.0)) + _fourier.infinite_mass(parts))


def _rounding(parts: list[Part], tilt: float) -> float:
    """What rounding may take from the logarithm of a moment."""
    steps = sum(count for _, count in parts)
    size = max(abs(end) for part, _ in parts for end in (part.first, part.last))
    return _EPS * steps * (16 + 4 * tilt * size * parts[0][0].step + size) + 1e-12


def _gap(above: list[Part], below: list[Part] | None, tilt: float) -> float:
    """How much of log δ the grid costs: the moment of the measures above over that of below."""
    if below is None:
        return _fourier.coarser_gain(above, tilt)
    at = np.array([tilt])
    top = _fourier.log_moments(above, at).item()
    floor = _fourier.log_moments(below, at).item() + tilt * _fourier.offsets(below)
    return top - floor if math.isfinite(floor) else math.inf


class _Plan:
    """The next grid to try. Local to one query."""

    def __init__(self, sources: Sources, tail: float) -> None:
        self._sources = sources
        self._steps = sum(count for _, count in sources)
        self._rounds = _ROUNDS
        self._coarsened = False
        self._set_tail(tail)
        # A grid whose roundings cost little if all losses were Gaussian.
        spread = 0.0
        for (source, count), end in zip(sources, self._reaches, strict=True):
            middle = _at_zero(source)
            spread += count * min(2.5 * middle / max(1e-300, 1 - middle), end / 6) ** 2
        fine = 0.3 * math.sqrt(spread / self._steps)
        self._step = min(max(fine, max(self._reaches) / _START), _grid.MAX_STEP)

    def _set_tail(self, tail: float) -> None:
        self._tail = tail
        each = max(tail / self._steps, 1e-299)
        self._reaches = [
            _grid.reach(source.profiles, each, max(1e-12, _at_zero(source)))
            for source, _ in self._sources
        ]

    def lower_tail(self, tail: float) -> bool:
        """Whether ``tail`` asks for clearly larger losses than before; they are then included."""
        if tail > 0.01 * self._tail:
            return False
        self._set_tail(tail)
        return True

    def too_wide(self, width: float, goal: float) -> bool:
        """Whether ``width`` is above ``goal`` and a finer grid, prepared here, may change that.

        The width falls with the square of the step.
        """
        if not width > goal or self._coarsened:
            return False
        share = goal / width
        finest = max(self._reaches) * max(1 / _MAX_HALF, len(self._sources) / _MAX_WORK)
        if self._step <= 1.01 * finest:
            return False
        self._step = max(self._step * min(0.5, max(0.9 * math.sqrt(share), 0.125)), finest)
        return True

    def coarsen(self) -> bool:
        """Ask for a much coarser grid, because the sum of all losses did not fit."""
        self._coarsened = True
        if self._step >= _grid.MAX_STEP:
            return False
        self._step = min(4 * self._step, _grid.MAX_STEP)
        return True

    def build(self) -> _Grid | None:
        """All measures at the present step; None when there were enough tries."""
        self._rounds -= 1
        longest = max(self._reaches)
        step = _short(self._step)
        if self._rounds < 0 or longest > 2 * _MAX_HALF * step:
            return None
        above: tuple[list[Part], list[Part]] = ([], [])
        halves = [max(2, math.ceil(end / step) + 1) for end in self._reaches]
        for (source, count), half in zip(self._sources, halves, strict=True):
            for i, measure in enumerate(_grid.above(source.profiles, step, half)):
                above[i].append((measure, count))
        return _Grid(step, halves, above)

    def below(self, grid: _Grid, main: int, tilt: float) -> list[Part] | None:
        """Measures below in direction ``main`` on the same grid; None if one is not known."""
        found: list[Part] = []
        for (source, count), half in zip(self._sources, grid.halves, strict=True):
            if source.pair is None:
                return None
            measure = _grid.below(source.pair, DIRECTIONS[main], grid.step, half, tilt)
            found.append((measure, count))
        return found


def _short(step: float) -> float:
    """``step`` cut to 20 bits: its multiples are then exact doubles."""
    mantissa, exponent = math.frexp(step)
    return math.ldexp(math.floor(math.ldexp(mantissa, 20)), exponent - 20)
