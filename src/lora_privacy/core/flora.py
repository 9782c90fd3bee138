"""FLoRA on one linear map: trained in full, through gradients that a projection compresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lora_privacy import _validate
from lora_privacy.core.lora import check_base, is_conv1d, thin_linear
from lora_privacy.errors import LoraPrivacyError, NonFiniteError, UnsupportedLayerError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_privacy.core.projection import RandomProjection

__all__ = ["FLoRALinear", "check_dense", "check_finite"]


class FLoRALinear(nn.Module):
    """A linear map trained in full through gradients compressed to ``s G Aᵀ``, s = alpha/rank.

    The forward pass is ``base(x) + s B (A x)`` with B = 0: autograd leaves ``s G Aᵀ``, of shape
    (out_features, rank), in the gradient of B (``expand.weight``), summed over micro-batches,
    and never forms G, the gradient of the weight. B itself must stay 0; an optimiser that moves
    it is reported at the next forward pass, or (fused, on a GPU) at the end of the cycle.

    The trained weight is ``weight``. For a float32 or float64 base it is the base's own
    parameter. For a half-precision base it is a float32 master, ``master``, from which the base
    is rounded after every fold and at every refresh: folding small steps into bf16 itself
    would keep nothing. ``weight`` asks for a gradient, so that optimisers find it, but gets one
    from ``decompress`` only (under DistributedDataParallel it is an unused parameter).

    A cycle is: backward passes; then ``fold(-lr * s * B.grad)`` or ``decompress()`` and a step
    of any dense optimiser on ``weight``; then ``refresh()``. A of cycle c is
    ``projection.matrix(c // resample_every)``: drawn on demand and kept for the cycle, never
    part of the state dict. The number of the cycle is, as extra state, so that a resumed run
    does not meet the same matrices again.

    Folded factors are kept on the CPU as long as they are smaller than the weight, and let
    ``save_flora`` write factors and seeds in place of the weight.

    Args:
        base: ``nn.Linear`` or transformers' Conv1D with floating-point weights; its parameters
            are frozen in place, but for the weight of a float32 or float64 base.
        rank: Rows of A, at least 1.
        alpha: Numerator of the scaling, > 0; ``alpha = rank`` gives s = 1.
        projection: Law and seed of A, of shape (rank, in_features).
        resample_every: Cycles that share one A, at least 1.

    Shape:
        input ``(..., in_features)``, output ``(..., out_features)``; ``weight`` has the layout
        of the base: (out, in) for ``nn.Linear``, (in, out) for Conv1D.

    Raises:
        ValueError: An argument is out of range, or ``projection`` has another shape.
        UnsupportedLayerError: ``base`` is no supported linear map, or quantised.

    References:
        Hao, Cao & Mou, ICML 2024, arXiv:2402.03293, Algorithm 1; docs/theory/dynamics.md.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        projection: RandomProjection,
        resample_every: int = 1,
    ) -> None:
        super().__init__()
        linear, out_features, in_features = check_base(base, rank, alpha, projection)
        self.resample_every: int = _validate.integer("resample_every", resample_every, 1)
        check_dense(base)
        self.in_features: int = in_features
        self.out_features: int = out_features
        self.rank: int = projection.rank
        self.alpha: float = float(alpha)
        self.scaling: float = self.alpha / self.rank
        self.projection: RandomProjection = projection
        self.base: nn.Linear = linear.requires_grad_(False)
        self.expand: nn.Linear = thin_linear(rank, out_features, linear)
        self.master: nn.Parameter | None = None
        if linear.weight.dtype == self.expand.weight.dtype:
            linear.weight.requires_grad_(True)
        else:
            self.master = nn.Parameter(linear.weight.detach().to(self.expand.weight.dtype))
        self._cycle = 0
        self._a: tuple[tuple[int, torch.dtype, torch.device], Tensor] | None = None
        self._factors: dict[int, Tensor] | None = {}  # None: the weight moved otherwise
        self._weight_version = self.weight._version
        self._probe_version = self.expand.weight._version
        self.train(base.training)

    @property
    def weight(self) -> nn.Parameter:
        """The trained weight, in the layout of the base."""
        return cast("nn.Parameter", self.base.weight) if self.master is None else self.master

    @property
    def bias(self) -> Tensor | None:
        """Bias of the base."""
        return self.base.bias

    @property
    def cycle(self) -> int:
        """Cycles ended so far."""
        return self._cycle

    @property
    def projection_step(self) -> int:
        """Step of the projection in use."""
        return self._cycle // self.resample_every

    def a(self) -> Tensor:
        """A of this cycle (rank, in_features), in the type of B and on its device."""
        like, step = self.expand.weight, self.projection_step
        key = (step, like.dtype, like.device)
        if self._a is None or self._a[0] != key:
            self._a = (key, self.projection.matrix(*key))
        return self._a[1]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x``.

        Raises:
            LoraPrivacyError: B has been moved, by an optimiser step without ``decompress``.
        """
        probe = self.expand.weight
        # Fused optimisers do not move the version, and off the CPU reading the value would wait
        # for the device in every layer: there fold, decompress and refresh look once a cycle.
        if probe._version != self._probe_version or probe.device.type == "cpu":
            self._check_probe()
        weight = self.base.weight.detach()
        if is_conv1d(self.base):
            result = torch.nn.functional.linear(x, weight.T, self.bias)
        else:
            result = torch.nn.functional.linear(x, weight, self.bias)
        if not (probe.requires_grad and torch.is_grad_enabled()):
            return result  # the other branch adds 0, for the sake of its gradient only
        compressed = torch.nn.functional.linear(x.to(probe.dtype), self.a()) * self.scaling
        return (result + self.expand(compressed)).to(result.dtype)

    def _check_probe(self) -> None:
        # The version moves with harmless writes too, such as loading a state dict.
        probe = self.expand.weight
        if bool(probe.detach().any()):
            raise LoraPrivacyError(
                "B of a FLoRA layer must stay 0, but something moved it. Call decompress(model) "
                "before optimizer.step(), or use sgd_step; set expand.weight to 0 to go on."
            )
        self._probe_version = probe._version

    def _check_state(self) -> None:
        self._check_probe()
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise LoraPrivacyError(
                f"The trained weight was cast to {self.weight.dtype}, in which small steps are "
                "lost. Cast the model first and adapt it then: a float32 master is kept."
            )

    @torch.no_grad()
    def fold(self, factor: Tensor) -> None:
        """Add ``factor @ A`` to the weight and clear the gradient of B.

        Plain SGD is ``factor = -lr * scaling * expand.weight.grad``, which moves the weight by
        ``-lr s² G AᵀA``.

        Args:
            factor: Shape (out_features, rank), in units of the weight.

        Raises:
            ValueError: ``factor`` has another shape.
            LoraPrivacyError: B is not 0, or the weight was cast to half precision.
            NonFiniteError: The factor holds NaN or infinity; the weight is unchanged.
        """
        if factor.shape != self.expand.weight.shape:
            raise ValueError(
                f"factor must have shape {tuple(self.expand.weight.shape)}, got "
                f"{tuple(factor.shape)}."
            )
        self._check_state()
        check_finite("The factor to fold", factor)
        factor = factor.to(self.expand.weight)
        self._log(factor)
        self.weight.add_(self._layout(factor @ self.a()))
        self._weight_version = self.weight._version
        self._round()
        self.expand.weight.grad = None

    @torch.no_grad()
    def decompress(self) -> None:
        """Set ``weight.grad`` to ``s · B.grad A``, which is ``s² G AᵀA``; clear that of B.

        A layer that no backward pass reached gets no gradient.

        Raises:
            LoraPrivacyError: As for ``fold``.
            NonFiniteError: The gradient holds NaN or infinity.
        """
        self._check_state()
        self._factors = None  # a dense optimiser is about to move the weight
        grad = self.expand.weight.grad
        if grad is None:
            self.weight.grad = None
            return
        check_finite("The compressed gradient", grad)
        self.weight.grad = self._layout(grad @ self.a() * self.scaling).contiguous()
        self.expand.weight.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """End a cycle: round the base from its master, and go on to the next A.

        Raises:
            LoraPrivacyError: A compressed gradient is pending; under another A it means nothing.
                Also as for ``fold``.
        """
        self._check_state()
        grad = self.expand.weight.grad
        if grad is not None and bool(grad.any()):
            raise LoraPrivacyError(
                "refresh() would change A under a gradient that was not used; fold or "
                "decompress it first, or set expand.weight.grad to None to drop it."
            )
        self._round()
        self._cycle += 1

    def factors(self) -> dict[int, Tensor] | None:
        """Step of A -> sum of the factors folded with it; None when they do not say it all.

        They do not when something else moved the weight, or when they outgrew it.
        """
        if self.weight._version != self._weight_version:
            self._factors = None
        return None if self._factors is None else dict(self._factors)

    def _log(self, factor: Tensor) -> None:
        kept, step = self.factors(), self.projection_step
        if kept is None:
            return
        kept[step] = kept[step] + factor.cpu() if step in kept else factor.cpu().clone()
        grown = len(kept) * factor.numel() * factor.element_size()
        smaller = grown < self.base.weight.numel() * self.base.weight.element_size()
        self._factors = kept if smaller else None

    def _layout(self, dense: Tensor) -> Tensor:
        return dense.T if is_conv1d(self.base) else dense

    def _round(self) -> None:
        if self.master is not None:
            self.base.weight.copy_(self.master)

    def get_extra_state(self) -> Tensor:
        """Number of the cycle, as a tensor, which every checkpoint format can hold."""
        return torch.tensor(self._cycle)

    def set_extra_state(self, state: Any) -> None:  # noqa: ANN401 - torch's signature
        """Take the number of the cycle from a state dict."""
        self._cycle = _validate.integer("cycle", int(state), 0)

    def extra_repr(self) -> str:
        """Shape, scaling and period."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, scaling={self.scaling:g}, resample_every={self.resample_every}"
        )


def check_dense(base: nn.Module) -> None:
    """Raise UnsupportedLayerError unless ``base`` keeps its weight as a plain matrix."""
    dtype = cast("nn.Linear", base).weight.dtype
    if not dtype.is_floating_point or not (type(base) is nn.Linear or is_conv1d(base)):
        raise UnsupportedLayerError(
            f"FLoRA trains the dense weight; {type(base).__name__} of type {dtype} has none. "
            "Load the model unquantised."
        )


def check_finite(what: str, tensor: Tensor) -> None:
    """Raise NonFiniteError where ``tensor`` holds NaN or infinity; ``what`` names it."""
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(
            f"{what} holds NaN or infinity; lower the learning rate or look at the loss."
        )
