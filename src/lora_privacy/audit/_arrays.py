"""Arrays that attacks and bounds take: shapes, what they may hold, messages that say where not."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Mask", "agree", "boolean", "finite", "log_probabilities", "part", "refuse"]

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]


def finite(name: str, values: npt.ArrayLike, shape: tuple[int | None, ...] | None) -> Array:
    """``values`` as float64 of this shape; None stands for any length of at least 1."""
    array = np.asarray(values, dtype=np.float64)
    if shape is not None:
        agree(name, array.shape, shape)
    refuse(name, ~np.isfinite(array), "is NaN or infinite")
    return array


def log_probabilities(
    name: str, values: npt.ArrayLike, shape: tuple[int | None, ...] | None
) -> Array:
    array = finite(name, values, shape)
    refuse(name, array > 0, "is positive, a probability above 1; pass ln p, at most 0")
    return array


def boolean(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> Mask:
    array = np.asarray(values)
    if array.dtype != np.bool_:  # an index or a -1/1 code would pass for "all true"
        raise TypeError(f"{name} must be boolean, got dtype {array.dtype}.")
    agree(name, array.shape, shape)
    return array


def part(scores: npt.ArrayLike, members: npt.ArrayLike) -> tuple[Array, Array]:
    """Scores of the members and of the others, each in increasing order.

    Args:
        scores: Shape (n,), higher means member; infinities are allowed, they have a rank.
        members: Boolean, shape (n,).

    Raises:
        TypeError: ``members`` is not boolean.
        ValueError: A shape is wrong, a score is NaN, or one of the two classes is empty.
    """
    values = np.asarray(scores, dtype=np.float64)
    agree("scores", values.shape, (None,))
    mask = boolean("members", members, values.shape)
    refuse("scores", np.isnan(values), "is NaN; a score that failed is no guess")
    count = int(mask.sum())
    if not 0 < count < mask.size:
        raise ValueError(
            f"members must mark some scores and leave others, got {count} of {mask.size}. "
            "One class alone says nothing of the other's error rate."
        )
    return np.sort(values[mask]), np.sort(values[~mask])


def agree(name: str, found: tuple[int, ...], shape: tuple[int | None, ...]) -> None:
    fits = len(found) == len(shape) and all(
        size >= 1 if want is None else size == want
        for size, want in zip(found, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("at least 1" if want is None else str(want) for want in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {found}.")


def refuse(name: str, wrong: Mask, what: str) -> None:
    if np.any(wrong):
        where = ", ".join(str(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        raise ValueError(f"{name}[{where}] {what}.")
