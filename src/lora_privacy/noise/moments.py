"""Exact moments of the injected noise, for every law of A.

All functions speak of ``N = G (AᵀA / (v r) - I)``: the projection is normalised by the variance
v of A's entries, so that E N = 0. Derivations are in ``docs/theory/noise-laws.md``, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.errors import UnsupportedLawError
from lora_privacy.laws import EntryLaw, LawName, entry_law
from lora_privacy.noise._rows import Array, finite

__all__ = [
    "WishartMoments",
    "expected_noise_energy",
    "noise_covariance",
    "noise_energy_variance",
    "noise_variance",
    "wishart_moments",
]


@dataclass(frozen=True, slots=True)
class _Structure:
    """Second moments of N = q(AᵀA/(vr) - I), of three kinds.

    ``E[N_i N'_j]`` is ``transverse ((q·q') δ_ij + q_j q'_i)`` plus ``diagonal q_i q'_i δ_ij`` plus
    ``trace q_i q'_j``;
    ``diagonal`` is what a kurtosis other than 3 adds; ``trace`` is what the fixed trace of a
    projection takes away.
    """

    transverse: float
    diagonal: float
    trace: float

    @property
    def along(self) -> float:
        """Variance of a diagonal entry of AᵀA / (v r)."""
        return 2.0 * self.transverse + self.diagonal + self.trace


@dataclass(frozen=True, slots=True, kw_only=True)
class WishartMoments:
    """Moments of ``M = AᵀA / (v r)``, of shape (in_features, in_features), dimensionless.

    E M = I under every law. Only for Gaussian A is r·M a Wishart matrix.

    Attributes:
        rank: r.
        in_features: m.
        var_diagonal: Var M_ii.
        var_offdiagonal: Var M_ij for i ≠ j; 0 for in_features 1, where there is no such entry.
        cov_diagonal: Cov(M_ii, M_jj) for i ≠ j; 0 for in_features 1.
        mean_square: c in E M² = c I.
        mean_trace_square: E tr M² = m c.
    """

    rank: int
    in_features: int
    var_diagonal: float
    var_offdiagonal: float
    cov_diagonal: float
    mean_square: float
    mean_trace_square: float


def wishart_moments(rank: int, law: EntryLaw | LawName, in_features: int) -> WishartMoments:
    """Moments of the normalised ``AᵀA`` under ``law``.

    Args:
        rank: r, at least 1.
        law: Law of A's entries, or its name.
        in_features: m, at least 1.

    Raises:
        ValueError: An argument is out of range, the law is unknown, or the orthonormal law is
            asked for a rank above in_features.

    >>> wishart_moments(8, "gaussian", 64).mean_square  # 1 + (m + 1)/r
    9.125
    """
    parts = _structure(law, rank, in_features)
    off = parts.transverse if in_features > 1 else 0.0
    square = 1.0 + parts.along + (in_features - 1) * off
    return WishartMoments(
        rank=rank,
        in_features=in_features,
        var_diagonal=parts.along,
        var_offdiagonal=off,
        cov_diagonal=parts.trace,
        mean_square=square,
        mean_trace_square=in_features * square,
    )


def noise_variance(row: npt.ArrayLike, law: EntryLaw | LawName, rank: int) -> Array:
    """Variance of every entry of the noise of a row, or of several rows at once.

    For i.i.d. entries of kurtosis k it is ``(‖q‖² - q_i² + q_i² (k - 1)) / rank``. An
    orthonormal A has dependent entries, and
    ``m(m-r)/(r(m+2)(m-1)) (‖q‖² - q_i²) + 2(m-r)/(r(m+2)) q_i²`` instead.

    Args:
        row: q, shape (..., in_features).
        law: Law of A's entries, or its name.
        rank: r, at least 1.

    Returns:
        Same shape as ``row``, in squared units of the gradient.

    Raises:
        ValueError: The law is unknown, or an argument is out of range.
        NonFiniteError: ``row`` holds NaN or infinity.
    """
    q = _rows(row)
    parts = _structure(law, rank, q.shape[-1])
    square = q * q
    rest = square.sum(axis=-1, keepdims=True) - square
    return parts.transverse * rest + parts.along * square


def noise_covariance(
    row: npt.ArrayLike, other_row: npt.ArrayLike, law: EntryLaw | LawName, rank: int
) -> Array:
    """Cross covariance ``E[N_i N'_j]`` of the noise of two rows q and q' under the same A.

    Args:
        row: q, shape (in_features,).
        other_row: q', same shape; pass ``row`` twice for the covariance of one row.
        law: Law of A's entries, or its name.
        rank: r, at least 1.

    Returns:
        Shape (in_features, in_features), in squared units of the gradient; i is the first axis.

    Raises:
        ValueError: The law is unknown, or the rows are not vectors of one length.
        NonFiniteError: A row holds NaN or infinity.
    """
    q, other = _rows(row), _rows(other_row)
    if q.ndim != 1 or q.shape != other.shape:
        raise ValueError(f"both rows must be vectors of one length, got {q.shape}, {other.shape}.")
    parts = _structure(law, rank, q.size)
    result = parts.transverse * np.outer(other, q) + parts.trace * np.outer(q, other)
    result[np.diag_indices(q.size)] += parts.transverse * (q @ other) + parts.diagonal * q * other
    return result


def expected_noise_energy(gradient: npt.ArrayLike, law: EntryLaw | LawName, rank: int) -> float:
    """E ‖N‖² of the noise of a whole gradient: the sum of all its entries' variances.

    ``‖G‖² (m + k - 2)/r`` for i.i.d. entries of kurtosis k, ``‖G‖² (m - r)/r`` for an
    orthonormal A: it depends on G through its norm alone.

    Args:
        gradient: G, shape (out_features, in_features), or one row.
        law: Law of A's entries, or its name.
        rank: r, at least 1.

    Raises:
        ValueError: The law is unknown, or an argument is out of range.
        NonFiniteError: ``gradient`` holds NaN or infinity.
    """
    g = _rows(gradient)
    parts = _structure(law, rank, g.shape[-1])
    return float(np.vdot(g, g)) * ((g.shape[-1] - 1) * parts.transverse + parts.along)


def noise_energy_variance(gradient: npt.ArrayLike, law: EntryLaw | LawName, rank: int) -> float:
    """Var ‖N‖² over draws of A, for a Gaussian or orthonormal A.

    Both laws are invariant under rotations, so it depends on G through ‖G‖ and ‖GᵀG‖ alone. Its
    root over :func:`expected_noise_energy` is the relative spread of one draw of A.

    Args:
        gradient: G, shape (out_features, in_features), or one row.
        law: Law of A's entries, or its name.
        rank: r, at least 1.

    Raises:
        UnsupportedLawError: The law is not invariant: eighth moments of A and every alignment of
            G with the axes would enter. Draw A several times instead.
        ValueError: The law is unknown, or an argument is out of range.
        NonFiniteError: ``gradient`` holds NaN or infinity.
    """
    g = np.atleast_2d(_rows(gradient)).reshape(-1, np.shape(gradient)[-1])
    m = g.shape[1]
    parts = _structure(law, rank, m)
    name = law if isinstance(law, str) else law.name
    if name == "gaussian":
        one, two = _gaussian_energy(rank, m)
    elif name == "orthonormal":
        # With P a projection, (mP/r - I)² = (m²/r² - 2m/r) P + I, and M = mP/r.
        factor = (m / rank - 2.0) ** 2
        one, two = factor * parts.along, factor * parts.trace
    else:
        raise UnsupportedLawError(
            f"the variance of ‖N‖² is known here for a gaussian or orthonormal A, got {name!r}; "
            "draw A several times and take the sample variance."
        )
    gram = g @ g.T if g.shape[0] <= m else g.T @ g
    total, concentrated = float(np.trace(gram)), float(np.vdot(gram, gram))
    return one * concentrated + two * (total * total - concentrated)


def _gaussian_energy(rank: int, m: int) -> tuple[float, float]:
    """Var D_11 and Cov(D_11, D_22) of D = (M - I)²; their sum over i, j is Var tr D."""
    r, n = float(rank), float(m * rank)
    # D_11 = (S-1)² + S C/r with S ~ χ²_r/r and C ~ χ²_{m-1} independent (row law).
    mean = (m + 1) / r
    one = (
        (12 / r**2 + 48 / r**3)
        + 2 * (m - 1) / r * (2 / r + 8 / r**2)
        + (1 + 2 / r) * (m * m - 1) / r**2
        - mean * mean
    )
    if m == 1:
        return one, 0.0
    square = 4 * n * (2 * m * m + 2 * r * r + 5 * n + 5 * m + 5 * r + 5)  # Var tr W²
    cross = 4 * n * (m + r + 1)  # Cov(tr W², tr W)
    trace = square / r**4 - 4 * cross / r**3 + 8 * n / r**2
    return one, (trace - m * one) / (m * (m - 1))


def _structure(law: EntryLaw | LawName, rank: int, in_features: int) -> _Structure:
    rank = _validate.integer("rank", rank, 1)
    m = _validate.integer("in_features", in_features, 1)
    name = law if isinstance(law, str) else law.name
    if name == "unknown":
        raise ValueError(
            "the law of A is unknown, so the moments of its noise are too. Initialise A with one "
            "of the named laws, or pass the EntryLaw that it was drawn from."
        )
    if name == "orthonormal" or isinstance(law, str):
        law = entry_law(name, rank, m)  # checks the name, and rank <= in_features
    if name == "orthonormal":
        if m == 1:
            return _Structure(0.0, 0.0, 0.0)
        along = 2.0 * (m - rank) / (rank * (m + 2.0))
        transverse = m * (m - rank) / (rank * (m + 2.0) * (m - 1.0))
        return _Structure(transverse, 0.0, along - 2.0 * transverse)
    _validate.between("kurtosis", law.kurtosis, 1.0, np.inf, "Every law has at least 1.")
    return _Structure(1.0 / rank, (law.kurtosis - 3.0) / rank, 0.0)


def _rows(row: npt.ArrayLike) -> Array:
    q = np.asarray(row, np.float64)
    if q.ndim == 0 or q.size == 0:
        raise ValueError(f"a row must be a non-empty vector, got shape {q.shape}.")
    return finite("the gradient", q)
