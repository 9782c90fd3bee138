"""Singular values of one mean gradient before the noise, after it, and restored.

**What is from before the noise, the cosines among it, is computed from private data without
noise. No guarantee covers it: it is a diagnostic for data that is not secret.** Theory:
``docs/theory/denoising.md``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from lora_privacy import _validate
from lora_privacy.assess.methods import METHODS, MethodName
from lora_privacy.assess.updates import (
    checked_shapes,
    clip_factors,
    is_private,
    projections_of,
)
from lora_privacy.training import SingularValueDenoiser

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_privacy.assess.updates import Array
    from lora_privacy.laws import LawName
    from lora_privacy.training.denoising import Shrinker

__all__ = ["LayerSpectrum", "spectra"]

_SHOWN = 16  # singular values a profile


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

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields."""
        data = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a saved spectrum; TypeError for missing or unknown fields."""
        kept: dict[str, Any] = dict(data)
        for name, value in data.items():
            if isinstance(value, list):
                kept[name] = tuple(data[name])
        return cls(**kept)


def spectra(
    gradients: Mapping[str, Array],
    *,
    method: MethodName,
    rank: int | None = None,
    law: LawName = "gaussian",
    noise_multiplier: float,
    max_grad_norm: float = 1.0,
    batch_size: int,
    seed: int,
    shrinker: Shrinker = "frobenius",
) -> tuple[LayerSpectrum, ...]:
    """Profile the matrices that one step of a private method releases, a layer.

    The batch is drawn from the records without replacement; each record is clipped over all
    layers together, as in :func:`~lora_privacy.assess.updates.attack_updates`, whose other
    arguments mean the same.

    Args:
        gradients: Layer -> one gradient a record, (records, out, in).
        method: ``"dp-sgd"`` (the whole gradient), ``"dp-lora"`` and ``"dp-lora-fa"`` (the
            gradient G Aᵀ of B) or ``"dp-flora"``.
        rank: Rows of A, where there is one.
        law: Of its entries.
        noise_multiplier: z = σ/C, > 0.
        max_grad_norm: C.
        batch_size: Records of the mean.
        seed: Decides batch, A and noise.
        shrinker: How :func:`~lora_privacy.training.denoise` restores.

    Raises:
        ValueError: An argument is out of range, the method adds no noise, or the mean gradient of
            a layer is 0.
    """
    _validate.choice("method", method, METHODS)
    shapes = checked_shapes(gradients)
    if not is_private(method):
        raise ValueError(f"method must add noise, got {method!r}; its spectrum is the clean one.")
    records = len(next(iter(gradients.values())))
    batch_size = _validate.integer("batch_size", batch_size, 1)
    _validate.between("batch_size", batch_size, 1, records, "So many gradients there are.")
    _validate.positive("noise_multiplier", noise_multiplier)
    _validate.positive("max_grad_norm", max_grad_norm)
    denoiser = SingularValueDenoiser(shrinker)
    projections = projections_of(gradients, method, rank, law, seed)
    matrices = {layer: p.matrix(0, torch.float64).numpy() for layer, p in projections.items()}
    rng = np.random.default_rng(_validate.integer("seed", seed, 0))
    rows = rng.choice(records, batch_size, replace=False)
    used = {layer: g[rows] for layer, g in gradients.items()}
    if method in ("dp-lora", "dp-lora-fa"):
        used = {layer: g @ matrices[layer].T for layer, g in used.items()}
    factors = clip_factors(used.values(), max_grad_norm)
    std = noise_multiplier * max_grad_norm / batch_size
    found: list[LayerSpectrum] = []
    for (layer, g), (n, m) in zip(used.items(), shapes, strict=True):
        clean = np.tensordot(factors, g, 1) / batch_size
        if not clean.any():
            raise ValueError(f"the mean gradient of {layer!r} is 0: it has no spectrum.")
        noised = clean + std * rng.standard_normal(clean.shape)
        edge, restored = std * denoiser.threshold(*clean.shape), None
        if method == "dp-flora":
            a = matrices[layer]
            noised = noised @ a.T @ a
            # Rows of length √(m/r) at right angles: E Aᵀ has independent entries, and the way
            # back stretches by √(m/r) once more.
            stretched = std * m / len(a) * denoiser.threshold(n, len(a))
            edge = stretched if law == "orthonormal" else None
        else:
            restored = denoiser(layer, torch.from_numpy(noised), std).numpy()
        found.append(
            LayerSpectrum(
                layer=layer,
                shape=(int(clean.shape[0]), int(clean.shape[1])),
                noise_std=std,
                edge=edge,
                before=_largest(clean),
                after=_largest(noised),
                restored=None if restored is None else _largest(restored),
                cosine_after=_cosine(clean, noised),
                cosine_restored=None if restored is None else _cosine(clean, restored),
            )
        )
    return tuple(found)


def _largest(matrix: Array) -> tuple[float, ...]:
    return tuple(np.linalg.svd(matrix, compute_uv=False)[:_SHOWN].tolist())


def _cosine(clean: Array, other: Array) -> float:
    """Of a matrix that is not 0; the denoiser keeps what it would have made 0."""
    return float(np.sum(clean * other) / (np.linalg.norm(clean) * np.linalg.norm(other)))
