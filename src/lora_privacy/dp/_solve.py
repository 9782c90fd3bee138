"""From releases to certified ends of ε(δ) and δ(ε): the choice of grid, tilt and direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_privacy.dp import _fourier, _grid
from lora_privacy.dp._fourier import Part
from lora_privacy.dp._profiles import DIRECTIONS, Profile, SampledPair

__all__ = ["Source", "delta_interval", "epsilon_interval", "sampled_source", "upper_points"]

Array = npt.NDArray[np.float64]

WIDTH = 0.01  # of ε: what the grid is refined to
_AIM = 0.6  # of the width: what a predicted width must meet
_RATIO = 1.05  # upper over lower end of δ
_SMALL = 1e-9  # an ε below it is not refined for its own sake
_TAIL_SHARE = 1e-4  # of δ: what the losses beyond the grid may cost in all
_START = 2048  # grid points of the widest release at first
_MAX_HALF = 1 << 19  # grid points of one release
_MAX_WORK = 1 << 27  # grid points of all transforms together
_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class Source:
    """One kind of release: profiles above in both directions, and a pair below, if known."""

    profiles: tuple[Profile, Profile]
    pair: SampledPair | None


def sampled_source(lower: SampledPair, upper: SampledPair) -> Source:
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
    low, high = 0.0, math.inf
    plan = _Plan(sources, delta * _TAIL_SHARE)
    for _ in range(_ROUNDS):
        grid = plan.build()
        if grid is None:
            break
        bests = [_fourier.chernoff_epsilon(parts, delta) for parts in grid.above]
        main = 0 if bests[0][0] >= bests[1][0] else 1
        tilt = bests[main][1]
        below = plan.below(grid, main, tilt)
        predicted = _gap(grid.above[main], below, tilt) / tilt
        goal = max(WIDTH * bests[main][0], _SMALL)
        if predicted > _AIM * goal and plan.refine(_AIM * goal / predicted):
            continue
        curve = _fourier.compose(grid.above[main], tilt, upper=True)
        if curve is None:
            break
        top = curve.epsilon(delta)
        other_bound = bests[1 - main][0]
        if not other_bound * (1 + 1e-9) + _SMALL < top:
            other = _fourier.compose(grid.above[1 - main], bests[1 - main][1], upper=True)
            top = math.inf if other is None else max(top, other.epsilon(delta))
        high = min(high, top)
        if below is None:
            break
        floor = _fourier.compose(below, tilt, upper=False)
        if floor is not None:
            low = max(low, floor.epsilon(delta))
        goal = max(WIDTH * high, _SMALL)
        if high - low <= goal or not plan.refine(0.7 * goal / (high - low)):
            break
    return low, high


def delta_interval(sources: Sources, epsilon: float) -> tuple[float, float]:
    """Certified lower and upper end of δ at ``epsilon``; (0, 1) where no grid holds the losses."""
    low, high = 0.0, 1.0
    plan = _Plan(sources, 1e-12)
    for _ in range(_ROUNDS):
        grid = plan.build()
        if grid is None:
            break
        tilts = [_fourier.best_tilt(parts, epsilon) for parts in grid.above]
        bounds = [
            float(_fourier.log_deltas(parts, np.array([tilt]), epsilon)[0])
            for parts, tilt in zip(grid.above, tilts, strict=True)
        ]
        main = 0 if bounds[0] >= bounds[1] else 1
        tail = max(_TAIL_SHARE * math.exp(min(0.0, max(bounds[main], -680.0) - 3.0)), 1e-299)
        if plan.lower_tail(tail):
            continue
        below = plan.below(grid, main, tilts[main])
        predicted = _gap(grid.above[main], below, tilts[main])
        goal = math.log(_RATIO)
        if predicted > _AIM * goal and plan.refine(_AIM * goal / predicted):
            continue
        curves = [
            _fourier.compose(parts, tilt, upper=True)
            for parts, tilt in zip(grid.above, tilts, strict=True)
        ]
        top = max(1.0 if curve is None else curve.delta(epsilon) for curve in curves)
        high = min(high, top)
        if below is None:
            break
        floor = _fourier.compose(below, tilts[main], upper=False)
        if floor is not None:
            low = max(low, floor.delta(epsilon))
        if high <= _RATIO * low or high < 1e-290:
            break
        if not plan.refine(0.7 * goal / math.log(high / low) if low > 0 else 0.05):
            break
    return low, high


def upper_points(sources: Sources, delta: float) -> list[tuple[Array, Array]]:
    """Points (ε, δ) of upper curves in both directions, accurate near ``delta``."""
    plan = _Plan(sources, delta * _TAIL_SHARE)
    found: list[tuple[Array, Array]] = []
    for _ in range(_ROUNDS):
        grid = plan.build()
        if grid is None:
            break
        bests = [_fourier.chernoff_epsilon(parts, delta) for parts in grid.above]
        main = 0 if bests[0][0] >= bests[1][0] else 1
        goal = max(WIDTH * bests[main][0], _SMALL)
        tilt = bests[main][1]
        below = plan.below(grid, main, tilt)
        predicted = _gap(grid.above[main], below, tilt) / tilt
        if predicted > _AIM * goal and plan.refine(_AIM * goal / predicted):
            continue
        for parts, (_, tilt) in zip(grid.above, bests, strict=True):
            curve = _fourier.compose(parts, tilt, upper=True)
            found.append((np.zeros(1), np.ones(1)) if curve is None else curve.points())
        return found
    return [(np.zeros(1), np.ones(1))] * 2


def _gap(above: list[Part], below: list[Part] | None, tilt: float) -> float:
    """How much of log δ the grid costs: the moment of the measures above over that of below."""
    if below is None:
        return 0.0
    at = np.array([tilt])
    top = float(_fourier.log_moments(above, at)[0])
    floor = float(_fourier.log_moments(below, at)[0]) + tilt * _fourier.offsets(below)
    return top - floor if math.isfinite(floor) else math.inf


class _Plan:
    """The next grid to try. Local to one query; it only gets finer."""

    def __init__(self, sources: Sources, tail: float) -> None:
        self._sources = sources
        self._steps = sum(count for _, count in sources)
        self._set_tail(tail)
        widest = max(self._reaches)
        # A grid whose roundings cost little if all losses were Gaussian.
        spread = 0.0
        for (source, count), end in zip(sources, self._reaches, strict=True):
            middle = float(source.profiles[0](np.zeros(1))[0])
            spread += count * min(2.5 * middle / max(1e-300, 1 - middle), end / 6) ** 2
        fine = 0.3 * math.sqrt(spread / self._steps)
        self._step = _short(min(max(fine, widest / _START), _grid.MAX_STEP))

    def _set_tail(self, tail: float) -> None:
        self._tail = tail
        each = max(tail / self._steps, 1e-299)
        self._reaches = [
            _grid.reach(source.profiles, each, self._guess(source)) for source, _ in self._sources
        ]

    @staticmethod
    def _guess(source: Source) -> float:
        return max(1e-12, float(source.profiles[0](np.zeros(1))[0]))

    def lower_tail(self, tail: float) -> bool:
        """Whether ``tail`` asks for clearly larger losses than before; they are then included."""
        if tail > 0.01 * self._tail:
            return False
        self._set_tail(tail)
        return True

    def refine(self, share: float) -> bool:
        """Ask for a grid with ``share`` of the width, which falls with the square of the step."""
        factor = min(0.8, max(0.9 * math.sqrt(share), 0.125)) if share > 0 else 0.125
        finest = max(
            max(self._reaches) / _MAX_HALF,
            max(self._reaches) * len(self._sources) / _MAX_WORK,
        )
        if self._step <= 1.01 * finest:
            return False
        self._step = _short(max(self._step * factor, finest))
        return True

    def build(self) -> _Grid | None:
        """All measures at the present step."""
        above: tuple[list[Part], list[Part]] = ([], [])
        halves = [max(2, math.ceil(end / self._step) + 1) for end in self._reaches]
        if max(halves) > 2 * _MAX_HALF:
            return None
        for (source, count), half in zip(self._sources, halves, strict=True):
            for i, measure in enumerate(_grid.above(source.profiles, self._step, half)):
                above[i].append((measure, count))
        return _Grid(self._step, halves, above)

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
