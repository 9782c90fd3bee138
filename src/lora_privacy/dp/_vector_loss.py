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
"""Their ε; left and right ends, as fractions of a segment, and the segment each one lies in."""

RTOL = 1e-10
"""Relative error of δ; every value is checked against halved panels and another inner rule."""

_DROP = 30.0  # e-folds below its peak where an integrand is cut; e^-30 ≈ 1e-13
_AGREEMENT = 2e-11  # of the halved panels; the finer sum, far more accurate, is returned
_IGNORED = 34.0  # e-folds below the result at which a node is skipped; π e^-34 ≈ 5e-15
_EDGE = 1e-13  # of a segment: closer to its end lies rounding
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
        edges = self._edges(epsilon)
        return self._adapt(epsilon, edges, *self._first_panels(epsilon, edges), ignore)

    def _glance(
        self, epsilon: float, ignore: float = -math.inf, panels: Panels | None = None
    ) -> tuple[float, float, Panels | None]:
        """The same unchecked, from the first panels of this ε or of one nearby."""
        if abs(self.cosine) == 1:
            return (*self._on_a_line(epsilon), None)
        edges = self._edges(epsilon)
        if (
            panels is None
            or not 0.8 < epsilon / panels[0] < 1.25
            or panels[3].max() != len(edges) - 2
        ):
            panels = (epsilon, *self._first_panels(epsilon, edges))
        log_d, log_p = self._panel_sums(epsilon, edges, *panels[1:], 0, ignore)
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

    def _edges(self, epsilon: float) -> Array:
        """Ends of the segments in u = θ - θ₀, R(u = 0) = 0, between which all is analytic."""
        sine = math.sqrt((1 - self.cosine) * (1 + self.cosine))
        start = math.atan2(self.cosine, sine)  # -θ₀
        points = [1.0 / self.ratio]
        half = (self.in_features + 1 - self.rank) / 2
        if half:
            log_g = (epsilon - (self.rank - 1) * math.log(self.ratio)) / half
            log_g -= math.log(self.ratio)
            points.append(math.exp(min(log_g, 700.0)))
        angles = [start + math.atan2(g - self.cosine, sine) for g in points]
        end = start + math.pi / 2
        return np.array(sorted({0.0, end, *(u for u in angles if 0 < u < end)}))

    def _crossings(self, epsilon: float) -> list[float]:
        """R at which the loss is ε for s = √(k-1) + j, about: between them E (1 - e^{ε-L})₊ grows.

        Outside of them it is 0 or 1 to e^-34. Next to R = 0 or ∞ they may lie in a sliver that no
        node of wider panels would see.
        """
        k, c = self.in_features + self.rank - 1, (self.in_features + 1 - self.rank) / 2
        target = epsilon - (self.rank - 1) * math.log(self.ratio) + k / 2

        def excess(log_ratio: float) -> float:
            return c * log_ratio + k / 2 * math.exp(min(-log_ratio, 700.0)) - target

        least = math.log(k / (2 * c)) if c > 0 else 700.0
        if excess(least) >= 0:
            return []
        found: list[float] = []
        for end in (-700.0, 700.0) if c > 0 else (-700.0,):
            inside, outside = least, end
            for _ in range(26 if excess(end) > 0 else 0):
                middle = (inside + outside) / 2
                inside, outside = (inside, middle) if excess(middle) > 0 else (middle, outside)
            for j in _STEPS if end < 0 else -_STEPS:
                square = max(math.sqrt(k - 1) + float(j), 0.1) ** 2
                if end < 0:  # 1/R - 1 goes like 1/s²
                    inverse = 1 + math.expm1(min(-inside, 700.0)) * k / square
                    found += [1 / inverse] if inverse > 0 else []
                else:  # c ln R - s²/2 is ε
                    found.append(math.exp(min(inside + (square - k) / (2 * c), 700.0)))
        return found

    def _first_panels(self, epsilon: float, edges: Array) -> tuple[Array, Array, Index]:
        """Left and right ends, as fractions of a segment, and the segment each panel lies in."""
        sine = math.sqrt((1 - self.cosine) * (1 + self.cosine))
        start = math.atan2(self.cosine, sine)
        steps = np.arctan(_SCALES / math.sqrt(self.rank))
        near = [
            math.atan2(ratio / self.ratio - self.cosine, sine)
            for ratio in self._crossings(epsilon)
        ]
        inner = np.unique(start + np.concatenate([-steps, [0.0], steps, near]))
        low: list[float] = []
        high: list[float] = []
        segment: list[int] = []
        for i, (a, b) in enumerate(itertools.pairwise(edges.tolist())):
            cuts = np.unique((inner - a) / (b - a))
            points = [0.0, *cuts[(cuts > _EDGE) & (cuts < 1 - _EDGE)].tolist(), 1.0]
            low += points[:-1]
            high += points[1:]
            segment += [i] * (len(points) - 1)
        return np.array(low), np.array(high), np.array(segment)

    def _adapt(
        self,
        epsilon: float,
        edges: Array,
        low: Array,
        high: Array,
        segment: Index,
        ignore: float,
    ) -> tuple[float, float]:
        """Halve panels until they agree with what they were before."""
        log_d, _ = self._panel_sums(epsilon, edges, low, high, segment, 0, ignore)
        ignore = max(ignore, float(_logsumexp(log_d[None])[0]) - _IGNORED)
        settled_d: list[Array] = []
        settled_p: list[Array] = []
        for turn in range(1, _ROUNDS):
            n = len(low)
            if turn > 1:  # the first check is one of the rules alone
                middle = (low + high) / 2
                low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
                segment = np.concatenate([segment, segment])
            fine_d, fine_p = self._panel_sums(epsilon, edges, low, high, segment, turn, ignore)
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
        edges: Array,
        low: Array,
        high: Array,
        segment: Index,
        turn: int,
        ignore: float,
    ) -> tuple[Array, Array]:
        """Logs of E (1 - e^{ε-L})₊ and P[L > ε] over each panel; ``turn`` picks the inner rule."""
        if not low.size:
            return np.zeros(0), np.zeros(0)
        left, width = edges[segment], edges[segment + 1] - edges[segment]
        half = 0.5 * (high - low) * width
        nodes, weights = _OUTER[turn % 2]
        u = (left + low * width)[:, None] + half[:, None] * (1 + nodes)
        log_d, log_p = self._integrand(epsilon, u.ravel(), turn, ignore)
        weight = np.log(half)[:, None] + np.log(weights)
        return (
            _logsumexp(log_d.reshape(u.shape) + weight),
            _logsumexp(log_p.reshape(u.shape) + weight),
        )

    def _integrand(
        self, epsilon: float, u: Array, turn: int, ignore: float
    ) -> tuple[Array, Array]:
        sine = math.sqrt((1 - self.cosine) * (1 + self.cosine))
        # θ = u - arcsin ρ, without the rounding of a difference where cos θ is tiny.
        sin_theta = sine * np.sin(u) - self.cosine * np.cos(u)
        cos_theta = np.maximum(sine * np.cos(u) + self.cosine * np.sin(u), 1e-18)
        # Near R = 0 and near R = 1 each form keeps its relative precision.
        ratio = self.ratio * np.sin(u) / cos_theta
        excess = (self.ratio * (self.cosine - 1) + (self.ratio - 1)) + (
            self.ratio * sine * sin_theta / cos_theta
        )
        log_weight = np.full(u.shape, self._log_angle)
        if self.rank > 1:
            # log cos θ, from whichever of sin and cos is the smaller one.
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
