"""Certified upper ends of the moment generating function of a Beta variable, minus one.

β ~ Beta(a, c), a = rank/2, c = (features - rank)/2, is the share of a fixed vector's squared norm
that a Haar row space of dimension ``rank`` keeps. E e^{xβ} = ₁F₁(a; a+c; x), and everything here
is E (e^{xβ} - 1), so that small arguments keep their relative precision. Small ones are summed;
for the others Gauss-Legendre panels, an ellipse bound for each and closed bounds for both tails.
Proofs in docs/theory/projected-gaussian.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_POINTS = 16
_ROOTS, _WEIGHTS = np.polynomial.legendre.leggauss(_POINTS)
_LOG_WEIGHTS: Array = np.log(_WEIGHTS)
# Bernstein ellipse of parameter 4 about a panel, its semi-axes in units of the half width, and the
# error of the rule for an integrand bounded by 1 on it (Trefethen, ATAP, Thm. 19.3).
_RHO = 4.0
_REAL, _IMAGINARY = (_RHO + 1 / _RHO) / 2, (_RHO - 1 / _RHO) / 2
_GAUSS = 64 / 15 * _RHO ** (2 - 2 * _POINTS) / (1 - _RHO**-2)
_WIDEST = 0.5  # of a panel, in logits: the ellipse must stay clear of β = 0 and β = 1
_PER_PANEL = 3.2  # widest panel in standard deviations of the peak
_DROP = 36.0  # the panels end where the integrand is e^-36 of its peak
_BLOCK = 1 << 18  # elements of one work array
_LARGEST, _SMALLEST = 1e200, 1e-290
_SERIES = 300.0  # arguments up to it are summed: e^300 is far from overflow
_CHUNK = 512


def log_excess(features: int, rank: int, x: npt.ArrayLike) -> Array:
    """Upper ends of log(₁F₁(rank/2; features/2; x) - 1), of the shape of ``x``.

    Above the true value by less than 2e-9 + 1e-15 x; where ``x`` is beyond 1e200, and where rank
    equals features, it is that of β = 1, log(e^x - 1).

    Args:
        features: m, at least ``rank``.
        rank: r, at least 1.
        x: Arguments, at least 0; those below 1e-290 are raised to it.
    """
    wanted = np.maximum(np.asarray(x, dtype=np.float64), _SMALLEST)
    flat = wanted.ravel()
    # log expm1(x) = x + log(-expm1(-x)), which neither overflows nor cancels.
    result = flat + np.log(-np.expm1(-flat))
    result += 4 * _EPS * (1 + np.abs(result))
    if rank < features:
        for method, chosen in (
            (_series, flat <= _SERIES),
            (_integrate, (flat > _SERIES) & (flat < _LARGEST)),
        ):
            where = np.flatnonzero(chosen)
            for start in range(0, where.size, _CHUNK):
                part = where[start : start + _CHUNK]
                result[part] = np.minimum(result[part], method(features, rank, flat[part]))
    return result.reshape(wanted.shape)


def _series(features: int, rank: int, x: Array) -> Array:
    """Σ_{k≥1} (a)_k / (a+c)_k x^k / k!, all terms positive; ``x`` (rows,) is at most 300."""
    a, total = rank / 2, features / 2
    term = a / total * x
    value = term.copy()
    k = 1
    while True:
        ratio = (a + k) / (total + k) / (k + 1) * x
        # Ratios fall: once one is below a half, what is left is less than the last term.
        if np.all((ratio < 0.5) & (term <= _EPS * value)):
            return np.log(value + term) + _EPS * (16 + 8 * k + 4 * np.abs(np.log(value)))
        term = term * ratio
        value += term
        k += 1


def _integrate(features: int, rank: int, x: Array) -> Array:
    """The same for rank < features and ``x`` (rows,) in (300, 1e200), by quadrature."""
    a, c = rank / 2, (features - rank) / 2
    total = a + c
    # e^{φ(β)} with φ = a ln β + c ln(1-β) + xβ is the integrand in logits but for 1 - e^{-xβ}. Its
    # peak solves xβ² + (a+c-x)β - a = 0; both roots in the form that does not cancel.
    root = np.hypot(x - total, 2 * np.sqrt(a) * np.sqrt(x))
    with np.errstate(divide="ignore", over="ignore"):
        left = 2 * a / (total - x + root)
        right = (x - total + root) / (2 * x)
    peak = np.where(x < total, left, right)
    rest = 2 * c / (x + total + root)
    middle = np.log(peak) - np.log(rest)
    # e^x is taken out where the peak lies right of 1/2: only x(1-β) is then small enough to keep.
    shifted = middle > 0
    shift = np.where(shifted, x, 0.0)

    def tilt(beta: Array, gamma: Array) -> Array:
        """Xβ - shift, for arrays (rows, ...)."""
        wide = (slice(None),) + (None,) * (beta.ndim - 1)
        return np.where(shifted[wide], -x[wide] * gamma, x[wide] * beta)

    def height(t: Array) -> Array:
        """Log of the integrand in logits."""
        log_beta, log_gamma = -np.logaddexp(0.0, -t), -np.logaddexp(0.0, t)
        beta, gamma = np.exp(log_beta), np.exp(log_gamma)
        return a * log_beta + c * log_gamma + tilt(beta, gamma) + _log_share(x * beta)

    top = height(middle)
    spread = 4 / np.sqrt(a * rest**2 + c * peak**2)
    low = _edge(height, middle, -spread, top - _DROP)
    high = _edge(height, middle, spread, top - _DROP)

    # Panels: equal in logits, narrow against the curvature at the peak and at both ends.
    ends = np.stack([low, high])
    both: Array = a * special.expit(-ends) ** 2 + c * special.expit(ends) ** 2
    curvature = np.maximum(both.max(axis=0), a * rest**2 + c * peak**2)
    panels = int(
        np.ceil((high - low) / np.minimum(_WIDEST, _PER_PANEL / np.sqrt(curvature))).max()
    )
    if len(x) > 1 and len(x) * panels * _POINTS > _BLOCK:
        half = len(x) // 2
        return np.concatenate(
            [_integrate(features, rank, x[:half]), _integrate(features, rank, x[half:])]
        )
    t = low[:, None] + (high - low)[:, None] * (np.arange(panels + 1) / panels)
    beta: Array = special.expit(t)
    gamma: Array = special.expit(-t)
    width = np.where(t[:, 1:] < 0, beta[:, 1:] - beta[:, :-1], gamma[:, :-1] - gamma[:, 1:]) / 2

    share = (1 + _ROOTS) / 2
    beta_at = beta[:, :-1, None] * (1 - share) + beta[:, 1:, None] * share
    gamma_at = gamma[:, :-1, None] * (1 - share) + gamma[:, 1:, None] * share
    exponent = (
        (a - 1) * np.log(beta_at)
        + (c - 1) * np.log(gamma_at)
        + tilt(beta_at, gamma_at)
        + _log_share(x[:, None, None] * beta_at)
        + np.log(width)[:, :, None]
        + _LOG_WEIGHTS
        - top[:, None, None]
    )
    value = np.exp(exponent).sum(axis=(1, 2))

    # The integrand on the ellipse: abs(β^a) and abs((1-β)^c) at their largest imaginary part, φ at
    # its largest on the real axis, which concavity puts at the clipped peak.
    beta_mid, gamma_mid = (beta[:, 1:] + beta[:, :-1]) / 2, (gamma[:, 1:] + gamma[:, :-1]) / 2
    beta_low, gamma_low = beta_mid - _REAL * width, gamma_mid - _REAL * width
    beta_top = np.clip(peak[:, None], beta_low, beta_mid + _REAL * width)
    gamma_top = np.clip(rest[:, None], gamma_low, gamma_mid + _REAL * width)
    off = _IMAGINARY * width
    bound = (
        a * np.log(beta_top)
        + c * np.log(gamma_top)
        + tilt(beta_top, gamma_top)
        + a / 2 * np.log1p((off / beta_low) ** 2)
        + c / 2 * np.log1p((off / gamma_low) ** 2)
        - np.log(beta_low)
        - np.log(gamma_low)
        + np.log(np.minimum(2.0, x[:, None] * (beta_mid + _REAL * width + off)))
        + np.log(width)
        - top[:, None]
    )
    value += _GAUSS * np.exp(np.minimum(bound, 700.0)).sum(axis=1)

    # Beyond the panels the integrand falls at least like a power of β, or of 1 - β.
    rise = a - c * beta[:, 0] / gamma[:, 0] + np.maximum(x * beta[:, 0], 1.0)
    value += _tail(height(low) - top, np.minimum(a, rise) * gamma[:, 0])
    fall = c - gamma[:, -1] * (a / beta[:, -1] + x / -np.expm1(-x * beta[:, -1]))
    value += _tail(height(high) - top, np.minimum(c, fall) * beta[:, -1])

    logs: Array = special.gammaln(np.array([a, c, total]))
    size = (
        (a + 1) * np.abs(np.log(beta[:, 0]))
        + (c + 1) * np.abs(np.log(gamma[:, -1]))
        + np.where(shifted, x * gamma[:, 0], x * beta[:, -1])
        + np.abs(logs).sum()
        + panels / (high - low)
    )
    result = top + np.log(value) - (logs[0] + logs[1] - logs[2]) + _EPS * (64 + 8 * size)
    return shift + result + 4 * _EPS * (shift + np.abs(result))


def _log_share(u: Array) -> Array:
    """Log of 1 - e^{-u}, for u > 0."""
    return np.log(-np.expm1(-u))


def _edge(height: Callable[[Array], Array], middle: Array, stride: Array, floor: Array) -> Array:
    """A point beyond ``middle`` + ``stride`` at which the integrand is below e^``floor``."""
    edge = middle + stride
    while True:
        short = height(edge) > floor
        if not short.any():
            return edge
        edge = np.where(short, middle + 1.25 * (edge - middle), edge)


def _tail(log_height: Array, rate: Array) -> Array:
    """Bound of an integral from a point of that height on, where it falls at least at ``rate``."""
    return np.where(rate > 0, np.exp(log_height) / np.maximum(rate, 1e-300), np.inf)
