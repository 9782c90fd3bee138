"""One release as a loss distribution on a grid: one measure above its profile, one below.

A measure puts mass on losses k·step, |k| <= K, and on an infinite loss. Its profile
x -> Σ mass_k (1 - x e^{-k·step})_+ + infinite is linear in x = e^ε between grid points. So it lies
above a convex profile if it does at the grid points, and below if its lines do.
Whatever rounding did to the masses, ``_certified`` sums them up again and repairs the difference.
Proofs are in docs/theory/pld.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, signal  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy.dp._profiles import Direction, Profile, SampledPair
from lora_privacy.dp._replaced import ReplacedPair

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
        first: Index of the first loss: loss i is (first + i)·step + offset.
        masses: >= 0.
        infinite: Mass of the infinite loss, >= 0.
        offset: Added to every loss, so that it need not be a multiple of the step.
    """

    step: float
    first: int
    masses: Array
    infinite: float = 0.0
    offset: float = 0.0

    @property
    def last(self) -> int:
        """Index of the last loss."""
        return self.first + len(self.masses) - 1


def reach(profiles: tuple[Profile, Profile], tail: float, start: float) -> float:
    """An ε beyond which both profiles are at most ``tail``, or hardly fall any more."""
    scan = np.minimum(start * np.exp2(np.arange(-8, 160) / 2.0), _FARTHEST)
    values = np.maximum(*_both(profiles, scan))
    goal = max(tail, 1.001 * float(values[-1]))
    last = int(np.argmax(values <= goal))
    if last == 0:
        return float(scan[0])
    fine: Array = np.linspace(float(scan[last - 1]), float(scan[last]), 33, dtype=np.float64)
    values = np.maximum(*_both(profiles, fine))
    return float(fine[int(np.argmax(values <= goal))]) if values[-1] <= goal else float(scan[last])


def _both(profiles: tuple[Profile, Profile], epsilons: Array) -> tuple[Array, Array]:
    """Values in both directions; under replace the profile is one, and it may be dear."""
    remove = profiles[0](epsilons)
    return remove, remove if profiles[1] is profiles[0] else profiles[1](epsilons)


def above(profiles: tuple[Profile, Profile], step: float, half: int) -> tuple[Measure, Measure]:
    """Measures whose profiles are nowhere below ``profiles``, in the directions remove and add.

    The dots at the grid points -half … half are connected by lines in e^ε, after the greatest
    convex minorant.
    """
    grid = step * np.arange(half + 1, dtype=np.float64)
    remove, add = (np.minimum.accumulate(values) for values in _both(profiles, grid))
    # Both directions of a pair agree at ε = 0, so the smaller bound holds for both.
    remove[0] = add[0] = min(remove[0], add[0])
    return _joined(remove, add, step, upper=True), _joined(add, remove, step, upper=True)


def below(
    pair: SampledPair | ReplacedPair, direction: Direction, step: float, half: int, tilt: float
) -> Measure:
    """A measure whose profile is nowhere above that of ``pair``; see ``_lines``.

    Where there is a choice, the one with the larger mean of e^{tilt·loss}.
    """
    if isinstance(pair, ReplacedPair):
        dots = _dots(*_replaced_lines(pair, step, half), 1.0)
        return _joined(dots, dots, step, upper=False)
    if pair.rate == 1:
        dots = _dots(*_lines(pair, _removal(1.0, 1.0, step, half)), np.ones(1))
        return _joined(dots, dots, step, upper=False)
    # The least loss under "remove" is log(1-p); with little noise most of the mass is close to it.
    # A grid that starts there keeps it in place, however wide the step.
    offset = math.log1p(-pair.rate)
    if direction == "add" or -offset > step * half:
        remove = _dots(*_lines(pair, _removal(pair.rate, pair.rate, step, half)), pair.rate)
        scale = _addition_scale(pair.rate, step, half)
        add = _dots(*_lines(pair, _addition(pair.rate, step, half)), scale)
        add[0] = remove[0] = min(add[0], remove[0])
        ours, theirs = (add, remove) if direction == "add" else (remove, add)
        return _joined(ours, theirs, step, upper=False)
    half = half + math.ceil(-offset / step)
    left, right = _lines(pair, _removal(pair.rate, 0.0, step, half))
    measures = [_from_least_loss(_dots(left, right, pair.rate), step, offset)]
    # In the first cell the line 1 - e^ε of the certain event keeps the mass of both laws, if the
    # cell is narrow. There e^ε - (1-p) = (1-p)(e^step - 1).
    end = 1 - (1 - pair.rate) * math.expm1(step) / pair.rate * (1 + 8 * _EPS) - 4 * _EPS
    if end > 0:
        left[0], right[0] = 1.0, end
        measures.append(_from_least_loss(_dots(left, right, pair.rate), step, offset))
    growth = np.exp(np.minimum(tilt * (step * np.arange(half + 1) + offset), 700.0))
    best = max(measures, key=lambda one: float(one.masses @ growth[one.first : one.last + 1]))
    if float(best.masses @ growth[best.first : best.last + 1]) >= 1:
        return best
    # Nothing at all is released: a loss of 0. Better where all losses are far below the step.
    return Measure(step, 0, np.ones(1))


