"""Clipping: how much of each sample's gradient enters the sum, and how far one sample moves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import nn

from lora_privacy import _validate
from lora_privacy.errors import IsolationError, NonFiniteError
from lora_privacy.training.samples import DenseSamples

if TYPE_CHECKING:
    from torch import Tensor

    from lora_privacy.training.recorder import LayerTap, SampleRecorder

__all__ = [
    "AutomaticClipping",
    "Clipping",
    "ClippingName",
    "FlatClipping",
    "LayerClipping",
    "RowScaling",
    "Transform",
    "clipped_sums",
    "clipping_of",
    "sample_norms",
]

ClippingName = Literal["flat", "per-layer", "automatic"]
_STABILITY = 0.01  # γ of Bu et al., their default
_LEAST_NORM = 1e-8

Transform = Callable[[str, "Tensor"], "Tensor"]
"""(name of a parameter, gradients (batch, *shape)) -> gradients of the same shape.

It is called before the clip, for one parameter at a time, and must treat each sample by itself.
A matrix comes as (batch, out, in) for every kind of layer.
"""


class Clipping(Protocol):
    """A rule for the weight of each sample."""

    @property
    def sensitivity(self) -> float:
        """Largest Frobenius norm that one sample can add to the sum over all parameters."""
        ...

    def weights(self, square_norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Layer -> weight of each sample, (batch,); ``square_norms`` has ‖G_i‖² by layer."""
        ...


