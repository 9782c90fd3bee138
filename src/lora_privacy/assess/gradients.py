"""Gradients of single records with respect to the weights of named layers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lora_privacy.assess.training import evaluating, loss_of, prefixed
from lora_privacy.core import FLoRALinear, LoRALinear
from lora_privacy.core.lora import dense_shape
from lora_privacy.errors import NonFiniteError
from lora_privacy.training import SampleRecorder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lora_privacy.assess.batches import TokenisedDataset
    from lora_privacy.assess.config import Task
    from lora_privacy.core import CachedPrefix

__all__ = ["sample_gradients"]

Array = npt.NDArray[np.float64]

_MICRO_BATCH = 16  # records whose gradients are held in both precisions


def sample_gradients(
    model: nn.Module,
    data: TokenisedDataset,
    layers: Sequence[str],
    rows: Sequence[int] | npt.NDArray[np.int64],
    task: Task,
    prefix: CachedPrefix | None = None,
) -> dict[str, Array]:
    """Gradient of each record's own loss with respect to the base weight of the named layers.

    At the model's present weights and without dropout, whatever is trained; an adapter whose B is
    0 changes nothing. The model is put back as it was: modes, gradients and what asks for them.

    Args:
        model: Plain, or adapted by ``lora_privacy.core.adapt``.
        data: Records.
        layers: Names of linear layers, or of the adapters in their place.
        rows: Positions in ``data``.
        task: What the loss is.
        prefix: Cached frozen blocks, below all of ``layers``.

    Returns:
        Layer -> gradients (len(rows), out_features, in_features), in units of the loss over the
        weight. Eight bytes a number: name few layers.

    Raises:
        ValueError: No layer or no row.
        UnsupportedLayerError: A layer is not linear, or its samples cannot be told apart.
        NonFiniteError: A gradient holds NaN or infinity.
    """
    chosen = np.asarray(rows, np.int64)
    if not layers or not chosen.size:
        raise ValueError("layers and rows must name at least one layer and one record.")
    bases = {layer: _base_of(model, layer) for layer in layers}
    found: dict[str, list[Array]] = {layer: [] for layer in layers}
    with _asking_for(model, bases), evaluating(model), torch.enable_grad():
        for start in range(0, chosen.size, _MICRO_BATCH):
            batch = data.batch(chosen[start : start + _MICRO_BATCH])
            with SampleRecorder(model, dense=True) as recorder:
                with prefixed(prefix, batch):
                    # The sum: each record keeps the gradient of its own loss.
                    loss_of(model, batch, task)[0].sum().backward()
                recorder.check(len(batch.ids))
                for layer, (path, _) in bases.items():
                    samples: Any = recorder.taps[path].samples["weight"]
                    found[layer].append(samples.gradients.double().cpu().numpy())
    gathered = {layer: np.concatenate(parts) for layer, parts in found.items()}
    for layer, gradients in gathered.items():
        if not np.isfinite(gradients).all():
            raise NonFiniteError(f"a gradient of {layer!r} is NaN or infinite.")
    return gathered


def _base_of(model: nn.Module, layer: str) -> tuple[str, nn.Parameter]:
    """Where the recorder taps the dense weight that ``layer`` stands for, and that weight."""
    module: Any = model.get_submodule(layer)
    if isinstance(module, LoRALinear):
        layer, module = f"{layer}.base", module.base
    elif not isinstance(module, FLoRALinear):
        dense_shape(module)  # refuses what is not linear
    weight: Any = module.weight
    return layer, weight


@contextmanager
def _asking_for(model: nn.Module, bases: dict[str, tuple[str, nn.Parameter]]) -> Iterator[None]:
    """Gradients of these weights only, inside the block."""
    wanted = {id(weight) for _, weight in bases.values()}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in parameters:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, asked, gradient in parameters:
            parameter.requires_grad_(asked)
            parameter.grad = gradient
