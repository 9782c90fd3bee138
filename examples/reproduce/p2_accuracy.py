"""Accuracy at equal ε on a linear head, by the methods of arXiv:2601.21719 and DP-SGD.

    OMP_NUM_THREADS=1 python examples/reproduce/p2_accuracy.py --data FOLDER [--full]

The paper trains a head over ResNet-50 features of CIFAR-10. Here it is a head over MiniLM features
of TREC questions and SST-2 sentences. Every method tries the same number of rates and clips on
records held out of the training file; then each seed is scored once on the test file.
docs/reproduction/p2-accuracy.md explains the results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from _common import STYLES, Runs, parser, save_figure, save_json
from _head import DELTA, TASKS, Case, Grid, Split, Splits, Trials, splits
from _pages import fill, markdown
from scipy import stats
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

NAME = "p2-accuracy"
PUBLISHED = {
    "ε of the comparison with DP-LoRA-FA": 0.2,
    "dp-flora over dp-lora-fa, points, least": 0.9,
    "dp-flora over dp-lora-fa, points, most": 7.8,
    "largest ε at which dp-flora is over dp-sgd": 0.4,
}
LEVEL = 0.95
GRID = Grid(
    steps={0.1: (0.1, 0.3, 1.0, 3.0), 1.0: (0.1, 0.3, 1.0)}, plain=(0.3, 1.0, 3.0, 10.0, 30.0)
)
METHODS = ("dp-lora-fa", "dp-flora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run."""

    epsilons: tuple[float, ...]
    ranks: tuple[int, ...]
    seeds: range
    tuning_seeds: tuple[int, ...]
    batch_size: int = 512
    epochs: int = 10

    def cases(self, epsilon: float | None) -> list[Case]:
        """Of one ε, or without noise."""
        prefix = "" if epsilon is None else "dp-"
        found = [Case(f"{prefix}sgd", None, epsilon)]
        names = [prefix + method.removeprefix("dp-") for method in METHODS]
        return found + [Case(name, r, epsilon) for name in names for r in self.ranks]


QUICK = Plan(epsilons=(0.2, 0.4, 0.8), ranks=(16, 64, 256), seeds=range(10), tuning_seeds=(100,))
FULL = Plan(
    epsilons=(0.1, 0.2, 0.4, 0.8, 1.6),
    ranks=(16, 32, 64, 128, 256),
    seeds=range(20),
    tuning_seeds=(100, 101),
)


def cell_of(trials: Trials, case: Case, seeds: Sequence[int]) -> dict[str, Any]:
    """Tune a case and run its seeds: accuracies in %, their mean and its interval."""
    rows = [trials.final(case, seed) for seed in seeds]
    rate, clip = trials.tune(case)
    right = [round(100 * row["accuracy"], 4) for row in rows]
    half = stats.t.ppf((1 + LEVEL) / 2, len(right) - 1) * np.std(right, ddof=1)
    found: dict[str, Any] = {
        "method": case.method, "rank": case.rank, "epsilon": case.epsilon,
        "mean": float(np.mean(right)), "half": float(half / math.sqrt(len(right))),
        "accuracies": right, "rate": rate, "clip": None if math.isinf(clip) else clip,
        "edge": on_edge(trials.grid, case, rate, clip),
        "cpu_seconds": float(np.mean([row["cpu_seconds"] for row in rows])),
    }  # fmt: skip
    if case.private:
        z = rows[0]["noise_multiplier"]
        projected = case.rank if case.method == "dp-flora" and case.rank else trials.width
        found |= {
            "step": rate * clip,
            "z": z,
            "z_weights": z * math.sqrt(trials.width / projected),
        }
        found |= {"proved_epsilon": rows[0]["proved_epsilon"], "trained": rows[0]["trained"]}
    return found


def on_edge(grid: Grid, case: Case, rate: float, clip: float) -> bool:
    """Whether the best rate is the smallest or largest that its clip tried."""
    tried = [r for r, c in grid.of(case) if c == clip]
    return rate in (min(tried), max(tried))


