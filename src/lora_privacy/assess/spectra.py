"""Singular values of one mean gradient before the noise, after it, and restored.

**What is from before the noise, the cosines among it, is computed from private data without
noise. No guarantee covers it: it is a diagnostic for data that is not secret.** Theory:
``docs/theory/denoising.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerSpectrum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpectrum:
    """One layer's released matrix; singular values are falling, the largest 16 of them.

    Attributes:
        layer: Name of the layer.
        shape: Of the matrix: (out, in), or (out, rank) for the gradient of B.
        noise_std: Standard deviation of one entry's noise, in units of the gradient.
        edge: Largest singular value of the noise alone, about, in the same unit; None where no
            formula is known (dp-flora with an A that is not orthonormal).
        before: Of the clipped mean gradient. **Not private.**
        after: With the noise; for dp-flora after A and back, ``(G + noise) AᵀA``.
        restored: After the denoiser; None for dp-flora, whose noise it is not made for.
        cosine_after: Cosine of the clean and of the noised matrix. **Not private.**
        cosine_restored: The same of the restored matrix; None as ``restored``. **Not private.**
    """

    layer: str
    shape: tuple[int, int]
    noise_std: float
    edge: float | None
    before: tuple[float, ...]
    after: tuple[float, ...]
    restored: tuple[float, ...] | None
    cosine_after: float
    cosine_restored: float | None
