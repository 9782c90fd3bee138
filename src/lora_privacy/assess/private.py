"""Private fine-tuning of one model by one method, for an assessment and its shadow models."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from lora_privacy.assess.noise_plan import NoisePlan, plan_noise
from lora_privacy.assess.training import (
    Score,
    TrainingCurve,
    checked_loss,
    evaluate,
    loss_of,
    peak_memory,
    prefixed,
    reset_peak_memory,
    split_parameters,
)
from lora_privacy.core import adapters
from lora_privacy.training import NoiseMultiplier, RowScaling, SingularValueDenoiser, make_private

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from torch import nn

    from lora_privacy.assess.batches import Batch, TokenisedDataset
    from lora_privacy.assess.config import AssessConfig
    from lora_privacy.assess.methods import Recipe
    from lora_privacy.core import CachedPrefix
    from lora_privacy.dp import PrivacyBound

__all__ = ["fine_tune_privately", "plan_of", "train_privately"]

_MOMENTUM = 0.9
_PART = 64  # records whose activations are held at once


def plan_of(recipe: Recipe, config: AssessConfig, examples: int, model: nn.Module) -> NoisePlan:
    """The noise with which a private training costs at most ``config.epsilon``.

    Args:
        recipe: What trains; one without noise is planned as its private twin would be.
        config: Target, batch size and passes.
        examples: N, the records of the training set.
        model: As ``recipe`` adapts it.

    Raises:
        CalibrationError: No noise within reach meets the target.
    """
    rate = min(config.private_batch_size, examples) / examples
    return plan_noise(
        epsilon=config.epsilon,
        delta=config.delta,
        sample_rate=rate,
        steps=(config.private_epochs or config.epochs) * max(1, round(1 / rate)),
        projected=_projected(recipe, config, model),
    )


def _projected(
    recipe: Recipe, config: AssessConfig, model: nn.Module
) -> tuple[tuple[int, int], ...]:
    """(in_features, rank) of all that dp-flora would project; empty for other methods."""
    if recipe.trains != "flora":
        return ()
    found = [(a.in_features, a.rank) for a in adapters(model).values()]
    if not recipe.private and config.task == "classification":
        # Without noise the head is trained as it is; the private twin projects it too.
        width = model.get_parameter("head.weight").shape[1]
        found.append((width, min(config.rank, width)))
    return tuple(found)


def train_privately(
    model: nn.Module,
    data: TokenisedDataset,
    config: AssessConfig,
    *,
    recipe: Recipe,
    plan: NoisePlan,
    rows: npt.NDArray[np.int64],
    expected_batch_size: float | None = None,
    prefix: CachedPrefix | None = None,
    after_epoch: Callable[[], object] | None = None,
) -> tuple[list[float], PrivacyBound]:
    """Train ``model`` in place on the records ``rows``; noise and coins are the system's.

    Args:
        model: As ``recipe`` adapts it.
        data: Of which ``rows`` are trained on.
        config: Clip, rates, δ.
        recipe: A private method.
        plan: Its noise.
        rows: Records, at least one.
        expected_batch_size: Divisor of the noised sums where ``rows`` were drawn, so that their
            number is not public; None takes q of them.
        prefix: Cached frozen blocks of ``data``.
        after_epoch: Called after every pass.

    Returns:
        The mean loss of the records of each step that had any, in nats, and the proved bound.

    Raises:
        NonFiniteError: The loss is NaN or infinite.
    """
    dense, factors = split_parameters(model, recipe)
    if recipe.trains in ("full", "flora"):
        # Adam's moments would be of noise: the usual choice for dense private gradients.
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [*dense, *factors], lr=config.private_dense_learning_rate, momentum=_MOMENTUM
        )
    else:
        optimizer = torch.optim.AdamW(factors, lr=config.private_learning_rate, weight_decay=0.0)

    def collate(ids: list[int]) -> Batch:
        return data.batch(np.array(ids, dtype=np.int64))

    # By length: a Poisson batch comes in this order, so that its parts are padded little.
    ordered: Any = data.by_length(rows).tolist()
    loader = DataLoader(
        ordered, batch_size=max(1, round(plan.sample_rate * len(rows))), collate_fn=collate
    )
    private = make_private(
        model,
        optimizer,
        loader,
        method=recipe.base,  # pyright: ignore[reportArgumentType]  (a private one)
        max_grad_norm=config.max_grad_norm,
        privacy=NoiseMultiplier(plan.noise_multiplier),
        delta=config.delta,
        sample_rate=plan.sample_rate,
        expected_batch_size=expected_batch_size,
        physical_batch_size=_PART,
        transform=RowScaling(config.max_grad_norm) if recipe.scaling else None,
        denoiser=SingularValueDenoiser() if recipe.denoise else None,
    )
    total, seen, losses = 0.0, 0, []
    bar = tqdm(total=plan.steps, desc=f"{recipe.name}: training", unit="step", leave=False)
    try:
        with bar:
            while private.step < plan.steps:
                for batch in private.data_loader:
                    where = f"step {private.step + 1} of {recipe.name}"
                    before = private.step
                    with prefixed(prefix, batch):
                        each = loss_of(model, batch, config.task)[0]
                        each.mean().backward()
                    total += checked_loss(each.sum().item(), config.private_learning_rate, where)
                    seen += len(each)
                    optimizer.step()
                    if private.step > before:
                        losses.append(total / seen)
                        total, seen = 0.0, 0
                    bar.update(private.step - bar.n)
                if after_epoch is not None:
                    after_epoch()
        bound = private.bound()
    finally:
        private.close()
    if not bound.epsilon <= plan.bound(config.delta).epsilon * (1 + 1e-9):
        raise AssertionError(f"{recipe.name} cost {bound}, more than its plan {plan}.")
    return losses, bound


def fine_tune_privately(
    model: nn.Module,
    train: TokenisedDataset,
    dev: TokenisedDataset,
    config: AssessConfig,
    *,
    recipe: Recipe,
    plan: NoisePlan,
    prefixes: tuple[CachedPrefix | None, CachedPrefix | None] = (None, None),
) -> tuple[TrainingCurve, PrivacyBound]:
    """Train ``model`` in place on all of ``train``, and score it after every pass."""
    scores: list[Score] = []
    scoring = [0.0, 0.0]  # wall and processor seconds, which are not the training's

    def score() -> None:
        started = time.perf_counter(), time.process_time()
        scores.append(evaluate(model, dev, config, prefixes[1]))
        scoring[0] += time.perf_counter() - started[0]
        scoring[1] += time.process_time() - started[1]

    reset_peak_memory()
    started = time.perf_counter(), time.process_time()
    losses, bound = train_privately(
        model,
        train,
        config,
        recipe=recipe,
        plan=plan,
        rows=np.arange(len(train)),
        prefix=prefixes[0],
        after_epoch=score,
    )
    curve = TrainingCurve(
        steps=plan.steps,
        losses=tuple(losses),
        scores=tuple(scores),
        wall_seconds=time.perf_counter() - started[0] - scoring[0],
        cpu_seconds=time.process_time() - started[1] - scoring[1],
        peak_bytes=peak_memory(),
    )
    return curve, bound
