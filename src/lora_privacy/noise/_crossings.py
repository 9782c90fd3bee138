"""Where the density of one entry of the noise crosses that of a Gaussian, for many ρ at once.

The log ratio h = ln(p/φ) is +∞ at both ends, and convex outside an interval around x = −ρ and
concave inside it, so it has at most four zeros (docs/theory/distance-to-gaussian.md, section 1).
With equal variances p − φ is orthogonal to 1, x and x², so it has at least three: exactly four.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

import math

import numpy as np
from scipy import special

from lora_privacy.errors import ConvergenceError
from lora_privacy.noise._density import chi_square_logpdf, entry_logpdf
from lora_privacy.noise._quadrature import entry_tails
from lora_privacy.noise._rows import Array

__all__ = ["cdf_gaps", "log_density", "log_ratio", "signed_crossings"]

# In standard deviations of the Gaussian: beyond 12 the Gaussian has mass 4e-33. The law may have
# more, but its density is the larger one there, which the sign at the end says.
_GRID = np.arange(-96, 97) / 8
# At rank 1 and 2 the density has a spike or a kink at x = −ρ, as narrow as 1 − |ρ|.
_NEAR = np.outer([-1.0, 1.0], 10.0 ** -np.arange(0.0, 14.0, 0.5)).ravel()
# P − Φ is stationary at a crossing, so that a miss by 1e-8 standard deviations costs 1e-16 only.
_BISECTIONS = 26
_GOLDEN_STEPS = 30
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def log_density(rank: int, rho: Array, x: Array) -> Array:
    """Log density of an entry at ``x``, for ‖q‖ = 1 and 0 <= ρ <= 1; at ρ = 1 that of S − 1."""
    rho_, x_ = np.broadcast_arrays(rho, x)
    result = np.empty(x_.shape)
    one = rho_ == 1.0
    if one.any():
        result[one] = chi_square_logpdf(rank, x_[one])
    if not one.all():
        result[~one] = entry_logpdf(rank, rho_[~one], x_[~one])
    return result


def log_ratio(rank: int, rho: Array, std: Array, x: Array) -> Array:
    """The log ratio ln(p/φ) of the entry's density to that of N(0, std²); all broadcast."""
    z = x / std
    return log_density(rank, rho, x) + 0.5 * z * z + np.log(std * math.sqrt(2.0 * math.pi))


def signed_crossings(rank: int, rho: Array, std: Array, *, matched: bool) -> Array:
    """Points where p − φ changes sign, shape (len(rho), 4); a row with fewer repeats its last.

    Args:
        rank: r.
        rho: ρ, shape (n,), in [0, 1].
        std: Standard deviation of the Gaussian, shape (n,).
        matched: Whether it is the law's own, so that there must be four changes.

    Raises:
        ConvergenceError: The number of changes contradicts the count that is proved.
    """
    rho, std = rho[:, None], std[:, None]
    x = np.broadcast_to(_GRID * std, (rho.size, _GRID.size))
    if rank <= 2:
        x = np.concatenate([x, _NEAR * std - rho], axis=1)
    x = np.sort(x, axis=1)
    h = log_ratio(rank, rho, std, x)
    x, h = _sharpen(rank, rho, std, x, h)
    positive = h >= 0
    row, cell = np.nonzero(positive[:, 1:] != positive[:, :-1])
    count = np.bincount(row, minlength=rho.size)
    closed = positive[:, 0] & positive[:, -1]  # no change lies beyond the grid
    possible = (count == 4) if matched else (count == 2) | (count == 4)
    wrong = ~np.where(closed, possible, (count >= 1) & (count <= 3))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ConvergenceError(
            f"the density at rank={rank}, ρ={float(rho[i, 0]):.17g} must cross its Gaussian 2 or "
            f"4 times (4 at equal variance), found {int(count[i])}; please report this law."
        )
    low, high = x[row, cell], x[row, cell + 1]
    sign = positive[row, cell]
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        same = (log_ratio(rank, rho[row, 0], std[row, 0], middle) >= 0) == sign
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    first = np.cumsum(count) - count
    pick = first[:, None] + np.minimum(np.arange(4), count[:, None] - 1)
    return ((low + high) / 2)[pick]


def cdf_gaps(rank: int, rho: Array, std: Array, x: Array) -> Array:
    """P(law <= x) − P(Gaussian <= x), for ``x`` of shape (n, k) and ρ, std of shape (n,)."""
    rho_ = np.broadcast_to(rho[:, None], x.shape)
    cdf = np.empty(x.shape)
    one = rho_ == 1.0
    if one.any():
        cdf[one] = special.chdtr(rank, rank * np.maximum(x[one] + 1.0, 0.0))
    if not one.all():
        cdf[~one] = entry_tails(rank, rho_[~one], x[~one])[0]
    return cdf - special.ndtr(x / std[:, None])


def _sharpen(rank: int, rho: Array, std: Array, x: Array, h: Array) -> tuple[Array, Array]:
    """Move grid points at positive minima and negative maxima of h to the extremum itself.

    A pair of crossings between two grid points cannot hide then.
    """
    inner, left, right = h[:, 1:-1], h[:, :-2], h[:, 2:]
    low = (inner > 0) & (inner <= left) & (inner <= right)
    high = (inner < 0) & (inner >= left) & (inner >= right) & np.isfinite(inner)
    row, cell = np.nonzero(low | high)
    if not row.size:
        return x, h
    cell = cell + 1
    flip = np.where(h[row, cell] > 0, 1.0, -1.0)
    a, b = x[row, cell - 1], x[row, cell + 1]

    def value(at: Array) -> Array:
        return flip * log_ratio(rank, rho[row, 0], std[row, 0], at)

    for _ in range(_GOLDEN_STEPS):
        c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
        keep_left = value(c) < value(d)
        a, b = np.where(keep_left, a, c), np.where(keep_left, d, b)
    x, h = x.copy(), h.copy()
    x[row, cell] = (a + b) / 2
    h[row, cell] = flip * value((a + b) / 2)
    return x, h
