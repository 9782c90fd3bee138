"""The projections of DP-FLoRA: drawn after the pass they are applied to, used once, attested."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from lora_privacy._digest import tensor_digest
from lora_privacy.core import FLoRALinear, RandomProjection, is_conv1d
from lora_privacy.dp import ProjectionAttestation
from lora_privacy.training.randomness import SystemRandomness

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lora_privacy.laws import LawName
    from lora_privacy.training.recorder import LayerTap

__all__ = ["FreshProjections"]


class FreshProjections:
    """The A's of the present step, all from one seed.

    The seeds that the layers were adapted with are not used: they may be older than the data set,
    or serve another run.

    Args:
        layers: Path -> FLoRA layer, all of one law with a Haar row space; their compressed
            branches are put to rest **in place**.

    Attributes:
        shapes: ``(in_features, rank)`` of each layer.
        law: That of A.
        draw: Where the seed of a step comes from.
    """

    def __init__(self, layers: dict[str, FLoRALinear]) -> None:
        self.layers: dict[str, FLoRALinear] = layers
        self.shapes: tuple[tuple[int, int], ...] = tuple(
            (layer.in_features, layer.rank) for layer in layers.values()
        )
        self.law: LawName = next(iter(layers.values())).projection.law
        self.draw: Callable[[], int] = SystemRandomness().seed
        self._seed: int | None = None
        self._matrices: dict[str, Tensor] = {}
        for layer in layers.values():
            # Gradients are taken from the taps: the compressed branch of the forward pass is idle.
            layer.expand.weight.requires_grad_(False)

    def close(self) -> None:
        """Let the compressed branches work again."""
        for layer in self.layers.values():
            layer.expand.weight.requires_grad_(True)

    def begin_step(self) -> None:
        """Draw the seed of this step, if no A has needed it yet."""
        self._step_seed()

    def a(self, name: str) -> Tensor:
        """A of a layer (rank, in_features), in the type and on the device of its weight."""
        if name not in self._matrices:
            layer = self.layers[name]
            projection = RandomProjection(
                layer.rank, layer.in_features, self.law, seed=self._step_seed(), layer=name
            )
            like = layer.weight
            self._matrices[name] = projection.matrix(0, like.dtype, like.device)
        return self._matrices[name]

    def _step_seed(self) -> int:
        """Drawn once a step, at the first use of an A."""
        if self._seed is None:
            self._seed = self.draw()
        return self._seed

    def projected_sum(self, tap: LayerTap, key: str, weights: Tensor) -> Tensor:
        """Σ weights_i G_i Aᵀ of a layer, (out, rank), as ``clipped_sums(reduce=…)`` takes it."""
        # A is drawn here at the latest, after the pass it is applied to.
        return tap.samples[key].projected(weights, self.a(tap.name))

    def release(self, name: str, total: Tensor | None, noise: Tensor) -> Tensor:
        """``(V + E) Aᵀ`` of a layer, (out, rank).

        Args:
            name: Path of the layer.
            total: V Aᵀ; None where no sample reached the layer.
            noise: i.i.d. N(0, σ²), (out, rank).
        """
        # E Aᵀ with i.i.d. E has rows of covariance σ² A Aᵀ, whatever the length of A's rows.
        if self.law == "orthonormal":
            layer = self.layers[name]
            projected = noise * (layer.in_features / layer.rank) ** 0.5  # A Aᵀ = (m/r) I
        else:
            a = self.a(name).double()
            projected = noise @ torch.linalg.cholesky(a @ a.T).to(noise.dtype).T
        return projected if total is None else total + projected

    def decompress(self, name: str, released: Tensor) -> Tensor:
        """The dense gradient ``s² · released · A`` in the layout of the weight."""
        layer = self.layers[name]
        dense = released @ self.a(name) * layer.scaling**2
        return dense.T.contiguous() if is_conv1d(layer.base) else dense

    def attest(self, step: int, model: nn.Module) -> ProjectionAttestation:
        """State what this step is; clip and noise are as ``make_private`` drives them."""
        own = {id(layer.weight) for layer in self.layers.values()}
        seed = f"lora-privacy projection seed {self._step_seed()}"
        return ProjectionAttestation(
            step=step,
            law=self.law,
            layers=self.shapes,
            seed_digest=hashlib.sha256(seed.encode()).hexdigest(),
            matrix_digest=tensor_digest(("", self.a(name)) for name in self.layers),
            clipped_whole=True,
            noised_whole=True,
            factors_reset=all(
                not bool(layer.expand.weight.any()) for layer in self.layers.values()
            ),
            all_projected=own == {id(p) for p in model.parameters() if p.requires_grad},
        )

    def end_step(self) -> None:
        """Forget the A's, and let half-precision bases follow their masters."""
        self._seed = None
        self._matrices = {}
        for layer in self.layers.values():
            layer.refresh()
