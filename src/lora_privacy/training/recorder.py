"""Taps on the trained layers of a model: what one backward pass tells about each sample.

The weight gradient of a batch is of no use here, so it is not computed: while a tapped layer runs,
its parameters take no part in autograd, and what enters the layer is kept for the backward pass in
place of what autograd would have kept. A parameter that gets a gradient all the same was used
outside of its layer's forward pass, where no tap sees it; ``SampleRecorder.check`` refuses it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn
from torch.nn import functional

from lora_privacy.core import FLoRALinear, is_conv1d
from lora_privacy.errors import StaleParameterError, TrainingOrderError, UnsupportedLayerError
from lora_privacy.training.samples import (
    DenseSamples,
    FactoredSamples,
    Samples,
    matrix_samples,
    outer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

__all__ = ["LayerTap", "SampleRecorder", "trained_layers"]


_HALF = (torch.float16, torch.bfloat16)


class _Tap(torch.autograd.Function):
    """Identity on ``output`` that hands its gradient, with ``x``, to ``receive``."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        output: Tensor,
        x: Tensor,
        anchor: Tensor,  # noqa: ARG004 - makes the output part of autograd where nothing before is
        receive: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        # Through autograd's own storage, so that gradient checkpointing drops and redraws it.
        ctx.save_for_backward(x)
        ctx.receive = receive
        if output._is_view():
            # Not view_as: a view that a Function returns allows no in-place activation.
            return output.data
        # In place, so that a following in-place activation is allowed.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (x,), (grad,) = ctx.saved_tensors, grads
        ctx.receive(x, grad)
        return grad, None, None, None


@dataclass(slots=True, eq=False)
class LayerTap:
    """Per-sample gradients of the trained parameters of one layer in the present pass.

    Attributes:
        name: Path of the layer in the model.
        module: The layer.
        parameters: Name in the layer (``"weight"``, ``"bias"``) -> trained parameter.
        dense: Whether matrices are formed whatever their size.
        samples: Name in the layer -> gradients so far; empty before a backward pass.
    """

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    dense: bool = False
    samples: dict[str, Samples] = field(default_factory=dict)
    paused: list[nn.Parameter] = field(default_factory=list)

    def resume(self) -> bool:
        """Let the parameters ask for gradients again; say whether any was paused."""
        live = bool(self.paused)
        while self.paused:
            self.paused.pop().requires_grad_(True)
        return live

    @property
    def batch_size(self) -> int | None:
        """Samples of the pass; None before it."""
        for samples in self.samples.values():
            if isinstance(samples, FactoredSamples):
                return samples.pairs[0][0].shape[0]
            return cast("DenseSamples", samples).gradients.shape[0]
        return None

    def current(self) -> dict[str, nn.Parameter]:
        """The parameters that the layer has now under the names of the trained ones."""
        if isinstance(self.module, FLoRALinear):
            return {"weight": self.module.weight}
        return {name: getattr(self.module, name) for name in self.parameters}

    def path(self, name: str) -> str:
        """Path in the model of a trained parameter; a FLoRA weight goes by that of its layer."""
        return f"{self.name}.{name}" if self.name else name

    def layout(self, name: str, gradient: Tensor) -> Tensor:
        """``gradient`` of a matrix (out, in), or of a vector, as the parameter stores it."""
        if name == "weight" and _is_transposed(self.module):
            return gradient.T
        return gradient

    def square_norms(self) -> Tensor:
        """‖G_i‖² over the parameters of the layer, (batch,)."""
        return torch.stack([s.square_norms() for s in self.samples.values()]).sum(0)

    def receive(self, x: Tensor, g: Tensor) -> None:
        """Take what entered the layer and the gradient of what left it."""
        # Under autocast products would be rounded to half precision, norms among them.
        with torch.autocast(x.device.type, enabled=False):
            self._receive(_full(x), _full(g))

    def _receive(self, x: Tensor, g: Tensor) -> None:
        if x.dim() < 2 or x.shape[:-1] != g.shape[:-1]:
            raise UnsupportedLayerError(
                f"{self.name!r} got an input of shape {tuple(x.shape)} for an output of shape "
                f"{tuple(g.shape)}; the first dimension must count the samples."
            )
        if self.batch_size not in (None, x.shape[0]):
            raise UnsupportedLayerError(
                f"{self.name!r} was called with {self.batch_size} and then with {x.shape[0]} "
                "samples in one pass, so they cannot be told apart."
            )
        if isinstance(self.module, nn.LayerNorm):
            shape = self.module.normalized_shape
            start = x.dim() - len(shape)
            if start < 1:
                raise UnsupportedLayerError(
                    f"{self.name!r} normalizes over all of its input's shape {tuple(x.shape)}; "
                    "the first dimension must count the samples."
                )
            if "weight" in self.parameters:
                x = functional.layer_norm(x, shape, None, None, self.module.eps)
                self._add("weight", _reduce(g * x, start))
            if "bias" in self.parameters:
                self._add("bias", _reduce(g, start))
            return
        if "bias" in self.parameters:
            self._add("bias", _reduce(g, g.dim() - 1))
        if "weight" in self.parameters:
            batch = x.shape[0]
            self._add_pair(x.reshape(batch, -1, x.shape[-1]), g.reshape(batch, -1, g.shape[-1]))

    def _add(self, name: str, gradients: Tensor) -> None:
        found = self.samples.get(name)
        if found is None:
            self.samples[name] = DenseSamples(gradients)
        else:
            cast("DenseSamples", found).add(gradients)

    def _add_pair(self, x: Tensor, g: Tensor) -> None:
        found = self.samples.get("weight")
        if found is None:
            self.samples["weight"] = matrix_samples(x, g, dense=self.dense)
        elif isinstance(found, FactoredSamples):
            found.add(x, g)
        else:
            cast("DenseSamples", found).add(outer(x, g))


