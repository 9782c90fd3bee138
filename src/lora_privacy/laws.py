"""The laws that the entries of A can have: name, variance, kurtosis, and effect on a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lora_privacy import _validate

__all__ = [
    "LAW_NAMES",
    "EntryLaw",
    "LawName",
    "distortion_probability",
    "entry_law",
    "peft_default_law",
]

LawName = Literal["gaussian", "uniform", "rademacher", "orthonormal"]
LAW_NAMES: tuple[LawName, ...] = get_args(LawName)


@dataclass(frozen=True, slots=True)
class EntryLaw:
    """Law of one entry of A.

    Attributes:
        name: ``"orthonormal"`` entries are dependent (the rows of A are a scaled orthonormal
            frame with a Haar row space); all other named laws are i.i.d. ``"unknown"`` is a law
            that nobody stated, such as an initialisation computed from weights or data.
        variance: Variance v of an entry; NaN when unknown.
        kurtosis: Fourth moment over v², not the excess; NaN when unknown.
    """

    name: LawName | Literal["unknown"]
    variance: float
    kurtosis: float


def entry_law(name: LawName, rank: int, in_features: int) -> EntryLaw:
    """Law of an entry of A (rank, in_features), scaled to variance 1/rank so that E AᵀA = I.

    Args:
        name: One of ``LAW_NAMES``.
        rank: Rows of A, at least 1.
        in_features: Columns of A, at least 1.

    Raises:
        ValueError: An argument is out of range, or ``rank > in_features`` for the orthonormal
            law, which has no such frame.

    >>> entry_law("rademacher", 4, 16)
    EntryLaw(name='rademacher', variance=0.25, kurtosis=1.0)
    """
    _validate.choice("law", name, LAW_NAMES)
    rank = _validate.integer("rank", rank, 1)
    in_features = _validate.integer("in_features", in_features, 1)
    if name == "orthonormal" and rank > in_features:
        raise ValueError(
            f"rank must be at most in_features = {in_features} for the orthonormal law, "
            f"got {rank}. Choose a smaller rank or law='gaussian'."
        )
    kurtosis = {
        "gaussian": 3.0,
        "uniform": 9.0 / 5.0,
        "rademacher": 1.0,
        # An entry of a uniform unit vector in R^m has kurtosis 3m/(m+2).
        "orthonormal": 3.0 * in_features / (in_features + 2.0),
    }[name]
    return EntryLaw(name, 1.0 / rank, kurtosis)


def peft_default_law(in_features: int) -> EntryLaw:
    """Law of PEFT's default A, ``kaiming_uniform(a=√5)``: uniform on ±1/√in_features.

    >>> peft_default_law(12).variance == 1 / 36
    True
    """
    in_features = _validate.integer("in_features", in_features, 1)
    return EntryLaw("uniform", 1.0 / (3.0 * in_features), 9.0 / 5.0)


def distortion_probability(rank: int, distortion: float) -> float:
    """P[‖Ax‖/‖x‖ outside [1-τ, 1+τ]] for one fixed x and A i.i.d. N(0, 1/rank).

    The two tails of ‖Ax‖²/‖x‖² ~ χ²_rank / rank, each on its own; about 1e-13 relative accuracy.

    Args:
        rank: Rows of A, at least 1.
        distortion: τ >= 0, dimensionless; from τ = 1 on the lower tail is empty.
    """
    # Imported here: core reads laws, and needs no scipy.
    from scipy import special  # pyright: ignore[reportMissingTypeStubs]

    half = rank / 2.0
    short = float(special.gammainc(half, half * max(0.0, 1.0 - distortion) ** 2))
    return short + float(special.gammaincc(half, half * (1.0 + distortion) ** 2))
