"""Gaussian noise added after the projection, one given pair at a time. Never a guarantee."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy import _validate
from lora_privacy.dp import _gaussian
from lora_privacy.dp.matrix_pairs import checked_matrices, cosine_between
from lora_privacy.dp.pairwise import VectorProjection
from lora_privacy.dp.result import PairDivergence

__all__ = ["NoisedProjection"]

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_REFERENCES = ("p2-projections-2026", "davidson-szarek-2001")
# Shares of δ: for the norm of what the noise must hide, and for the residual vectors.
_NORM_SHARE = 0.1
_RESIDUAL_SHARES = (0.02, 0.2, 0.5, 0.8)
_LEAST_RESIDUAL = 1e-8  # of a column: the direction of a smaller one would be rounding


@dataclass(frozen=True, slots=True, eq=False)
class NoisedProjection:
    """One pair of matrices that differ in one column, under ``V -> AᵀA V + E``.

    E is i.i.d. N(0, noise_std²). With k the rank of the other columns, AᵀA splits into a part that
    their projections show and an independent part of rank ``rank - k`` on the complement of their
    span. ε is the smaller of two proved bounds:

    - *A revealed*: a Gaussian mechanism whose shift ``‖AᵀA Δ‖`` has a known law;
    - *split*, k < rank: the exact profile of the residual vectors in dimension ``in_features - k``
      at rank ``rank - k``, plus a Gaussian mechanism for the part that is shown.

    Args:
        v: V, shape (m, n); copied.
        v_prime: V', same shape, different in at most one column; copied.
        rank: Rows of A, at least 1.
        noise_std: Standard deviation of an entry of E, in the unit of V, positive.

    Raises:
        TypeError: ``rank`` is no integer.
        ValueError: A shape or a number is out of range, or more than one column differs.

    References:
        Reconstructed from arXiv:2601.21719; proof in docs/theory/projection-pairs.md, section 4.
    """

    v: Array
    v_prime: Array
    rank: int
    noise_std: float
    _column: int | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        first, second = checked_matrices(("v", self.v), ("v_prime", self.v_prime))
        for name, matrix in (("v", first), ("v_prime", second)):
            matrix.flags.writeable = False
            object.__setattr__(self, name, matrix)
        object.__setattr__(self, "rank", _validate.integer("rank", self.rank, 1))
        _validate.positive("noise_std", self.noise_std, "Without noise use matrix_projection.")
        object.__setattr__(self, "noise_std", float(self.noise_std))
        changed = np.flatnonzero((first != second).any(axis=0))
        if len(changed) > 1:
            raise ValueError(
                f"v and v_prime must differ in one column, got {len(changed)}. There is no proof "
                "for more."
            )
        object.__setattr__(self, "_column", int(changed[0]) if len(changed) else None)

    def epsilon(self, delta: float) -> PairDivergence:
        """Upper bound on ε of each direction at ``delta``.

        Raises:
            ValueError: ``delta`` is not in (0, 1).
            ConvergenceError: A quadrature missed its tolerance.
        """
        _validate.inside("delta", delta, 0, 1)
        if self._column is None:
            return self._result(0.0, 0.0, float(delta), "equal inputs")
        found = [self._result(*self._revealed(delta), float(delta), "upper bound, A revealed")]
        found += [
            self._result(forward, backward, float(delta), "upper bound, split")
            for forward, backward in self._split(delta)
        ]
        return min(found, key=lambda result: result.epsilon)

    def _revealed(self, delta: float) -> tuple[float, float]:
        """‖AᵀAΔ‖² = ‖Δ‖² S (S + Y/r) with r S ~ χ²_r and Y ~ χ²_{m-1}, both at a quantile."""
        m, r = self.v.shape[0], self.rank
        failure = _NORM_SHARE * delta / 2
        s = _upper_chi_square(r, failure) / r
        other = _upper_chi_square(m - 1, failure) / r if m > 1 else 0.0
        shift = self._norm(self._difference) * math.sqrt(s * (s + other))
        value = self._gaussian(shift, (1 - _NORM_SHARE) * delta)
        return value, value

    def _split(self, delta: float) -> list[tuple[float, float]]:
        m, n = self.v.shape
        span = self._span(np.delete(self.v, self._column or 0, axis=1)) if n > 1 else None
        k = 0 if span is None else span.shape[1]
        if k >= min(self.rank, m):
            return []
        before, after = self.v[:, self._column], self.v_prime[:, self._column]
        whole = self._norm(before), self._norm(after)
        seen, error = 0.0, 0.0
        if span is not None and k:
            inner = span.T @ self._difference
            seen = self._shown(k, inner, self._difference - span @ inner, _NORM_SHARE * delta)
            before, after = before - span @ (span.T @ before), after - span @ (span.T @ after)
        one, two = self._norm(before), self._norm(after)
        if one <= _LEAST_RESIDUAL * whole[0] or two <= _LEAST_RESIDUAL * whole[1]:
            return []  # a residual of zero, as this may be, is told from any other
        if k:
            error = m * _EPS * (whole[0] / one + whole[1] / two)
        cosine = cosine_between(before / one, after / two, error)
        if m - k == 1:
            cosine = math.copysign(1.0, cosine)
        pair = VectorProjection(m - k, self.rank - k, cosine, two / one)
        if not k:
            exact = pair.epsilon(delta)
            return [(exact.forward, exact.backward)]
        bounds: list[tuple[float, float]] = []
        for share in _RESIDUAL_SHARES:
            part = share * (1 - _NORM_SHARE) * delta
            residual = pair.epsilon(part)
            noise = self._gaussian(seen, (1 - _NORM_SHARE) * delta - part)
            bounds.append((residual.forward + noise, residual.backward + noise))
        return bounds

    def _shown(self, k: int, inner: Array, outer: Array, failure: float) -> float:
        """Bound on ‖M∥ Δ‖ but for ``failure``: ‖F‖ ‖FΔ‖ with F = [T, H], see the proof."""
        m, r = self.v.shape[0], self.rank
        part = failure / 4
        t = math.sqrt(-2 * math.log(part))
        norm_t = (math.sqrt(r) + math.sqrt(k) + t) / math.sqrt(r)
        norm_h = (math.sqrt(k) + math.sqrt(m - k) + t) / math.sqrt(r)
        length = self._norm(inner) * math.sqrt(_upper_chi_square(r, part) / r)
        length += self._norm(outer) * math.sqrt(_upper_chi_square(k, part) / r)
        return math.hypot(norm_t, norm_h) * length

    @staticmethod
    def _span(others: Array) -> Array | None:
        """Orthonormal basis of the columns; directions above rounding count, which is sound."""
        if not others.any():
            return None
        left, values, _ = np.linalg.svd(others / np.abs(others).max(), full_matrices=False)
        return left[:, values > max(others.shape) * _EPS * values[0]]

    @property
    def _difference(self) -> Array:
        return self.v_prime[:, self._column] - self.v[:, self._column]

    @staticmethod
    def _norm(vector: Array) -> float:
        largest = float(np.abs(vector).max())
        return largest * float(np.linalg.norm(vector / largest)) if largest else 0.0

    def _gaussian(self, shift: float, delta: float) -> float:
        mu = shift / self.noise_std * (1 + 1e-12)
        return _gaussian.epsilon_interval(mu, mu, delta)[1] if mu else 0.0

    def _result(
        self, forward: float, backward: float, delta: float, method: str
    ) -> PairDivergence:
        m, n = self.v.shape
        epsilon = max(forward, backward)
        reason = None
        if math.isinf(epsilon):
            reason = "neither the noise nor the projection hides this pair at this δ"
        return PairDivergence(
            epsilon=epsilon,
            forward=forward,
            backward=backward,
            delta=delta,
            method=method,
            pair=(
                f"matrices of shape {m} × {n} that differ in one column, projected at rank "
                f"{self.rank}, with noise of standard deviation {self.noise_std!r} added after"
            ),
            references=_REFERENCES,
            reason=reason,
        )


def _upper_chi_square(freedom: int, tail: float) -> float:
    """Point that χ² exceeds with probability ``tail``, moved outwards by more than its error."""
    return 2 * float(special.gammainccinv(freedom / 2, tail)) * (1 + 1e-9)
