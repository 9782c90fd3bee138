"""Moments of the Poisson-sampled Gaussian: sound upper ends at integer and fractional orders.

With P = N(0, z²), Q = N(1, z²) and M = (1-p) P + p Q, everything here is an upper end of

    log A(α) = (α - 1) D_α(M ‖ P),   A(α) = E_P (1 + u)^α,   u = p (e^{(2x-1)/(2z²)} - 1).

Because E_P u = 0, A - 1 = E_P[(1 + u)^α - 1 - αu], whose integrand is nowhere negative. That keeps
full relative precision where A is within 1e-14 of 1, which 10⁶ steps at p = 1e-7 need. Proofs of
the error bounds are in docs/theory/rdp.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

Array = npt.NDArray[np.float64]

MAX_INTEGER_ORDER = 1024  # above it the quadrature is cheaper than the sum
_LOG_FACTORIAL: Array = special.gammaln(np.arange(1.0, MAX_INTEGER_ORDER + 2))

# Aliasing of the trapezoidal rule, relative to the integral: 2 exp(-_LOG_ALIAS) ≈ 1e-20.
_LOG_ALIAS = 46.7
_ALIAS = 2.1 * math.exp(-_LOG_ALIAS)
_REACH = 9.0  # standard deviations beyond the outermost mode; φ(9) ≈ 1e-18
_EPS = float(np.finfo(np.float64).eps)
_MAX_NODES = 1 << 22  # an order that needs more is given up: its divergence is inf
_BLOCK = 1 << 18  # elements of one work array, so that it stays in cache
_HUGE = 600.0  # exponents beyond it are shifted: exp overflows at 709


def log_moment(noise_multiplier: Array, sample_rate: float, orders: Array) -> Array:
    """Upper ends of log A, shape (rows, K); ``inf`` where an order needs too many nodes.

    Args:
        noise_multiplier: z of each row, shape (rows,), within 1e±150.
        sample_rate: p, in (0, 1).
        orders: Shape (rows, K), > 1. Whole ones up to ``MAX_INTEGER_ORDER`` are summed exactly,
            the others integrated.
    """
    result = np.full(orders.shape, np.inf)
    whole = (orders == np.floor(orders)) & (orders <= MAX_INTEGER_ORDER)
    if whole.any():
        row, _ = np.nonzero(whole)
        result[whole] = _sum(noise_multiplier[row], sample_rate, orders[whole])
    if not whole.all():
        columns = ~whole.all(axis=0)
        # What has been summed already is integrated at a cheap order, and dropped.
        rest = np.where(whole, 1.5, orders)[:, columns]
        integrals = _integrate(noise_multiplier, sample_rate, rest)
        result[:, columns] = np.where(whole[:, columns], result[:, columns], integrals)
    return result


def _sum(z: Array, p: float, orders: Array) -> Array:
    """Log A of each pair of ``z`` and whole order, by the binomial sum.

    A - 1 = Σ_{k≥2} C(α,k) (1-p)^{α-k} p^k (e^{k(k-1)/(2z²)} - 1), all terms positive; the terms
    k = 0, 1 of Mironov, Talwar & Zhang, Sec. 3.3, cancel against Σ_k C(α,k)(1-p)^{α-k}p^k = 1.
    """
    chunk = max(1, _BLOCK // int(orders.max()))
    if len(orders) > chunk:
        parts = range(0, len(orders), chunk)
        return np.concatenate([_sum(z[i : i + chunk], p, orders[i : i + chunk]) for i in parts])
    alpha = orders.astype(np.int64)
    k = np.arange(2, int(alpha.max()) + 1)
    exponent = k * (k - 1.0) * (0.5 / z / z)[:, None]
    # log expm1(x) = x + log(-expm1(-x)), which neither overflows nor cancels.
    log_expm1 = exponent + np.log(-np.expm1(-exponent))
    log_excess = log_binomial_sum(alpha, p, log_expm1, _LOG_FACTORIAL)
    # Each term is off by a few eps of its largest summand.
    largest = orders * (orders - 1) * (0.5 / z / z) - orders * (math.log(p) + math.log1p(-p))
    slack = _EPS * (16 + 8 * (largest + _LOG_FACTORIAL[alpha]))
    return np.logaddexp(0.0, log_excess + slack)


def log_binomial_sum(
    orders: npt.NDArray[np.int64], p: float, log_moments: Array, log_factorial: Array
) -> Array:
    """Log of Σ_{2≤k≤α} C(α,k) (1-p)^{α-k} p^k M_k for each order α, rounded to nearest.

    Args:
        orders: α >= 2, shape (rows,).
        p: Sampling rate, in (0, 1).
        log_moments: log M_k for k = 2 … max α in the last axis; one row for all, or a row each.
            Where one within the sum is ``inf``, so is the sum.
        log_factorial: log n! at index n, up to max α.
    """
    k = np.arange(2, int(orders.max()) + 1)
    alpha = orders[:, None]
    rest = alpha - k
    terms = (
        log_factorial[alpha]
        - log_factorial[k]
        - log_factorial[np.maximum(rest, 0)]
        + k * math.log(p)
        + rest * math.log1p(-p)
        + log_moments
    )
    terms = np.where(rest >= 0, terms, -np.inf)
    peak = terms.max(axis=1)
    known = peak < np.inf
    terms, peak = np.where(known[:, None], terms, 0.0), np.where(known, peak, 0.0)
    value = peak + np.log(np.exp(terms - peak[:, None]).sum(axis=1))
    return np.where(known, value, np.inf)


def _integrate(z: Array, p: float, orders: Array) -> Array:
    """Log A by the trapezoidal rule, in blocks of rows and columns that need similar grids."""
    step = _step(z)
    need = (orders / z[:, None] + 2 * _REACH) / step[:, None]
    result = np.full(orders.shape, np.inf)
    for rows in _alike(need.max(axis=1)):
        for columns in _alike(need[rows].max(axis=0)):
            nodes = math.ceil(need[np.ix_(rows, columns)].max())
            if nodes > _MAX_NODES:
                continue
            wide = max(1, _BLOCK // nodes)
            for j in range(0, len(columns), wide):
                across = columns[j : j + wide]
                tall = max(1, _BLOCK // (nodes * len(across)))
                for i in range(0, len(rows), tall):
                    down = rows[i : i + tall]
                    cell = np.ix_(down, across)
                    result[cell] = _trapezoid(z[down], p, orders[cell], step[down])
    return result


def _alike(need: Array) -> Iterator[npt.NDArray[np.intp]]:
    """Split the indices of ``need`` into groups whose members differ by less than two times."""
    ranks = np.argsort(need, kind="stable")
    octave = np.floor(np.log2(need[ranks] / need[ranks[0]]))
    return iter(np.split(ranks, np.flatnonzero(np.diff(octave)) + 1))


def _step(z: Array) -> Array:
    """Largest step, in standard deviations, whose aliasing is 2 exp(-_LOG_ALIAS) of the integral.

    The integrand is analytic in the strip abs(Im x) < πz² and grows there by no more than the
    factor e^{Im² / (2z²)}. Shifting the line of integration by a < πz standard deviations costs
    e^{a²/2} and gains e^{-2πa/step}; the best a is 2π/step unless the strip ends before.
    """
    free = math.sqrt(2 * math.pi**2 / _LOG_ALIAS)
    strip = 2 * math.pi**2 * z / (_LOG_ALIAS + (math.pi * z) ** 2 / 2)
    return np.where(math.pi * z >= math.sqrt(2 * _LOG_ALIAS), free, strip)


def _trapezoid(z: Array, p: float, orders: Array, step: Array) -> Array:
    """Log A of ``orders`` (rows, K), each row on a grid of its own of one common length."""
    z, step = z[:, None], step[:, None]
    left = math.ceil(float((_REACH / step).max()))
    right = math.ceil(float(((orders.max(axis=1, keepdims=True) / z + _REACH) / step).max()))
    y = step * np.arange(-left, right + 1, dtype=np.float64)
    s = y / z - 0.5 / z / z
    u = p * np.expm1(np.minimum(s, _HUGE))
    log_ratio = np.log1p(u)
    if s[:, -1].max() > _HUGE:
        log_u = s + math.log(p)  # without -p, which is e^-600 of it
        log_ratio = np.where(s > _HUGE, np.logaddexp(0.0, log_u), log_ratio)
        u = np.where(s > _HUGE, np.exp(np.minimum(log_u, _HUGE)), u)
    log_weight = np.log(step / math.sqrt(2 * math.pi)) - 0.5 * y * y
    weight = np.exp(log_weight)

    # Columns before ``split`` hold no exponent that overflows; log_ratio ascends along a row.
    top = orders.max(axis=1, keepdims=True)
    split = int(np.count_nonzero((top * log_ratio).max(axis=0) <= _HUGE))
    excess = _near(orders, log_ratio[:, :split], u[:, :split], weight[:, :split])
    shift = np.zeros(orders.shape)
    powers = np.zeros(orders.shape)
    if split < y.shape[1]:
        tail = np.s_[:, split:]
        near, powers, shift = _far(
            orders, log_ratio[tail], u[tail], weight[tail], log_weight[tail]
        )
        excess += near

    # Upper ends: rounding of the exponents, aliasing, and what lies beyond the outermost nodes.
    end = y[:, -1:]
    rounding = _EPS * (16 + 4 * (orders * end / z + end * end / 2))
    # (1+u)^α - 1 - αu cancels: its error is 16 eps of α|u|, and more only where (1+u)^α > e.
    moved = 2 * orders * p * np.minimum(1.0, 0.4 / z)  # ≥ α E|u|
    heavy = np.where(top * log_ratio > 1, np.exp(log_ratio + log_weight), 0.0)
    lost = 16 * _EPS * moved + rounding * orders * heavy.sum(axis=1, keepdims=True)
    beyond = np.exp(orders * log_ratio[:, -1:] + log_weight[:, -1:] - shift)
    beyond /= np.expm1(_REACH * step)
    before = orders * p * weight[:, :1] * (1 + 1 / (_REACH * step))
    upper = (excess + powers) * (1 + rounding) + lost + beyond + before
    upper += _ALIAS * (2 + upper + 2 * orders * p)
    result: Array = np.log1p(np.maximum(upper, 0.0))
    if shift.any():
        # Here A > e^500, so what is left out is below rounding.
        far = shift > 0
        result[far] = shift[far] + np.log(powers[far]) + rounding[far]
    return result


def _near(orders: Array, log_ratio: Array, u: Array, weight: Array) -> Array:
    """Σ weight · ((1+u)^α - 1 - αu) where no power overflows."""
    powers = np.expm1(orders[:, :, None] * log_ratio[:, None, :])
    powers -= orders[:, :, None] * u[:, None, :]
    return np.matmul(powers, weight[:, :, None])[:, :, 0]


def _far(
    orders: Array, log_ratio: Array, u: Array, weight: Array, log_weight: Array
) -> tuple[Array, Array, Array]:
    """The same sum where some powers overflow: small ones, large ones over e^shift, and shift."""
    a, log_ratio = orders[:, :, None], log_ratio[:, None, :]
    exponent = a * log_ratio
    small = exponent <= _HUGE
    direct = np.expm1(np.minimum(exponent, _HUGE)) - a * u[:, None, :]
    near = np.matmul(np.where(small, direct, 0.0), weight[:, :, None])[:, :, 0]
    # (1+u)^α - 1 - αu = (1+u)^α · (1 - α v + (α-1) v (1+u)^-1), v = (1+u)^{1-α}; the last term is
    # below e^-500 of the first, and 1 - α v = -expm1(log v) - (α-1) v does not cancel.
    log_v = -(a - 1) * log_ratio
    log_tilt = np.log(np.maximum(-np.expm1(log_v) - (a - 1) * np.exp(log_v), 1e-300))
    exponent = np.where(small, -np.inf, exponent + log_weight[:, None, :] + log_tilt)
    shift = np.maximum(0.0, exponent.max(axis=2) - _HUGE)
    return near, np.exp(exponent - shift[:, :, None]).sum(axis=2), shift
