"""Log densities: one entry of the noise, by Bessel K, and the scale S - 1 of a row."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy.noise._rows import Array
from lora_privacy.noise._stirling import log_gamma_remainder, log_gamma_series

__all__ = ["chi_square_logpdf", "entry_logpdf"]

# From here on the uniform expansion is exact to rounding: its first neglected term is 2e-16.
_DEBYE_ORDER = 30.0
_DEBYE_TERMS = 10
# Beyond it kve of AMOS loses all digits, while two terms of the expansion of ln K have them all:
# what follows is (4ν² - 1)/(16z²) < 2e-14.
_LARGE_ARGUMENT = 1e8
# (u - ln(1+u))/u² by rising powers of u; below |u| = 1e-2 what is left out is 2e-15 of it.
_LOG_SERIES = (-1.0) ** np.arange(7) / np.arange(2, 9)


def entry_logpdf(rank: npt.ArrayLike, rho: npt.ArrayLike, x: npt.ArrayLike) -> Array:
    """Log density of N = ((1+ρ)X - (1-ρ)Y)/(2r) - ρ at ``x``; X, Y ~ χ²_r independent.

    With t = r(x + ρ) and ν = (r-1)/2 the density of t is
    ``|t/2|^ν exp(ρt/(1-ρ²)) K_ν(|t|/(1-ρ²)) / (√(π(1-ρ²)) Γ(r/2))``.

    Args:
        rank: r, at least 1; broadcast.
        rho: ρ, strictly between -1 and 1; broadcast.
        x: Where, finite; broadcast. At rank 1 the density is infinite at x = -ρ.

    Returns:
        The log density, of the broadcast shape.

    References:
        R. E. Gaunt, "Variance-Gamma approximation via Stein's method", (2.1); DLMF 10.41.4 for
        the uniform expansion; derivation in docs/theory/noise-laws.md.
    """
    r, rho_, x_ = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (rank, rho, x)))
    shape = x_.shape
    r, rho_, x_ = r.ravel(), rho_.ravel(), x_.ravel()
    sign = np.copysign(1.0, rho_)  # mirrored, so that ρ >= 0 and 1 - ρ is the small scale
    rho_, x_ = sign * rho_, sign * x_
    nu, t = (r - 1) / 2, r * (x_ + rho_)
    high = nu >= _DEBYE_ORDER
    result = np.empty(x_.size)
    for mask, formula in ((high, _uniform), (~high, _bessel)):
        if mask.any():
            result[mask] = formula(nu[mask], rho_[mask], t[mask])
    return (result + np.log(r)).reshape(shape)


def chi_square_logpdf(rank: int, shift: npt.ArrayLike) -> Array:
    """Log density of S - 1 at ``shift``, S ~ χ²_rank / rank; -inf outside the support."""
    y = np.asarray(shift, np.float64)
    k = rank / 2
    # The parts of size k cancel in k ln k - k - ln Γ(k) before they are formed (DLMF 5.11.1).
    constant = 0.5 * math.log(k / (2.0 * math.pi)) - log_gamma_remainder(k)
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN up to -1, where it is not taken
        log_s = np.log1p(y)
        value = constant - k * (y - log_s) - log_s
    edge = {1: math.inf, 2: 0.0}.get(rank, -math.inf)
    return np.where(y > -1.0, value, np.where(y == -1.0, edge, -math.inf))


def _bessel(nu: Array, rho: Array, t: Array) -> Array:
    """Log density of t by scipy's scaled K, whose exponential is combined with the other one."""
    spread = (1.0 - rho) * (1.0 + rho)
    size = np.abs(t)
    z = size / spread
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        far = 0.5 * np.log(math.pi / (2.0 * z)) + (4.0 * nu * nu - 1.0) / (8.0 * z)
        log_k = np.where(z > _LARGE_ARGUMENT, far, np.log(special.kve(nu, z)))
        power = np.asarray(special.xlogy(nu, size / 2), np.float64) + log_k
        # K_ν overflows only where z^ν K_ν(z) has long reached its limit 2^(ν-1) Γ(ν); at ν = 0
        # and z = 0 both are infinite.
        limit = nu * np.log(spread) - math.log(2.0) + special.gammaln(nu)
    power = np.where(np.isposinf(log_k), limit, power)
    decay = size / (1.0 + np.copysign(rho, t))
    return power - decay - special.gammaln(nu + 0.5) - 0.5 * np.log(math.pi * spread)


def _uniform(nu: Array, rho: Array, t: Array) -> Array:
    """Log density of t for large ν: the terms of size ν combine into two that vanish at τ = ρ.

    Debye's exponent minus that of Stirling is ``-ν[(u - ln(1+u)) + d²/(1-τ²)]``, where
    τ = w/(1+√(1+w²)) with the sign of t, w = |t|/(ν(1-ρ²)), d = τ - ρ, 1 + u = (1-ρ²)/(1-τ²):
    no digit is lost to ν however large it is.
    """
    spread = (1.0 - rho) * (1.0 + rho)
    w = np.abs(t) / (nu * spread)
    root = np.hypot(1.0, w)
    tau = np.copysign(w / (1.0 + root), t)
    below_one = (1.0 + 1.0 / (root + w)) / (1.0 + root)  # 1 - |τ|
    rest = 2.0 / (1.0 + root)  # 1 - τ²
    # Where both are near 1 the difference of what they lack keeps its digits; where both are small
    # their own does.
    d = np.where(tau > 0.5, (1.0 - rho) - below_one, tau - rho)
    exponent = _log_excess(d * (tau + rho) / rest, spread / rest) + d * d / rest
    p = 1.0 / root
    factor = np.zeros_like(nu)
    for coefficients in reversed(_debye_polynomials()):  # Horner in -1/ν
        factor = np.polynomial.polynomial.polyval(p, coefficients) - factor / nu
    # ln Γ(ν+1/2) - ν ln ν + ν - ln √(2π), by Legendre's duplication formula
    stirling = log_gamma_series(2.0 * nu) - log_gamma_series(nu)
    prefactor = -0.5 * np.log(4.0 * math.pi * nu * spread / p)
    return prefactor + np.log(factor) - stirling - nu * exponent


def _log_excess(u: Array, ratio: Array) -> Array:
    """The excess u - ln(1+u), also where it is small; ``ratio`` is 1 + u, for u near -1."""
    log_ratio = np.where(np.abs(u) < 0.5, np.log1p(np.maximum(u, -0.5)), np.log(ratio))
    series = u * u * np.polynomial.polynomial.polyval(u, _LOG_SERIES)
    return np.where(np.abs(u) < 1e-2, series, u - log_ratio)


@functools.cache
def _debye_polynomials() -> tuple[Array, ...]:
    """U_0 … U_10 of DLMF 10.41.9, coefficients by rising powers."""
    poly = np.polynomial.Polynomial
    polynomials = [poly([1.0])]
    for _ in range(_DEBYE_TERMS):
        last = polynomials[-1]
        derivative = poly([0, 0, 0.5, 0, -0.5]) * last.deriv()
        polynomials.append(derivative + (poly([0.125, 0, -0.625]) * last).integ())
    return tuple(np.asarray(p.coef, np.float64) for p in polynomials)
