"""δ of the loss of one pair under ``v -> AᵀA v``: quadrature without cancellation, in log space.

With θ the angle whose tangent is t_r/√r and s the χ variable with k = m+r-1 degrees of freedom,

    R = ν cos(θ-φ)/cos θ,   L = (r-1) ln ν + ((m+1-r)/2) ln R + (s²/2)(1/R - 1),

and δ = P[R <= 0] + E (1 - e^{ε-L})₊. The inner expectation has a closed form as a difference of χ²
tails, which loses all digits when L barely exceeds ε. Here it is the integral of the positive
function itself, between exact limits. In s that integrand is analytic and log-concave with
curvature at least 1 for every k, which gives its window in closed form. Derivation in
docs/theory/projection-pairs.md.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy.errors import ConvergenceError

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Panels = tuple[float, Array, Array, Index]
"""Their ε; both ends, as fractions of a segment, and the segment each one lies in."""
Flags = npt.NDArray[np.bool_]
Segments = tuple[Array, Array, Flags]
"""Distance of each from its end of θ, width, and whether that end is the right one, R = ∞."""

RTOL = 1e-10
"""Relative error of δ; every value is checked against halved panels and another inner rule."""

_DROP = 30.0  # e-folds below its peak where an integrand is cut; e^-30 ≈ 1e-13
_AGREEMENT = 2e-11  # of the halved panels; the finer sum, far more accurate, is returned
_IGNORED = 34.0  # e-folds below the result at which a node is skipped; π e^-34 ≈ 5e-15
_EDGE = 1e-13  # of a segment: closer to an end that is not one of θ lies rounding
_ROUNDS = 48
_MAX_PANELS = 2048  # open at once: rounding, not the integrand, keeps them apart
_NEWTON = 100
_MAX_FACTOR = 8.0  # of one Newton step in ε
_CLOSE = 1e-5  # of log δ: one more Newton step squares it
_STEEP = 3.0  # -d log δ / d log ε beyond which δ falls like a normal tail, not like a power
# Two rules for each integral, used in turn, so that each check is one of both integrals.
_INNER = tuple(np.polynomial.legendre.leggauss(n) for n in (34, 42))
_OUTER = tuple(np.polynomial.legendre.leggauss(n) for n in (12, 17))
_FINE, _FINE_WEIGHTS = (np.asarray(a) for a in np.polynomial.legendre.leggauss(96))
# Panels before any refinement: powers of two of the scale 1/√r of θ.
_SCALES = np.exp2(np.arange(0.0, 6.0))
# Steps of s, whose law has a standard deviation of .7, where panels are cut.
_STEPS = np.array([-4.0, -1.5, 0.0, 1.5, 4.0, 8.5])


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
        object.__setattr__(self, "_log_chi", _log_chi_norm(self.in_features + self.rank - 1))
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
        low, high = 0.0, math.inf
        epsilon, checked, zero, panels = self._guess(delta), False, False, None
        for turn in range(_NEWTON):
            if checked:
                value, above = self._resolved(epsilon, goal - _IGNORED)
                if least <= value <= goal:
                    return epsilon
            else:
                value, above, panels = self._glance(epsilon, goal - _IGNORED, panels)
            if value <= goal and not zero and (turn == 0 or epsilon < 1e-6):
                zero = True  # δ(0) may be low enough
                if self._glance(0.0)[0] <= goal + 1e-6 and self._resolved(0.0)[0] <= goal:
                    return 0.0
            if not checked and abs(value - aim) < _CLOSE:
                checked, low, high = True, 0.0, math.inf
            else:
                low, high = (epsilon, high) if value > goal else (low, epsilon)
            guess = self._newton(epsilon, value, above, aim)
            epsilon = guess if low < guess < high else (low + high) / 2
        raise ConvergenceError(
            f"The search for ε at δ = {delta!r} of the pair with {self._named()} did not end; no "
            "value is returned. Please report the pair."
        )

    @staticmethod
    def _newton(epsilon: float, value: float, above: float, aim: float) -> float:
        """Next ε, from ``value`` = log δ(ε), ``above`` = log P[L > ε] and the log wanted."""
        step = math.inf if value > aim else -math.inf  # of log ε
        if above > value > -math.inf:
            slope = math.expm1(min(above - value, 700.0))  # -d log δ / dε
            if slope * epsilon > _STEEP and value < -1:
                # As of a normal loss: √(-log δ) is straight in ε.
                root = math.sqrt(-value)
                step = 2 * root * (math.sqrt(max(-aim, 0.0)) - root) / (slope * epsilon)
                step = math.log1p(max(step, -0.9))
            else:
                step = (value - aim) / (slope * epsilon)  # a power law is straight in logs
        limit = math.log(_MAX_FACTOR)
        return epsilon * math.exp(min(max(step, -limit), limit))

    def _guess(self, delta: float) -> float:
        """Loss at the quantile of R, with s² at its mean."""
        g = self.cosine
        sine = math.sqrt((1 - self.cosine) * (1 + self.cosine))
        if sine:
            g += sine * float(special.stdtrit(self.rank, delta)) / math.sqrt(self.rank)
        ratio = self.ratio * max(g, 1e-12)
        k = self.in_features + self.rank - 1
        loss = (self.rank - 1) * math.log(self.ratio)
        loss += (self.in_features + 1 - self.rank) / 2 * math.log(ratio) + k / 2 * (1 / ratio - 1)
        return min(max(loss, 1e-3), 1e300)

    def _resolved(self, epsilon: float, ignore: float = -math.inf) -> tuple[float, float]:
        """Logs of E (1 - e^{ε-L})₊ and P[L > ε] over R > 0, checked.

        ``ignore`` is the log of a density of θ that is as good as 0.
        """
        if abs(self.cosine) == 1:
            return self._on_a_line(epsilon)
        segments = self._segments(epsilon)
        return self._adapt(epsilon, segments, *self._first_panels(epsilon, segments), ignore)

    def _glance(
        self, epsilon: float, ignore: float = -math.inf, panels: Panels | None = None
    ) -> tuple[float, float, Panels | None]:
        """The same unchecked, from the first panels of this ε or of one nearby."""
        if abs(self.cosine) == 1:
            return (*self._on_a_line(epsilon), None)
        segments = self._segments(epsilon)
        if (
            panels is None
            or not 0.8 < epsilon / panels[0] < 1.25
            or panels[3].max() != len(segments[0]) - 1
        ):
            panels = (epsilon, *self._first_panels(epsilon, segments))
        log_d, log_p = self._panel_sums(epsilon, segments, *panels[1:], 0, ignore)
        return float(_logsumexp(log_d[None])[0]), float(_logsumexp(log_p[None])[0]), panels

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
        log_d, log_p = self._inner(
            epsilon, np.array([self.ratio]), excess, np.zeros(1), 1, -math.inf
        )
        return float(log_d[0]), float(log_p[0])

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
        steps = _STEPS.tolist()
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
                least = math.log(square / (2 * c)) if c > 0 else 700.0
                inside, outside = least, side * 700.0

                def excess(log_ratio: float, square: float = square) -> float:
                    rest = square / 2 * math.expm1(min(-log_ratio, 700.0))
                    return c * log_ratio + rest - target

                if excess(inside) >= 0 or excess(outside) <= 0:
                    continue
                while abs(outside - inside) > max(1e-3 * min(abs(inside), abs(outside)), 1e-15):
                    middle = (inside + outside) / 2
                    inside, outside = (inside, middle) if excess(middle) > 0 else (middle, outside)
                found.append(math.exp(inside))
        return found

    def _first_panels(self, epsilon: float, segments: Segments) -> tuple[Array, Array, Index]:
        """Ends, as fractions of a segment, and the segment each panel lies in."""
        angle = math.atan2(self._sine, self.cosine)  # φ
        steps = np.arctan(_SCALES / math.sqrt(self.rank))
        theta = np.concatenate([-steps, [0.0], steps])
        ends = [self._ends(g / self.ratio) for g in self._crossings(epsilon)]
        near = np.array(ends).reshape(-1, 2)
        cuts = (
            np.unique(np.concatenate([theta + math.pi / 2 - angle, near[:, 0]])),
            np.unique(np.concatenate([math.pi / 2 - theta, near[:, 1]])),
        )
        low, high, segment = list[float](), list[float](), list[int]()
        for i, (outer, width, right) in enumerate(zip(*segments, strict=True)):
            if width == 0:
                continue
            with np.errstate(over="ignore"):  # a sliver of 1e-308 has all cuts outside
                inner = (cuts[int(right)] - outer) / width
            kept = (inner > (_EDGE if outer else 0.0)) & (inner < 1 - _EDGE)
            points = [0.0, *inner[kept].tolist(), 1.0]
            low += points[:-1]
            high += points[1:]
            segment += [i] * (len(points) - 1)
        return np.array(low), np.array(high), np.array(segment)

    def _adapt(
        self,
        epsilon: float,
        segments: Segments,
        low: Array,
        high: Array,
        segment: Index,
        ignore: float,
    ) -> tuple[float, float]:
        """Halve panels until they agree with what they were before."""
        log_d, _ = self._panel_sums(epsilon, segments, low, high, segment, 0, ignore)
        ignore = max(ignore, float(_logsumexp(log_d[None])[0]) - _IGNORED)
        settled_d: list[Array] = []
        settled_p: list[Array] = []
        for turn in range(1, _ROUNDS):
            n = len(low)
            if turn > 1:  # the first check is one of the rules alone
                middle = (low + high) / 2
                low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
                segment = np.concatenate([segment, segment])
            fine_d, fine_p = self._panel_sums(epsilon, segments, low, high, segment, turn, ignore)
            whole = fine_d if turn == 1 else np.logaddexp(fine_d[:n], fine_d[n:])
            total = float(_logsumexp(np.concatenate([*settled_d, fine_d])[None])[0])
            if total == -math.inf:
                return total, total
            error = np.abs(np.exp(whole - total) - np.exp(log_d - total))
            good = np.tile(
                error <= _AGREEMENT / 8, len(low) // n
            )  # few panels are near the limit at once
            settled_d.append(fine_d[good])
            settled_p.append(fine_p[good])
            if good.all():
                return total, float(_logsumexp(np.concatenate(settled_p)[None])[0])
            low, high, segment, log_d = low[~good], high[~good], segment[~good], fine_d[~good]
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
        turn: int,
        ignore: float,
    ) -> tuple[Array, Array]:
        """Logs of E (1 - e^{ε-L})₊ and P[L > ε] over each panel; ``turn`` picks the inner rule."""
        if not low.size:
            return np.zeros(0), np.zeros(0)
        outer, width, right = segments[0][segment], segments[1][segment], segments[2][segment]
        half = 0.5 * (high - low) * width
        nodes, weights = _OUTER[turn % 2]
        x = (outer + low * width)[:, None] + half[:, None] * (1 + nodes)
        upper = np.repeat(right, len(nodes))
        log_d, log_p = self._integrand(epsilon, x.ravel(), upper, turn, ignore)
        weight = np.log(half)[:, None] + np.log(weights)
        return (
            _logsumexp(log_d.reshape(x.shape) + weight),
            _logsumexp(log_p.reshape(x.shape) + weight),
        )

    def _integrand(
        self, epsilon: float, x: Array, right: Flags, turn: int, ignore: float
    ) -> tuple[Array, Array]:
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
        return self._inner(epsilon, ratio, excess, log_weight, turn, ignore)

    def _inner(
        self,
        epsilon: float,
        ratio: Array,
        excess: Array,
        log_weight: Array,
        turn: int,
        ignore: float,
    ) -> tuple[Array, Array]:
        """Logs of E[(1 - e^{ε-L})₊ | R] and P[L > ε | R], each plus ``log_weight``."""
        m, r = self.in_features, self.rank
        near = (ratio > 0.5) & (ratio < 2)
        tiny = np.finfo(np.float64).tiny
        safe = np.maximum(ratio, tiny)
        log_ratio = np.where(near, np.log1p(np.where(near, excess, 0.0)), np.log(safe))
        shift = (r - 1) * math.log(self.ratio) + 0.5 * (m + 1 - r) * log_ratio - epsilon  # a - ε
        slope = np.where(near, excess, ratio - 1.0) / safe  # 1 - 1/R, the sign of R - 1
        log_d, log_p = np.full(ratio.shape, -math.inf), np.full(ratio.shape, -math.inf)
        full = (slope <= 0) & (shift >= 0)
        if full.any():
            gap = epsilon + (r - 1) * (log_ratio[full] - math.log(self.ratio))
            with np.errstate(divide="ignore"):
                log_d[full] = np.log(-np.expm1(np.minimum(gap, 0.0)))
            log_p[full] = 0.0
        for below in (True, False):
            found = (slope < 0) & (shift < 0) if below else (slope > 0) & (shift > 0)
            part = np.flatnonzero(found)
            square = 2 * shift[part] / slope[part]  # x
            # Chernoff: the tail of χ²_k beyond x is at most exp(-(x - k - k ln(x/k))/2).
            k = m + r - 1
            beyond = square > k if below else square < k
            with np.errstate(divide="ignore"):
                decay = np.where(beyond, 0.5 * (square - k - k * np.log(square / k)), 0.0)
            kept = log_weight[part] - decay > ignore
            if kept.any():
                part, square = part[kept], square[kept]
                rate = 0.5 * np.abs(slope[part])
                log_d[part], log_p[part] = self._tail(square, rate, turn, below=below)
        return log_d + log_weight, log_p + log_weight

    def _tail(self, square: Array, rate: Array, turn: int, *, below: bool) -> tuple[Array, Array]:
        """Logs of E (1 - e^{-rate |s²-x|}) and of P, over s² > x = ``square`` or s² < x."""
        k = self.in_features + self.rank - 1
        mode = math.sqrt(k - 1)
        edge = np.sqrt(square)
        start = np.maximum(edge, mode) if below else np.minimum(edge, mode)
        # Beyond ``start`` the log density falls at least like fall·w + curvature·w²/2, where the
        # curvature 1 + (k-1)/s² is at least 2 below the mode and at least 1 above.
        fall = np.abs(start - (k - 1) / np.maximum(start, 1e-300))
        if below:
            width = _DROP / (fall / 2 + np.sqrt(fall * fall / 4 + _DROP / 2))
            curvature = 1 + (k - 1) / np.square(start + width)
            width = _DROP / (fall / 2 + np.sqrt(fall * fall / 4 + curvature * _DROP / 2))
            low = np.maximum(edge, mode - math.sqrt(_DROP))
            high = start + width
            cut = np.clip(np.sqrt(square + _DROP / rate), low, high)
            ends = ((low, cut, True), (cut, high, False))
        else:
            width = _DROP / (fall / 2 + np.sqrt(fall * fall / 4 + _DROP))
            low = np.maximum(start - width, 0.0)
            high = np.minimum(edge, mode + math.sqrt(2 * _DROP))
            cut = np.clip(np.sqrt(np.maximum(square - _DROP / rate, 0.0)), low, high)
            ends = ((cut, high, True), (low, cut, False))
        nodes, weights = _INNER[turn % 2]
        reference = np.clip(mode, low, high)
        peak = _log_chi(k, reference)
        with_loss, without = np.zeros(edge.shape), np.zeros(edge.shape)
        for a, b, near in ends:
            half = 0.5 * (b - a)
            live = half > 0
            if not live.any():
                continue
            s = a[live, None] + half[live, None] * (1 + nodes)
            weight = np.exp(_log_chi(k, s) - peak[live, None]) * weights
            mass = half[live] * weight.sum(axis=1)
            without[live] += mass
            if near:
                at = edge[live, None]
                loss = -np.expm1(-rate[live, None] * np.abs((s - at) * (s + at)))
                mass = half[live] * np.einsum("ij,ij->i", weight, loss)
            with_loss[live] += mass  # beyond ``cut`` the factor is 1 - e^-30
        with np.errstate(divide="ignore"):
            base = self._log_chi + peak
            return base + np.log(with_loss), base + np.log(without)


def projected_sign_flip(rank: int, cosine: float) -> float:
    """P[R <= 0] = P[(Av)·(Av') <= 0], relative precision kept down to 5e-324.

    >>> projected_sign_flip(2, 0.0)
    0.5
    """
    square = (1 - cosine) * (1 + cosine)
    tail = 0.5 * float(special.betainc(rank / 2, 0.5, square))
    return tail if cosine >= 0 else 1.0 - tail


def _log_chi(k: int, s: Array) -> Array:
    """Log of the χ_k density at ``s`` over that at its mode √(k-1)."""
    if k == 1:
        return -0.5 * s * s
    mode = math.sqrt(k - 1)
    t = (s - mode) / mode
    with np.errstate(divide="ignore"):
        return (k - 1) * (np.log1p(t) - t - 0.5 * t * t)


def _log_chi_norm(k: int) -> float:
    """Log of the χ_k density at its mode; lgamma would lose k ln k · eps."""
    mode, reach = math.sqrt(k - 1), math.sqrt(2 * _DROP)
    low, high = max(0.0, mode - reach), mode + reach
    s = low + 0.5 * (high - low) * (1 + _FINE)
    return -math.log(0.5 * (high - low) * float(np.exp(_log_chi(k, s)) @ _FINE_WEIGHTS))


def _log_angle_norm(rank: int) -> float:
    """Log of the density of θ at 0, which is ∝ cos^{r-1} θ."""
    end = math.pi / 2
    if rank > 1:
        # ln cos θ <= -θ²/2, so this is where the density is e^-30.
        end = min(end, math.sqrt(2 * _DROP / (rank - 1)))
    theta = end * _FINE
    log_density = 0.5 * (rank - 1) * np.log1p(-np.square(np.sin(theta)))
    return -math.log(end * float(np.exp(log_density) @ _FINE_WEIGHTS))


def _logsumexp(values: Array) -> Array:
    peak = values.max(axis=1)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return safe + np.log(np.exp(values - safe[:, None]).sum(axis=1))
