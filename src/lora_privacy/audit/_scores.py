"""Scores of an attack, checked and parted into those of members and of non-members."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "part"]

Floats: TypeAlias = npt.NDArray[np.float64]


def part(scores: npt.ArrayLike, members: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Scores of the members and of the others, each in increasing order.

    Args:
        scores: Shape (n,), higher means member; infinities are allowed, they have a rank.
        members: Boolean, shape (n,).

    Raises:
        TypeError: ``members`` is not boolean.
        ValueError: A shape is wrong, a score is NaN, or one of the two classes is empty.
    """
    values = np.asarray(scores, dtype=np.float64)
    mask = np.asarray(members)
    if values.ndim != 1:
        raise ValueError(f"scores must have shape (n,), got {values.shape}.")
    if mask.dtype != np.bool_:  # an index, or a code of -1 and 1, would be all true
        raise TypeError(f"members must be boolean, got dtype {mask.dtype}.")
    if mask.shape != values.shape:
        raise ValueError(
            f"members must have the shape of scores, {values.shape}, got {mask.shape}."
        )
    wrong = np.flatnonzero(np.isnan(values))
    if wrong.size:
        raise ValueError(f"scores[{wrong[0]}] is NaN; a score that failed is no guess.")
    count = int(mask.sum())
    if not 0 < count < mask.size:
        raise ValueError(
            f"members must mark some scores and leave others, got {count} of {mask.size}. "
            "One class alone says nothing of the other's error rate."
        )
    return np.sort(values[mask]), np.sort(values[~mask])