def _from_least_loss(dots: Array, step: float, offset: float) -> Measure:
    """The measure through ``dots``, with all that is left of the mass on the least loss."""
    right = _masses(dots, step)
    masses = np.append(max(0.0, 1 - float(right.sum())), right)
    return _certified(Measure(step, 0, masses, 0.0, offset), np.append(1.0, dots), upper=False)


Cells = tuple[Array, Array, Array, Array, Array]


def _removal(rate: float, start: float, step: float, half: int) -> Cells:
    """Cells of the grid points ε_k with e^ε_k = (1-p + start) e^{k·step}, direction remove.

    P(E) - e^ε Q(E) = p [P₁(E) - d(ε)/p · P₀(E)], d(ε) = e^ε - (1-p), for P_i = N(iμ, 1). With
    D = d e^{-t} at t = k·step everything is a sum of positive terms.
    """
    t = 0.5 * step * np.arange(2 * half + 1, dtype=np.float64)
    scaled = start - (1 - rate) * np.expm1(-t)
    node, middle = scaled[::2], scaled[1::2]
    with np.errstate(divide="ignore"):
        tau = t + np.log(scaled / rate)
    half_step, whole = math.exp(-0.5 * step), math.exp(-step)
    return (
        tau[1::2],
        half_step * node[:-1] / middle,
        node[1:] / middle / half_step,
        tau[2::2],
        whole * node[:-1] / node[1:],
    )


def _addition(rate: float, step: float, half: int) -> Cells:
    """Cells of the grid points ε_k = k·step, direction add.

    Q(E) - e^ε P(E) = e^ε w(ε) [P₀(E) - p/w(ε) · P₁(E)], w(ε) = e^-ε - (1-p), and by reflection
    P₀ and P₁ may be swapped. Cells that end beyond the largest loss, where w = 0, are left out.
    """
    w = rate * (1 - 4 * _EPS) + np.expm1(-0.5 * step * np.arange(2 * half + 1))
    count = int(np.count_nonzero(w > 0))
    w = np.where(w > 0, w, rate)
    tau = -np.log(w / rate)
    # A line is 0, from the empty test, where it would leave the range of losses.
    out = np.arange(half) >= (count - 1) // 2
    node, middle = w[::2], w[1::2]
    blocked = np.where(out, np.nan, 1.0)
    return (
        tau[1::2],
        middle / node[:-1],
        middle / node[1:] * blocked,
        tau[2::2],
        node[1:] / node[:-1] * blocked,
    )


def _addition_scale(rate: float, step: float, half: int) -> Array:
    """e^ε w(ε) of the grid points, rounded down, for ``_addition``, whose lines are 0 beyond w."""
    t = np.minimum(step * np.arange(half + 1), 40.0)
    w = rate * (1 - 4 * _EPS) + np.expm1(-t)
    return np.exp(t) * w * (1 - 8 * _EPS)


