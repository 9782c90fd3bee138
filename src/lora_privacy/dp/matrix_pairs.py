"""Projected matrices, one given pair at a time. Never a guarantee.

``matrix_projection`` covers the release of ``AᵀA V`` and ``SketchRelease`` that of ``G Aᵀ`` alone;
A (rank, in_features) is i.i.d. N(0, 1/rank), drawn for this release only and kept secret. Proofs
are in docs/theory/projection-pairs.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.dp._checks import checked_orders
from lora_privacy.dp._conversion import least_epsilon
from lora_privacy.dp._vector_loss import VectorLoss
from lora_privacy.dp.pairwise import VectorProjection
from lora_privacy.dp.result import PairDivergence

__all__ = ["SketchRelease", "checked_matrices", "cosine_between", "matrix_projection"]

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_PAIR_REFERENCES = ("p2-projections-2026",)
_SKETCH_REFERENCES = ("gil-renyi-2013", "canonne-discrete-2020")
_ELSE_INFINITE = "in exact arithmetic another pair has ε = ∞"


def matrix_projection(
    v: npt.ArrayLike,
    v_prime: npt.ArrayLike,
    rank: int,
    delta: float,
    *,
    tolerance: float = 1e-12,
) -> PairDivergence:
    """Divergence of one pair of matrices under ``V -> AᵀA V``: infinite, but for two cases.

    The event that VᵀY is symmetric has probability 1 under V and 0 under V', at every rank. The
    exceptions are V' = cV, and V = v aᵀ with V' = v' aᵀ, which is the vector mechanism. For
    V' = cV, c > 0, the loss is (K/2) ln c + (Q/2)(1/c - 1) with Q ~ χ²_K,
    K = q(m + rank - q), q = min(rank of V, rank). A tiny singular value may be rounding or not:
    V counts as of full rank but for rows and columns that are exactly 0, which gives the larger ε.
    A pair within ``tolerance`` of an exception is treated as one, and ``pair`` says so. Vectors
    with an angle below 2e-8, which the cosine of a double does not tell, count as that far apart.

    Args:
        v: V, shape (m, n); for LoRA with a frozen A it is the transposed gradient.
        v_prime: V', same shape.
        rank: Rows of A, at least 1.
        delta: δ, in (0, 1).
        tolerance: Relative Frobenius distance up to which a pair counts as one of the exceptions,
            in [0, 1e-3]. Larger than the rounding of the inputs it under-reports; the event is
            one of exact arithmetic, and float32 matrices need about 1e-6.

    Raises:
        TypeError: ``rank`` is no integer.
        ValueError: A shape or a number is out of range, or a matrix holds NaN or infinity.

    References:
        arXiv:2601.21719, Theorem 2; sharp form in docs/theory/projection-pairs.md, section 3.
    """
    first, second = checked_matrices(("v", v), ("v_prime", v_prime))
    rank = _validate.integer("rank", rank, 1)
    _validate.inside("delta", delta, 0, 1)
    _validate.between("tolerance", tolerance, 0, 1e-3)
    m, n = first.shape
    shape = f"matrices of shape {m} × {n}, projected at rank {rank}"

    def found(
        forward: float, backward: float, method: str, pair: str, reason: str | None = None
    ) -> PairDivergence:
        return PairDivergence(
            epsilon=max(forward, backward),
            forward=forward,
            backward=backward,
            delta=float(delta),
            method=method,
            pair=pair,
            references=_PAIR_REFERENCES,
            reason=reason,
        )

    if np.array_equal(first, second):
        return found(0.0, 0.0, "equal inputs", shape)
    inf, event = math.inf, "distinguishing event"
    if not first.any() or not second.any():
        reason = "one matrix is zero and the other is not, and so are their projections"
        return found(inf, inf, event, shape, reason)
    copies = first, second
    # Squares of scaled entries neither overflow nor vanish.
    scales = float(np.abs(first).max()), float(np.abs(second).max())
    first, second = first / scales[0], second / scales[1]
    factor = float(np.vdot(first, second) / np.vdot(first, first))
    if np.linalg.norm(second - factor * first) <= tolerance * np.linalg.norm(second):
        if factor < 0:
            reason = (
                "V' = cV with c < 0: the product of V, transposed, with the output has a positive "
                "trace under one and a negative trace under the other"
            )
            return found(inf, inf, event, shape, reason)
        q = min(max(_most_rank(copy) for copy in copies), rank)
        ratio = factor * scales[1] / scales[0]
        both = [
            VectorLoss(q * (m + rank - q), 1, 1.0, c).epsilon(float(delta))
            for c in (ratio, 1 / ratio)
        ]
        pair = f"{shape}, the second {ratio!r} times the first"
        # A product with a power of two is not rounded; any other may be.
        if math.frexp(ratio)[0] == 0.5 and np.array_equal(copies[1], ratio * copies[0]):
            return found(both[0], both[1], "exact profile", pair)
        pair += f", treated as proportional within a relative tolerance of {tolerance:g}; "
        pair += _ELSE_INFINITE if n > 1 else "in exact arithmetic another pair has another ε"
        return found(both[0], both[1], "exact profile, of a pair treated as proportional", pair)
    right = first[np.argmax(np.einsum("ij,ij->i", first, first))]
    right = right / np.linalg.norm(right)  # a, if V = v aᵀ
    v1, v2 = first @ right, second @ right
    if all(
        np.linalg.norm(matrix - np.outer(vector, right)) <= tolerance * np.linalg.norm(matrix)
        for matrix, vector in ((first, v1), (second, v2))
    ):
        norms = float(np.linalg.norm(v1)), float(np.linalg.norm(v2))
        cosine = cosine_between(v1 / norms[0], v2 / norms[1])
        ratio = norms[1] / norms[0] * (scales[1] / scales[0])
        vectors = VectorProjection(m, rank, cosine, ratio).epsilon(delta)
        if n == 1:
            return vectors
        return replace(
            vectors,
            method="exact profile, of a pair treated as of rank one",
            pair=f"{vectors.pair}; matrices of {n} columns, treated as v aᵀ and v' aᵀ within a "
            f"relative tolerance of {tolerance:g}; {_ELSE_INFINITE}",
        )
    reason = (
        "the product of V, transposed, with the output is symmetric with probability 1 under V "
        "and with probability 0 under V', at every rank"
    )
    return found(inf, inf, event, shape, reason)


def cosine_between(first: Array, second: Array, error: float = 0.0) -> float:
    """Cosine of two unit vectors, ±1 only where they are equal or opposite to the last digit.

    It comes from their chord, because a scalar product does not see angles below 1e-8, and is
    rounded away from ±1: a pair that is closer to a line than doubles tell counts as 2e-8 off it.
    ``error`` is by how much the vectors may be off, beyond the last digit.
    """
    side = 1.0 if first @ second >= 0 else -1.0
    chord = float(np.linalg.norm(first - side * second))
    if not chord and not error:
        return side
    chord += 4 * _EPS + error  # rounding of the unit vectors
    return side * math.nextafter(1 - chord * chord / 2, 0.0)


def _most_rank(matrix: Array) -> int:
    """The largest rank that rounding leaves possible: at most the rows and columns not zero."""
    return min(int(np.count_nonzero(matrix.any(axis=axis))) for axis in (0, 1))


@dataclass(frozen=True, slots=True, eq=False)
class SketchRelease:
    """One pair of gradients when ``G Aᵀ`` is released, and A and the weights never are.

    The columns of ``G Aᵀ`` are i.i.d. N(0, GGᵀ/rank). Nothing here holds once ``A`` or
    ``W + BA`` is published: see ``matrix_projection``. Column spaces that differ by no more than
    rounding, about 1e-15 times the larger side, count as equal; where in exact arithmetic they
    differ, ε = ∞. The result's ``pair`` names the tolerance.

    Args:
        gradient: G, shape (out_features, in_features), not all zero; copied.
        gradient_prime: G', same shape, not all zero; copied.
        rank: Rows of A, at least 1.

    Raises:
        TypeError: ``rank`` is no integer.
        ValueError: A shape or a number is out of range, or a matrix holds NaN or infinity.

    References:
        Gil, Alajaji & Linder, Information Sciences 249 (2013), for the divergence;
        docs/theory/projection-pairs.md, section 5.
    """

    gradient: Array
    gradient_prime: Array
    rank: int
    _ratios: Array | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        first, second = checked_matrices(
            ("gradient", self.gradient), ("gradient_prime", self.gradient_prime)
        )
        for name, matrix in (("gradient", first), ("gradient_prime", second)):
            if not matrix.any():
                raise ValueError(
                    f"{name} must not be all zero: its sketch is 0 surely, and ε is infinite."
                )
            matrix.flags.writeable = False
            object.__setattr__(self, name, matrix)
        object.__setattr__(self, "rank", _validate.integer("rank", self.rank, 1))
        object.__setattr__(self, "_ratios", _variance_ratios(first, second))

    def rdp(self, orders: npt.ArrayLike, *, backward: bool = False) -> Array:
        """Rényi divergences of the two sketches, of the shape of ``orders``; ``inf`` is honest.

        It is infinite where α S' + (1-α) S is not positive definite on the common range of
        S = GGᵀ and S' = G'G'ᵀ, and at every order when the ranges differ.

        Args:
            orders: α, finite and above 1.
            backward: Whether G' is against G, not G against G'.

        Raises:
            ValueError: An order is out of range.
        """
        return self._divergence(checked_orders(orders), backward=backward)

    def epsilon(self, delta: float) -> PairDivergence:
        """Upper bound on ε of each direction at ``delta``, converted from the best order.

        Raises:
            ValueError: ``delta`` is not in (0, 1).
        """
        _validate.inside("delta", delta, 0, 1)
        both = [self._converted(float(delta), backward=b) for b in (False, True)]
        reason = None
        if math.isinf(max(both)):
            reason = "the column spaces of the gradients differ, so some direction of the sketch "
            reason += "is 0 surely for one and not for the other"
        n, m = self.gradient.shape
        pair = f"gradients of shape {n} × {m}, sketched at rank {self.rank}"
        same = np.array_equal(self.gradient, self.gradient_prime)
        if self._ratios is not None and len(self._ratios) < n and not same:
            rtol = _range_rtol(n, m)
            pair += f", column spaces treated as equal within a relative tolerance of {rtol:.2g}; "
            pair += _ELSE_INFINITE
        return PairDivergence(
            epsilon=max(both),
            forward=both[0],
            backward=both[1],
            delta=float(delta),
            method="upper bound from Rényi divergences",
            pair=pair,
            references=_SKETCH_REFERENCES,
            reason=reason,
        )

    def _converted(self, delta: float, *, backward: bool) -> float:
        if self._ratios is None:
            return math.inf
        if np.all(self._ratios == 1):
            return 0.0
        mu = 1 / self._ratios if backward else self._ratios
        kl = 0.5 * self.rank * float(np.sum(1 / mu - 1 + np.log(mu)))
        plain = np.clip([kl], 1e-300, 1e300)
        return float(
            least_epsilon(
                lambda _, orders: self._divergence(orders, backward=backward), plain, delta, None
            )[0]
        )

    def _divergence(self, orders: Array, *, backward: bool) -> Array:
        """r/(2(1-α)) Σ [log(αμ + 1 - α) - α log μ] over the eigenvalues μ of S⁻¹S', rounded up."""
        if self._ratios is None:
            return np.full(orders.shape, math.inf)
        mu = 1 / self._ratios if backward else self._ratios
        alpha = orders[..., None]
        shifted = alpha * (mu - 1)  # αμ + 1 - α, less 1
        inside = shifted > -1
        logs = np.log1p(np.where(inside, shifted, 0.0)), alpha * np.log(mu)
        total = np.sum(logs[1] - logs[0], axis=-1)
        slack = 8 * _EPS * np.sum(np.abs(logs[0]) + np.abs(logs[1]), axis=-1)
        value = self.rank / (2 * (orders - 1)) * (np.maximum(total, 0.0) + slack)
        return np.where(inside.all(axis=-1), value, math.inf)


