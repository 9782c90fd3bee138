"""Check on the real model how well the linearised story −ηs²ΣG·AᵀA describes plain SGD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lora_privacy.assess.training import loss_of
from lora_privacy.core import (
    Adapter,
    GradientProbe,
    adapters,
    drift,
    drift_bound,
    refresh,
    sgd_step,
    snapshot,
)

if TYPE_CHECKING:
    from lora_privacy.assess.batches import TokenisedDataset
    from lora_privacy.assess.config import AssessConfig, Method

__all__ = ["LayerDynamics", "check_dynamics"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDynamics:
    """One layer after some steps of plain SGD from a fresh adapter.

    Attributes:
        layer: Name of the adapted module.
        steps: SGD steps.
        learning_rate: η.
        drift: ‖A_T − A_0‖ / ‖A_0‖; 0 where A is frozen, NaN-free and meaningless for FLoRA (0).
        disagreement: ‖ΔW_T + η s² Σ G_t AᵀA‖ / ‖ΔW_T‖, with A_0 for LoRA and A_t for FLoRA.
        rate_times_gradient: ηL, with L the largest ‖Σ_{s<t} G_s‖₂ seen.
        drift_bound: Upper bound on ‖f_A‖₂, ``inf`` where its condition on ηL fails.
    """

    layer: str
    steps: int
    learning_rate: float
    drift: float
    disagreement: float
    rate_times_gradient: float
    drift_bound: float


def check_dynamics(
    model: nn.Module, train: TokenisedDataset, config: AssessConfig, *, method: Method
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
    start = {name: _weight(adapter, method).clone() for name, adapter in found.items()}
    first_a = {name: adapter.a().clone() for name, adapter in found.items()}
    total = {name: torch.zeros_like(start[name]) for name in found}
    predicted = {name: torch.zeros_like(start[name]) for name in found}
    largest = dict.fromkeys(found, 0.0)
    rng = np.random.default_rng(config.seed)
    rate = config.dynamics_learning_rate
    steps = 0
    with GradientProbe(model) as probe:
        for _ in tqdm(range(config.dynamics_steps), desc=f"{method}: SGD check", unit="step"):
            batch = train.batch(rng.choice(len(train), min(config.batch_size, len(train)), False))
            loss_of(model, batch, config.task)[0].mean().backward()
            for name, record in probe.records.items():
                total[name] += record.gradient
                if method == "flora":
                    predicted[name] += record.actual_update
                norm = float(torch.linalg.matrix_norm(total[name], 2))
                largest[name] = max(largest[name], norm)
            if method == "flora":
                sgd_step(model, rate)
                refresh(model)
            else:
                _step_factors(found, rate)
            model.zero_grad()
            probe.step()
            steps += 1
    drifted = drift(model, before) if method == "lora" else {}
    layers = []
    for name, adapter in found.items():
        moved = _weight(adapter, method) - start[name]
        if method != "flora":
            predicted[name] = adapter.scaling**2 * (total[name] @ first_a[name].T) @ first_a[name]
        size = float(moved.norm())
        gap = float((moved + rate * predicted[name]).norm())
        layers.append(
            LayerDynamics(
                layer=name,
                steps=steps,
                learning_rate=rate,
                drift=drifted.get(name, 0.0),
                disagreement=gap / size if size > 0 else 0.0,
                rate_times_gradient=rate * largest[name],
                drift_bound=drift_bound(rate, largest[name], steps),
            )
        )
    return tuple(layers)


def _weight(adapter: Adapter, method: Method) -> Tensor:
    """What the adapter has added to the weight (LoRA), or the weight that was moved (FLoRA)."""
    with torch.no_grad():
        if method == "flora":
            return adapter.layer.weight.detach()
        return adapter.scaling * (adapter.b().detach() @ adapter.a().detach())


@torch.no_grad()
def _step_factors(found: dict[str, Adapter], rate: float) -> None:
    for adapter in found.values():
        for factor in (adapter.layer.project.weight, adapter.layer.expand.weight):
            if factor.grad is not None:
                factor -= rate * factor.grad
