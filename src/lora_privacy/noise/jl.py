"""Johnson–Lindenstrauss probabilities, exact for one vector under a Gaussian A."""

from __future__ import annotations

import math

from lora_privacy import _validate
from lora_privacy.laws import distortion_probability

__all__ = ["jl_distortion", "jl_failure", "jl_probability"]

# The tails are accurate to about 1e-13 relative; what leaves as a bound moves by more than that.
_MARGIN = 1e-12
_DISTORTION_RTOL = 1e-13


def jl_failure(rank: int, distortion: float, vectors: int = 1) -> float:
    """Upper bound on P[some x has ‖Ax‖ outside (1 ± τ)‖x‖], for A (rank, m) i.i.d. N(0, 1/rank).

    ‖Ax‖²/‖x‖² ~ χ²_rank / rank, so for one vector it is exact but for rounding up; for several,
    which share A, it is the union bound, at most 1. Each tail is computed on its own.

    Args:
        rank: Rows of A, at least 1.
        distortion: τ >= 0, dimensionless; from τ = 1 on the lower side says nothing.
        vectors: Number of vectors, at least 1; all fixed before A is drawn.

    Returns:
        The probability, in [0, 1].

    Raises:
        ValueError: An argument is out of range or NaN.

    References:
        Matoušek, "On variants of the Johnson–Lindenstrauss lemma", Thm 3.1, in its exact form.

    >>> f"{jl_failure(8, 0.5):.3e}"
    '4.021e-02'
    """
    rank = _validate.integer("rank", rank, 1)
    vectors = _validate.integer("vectors", vectors, 1)
    _validate.between("distortion", distortion, 0.0, math.inf, "It is τ in (1 ± τ)‖x‖.")
    return min(1.0, vectors * distortion_probability(rank, distortion) * (1.0 + _MARGIN))


def jl_probability(rank: int, distortion: float, vectors: int = 1) -> float:
    """Lower bound on P[all x keep (1-τ)‖x‖ <= ‖Ax‖ <= (1+τ)‖x‖]; one minus :func:`jl_failure`.

    Exact for one vector but for rounding down, a union bound for several; never negative.

    >>> jl_probability(8, 0.9, vectors=24_576)
    0.0
    """
    failure = jl_failure(rank, distortion, vectors)
    # 1 - failure is rounded to the nearest double: step below it, unless nothing can fail.
    return math.nextafter(1.0 - failure, 0.0) if failure > 0 else 1.0


def jl_distortion(rank: int, failure: float, vectors: int = 1) -> float:
    """Smallest τ with ``jl_failure(rank, τ, vectors) <= failure``, rounded up.

    It is finite, but it may be 1 or more: then no τ below 1 does, and the event bounds norms
    from above only.

    Args:
        rank: Rows of A, at least 1.
        failure: Probability that is allowed to fail, in (0, 1).
        vectors: Number of vectors, at least 1.

    Raises:
        ValueError: An argument is out of range or NaN.

    >>> jl_distortion(8, 0.05, vectors=24_576) > 1
    True
    """
    _validate.inside("failure", failure, 0.0, 1.0, "A distortion that never fails is infinite.")
    low, high = 0.0, 1.0
    while jl_failure(rank, high, vectors) > failure:
        low, high = high, 2.0 * high
    while high - low > _DISTORTION_RTOL * high:
        middle = (low + high) / 2.0
        if jl_failure(rank, middle, vectors) <= failure:
            high = middle
        else:
            low = middle
    return high
