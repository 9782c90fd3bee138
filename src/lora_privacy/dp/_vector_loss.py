"""δ of the loss of one pair under ``v -> AᵀA v``: quadrature without cancellation, in log space.

With θ the angle whose tangent is t_r/√r and s the χ variable with k = m+r-1 degrees of freedom,

    R = ν cos(θ-φ)/cos θ,   L = (r-1) ln ν + ((m+1-r)/2) ln R + (s²/2)(1/R - 1),

and δ = P[R <= 0] + E (1 - e^{ε-L})₊. The inner expectation has a closed form as a difference of χ²
tails, which loses all digits when L barely exceeds ε. Here it is the integral of the positive
function itself, between exact limits, by ``_chi_tail``. Derivation in
docs/theory/projection-pairs.md.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy.dp._chi_tail import DROP, FINE, FINE_WEIGHTS, Rule, log_chi_norm, log_tails
from lora_privacy.errors import ConvergenceError

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Segments = tuple[Array, Array, Flags]
"""Distance of each from its end of θ, width, and whether that end is the right one, R = ∞."""

RTOL = 1e-10
"""Relative error of δ; every value is checked against halved panels and another inner rule."""

_TINY = np.finfo(np.float64).tiny
_IGNORED = 4.0  # e-folds more below the result at which a node is skipped; π e^-34 ≈ 5e-15
_AGREEMENT = 2e-11  # of the halved panels; the finer sum, far more accurate, is returned
_EDGE = 1e-13  # of a segment: closer to an end that is not one of θ lies rounding
_ROUNDS = 48
_MAX_PANELS = 2048  # open at once: rounding, not the integrand, keeps them apart
_NEWTON = 100
_MAX_FACTOR = 8.0  # of one Newton step in ε
_CLOSE = (3e-2, 3e-5)  # of log δ, where coarse nodes, then fine ones, make way; a step squares it
_COARSE_TURNS = 10  # the most for coarse nodes, which may jump over what they look for
_STEEP = 3.0  # -d log δ / d log ε beyond which δ falls like a normal tail, not like a power


# Two rules for each integral, used in turn, so that each check is one of both integrals.
_RULES = (
    Rule(np.polynomial.legendre.leggauss(34), np.polynomial.legendre.leggauss(12), DROP),
    Rule(np.polynomial.legendre.leggauss(42), np.polynomial.legendre.leggauss(17), DROP),
)
# Usually right to 1e-6 in half the time, for the start of a search. It returns nothing.
_COARSE = Rule(np.polynomial.legendre.leggauss(12), np.polynomial.legendre.leggauss(6), 15.0)
# Panels before any refinement: powers of two of the scale 1/√r of θ.
_SCALES = tuple(2.0**i for i in range(6))
# Steps of s, whose law has a standard deviation of .7, where panels are cut, to ``_SAME``.
_STEPS = (-4.0, -1.5, 0.0, 1.5, 4.0, 8.5)
_SAME = 1e-3  # relative: panels made for an ε this close are panels of this ε
_NEARBY = 0.25  # the same for coarse nodes
_CIRCLE = np.exp(2j * math.pi * np.arange(12) / 12)  # directions in which a guess looks


class Panels(NamedTuple):
    """Pieces of the segments of one ε, as fractions of them, of use for an ε nearby too."""

    epsilon: float
    live: list[bool]
    """Whether each segment has a width, and so at least one panel."""
    low: Array
    high: Array
    segment: Index


@dataclass(frozen=True, slots=True)
class VectorLoss:
    """Loss of v against v' with cosine ρ and ``ratio`` ν = ‖v'‖/‖v‖, checked by the caller.

    Attributes:
        in_features: m >= 1; at m = 1 the cosine is ±1.
        rank: r >= 1.
        cosine: ρ, in [-1, 1].
        ratio: ν > 0.
    """

    in_features: int
    rank: int
    cosine: float
    ratio: float
    _log_chi: float = field(init=False)
    _log_angle: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_log_chi", log_chi_norm(self.in_features + self.rank - 1))
        object.__setattr__(self, "_log_angle", _log_angle_norm(self.rank))

    @property
    def floor(self) -> float:
        """P[R <= 0], which no ε brings down."""
        return projected_sign_flip(self.rank, self.cosine)

    def delta(self, epsilon: float) -> float:
        """δ(ε) within ``RTOL``; ConvergenceError otherwise."""
        return min(1.0, self.floor + math.exp(self._resolved(epsilon)[0]))

    def epsilon(self, delta: float) -> float:
        """Smallest ε >= 0 with δ(ε) <= ``delta``, rounded up; ``inf`` at or below the floor.

        Unless it is 0, δ at the result lies between (1 - 3 RTOL) and (1 - RTOL) times ``delta``.
        """
        floor = self.floor
        if delta * (1 - RTOL) <= floor:
            return math.inf
        # Logs of what may lie above the floor: δ itself may be subnormal.
        goal = math.log(delta) + math.log1p(-floor / delta - RTOL)
        gap = 1 - floor / delta - 3 * RTOL
        least = math.log(delta) + math.log(gap) if gap > 0 else -math.inf
        aim = (goal + least) / 2 if gap > 0 else goal - math.log(2)
        low, high, stage, zero, panels, last = 0.0, math.inf, 0, False, None, None
        epsilon = self._guess(delta)
        for turn in range(_NEWTON):
            if stage == len(_CLOSE):
                value, above = self._resolved(epsilon, goal, panels)
                if least <= value <= goal:
                    return epsilon
            else:
                rule = _RULES[0] if stage else _COARSE
                value, above, panels = self._glance(epsilon, goal, panels, rule)
            slope = math.expm1(min(above - value, 700.0)) if above > value > -math.inf else 0.0
            guess = _newton(epsilon, value, slope, aim, last)
            last = (value, slope) if slope else None
            if guess < epsilon / 4 and not zero:
                zero = True  # δ(0) may be low enough
                at_zero = self._glance(0.0, goal)[0]
                if at_zero <= goal + 1e-6 and self._resolved(0.0, goal)[0] <= goal:
                    return 0.0
            # Coarse nodes, fine ones, checked values; what the former bound, the next may not.
            lost = stage == 0 and turn == _COARSE_TURNS
            if stage < len(_CLOSE) and (lost or abs(value - aim) < _CLOSE[stage]):
                stage, low, high = stage + 1, 0.0, math.inf
            else:
                low, high = (epsilon, high) if value > aim else (low, epsilon)
            if not low < guess < high:
                # Between two ends by halves; with one, rounding alone has kept ε where it is.
                end = high if value > aim else low
                both = low > 0 and high < math.inf
                guess = (low + high) / 2 if both else math.nextafter(epsilon, end)
            epsilon = guess
        raise ConvergenceError(
            f"The search for ε at δ = {delta!r} of the pair with {self._named()} did not end; no "
            "value is returned. Please report the pair."
        )

    def _guess(self, delta: float) -> float:
        """Largest loss over normal scores of R and s on the circle beyond whose tangents lies δ.

        That is near the ε with P[L > ε] = δ. δ(ε) is less, as if L - ε were exponential beyond.
        """
        k = self.in_features + self.rank - 1
        score = np.array([0.0, 0.25]) - float(special.ndtri(delta))
        points = score[:, None] * _CIRCLE
        tail: Array = special.ndtr(-np.abs(points.real))
        tan_theta: Array = np.abs(special.stdtrit(self.rank, tail)) / math.sqrt(self.rank)
        # Far out SciPy's quantile is infinite; P[tan θ > x] is less than x^-r.
        tan_theta = np.minimum(tan_theta, np.maximum(tail, 1e-200) ** (-1 / self.rank))
        g = self.cosine + self._sine * np.copysign(tan_theta, points.real)
        ratio = self.ratio * np.maximum(g, 1e-12)
        s = np.maximum(math.sqrt(k - 0.5) + points.imag / math.sqrt(2), 0.0)
        loss = (self.in_features + 1 - self.rank) / 2 * np.log(ratio)
        loss += np.square(s) / 2 * (1 / ratio - 1)
        loss += (self.rank - 1) * math.log(self.ratio)
        first, second = (
            float(x.max() if z > 0 else x.min()) for z, x in zip(score, loss, strict=True)
        )
        fall, further = (float(special.log_ndtr(-x)) for x in score)
        mean = max((second - first) / (fall - further), 1e-300)  # of L - ε beyond ε
        return min(max(first - mean * math.log1p(1 / mean), first / 4, 1e-3), 1e300)

    @np.errstate(divide="ignore")  # the log of 0 is -inf, here and below
    def _resolved(
        self, epsilon: float, about: float = -math.inf, panels: Panels | None = None
    ) -> tuple[float, float]:
        """Logs of E (1 - e^{ε-L})₊ and P[L > ε] over R > 0, checked.

        ``about`` is the log of a value of which e^-34 is as good as 0. ``panels`` are used if they
        were made for this ε, within the precision of their own cuts; the check is the same.
        """
        if abs(self.cosine) == 1:
            return self._on_a_line(epsilon)
        segments = self._segments(epsilon)
        panels = self._panels(epsilon, segments, panels, _SAME)
        return self._adapt(epsilon, segments, panels, about)

    @np.errstate(divide="ignore")
    def _glance(
        self,
        epsilon: float,
        about: float = -math.inf,
        panels: Panels | None = None,
        rule: Rule = _RULES[0],
    ) -> tuple[float, float, Panels | None]:
        """The same unchecked, and its panels; coarse nodes do with panels of an ε nearby."""
        if abs(self.cosine) == 1:
            return (*self._on_a_line(epsilon), None)
        segments = self._segments(epsilon)
        panels = self._panels(epsilon, segments, panels, _NEARBY if rule is _COARSE else _SAME)
        sums = self._panel_sums(epsilon, segments, *panels[2:], rule, about)
        log_d, log_p = _logsumexp(sums).tolist()
        return log_d, log_p, panels

    def _panels(
        self, epsilon: float, segments: Segments, known: Panels | None, within: float
    ) -> Panels:
        """The known panels if made for an ε within that relative distance, or new ones."""
        live = (segments[1] > 0).tolist()
        if known and known.live == live and abs(epsilon - known.epsilon) < within * epsilon:
            return known
        return Panels(epsilon, live, *self._first_panels(epsilon, segments))

    def _named(self) -> str:
        return (
            f"in_features={self.in_features}, rank={self.rank}, cosine={self.cosine!r}, "
            f"norm ratio {self.ratio!r}"
        )

    def _on_a_line(self, epsilon: float) -> tuple[float, float]:
        """As ``_resolved`` where R = ±ν surely; R = -ν has all in the floor."""
        if self.cosine < 0 or self.ratio == 1:
            return -math.inf, -math.inf
        excess = np.array([self.ratio - 1.0])
        ratio, rule = np.array([self.ratio]), _RULES[1]
        logs = self._inner(epsilon, ratio, excess, np.zeros(1), rule, -math.inf)
        log_d, log_p = logs.ravel().tolist()
        return log_d, log_p

    @property
    def _sine(self) -> float:
        return math.sqrt((1 - self.cosine) * (1 + self.cosine))

    def _ends(self, g: float) -> tuple[float, float]:
        """Distances of R = ``g`` ν from R = 0 and from R = ∞, in θ, each precise when tiny."""
        sine = self._sine
        return math.atan2(g * sine, 1 - g * self.cosine), math.atan2(sine, g - self.cosine)

    def _segments(self, epsilon: float) -> Segments:
        """Pieces of θ on which all is analytic, cut at R = ν, half-way, too."""
        points = [1.0, 1.0 / self.ratio]
        half = (self.in_features + 1 - self.rank) / 2
        if half:
            log_g = (epsilon - (self.rank - 1) * math.log(self.ratio)) / half
            log_g -= math.log(self.ratio)
            points.append(math.exp(min(log_g, 700.0)))
        range_ = math.atan2(self._sine, -self.cosine)
        ends = [(0.0, range_), *(self._ends(g) for g in sorted(set(points))), (range_, 0.0)]
        outer, width, right = list[float](), list[float](), list[bool]()
        for (a, a_right), (b, b_right) in itertools.pairwise(ends):
            upper = a >= a_right
            outer.append(b_right if upper else a)
            width.append(max(a_right - b_right if upper else b - a, 0.0))
            right.append(upper)
        return np.array(outer), np.array(width), np.array(right)

    def _steps(self) -> list[float]:
        """Steps of s; next to parallel, δ lies where j^r e^{-j²} is largest, at j = √(r/2)."""
        steps = list(_STEPS)
        while steps[-1] < 4 + math.sqrt(self.rank / 2):
            steps.append(2 * steps[-1])
        return steps

    def _crossings(self, epsilon: float) -> list[float]:
        """R within .1 % of where the loss is ε for some s: between them E (1 - e^{ε-L})₊ grows.

        Next to R = 0 or ∞ they may lie in a sliver that no node of wider panels would see.
        """
        k, c = self.in_features + self.rank - 1, (self.in_features + 1 - self.rank) / 2
        target = epsilon - (self.rank - 1) * math.log(self.ratio)
        found: list[float] = []
        for side in (-1, 1) if c > 0 else (-1,):
            for j in self._steps():
                square = max(math.sqrt(k - 1) - side * j, 0.1) ** 2
                inside = math.log(square / (2 * c)) if c > 0 else 700.0

                def excess(log_ratio: float, square: float = square) -> float:
                    rest = square / 2 * math.expm1(min(-log_ratio, 700.0))
                    return c * log_ratio + rest - target

                depth = -excess(inside)
                if depth <= 0 or excess(side * 700.0) <= 0:
                    continue
                # The excess is convex: from a point where it is positive Newton's steps go to the
                # crossing from one side. With v from ``inside`` it is c (e^-v + v - 1 - depth/c).
                if c > 0:
                    depth /= c
                    root = math.sqrt(2 * depth)
                    if side < 0:
                        log_ratio = inside - math.log1p(depth + root)
                    else:
                        log_ratio = inside + depth / 2 + math.hypot(depth / 2, root)
                else:
                    log_ratio = -target / (square / 2 - c)
                    if target > 0:
                        log_ratio = max(log_ratio, -math.log1p(2 * target / square))
                for _ in range(_NEWTON):
                    growth = math.expm1(min(-log_ratio, 700.0))
                    step = c * log_ratio + square / 2 * growth - target  # the excess
                    step /= c - square / 2 * (1 + growth)
                    log_ratio -= step
                    if abs(step) <= max(_SAME * abs(log_ratio), 1e-15):
                        break
                found.append(math.exp(log_ratio))
        return found

    def _first_panels(self, epsilon: float, segments: Segments) -> tuple[Array, Array, Index]:
        """Ends, as fractions of a segment, and the segment each panel lies in."""
        angle = math.atan2(self._sine, self.cosine)  # φ
        steps = [math.atan(scale / math.sqrt(self.rank)) for scale in _SCALES]
        theta = [-step for step in steps] + [0.0] + steps
        ends = [(t + math.pi / 2 - angle, math.pi / 2 - t) for t in theta]
        ends += [self._ends(g / self.ratio) for g in self._crossings(epsilon)]
        cuts = sorted({from_0 for from_0, _ in ends}), sorted({from_inf for _, from_inf in ends})
        low, high, segment = list[float](), list[float](), list[int]()
        outers, widths, rights = segments[0].tolist(), segments[1].tolist(), segments[2].tolist()
        for i, (outer, width, right) in enumerate(zip(outers, widths, rights, strict=True)):
            if width == 0:
                continue
            least, most = _EDGE if outer else 0.0, 1 - _EDGE
            points = [0.0]
            for cut in cuts[int(right)]:
                part = (cut - outer) / width
                if least < part < most:
                    points.append(part)
            points.append(1.0)
            low += points[:-1]
            high += points[1:]
            segment += [i] * (len(points) - 1)
        return np.array(low), np.array(high), np.array(segment)

    def _adapt(
        self, epsilon: float, segments: Segments, panels: Panels, about: float
    ) -> tuple[float, float]:
        """Halve panels until they agree with what they were before."""
        low, high, segment = panels.low, panels.high, panels.segment
        sums = self._panel_sums(epsilon, segments, low, high, segment, _RULES[0], about)
        coarse: Array = sums[0]
        about = max(about, float(_logsumexp(coarse)))
        settled = np.zeros((2, 0))
        for turn in range(1, _ROUNDS):
            n = len(low)
            if turn > 1:  # the first check is one of the rules alone
                middle = (low + high) / 2
                low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
                segment = np.concatenate([segment, segment])
            rule = _RULES[turn % 2]
            fine = self._panel_sums(epsilon, segments, low, high, segment, rule, about)
            whole = fine[0] if turn == 1 else np.logaddexp(fine[0, :n], fine[0, n:])
            total = float(_logsumexp(np.concatenate([settled[0], fine[0]])))
            if total == -math.inf:
                return total, total
            error: Array = np.abs(np.exp(whole - total) - np.exp(coarse - total))
            # few panels are near the limit at once
            good = np.tile(error <= _AGREEMENT / 8, len(low) // n)
            settled = np.concatenate([settled, fine[:, good]], axis=1)
            if good.all():
                return total, float(_logsumexp(settled[1]))
            low, high, segment, coarse = low[~good], high[~good], segment[~good], fine[0, ~good]
            if len(low) > _MAX_PANELS:
                break
        raise ConvergenceError(
            f"δ({epsilon!r}) of the pair with {self._named()} missed its tolerance {RTOL:g}; no "
            "value is returned. Please report the pair."
        )

    def _panel_sums(
        self,
        epsilon: float,
        segments: Segments,
        low: Array,
        high: Array,
        segment: Index,
        rule: Rule,
        about: float,
    ) -> Array:
        """Logs of E (1 - e^{ε-L})₊ and P[L > ε] over each panel, (2, panels)."""
        if not low.size:
            return np.zeros((2, 0))
        outer, width, right = segments[0][segment], segments[1][segment], segments[2][segment]
        half = 0.5 * (high - low) * width
        nodes, weights = rule.outer
        x = (outer + low * width)[:, None] + half[:, None] * (1 + nodes)
        upper = np.repeat(right, len(nodes))
        logs = self._integrand(epsilon, x.ravel(), upper, rule, about)
        return _logsumexp(logs.reshape(2, *x.shape) + np.log(half[:, None] * weights))

    def _integrand(
        self, epsilon: float, x: Array, right: Flags, rule: Rule, about: float
    ) -> Array:
        """At distance ``x`` from R = 0, where θ = φ - π/2, or where ``right`` from θ = π/2.

        Both cos(θ-φ) and cos θ are then sines of ``x`` and of ``x`` + φ: no digit is lost, however
        close to an end a small φ puts the mass.
        """
        angle, range_ = math.atan2(self._sine, self.cosine), math.atan2(self._sine, -self.cosine)
        outer, other = np.sin(x), np.sin(x + angle if self.cosine > 0 else range_ - x)
        cos_theta = np.maximum(np.where(right, outer, other), 1e-150)
        ratio = self.ratio * np.where(right, other, outer) / cos_theta
        # R/ν - 1 = ±2 sin(φ/2) cos(x + φ/2) / cos θ keeps its relative precision.
        change = math.sqrt(2 * (1 - self.cosine)) * np.sin(range_ / 2 - x) / cos_theta
        excess = self.ratio * np.where(right, change, -change) + (self.ratio - 1)
        log_weight = np.full(x.shape, self._log_angle)
        if self.rank > 1:
            # log cos θ, from whichever of sin and cos is the smaller one.
            sin_theta = np.cos(np.where(right, x, x + angle))
            square = np.minimum(np.square(sin_theta), 0.6)
            log_cos = np.where(cos_theta < 0.7, np.log(cos_theta), 0.5 * np.log1p(-square))
            log_weight += (self.rank - 1) * log_cos
        return self._inner(epsilon, ratio, excess, log_weight, rule, about)

    def _inner(
        self,
        epsilon: float,
        ratio: Array,
        excess: Array,
        log_weight: Array,
        rule: Rule,
        about: float,
    ) -> Array:
        """Logs of E[(1 - e^{ε-L})₊ | R] and P[L > ε | R], each plus ``log_weight``, (2, nodes)."""
        m, r = self.in_features, self.rank
        near = ratio > 0.5  # below it is R - 1 that has lost what tells R from 0
        safe = np.maximum(ratio, _TINY)
        log_ratio = np.where(near, np.log1p(np.where(near, excess, 0.0)), np.log(safe))
        shift = 0.5 * (m + 1 - r) * log_ratio + ((r - 1) * math.log(self.ratio) - epsilon)  # a - ε
        slope = np.where(near, excess, ratio - 1.0) / safe  # 1 - 1/R, the sign of R - 1
        logs = np.full((2, len(ratio)), -math.inf)
        full = ((slope <= 0) & (shift >= 0)).nonzero()[0]
        if full.size:
            gap = epsilon + (r - 1) * (log_ratio[full] - math.log(self.ratio))
            logs[0, full] = np.log(-np.expm1(np.minimum(gap, 0.0)))
            logs[1, full] = 0.0
        part = np.where(slope < 0, shift < 0, (slope > 0) & (shift > 0)).nonzero()[0]
        slope = slope[part]
        square = 2 * shift[part] / slope  # x
        # Chernoff: the tail of χ²_k beyond x is at most exp(-(x - k - k ln(x/k))/2).
        k = m + r - 1
        beyond = (slope < 0) == (square > k)
        decay = np.where(beyond, 0.5 * (square - k - k * np.log(square / k)), 0.0)
        kept = (log_weight[part] - decay > about - rule.drop - _IGNORED).nonzero()[0]
        if kept.size:
            part = part[kept]
            logs[0, part], logs[1, part] = log_tails(
                k, self._log_chi, square[kept], slope[kept], rule
            )
        logs += log_weight
        return logs


def projected_sign_flip(rank: int, cosine: float) -> float:
    """P[R <= 0] = P[(Av)·(Av') <= 0], relative precision kept down to 5e-324.

    >>> projected_sign_flip(2, 0.0)
    0.5
    """
    square = (1 - cosine) * (1 + cosine)
    tail = 0.5 * float(special.betainc(rank / 2, 0.5, square))
    return tail if cosine >= 0 else 1.0 - tail


def _newton(
    epsilon: float, value: float, slope: float, aim: float, last: tuple[float, float] | None
) -> float:
    """Next ε, from ``value`` = log δ(ε), ``slope`` = -d log δ/dε or 0, and both at the last ε."""
    away = value - aim
    step = math.copysign(math.inf, away)  # of log ε
    if slope:
        step = away / (slope * epsilon)  # as of a power law: log δ is straight in log ε
        if last and abs(away) < abs(value - last[0]) / 4:
            # Close to the end: 1 / slope is straight in log δ.
            bend = (1 / slope - 1 / last[1]) / (value - last[0])
            step = math.log1p(max((1 / slope - bend * away / 2) * away / epsilon, -0.9))
        elif slope * epsilon > _STEEP and value < -1:
            # As of a normal loss: √(-log δ) is straight in ε.
            root = math.sqrt(-value)
            step = 2 * root * (math.sqrt(max(-aim, 0.0)) - root) / (slope * epsilon)
            step = math.log1p(max(step, -0.9))
    limit = math.log(_MAX_FACTOR)
    return epsilon * math.exp(min(max(step, -limit), limit))


def _log_angle_norm(rank: int) -> float:
    """Log of the density of θ at 0, which is ∝ cos^{r-1} θ."""
    end = math.pi / 2
    if rank > 1:
        # ln cos θ <= -θ²/2, so this is where the density is e^-30.
        end = min(end, math.sqrt(2 * DROP / (rank - 1)))
    theta = end * FINE
    log_density = 0.5 * (rank - 1) * np.log1p(-np.square(np.sin(theta)))
    return -math.log(end * float(np.exp(log_density) @ FINE_WEIGHTS))


def _logsumexp(values: Array) -> Array:
    """Over the last axis."""
    peak = values.max(axis=-1)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    return safe + np.log(np.exp(values - safe[..., None]).sum(axis=-1))
