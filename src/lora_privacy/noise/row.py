"""Exact joint law of the noise of one row, for Gaussian A."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.noise._density import chi_square_logpdf
from lora_privacy.noise._rows import Array, nonzero_row, norm_of
from lora_privacy.noise.entry import EntryNoise

__all__ = ["RowNoise"]


@dataclass(frozen=True, slots=True, eq=False)
class RowNoise:
    """Law of ``q (AᵀA - I)``, with ``A`` (rank, m) i.i.d. N(0, 1/rank).

    With S ~ χ²_rank / rank and g ~ N(0, I_m) independent, it is that of
    ``(S - 1) q + ‖q‖ √(S/rank) P g``, where P projects on the complement of q. Given S, which is
    ‖qAᵀ‖²/‖q‖², the row is Gaussian. This holds for every rank >= 1, below m or above.

    Args:
        rank: Rows of ``A``, at least 1.
        row: q, shape (m,), in units of the gradient, not all zero; copied.

    Raises:
        ValueError: The rank is out of range, or the row is no vector or all zero.
        NonFiniteError: The row holds NaN or infinity.

    References:
        Derivation in docs/theory/noise-laws.md, section 3.
    """

    rank: int
    row: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", _validate.integer("rank", self.rank, 1))
        q = nonzero_row(np.array(self.row, np.float64))
        q.flags.writeable = False
        object.__setattr__(self, "row", q)

    @property
    def norm(self) -> float:
        """‖q‖, in units of the gradient."""
        return norm_of(self.row)

    def covariance(self) -> Array:
        """(‖q‖² I + q qᵀ)/rank, shape (m, m), in squared units of the gradient."""
        scaled = self.row / math.sqrt(self.rank)
        return np.outer(scaled, scaled) + np.eye(scaled.size) * float(scaled @ scaled)

    def entry(self, index: int) -> EntryNoise:
        """Law of entry ``index``, from 0; IndexError outside the row."""
        return EntryNoise(self.rank, self.norm, float(self.row[index]))

    def logpdf(self, y: npt.ArrayLike) -> Array:
        """Log density of the noise at ``y``, in log of 1 / unit^m.

        It is -inf where ``(y + q)·q <= 0``: ``qAᵀA·q`` is a square.

        Args:
            y: Noise, shape (..., m).

        Returns:
            Shape (...).

        Raises:
            ValueError: The last axis is not m, or ``y`` holds NaN.
        """
        noise = np.asarray(y, np.float64)
        m = self.row.size
        if noise.ndim == 0 or noise.shape[-1] != m:
            raise ValueError(f"y must have shape (..., {m}), got {noise.shape}.")
        if np.isnan(noise).any():
            raise ValueError("y must hold numbers, got NaN. Remove or repair those points first.")
        norm = self.norm
        unit = self.row / norm
        scaled = noise / norm
        shift = scaled @ unit  # S - 1
        across = scaled - shift[..., None] * unit
        s = shift + 1.0
        inside = s > 0
        safe = np.where(inside, s, 1.0)
        square = np.einsum("...i,...i->...", across, across)
        gaussian = -0.5 * (m - 1) * np.log(2 * math.pi * safe / self.rank) - (
            0.5 * self.rank * square / safe
        )
        value = chi_square_logpdf(self.rank, shift) + gaussian
        return np.where(inside, value - m * math.log(norm), -math.inf)

    def rvs(self, size: int, random_state: np.random.Generator) -> Array:
        """Draw shape (size, m) in O(size·m); A is never formed. The generator is required."""
        size = _validate.integer("size", size, 0)
        norm = self.norm
        unit = self.row / norm
        s = random_state.chisquare(self.rank, (size, 1)) / self.rank
        g = random_state.standard_normal((size, unit.size))
        g -= (g @ unit)[:, None] * unit
        g *= np.sqrt(s / self.rank)
        g += (s - 1.0) * unit
        g *= norm
        return g
