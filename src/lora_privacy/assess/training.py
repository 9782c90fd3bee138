"""Plain (non-private) fine-tuning of one adapted model, with the projection measured."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from lora_privacy.core import GradientProbe, decompress, flora_layers, refresh
from lora_privacy.errors import NonFiniteError
from lora_privacy.training.record_loss import record_losses

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from lora_privacy.assess.batches import Batch, TokenisedDataset
    from lora_privacy.assess.config import AssessConfig, Task
    from lora_privacy.assess.measure import NoiseMeter
    from lora_privacy.assess.methods import Recipe
    from lora_privacy.core import CachedPrefix

__all__ = [
    "Score",
    "TrainingCurve",
    "advance",
    "backward",
    "checked_loss",
    "evaluate",
    "evaluating",
    "fine_tune",
    "loss_of",
    "optimizer_of",
    "peak_memory",
    "prefixed",
    "reset_peak_memory",
    "split_parameters",
    "trained_parameters",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Held-out result.

    Attributes:
        loss: Mean over examples, in nats (per token of a sequence for a language model).
        accuracy: Share of right classes; None for a language model.
        accuracy_error: Its standard error over examples; None for a language model.
        examples: Examples scored.
    """

    loss: float
    accuracy: float | None
    accuracy_error: float | None
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCurve:
    """How training went.

    Attributes:
        steps: Optimiser steps taken.
        losses: Training loss of each step, in nats.
        scores: Held-out result after each epoch.
        wall_seconds: Elapsed time of the training steps, measurement included.
        cpu_seconds: Processor time of the same.
        peak_bytes: Highest resident memory of the process while training; None if unknown.
    """

    steps: int
    losses: tuple[float, ...]
    scores: tuple[Score, ...]
    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int | None


def loss_of(model: nn.Module, batch: Batch, task: Task) -> tuple[Tensor, Tensor | None]:
    """Return (loss of each example, logits of a classifier or None).

    A sequence's loss is the mean over its own tokens, so that one example's gradient does not
    depend on the lengths of the others.
    """
    if task == "classification":
        logits = model(**batch.inputs())
        return functional.cross_entropy(logits, batch.labels, reduction="none"), logits
    logits = model(**batch.inputs()).logits
    return record_losses(logits, batch.labels, shift=True), None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block; modes are put back, those of frozen parts too."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module, data: TokenisedDataset, config: AssessConfig, prefix: CachedPrefix | None
) -> Score:
    """Score ``model`` on all of ``data`` without dropout; its training mode is restored."""
    losses, right = [], 0
    with evaluating(model), torch.no_grad():
        for batch in data.ordered(4 * config.batch_size):
            with prefixed(prefix, batch):
                loss, logits = loss_of(model, batch, config.task)
            losses.append(loss)
            if logits is not None:
                right += int((logits.argmax(1) == batch.labels).sum())
    count = len(data)
    mean = float(torch.cat(losses).mean())
    if config.task == "causal-lm":
        return Score(loss=mean, accuracy=None, accuracy_error=None, examples=count)
    accuracy = right / count
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    return Score(loss=mean, accuracy=accuracy, accuracy_error=error, examples=count)


