"""Upper bounds on δ over a cell of pairs, by an upper sum over the law of the output of v.

Under v, the angle θ and Q ~ χ²_k have a law that does not depend on v'. So for a cell C of pairs

    sup_C δ(ε) <= E (1 - exp(ε - sup_C L(θ, Q)))₊ <= Σ_bins P[bin] E_Q (1 - exp(ε - L̄_bin(Q)))₊

with L̄_bin the largest loss over the cell and over the bin of θ. There R lies in [R₁, R₂], and as
c ln R + Q/(2R) has no inner maximum, L̄ is at most the larger of two lines in Q, whose expectation
is a difference of χ² tails. No quadrature enters. Proof in docs/theory/projection-pairs.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

Array = npt.NDArray[np.float64]

# Relative error granted to each tail, hundreds of times what scipy's shows.
_TAIL_SLACK = 1e-12
_ROUNDING = 1e-15
_BINS = 2400  # of θ: equal steps of the normal score of t_r
_TAILS = 1e-4  # share of δ that both outer bins may cost


@dataclass(frozen=True, slots=True)
class FamilyCover:
    """Cells are boxes of an angle φ = arccos ρ in [0, π] and a ratio ν.

    Attributes:
        in_features: m >= 1.
        rank: r >= 1.
        resolution: δ that the outer bins of θ are chosen for.
    """

    in_features: int
    rank: int
    resolution: float
    _tangents: Array = field(init=False)
    _masses: Array = field(init=False)

    def __post_init__(self) -> None:
        reach = -float(special.ndtri(max(self.resolution * _TAILS / 2, 1e-300)))
        scores = np.linspace(-reach, 0.0, _BINS // 2 + 1)
        below = special.stdtrit(self.rank, special.ndtr(scores[:-1])) / math.sqrt(self.rank)
        half = np.unique(below[np.isfinite(below)])  # any ascending points would do
        tails = np.append(_lower_tail(self.rank, half), 0.5)
        inner = np.maximum(np.diff(tails), 0.0) + _TAIL_SLACK * tails[1:]
        outer = tails[:1] * (1 + _TAIL_SLACK)
        object.__setattr__(self, "_tangents", np.concatenate([half, [0.0], -half[::-1]]))
        masses = np.concatenate([outer, inner, inner[::-1], outer])
        object.__setattr__(self, "_masses", masses)

    def delta(self, epsilon: float, angles: Array, ratios: Array) -> Array:
        """Upper bounds on the forward δ(ε) over each cell, shape (cells,).

        Args:
            epsilon: ε > 0.
            angles: Least and largest φ of each cell, shape (cells, 2).
            ratios: Least and largest ν of each cell, shape (cells, 2).
        """
        k = self.in_features + self.rank - 1
        epsilon = epsilon * (1 - 1e-12) - 1e-14 * k  # rounding of the losses
        low, high = self._ranges(angles, ratios)
        top = np.log(ratios[:, 1:])  # ln ν enters as (r-1) ln ν
        value = np.ones(low.shape)
        inside = low > 0
        value[inside] = self._envelope(
            epsilon,
            low[inside],
            high[inside],
            np.broadcast_to(top, low.shape)[inside],
        )
        total = value @ self._masses[1:-1] + self._masses[0] + self._masses[-1]
        return np.minimum(total, 1.0)

    def _ranges(self, angles: Array, ratios: Array) -> tuple[Array, Array]:
        """Least and largest R of each cell in each inner bin, shape (cells, bins)."""
        cos, sin = np.cos(angles)[:, :, None], np.sin(angles)[:, :, None]
        left, right = self._tangents[:-1], self._tangents[1:]
        # cos φ + tan θ sin φ grows with θ, and is concave in φ where it is positive.
        least = (cos + sin * left - _ROUNDING * (1 + np.abs(sin * left))).min(axis=1)
        most = (cos + sin * right + _ROUNDING * (1 + np.abs(sin * right))).max(axis=1)
        theta = np.arctan(right)
        peak = (angles[:, :1] <= theta) & (theta <= angles[:, 1:])
        most = np.where(peak, np.sqrt(1 + right * right) * (1 + _ROUNDING), most)
        return (
            ratios[:, :1] * least * (1 - _ROUNDING),
            ratios[:, 1:] * most * (1 + _ROUNDING),
        )

    def _envelope(self, epsilon: float, low: Array, high: Array, top: Array) -> Array:
        """E_Q (1 - exp(ε - max of the lines at R = low, high))₊."""
        c = (self.in_features + 1 - self.rank) / 2
        # The steeper line, at ``low``, is the larger one beyond the crossing.
        crossing = np.zeros(low.shape)
        if c > 0:
            gap = 1 / low - 1 / high
            wide = gap > 0
            crossing[wide] = 2 * c * np.log(high[wide] / low[wide]) / gap[wide]
        infinity = np.full(low.shape, math.inf)
        zero = np.zeros(low.shape)
        total = self._line(epsilon, low, top, crossing, infinity)
        if c > 0:
            total += self._line(epsilon, high, top, zero, crossing)
        return np.minimum(total, 1.0)

    def _line(self, epsilon: float, ratio: Array, top: Array, start: Array, end: Array) -> Array:
        """Share of one line, over Q between ``start`` and ``end``."""
        r = self.rank
        c = (self.in_features + 1 - r) / 2
        slope = (1 / ratio - 1) / 2
        log_ratio = np.log(ratio)
        missing = epsilon - (r - 1) * top - c * log_ratio
        with np.errstate(divide="ignore", invalid="ignore"):
            at = missing / slope
        at = np.where(slope == 0, np.where(missing < 0, -math.inf, math.inf), at)
        start = np.where(slope >= 0, np.maximum(start, at), start)
        end = np.where(slope < 0, np.minimum(end, at), end)
        result = np.zeros(ratio.shape)
        live = end > start
        if live.any():
            p, q, over = start[live], end[live], ratio[live]
            _, most = self._mass(p, q)
            least, _ = self._mass(p / over, q / over)
            with np.errstate(over="ignore", invalid="ignore"):
                tilt = np.exp(epsilon + (r - 1) * (log_ratio[live] - top[live]))
                saved = np.where(least > 0, tilt * least, 0.0) * (1 - _TAIL_SLACK)
            result[live] = np.clip(most - saved, 0.0, 1.0)
        return result

    def _mass(self, start: Array, end: Array) -> tuple[Array, Array]:
        """Lower and upper end of P[start < Q < end]."""
        half = (self.in_features + self.rank - 1) / 2
        upper = start > 2 * half  # the smaller tail, so that differences lose little
        first, second = np.where(upper, start, end) / 2, np.where(upper, end, start) / 2
        tail = np.empty((2, start.size))
        for row, point in enumerate((first, second)):
            tail[row, upper] = special.gammaincc(half, point[upper])
            tail[row, ~upper] = special.gammainc(half, point[~upper])
        mass, slack = tail[0] - tail[1], _TAIL_SLACK * tail[0]
        return np.maximum(mass - slack, 0.0), mass + slack


def _lower_tail(rank: int, tangent: Array) -> Array:
    """P[tan θ < tangent] for negative ``tangent``, θ with the density ∝ cos^{r-1} θ."""
    square = tangent * tangent
    far = square > 1e-2
    tail = np.empty(tangent.shape)
    tail[far] = 0.5 * special.betainc(rank / 2, 0.5, 1 / (1 + square[far]))
    # Near the centre 1/(1 + square) would lose what tells it from 1.
    near = square[~far] / (1 + square[~far])
    tail[~far] = 0.5 * special.betaincc(0.5, rank / 2, near)
    return tail
