"""Moments of the Poisson-sampled Gaussian: sound upper ends at integer and fractional orders.

With P = N(0, z²), Q = N(1, z²) and M = (1-p) P + p Q, everything here is an upper end of

    log A(α) = (α - 1) D_α(M ‖ P),   A(α) = E_P (1 + u)^α,   u = p (e^{(2x-1)/(2z²)} - 1).

Because E_P u = 0, A - 1 = E_P[(1 + u)^α - 1 - αu], whose integrand is nowhere negative. That keeps
full relative precision where A is within 1e-14 of 1, which 10⁶ steps at p = 1e-7 need. Proofs of
the error bounds are in docs/theory/rdp.md.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import special

Array = npt.NDArray[np.float64]

MAX_INTEGER_ORDER = 1024  # above it the quadrature is cheaper than the sum
_LOG_FACTORIAL: Array = special.gammaln(np.arange(1.0, MAX_INTEGER_ORDER + 2))

# Aliasing of the trapezoidal rule, relative to the integral: 2 exp(-_LOG_ALIAS) ≈ 1e-20.
_LOG_ALIAS = 46.7
_ALIAS = 2.1 * math.exp(-_LOG_ALIAS)
_REACH = 9.5  # standard deviations beyond the outermost mode; φ(9.5) ≈ 1e-20
_EPS = float(np.finfo(np.float64).eps)
_MAX_NODES = 1 << 22  # an order that needs more is given up: its divergence is inf
_BLOCK = 1 << 18  # elements of one work array, so that it stays in cache
_DIRECT = 30.0  # exponents up to here go through expm1
_HUGE = 600.0  # exponents beyond it are shifted: exp overflows at 709


def log_moment_integer(noise_multiplier: float, sample_rate: float, orders: Array) -> Array:
    """Upper ends of log A at whole ``orders`` in [2, MAX_INTEGER_ORDER], by the binomial sum.

    A - 1 = Σ_{k≥2} C(α,k) (1-p)^{α-k} p^k (e^{k(k-1)/(2z²)} - 1), all terms positive; the terms
    k = 0, 1 of Mironov, Talwar & Zhang, Sec. 3.3, cancel against Σ_k C(α,k)(1-p)^{α-k}p^k = 1.
    """
    alpha = orders.astype(np.int64)[:, None]
    k = np.arange(2, int(alpha.max()) + 1)
    rest = alpha - k
    exponent = k * (k - 1) * (0.5 / noise_multiplier / noise_multiplier)
    # log expm1(x) = x + log(-expm1(-x)), which neither overflows nor cancels.
    log_expm1 = exponent + np.log(-np.expm1(-exponent))
    log_p, log_not_p = math.log(sample_rate), math.log1p(-sample_rate)
    terms = (
        _LOG_FACTORIAL[alpha]
        - _LOG_FACTORIAL[k]
        - _LOG_FACTORIAL[np.maximum(rest, 0)]
        + k * log_p
        + rest * log_not_p
        + log_expm1
    )
    terms = np.where(rest >= 0, terms, -np.inf)
    peak = terms.max(axis=1)
    log_excess = peak + np.log(np.exp(terms - peak[:, None]).sum(axis=1))
    # Each term is off by a few eps of its largest summand.
    a = orders
    size = a * (a - 1) * exponent[0] / 2 - a * (log_p + log_not_p) + _LOG_FACTORIAL[alpha[:, 0]]
    return np.logaddexp(0.0, log_excess + _EPS * (16 + 8 * size))


def log_moment(noise_multiplier: float, sample_rate: float, orders: Array) -> Array:
    """Upper ends of log A at real ``orders`` > 1, by the trapezoidal rule; ``inf`` if too wide.

    The integrand is analytic in the strip abs(Im x) < πz² and grows there by no more than the
    factor e^{Im² / (2z²)}, which gives the step and a certified aliasing error.
    """
    step = _step(noise_multiplier)
    ranks = np.argsort(orders, kind="stable")
    result = np.full(orders.shape, np.inf)
    start = 0
    while start < len(ranks):
        # Orders that share nodes: up to twice as many as the smallest of them needs.
        need = (orders[ranks[start:]] / noise_multiplier + 2 * _REACH) / step
        if need[0] > _MAX_NODES:
            break  # and so do all larger ones
        width = min(_MAX_NODES, 2 * need[0])
        count = int(np.searchsorted(need, width, side="right"))
        count = max(1, min(count, int(_BLOCK // need[0])))
        group = ranks[start : start + count]
        result[group] = _trapezoid(noise_multiplier, sample_rate, orders[group], step)
        start += count
    return result


def _step(z: float) -> float:
    """Largest step, in standard deviations, whose aliasing is 2 exp(-_LOG_ALIAS) of the integral.

    Shifting the line of integration by a < πz standard deviations costs e^{a²/2} and gains
    e^{-2πa/step}; the best a is 2π/step unless the strip ends before.
    """
    if math.pi * z >= math.sqrt(2 * _LOG_ALIAS):
        return math.sqrt(2 * math.pi**2 / _LOG_ALIAS)
    return 2 * math.pi**2 * z / (_LOG_ALIAS + (math.pi * z) ** 2 / 2)


def _trapezoid(z: float, p: float, orders: Array, step: float) -> Array:
    top = float(orders.max())
    y = step * np.arange(
        -math.ceil(_REACH / step), math.ceil((top / z + _REACH) / step) + 1, dtype=np.float64
    )
    s = y / z - 0.5 / z / z
    safe = p * np.expm1(np.minimum(s, _HUGE))
    log_ratio = np.where(s < _HUGE, np.log1p(safe), np.logaddexp(math.log1p(-p), s + math.log(p)))
    log_weight = -0.5 * y * y + math.log(step / math.sqrt(2 * math.pi))
    weight = np.exp(log_weight)
    a = orders[:, None]

    # The two forms of (1+u)^α - 1 - αu: the first does not cancel, the second does not overflow.
    split = int(np.searchsorted(log_ratio, _DIRECT / top))
    low, high = slice(None, split), slice(split, None)
    excess = (np.expm1(a * log_ratio[low]) - a * safe[low]) @ weight[low]
    exponent = a * log_ratio[high] + log_weight[high]
    shift = np.maximum(0.0, exponent.max(axis=1, initial=-np.inf) - _HUGE)
    powers = np.exp(exponent - shift[:, None]).sum(axis=1)
    first = np.exp(log_ratio[high] + log_weight[high]).sum()
    tilt = powers - orders * first + (orders - 1) * weight[high].sum()

    # Upper ends: rounding of the exponents, aliasing, and what lies beyond the outermost nodes.
    rounding = _EPS * (16 + 4 * (orders * y[-1] / z + y[-1] * y[-1] / 2))
    moved = 2 * orders * p * min(1.0, 0.4 / z)  # ≥ α E|u|
    beyond = np.exp(orders * log_ratio[-1] + log_weight[-1] - shift) / math.expm1(_REACH * step)
    before = orders * p * weight[0] * (1 + 1 / (_REACH * step))
    upper = (excess + tilt) * (1 + rounding) + rounding * moved + beyond + before
    upper += _ALIAS * (2 + upper + 2 * orders * p)
    with np.errstate(divide="ignore"):
        shifted = shift + np.log(powers) + rounding + 4 * _ALIAS
    return np.where(shift > 0, shifted, np.log1p(np.maximum(upper, 0.0)))
