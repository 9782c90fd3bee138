"""The private methods on a linear head over frozen MiniLM features of TREC questions.

    OMP_NUM_THREADS=1 python benchmarks/private_head.py

Features are computed once and kept in ``--features``. Every finished run is a line of the output
file at once, and a run that the file holds is not repeated: tuning first, one seed, scored on 500
training questions that no run trains on; then the seeds at the best settings, scored once on the
official test questions. The tables at the end are made from the file: docs/results-private-head.md
explains them. The training itself is that of the reproductions, examples/reproduce/_head.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "reproduce"))

from _common import Runs
from _head import DELTA, TASKS, WIDTH, Case, Grid, Trials, splits

EPSILONS = (0.5, 2.0)
RANKS = (16, 64, 256)
SEEDS = (0, 1, 2, 3, 4)
BATCH_SIZE, EPOCHS = 256, 20
# 11 pairs for SGD and 10 for Adam, 5 rates without noise.
GRID = Grid(
    steps={0.1: (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), 1.0: (0.03, 0.1, 0.3, 1.0, 3.0)},
    plain=(0.3, 1.0, 3.0, 10.0, 30.0),
    adam=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
)


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


def final_runs(runs: Runs, case: Case) -> list[dict[str, Any]]:
    """The runs of a case at its best settings."""
    wanted = {**asdict(case), "stage": "final"}
    return [row for row in runs.rows if wanted.items() <= row["key"].items()]


def table(runs: Runs, epsilon: float | None) -> str:
    """Markdown: mean over seeds ± standard error."""
    private = epsilon is not None
    head = ["method", "rank", "test accuracy, %"]
    if private:
        head += ["z", "z·√(m/r)", "noise_std", "numbers trained"]
    head += ["rate", *(["clip"] if private else []), "s a run", "steps a s"]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    for case in cases():
        found = final_runs(runs, case)
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
        key = first["key"]
        line += [f"{key['rate']:g}", *([f"{key['clip']:g}"] if private else [])]
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
    runs = Runs(options.output)
    if not options.table_only:
        task = TASKS["trec"]
        trials = Trials(
            task.name, splits(task, options.data, options.features), task.classes, runs, GRID,
            batch_size=BATCH_SIZE, epochs=EPOCHS,
        )  # fmt: skip
        for case in tqdm(cases(), desc="tuning"):
            trials.tune(case)
        for case in tqdm(cases(), desc="final"):
            for seed in SEEDS:
                trials.final(case, seed)
    for epsilon in (None, *EPSILONS):
        title = "without noise" if epsilon is None else f"ε = {epsilon:g}, δ = {DELTA:g}"
        print(f"\n{title}\n\n{table(runs, epsilon)}")


if __name__ == "__main__":
    main()
