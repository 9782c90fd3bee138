"""Expectations over the tail of a χ law, by quadrature of positive functions in log space.

In s the χ_k density is analytic and log-concave with curvature at least 1 for every k, which gives
the window of the quadrature in closed form. Derivation in docs/theory/projection-pairs.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["DROP", "FINE", "FINE_WEIGHTS", "Rule", "log_chi_norm", "log_tails"]

Array = npt.NDArray[np.float64]

DROP = 30.0  # e-folds below its peak where an integrand is cut; e^-30 ≈ 1e-13
FINE, FINE_WEIGHTS = (np.asarray(a) for a in np.polynomial.legendre.leggauss(96))


class Rule(NamedTuple):
    """Nodes of both integrals, and e-folds below its peak where the inner integrand is cut."""

    inner: tuple[Array, Array]
    outer: tuple[Array, Array]
    drop: float


def log_tails(
    k: int, log_norm: float, square: Array, slope: Array, rule: Rule
) -> tuple[Array, Array]:
    """Logs of E (1 - e^{-|slope (s²-x)|/2}) and of P, over s² > x = ``square``, or s² < x.

    It is the upper tail where ``slope``, of the sign of R - 1, is negative. ``log_norm`` is that
    of ``log_chi_norm(k)``.
    """
    mode = math.sqrt(k - 1)
    up, edge = slope < 0, np.sqrt(square)
    start = np.where(up, np.maximum(edge, mode), np.minimum(edge, mode))
    # Beyond ``start`` the log density falls at least like fall·w + curvature·w²/2, where the
    # curvature 1 + (k-1)/s² is at least 2 below the mode and at least 1 above.
    fall = np.abs(start - (k - 1) / np.maximum(start, 1e-300))
    width = _window(rule.drop, fall, np.where(up, 1.0, 2.0))
    curvature = np.where(up, 1 + (k - 1) / np.square(start + width), 2.0)
    width = _window(rule.drop, fall, curvature)
    below, above = mode - math.sqrt(rule.drop), mode + math.sqrt(2 * rule.drop)
    near = np.where(up, np.maximum(edge, below), np.minimum(edge, above))
    far = np.where(up, start + width, np.maximum(start - width, 0.0))
    low, high = np.minimum(near, far), np.maximum(near, far)
    # Beyond ``cut`` the factor is 1 - e^-drop.
    cut = np.sqrt(np.maximum(square - 2 * rule.drop / slope, 0.0))
    cut = np.minimum(np.maximum(cut, low), high)
    peak = _log_chi(k, np.minimum(np.maximum(low, mode), high))
    # Panels from near to cut, and from cut to far where these differ.
    rest = (cut != far).nonzero()[0]
    a, b = np.concatenate([near, cut[rest]]), np.concatenate([cut, far[rest]])
    nodes, weights = rule.inner
    half = 0.5 * (b - a)
    s = half[:, None] * (1 + nodes)
    s += a[:, None]
    density = _log_chi(k, s)
    density -= np.concatenate([peak, peak[rest]])[:, None]
    np.exp(density, out=density)
    half, n = np.abs(half), len(edge)
    mass = half * (density @ weights)
    without, beyond = mass[:n], mass[n:]
    loss = s[:n] - edge[:, None]
    loss *= s[:n] + edge[:, None]
    loss *= 0.5 * slope[:, None]
    np.expm1(loss, out=loss)
    loss *= density[:n]
    with_loss = -half[:n] * (loss @ weights)
    with_loss[rest] += beyond
    without[rest] += beyond
    base = log_norm + peak
    return base + np.log(with_loss), base + np.log(without)


def log_chi_norm(k: int) -> float:
    """Log of the χ_k density at its mode; lgamma would lose k ln k · eps."""
    mode, reach = math.sqrt(k - 1), math.sqrt(2 * DROP)
    low, high = max(0.0, mode - reach), mode + reach
    s = low + 0.5 * (high - low) * (1 + FINE)
    return -math.log(0.5 * (high - low) * float(np.exp(_log_chi(k, s)) @ FINE_WEIGHTS))


def _window(drop: float, fall: Array, curvature: Array) -> Array:
    """The w at which fall·w + curvature·w²/2 is ``drop``."""
    return drop / (fall / 2 + np.sqrt(fall * fall / 4 + curvature * (drop / 2)))


def _log_chi(k: int, s: Array) -> Array:
    """Log of the χ_k density at ``s`` over that at its mode √(k-1)."""
    if k == 1:
        return -0.5 * s * s
    mode = math.sqrt(k - 1)
    # In place, as in ``log_tails``: memory, not arithmetic, takes the time.
    t = s - mode
    t /= mode
    quadratic = 0.5 * t
    quadratic += 1
    quadratic *= t
    value = np.log1p(t, out=t)
    value -= quadratic
    value *= k - 1
    return value