def fine_tune(
    model: nn.Module,
    train: TokenisedDataset,
    dev: TokenisedDataset,
    config: AssessConfig,
    *,
    recipe: Recipe,
    meter: NoiseMeter | None,
    prefixes: tuple[CachedPrefix | None, CachedPrefix | None] = (None, None),
) -> TrainingCurve:
    """Train ``model`` in place with AdamW and feed ``meter`` on every ``probe_every``-th step.

    LoRA and LoRA-FA train their factors; FLoRA decompresses G Aᵀ to a dense gradient, which
    AdamW applies to the weights, and draws a new A after every step; ``"full"`` trains the
    layers' own weights. A head trains in all.

    Args:
        model: Adapted model.
        train: Training examples.
        dev: Held-out examples.
        config: Epochs, batch size, rate, seed.
        recipe: How ``model`` is trained, without noise.
        meter: Receives the gradient records; None where nothing is projected.
        prefixes: Cached frozen prefix of the training and of the held-out examples.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
    """
    optimizer = optimizer_of(model, config, recipe)
    rng = np.random.default_rng(config.seed)
    per_epoch = math.ceil(len(train) / config.batch_size)
    losses: list[float] = []
    scores: list[Score] = []
    wall = cpu = 0.0
    reset_peak_memory()
    bar = tqdm(total=config.epochs * per_epoch, desc=f"{recipe.name}: training", unit="step")
    watch = nullcontext() if meter is None else GradientProbe(model, every=config.probe_every)
    with bar, watch as probe:
        for _ in range(config.epochs):
            for batch in train.shuffled(config.batch_size, rng):
                started = time.perf_counter(), time.process_time()
                where = f"step {len(losses) + 1} of {recipe.name}"
                value = backward(model, batch, config, prefixes[0], where)
                if probe is not None and meter is not None and probe.records:
                    meter.add(probe.records)
                advance(model, optimizer, recipe)
                if probe is not None:
                    probe.step()
                wall += time.perf_counter() - started[0]
                cpu += time.process_time() - started[1]
                losses.append(value)
                bar.update()
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
            scores.append(evaluate(model, dev, config, prefixes[1]))
    return TrainingCurve(
        steps=len(losses),
        losses=tuple(losses),
        scores=tuple(scores),
        wall_seconds=wall,
        cpu_seconds=cpu,
        peak_bytes=peak_memory(),
    )


def optimizer_of(model: nn.Module, config: AssessConfig, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW on all that ``recipe`` trains, without weight decay."""
    dense, factors = split_parameters(model, recipe)
    groups = [
        {"params": dense, "lr": config.dense_learning_rate},
        {"params": factors, "lr": config.learning_rate},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)


def backward(
    model: nn.Module,
    batch: Batch,
    config: AssessConfig,
    prefix: CachedPrefix | None,
    where: str,
) -> float:
    """Leave the gradient of the mean loss of ``batch``, and return that loss.

    ``where`` says in an error which step it was.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
    """
    with prefixed(prefix, batch):
        loss = loss_of(model, batch, config.task)[0].mean()
        loss.backward()
    return checked_loss(loss.item(), config.learning_rate, where)


def checked_loss(value: float, learning_rate: float, where: str) -> float:
    """Return ``value``; NonFiniteError, which says ``where``, if it is NaN or infinite."""
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss is {value} at {where}; use a smaller learning rate than {learning_rate:g}."
        )
    return value


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
    """Take the step of ``recipe`` with the gradients that are there, and clear them."""
    if recipe.trains == "flora":
        decompress(model)
    optimizer.step()
    optimizer.zero_grad()
    if recipe.trains == "flora":
        refresh(model)


def split_parameters(
    model: nn.Module, recipe: Recipe
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(Dense weights of the target layers that ``recipe`` moves, trained factors and head)."""
    if recipe.trains == "full":
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        head = [p for name, p in named if name.startswith("head.")]
        return [p for name, p in named if not name.startswith("head.")], head
    layers = list(flora_layers(model).values()) if recipe.trains == "flora" else []
    # FLoRA's compressed gradients pass through B.grad; B itself is never stepped.
    passed = {id(layer.expand.weight) for layer in layers} | {id(layer.weight) for layer in layers}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in passed]
    return [layer.weight for layer in layers], rest


def trained_parameters(model: nn.Module, recipe: Recipe) -> int:
    """Numbers that the optimiser moves; a FLoRA layer counts its dense weight."""
    return sum(p.numel() for group in split_parameters(model, recipe) for p in group)


def prefixed(prefix: CachedPrefix | None, batch: Batch) -> AbstractContextManager[None]:
    """Take the frozen blocks' output of ``batch`` from memory inside the block, if any is."""
    if prefix is None:
        return nullcontext()
    return prefix.using(batch.ids, batch.attention_mask)


def peak_memory() -> int | None:
    """Highest resident memory since the last reset, in bytes; None where the system hides it."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak_memory() -> None:
    """Linux starts the high-water mark anew when 5 is written here; elsewhere there is none."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
