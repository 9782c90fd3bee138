"""LoRA and LoRA-FA on one linear map."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lora_privacy import _validate
from lora_privacy.errors import LoraPrivacyError, NonFiniteError, UnsupportedLayerError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_privacy.core.projection import RandomProjection

__all__ = ["LoRALinear", "check_base", "dense_shape", "is_conv1d", "thin_linear"]


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, a linear map that stores Wᵀ (in, out)."""
    # By name: importing transformers to ask takes seconds, and a Conv1D needs it imported.
    return any(
        t.__name__ == "Conv1D" and t.__module__ == "transformers.pytorch_utils"
        for t in type(module).__mro__
    )


def dense_shape(base: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear map.

    Raises:
        UnsupportedLayerError: ``base`` is neither an ``nn.Linear`` nor a Conv1D.
    """
    # The out-projection of nn.MultiheadAttention is never called: an adapter on it would be
    # skipped without a word.
    if isinstance(base, nn.Linear) and not isinstance(
        base, nn.modules.linear.NonDynamicallyQuantizableLinear
    ):
        return base.out_features, base.in_features
    if is_conv1d(base):
        in_features, out_features = cast("nn.Linear", base).weight.shape
        return int(out_features), int(in_features)
    raise UnsupportedLayerError(
        f"An adapter needs an nn.Linear or a transformers Conv1D, got {type(base).__name__}; "
        "name other targets."
    )


def thin_linear(in_features: int, out_features: int, base: nn.Linear) -> nn.Linear:
    """An ``nn.Linear`` without bias beside ``base``, of weights 0.

    It has the type and device of the base, but float32 beside half-precision or packed weights.
    """
    dtype = base.weight.dtype
    dtype = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    # skip_init draws no weights: a global generator is left where it was.
    layer = cast(
        "nn.Linear",
        nn.utils.skip_init(
            nn.Linear,
            in_features,
            out_features,
            bias=False,
            dtype=dtype,
            device=base.weight.device,
        ),
    )
    nn.init.zeros_(layer.weight)
    return layer


def check_base(
    base: nn.Module, rank: int, alpha: float, projection: RandomProjection
) -> tuple[nn.Linear, int, int]:
    """Check the arguments of an adapter and return the base, its outputs and its inputs.

    The base may be a Conv1D; the type says what both have: ``weight`` and ``bias``.
    """
    rank = _validate.integer("rank", rank, 1)
    _validate.positive("alpha", alpha)
    out_features, in_features = dense_shape(base)
    if (projection.rank, projection.in_features) != (rank, in_features):
        raise ValueError(
            f"projection must have shape ({rank}, {in_features}) = (rank, in_features), got "
            f"({projection.rank}, {projection.in_features})."
        )
    return cast("nn.Linear", base), out_features, in_features


class LoRALinear(nn.Module):
    """``y = base(x) + (alpha / rank) B A x`` with a frozen base.

    A (rank, in_features) is ``project.weight`` and B (out_features, rank) is ``expand.weight``,
    weights of child ``nn.Linear`` modules without bias, so that hooks and per-sample gradients
    of other libraries find them. A starts as ``projection.matrix(0)``, B at 0. Both are float32
    beside a half-precision base, and the input is cast to them, as peft does. The module owns
    no parameter and no buffer itself.

    Args:
        base: ``nn.Linear`` or transformers' Conv1D; its parameters are frozen in place.
        rank: Rows of A, at least 1.
        alpha: Numerator of the scaling, > 0.
        projection: Law and seed of A, of shape (rank, in_features).
        train_a: Whether A is trained (LoRA) or stays as drawn (LoRA-FA).

    Shape:
        input ``(..., in_features)``, output ``(..., out_features)``.

    Raises:
        ValueError: An argument is out of range, or ``projection`` has another shape.
        UnsupportedLayerError: ``base`` is no supported linear map.

    References:
        Hu et al. (2022), arXiv:2106.09685; for LoRA-FA, Zhang et al. (2023), arXiv:2308.03303.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        projection: RandomProjection,
        train_a: bool = True,
    ) -> None:
        super().__init__()
        linear, out_features, in_features = check_base(base, rank, alpha, projection)
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.rank: int = projection.rank
        self.alpha: float = float(alpha)
        self.train_a: bool = train_a
        self.scaling: float = self.alpha / self.rank
        self.projection: RandomProjection = projection
        self.base: nn.Linear = linear.requires_grad_(False)
        self.project: nn.Linear = thin_linear(in_features, rank, linear)
        self.expand: nn.Linear = thin_linear(rank, out_features, linear)
        with torch.no_grad():
            self.project.weight.copy_(projection.matrix(0, self.project.weight.dtype))
        self.project.requires_grad_(train_a)
        self._before_merge: Tensor | None = None
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """Weight of the base; some models ask a layer for its type or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base."""
        return self.base.bias

    @property
    def merged(self) -> bool:
        """Whether the base holds the update at the moment."""
        return self._before_merge is not None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x``.

        Raises:
            LoraPrivacyError: The layer is merged and about to be trained, which would move
                nothing.
        """
        result = self.base(x)
        if self._before_merge is not None:
            if self.training and torch.is_grad_enabled() and self.expand.weight.requires_grad:
                raise LoraPrivacyError(
                    "A merged adapter gets no gradients; call unmerge() before training."
                )
            return result
        # The scaling multiplies the (..., rank) tensor, the smaller one.
        update = self.expand(self.project(x.to(self.project.weight.dtype)) * self.scaling)
        return (result + update).to(result.dtype)

    def delta(self) -> Tensor:
        """The update ``(alpha / rank) B A``, shape (out_features, in_features)."""
        return (self.expand.weight @ self.project.weight).detach() * self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base, rounded to its type; a copy of the base is kept.

        Raises:
            LoraPrivacyError: The layer is merged already.
            UnsupportedLayerError: The base is quantised.
            NonFiniteError: The update holds NaN or infinity.
        """
        if self.merged:
            raise LoraPrivacyError("The adapter is merged already; call unmerge() first.")
        weight = self.weight
        if not weight.is_floating_point():
            raise UnsupportedLayerError(
                f"Cannot merge into a base of type {weight.dtype}; load it unquantised."
            )
        delta = self.delta()
        if not bool(torch.isfinite(delta).all()):
            raise NonFiniteError("The update B A holds NaN or infinity; nothing was merged.")
        self._before_merge = weight.clone()
        delta = delta.T if is_conv1d(self.base) else delta
        weight.copy_(weight.to(delta.dtype) + delta)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base back, bit for bit.

        Raises:
            LoraPrivacyError: The layer is not merged.
        """
        if self._before_merge is None:
            raise LoraPrivacyError("The adapter is not merged; call merge() first.")
        self.weight.copy_(self._before_merge)
        self._before_merge = None

    def extra_repr(self) -> str:
        """Shape, scaling and kind."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, scaling={self.scaling:g}, train_a={self.train_a}"
        )