def _lines(pair: SampledPair, cells: Cells) -> tuple[Array, Array]:
    """The line of each cell at its two ends, below the profile: that of the test at its middle.

    ``cells`` holds the log of the likelihood ratio of the Gaussians at the middle of each cell,
    the ratios of ``SampledPair.lines`` for its left and right end, and, for the line that touches
    at the right end, the log and the ratio for the left end.
    """
    tau, left_ratio, right_ratio, tau_end, whole_ratio = cells
    left, right = pair.lines(tau, (left_ratio, right_ratio))
    # A steep line ends below 0: then take the one that touches at the right end of the cell.
    steep = ~(right >= 0)
    if steep.any():
        left[steep], right[steep] = pair.lines(
            tau_end[steep], (whole_ratio[steep], np.ones(int(steep.sum())))
        )
    return _kept(left, right)


def _replaced_lines(pair: ReplacedPair, step: float, half: int) -> tuple[Array, Array]:
    """``_lines`` of the cells of the grid points k·step, for an exchange of one record."""
    ends = step * np.arange(half + 1, dtype=np.float64)
    start, stop = ends[:-1], ends[1:]
    left, right = pair.lines(start + 0.5 * step, (start, stop))
    steep = ~(right >= 0)
    if steep.any():
        left[steep], right[steep] = pair.lines(stop[steep], (start[steep], stop[steep]))
    return _kept(left, right)


def _kept(left: Array, right: Array) -> tuple[Array, Array]:
    """Lines that are above 0 at both ends; elsewhere 0, from the empty test."""
    lost = ~((left >= 0) & (right >= 0))
    left[lost] = right[lost] = 0.0
    return left, right


def _dots(left: Array, right: Array, scale: Array | float) -> Array:
    """At each grid point the lower of the two lines that meet there, so both stay below."""
    dots = np.minimum(np.append(left, right[-1]), np.append(left[0], right))
    dots = dots * scale * (1 - 8 * _EPS)
    # The mass that would be at the infinite loss, constant in ε, is dropped.
    return np.maximum(dots - dots[-1], 0.0)


def _joined(ours: Array, theirs: Array, step: float, *, upper: bool) -> Measure:
    """The measure through the dots ``ours`` at ε >= 0 and those of the other direction at ε < 0.

    At -ε the dots are 1 - e^-ε + e^-ε theirs(ε).
    """
    half = len(ours) - 1
    decay = np.exp(-step * np.arange(half, 0, -1))
    right, left = _masses(ours, step), _masses(theirs, step)[::-1] * decay
    # At loss 0 the lines of both sides meet.
    middle = 1 - ours[0] - (ours[0] - ours[1] + theirs[0] - theirs[1]) / math.expm1(step)
    if middle < 0 and step * half <= _MAX_HULL:
        masses = _jointly_convex(ours, theirs, step)
    else:
        masses = np.concatenate([left, [max(middle, 0.0)], right])
    negative = -np.expm1(-step * np.arange(half, 0, -1)) + decay * theirs[:0:-1]
    wanted = np.concatenate([[1.0], negative, ours])
    return _certified(
        Measure(step, -half, masses, float(ours[-1]) if upper else 0.0), wanted, upper=upper
    )


def _jointly_convex(ours: Array, theirs: Array, step: float) -> Array:
    """Masses of the greatest convex minorant where the sides do not join convexly at ε = 0.

    Left of 0 the slopes are those of e^ε theirs(-ε), less 1, which costs some precision.
    """
    half, whole = len(ours) - 1, math.expm1(step)
    falls = (theirs[:-1] - math.exp(-step) * theirs[1:]) / -math.expm1(-step)
    slopes = np.concatenate([[theirs[-1]], falls[::-1]]) - 1
    slopes = np.append(slopes, np.diff(ours) * np.exp(-step * np.arange(half)) / whole)
    nodes = np.exp(step * np.arange(-half, half + 1))
    weights = np.append(nodes[0], np.diff(nodes))
    convex = np.append(np.minimum(_rising(slopes, weights), 0.0), 0.0)
    return np.maximum(nodes * np.diff(convex), 0.0)


