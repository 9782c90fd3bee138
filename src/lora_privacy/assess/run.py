"""Run the assessment: load, adapt, fine-tune, measure, and read what it proves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.dynamics import check_dynamics
from lora_privacy.assess.folder import RunFolder
from lora_privacy.assess.measure import NoiseMeter
from lora_privacy.assess.models import block_count, load_model
from lora_privacy.assess.readings import privacy_readings
from lora_privacy.assess.result import (
    Assessment,
    DataSummary,
    MethodResult,
    method_from_dict,
    versions,
)
from lora_privacy.assess.training import fine_tune, trained_parameters
from lora_privacy.core import CachedPrefix, adapt, adapters, drift, snapshot
from lora_privacy.data import TextDataset, load, tickets
from lora_privacy.errors import DataError

if TYPE_CHECKING:
    from lora_privacy.assess.config import AssessConfig, Method

__all__ = ["assess"]


def assess(
    config: AssessConfig,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Assessment:
    """Fine-tune one model by each method of ``config`` and report what the projection did.

    Each finished method is kept in ``output`` at once. On Ctrl-C the methods that finished are
    reported, the others are named as missing, and ``resume=True`` goes on from there.

    Args:
        config: What to run.
        output: Folder for report.json, report.html and the figures.
        resume: Take up the finished methods of an earlier run with the same settings.
        overwrite: Replace what another run left in ``output``; with ``resume``, only a run with
            other settings.

    Raises:
        FolderInUseError: ``output`` holds another run.
        DataError: The data cannot be used; the message says why.
        KeyboardInterrupt: Again, after what is finished was written.
    """
    folder = RunFolder(Path(output), config, resume=resume, overwrite=overwrite)
    with folder.held():
        train, dev = _load_data(config)
        finished: list[MethodResult] = []
        interrupted = False
        for method in config.methods:
            saved = folder.saved(method)
            if saved is not None:
                shapes, steps = saved["shapes"], saved["curve"]["steps"]
                readings = privacy_readings(config, shapes, len(train), steps)
                finished.append(method_from_dict(saved, readings))
                continue
            try:
                result = _run_method(method, config, train, dev)
            except KeyboardInterrupt:
                interrupted = True
                break
            folder.save(method, result.to_dict())
            finished.append(result)
        done = {result.method for result in finished}
        assessment = Assessment(
            config=config,
            model_name=config.model,
            train=_summary(train),
            dev=_summary(dev),
            methods=tuple(finished),
            missing=tuple(method for method in config.methods if method not in done),
            environment=versions(),
        )
        assessment.save(folder.path)
    if interrupted:
        raise KeyboardInterrupt
    return assessment


def _run_method(
    method: Method, config: AssessConfig, train: TextDataset, dev: TextDataset
) -> MethodResult:
    # Heads and dropout draw from torch's global state: it is put back as it was afterwards.
    with torch.random.fork_rng():
        model, tokenizer = _adapted(method, config, train)
        causal = config.task == "causal-lm"
        tokenised, held_out = (
            TokenisedDataset(part, tokenizer, config.max_length, causal=causal)
            for part in (train, dev)
        )
        found = adapters(model)
        before = snapshot(model)
        meter = NoiseMeter(found, method)
        curve = fine_tune(
            model,
            tokenised,
            held_out,
            config,
            method=method,
            meter=meter,
            prefixes=(_prefix(model, tokenised, config), _prefix(model, held_out, config)),
        )
        drifted = drift(model, before) if method == "lora" else {}
        trained = trained_parameters(model, method)
        layers = meter.layers(draws=config.noise_draws, seed=config.seed)
        dynamics = ()
        if config.dynamics_steps:
            # From the start again: the check is about a fresh adapter and plain SGD.
            model, _ = _adapted(method, config, train)
            dynamics = check_dynamics(model, tokenised, config, method=method)
    shapes = tuple((adapter.out_features, adapter.rank) for adapter in found.values())
    proved, implied, flattering = privacy_readings(config, shapes, len(train), curve.steps)
    return MethodResult(
        method=method,
        trained_parameters=trained,
        curve=curve,
        drift=drifted,
        shapes=shapes,
        layers=layers,
        dynamics=dynamics,
        proved=proved,
        implied=implied,
        flattering=flattering,
    )


def _adapted(method: Method, config: AssessConfig, train: TextDataset) -> tuple[nn.Module, Any]:
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(config, len(train.classes))
    if config.last_layers is not None and config.last_layers > (blocks := block_count(model)):
        raise ValueError(
            f"last_layers must be at most {blocks}, the blocks of {config.model!r}, got "
            f"{config.last_layers}."
        )
    adapt(
        model,
        config.rank,
        method=method,
        targets=config.targets,
        alpha=config.alpha,
        law=config.law,
        seed=config.seed,
        # Negative numbers count from the last block.
        layers=None if config.last_layers is None else range(-config.last_layers, 0),
        trainable=("head",) if config.task == "classification" else (),
    )
    return model.train(), tokenizer


def _prefix(model: nn.Module, data: TokenisedDataset, config: AssessConfig) -> CachedPrefix | None:
    """The frozen blocks' output for all of ``data``, when there are frozen blocks."""
    if config.last_layers is None:
        return None
    prefix = CachedPrefix(model)
    size = 4 * config.batch_size
    batches = data.ordered(size)
    prefix.fill(
        (batch.ids, batch.inputs())
        for batch in tqdm(batches, desc="frozen prefix", total=-(-len(data) // size))
    )
    return prefix


def _load_data(config: AssessConfig) -> tuple[TextDataset, TextDataset]:
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


def _summary(data: TextDataset) -> DataSummary:
    largest = None
    if data.labels is not None:
        largest = max(Counter(data.labels).values()) / len(data)
    return DataSummary(
        name=data.name,
        origin=data.origin,
        examples=len(data),
        classes=data.classes if data.labels is not None else (),
        largest_class=largest,
        sha256=data.sha256,
    )
