"""Run the assessment: load, adapt, fine-tune, measure, and read what it proves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_privacy.assess.adapter_fit import forget_prefix
from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.dynamics import check_dynamics
from lora_privacy.assess.folder import RunFolder
from lora_privacy.assess.gradients import sample_gradients
from lora_privacy.assess.measure import NoiseMeter
from lora_privacy.assess.membership import Membership, attack_membership, audited_data
from lora_privacy.assess.methods import Recipe, recipe_of
from lora_privacy.assess.models import model_digest
from lora_privacy.assess.private import fine_tune_privately, plan_of
from lora_privacy.assess.readings import plain_readings, private_readings
from lora_privacy.assess.result import (
    Assessment,
    DataSummary,
    MethodResult,
    versions,
)
from lora_privacy.assess.secrets import score_secrets
from lora_privacy.assess.setup import build_model, frozen_prefix, law_of, load_data
from lora_privacy.assess.spectra import LayerSpectrum, spectra
from lora_privacy.assess.stored import trained_from_dict
from lora_privacy.assess.training import fine_tune, trained_parameters
from lora_privacy.assess.updates import UpdateAttack, attack_updates
from lora_privacy.core import adapters, drift, find_targets, snapshot
from lora_privacy.errors import CalibrationError

if TYPE_CHECKING:
    from typing import Any, Self

    import numpy.typing as npt

    from lora_privacy.assess.config import AssessConfig
    from lora_privacy.assess.setup import Data
    from lora_privacy.core import CachedPrefix
    from lora_privacy.data import TextDataset

__all__ = ["assess"]

# The attack on one update looks at this many records and layers, of at most so many numbers.
_POOL, _LAYERS, _POOL_NUMBERS = 128, 2, 4e7


def assess(
    config: AssessConfig,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    n_jobs: int | None = None,
) -> Assessment:
    """Fine-tune one model by each method of ``config``, measure, attack and report.

    Every finished part is kept in ``output`` at once. On Ctrl-C what is finished is reported, the
    rest is named as missing, and ``resume=True`` goes on from there. Methods without noise give
    the same numbers each time on one machine; the noise of private ones is the system's.

    Args:
        config: What to run.
        output: Folder for report.json, report.html, tables and figures. It also keeps who was in
            which training set: it is as private as the data.
        resume: Take up the finished methods of an earlier run with the same settings, data and
            model.
        overwrite: Replace what another run left in ``output``; with ``resume``, only a run with
            other settings.
        n_jobs: Processes that train shadow models, as ``joblib.Parallel`` takes it.

    Raises:
        FolderInUseError: ``output`` holds another run.
        DataError: The data cannot be used; the message says why.
        KeyboardInterrupt: Again, after what is finished was written.
    """
    data = load_data(config)
    if config.references:
        audited_data(config, data)  # what cannot be attacked is said before the training
    inputs = {
        "train": data.train.sha256,
        "dev": data.dev.sha256,
        "model": model_digest(config),
    }
    folder = RunFolder(Path(output), config, inputs=inputs, resume=resume, overwrite=overwrite)
    with folder.held():
        run = _Run(config, data, folder, n_jobs)
        finished: dict[str, MethodResult] = {}
        attacked: list[str] = []
        try:
            for recipe in config.recipes:
                finished[recipe.name] = run.trained(recipe)
            # All attacks after all trainings: processes for shadows keep the frozen prefix.
            for recipe in config.recipes:
                finished[recipe.name] = run.attacked(recipe, finished[recipe.name])
                attacked.append(recipe.name)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        missing = [
            f"{name} (attacks)" if name in finished else name
            for name in config.methods
            if name not in attacked
        ]
        assessment = Assessment(
            config=config,
            model_name=Path(config.model).name if Path(config.model).is_dir() else config.model,
            train=_summary(data.planted),
            dev=_summary(data.dev),
            methods=tuple(finished.values()),
            missing=tuple(missing),
            environment=versions(),
        )
        assessment.save(folder.path)
        forget_prefix()
    if interrupted:
        raise KeyboardInterrupt
    return assessment


class _Run:
    """One assessment in the making: what its methods share."""

    def __init__(
        self, config: AssessConfig, data: Data, folder: RunFolder, n_jobs: int | None
    ) -> None:
        self._config, self._data, self._folder, self._n_jobs = config, data, folder, n_jobs
        self._texts: _Texts | None = None
        self._pool: dict[str, npt.NDArray[np.float64]] | None = None

    def trained(self, recipe: Recipe) -> MethodResult:
        """The method trained and measured, from the folder or now."""
        saved = self._folder.saved(recipe.name)
        if saved is not None:
            return trained_from_dict(saved, self._config, len(self._data.planted))
        if self._texts is None:
            self._texts = _Texts.of(self._config, self._data)
        result = _train(recipe, self._config, self._data, self._texts)
        self._folder.save(recipe.name, result.to_dict())
        return result

    def attacked(self, recipe: Recipe, result: MethodResult) -> MethodResult:
        """The method with what attacks got from it."""
        # The game is about gradients as they are: row scaling is not modelled.
        if self._config.update_games and not recipe.scaling:
            update, found = self._update(recipe, result)
            result = replace(result, update=update, spectra=found)
        if self._config.references:
            return replace(result, membership=self._membership(recipe, result))
        return result

    def _membership(self, recipe: Recipe, result: MethodResult) -> Membership:
        # Numbers of processes and methods beside it change nothing: shadows of one are its own.
        alone = replace(self._config, methods=(recipe.name,))
        return attack_membership(
            alone,
            self._data,
            self._folder.shadows(recipe.name),
            plan=result.noise,
            n_jobs=self._n_jobs,
        )

    def _clip(self, recipe: Recipe) -> float:
        """Clipping norm of G Aᵀ without the scaling alpha/rank, which B's gradient carries."""
        config = self._config
        if recipe.trains in ("lora", "lora-fa") and config.alpha is not None:
            return config.max_grad_norm * config.rank / config.alpha
        return config.max_grad_norm

    def _update(
        self, recipe: Recipe, result: MethodResult
    ) -> tuple[UpdateAttack, tuple[LayerSpectrum, ...]]:
        saved = self._folder.saved(recipe.name, "update")
        if saved is not None:
            return UpdateAttack.from_dict(saved["update"]), tuple(
                LayerSpectrum.from_dict(layer) for layer in saved["spectra"]
            )
        if self._pool is None:
            self._pool = _gradient_pool(self._config, self._data.train)
        config = self._config
        settings: dict[str, Any] = {
            "method": recipe.base,
            "rank": config.rank,
            "law": law_of(recipe, config),
            "noise_multiplier": 0.0 if result.noise is None else result.noise.noise_multiplier,
            "max_grad_norm": self._clip(recipe),
            "batch_size": min(config.batch_size, len(next(iter(self._pool.values()))) // 2),
            "seed": config.seed,
        }
        update = attack_updates(
            self._pool, games=config.update_games, delta=config.delta, **settings
        )
        found = spectra(self._pool, **settings) if recipe.private else ()
        self._folder.save(
            recipe.name,
            {"update": update.to_dict(), "spectra": [layer.to_dict() for layer in found]},
            "update",
        )
        return update, found


@dataclass(frozen=True, slots=True)
class _Texts:
    """Tokens of both sets, and what the frozen blocks make of them, for all methods."""

    train: TokenisedDataset
    dev: TokenisedDataset
    prefixes: tuple[CachedPrefix | None, CachedPrefix | None]

    @classmethod
    def of(cls, config: AssessConfig, data: Data) -> Self:
        with torch.random.fork_rng():
            model, tokenizer = build_model(recipe_of("lora"), config, len(data.train.classes))
            causal = config.task == "causal-lm"
            train, dev = (
                TokenisedDataset(part, tokenizer, config.max_length, causal=causal)
                for part in (data.planted, data.dev)
            )
            prefixes = (frozen_prefix(model, train, config), frozen_prefix(model, dev, config))
        return cls(train, dev, prefixes)


def _train(recipe: Recipe, config: AssessConfig, data: Data, texts: _Texts) -> MethodResult:
    """Train on all records and the planted secrets, and measure what the projection did."""
    layers, dynamics, drifted = (), (), {}
    train, held_out = texts.train, texts.dev
    # Heads and dropout draw from torch's global state: it is put back as it was afterwards.
    with torch.random.fork_rng():
        model, tokenizer = build_model(recipe, config, len(data.train.classes))
        inside, outside = (None if p is None else p.over(model) for p in texts.prefixes)
        prefixes = (inside, outside)
        try:
            price = plan_of(recipe, config, len(train), model)
        except CalibrationError:
            if recipe.private:
                raise
            price = None
        found = {} if recipe.trains == "full" else adapters(model)
        shapes = tuple((adapter.out_features, adapter.rank) for adapter in found.values())
        before = snapshot(model) if recipe.trains == "lora" else None
        trained = trained_parameters(model, recipe)
        if recipe.private:
            assert price is not None
            curve, proved = fine_tune_privately(
                model, train, held_out, config, recipe=recipe, plan=price, prefixes=prefixes
            )
            readings = private_readings(price, config.delta, proved.assumptions)
        else:
            meter = NoiseMeter(found, recipe.trains) if shapes else None  # pyright: ignore
            curve = fine_tune(
                model, train, held_out, config, recipe=recipe, meter=meter, prefixes=prefixes
            )
            readings = plain_readings(config, shapes, len(train), curve.steps, price)
            if meter is not None:
                layers = meter.layers(draws=config.noise_draws, seed=config.seed)
        if before is not None:
            drifted = drift(model, before)
        secrets = None
        if data.secrets:
            secrets = score_secrets(
                model, tokenizer, data.secrets, config, alternatives=config.alternatives
            )
        if config.dynamics_steps and shapes and not recipe.private:
            # From the start again: the check is about a fresh adapter and plain SGD.
            model, _ = build_model(recipe, config, len(data.train.classes))
            dynamics = check_dynamics(model, train, config, method=recipe.trains)  # pyright: ignore
    return MethodResult(
        method=recipe.name,
        trained_parameters=trained,
        curve=curve,
        drift=drifted,
        shapes=shapes,
        layers=layers,
        dynamics=dynamics,
        proved=readings.proved,
        implied=readings.implied,
        flattering=readings.flattering,
        noise=price if recipe.private else None,
        price=readings.price,
        secrets=secrets,
    )


def _gradient_pool(config: AssessConfig, train: TextDataset) -> dict[str, npt.NDArray[np.float64]]:
    """Gradients of some records at the last adapted layers of the pretrained model."""
    with torch.random.fork_rng():
        model, tokenizer = build_model(recipe_of("full"), config, len(train.classes))
        blocks = None if config.last_layers is None else range(-config.last_layers, 0)
        layers = list(find_targets(model, config.targets, blocks))[-_LAYERS:]
        numbers = sum(model.get_parameter(f"{name}.weight").numel() for name in layers)
        count = min(_POOL, len(train), max(8, int(_POOL_NUMBERS / numbers)))
        data = TokenisedDataset(
            train.take(count, seed=config.seed),
            tokenizer,
            config.max_length,
            causal=config.task == "causal-lm",
        )
        return sample_gradients(model, data, layers, np.arange(count), config.task)


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
