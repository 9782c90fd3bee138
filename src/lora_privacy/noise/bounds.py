"""Proved bounds on the distance of one entry of the noise to a Gaussian, and the published ratio.

The exact distances are in ``gaussianity.py``; a bound shows the rate, and why. Proofs, with the
step where each hypothesis is used: ``docs/theory/distance-to-gaussian.md``, sections 2 and 3.
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
from lora_privacy.noise._rows import Array, nonzero_row
from lora_privacy.noise._stirling import chi_square_entropy, digamma_remainder
from lora_privacy.noise.distance import Distance, round_up
from lora_privacy.noise.entry import EntryNoise
from lora_privacy.noise.gaussianity import (
    Variance,
    describe,
    describe_gaussian,
    require_entry_noise,
)

__all__ = ["berry_esseen_bound", "lyapunov_ratio", "tv_bound"]


def _phi(x: float) -> float:
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


# E|He₃(Z)| and E|He₄(Z)|, Z ~ N(0, 1): Heₙ φ has the primitive −Heₙ₋₁ φ, and the roots are
# ±√3 and ±√(3 ± √6).
_HE3 = 8.0 * _phi(math.sqrt(3.0)) + 2.0 * _phi(0.0)
_ROOTS4 = (math.sqrt(3.0 - math.sqrt(6.0)), math.sqrt(3.0 + math.sqrt(6.0)))
_HE4 = 4.0 * math.sqrt(6.0) * sum(root * _phi(root) for root in _ROOTS4)

# Constant of the Berry–Esseen inequality for i.i.d. terms, Shevtsova 2013.
_BERRY_ESSEEN = 0.469


def tv_bound(law: EntryNoise, variance: Variance = "exact") -> Distance:
    """Proved upper bound on the total variation of :func:`~.gaussianity.tv_to_gaussian`.

    It holds at every rank r and for every number of inputs, and is the least of three. With
    ρ = q_i/‖q‖, a = √(1 − ρ²), σ = √(1 + ρ²), and for the exact variance:

    * mixture: ``E|He₄|/8 (ln(r/2) − ψ(r/2)) + E|He₃| |ρ|/√r (1/(2a) + (2/3)(1/a − 1/σ))``, which
      is sharp to first order in 1/r at ρ = 0, and in ρ/√r for small ρ;
    * entropy: ``√(D/2)``, D the relative entropy of χ²_r to its Gaussian; about .577/√r for all ρ;
    * 1.

    The published variance adds TV(N(0, 1 + ρ²), N(0, 1)), which does not vanish with r, or to D
    its relative entropy, whichever is less.

    Args:
        law: Entry of the noise under a Gaussian A.
        variance: Of the Gaussian, as in :func:`~.gaussianity.tv_to_gaussian`.

    Raises:
        UnsupportedLawError: The law is not an ``EntryNoise``.
        ValueError: ``variance`` is not one of the two.

    References:
        ``docs/theory/distance-to-gaussian.md``, section 2; the entropy bound by the entropy power
        inequality in Lieb's form (Dembo, Cover & Thomas 1991) and Pinsker's inequality.

    >>> round(tv_bound(EntryNoise(8)).value, 5)
    0.04557
    """
    law = require_entry_noise(law)
    _validate.choice("variance", variance, ("exact", "published"))
    rho = abs(law.rho)
    # What the published variance adds to a distance, and to a relative entropy.
    distance = _between_gaussians(rho) if variance == "published" else 0.0
    deficit = 0.5 * (rho * rho - math.log1p(rho * rho)) if variance == "published" else 0.0
    mixture = _mixture_bound(law.rank, rho) + distance
    entropy = min(_pinsker(law.rank) + distance, _pinsker(law.rank, deficit))
    value = min(1.0, round_up(min(mixture, entropy)))
    if mixture <= entropy:
        method, keys = "Taylor expansion of a Gaussian mixture", ("gaunt-vg-2014",)
    else:
        method, keys = "entropy power and Pinsker inequalities", ("dembo-inequalities-1991",)
    return Distance(
        value=value,
        metric="total variation",
        kind="upper bound",
        error=0.0,
        law=describe(law),
        reference=describe_gaussian(law, variance),
        method=method,
        references=("p1-implicit-2024", *keys),
    )


def berry_esseen_bound(law: EntryNoise) -> Distance:
    """Proved upper bound on the Kolmogorov distance to the Gaussian of the law's own variance.

    Only the r terms over the rank index are independent: the entry is ``(‖q‖/r) Σ_k ξ_k`` with
    ``ξ = ρ(z² − 1) + √(1 − ρ²) z g``, so the bound is ``.469 β₃/√r``, β₃ = E|ξ|³/Var(ξ)^{3/2}.
    It falls with r alone; the number of inputs does not enter.

    Args:
        law: Entry of the noise under a Gaussian A.

    Raises:
        UnsupportedLawError: The law is not an ``EntryNoise``.

    References:
        Shevtsova 2013 for the constant; ``docs/theory/distance-to-gaussian.md``, section 3.

    >>> round(berry_esseen_bound(EntryNoise(64)).value, 5)  # .469 · (8/π) / 8
    0.14929
    """
    law = require_entry_noise(law)
    value = _BERRY_ESSEEN * _third_moment_ratio(abs(law.rho)) / math.sqrt(law.rank)
    return Distance(
        value=min(1.0, round_up(value)),
        metric="Kolmogorov",
        kind="upper bound",
        error=0.0,
        law=describe(law),
        reference=describe_gaussian(law, "exact"),
        method="Berry–Esseen inequality over the rank index, constant .469",
        references=("shevtsova-2013",),
    )


def lyapunov_ratio(
    row: npt.ArrayLike,
    rank: int,
    split: Literal["products", "columns"] = "products",
    *,
    index: int | None = None,
) -> float:
    """Lyapunov ratio of an entry of the noise: **it rests on a false independence, no bound**.

    ``L₃ = Σ E|ξ_k|³ / (Σ Var ξ_k)^{3/2}`` for the summands of an entry i of the noise. They share
    column i of A, so they are uncorrelated and not independent, and no constant makes
    ``C · L₃`` a bound on the distance to a Gaussian: the ratio falls with the number of inputs,
    the distance does not (``docs/theory/distance-to-gaussian.md``, section 6). It is here to
    compare published numbers; use :func:`tv_bound` for a bound.

    The denominator is the variance of the very summands. The published shape, as our notes have
    it, divides by the variance ‖q‖²/r of the whole entry instead: with an ``index``, multiply by
    (1 − q_i²/‖q‖²)^{3/2} to get it. The two agree at q_i = 0.

    Args:
        row: q, shape (m,), in any unit.
        rank: r, at least 1.
        split: Summands: ``"products"`` takes A_ki A_kj q_j for every k and j, so that L₃ is
            ``(8/π) r^{-1/2} Σ|q_j|³/(Σq_j²)^{3/2}``; ``"columns"`` takes (AᵀA)_ij q_j for every j,
            so that it is ``2√(2/π) E[S^{3/2}] Σ|q_j|³/(Σq_j²)^{3/2}`` with S ~ χ²_r/r, and does
            not fall with r.
        index: Entry i, left out of both sums: its own term, q_i times a square, has another law.
            None sums over all j, as for an entry with q_i = 0 that the row does not list.

    Raises:
        NonFiniteError: The row holds NaN or infinity.
        ValueError: The row is not a vector or all zero, ``index`` names its only non-zero entry,
            or another argument is out of range.

    References:
        P1, arXiv:2409.17538, versions 2–3, Lemma 4.2 as numbered there, from our notes.

    >>> round(lyapunov_ratio([3.0, 1.0, 1.0, 1.0, 1.0], 8, index=0), 4)  # (8/π)/√8 · 4/4^{3/2}
    0.4502
    """
    rank = _validate.integer("rank", rank, 1)
    _validate.choice("split", split, ("products", "columns"))
    size = np.abs(nonzero_row(row))
    if index is not None:
        index = _validate.integer("index", index, 0)
        _validate.between("index", index, 0, size.size - 1)
        size[index] = 0.0
        if size.max() == 0.0:
            raise ValueError(
                f"row must have a non-zero entry besides index {index}, got none: no summand is "
                "left and the ratio is 0/0. This entry of the noise is q_i (S - 1)."
            )
    size = size / size.max()  # the ratio has no unit; cubes must not underflow
    size = size / np.linalg.norm(size)
    if split == "products":
        factor = 8.0 / math.pi / math.sqrt(rank)
    else:
        k = rank / 2
        factor = 2.0 * math.sqrt(2.0 / math.pi) * float(special.poch(k, 1.5)) / k**1.5
    return factor * float((size**3).sum())


def _mixture_bound(rank: int, rho: float) -> float:
    """Section 2.2: variance by Taylor expansion, mean by a Lévy interpolation; inf at ρ = 1."""
    k = rank / 2
    # E[S − 1 − ln S] = ln k − ψ(k) for S ~ χ²_r/r.
    spread = _HE4 / 8.0 * (0.5 / k + digamma_remainder(k))
    if rho == 0.0:
        return spread
    a = math.sqrt((1.0 - rho) * (1.0 + rho))
    if a == 0.0:
        return math.inf
    mean = 0.5 / a + 2.0 / 3.0 * (1.0 / a - 1.0 / math.sqrt(1.0 + rho * rho))
    return spread + _HE3 * rho / math.sqrt(rank) * mean


def _pinsker(rank: int, deficit: float = 0.0) -> float:
    """Section 2.3: √(D/2), D the relative entropy of χ²_r to its own Gaussian plus ``deficit``."""
    return math.sqrt((chi_square_entropy(rank) + deficit) / 2.0)


def _between_gaussians(rho: float) -> float:
    """TV(N(0, 1 + ρ²), N(0, 1)): the densities cross at ±x, x² = (1 + 1/ρ²) ln(1 + ρ²)."""
    square = rho * rho
    if square < 1e-16:
        return square / 4.0  # E|He₂|/4 = .242 times ln(1 + ρ²) is an upper bound
    x = math.sqrt((1.0 + square) / square * math.log1p(square))
    inner = x / math.sqrt(1.0 + square)
    return math.erf(x / math.sqrt(2.0)) - math.erf(inner / math.sqrt(2.0))


def _third_moment_ratio(rho: float) -> float:
    """β₃ = E|ξ|³/(1 + ρ²)^{3/2} of ξ = ρ(z² − 1) + √(1 − ρ²) z g; 8/π at ρ = 0.

    Given z, ξ is Gaussian, so one integral over z remains. It is cut at 20, where less than
    1e-80 is left, and at 1, where the integrand has a corner as ρ → 1.
    """
    a = math.sqrt((1.0 - rho) * (1.0 + rho))
    rule: tuple[Array, Array] = special.roots_legendre(40)
    # Panels that crowd at z = 1, on whose two sides the mean has opposite signs.
    crowd = 2.0 ** -np.arange(0.0, 40.0)
    edges = np.unique(np.concatenate([1.0 - crowd, 1.0 + crowd, np.arange(3.0, 21.0)]))
    half = np.diff(edges)[:, None] / 2
    z = edges[:-1, None] + half * (1.0 + rule[0])
    mean, std = rho * np.abs((z - 1.0) * (z + 1.0)), a * z
    with np.errstate(divide="ignore"):
        t = mean / std
    phi = np.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
    cube = mean * (mean**2 + 3.0 * std**2) * special.erf(t / math.sqrt(2.0))
    cube += 2.0 * std * (mean**2 + 2.0 * std**2) * phi
    density = 2.0 * np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
    return float(np.sum(half * rule[1] * cube * density)) / (1.0 + rho * rho) ** 1.5
