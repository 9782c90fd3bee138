"""Check on the real model how well the linearised story −ηs²ΣG·AᵀA describes plain SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_privacy.assess.training import loss_of
from lora_privacy.core import (
    FLoRALinear,
    GradientProbe,
    adapters,
    disagreement,
    drift,
    drift_bound,
    is_conv1d,
    predicted_update,
    sgd_step,
    snapshot,
)

if TYPE_CHECKING:
    from lora_privacy.assess.batches import TokenisedDataset
    from lora_privacy.assess.config import AssessConfig
    from lora_privacy.core import Adapter
    from lora_privacy.core.adapter import MethodName

__all__ = ["LayerDynamics", "check_dynamics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDynamics:
    """One layer after some steps of plain SGD from a fresh adapter.

    Attributes:
        layer: Name of the adapted module.
        steps: SGD steps.
        learning_rate: η.
        drift: ‖A_T − A_0‖ / ‖A_0‖ for LoRA; None where A is frozen or fresh.
        drift_bound: Proved upper bound on it from the gradients' norms; None likewise.
        disagreement: ‖ΔW_T + η s² Σ G_t AᵀA‖ / ‖ΔW_T‖, with A_0 for LoRA and LoRA-FA and A_t
            for FLoRA; 0 where no gradient arrived and nothing moved.
    """

    layer: str
    steps: int
    learning_rate: float
    drift: float | None
    drift_bound: float | None
    disagreement: float


def check_dynamics(
    model: nn.Module, train: TokenisedDataset, config: AssessConfig, *, method: MethodName
) -> tuple[LayerDynamics, ...]:
    """Take ``dynamics_steps`` SGD steps on the adapters alone and compare, a layer.

    Args:
        model: Freshly adapted; it is trained in place. Dropout is off during the check.
        train: Batches are drawn from its start in random order.
        config: Steps, rate, batch size, seed.
        method: How ``model`` was adapted.
    """
    model.eval()
    found = adapters(model)
    before = snapshot(model)
    start = {name: _added(adapter).clone() for name, adapter in found.items()}
    total = {name: torch.zeros_like(weight) for name, weight in start.items()}
    norms: dict[str, list[float]] = {name: [] for name in found}
    rng = np.random.default_rng(config.seed)
    rate = config.dynamics_learning_rate
    size = min(config.batch_size, len(train))
    with GradientProbe(model) as probe:
        for _ in tqdm(range(config.dynamics_steps), desc=f"{method}: SGD check", unit="step"):
            batch = train.batch(rng.choice(len(train), size, replace=False))
            loss_of(model, batch, config.task)[0].mean().backward()
            for name, record in probe.records.items():
                # FLoRA's A changes with the step, so its sum is taken behind the projection.
                total[name] += record.actual_update if method == "flora" else record.gradient
                norms[name].append(float(torch.linalg.matrix_norm(record.gradient, 2)))
            if method == "flora":
                sgd_step(model, rate)
            else:
                _step_factors(found, rate)
            model.zero_grad()
            probe.step()
    drifted = drift(model, before) if method == "lora" else {}
    layers = []
    for name, adapter in found.items():
        moved = _added(adapter) - start[name]
        if method == "flora":
            predicted = -rate * total[name]
        else:
            predicted = predicted_update(
                [total[name]], before.a[name], rate, scaling=adapter.scaling
            )
        layers.append(
            LayerDynamics(
                layer=name,
                steps=config.dynamics_steps,
                learning_rate=rate,
                drift=drifted.get(name),
                drift_bound=drift_bound(norms[name], rate, scaling=adapter.scaling)
                if method == "lora"
                else None,
                disagreement=disagreement(moved, predicted) if bool(moved.any()) else 0.0,
            )
        )
    return tuple(layers)


def _added(adapter: Adapter) -> Tensor:
    """What the adapter adds to the weight (LoRA), or the weight that it moves (FLoRA)."""
    if isinstance(adapter.layer, FLoRALinear):
        weight = adapter.layer.weight.detach()
        return weight.T if is_conv1d(adapter.layer.base) else weight
    return adapter.scaling * (adapter.b().detach() @ adapter.a().detach())


@torch.no_grad()
def _step_factors(found: dict[str, Adapter], rate: float) -> None:
    for adapter in found.values():
        for factor in adapter.layer.parameters():  # the base is frozen and has no gradient
            if factor.grad is not None:
                factor -= rate * factor.grad