def differences(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """dp-flora minus dp-lora-fa and minus dp-sgd, in points, with Welch's interval."""

    def at(method: str, rank: int | None, epsilon: float) -> dict[str, Any]:
        wanted = (method, rank, epsilon)
        return next(c for c in cells if (c["method"], c["rank"], c["epsilon"]) == wanted)

    found = []
    for cell in cells:
        if cell["method"] != "dp-flora":
            continue
        rank, epsilon = cell["rank"], cell["epsilon"]
        row: dict[str, Any] = {"epsilon": epsilon, "rank": rank}
        for method, other in (("dp-lora-fa", rank), ("dp-sgd", None)):
            x, y = cell["accuracies"], at(method, other, epsilon)["accuracies"]
            interval = stats.ttest_ind(x, y, equal_var=False).confidence_interval(LEVEL)
            row[method] = float(np.mean(x) - np.mean(y))
            row[f"{method} half"] = float(interval.high - interval.low) / 2
        found.append(row)
    return found


def run(
    plan: Plan, name: str, data: Splits, classes: int, runs: Runs, *, finished: bool = False
) -> dict[str, Any] | None:
    """All cells of a task; with ``finished`` of each ε whose runs are all there already."""
    trials = Trials(
        name, data, classes, runs, GRID,
        batch_size=plan.batch_size, epochs=plan.epochs, tuning_seeds=plan.tuning_seeds,
    )  # fmt: skip
    cases = [plan.cases(epsilon) for epsilon in (None, *plan.epsilons)]
    if finished:
        cases = [part for part in cases if all(trials.finished(c, plan.seeds) for c in part)]
    chosen = [case for part in cases for case in part]
    if len(cases) < 2 or chosen[0].private:  # without noise comes first
        return None
    cells = [cell_of(trials, case, plan.seeds) for case in tqdm(chosen, desc=name)]
    largest = float(np.bincount(data.test.labels.numpy()).max() / len(data.test.labels))
    return {
        "train": len(data.train.labels), "held_out": len(data.held_out.labels),
        "test": len(data.test.labels), "largest_class": 100 * largest, "rate": trials.rate,
        "steps": plan.epochs * round(1 / trials.rate),
        "cells": cells, "differences": differences(cells),
        "edges": sum(cell["edge"] for cell in cells if cell["epsilon"]),
    }  # fmt: skip


def plus_minus(value: float, half: float) -> str:
    return f"{value:.1f} ± {half:.1f}".replace("-", "−")


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Markdown, by its name on the page: four tables a task."""
    return {
        f"{name}, {kind}": table
        for name, task in results["tasks"].items()
        for kind, table in task_tables(task).items()
    }


def task_tables(task: dict[str, Any]) -> dict[str, str]:
    """Accuracies by ε, a method and rank a row; differences; noise; what tuning chose."""
    epsilons = list(dict.fromkeys(cell["epsilon"] for cell in task["cells"]))
    private = [epsilon for epsilon in epsilons if epsilon is not None]
    rows: dict[tuple[str, int | None], dict[float | None, dict[str, Any]]] = {}
    for cell in task["cells"]:
        method = {"sgd": "dp-sgd", "lora-fa": "dp-lora-fa", "flora": "dp-flora"}
        key = (method.get(cell["method"], cell["method"]), cell["rank"])
        rows.setdefault(key, {})[cell["epsilon"]] = cell
    head = ["method", "rank", *(f"ε = {epsilon:g}" for epsilon in private), "no noise"]
    lines = [head, ["---"] * len(head)]
    for (method, rank), found in rows.items():
        shown = [plus_minus(found[e]["mean"], found[e]["half"]) for e in (*private, None)]
        lines.append([method, str(rank or "–"), *shown])
    noise = [["method", "rank", *head[2:-1]], ["---"] * (len(head) - 1)]
    chosen = [line.copy() for line in noise]
    for (method, rank), found in rows.items():
        cells = [found[e] for e in private]
        steps = [f"{c['step']:.2g} at {c['clip']:g}" for c in cells]
        chosen.append([method, str(rank or "–"), *steps])
        if method == "dp-lora-fa":
            continue  # the z of dp-sgd
        shown = [f"{c['z']:.2f}" + f" ({c['z_weights']:.2f})" * bool(rank) for c in cells]
        noise.append([method, str(rank or "–"), *shown])
    gaps = [["ε", "rank", "dp-flora − dp-lora-fa", "dp-flora − dp-sgd"], ["---"] * 4]
    for row in task["differences"]:
        shown = [plus_minus(row[m], row[f"{m} half"]) for m in ("dp-lora-fa", "dp-sgd")]
        gaps.append([f"{row['epsilon']:g}", str(row["rank"]), *shown])
    return {
        "accuracy": markdown(lines),
        "differences": markdown(gaps),
        "noise": markdown(noise),
        "settings": markdown(chosen),
    }


def draw(ax: Axes, task: dict[str, Any], epsilon: float) -> None:
    """Accuracy against rank at one ε."""
    cells = [cell for cell in task["cells"] if cell["epsilon"] == epsilon]
    whole = next(cell for cell in cells if cell["method"] == "dp-sgd")
    ax.axhspan(whole["mean"] - whole["half"], whole["mean"] + whole["half"], color="0.85", lw=0)
    ax.axhline(whole["mean"], color="black", lw=1, label="dp-sgd (no rank)")
    frozen = [c for c in task["cells"] if c["method"] == "lora-fa"]
    ranks = [cell["rank"] for cell in frozen]
    ax.plot(
        ranks, [c["mean"] for c in frozen],
        color="#888888", ls=":", lw=1.2, label="frozen A without noise",
    )  # fmt: skip
    for method, (colour, marker, line) in zip(("dp-flora", "dp-lora-fa"), STYLES, strict=False):
        found = [cell for cell in cells if cell["method"] == method]
        ax.errorbar(
            ranks, [c["mean"] for c in found], yerr=[c["half"] for c in found],
            color=colour, marker=marker, ls=line, ms=4, capsize=2, lw=1.2, label=method,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.minorticks_off()


def figure(results: dict[str, Any]) -> plt.Figure:
    """A row a task, a column an ε."""
    tasks = results["tasks"]
    done = {name: {cell["epsilon"] for cell in task["cells"]} for name, task in tasks.items()}
    epsilons = [e for e in results["plan"]["epsilons"] if any(e in one for one in done.values())]
    names = list(tasks)
    drawn, axes = plt.subplots(
        len(names), len(epsilons), squeeze=False, sharey="row", sharex=True,
        figsize=(max(6.5, 2.6 * len(epsilons) + 1), 2.5 * len(names) + 0.9),
    )  # fmt: skip
    for row, name in zip(axes, names, strict=True):
        for ax, epsilon in zip(row, epsilons, strict=True):
            ax.set_visible(epsilon in done[name])
            if epsilon in done[name]:
                draw(ax, tasks[name], epsilon)
        row[0].set_ylabel(f"{name.upper()}: test accuracy, %")
    for ax, epsilon in zip(axes[0], epsilons, strict=True):
        ax.set_title(f"ε = {epsilon:g}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel(f"rank, of {results['width']} inputs")
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="lower center", ncols=4, frameon=False)
    drawn.tight_layout(rect=(0, 0.06, 1, 1))
    return drawn


def collect(
    plan: Plan, tasks: dict[str, tuple[Splits, int]], runs: Runs, *, finished: bool = False
) -> dict[str, Any]:
    """The results of every task, for the json."""
    found = {
        name: run(plan, name, data, classes, runs, finished=finished)
        for name, (data, classes) in tasks.items()
    }
    found = {name: task for name, task in found.items() if task}
    width = next(iter(tasks.values()))[0].train.features.shape[1]
    shown = {
        "epsilons": list(plan.epsilons), "ranks": list(plan.ranks), "seeds": list(plan.seeds),
        "tuning_seeds": list(plan.tuning_seeds), "batch_size": plan.batch_size,
        "epochs": plan.epochs, "delta": DELTA, "level": LEVEL, "settings": len(GRID.plain),
        "private_settings": sum(len(steps) for steps in GRID.steps.values()),
    }  # fmt: skip
    cpu = sum(row.get("cpu_seconds", 0.0) for row in runs.rows)
    return {
        "published": PUBLISHED, "plan": shown, "width": width, "tasks": found,
        "training_cpu_seconds": cpu,
    }  # fmt: skip


def made_up(records: int, classes: int, width: int, seed: int) -> Split:
    """Features around a random direction for each class, of length 1."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(classes, (records,), generator=generator)
    rows = centres[labels] + torch.randn(records, width, generator=generator)
    return Split(torch.nn.functional.normalize(rows, dim=1), labels)


def main() -> None:
    known = parser("Accuracy of private methods on a head, at equal ε.")
    known.add_argument("--finished", action="store_true", help="report what a stopped run left")
    options = known.parse_args()
    plan = FULL if options.full else QUICK
    runs = Runs(options.work / "p2_accuracy.jsonl")
    tasks = {}
    for name, task in TASKS.items():
        cache = options.work / f"{name}_features.pt"
        tasks[name] = (splits(task, options.data, cache), task.classes)
    results = collect(plan, tasks, runs, finished=options.finished)
    save_json(options.docs, NAME, results)
    save_figure(options.docs, NAME.replace("-", "_"), figure(results))
    fill(options.docs, NAME, tables(results))


if __name__ == "__main__":
    main()