def _rising(slopes: Array, weights: Array) -> Array:
    """Isotonic regression: of slopes, those of the greatest convex minorant."""
    fitted: Any = optimize.isotonic_regression(slopes, weights=weights)
    return np.asarray(fitted.x, dtype=np.float64)


def _masses(dots: Array, step: float) -> Array:
    """Masses at 1·step … K·step of the convex function through ``dots``; constant after the last.

    mass_k = e^{k·step} (slope_k - slope_{k-1}), slopes in e^ε.
    """
    falls = np.append(np.diff(dots), 0.0)
    masses = (math.exp(-step) * falls[1:] - falls[:-1]) / -math.expm1(-step)
    if masses.min(initial=0.0) < 0:
        # As far as e^ε is a double; further out the masses are left as they are, and checked.
        count = min(len(masses), max(1, int(_MAX_HULL / step)))
        weights = np.exp(step * np.arange(count + 1))
        slopes = np.minimum(_rising(falls[:count] / weights[:-1], weights[:-1]), 0.0)
        slopes = np.append(slopes, falls[count] / weights[-1])
        masses[:count] = weights[1:] * np.diff(slopes) / math.expm1(step)
    return np.maximum(masses, 0.0)


def _certified(measure: Measure, wanted: Array, *, upper: bool) -> Measure:
    """Scale until the profile is above (``upper``) or below the dots ``wanted``.

    The first entry of ``wanted`` is the whole mass, the profile at x = 0.
    """
    masses, infinite = measure.masses, measure.infinite
    found = profile_at_nodes(masses, infinite, measure.step)
    found = np.append(masses.sum() + infinite, found)
    error = 8 * _EPS * len(masses)
    if upper:
        # Between two points with mass the profile is a line. It is above a convex function if it
        # is at those points, so the dots that the convex minorant passed by need no check.
        vertex = np.concatenate([[True], masses > 0])
        vertex[-1] = True
        lacking = np.where(vertex, wanted * (1 + 8 * _EPS) - found * (1 - error), 0.0)
        # Most of what is lacking is rounding: a factor. Where the profile is that of the infinite
        # loss only, its mass is raised instead.
        main = found > 100 * max(infinite, 1e-290)
        raised = max(0.0, float(np.max(lacking[main] / found[main], initial=0.0)))
        raised = raised / (1 - error) + 8 * _EPS
        more = max(0.0, float(np.max(lacking[~main] - raised * found[~main], initial=0.0)))
        infinite = (infinite + 2 * more) * (1 + raised)
        return _trimmed(replace(measure, masses=masses * (1 + raised), infinite=infinite))
    excess = found * (1 + error) - wanted * (1 - 8 * _EPS)
    share = np.divide(excess, found, out=np.zeros_like(found), where=found > 0)
    factor = 1 - min(1.0, max(0.0, float(share.max())))
    return _trimmed(replace(measure, masses=masses * (factor * (1 - 4 * _EPS))))


def _trimmed(measure: Measure) -> Measure:
    """Without the zeros at both ends, which would only overflow in moments."""
    nonzero = np.flatnonzero(measure.masses)
    if not nonzero.size:
        return replace(measure, masses=measure.masses[:1])
    start, stop = int(nonzero[0]), int(nonzero[-1]) + 1
    return replace(measure, first=measure.first + start, masses=measure.masses[start:stop])


def profile_at_nodes(masses: Array, infinite: float, step: float) -> Array:
    """The profile Σ_{j>k} mass_j (1 - e^{(k-j)·step}) + infinite at every grid point k.

    Sums of positive terms: the relative error is at most 4 eps times their number.
    """
    decay = math.exp(-step)
    tail: Any = signal.lfilter(  # pyright: ignore[reportUnknownMemberType]
        [1.0], [1.0, -decay], masses[:0:-1]
    )
    falls = -math.expm1(-step) * np.asarray(tail, dtype=np.float64)
    return infinite + np.append(np.cumsum(falls)[::-1], 0.0)
