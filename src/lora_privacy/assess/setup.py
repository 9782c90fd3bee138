"""What every training of an assessment begins with: data, an adapted model, a frozen prefix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.models import block_count, load_model
from lora_privacy.core import CachedPrefix, adapt, find_targets, unfreeze
from lora_privacy.data import Secret, TextDataset, load, plant_secrets, tickets
from lora_privacy.errors import DataError

if TYPE_CHECKING:
    from lora_privacy.assess.config import AssessConfig
    from lora_privacy.assess.methods import Recipe
    from lora_privacy.laws import LawName

__all__ = ["Data", "build_model", "frozen_prefix", "law_of", "load_data"]

_HEAD = "head"


@dataclass(frozen=True, slots=True)
class Data:
    """What an assessment trains on and scores.

    Attributes:
        train: Training examples without secrets.
        planted: The same with the secrets whose coins put them in.
        dev: Held-out examples.
        secrets: All secrets, those that were left out too.
    """

    train: TextDataset
    planted: TextDataset
    dev: TextDataset
    secrets: tuple[Secret, ...]


def load_data(config: AssessConfig) -> Data:
    """Load both sets, and plant secrets.

    Raises:
        DataError: The data cannot be used; the message says why.
    """
    train, dev = _load(config)
    planted, secrets = train, ()
    if config.secrets:
        planted, secrets = plant_secrets(train, config.secrets, seed=config.seed)
    return Data(train, planted, dev, secrets)


def _load(config: AssessConfig) -> tuple[TextDataset, TextDataset]:
    causal = config.task == "causal-lm"
    if config.train == "tickets":
        if causal:
            raise DataError(
                "the embedded tickets are a classification set; name a file with --train for a "
                "causal language model."
            )
        train = tickets(config.train_size or 2_000, seed=config.seed, split="train")
        dev = tickets(config.dev_size or 1_000, seed=config.seed, split="dev")
        return train, dev
    if config.dev is None:
        raise DataError("name a held-out file with --dev: training data cannot score itself.")
    columns = {
        "text_columns": config.text_columns,
        "label_column": None if causal else config.label_column,
        "header": config.header,
        "delimiter": config.delimiter,
        "seed": config.seed,
    }
    train = load(config.train, split="train", limit=config.train_size, **columns)
    classes = None if causal else train.classes
    dev = load(config.dev, split="validation", limit=config.dev_size, classes=classes, **columns)
    return train, dev


def build_model(recipe: Recipe, config: AssessConfig, classes: int) -> tuple[nn.Module, Any]:
    """The model that ``recipe`` trains, in training mode, and its tokenizer.

    Weights of a new head are drawn from torch's global generator, seeded with ``config.seed``.

    Args:
        recipe: What trains.
        config: Model, targets, rank, seed.
        classes: Width of a classifier's head.

    Raises:
        ValueError: ``last_layers`` exceeds the blocks of the model.
        NoTargetError, UnsupportedLayerError: The targets do not fit the model.
    """
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(config, classes)
    if config.last_layers is not None and config.last_layers > (blocks := block_count(model)):
        raise ValueError(
            f"last_layers must be at most {blocks}, the blocks of {config.model!r}, got "
            f"{config.last_layers}."
        )
    # Negative numbers count from the last block.
    layers = None if config.last_layers is None else range(-config.last_layers, 0)
    trainable = (_HEAD,) if config.task == "classification" else ()
    if recipe.trains == "full":
        unfreeze(model, targets=config.targets, layers=layers, trainable=trainable)
    elif recipe.base == "dp-flora":
        # All that is trained must be projected, the head too, by a row space that is uniform.
        targets = (*find_targets(model, config.targets, layers), *trainable)
        if config.task == "classification":
            nn.init.zeros_(model.get_parameter(f"{_HEAD}.bias"))  # frozen from here on
        adapt(
            model,
            config.rank,
            method="flora",
            targets=targets,
            alpha=config.alpha,
            law=law_of(recipe, config),
            seed=config.seed,
        )
    else:
        adapt(
            model,
            config.rank,
            method=recipe.trains,  # pyright: ignore[reportArgumentType]  ("full" is above)
            targets=config.targets,
            alpha=config.alpha,
            law=law_of(recipe, config),
            seed=config.seed,
            layers=layers,
            trainable=trainable,
        )
    return model.train(), tokenizer


def law_of(recipe: Recipe, config: AssessConfig) -> LawName:
    """Law of A: what is asked for, but that the row space of dp-flora must be uniform."""
    if recipe.base == "dp-flora" and config.law != "gaussian":
        return "orthonormal"
    return config.law


def frozen_prefix(
    model: nn.Module, data: TokenisedDataset, config: AssessConfig
) -> CachedPrefix | None:
    """The frozen blocks' output for all of ``data``, when there are frozen blocks."""
    if config.last_layers is None:
        return None
    prefix = CachedPrefix(model)
    size = 4 * config.batch_size
    prefix.fill(
        (batch.ids, batch.inputs())
        for batch in tqdm(
            data.ordered(size), desc="frozen prefix", total=-(-len(data) // size), leave=False
        )
    )
    return prefix
