"""Private training of a linear head over frozen MiniLM features: tasks, methods, tuning, runs.

Nothing differs between methods but what is clipped, noised and accounted. Settings are tuned on
records held out of the training file; the test file scores the runs at the best settings only.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.models import MeanPoolClassifier, load_model
from lora_privacy.core import adapt, decompress, refresh
from lora_privacy.data import load
from lora_privacy.dp import ProjectedGaussian, SampledGaussian, calibrate
from lora_privacy.dp import opacus as _bridge  # noqa: F401 - else dp-flora's first step imports it
from lora_privacy.errors import NonFiniteError
from lora_privacy.training import NoiseMultiplier, make_private

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from _common import Runs
    from torch import Tensor

    from lora_privacy.training.methods import Method

DELTA = 1e-5
MOMENTUM = 0.9
WIDTH = 384  # of MiniLM
MAX_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Task:
    """Files below the folder of data, their columns, and how many records are held out."""

    name: str
    train: str
    test: str
    columns: dict[str, Any] = field(hash=False)
    classes: int
    held_out: int


TASKS = {
    "trec": Task(
        "trec", "trec/train.tsv", "trec/test.tsv",
        {"text_columns": ("question",), "label_column": "label"}, 6, 500,
    ),
    "sst2": Task(
        "sst2", "sst2_sentences/train.tsv", "sst2_sentences/test.tsv",
        {"text_columns": (0,), "label_column": 1, "header": False}, 2, 1000,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Split:
    """Features (records, width), each of length 1, and classes."""

    features: Tensor
    labels: Tensor

    def part(self, rows: np.ndarray) -> Split:
        """Some records."""
        return Split(self.features[rows], self.labels[rows])

    def score(self, model: nn.Module) -> tuple[float, float | None]:
        """Accuracy, and mean loss; None where it is not finite."""
        with torch.no_grad():
            logits = model(self.features)
            right = (logits.argmax(1) == self.labels).double().mean()
            loss = float(functional.cross_entropy(logits, self.labels))
            return float(right), loss if math.isfinite(loss) else None


@dataclass(frozen=True, slots=True)
class Splits:
    """Records that train, those that tune, and those that score the final runs."""

    train: Split
    held_out: Split
    test: Split


def splits(task: Task, data: Path, cache: Path) -> Splits:
    """Features of a task, from ``cache`` where it is there; the held-out ones are random."""
    whole, test = features(task, data, cache)
    order = np.random.default_rng(0).permutation(len(whole.labels))
    return Splits(whole.part(order[task.held_out :]), whole.part(order[: task.held_out]), test)


def features(task: Task, data: Path, cache: Path) -> tuple[Split, Split]:
    """The training and the test records; from ``cache`` where it is there."""
    if cache.exists():
        train, test = torch.load(cache, weights_only=True)
        return Split(*train), Split(*test)
    train = load(data / task.train, **task.columns)
    test = load(data / task.test, classes=train.classes, **task.columns)
    model, tokenizer = load_model(AssessConfig(), task.classes)
    cast("MeanPoolClassifier", model).head = nn.Identity()  # pyright: ignore
    model.eval()
    found = []
    for part in (train, test):
        tokens = TokenisedDataset(part, tokenizer, MAX_LENGTH, causal=False)
        rows = torch.empty(len(tokens), WIDTH)
        with torch.no_grad():
            for batch in tqdm(tokens.ordered(64), total=-(-len(tokens) // 64), desc=part.name):
                # A length of 1 for each record by itself: statistics of the data would leak.
                rows[batch.ids] = functional.normalize(model(**batch.inputs()), dim=1)
        found.append((rows, torch.tensor(part.labels)))
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, cache)
    return Split(*found[0]), Split(*found[1])


@dataclass(frozen=True, slots=True)
class Case:
    """A method at a rank and a privacy target; ``rank`` and ``epsilon`` None where it has none."""

    method: str
    rank: int | None
    epsilon: float | None
    optimizer: str = "sgd"

    @property
    def private(self) -> bool:
        """Whether noise is added."""
        return self.epsilon is not None

    @property
    def name(self) -> str:
        """For people."""
        return self.method + (" (Adam)" if self.optimizer == "adam" else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What each case tries.

    Attributes:
        steps: Clip -> rate times clip. Where all gradients are clipped, the product is what moves
            the weights.
        plain: Rates without noise.
        adam: Rates of Adam, which divides the scale of the gradient out, at every clip.
    """

    steps: dict[float, tuple[float, ...]]
    plain: tuple[float, ...]
    adam: tuple[float, ...] = ()

    def of(self, case: Case) -> list[tuple[float, float]]:
        """(rate, clip) to try."""
        if not case.private:
            return [(rate, math.inf) for rate in self.plain]
        if case.optimizer == "adam":
            return list(itertools.product(self.adam, self.steps))
        return [(step / clip, clip) for clip, steps in self.steps.items() for step in steps]


