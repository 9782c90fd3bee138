"""What noise-free random projection does to one given pair of inputs. Never a guarantee.

The mechanism is ``S -> AᵀA f(S)`` with A (rank, in_features) i.i.d. N(0, 1/rank), drawn for this
release only and kept secret. Proofs are in docs/theory/projection-pairs.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy import _validate
from lora_privacy.dp._checks import checked_epsilon
from lora_privacy.dp._vector_loss import VectorLoss, projected_sign_flip
from lora_privacy.dp.result import PairDivergence
from lora_privacy.errors import UnsupportedEventError

__all__ = ["Direction", "Shape", "VectorProjection", "vector_projection_bound"]

Direction = Literal["both", "forward", "backward"]
Shape = Literal["sharper", "published"]

# Quantiles are moved outwards by far more than their error, so that ε is never too small.
_QUANTILE_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class VectorProjection:
    """Exact privacy profile of one pair v, v' under ``v -> AᵀA v``.

    The profile depends on the pair through its cosine and its ratio of norms only. Its δ never
    falls below P[(Av)·(Av') <= 0], which is positive unless v' = cv with c > 0.

    Args:
        in_features: Length m of the vectors, at least 1; at 1 the cosine is 1 or -1.
        rank: Rows r of A, at least 1; it may exceed ``in_features``.
        cosine: ρ = v·v' / (‖v‖‖v'‖), in [-1, 1].
        norm_ratio: ν = ‖v'‖ / ‖v‖, positive. v' = 0 has no finite ε and is refused.

    Raises:
        TypeError: A size is no integer.
        ValueError: An argument is out of range or NaN.

    References:
        docs/theory/projection-pairs.md, section 1; an upper bound for ν = 1 is Theorem 1 of
        arXiv:2601.21719, corrected in ``vector_projection_bound``.

    >>> round(VectorProjection(768, 8, 0.999).delta(1.0), 8)
    0.00944582
    """

    in_features: int
    rank: int
    cosine: float
    norm_ratio: float = 1.0

    def __post_init__(self) -> None:
        m, r, cosine = check_pair(self.in_features, self.rank, self.cosine)
        _validate.positive(
            "norm_ratio", self.norm_ratio, "A zero vector is told from any other surely: ε = ∞."
        )
        if not 1e-100 < self.norm_ratio < 1e100:
            raise ValueError(
                f"norm_ratio must lie in (1e-100, 1e100), got {self.norm_ratio!r}: outside double "
                "precision holds no profile."
            )
        object.__setattr__(self, "in_features", m)
        object.__setattr__(self, "rank", r)
        object.__setattr__(self, "cosine", cosine)
        object.__setattr__(self, "norm_ratio", float(self.norm_ratio))

    @property
    def floor(self) -> float:
        """P[(Av)·(Av') <= 0]: no ε brings δ below it."""
        return projected_sign_flip(self.rank, self.cosine)

    def delta(self, epsilon: float, direction: Direction = "both") -> float:
        """Smallest δ at ``epsilon``, relative error at most 1e-10.

        Args:
            epsilon: ε >= 0, in nats.
            direction: ``"forward"`` is v against v', ``"backward"`` v' against v, ``"both"`` the
                larger one.

        Raises:
            ValueError: ``epsilon`` is negative, infinite or NaN, or the direction is unknown.
            ConvergenceError: The quadrature missed its tolerance.
        """
        _validate.choice("direction", direction, get_args(Direction))
        epsilon = checked_epsilon(epsilon)
        values: list[float] = []
        if direction != "backward":
            values.append(self._loss(self.norm_ratio).delta(epsilon))
        if direction == "backward" or (direction == "both" and self.norm_ratio != 1):
            values.append(self._loss(1 / self.norm_ratio).delta(epsilon))
        return max(values)

    def epsilon(self, delta: float) -> PairDivergence:
        """Smallest ε of each direction at ``delta``, rounded up; ``inf`` at or below the floor.

        δ at a positive finite ε is below ``delta`` by a factor within 1 - 3e-10 and 1 - 1e-10.

        Raises:
            ValueError: ``delta`` is not in (0, 1).
            ConvergenceError: The search or its quadrature missed its tolerance.
        """
        _validate.inside("delta", delta, 0, 1)
        delta = float(delta)
        forward = self._loss(self.norm_ratio).epsilon(delta)
        same = self.norm_ratio == 1
        backward = forward if same else self._loss(1 / self.norm_ratio).epsilon(delta)
        epsilon = max(forward, backward)
        reason = None
        if math.isinf(epsilon):
            reason = (
                f"with probability {self.floor:.3g}, not below δ, the output has a non-positive "
                "product with v' that v' itself never gives"
            )
        return PairDivergence(
            epsilon=epsilon,
            forward=forward,
            backward=backward,
            delta=delta,
            method="exact profile",
            pair=(
                f"vectors of length {self.in_features} with cosine {self.cosine!r} and norm ratio "
                f"{self.norm_ratio!r}, projected at rank {self.rank}"
            ),
            references=("p2-projections-2026",),
            reason=reason,
        )

    def rdp(self, orders: object = None) -> NoReturn:
        """Refuse: no Rényi accountant can hold this mechanism.

        Raises:
            UnsupportedEventError: Always; the message says why, and what to use.
        """
        del orders
        raise UnsupportedEventError(
            "Every Rényi divergence of order 1 or more between the two outputs is infinite unless "
            f"v' = cv with c > 0: with probability {self.floor:.3g} an output of v is one that v' "
            "never gives. Use delta() and epsilon(), and compose privacy-loss distributions."
        )

    def _loss(self, ratio: float) -> VectorLoss:
        return VectorLoss(self.in_features, self.rank, self.cosine, ratio)


def vector_projection_bound(
    in_features: int, rank: int, cosine: float, delta: float, *, shape: Shape = "sharper"
) -> PairDivergence:
    """Closed upper bound on ε of one pair of equal norms: Theorem 1 of P2, corrected.

    With δ' = δ/3, t and X the quantiles of t_r and χ²_{m+r-1} at 1 - δ', K = t √((1-ρ²)/r) and
    c = (m-r+1)/2, it is ``max(c ln(ρ-K) + (1-ρ+K) X / (2(ρ-K)), max(c, 0) ln⁺(ρ+K), 0)``. It needs
    ρ > K. ``VectorProjection`` computes the exact ε, which is smaller.

    Args:
        in_features: Length m of the vectors, at least 1.
        rank: Rows r of A, at least 1.
        cosine: ρ, in [-1, 1].
        delta: δ, in (0, 1), split in three equal parts.
        shape: ``"published"`` has c ln(ρ+K) in place of c ln(ρ-K). It is proved for
            rank <= in_features + 1 only, and looser there.

    Raises:
        TypeError: A size is no integer.
        ValueError: An argument is out of range, or the published shape was asked for beyond
            rank = in_features + 1, where it is false.

    References:
        arXiv:2601.21719, Theorem 1; the correction is proved in docs/theory/projection-pairs.md,
        section 2.

    >>> round(vector_projection_bound(400, 100, 0.5, 0.01).epsilon, 1)
    635.3
    """
    m, r, rho = check_pair(in_features, rank, cosine)
    _validate.inside("delta", delta, 0, 1)
    _validate.choice("shape", shape, get_args(Shape))
    c = (m - r + 1) / 2
    if shape == "published" and c < 0:
        raise ValueError(
            f"shape='published' is false for rank > in_features + 1, got rank = {r} and "
            f"in_features = {m}: c = {c:g} is negative there and ln R is bounded from the wrong "
            "side. Use shape='sharper'."
        )
    third = float(delta) / 3
    t = -float(special.stdtrit(r, third)) * (1 + _QUANTILE_SLACK)
    x = 2 * float(special.gammainccinv((m + r - 1) / 2, third)) * (1 + _QUANTILE_SLACK)
    reach = t * math.sqrt((1 - rho) * (1 + rho) / r)  # K
    low, high = rho - reach, rho + reach
    epsilon, reason = math.inf, None
    if low > 0:
        log_ratio = math.log(high if shape == "published" else low)
        epsilon = max(c * log_ratio + (1 - low) * x / (2 * low), 0.0)
        if shape == "sharper":
            epsilon = max(epsilon, max(c, 0.0) * math.log(max(high, 1.0)))
        epsilon *= 1 + 1e-14
    else:
        reason = (
            f"the theorem needs cosine > K, and K = {reach:.4g}; VectorProjection computes the "
            "exact ε"
        )
    return PairDivergence(
        epsilon=epsilon,
        forward=epsilon,
        backward=epsilon,
        delta=float(delta),
        method=f"upper bound, P2 Theorem 1, corrected ({shape} shape)",
        pair=f"vectors of length {m} with cosine {rho!r} and equal norms, projected at rank {r}",
        references=("p2-projections-2026",),
        reason=reason,
    )


def check_pair(in_features: int, rank: int, cosine: float) -> tuple[int, int, float]:
    """Return m, r and ρ; ValueError or TypeError unless they can belong to a pair of vectors."""
    m = _validate.integer("in_features", in_features, 1)
    r = _validate.integer("rank", rank, 1)
    _validate.between("cosine", cosine, -1, 1)
    if m == 1 and abs(cosine) != 1:
        raise ValueError(f"cosine must be 1 or -1 when in_features = 1, got {cosine!r}.")
    return m, r, float(cosine)
