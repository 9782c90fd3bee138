"""What one step releases: clipped sums with their noise, and the gradients made of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch

from lora_privacy.training.samples import wide

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from lora_privacy.training.engine import Denoiser
    from lora_privacy.training.freshness import FreshProjections

__all__ = ["Noising"]


class Noising:
    """From the clipped sums of a step to the gradients that the optimizer takes.

    Args:
        parameters: Path -> trained parameter.
        fresh: The projections of ``"dp-flora"``; None for the other methods.
        denoiser: Applied to each noised mean.
        expected_batch_size: What noised sums are divided by.

    Attributes:
        profiled: Whether the denoiser has recorded, or is to record, what is from before the
            noise.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        fresh: FreshProjections | None,
        denoiser: Denoiser | None,
        expected_batch_size: float,
    ) -> None:
        self._parameters, self._fresh, self._denoiser = parameters, fresh, denoiser
        self._size = expected_batch_size
        self.profiled: bool = self._records_before()

    def shape(self, path: str) -> tuple[int, ...]:
        """Of what is released of a parameter: (out, rank) for dp-flora."""
        if self._fresh is None:
            return tuple(self._parameters[path].shape)
        layer = self._fresh.layers[_layer(path)]
        return layer.out_features, layer.rank

    def zeros(self) -> dict[str, Tensor]:
        """Of the shapes and types of what is released."""
        return {
            path: torch.zeros(self.shape(path), dtype=_type(parameter), device=parameter.device)
            for path, parameter in self._parameters.items()
        }

    def release(
        self,
        sums: Mapping[str, Tensor],
        std: float,
        normal: Callable[[int, str], npt.NDArray[np.float64]],
    ) -> dict[str, Tensor]:
        """(clipped sum + noise)/(q·N) of every parameter; for dp-flora times Aᵀ.

        Args:
            sums: Clipped sums, for dp-flora times Aᵀ; what no sample reached is left out.
            std: Standard deviation of the noise of a sum.
            normal: (size, path) -> independent N(0, 1) numbers.
        """
        released: dict[str, Tensor] = {}
        for path, parameter in self._parameters.items():
            total, shape = sums.get(path), self.shape(path)
            numbers = torch.from_numpy(normal(math.prod(shape), path))
            noise = wide(numbers.to(parameter.device, _type(parameter))).view(shape) * std
            if self._fresh is not None:
                mean = self._fresh.release(_layer(path), total, noise)
            else:
                if self._records_before():
                    self.profiled = True
                    clean = torch.zeros_like(noise) if total is None else total
                    clean = (clean / self._size).to(_type(parameter))
                    cast("Any", self._denoiser).before(path, clean)
                mean = noise if total is None else total + noise
            mean = (mean / self._size).to(_type(parameter))
            if self._denoiser is not None:
                restored = self._denoiser(path, mean, std / self._size)
                if restored.shape != mean.shape:
                    raise ValueError(
                        f"The denoiser must keep the shape {tuple(mean.shape)} of {path}, got "
                        f"{tuple(restored.shape)}. The step counts, though no weight moved."
                    )
                mean = restored.to(mean.dtype)
            released[path] = mean
        return released

    def gradient(self, path: str, mean: Tensor) -> Tensor:
        """What was released of a parameter, in its shape and type."""
        if self._fresh is not None:
            mean = self._fresh.decompress(_layer(path), mean)
        parameter = self._parameters[path]
        if (mean.dtype, mean.stride()) == (parameter.dtype, parameter.stride()):
            return mean
        # As autograd does: torch's fused optimizers read both in the order of their memory.
        return torch.empty_like(parameter).copy_(mean)

    def _records_before(self) -> bool:
        return bool(getattr(self._denoiser, "before_noise", False))


def _layer(path: str) -> str:
    """Path of the FLoRA layer that the weight at ``path`` belongs to."""
    return path.rpartition("weight")[0].removesuffix(".")


def _type(parameter: Tensor) -> torch.dtype:
    """Of what is released of a parameter; sums are in double precision."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
