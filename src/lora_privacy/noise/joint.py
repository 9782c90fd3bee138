"""Distance of the injected noise of a whole row, and of a whole gradient, to Gaussian noise.

One entry of the noise is nearly Gaussian, a row is not: its length along q fixes the scale of
all the rest, and the more inputs there are the better that scale can be read off.
Theory and proofs: ``docs/theory/distance-to-gaussian.md``, sections 4 and 5.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special

from lora_privacy import _validate
from lora_privacy.errors import ConvergenceError
from lora_privacy.noise._rows import Array, finite
from lora_privacy.noise._stirling import log_gamma_remainder
from lora_privacy.noise.distance import Distance

__all__ = ["joint_tv_to_gaussian", "matrix_tv_to_gaussian"]

Covariance = Literal["exact", "published"]

# χ² mass of S left out on each side; the integrand is at most the density of S.
_TAIL_MASS = 1e-17
# Gauss–Legendre nodes a panel; the coarse rule only measures the error of the fine one.
_FINE, _COARSE = 20, 13
# Promised absolute accuracy. A quadrature that misses it raises.
_TOLERANCE = 1e-8
# Rounding of log densities and χ² functions, in absolute terms.
_ROUNDING = 1e-12


def joint_tv_to_gaussian(
    rank: int, in_features: int, covariance: Covariance = "exact"
) -> Distance:
    """Total variation between one row ``q (AᵀA − I)`` of the noise and a Gaussian row.

    It depends on q only through q ≠ 0, and grows with ``in_features``.

    Args:
        rank: Rows r of the Gaussian A, at least 1.
        in_features: Entries m of the row, at least 1.
        covariance: ``"exact"``: the Gaussian has the noise's own covariance
            ``(‖q‖² I + qᵀq)/r``. ``"published"``: i.i.d. entries of variance ``‖q‖²/r``.

    Returns:
        The distance, with an estimate of its absolute error (at most 1e-8).

    Raises:
        TypeError: A size is not an integer.
        ValueError: An argument is out of range.
        ConvergenceError: The quadrature missed 1e-8.

    References:
        P1 sets the question; the reduction to two dimensions is derived in
        ``docs/theory/distance-to-gaussian.md``, section 4.

    >>> round(joint_tv_to_gaussian(8, 64, covariance="published").value, 5)
    0.58412
    """
    rank = _validate.integer("rank", rank, 1)
    in_features = _validate.integer("in_features", in_features, 1)
    _validate.choice("covariance", covariance, ("exact", "published"))
    value, error = _joint_tv(rank, in_features - 1, 2.0 if covariance == "exact" else 1.0)
    along = "(‖q‖²I + qᵀq)" if covariance == "exact" else "‖q‖²I"
    return Distance(
        value=value,
        metric="total variation",
        kind="exact",
        error=error,
        law=f"the noise of one row, q(AᵀA − I), rank {rank}, {in_features} inputs, Gaussian A",
        reference=f"N(0, {along}/{rank})",
        method="one-dimensional quadrature over S with χ² distribution functions",
        references=("p1-implicit-2024", "muirhead-1982"),
    )


def matrix_tv_to_gaussian(
    gradient: npt.ArrayLike, rank: int, covariance: Covariance = "exact"
) -> Distance:
    """Total variation between the noise ``G (AᵀA − I)`` and Gaussian noise with independent rows.

    Row i of the reference is the Gaussian of :func:`joint_tv_to_gaussian` for row i of G, and the
    rows are independent, as an implicit-privacy reading assumes. With two non-zero rows the
    distance is exactly 1 at every rank, parallel rows included: ``G Nᵀ = G AᵀA Gᵀ − G Gᵀ`` is
    symmetric surely for the noise N, and with probability 0 for the reference. Rows of zeros
    carry no noise in either law and change nothing.

    Args:
        gradient: G, shape (n, m), n outputs and m inputs.
        rank: Rows of the Gaussian A, at least 1.
        covariance: Of each row, as in :func:`joint_tv_to_gaussian`.

    Raises:
        NonFiniteError: The gradient holds NaN or infinity.
        ValueError: The gradient is not a matrix, or all zero: there is no noise to compare then.

    >>> matrix_tv_to_gaussian([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]], rank=8).value
    1.0
    """
    g = np.asarray(gradient, dtype=np.float64)
    rank = _validate.integer("rank", rank, 1)
    _validate.choice("covariance", covariance, ("exact", "published"))
    if g.ndim != 2 or g.size == 0:
        raise ValueError(
            f"gradient must be a matrix of shape (outputs, inputs), got shape {g.shape}. "
            "Pass one layer's G, or one row as G[i:i+1]."
        )
    rows = int(np.count_nonzero(finite("gradient", g).any(axis=1)))
    if rows == 0:
        raise ValueError(
            "gradient must have a non-zero row, got all zeros: the noise is 0 surely and there "
            "is nothing to compare. Skip this layer."
        )
    if rows == 1:
        return joint_tv_to_gaussian(rank, g.shape[1], covariance)
    along = "(‖q_i‖²I + q_iᵀq_i)" if covariance == "exact" else "‖q_i‖²I"
    return Distance(
        value=1.0,
        metric="total variation",
        kind="exact",
        error=0.0,
        law=f"the noise G(AᵀA − I), rank {rank}, {rows} non-zero rows of {g.shape[1]} inputs",
        reference=f"independent rows N(0, {along}/{rank})",
        method="G Nᵀ is symmetric surely, and with probability 0 under the reference",
        references=("p1-implicit-2024", "p2-projections-2026"),
    )


def _joint_tv(rank: int, perpendicular: int, along: float) -> tuple[float, float]:
    """Distance of (S, w) and its error; ``perpendicular`` is m − 1, ``along`` is r·Var of N(1, ·).

    P draws S ~ χ²_r/r and w ~ S χ²_{m−1}; Q draws S ~ N(1, along/r) and w ~ χ²_{m−1}. Given s the
    log density ratio is linear in w, so ∫(p − q)₊ dw is a difference of χ² functions.
    """
    edges = _panels(rank, perpendicular, along)
    fine = _integrate(edges, _FINE, rank, perpendicular, along)
    error = abs(fine - _integrate(edges, _COARSE, rank, perpendicular, along)) + _ROUNDING
    if not error <= _TOLERANCE:
        raise ConvergenceError(
            f"the joint distance at rank {rank} with {perpendicular + 1} inputs must be accurate "
            f"to {_TOLERANCE:g}, got an error of {error:.1e}; please report these sizes."
        )
    return min(fine, 1.0), error


def _integrate(edges: Array, nodes: int, rank: int, perpendicular: int, along: float) -> float:
    rule: tuple[Array, Array] = special.roots_legendre(nodes)
    x, weight = rule
    half = np.diff(edges)[:, None] / 2.0
    y = edges[:-1, None] + half * (1.0 + x)
    return float(np.sum(half * weight * _excess(y, rank, perpendicular, along)))


def _excess(y: Array, rank: int, perpendicular: int, along: float) -> Array:
    """∫(p − q)₊ dw at S = exp(y), times dS/dy."""
    s = np.exp(y)
    log_p, log_ratio = _log_density(y, rank, perpendicular, along)
    p = np.exp(log_p + y)
    # q shares p's rounding this way, so their difference keeps its accuracy where they are close.
    q = np.exp(log_p + y - (log_ratio + perpendicular / 2.0 * y))
    if perpendicular == 0:
        return np.maximum(p - q, 0.0)
    with np.errstate(divide="ignore", over="ignore"):
        # p > q on w < threshold where s < 1, and on w > threshold where s > 1.
        threshold = np.maximum(2.0 * log_ratio / np.expm1(-y), 0.0)
    below = p * special.chdtr(perpendicular, threshold / s) - q * special.chdtr(
        perpendicular, threshold
    )
    above = p * special.chdtrc(perpendicular, threshold / s) - q * special.chdtrc(
        perpendicular, threshold
    )
    return np.maximum(np.where(y < 0.0, below, above), 0.0)


def _log_density(y: Array, rank: int, perpendicular: int, along: float) -> tuple[Array, Array]:
    """Log density of S at exp(y), and log p/q at w = 0.

    Written about s = 1 so that the terms of size rank cancel before they are formed.
    """
    k = rank / 2.0
    gap = np.expm1(y)
    log_p = 0.5 * np.log(k / (2.0 * np.pi)) - log_gamma_remainder(k) + k * (y - gap) - y
    with np.errstate(over="ignore"):
        log_q = 0.5 * np.log(k / (np.pi * along)) - k * gap * gap / along
    return log_p, log_p - log_q - perpendicular / 2.0 * y


def _panels(rank: int, perpendicular: int, along: float) -> Array:
    """Edges in y = ln S: geometric about S = 1, and at the kinks, where the threshold is 0."""
    # Quantiles of χ²; scipy.stats would cost a second of imports for these two.
    low = math.log(2.0 * float(special.gammaincinv(rank / 2.0, _TAIL_MASS)) / rank)
    high = math.log(2.0 * float(special.gammainccinv(rank / 2.0, _TAIL_MASS)) / rank)
    # The χ² functions turn over within |y| ~ m^-1/2, the density of S within r^-1/2; with the
    # exact covariance the threshold moves as 1/(r y), hence the small innermost panel.
    steps = 2.0 ** np.arange(-16.0, 40.0, 0.5) / math.sqrt(max(rank, perpendicular))
    near = steps[steps < 0.5]
    far = np.arange(float(near[-1]) + 0.5, max(-low, high) + 0.5, 0.5)
    edges = np.unique(np.clip(np.concatenate([-far, -near, [0.0], near, far]), low, high))
    return np.sort(np.concatenate([edges, _kinks(edges, rank, perpendicular, along)]))


def _kinks(edges: Array, rank: int, perpendicular: int, along: float) -> Array:
    """Roots of the log ratio at w = 0, each with edges that crowd towards it from both sides.

    There the χ² functions leave 0 as a power (m − 1)/2, a root for m = 2.
    """

    def ratio(y: Array) -> Array:
        return _log_density(y, rank, perpendicular, along)[1]

    sign = np.sign(ratio(edges))
    turn = np.flatnonzero(sign[1:] != sign[:-1])
    low, high = edges[turn], edges[turn + 1]
    for _ in range(60):
        middle = (low + high) / 2.0
        same = np.sign(ratio(middle)) == sign[turn]
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    root = (low + high)[:, None] / 2.0
    ends = np.stack([edges[turn], edges[turn + 1]], axis=1)
    crowd = 6.0 ** -np.arange(1.0, 11.0)
    near = root[:, :, None] + (ends - root)[:, :, None] * crowd
    return np.concatenate([root.ravel(), near.ravel()])
