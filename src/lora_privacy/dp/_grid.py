"""One release as a loss distribution on a grid: one measure above its profile, one below.

A measure puts mass on losses k·step, |k| <= K, and on an infinite loss. Its profile
x -> Σ mass_k (1 - x e^{-k·step})_+ + infinite is linear in x = e^ε between grid points. So it lies
above a convex profile if it does at the grid points, and below if its lines do.
Whatever rounding did to the masses, ``_certified`` sums them up again and repairs the difference.
Proofs are in docs/theory/pld.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize, signal  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy.dp._profiles import Direction, Profile, SampledPair

__all__ = ["MAX_STEP", "Measure", "above", "below", "reach"]

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
MAX_STEP = 500.0  # e^step must stay in double precision
_MAX_HULL = 600.0  # losses beyond it are not made convex: e^ε would overflow
_FARTHEST = 1e9  # no profile is followed to larger losses


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """Masses of one release in one direction.

    Attributes:
        step: Distance of two losses, a double with few bits, so that multiples are exact.
        masses: Shape (2K+1,), of the losses -K·step … K·step, >= 0.
        infinite: Mass of the infinite loss, >= 0.
    """

    step: float
    masses: Array
    infinite: float

    @property
    def half(self) -> int:
        """K."""
        return len(self.masses) // 2


def reach(profiles: tuple[Profile, Profile], tail: float, start: float) -> float:
    """An ε beyond which both profiles are at most ``tail``, or hardly fall any more."""
    scan = np.minimum(start * np.exp2(np.arange(-8, 160) / 2.0), _FARTHEST)
    values = np.maximum(profiles[0](scan), profiles[1](scan))
    goal = max(tail, 1.001 * float(values[-1]))
    last = int(np.argmax(values <= goal))
    if last == 0:
        return float(scan[0])
    fine = np.linspace(scan[last - 1], scan[last], 33)
    values = np.maximum(profiles[0](fine), profiles[1](fine))
    return float(fine[int(np.argmax(values <= goal))]) if values[-1] <= goal else float(scan[last])


def above(profiles: tuple[Profile, Profile], step: float, half: int) -> tuple[Measure, Measure]:
    """Measures whose profiles are nowhere below ``profiles``, in the directions remove and add.

    The dots at the grid points are connected by lines in e^ε, after the greatest convex minorant.
    """
    grid = step * np.arange(half + 1)
    remove, add = (np.minimum.accumulate(profile(grid)) for profile in profiles)
    # Both directions of a pair agree at ε = 0, so the smaller bound holds for both.
    remove[0] = add[0] = min(remove[0], add[0])
    return _settle(remove, add, step, (remove, add), 1)


def below(pair: SampledPair, step: float, half: int) -> tuple[Measure, Measure]:
    """Measures whose profiles are nowhere above those of ``pair``.

    Each cell between two grid points gets the tangent at its middle; a grid point, the lower of
    the two tangents that meet there.
    """
    remove, add = (_lower_dots(pair, direction, step, half) for direction in ("remove", "add"))
    remove[0] = add[0] = min(remove[0], add[0])
    return _settle(remove, add, step, (remove, add), -1)


def _lower_dots(pair: SampledPair, direction: Direction, step: float, half: int) -> Array:
    grid = step * np.arange(half + 1)
    middle = grid[:-1] + 0.5 * step
    left = pair.line(direction, middle, grid[:-1])
    right = pair.line(direction, middle, grid[1:])
    # A steep tangent ends below 0: then take the one at the right end of the cell.
    steep = right < 0
    if steep.any():
        end = grid[1:][steep]
        left[steep] = pair.line(direction, end, grid[:-1][steep])
        right[steep] = pair.line(direction, end, end.copy())
    lost = (left < 0) | (right < 0)
    lost[-1] = True  # no infinite loss: the last line is 0
    left[lost] = right[lost] = 0.0
    return np.minimum(np.append(left, 0.0), np.append(left[0], right))


def _settle(
    remove: Array, add: Array, step: float, goals: tuple[Array, Array], sign: int
) -> tuple[Measure, Measure]:
    """Masses through the dots, then scaled until their profiles are beyond ``goals``."""
    right, left = _masses(remove, step), _masses(add, step)
    # At loss 0 the lines of both sides meet.
    middle = 1 - remove[0] - (remove[0] - remove[1] + add[0] - add[1]) / math.expm1(step)
    middle = max(middle, 0.0)
    decay = np.exp(-step * np.arange(1, len(remove)))
    results: list[Measure] = []
    for ours, theirs, goal, other in (
        (right, left, goals[0], goals[1]),
        (left, right, goals[1], goals[0]),
    ):
        masses = np.concatenate([(theirs * decay)[::-1], [middle], ours])
        results.append(_certified(masses, goal, other, step, sign))
    return results[0], results[1]


def _masses(dots: Array, step: float) -> Array:
    """Masses at 1·step … K·step of the convex function through ``dots``; constant after the last.

    mass_k = e^{k·step} (slope_k - slope_{k-1}), slopes in e^ε.
    """
    falls = np.append(np.diff(dots), 0.0)
    masses = (math.exp(-step) * falls[1:] - falls[:-1]) / -math.expm1(-step)
    if masses.min(initial=0.0) < 0 and step * len(dots) <= _MAX_HULL:
        weights = np.exp(step * np.arange(len(falls)))
        # Isotonic regression of the slopes is the greatest convex minorant. The last slope is 0.
        slopes = optimize.isotonic_regression(falls[:-1] / weights[:-1], weights=weights[:-1]).x
        slopes = np.append(np.minimum(slopes, 0.0), 0.0)
        masses = weights[1:] * np.diff(slopes) / math.expm1(step)
    return np.maximum(masses, 0.0)


def _certified(masses: Array, goal: Array, other: Array, step: float, sign: int) -> Measure:
    """Scale ``masses`` so that their profile is >= (sign 1) or <= (-1) the dots at every point.

    For ε < 0 the dots are 1 - e^ε + e^ε other(-ε).
    """
    half = len(goal) - 1
    negative = np.exp(-step * np.arange(half, 0, -1))
    wanted = np.concatenate([(1 - negative) + negative * other[:0:-1], goal])
    wanted = np.append(1.0, wanted)  # the first is x = 0: the whole mass
    if sign > 0:
        wanted *= 1 + 4 * _EPS
        infinite = float(goal[-1])
    else:
        wanted *= 1 - 4 * _EPS
        infinite = 0.0
    found = profile_at_nodes(masses, infinite, step)
    found = np.append(masses.sum() + infinite, found)
    error = 8 * _EPS * len(masses)
    if sign > 0:
        lacking = wanted - found * (1 - error)
        main = found > 100 * max(infinite, 1e-290)
        factor = 1 + max(0.0, float(np.max(lacking[main] / found[main], initial=0.0)))
        more = max(0.0, float(np.max(wanted - factor * found * (1 - error))))
        return Measure(step, masses * (factor * (1 + 4 * _EPS)), infinite * factor + more)
    excess = found * (1 + error) - wanted
    share = np.divide(excess, found, out=np.zeros_like(found), where=found > 0)
    factor = 1 - min(1.0, max(0.0, float(share.max())))
    return Measure(step, masses * (factor * (1 - 4 * _EPS)), 0.0)


def profile_at_nodes(masses: Array, infinite: float, step: float) -> Array:
    """The profile Σ_{j>k} mass_j (1 - e^{(k-j)·step}) + infinite at every grid point k.

    Sums of positive terms: the relative error is at most 4 eps times their number.
    """
    decay = math.exp(-step)
    tail: Array = signal.lfilter([1.0], [1.0, -decay], masses[:0:-1])
    falls = -math.expm1(-step) * tail
    return infinite + np.append(np.cumsum(falls)[::-1], 0.0)