def _variance_ratios(first: Array, second: Array) -> Array | None:
    """Eigenvalues of S⁻¹S' on the common range; None when the ranges differ.

    Singular values above rounding count as range, also tiny ones: their ratio then makes ε large,
    which is the honest answer.
    """
    if np.array_equal(first, second):
        return np.ones(1)
    scales = float(np.abs(first).max()), float(np.abs(second).max())
    first, second = first / scales[0], second / scales[1]
    left, values, _ = np.linalg.svd(first, full_matrices=False)
    rounding = max(first.shape) * _EPS
    q = int(np.sum(values > rounding * values[0]))
    left, values = left[:, :q], values[:q]
    inner = left.T @ second
    if np.linalg.norm(second - left @ inner) > _range_rtol(*first.shape) * np.linalg.norm(second):
        return None
    others = np.linalg.svd(second, compute_uv=False)
    if int(np.sum(others > rounding * others[0])) != q:
        return None
    ratios = np.linalg.svd(inner / values[:, None], compute_uv=False)
    return np.square(ratios * (scales[1] / scales[0]))


def _range_rtol(rows: int, columns: int) -> float:
    """Relative part of a gradient outside the other's range that passes for rounding."""
    return 8 * max(rows, columns) * _EPS


def checked_matrices(
    first: tuple[str, npt.ArrayLike], second: tuple[str, npt.ArrayLike]
) -> list[Array]:
    """Copies in double precision; ValueError unless both are finite matrices of one shape."""
    checked: list[Array] = []
    for name, value in (first, second):
        matrix = np.array(value, np.float64)
        if matrix.ndim != 2 or not matrix.size:
            raise ValueError(f"{name} must be a non-empty matrix, got shape {matrix.shape}.")
        if not np.isfinite(matrix).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity; find the bad step.")
        checked.append(matrix)
    if checked[0].shape != checked[1].shape:
        raise ValueError(
            f"{first[0]} and {second[0]} must have one shape, got {checked[0].shape} and "
            f"{checked[1].shape}."
        )
    return checked