def build(case: Case, width: int, classes: int, seed: int) -> nn.Module:
    """The head, of weights 0, trained as ``case`` says; its bias stays 0."""
    head = nn.Linear(width, classes)
    head.requires_grad_(False)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(head)
    if case.rank is None:
        head.weight.requires_grad_(True)
        return model
    method = cast("Any", case.method.removeprefix("dp-"))
    law = "orthonormal" if method == "flora" else "gaussian"
    return adapt(model, case.rank, method=method, law=law, targets=("0",), seed=seed)


def optimizer_of(case: Case, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """SGD with momentum, or Adam, on what is trained."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    if case.optimizer == "adam":
        return torch.optim.Adam(wanted, lr=rate)
    return torch.optim.SGD(wanted, lr=rate, momentum=MOMENTUM)


def noise_of(case: Case, width: int, rate: float, steps: int) -> float:
    """Smallest noise multiplier whose proved ε is at most that of ``case``."""

    def event(z: float) -> object:
        if case.method == "dp-flora":
            return ProjectedGaussian(
                layers=[(width, cast("int", case.rank))], noise_multiplier=z, sample_rate=rate
            )
        return SampledGaussian(z, rate)

    target = cast("float", case.epsilon)
    return calibrate(event, epsilon=target, delta=DELTA, steps=steps).value


class Trials:
    """Runs of one task, each kept in ``runs`` as soon as it is finished.

    Args:
        name: Of the task, for the keys of the runs.
        data: Its records.
        classes: Outputs of the head.
        runs: Where finished runs are.
        grid: Settings that are tried.
        batch_size: Expected records of a Poisson batch.
        epochs: Passes over the training records.
        tuning_seeds: None of those of the final runs.
    """

    def __init__(
        self,
        name: str,
        data: Splits,
        classes: int,
        runs: Runs,
        grid: Grid,
        *,
        batch_size: int,
        epochs: int,
        tuning_seeds: Sequence[int] = (100,),
    ) -> None:
        self.data, self.classes, self.runs, self.grid = data, classes, runs, grid
        self.batch_size, self.epochs, self.tuning_seeds = batch_size, epochs, tuning_seeds
        self._common = {"task": name, "batch_size": batch_size, "epochs": epochs}
        self.width = data.train.features.shape[1]
        self.rate = batch_size / len(data.train.labels)

    def tune(self, case: Case) -> tuple[float, float]:
        """Rate and clip of the best accuracy on held-out records, and among equals by loss."""
        found: list[tuple[float, float, tuple[float, float]]] = []
        for pair in self.grid.of(case):
            rows = [self._run(case, "tuning", seed, pair) for seed in self.tuning_seeds]
            if all(row["loss"] is not None for row in rows):
                loss = float(np.mean([row["loss"] for row in rows]))
                found.append((float(np.mean([row["accuracy"] for row in rows])), -loss, pair))
        return max(found)[2]

    def final(self, case: Case, seed: int) -> dict[str, Any]:
        """A run at the best settings, scored on the test records."""
        return self._run(case, "final", seed, self.tune(case))

    def finished(self, case: Case, seeds: Sequence[int]) -> bool:
        """Whether all runs of a case are there, so that nothing would be run now."""
        tuning = [(p, s) for p in self.grid.of(case) for s in self.tuning_seeds]
        if not all(self._has(case, "tuning", s, p) for p, s in tuning):
            return False
        best = self.tune(case)
        return all(self._has(case, "final", seed, best) for seed in seeds)

    def noise(self, case: Case) -> float:
        """Noise multiplier of the case; methods that are accounted alike share it."""
        rank = case.rank if case.method == "dp-flora" else None
        key = {**self._common, "stage": "noise", "rank": rank, "epsilon": case.epsilon}
        key |= {"width": self.width, "records": len(self.data.train.labels)}
        steps = self.epochs * round(1 / self.rate)
        row = self.runs.get(key, lambda: {"z": noise_of(case, self.width, self.rate, steps)})
        return row["z"]

    def _run(self, case: Case, stage: str, seed: int, pair: tuple[float, float]) -> dict[str, Any]:
        rate, clip = pair

        def run() -> dict[str, Any]:
            model: nn.Module | None = build(case, self.width, self.classes, seed)
            if case.private:
                try:
                    row = self._train_private(case, model, rate, clip)
                except NonFiniteError:  # the rate is far too high
                    model, row = None, {}
            else:
                row = self._train_plain(case, model, rate, seed)
            scored = self.data.held_out if stage == "tuning" else self.data.test
            accuracy, loss = (0.0, None) if model is None else scored.score(model)
            return {"accuracy": accuracy, "loss": loss, **row}

        return self.runs.get(self._key(case, stage, seed, pair), run)

    def _has(self, case: Case, stage: str, seed: int, pair: tuple[float, float]) -> bool:
        key = self._key(case, stage, seed, pair)
        return any(row["key"] == key for row in self.runs.rows)

    def _key(self, case: Case, stage: str, seed: int, pair: tuple[float, float]) -> dict[str, Any]:
        rate, clip = pair
        shown = None if math.isinf(clip) else clip  # JSON has no infinity
        key = {**self._common, "stage": stage, **asdict(case), "seed": seed}
        return {**key, "rate": rate, "clip": shown}

    def _train_private(
        self, case: Case, model: nn.Module, rate: float, clip: float
    ) -> dict[str, Any]:
        """Train in place; the proved ε is checked against the target."""
        z, train = self.noise(case), self.data.train
        loader = DataLoader(
            TensorDataset(train.features, train.labels), batch_size=self.batch_size
        )
        private = make_private(
            model, optimizer := optimizer_of(case, model, rate), loader,
            method=cast("Method", case.method), max_grad_norm=clip, privacy=NoiseMultiplier(z),
            delta=DELTA,
        )  # fmt: skip
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.epochs):
            for x, y in private.data_loader:
                functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - started
        bound = private.bound()
        assert case.epsilon is not None
        assert bound.epsilon <= case.epsilon, bound
        private.close()
        return {
            "steps": private.step, "cpu_seconds": cpu, "wall_seconds": wall,
            "proved_epsilon": bound.epsilon, "noise_multiplier": z,
            "noise_std": private.noise_std,
            "trained": sum(p.numel() for p in private.parameters.values()),
        }  # fmt: skip

    def _train_plain(self, case: Case, model: nn.Module, rate: float, seed: int) -> dict[str, Any]:
        """The same without clip and noise, on shuffled batches."""
        optimizer, data = optimizer_of(case, model, rate), self.data.train
        rng = np.random.default_rng(seed)
        steps = 0
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(self.epochs):
            order = rng.permutation(len(data.labels))
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                optimizer.zero_grad()
                functional.cross_entropy(model(data.features[rows]), data.labels[rows]).backward()
                if case.method == "flora":
                    decompress(model)
                optimizer.step()
                if case.method == "flora":
                    refresh(model)
                steps += 1
        return {
            "steps": steps, "cpu_seconds": time.process_time() - cpu,
            "wall_seconds": time.perf_counter() - started,
        }  # fmt: skip
