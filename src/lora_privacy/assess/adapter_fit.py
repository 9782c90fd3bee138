"""The training that shadow models of an assessment repeat, on a frozen prefix that they share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.config import AssessConfig, json_hash
from lora_privacy.assess.private import plan_of, train_privately
from lora_privacy.assess.setup import build_model, frozen_prefix
from lora_privacy.assess.training import advance, backward, loss_of, optimizer_of, prefixed
from lora_privacy.data import TextDataset
from lora_privacy.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from lora_privacy.assess.noise_plan import NoisePlan
    from lora_privacy.core import CachedPrefix

__all__ = ["AdapterFit", "examples_of", "forget_prefix"]

Array: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = npt.NDArray[np.int64]

_ANY = ("lora",)  # the frozen blocks are those of every method


@dataclass(frozen=True, slots=True)
class AdapterFit:
    """The fine-tuning of an assessment, without its measurements.

    A private method trains with the noise, sampling rate, divisor and steps of ``plan``, whatever
    the number of members, so that ``plan`` says what each shadow costs; but for a shadow without
    any member, of probability 2⁻ᴺ, which is not trained. Its noise is the system's: its shadows
    are not the same from call to call.

    With ``config.last_layers`` each process runs the frozen blocks below once, for all shadows
    it trains. Each shadow has an A, a head, an order and a dropout of its own.

    Args:
        config: Model, training and one method; the seed in it is not used.
        train: The records.
        population: Texts outside of them.
        plan: Noise of a private method; None finds it for the number of records.

    Raises:
        ValueError: ``config`` names several methods.
        DataError: A text of the population is one of the records.
    """

    config: AssessConfig
    train: TextDataset
    population: TextDataset
    plan: NoisePlan | None = None

    def __post_init__(self) -> None:
        if len(self.config.methods) != 1:
            raise ValueError(
                "methods must name the one that all shadows are trained by, got "
                f"{', '.join(self.config.methods)}."
            )
        method = self.config.recipes[0]
        if method.private and self.plan is None:
            model = build_model(method, self.config, len(self.train.classes))[0]
            plan = plan_of(method, self.config, len(self.train), model)
            object.__setattr__(self, "plan", plan)
        shared = set(examples_of(self.train)) & set(examples_of(self.population))
        if shared:
            raise DataError(
                f"{len(shared)} examples of the population are records too, such as "
                f"{min(shared)[0][:60]!r}; the population must be outside every training set."
            )

    @property
    def records(self) -> int:
        """N."""
        return len(self.train)

    def fingerprint(self) -> str:
        """Hash of the settings and of both data sets."""
        parts = [self.config.to_dict(), self.train.sha256, self.population.sha256]
        return json_hash(parts if self.plan is None else [*parts, asdict(self.plan)])

    def __call__(self, seed: int, rows: Numbers) -> tuple[Array, Array]:
        """Train on ``rows``; see ``shadows.ShadowFit``."""
        base = _base_of(replace(self.config, methods=_ANY), self.train, self.population)
        config, method = replace(self.config, seed=seed), self.config.recipes[0]
        model, _ = build_model(method, config, len(self.train.classes))
        inside, outside = (
            None if prefix is None else prefix.over(model) for prefix in base.prefixes
        )
        if self.plan is None:
            _train_plainly(model, base.train, config, rows, inside)
        elif len(rows):
            train_privately(
                model,
                base.train,
                config,
                recipe=method,
                plan=self.plan,
                rows=rows,
                # The same whatever the coins were: the scale of the noise would tell their sum.
                expected_batch_size=self.plan.sample_rate * self.records / 2,
                prefix=inside,
            )
        return (
            _log_probs(model, base.train, config, inside),
            _log_probs(model, base.population, config, outside),
        )


def _train_plainly(
    model: nn.Module,
    data: TokenisedDataset,
    config: AssessConfig,
    rows: Numbers,
    prefix: CachedPrefix | None,
) -> None:
    method = config.recipes[0]
    optimizer = optimizer_of(model, config, method)
    rng = np.random.default_rng(config.seed)
    for epoch in range(config.epochs):
        where = f"epoch {epoch + 1} of the shadow of seed {config.seed}"
        order = rng.permutation(rows)
        for start in range(0, len(order), config.batch_size):
            batch = data.batch(order[start : start + config.batch_size])
            backward(model, batch, config, prefix, where)
            advance(model, optimizer, method)


def forget_prefix() -> None:
    """Free what fits keep in this process."""
    _base_of.cache_clear()


def examples_of(data: TextDataset) -> list[tuple[str, str]]:
    """Each example as its text and its second text, which is empty where there is none."""
    return list(zip(data.texts, data.pairs or ("",) * len(data), strict=True))


@dataclass(frozen=True, slots=True)
class _Base:
    """What the shadows of one process share."""

    train: TokenisedDataset
    population: TokenisedDataset
    prefixes: tuple[CachedPrefix | None, CachedPrefix | None]


@lru_cache(maxsize=1)
def _base_of(config: AssessConfig, train: TextDataset, population: TextDataset) -> _Base:
    model, tokenizer = build_model(config.recipes[0], config, len(train.classes))
    causal = config.task == "causal-lm"
    inside, outside = (
        TokenisedDataset(data, tokenizer, config.max_length, causal=causal)
        for data in (train, population)
    )
    prefixes = (frozen_prefix(model, inside, config), frozen_prefix(model, outside, config))
    return _Base(inside, outside, prefixes)


def _log_probs(
    model: nn.Module, data: TokenisedDataset, config: AssessConfig, prefix: CachedPrefix | None
) -> Array:
    """Return ln p of every example without dropout, (examples,); of a text the mean a token."""
    model.eval()
    found = np.empty(len(data))
    with torch.no_grad():
        for batch in data.ordered(4 * config.batch_size):
            with prefixed(prefix, batch):
                loss, logits = loss_of(model, batch, config.task)
            if logits is not None:
                # In float32 1 - p of a record well learnt rounds to 0, and LiRA's logit with it.
                loss = functional.cross_entropy(logits.double(), batch.labels, reduction="none")
            found[batch.ids.numpy()] = -loss.double().numpy()
    return np.minimum(found, 0.0)
