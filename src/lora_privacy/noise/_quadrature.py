"""Tails of a difference of two scaled gamma variables, by a contour integral.

The entry law of ``entry.py`` has a moment generating function in elementary terms, so each tail
is one inversion integral. On a hyperbola through the saddle point the integrand is a bump
without cancellation, and the trapezoidal rule converges geometrically: the relative accuracy is
the same in the centre and at 1e-300. A density integrated over its tail would need Bessel
functions at every node, and the mixture over S turns into a step as |ρ| → 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_privacy.errors import ConvergenceError
from lora_privacy.noise._rows import Array

__all__ = ["entry_tails"]

# The rule at step h against the rule at step 2h. Halving h about squares the error; on 9,000
# random laws of ranks 1 to 10⁵ the finer sum, which is returned, was then within 1e-12.
_AGREEMENT = 1e-12
_FIRST_STEP = 0.05
_HALVINGS = 5
# Nodes reach |u| = width·sinh(_REACH) unless a survey at a wide step finds that all is 0 before.
_NEGLIGIBLE = 1e-18
_REACH = 7.0
_SURVEY_STEP = 0.25
# exp(-745) is the smallest double: below it a tail is 0.
_LOG_TINY = -760.0
# The path is f - B + B sin(_ANGLE + iu): a hyperbola that opens to the right around its focus f.
_SIN, _COS = 0.5, float(np.sqrt(0.75))
_BISECTIONS = 24
_CHUNK = 2048


def entry_tails(rank: npt.ArrayLike, rho: npt.ArrayLike, x: npt.ArrayLike) -> tuple[Array, Array]:
    """Lower and upper tail of N = ((1+ρ)X - (1-ρ)Y)/(2r) - ρ at ``x``; X, Y ~ χ²_r independent.

    The smaller tail is computed on its own; the other one is its complement.

    Args:
        rank: r, at least 1; broadcast.
        rho: ρ, strictly between -1 and 1; broadcast.
        x: Where, finite; broadcast.

    Returns:
        P(N <= x) and P(N > x), each of the broadcast shape.

    Raises:
        ConvergenceError: The rule missed its tolerance at some point.
    """
    k, rho_, x_ = np.broadcast_arrays(
        np.asarray(rank, np.float64) / 2, np.asarray(rho, np.float64), np.asarray(x, np.float64)
    )
    shape = x_.shape
    k, rho_, x_ = k.ravel(), rho_.ravel(), x_.ravel()
    # x >= 0, the mean, has its upper tail as the computed one. Mirrored where ρ < 0.
    upper = x_ >= 0
    above = upper ^ np.signbit(rho_)
    sign = np.copysign(1.0, rho_)
    rho_, x_ = sign * rho_, sign * x_
    small = np.empty(x_.size)
    for start in range(0, x_.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        small[part] = _small_tail(k[part], rho_[part], x_[part], above[part])
    low = np.where(upper, 1.0 - small, small)
    high = np.where(upper, small, 1.0 - small)
    return low.reshape(shape), high.reshape(shape)


def _small_tail(k: Array, rho: Array, x: Array, above: npt.NDArray[np.bool_]) -> Array:
    """Tail beyond ``x`` on the side away from the mean, the upper one where ``above``; ρ >= 0."""
    result = np.empty(x.size)
    # Lower tail at t = r(x + ρ) < 0 is the upper tail of the mirrored law: its path opens around
    # the cut of the gamma variable that makes t negative.
    outer = above | (x + rho < 0)
    flip = np.where(above, 1.0, -1.0)
    if outer.any():
        result[outer] = _outer(k[outer], (flip * rho)[outer], (flip * x)[outer])
    if not outer.all():
        result[~outer] = _inner(k[~outer], rho[~outer], x[~outer])
    return result


def _outer(k: Array, rho: Array, x: Array) -> Array:
    """P(N > x) for x >= 0 and x + ρ >= 0: the path passes between the pole 0 and the cut 1/α."""
    alpha, beta = 1.0 + rho, 1.0 - rho
    s, gap, curvature = _saddle(k, alpha, beta, 2.0 * k * (x + rho))
    return _trapezoid(k, rho, x, s, gap, gap, curvature)


def _inner(k: Array, rho: Array, x: Array) -> Array:
    """P(N <= x) for x < 0 <= x + ρ: the path passes to the left of the pole, right of -1/β."""
    alpha, beta = 1.0 + rho, 1.0 - rho
    s, _, curvature = _saddle(k, beta, alpha, -2.0 * k * (x + rho))
    return -_trapezoid(k, rho, x, -s, 1.0 / alpha + s, s, curvature)


def _saddle(k: Array, alpha: Array, beta: Array, t: Array) -> tuple[Array, Array, Array]:
    """Where -k ln(1-αs) - k ln(1+βs) - ts - ln s is least on (0, 1/α): s, 1/α - s, the curvature.

    By bisection in the logit of αs, which keeps the digits of both ends.
    """
    low, high = np.full(k.size, -90.0), np.full(k.size, 40.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        s, gap = _logistic(middle) / alpha, _logistic(-middle) / alpha
        falls = k * (1.0 / gap - beta / (1.0 + beta * s)) - t < 1.0 / s
        low, high = np.where(falls, middle, low), np.where(falls, high, middle)
    middle = (low + high) / 2
    s, gap = _logistic(middle) / alpha, _logistic(-middle) / alpha
    return s, gap, k * (1.0 / gap**2 + (beta / (1.0 + beta * s)) ** 2) + 1.0 / s**2


def _trapezoid(
    k: Array, rho: Array, x: Array, start: Array, gap: Array, focus: Array, curvature: Array
) -> Array:
    """(1/2πi) ∫ E[exp(sN)] exp(-sx) ds/s along a hyperbola that crosses the axis at ``start``.

    ``gap`` is the distance from there to the cut 1/α, ``focus`` that to the focus of the
    hyperbola, both of them positive.
    """
    peak = _exponent(k, rho, x, start.astype(complex), gap.astype(complex)).real
    result = np.zeros(k.size)
    left = np.flatnonzero(peak > _LOG_TINY)
    step = _FIRST_STEP
    for _ in range(_HALVINGS):
        if not left.size:
            return result
        fine, coarse = _sums(
            *(v[left, None] for v in (k, rho, x, start, gap, focus, curvature, peak)), step=step
        )
        good = np.abs(fine - coarse) <= _AGREEMENT * np.abs(fine)  # NaN is not good
        result[left[good]] = (fine * np.exp(peak[left]))[good]
        left, step = left[~good], step / 2
    if left.size:
        i = left[0]
        raise ConvergenceError(
            f"The tail of the entry law at rank={2 * k[i]:g}, ρ={rho[i]:.17g}, x/‖q‖={x[i]:.17g} "
            f"missed its tolerance {_AGREEMENT:g}; no value is returned. Please report the point."
        )
    return result


def _sums(
    k: Array,
    rho: Array,
    x: Array,
    start: Array,
    gap: Array,
    focus: Array,
    curvature: Array,
    peak: Array,
    *,
    step: float,
) -> tuple[Array, Array]:
    """The trapezoidal sums with step ``step`` and with twice that, relative to exp(peak)."""
    size = 2.0 * focus  # the focal half-distance: focus = size (1 - sin(angle))
    width = 1.0 / (np.sqrt(curvature) * size * _COS)

    def terms(v: Array) -> Array:
        # u = width·sinh(v) packs the Gaussian centre and an exponential tail into few nodes. Far
        # out, at u = 300, a path as long as cosh(u) has an integrand of 0.
        u = np.minimum(width * np.sinh(v), 300.0)
        sinh_u, rise = np.sinh(u), 2.0 * np.sinh(u / 2) ** 2
        along = size * (_SIN * rise + 1j * _COS * sinh_u)
        slope = size * (_COS * (1.0 + rise) - 1j * _SIN * sinh_u)
        s = start + along
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.exp(_exponent(k, rho, x, s, gap - along) - peak) / s * slope
            return value.real * width * np.cosh(v)

    survey = np.arange(0.0, _REACH, _SURVEY_STEP)
    seen = np.abs(terms(survey[:-2]))
    heavy = np.flatnonzero((seen > _NEGLIGIBLE * seen.max(axis=1, keepdims=True)).any(axis=0))
    term = terms(np.arange(0.0, float(survey[int(heavy.max(initial=0)) + 2]), step))
    term[:, 0] *= 0.5
    # A range that is too short leaves a last term that counts: no sum then.
    short = np.abs(term[:, -1]) > 1e-15 * np.abs(term).max(axis=1)
    term[short] = np.nan
    return term.sum(axis=1) * step / np.pi, term[:, ::2].sum(axis=1) * 2 * step / np.pi


def _exponent(
    k: Array, rho: Array, x: Array, s: npt.NDArray[np.complex128], gap: npt.NDArray[np.complex128]
) -> npt.NDArray[np.complex128]:
    """Log of E[exp(sN')], minus s·2kx, N' = 2kN, for N in units of ‖q‖; ``gap`` = 1/α - s."""
    alpha, beta = 1.0 + rho, 1.0 - rho
    a = s * (2.0 * rho + alpha * beta * s)  # 1 - a = (1 - αs)(1 + βs)
    # Near 0 the sum of logs loses k·eps; near the cuts 1 - a loses the small factor.
    modulus = a.real * a.real + a.imag * a.imag
    near = modulus < 0.1
    product = alpha * gap * (1.0 + beta * s)
    log_real = np.where(
        near,
        0.5 * np.log1p(np.where(near, modulus - 2.0 * a.real, 0.0)),
        np.log(np.where(near, 1.0, np.abs(product))),
    )
    angle = np.where(
        near, np.arctan2(-a.imag, 1.0 - a.real), np.angle(alpha * gap) + np.angle(1.0 + beta * s)
    )
    return -k * (log_real + 1j * angle + 2.0 * (rho + x) * s)


def _logistic(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))