class SampleRecorder:
    """Record per-sample gradients of all trained parameters, for as long as it is installed.

    Args:
        model: Its trained parameters must all belong to ``nn.Linear``, transformers' Conv1D,
            ``nn.LayerNorm`` or ``FLoRALinear`` layers, none to two of them.
        dense: Hold every gradient as a matrix, for a transform that reads them.

    Attributes:
        taps: Path of the layer -> its tap, in the order of the model.

    Raises:
        UnsupportedLayerError: A trained parameter belongs to another kind of layer, or to two.
    """

    def __init__(self, model: nn.Module, *, dense: bool = False) -> None:
        self.taps: dict[str, LayerTap] = trained_layers(model)
        self._model = model
        for tap in self.taps.values():
            tap.dense = dense
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for tap in self.taps.values():
            self._handles += _install(tap)
        return self

    def __exit__(self, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        for tap in self.taps.values():
            tap.resume()  # an interrupt calls no hook

    @property
    def recorded(self) -> bool:
        """Whether a backward pass has reached a layer since ``clear``."""
        return any(tap.samples for tap in self.taps.values())

    def check(self, batch_size: int) -> None:
        """See that all layers tell of ``batch_size`` samples, and that none was bypassed.

        Raises:
            TrainingOrderError: No backward pass was recorded.
            UnsupportedLayerError: A layer saw another number of samples, or a parameter was used
                outside of its layer's forward pass.
            StaleParameterError: A layer has another parameter than at the start.
        """
        if not self.recorded:
            raise TrainingOrderError(
                "No backward pass reached a trained layer since the last batch. Call "
                "loss.backward() on the loss of this batch, with the model that make_private "
                "returned, in training mode."
            )
        for name, tap in self.taps.items():
            if tap.batch_size not in (None, batch_size):
                raise UnsupportedLayerError(
                    f"{name!r} saw {tap.batch_size} samples of a batch of {batch_size}: the first "
                    "dimension of its input must count the samples. Layers that join samples "
                    "(packing, flattened tokens, routing) have no per-sample gradients."
                )
            current = tap.current()
            for key, parameter in tap.parameters.items():
                if current[key] is not parameter:
                    raise StaleParameterError(
                        f"{name}.{key} is another parameter than when the training was made "
                        "private, so the optimizer would move a copy that the model does not "
                        "use. Move or convert the model first and call make_private then."
                    )
                if parameter.dtype in _HALF:
                    raise UnsupportedLayerError(
                        f"{name}.{key} was converted to {parameter.dtype}, in which most steps "
                        "are lost to rounding. Train it in float32."
                    )
                if parameter.grad is not None:
                    raise UnsupportedLayerError(
                        f"{name}.{key} got a gradient outside of its layer's forward pass, where "
                        "samples cannot be told apart: the weight is shared, or used directly."
                    )
        self.check_trained()

    def check_trained(self) -> None:
        """See that nothing else of the model is trained, such as a layer unfrozen meanwhile.

        Raises:
            UnsupportedLayerError: A parameter without a tap asks for a gradient.
        """
        tapped = {id(p) for tap in self.taps.values() for p in tap.parameters.values()}
        if all(id(p) in tapped for p in self._model.parameters() if p.requires_grad):
            return
        path = next(
            path
            for path, p in self._model.named_parameters()
            if p.requires_grad and id(p) not in tapped
        )
        raise UnsupportedLayerError(
            f"{path!r} asks for a gradient, but did not when the training was made private: it "
            "would be trained without clip and noise. Freeze it again (peft's disable_adapter() "
            "unfreezes A when it ends), or choose what is trained before make_private."
        )

    def clear(self) -> None:
        """Forget the present pass."""
        for tap in self.taps.values():
            tap.samples = {}


def trained_layers(model: nn.Module) -> dict[str, LayerTap]:
    """Path -> tap of every layer that owns a trained parameter.

    Raises:
        UnsupportedLayerError: As for ``SampleRecorder``.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(path)
    taps: dict[str, LayerTap] = {}
    inside_flora: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, FLoRALinear):
            inside_flora |= {id(p) for p in module.parameters()}
            if module.weight.requires_grad:
                taps[path] = LayerTap(path, module, {"weight": module.weight})
            continue
        own = {
            key: parameter
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and id(parameter) not in inside_flora
        }
        if not own:
            continue
        if not _is_supported(module) or not own.keys() <= {"weight", "bias"}:
            raise UnsupportedLayerError(
                f"The trained parameters of {path or 'the model itself'!r} "
                f"({type(module).__name__}: {', '.join(own)}) have no per-sample gradients here: "
                "nn.Linear, Conv1D and nn.LayerNorm have. Freeze them by requires_grad_(False)."
            )
        for key, parameter in own.items():
            if parameter.dtype in _HALF:
                raise UnsupportedLayerError(
                    f"{path}.{key} is trained in {parameter.dtype}, in which most steps are lost "
                    "to rounding. Train it in float32; a frozen base may stay as it is."
                )
            if len(owners[id(parameter)]) > 1:
                raise UnsupportedLayerError(
                    f"{path}.{key} is shared ({', '.join(owners[id(parameter)])}): a sample's "
                    "gradient is a sum over its uses. Untie or freeze it."
                )
        taps[path] = LayerTap(path, module, own)
    if not taps:
        raise UnsupportedLayerError(
            "The model has no trained parameter; call adapt(model, …) or requires_grad_(True)."
        )
    return taps


def _is_supported(module: nn.Module) -> bool:
    """By the forward pass itself: a subclass that replaces it may compute anything."""
    if "forward" in vars(module):
        return False
    if is_conv1d(module):
        # From its module, which is imported: the model holds an instance.
        known = next(t for t in type(module).__mro__ if t.__name__ == "Conv1D")
        return type(module).forward is known.forward
    return type(module).forward in (nn.Linear.forward, nn.LayerNorm.forward)


def _is_transposed(module: nn.Module) -> bool:
    base = module.base if isinstance(module, FLoRALinear) else module
    return is_conv1d(base)


def _install(tap: LayerTap) -> list[RemovableHandle]:
    anchor = next(iter(tap.parameters.values()))

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
        if module is not tap.module:
            raise UnsupportedLayerError(
                f"{tap.name!r} was copied with its hooks, as copy.deepcopy does, and the copy "
                "would enter the gradients of the original. Call close() before copying."
            )
        if torch.is_grad_enabled():
            tap.paused.extend(p for p in tap.parameters.values() if p.requires_grad)
            for parameter in tap.paused:
                parameter.requires_grad_(False)

    def after(
        module: nn.Module,  # noqa: ARG001
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor | None,
    ) -> Tensor | None:
        live = tap.resume()
        if output is None or not live:  # the layer raised, or nothing is to be learned
            return output
        x = args[0] if args else next(iter(kwargs.values()))
        return cast("Tensor", _Tap.apply(output, x.detach(), anchor, tap.receive))

    return [
        # Before those of a recorder that is installed already, which then sees nothing paused and
        # leaves this pass to the newer one: a trial during a training stays out of it.
        tap.module.register_forward_pre_hook(before, prepend=True),
        # First of all hooks: another one may change the output, and that is no part of the layer.
        tap.module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True),
    ]


def _full(tensor: Tensor) -> Tensor:
    """At least float32: squares of half-precision numbers overflow."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def _reduce(tensor: Tensor, start: int) -> Tensor:
    """Sum over the positions between the batch and dimension ``start``."""
    return tensor.sum(tuple(range(1, start))) if start > 1 else tensor
