"""Steps of a model with FLoRA layers, in two ways that are not the same mechanism.

*Accumulation* compresses the gradient of every cycle with that cycle's A (``sgd_step``, or
``decompress`` and a dense optimiser, then ``refresh``): a cycle of one batch and
``resample_every=1`` is a fresh A each step. *Momentum* (``FLoRAMomentum``) carries one compressed
average from projection to projection.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_privacy import _validate
from lora_privacy.core.flora import FLoRALinear, check_finite
from lora_privacy.errors import LoraPrivacyError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FLoRAMomentum", "decompress", "flora_layers", "refresh", "sgd_step"]


class FLoRAMomentum:
    """SGD whose momentum is kept compressed: C ← β C + (1 − β) s G Aᵀ, W ← W − lr s C A.

    After every ``resample_every`` steps (that of the layers) A changes and the momentum moves
    along, ``C ← (C A_old) A_newᵀ``. **This is not a fresh projection of the gradient**: a
    gradient was compressed by the A of its own step, and what is applied later has gone through
    every projection since. No statement about a fresh A each step covers this use.

    Args:
        model: A model with FLoRA layers; only they are stepped.
        lr: Learning rate, > 0.
        momentum: β, in [0, 1).

    Raises:
        ValueError: An argument is out of range.
        LoraPrivacyError: The model has no FLoRA layer.

    References:
        Hao, Cao & Mou, ICML 2024, arXiv:2402.03293, Algorithm 2.
    """

    def __init__(self, model: nn.Module, lr: float, momentum: float = 0.9) -> None:
        _validate.positive("lr", lr)
        _validate.half_open("momentum", momentum, 0.0, 1.0, "1 would ignore every gradient.")
        self.lr: float = lr
        self.momentum: float = momentum
        self._layers = flora_layers(model)
        self._state: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Take one step with the accumulated gradients and end the cycle of every layer.

        Raises:
            NonFiniteError: A gradient holds NaN or infinity; no layer was moved.
        """
        _check_gradients(self._layers)
        for name, layer in self._layers.items():
            grad = layer.expand.weight.grad
            if grad is not None:
                old = self._state.get(name, torch.zeros_like(grad))
                self._state[name] = old.lerp(grad, 1.0 - self.momentum)
            if name in self._state:
                layer.fold(-self.lr * layer.scaling * self._state[name])
            before, a_old = layer.projection_step, layer.a()
            layer.refresh()
            if name in self._state and layer.projection_step != before:
                # (C A_old) A_newᵀ without the (out, in) product in the middle.
                self._state[name] = self._state[name] @ (a_old @ layer.a().T)

    def state_dict(self) -> dict[str, Tensor]:
        """Layer name -> compressed momentum (out_features, rank)."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the momentum of ``state_dict``; ValueError when a layer or a shape is foreign."""
        for name, value in state.items():
            if name not in self._layers or value.shape != self._layers[name].expand.weight.shape:
                raise ValueError(f"No FLoRA layer {name!r} with momentum {tuple(value.shape)}.")
        self._state = {name: value.clone() for name, value in state.items()}


def flora_layers(model: nn.Module) -> dict[str, FLoRALinear]:
    """Module path -> FLoRA layer.

    Raises:
        LoraPrivacyError: There is none.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, FLoRALinear)
    }
    if not layers:
        raise LoraPrivacyError("The model has no FLoRA layer; adapt(…, method='flora') first.")
    return layers


def decompress(model: nn.Module) -> None:
    """``FLoRALinear.decompress`` on every FLoRA layer: before ``optimizer.step()``."""
    for layer in flora_layers(model).values():
        layer.decompress()


def refresh(model: nn.Module) -> None:
    """``FLoRALinear.refresh`` on every FLoRA layer: after ``optimizer.step()``."""
    for layer in flora_layers(model).values():
        layer.refresh()


def sgd_step(model: nn.Module, lr: float) -> None:
    """Move every FLoRA weight by ``-lr s² G AᵀA`` and end the cycle; nothing else is stepped.

    Raises:
        ValueError: ``lr`` is not positive and finite.
        NonFiniteError: A gradient holds NaN or infinity; no layer was moved.
    """
    _validate.positive("lr", lr)
    layers = flora_layers(model)
    _check_gradients(layers)
    for layer in layers.values():
        grad = layer.expand.weight.grad
        if grad is not None:
            layer.fold(-lr * layer.scaling * grad)
        layer.refresh()


def _check_gradients(layers: dict[str, FLoRALinear]) -> None:
    """Look at all layers before any is moved."""
    for name, layer in layers.items():
        if layer.expand.weight.grad is not None:
            check_finite(f"The gradient of {name!r}", layer.expand.weight.grad)
