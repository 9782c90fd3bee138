"""From Rényi divergences to (ε, δ): the conversion, and the search for its best order.

Rows are independent problems that are solved together. The proof that one order is best, and that
the search may walk to it, is in docs/theory/rdp.md; soundness does not depend on it, because every
order gives a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lora_privacy.errors import ConvergenceError

Array = npt.NDArray[np.float64]
Index = npt.NDArray[np.int64]
Cost = Callable[[Index, Array], Array]
"""Composed divergence of the rows named first, at orders of shape (rows, K)."""

_EPS = float(np.finfo(np.float64).eps)
# The lattice of orders 1 + 2^(k/96). Against the best order a plain Gaussian loses less than
# 1e-5 (1 + ε); with sampling up to 6e-4 was measured (docs/theory/rdp.md). Never unsound.
_PER_OCTAVE = 96
_LOWEST, _HIGHEST = -40 * _PER_OCTAVE, 60 * _PER_OCTAVE
_HALF_WINDOW = 3  # wider ones waste time on large orders, whose grids are long


def least_epsilon(cost: Cost, plain: Array, delta: float, grid: tuple[float, ...] | None) -> Array:
    """Smallest ε of each row, rounded up, not below 0.

    ε(α) = R(α) + log((α-1)/α) - (log δ + log α)/(α-1) (Canonne, Kamath & Steinke, Prop. 12).

    Args:
        cost: Composed divergence R.
        plain: R(1) of each row without sampling, shape (rows,): where the search starts.
        delta: δ, in (0, 1).
        grid: Ascending orders to choose from; None for the lattice.
    """
    log_delta = math.log(delta)

    def objective(rows: Index, orders: Array) -> Array:
        spread = orders - 1
        total, log_order, gain = cost(rows, orders), np.log(orders), _log_rest(orders)
        slack = 8 * _EPS * (total - gain - (log_delta - log_order) / spread)
        return total + gain - (log_delta + log_order) / spread + slack

    return np.maximum(0.0, _minimum(objective, grid, -log_delta / plain))


def least_log_delta(
    cost: Cost, plain: Array, epsilon: float, grid: tuple[float, ...] | None
) -> Array:
    """Logarithm of the smallest δ of each row, rounded up; the inverse of ``least_epsilon``."""

    def objective(rows: Index, orders: Array) -> Array:
        spread = orders - 1
        total, log_order, gain = cost(rows, orders), np.log(orders), _log_rest(orders)
        slack = 8 * _EPS * (spread * (total + epsilon - gain) + log_order)
        return spread * (total - epsilon + gain) - log_order + slack

    return _minimum(objective, grid, (1 + epsilon) / plain)


def _log_rest(orders: Array) -> Array:
    """log((α-1)/α) to its last digits; at large α the two logarithms would cancel."""
    return np.where(orders > 2, np.log1p(-1 / orders), np.log(orders - 1) - np.log(orders))


def _minimum(
    objective: Callable[[Index, Array], Array], grid: tuple[float, ...] | None, square: Array
) -> Array:
    """Minimum of each row over the orders; the best order is about 1 + √square, or larger."""
    if grid is not None:
        fixed = np.array(grid)
        strides = (24, 6, 1) if len(fixed) > 24 else (1,)
        start = np.full(square.shape, (len(fixed) - 1) // 2)
        return _search(lambda r, k: objective(r, fixed[k]), 0, len(fixed) - 1, start, strides)
    with np.errstate(divide="ignore"):
        guess = 0.5 * _PER_OCTAVE * np.log2(square)
    start = np.clip(guess, _LOWEST, _HIGHEST).astype(np.int64)
    return _search(
        lambda r, k: objective(r, 1 + np.exp2(k / _PER_OCTAVE)),
        _LOWEST,
        _HIGHEST,
        start,
        (_PER_OCTAVE, _PER_OCTAVE // 4, _PER_OCTAVE // 16, 1),
    )


def _search(
    objective: Callable[[Index, Index], Array],
    first: int,
    last: int,
    start: Index,
    strides: tuple[int, ...],
) -> Array:
    """Minimum of each row's unimodal objective over the whole numbers first..last.

    Each round looks at 7 points of a row and walks on while the best one is at an edge. All
    infinite means that the orders are too large: argmin then walks down.
    """
    best = start.copy()
    value = np.full(start.shape, np.inf)
    window = np.arange(-_HALF_WINDOW, _HALF_WINDOW + 1)
    for stride in strides:
        rows = np.arange(len(start))
        while rows.size:
            points = np.clip(best[rows, None] + stride * window, first, last)
            values = objective(rows, points)
            at = values.argmin(axis=1)
            found = np.take_along_axis(values, at[:, None], axis=1)[:, 0]
            if np.isnan(found).any():
                raise ConvergenceError(
                    "A Rényi divergence came out as NaN; please report it with the events."
                )
            best[rows] = np.take_along_axis(points, at[:, None], axis=1)[:, 0]
            value[rows] = np.minimum(value[rows], found)
            here = best[rows]
            down = (here == points[:, 0]) & (here > first)
            up = (here == points[:, -1]) & (here < last)
            rows = rows[down | up]
    return value
