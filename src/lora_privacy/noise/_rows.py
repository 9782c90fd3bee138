"""Gradients and their rows as the laws take them: finite doubles, of one shape."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lora_privacy.errors import NonFiniteError

__all__ = ["Array", "finite", "finite_row", "nonzero_row", "norm_of"]

Array = npt.NDArray[np.float64]


def finite(name: str, values: npt.ArrayLike) -> Array:
    """``values`` as doubles; NonFiniteError unless all are finite."""
    array = np.asarray(values, np.float64)
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name} must be finite, got NaN or infinity; find the bad step.")
    return array


def finite_row(row: npt.ArrayLike) -> Array:
    """``row`` as a finite, non-empty vector; ValueError for another shape."""
    q = np.asarray(row, np.float64)
    if q.ndim != 1 or q.size == 0:
        raise ValueError(
            f"row must be a vector, got shape {q.shape}. Pass one row of G, a non-empty vector."
        )
    return finite("row", q)


def nonzero_row(row: npt.ArrayLike) -> Array:
    """The same, and not all zero; ValueError otherwise."""
    q = finite_row(row)
    if not q.any():
        raise ValueError("row must not be all zero: its noise is 0 surely. Skip this row.")
    return q


def norm_of(row: Array) -> float:
    """‖q‖ of a non-zero row; squares of the scaled entries neither overflow nor vanish."""
    largest = float(np.abs(row).max())
    return largest * float(np.linalg.norm(row / largest))
