"""The private methods on a linear head over frozen MiniLM features of TREC questions.

    OMP_NUM_THREADS=1 python benchmarks/private_head.py

Features are computed once and kept in ``--features``. Every finished run is a line of the output
file at once, and a run that the file holds is not repeated: tuning first, one seed, scored on 500
training questions that no run trains on; then the seeds at the best settings, scored once on the
official test questions. The tables at the end are made from the file: docs/results-private-head.md
explains them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
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
    from torch import Tensor

    from lora_privacy.training.methods import Method

EPSILONS = (0.5, 2.0)
RANKS = (16, 64, 256)
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100  # none of the seeds of the final runs
DELTA = 1e-5
BATCH_SIZE, EPOCHS, MOMENTUM = 256, 20, 0.9
WIDTH, CLASSES, HELD_OUT = 384, 6, 500
MAX_LENGTH = 64
# Where all gradients are clipped, rate times clip is what moves the weights: the grid is in it.
STEP_SIZES = {0.1: (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 1.0: (0.03, 0.1, 0.3, 1.0, 3.0)}  # by clip
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # Adam divides the scale of the gradient out
PLAIN_RATES = (0.3, 1.0, 3.0, 10.0, 30.0)


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

    def grid(self) -> list[tuple[float, float]]:
        """(rate, clip) to try: 11 pairs for SGD and 10 for Adam, 5 rates without noise."""
        if not self.private:
            return [(rate, math.inf) for rate in PLAIN_RATES]
        if self.optimizer == "adam":
            return list(itertools.product(ADAM_RATES, STEP_SIZES))
        return [(step / clip, clip) for clip, steps in STEP_SIZES.items() for step in steps]


def cases() -> list[Case]:
    """Every row of the tables."""
    found = [Case("sgd", None, None)]
    found += [Case(method, rank, None) for method in ("lora-fa", "flora") for rank in RANKS]
    for epsilon in EPSILONS:
        found.append(Case("dp-sgd", None, epsilon))
        for rank in RANKS:
            found += [Case(m, rank, epsilon) for m in ("dp-lora", "dp-lora-fa", "dp-flora")]
            found.append(Case("dp-lora", rank, epsilon, "adam"))
    return found


@dataclass(frozen=True, slots=True)
class Split:
    """Features (records, 384), each of length 1, and classes."""

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


def features(data: Path, cache: Path) -> tuple[Split, Split]:
    """The training and the test questions; from ``cache`` where it is there."""
    if cache.exists():
        train, test = torch.load(cache, weights_only=True)
        return Split(*train), Split(*test)
    columns: dict[str, Any] = {"text_columns": ("question",), "label_column": "label"}
    train = load(data / "trec/train.tsv", **columns)
    test = load(data / "trec/test.tsv", classes=train.classes, **columns)
    model, tokenizer = load_model(AssessConfig(), CLASSES)
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


def build(case: Case, seed: int) -> nn.Module:
    """The head, of weights 0, trained as ``case`` says; its bias stays 0."""
    head = nn.Linear(WIDTH, CLASSES)
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


def noise_of(case: Case, rate: float, steps: int) -> float:
    """Smallest noise multiplier whose proved ε is at most that of ``case``."""

    def event(z: float) -> object:
        if case.method == "dp-flora":
            return ProjectedGaussian(
                layers=[(WIDTH, cast("int", case.rank))], noise_multiplier=z, sample_rate=rate
            )
        return SampledGaussian(z, rate)

    target = cast("float", case.epsilon)
    return calibrate(event, epsilon=target, delta=DELTA, steps=steps).value


def train_private(
    case: Case, model: nn.Module, data: Split, rate: float, clip: float, z: float
) -> dict[str, Any]:
    """Train in place; the proved ε is checked against the target."""
    loader = DataLoader(TensorDataset(data.features, data.labels), batch_size=BATCH_SIZE)
    private = make_private(
        model, optimizer := optimizer_of(case, model, rate), loader,
        method=cast("Method", case.method), max_grad_norm=clip, privacy=NoiseMultiplier(z),
        delta=DELTA,
    )  # fmt: skip
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(EPOCHS):
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
        "proved_epsilon": bound.epsilon, "noise_multiplier": z, "noise_std": private.noise_std,
        "trained": sum(p.numel() for p in private.parameters.values()),
    }  # fmt: skip


def train_plain(
    case: Case, model: nn.Module, data: Split, rate: float, seed: int
) -> dict[str, Any]:
    """The same without clip and noise, on shuffled batches."""
    optimizer = optimizer_of(case, model, rate)
    rng = np.random.default_rng(seed)
    steps = 0
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(EPOCHS):
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
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


class Rows:
    """The output file: a JSON line a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, row: dict[str, Any]) -> None:
        """Append a run."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def of(self, case: Case, stage: str, **more: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """The runs of a case in a stage, ``"tuning"`` or ``"final"``."""
        wanted = {**asdict(case), "stage": stage, **more}
        return [r for r in self.rows if all(r[key] == value for key, value in wanted.items())]

    def best(self, case: Case) -> tuple[float, float]:
        """Rate and clip of the best tuning run: by accuracy, and among equals by loss."""
        finished = [r for r in self.of(case, "tuning") if r["loss"] is not None]
        found = max(finished, key=lambda r: (r["accuracy"], -r["loss"]))
        return found["rate"], found["clip"] or math.inf


def table(rows: Rows, epsilon: float | None) -> str:
    """Markdown: mean over seeds ± standard error."""
    private = epsilon is not None
    head = ["method", "rank", "test accuracy, %"]
    if private:
        head += ["z", "z·√(m/r)", "noise_std", "numbers trained"]
    head += ["rate", *(["clip"] if private else []), "s a run", "steps a s"]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for case in cases():
        found = rows.of(case, "final")
        if case.epsilon != epsilon or not found:
            continue
        right = 100 * np.array([r["accuracy"] for r in found])
        error = right.std(ddof=1) / math.sqrt(len(right)) if len(right) > 1 else math.nan
        seconds = float(np.mean([r["cpu_seconds"] for r in found]))
        line = [case.name, str(case.rank or "–"), f"{right.mean():.1f} ± {error:.1f}"]
        first = found[0]
        if private:
            z = first["noise_multiplier"]
            projected = case.method == "dp-flora" and case.rank
            shown = f"{z * math.sqrt(WIDTH / projected):.4g}" if projected else "–"
            line += [f"{z:.4g}", shown, f"{first['noise_std']:.3g}", f"{first['trained']:,}"]
        line += [f"{first['rate']:g}", *([f"{first['clip']:g}"] if private else [])]
        line += [f"{seconds:.1f}", f"{first['steps'] / seconds:,.0f}"]
        lines.append(" | ".join(line))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Private training of a head on TREC.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--features", type=Path, default=Path("reports/trec_features.pt"))
    parser.add_argument("--output", type=Path, default=Path("reports/private_head.jsonl"))
    parser.add_argument("--table-only", action="store_true", help="of a finished output file")
    options = parser.parse_args()
    rows = Rows(options.output)
    if not options.table_only:
        questions, test = features(options.data, options.features)
        order = np.random.default_rng(0).permutation(len(questions.labels))
        held_out, train = questions.part(order[:HELD_OUT]), questions.part(order[HELD_OUT:])
        rate = BATCH_SIZE / len(train.labels)
        steps = EPOCHS * round(1 / rate)
        noises: dict[tuple[int | None, float | None], float] = {}

        def run(case: Case, stage: str, seed: int, rate_clip: tuple[float, float]) -> None:
            step_size, clip = rate_clip
            shown = None if math.isinf(clip) else clip  # JSON has no infinity
            if rows.of(case, stage, seed=seed, rate=step_size, clip=shown):
                return
            model: nn.Module | None = build(case, seed)
            if case.private:
                key = (case.rank if case.method == "dp-flora" else None, case.epsilon)
                if key not in noises:
                    noises[key] = noise_of(case, rate, steps)
                try:
                    row = train_private(case, model, train, step_size, clip, noises[key])
                except NonFiniteError:  # the rate is far too high
                    model, row = None, {}
            else:
                row = train_plain(case, model, train, step_size, seed)
            scored = held_out if stage == "tuning" else test
            accuracy, loss = (0.0, None) if model is None else scored.score(model)
            rows.add(
                {"stage": stage, **asdict(case), "seed": seed, "rate": step_size, "clip": shown,
                 "accuracy": accuracy, "loss": loss, **row}
            )  # fmt: skip

        for case in tqdm(cases(), desc="tuning"):
            for pair in case.grid():
                run(case, "tuning", TUNING_SEED, pair)
        for case in tqdm(cases(), desc="final"):
            for seed in SEEDS:
                run(case, "final", seed, rows.best(case))
    for epsilon in (None, *EPSILONS):
        title = "without noise" if epsilon is None else f"ε = {epsilon:g}, δ = {DELTA:g}"
        print(f"\n{title}\n\n{table(rows, epsilon)}")


if __name__ == "__main__":
    main()