@dataclass(frozen=True, slots=True)
class FlatClipping:
    """One clip of the whole gradient: weight ``min(1, C/‖G_i‖)``.

    Args:
        max_grad_norm: C >= 1e-8, in units of the gradient; ``inf`` clips nothing, for tests.
    """

    max_grad_norm: float

    def __post_init__(self) -> None:
        _check_norm(self.max_grad_norm)

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.max_grad_norm

    def weights(self, square_norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same weights for every layer."""
        norms = torch.stack(list(square_norms.values())).sum(0).sqrt()
        return dict.fromkeys(square_norms, _share(self.max_grad_norm, norms))


@dataclass(frozen=True, slots=True)
class LayerClipping:
    """A clip C_l for each layer; one sample moves the sum by at most √ΣC_l².

    Args:
        max_grad_norms: Path of a layer -> C_l >= 1e-8.
    """

    max_grad_norms: Mapping[str, float]

    def __post_init__(self) -> None:
        for norm in self.max_grad_norms.values():
            _check_norm(norm)

    @property
    def sensitivity(self) -> float:
        """√ΣC_l²."""
        return math.hypot(*self.max_grad_norms.values())

    def weights(self, square_norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each layer's own weights."""
        return {
            name: _share(self.max_grad_norms[name], square.sqrt())
            for name, square in square_norms.items()
        }


@dataclass(frozen=True, slots=True)
class AutomaticClipping:
    """Every gradient brought close to norm C: weight ``C/(‖G_i‖ + γ)``, which is always a clip.

    Args:
        max_grad_norm: C > 0.
        stability: γ > 0, in units of the gradient.

    References:
        Bu, Wang, Zha & Karypis, arXiv:2206.07136 (AUTO-S).
    """

    max_grad_norm: float
    stability: float = _STABILITY

    def __post_init__(self) -> None:
        _validate.positive("max_grad_norm", self.max_grad_norm)
        _validate.positive("stability", self.stability)

    @property
    def sensitivity(self) -> float:
        """C."""
        return self.max_grad_norm

    def weights(self, square_norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same weights for every layer."""
        norms = torch.stack(list(square_norms.values())).sum(0).sqrt()
        return dict.fromkeys(square_norms, self.max_grad_norm / (norms + self.stability))


@dataclass(frozen=True, slots=True)
class RowScaling:
    """P1's gradient scaling, a ``Transform``: each row of a matrix gradient gets norm ``norm``.

    On B of a LoRA-FA layer the rows are ``s q Aᵀ``, with q a row of the full gradient. A row that
    is 0 stays 0, and vectors (biases, norms) stay as they are. The scaled q depends on A: the
    moments of theory 2.1 no longer hold exactly, and a fresh projection no longer amplifies.

    Args:
        norm: c > 0, in units of the gradient.

    References:
        arXiv:2409.17538, Section 5.1 (an idea there; no guarantee follows from it).
    """

    norm: float

    def __post_init__(self) -> None:
        _validate.positive("norm", self.norm)

    def __call__(self, name: str, gradients: Tensor) -> Tensor:  # noqa: ARG002
        """Scale the rows of ``gradients`` (batch, out, in)."""
        if gradients.dim() != 3:
            return gradients
        norms = torch.linalg.vector_norm(gradients, dim=2, keepdim=True)
        return gradients * torch.where(norms > 0, self.norm / norms, 0.0)


def clipping_of(
    name: ClippingName, max_grad_norm: float | Mapping[str, float], layers: list[str]
) -> Clipping:
    """The rule that ``make_private`` was asked for.

    A single C under ``"per-layer"`` is shared out evenly, C_l = C/√L, so that C stays the
    sensitivity.

    Raises:
        ValueError: The name is unknown, a norm is out of range, or the layers are others.
    """
    _validate.choice("clipping", name, ("flat", "per-layer", "automatic"))
    if isinstance(max_grad_norm, Mapping):
        if name != "per-layer":
            raise ValueError(
                f"One max_grad_norm a layer needs clipping='per-layer', got {name!r}."
            )
        if set(max_grad_norm) != set(layers):
            raise ValueError(
                f"max_grad_norm must name exactly the trained layers {layers}, got "
                f"{list(max_grad_norm)}."
            )
        norms = {layer: float(norm) for layer, norm in max_grad_norm.items()}
        for layer, norm in norms.items():
            _validate.positive(f"max_grad_norm of {layer!r}", norm)
        return LayerClipping(norms)
    max_grad_norm = float(max_grad_norm)
    _validate.positive("max_grad_norm", max_grad_norm)
    if name == "per-layer":
        return LayerClipping(dict.fromkeys(layers, max_grad_norm / math.sqrt(len(layers))))
    if name == "automatic":
        return AutomaticClipping(max_grad_norm)
    return FlatClipping(max_grad_norm)


def apply_transform(recorder: SampleRecorder, transform: Transform, scale: float) -> None:
    """Replace every recorded gradient, times ``scale``, by its transform.

    Raises:
        ValueError: The transform changed a shape.
        IsolationError: The result of a sample depends on the other samples.
    """
    for name, tap in recorder.taps.items():
        for key, samples in tap.samples.items():
            assert isinstance(samples, DenseSamples)  # a recorder for a transform holds no other
            # A norm over several dimensions is a vector, too.
            vector = isinstance(tap.module, nn.LayerNorm)
            before = (samples.gradients.flatten(1) if vector else samples.gradients) * scale
            after = transform(f"{name}.{key}", before)
            if after.shape != before.shape:
                raise ValueError(
                    f"transform must keep the shape {tuple(before.shape)} of {name}.{key}, got "
                    f"{tuple(after.shape)}."
                )
            for row in (slice(i, i + 1) for i in range(len(before))):
                alone = transform(f"{name}.{key}", before[row])
                if not torch.allclose(after[row], alone, rtol=1e-4, atol=0, equal_nan=True):
                    raise IsolationError(
                        f"transform gives a sample another gradient of {name}.{key} when it comes "
                        "alone: it must treat each sample by itself, for the clip after it to "
                        "bound what one sample does."
                    )
            samples.gradients = after.reshape_as(samples.gradients)


def sample_norms(recorder: SampleRecorder, scale: float = 1.0) -> dict[str, Tensor]:
    """Layer -> ‖scale · G_i‖², (batch,), of the layers that the pass reached.

    Raises:
        NonFiniteError: A gradient holds NaN or infinity.
    """
    found = {
        name: tap.square_norms() * scale**2 for name, tap in recorder.taps.items() if tap.samples
    }
    if not bool(torch.isfinite(torch.stack(list(found.values()))).all()):
        raise NonFiniteError(
            "The gradient of a sample holds NaN or infinity, or its norm overflows; nothing was "
            "released. Look at the loss and the data, or lower the learning rate."
        )
    return found


def clipped_sums(
    recorder: SampleRecorder,
    clipping: Clipping,
    *,
    scale: float = 1.0,
    transform: Transform | None = None,
    reduce: Callable[[LayerTap, str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Path of a parameter -> Σ_i w_i G_i over the recorded pass, w_i as ``clipping`` says.

    Args:
        recorder: Holds a pass.
        clipping: The rule.
        scale: What turns a recorded gradient into that of the sample's own loss: the batch size
            when the loss is a mean over samples.
        transform: Called before the clip; the recorder must be ``dense``.
        reduce: How a parameter's samples are summed, ``(tap, name in the layer, weights)``; the
            default sums them as they are, in the layout of the parameter.

    Raises:
        NonFiniteError: A gradient holds NaN or infinity.
    """
    if transform is not None:
        apply_transform(recorder, transform, scale)
        scale = 1.0
    weights = clipping.weights(sample_norms(recorder, scale))
    reduce = _weighted_sum if reduce is None else reduce
    return {
        tap.path(key): reduce(tap, key, weights[name] * scale)
        for name, tap in recorder.taps.items()
        for key in tap.samples
    }


def _weighted_sum(tap: LayerTap, key: str, weights: Tensor) -> Tensor:
    """Σ weights_i G_i of one parameter, in its layout."""
    return tap.layout(key, tap.samples[key].weighted(weights))


def _share(limit: float, norms: Tensor) -> Tensor:
    return (limit / norms).clamp(max=1.0)  # 0 and inf: a gradient of 0, which any weight keeps


def _check_norm(norm: float) -> None:
    if not norm > 0:
        raise ValueError(f"max_grad_norm must be positive, got {norm!r}.")
    if norm < _LEAST_NORM:
        raise ValueError(
            f"max_grad_norm must be at least {_LEAST_NORM:g}, got {norm!r}: squares of gradients "
            "so small vanish in single precision, and would pass unclipped. Scale the loss up."
        )
