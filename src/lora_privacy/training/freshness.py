"""The projections of DP-FLoRA: drawn after the pass they are applied to, used once, attested."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from lora_privacy.core import FLoRALinear, RandomProjection, is_conv1d
from lora_privacy.dp import ProjectionAttestation

if TYPE_CHECKING:
    from torch import Tensor

    from lora_privacy.laws import LawName

__all__ = ["FreshProjections"]


class FreshProjections:
    """The A's of the present step, all from one seed.

    The seeds that the layers were adapted with are not used: they may be older than the data set,
    or serve another run.

    Args:
        layers: Path -> FLoRA layer, all of one law with a Haar row space.
    """

    def __init__(self, layers: dict[str, FLoRALinear]) -> None:
        self.layers = layers
        self.shapes = tuple((layer.in_features, layer.rank) for layer in layers.values())
        self.law: LawName = next(iter(layers.values())).projection.law
        self.seed: int | None = None
        self._matrices: dict[str, Tensor] = {}

    def a(self, name: str, seed: int) -> Tensor:
        """A of a layer (rank, in_features), in the type and on the device of its weight."""
        if name not in self._matrices:
            layer = self.layers[name]
            projection = RandomProjection(
                layer.rank, layer.in_features, self.law, seed=seed, layer=name
            )
            like = layer.weight
            self._matrices[name] = projection.matrix(0, like.dtype, like.device)
        return self._matrices[name]

    def release(self, name: str, total: Tensor | None, noise: Tensor, seed: int) -> Tensor:
        """``(V + E) Aᵀ`` of a layer, (out, rank).

        Args:
            name: Path of the layer.
            total: V Aᵀ; None where no sample reached the layer.
            noise: i.i.d. N(0, σ²), (out, rank).
            seed: That of the step.
        """
        a = self.a(name, seed).double()
        # E Aᵀ with i.i.d. E has rows of covariance σ² A Aᵀ, whatever the length of A's rows.
        factor = torch.linalg.cholesky(a @ a.T).to(noise.dtype)
        projected = noise @ factor.T
        return projected if total is None else total + projected

    def decompress(self, name: str, released: Tensor, seed: int) -> Tensor:
        """The dense gradient ``s² · released · A`` in the layout of the weight."""
        layer = self.layers[name]
        dense = released @ self.a(name, seed) * layer.scaling**2
        return dense.T.contiguous() if is_conv1d(layer.base) else dense

    def attest(self, step: int, seed: int, *, all_projected: bool) -> ProjectionAttestation:
        """State what this step is; clip and noise are as ``make_private`` drives them."""
        # Imported here: the bridge to Opacus takes seconds and only this method needs it.
        from lora_privacy.dp.opacus import projection_digest

        return ProjectionAttestation(
            step=step,
            law=self.law,
            layers=self.shapes,
            seed_digest=hashlib.sha256(
                f"lora-privacy projection seed {seed}".encode()
            ).hexdigest(),
            matrix_digest=projection_digest(self.a(name, seed) for name in self.layers),
            clipped_whole=True,
            noised_whole=True,
            factors_reset=all(
                not bool(layer.expand.weight.any()) for layer in self.layers.values()
            ),
            all_projected=all_projected,
        )

    def end_step(self) -> None:
        """Forget the A's, and let half-precision bases follow their masters."""
        self.seed = None
        self._matrices = {}
        for layer in self.layers.values():
            layer.refresh()
