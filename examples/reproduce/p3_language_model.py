"""Reproduction P3: held-out loss of SmolLM2-135M on table-to-text, with and without denoising.

    OMP_NUM_THREADS=1 python examples/reproduce/p3_language_model.py --data FOLDER

Adapters on the last block learn short pairs of E2E (with --full also DART) privately, and once
without noise. Writes docs/reproduction/p3-language-model.json and a figure, and prints the table
of docs/reproduction/p3-denoising.md. Finished runs are kept in --work; --report only reads the
json. Rates and clips come from p3-language-model-choice.json beside it; --choose, or its absence,
chooses anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import STYLES, Runs, parser, save_figure, save_json
from _p3_pairs import Pairs
from _p3_report import interval
from _p3_training import SHRINKERS, Plan, Records, lora, paired, train, without_dropout

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.models import load_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

NAME = "p3-language-model"
REFERENCE = "no noise"  # stands where others have a denoiser
TUNED = ("none", "frobenius", REFERENCE)  # other shrinkers take what is best for frobenius
RATES = (1e-2, 3e-2)
CLIPS = (
    0.1,
    0.03,
)  # about the norm of a pair's gradient; the second at the best rate of the first
CHOICE_SEED = 100
CHOICE_EPSILON = 8.0
SHARE = 0.9  # of the fall of the loss that undenoised private training reaches

Row = dict[str, Any]


def train_plainly(model: nn.Module, records: Records, plan: Plan) -> Row:
    """The same steps without clip and noise, on batches of a fixed size; **not private**."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=plan.rate, weight_decay=0.0)
    rng = np.random.default_rng(plan.seed)
    curve = [{"step": 0, **records.score(model)}]
    started = time.process_time()
    scoring = 0.0
    for step in range(1, plan.steps + 1):
        at = np.sort(rng.choice(len(records.order), plan.batch_size, replace=False))
        for start in range(0, plan.batch_size, records.physical):
            ids = [records.order[i] for i in at[start : start + records.physical]]
            loss = records.loss(model, records.batch(ids))
            (loss * len(ids) / plan.batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % plan.every == 0 or step == plan.steps:
            before = time.process_time()
            curve.append({"step": step, **records.score(model)})
            scoring += time.process_time() - before
    return {
        "noise_multiplier": 0.0,
        "trained": sum(p.numel() for p in own),
        "proved_epsilon": None,
        "cpu_seconds": time.process_time() - started - scoring,
        "cpu_seconds_scoring": scoring,
        "curve": curve,
    }


class Trainings:
    """Runs of one task, each by its settings; a finished one is read from its file."""

    def __init__(self, task: str, runs: Runs, args: argparse.Namespace) -> None:
        config = AssessConfig(model=args.model, task="causal-lm")
        self._model, tokenizer = load_model(config, 0)
        without_dropout(self._model)
        self._runs, self._args = runs, args
        self._pairs = Pairs(task, self._adapted(0), tokenizer, args)
        self._setting = {
            "task": task,
            "layers": args.layers,
            "targets": args.targets,
            "max_length": args.max_length,
            "records": args.records,
        }

    def _adapted(self, seed: int) -> nn.Module:
        options = {"layers": range(-self._args.layers, 0), "targets": self._args.targets}
        return lora(copy.deepcopy(self._model), seed, **options)

    def get(
        self, stage: str, shrinker: str, epsilon: float, seed: int, rate: float, clip: float
    ) -> Row:
        """One run, scored on what is held out for ``stage``, ``"choice"`` or ``"final"``.

        `REFERENCE` as the shrinker trains without noise, whatever ε and clip.
        """
        args = self._args
        plan = Plan(
            method="dp-lora",
            shrinker=shrinker,
            epsilon=epsilon,
            seed=seed,
            rate=rate,
            clip=clip,
            steps=args.steps,
            batch_size=args.batch_size,
            every=args.every if stage == "final" else args.steps,
        )
        held_out = len(self._pairs.held_out[stage])
        key = {"stage": stage, **self._setting, "held_out": held_out, **asdict(plan)}
        learn = train
        if shrinker == REFERENCE:
            key |= {"method": "lora", "epsilon": None, "clip": None}
            learn = train_plainly

        def run() -> Row:
            model = self._adapted(seed)
            return learn(model, self._pairs.records(model, stage), plan)

        row = self._runs.get(key, run)
        print(f"{key}: {row['curve'][-1]['loss']:.4f}, {row['cpu_seconds']:.0f} s", flush=True)
        return row


def choose(trainings: Trainings) -> Row:
    """One run for each rate, then one for the other clip: as many for each shrinker."""
    wanted, chosen = [], {}
    for shrinker in TUNED:
        found: dict[tuple[float, float], Row] = {}
        for clip in CLIPS if shrinker != REFERENCE else CLIPS[:1]:
            for rate in RATES if not found else (best_of(found)[0],):
                found[rate, clip] = trainings.get(
                    "choice", shrinker, CHOICE_EPSILON, CHOICE_SEED, rate, clip
                )
        wanted += found.values()
        chosen[shrinker] = best_of(found)
    return {"runs": wanted, "chosen": chosen}


def best_of(found: dict[tuple[float, float], Row]) -> tuple[float, float]:
    """The settings of the lowest loss at the end."""
    return min(found, key=lambda setting: found[setting]["curve"][-1]["loss"])


def summary_of(runs: list[Row]) -> list[Row]:
    """For each task, ε and arm: losses, and paired differences of runs of the same seed."""
    cells: dict[tuple[str, float | None], dict[str, dict[int, Row]]] = {}
    for run in runs:
        key = run["key"]
        cell = cells.setdefault((key["task"], key["epsilon"]), {})
        cell.setdefault(key["shrinker"], {})[key["seed"]] = run
    found = []
    for (task, epsilon), cell in cells.items():
        plain = cell.get("none", {})
        starts, ends = ([run["curve"][at]["loss"] for run in plain.values()] for at in (0, -1))
        goal = np.mean(starts) - SHARE * (np.mean(starts) - np.mean(ends)) if plain else None
        base = {seed: _measures(run, goal) for seed, run in plain.items()}
        for shrinker, by_seed in cell.items():
            own = {seed: _measures(run, goal) for seed, run in by_seed.items()}
            both = sorted(own.keys() & base.keys())
            found.append(
                {
                    "task": task,
                    "epsilon": epsilon,
                    "shrinker": shrinker,
                    "noise_multiplier": next(iter(by_seed.values()))["noise_multiplier"],
                    "goal": goal,
                    "values": {
                        name: [own[s][name] for s in sorted(own)] for name in own[min(own)]
                    },
                    "differences": {
                        name: paired([own[s][name] - base[s][name] for s in both])
                        for name in own[min(own)]
                        if shrinker != "none" and both
                    },
                }
            )
    return found


def _measures(run: Row, goal: float | None) -> dict[str, float]:
    losses = [point["loss"] for point in run["curve"]]
    found = {"start": losses[0], "mean": float(np.mean(losses[1:])), "end": losses[-1]}
    if goal is not None:
        found["steps"] = _steps_to(run["curve"], goal)
    return found


def _steps_to(curve: list[Row], goal: float) -> float:
    """First step of a loss of at most ``goal``, on straight lines between scorings.

    One scoring past the end where it is not reached.
    """
    for before, after in pairwise(curve):
        if after["loss"] <= goal:
            share = (before["loss"] - goal) / (before["loss"] - after["loss"])
            return before["step"] + share * (after["step"] - before["step"])
    return float(2 * curve[-1]["step"] - curve[-2]["step"])


def table_of(results: Row) -> str:
    """The table of the page, in Markdown."""
    lines = [
        "| data | ε | denoiser | before | mean over training | difference | end | difference "
        f"| steps to {100 * SHARE:.0f} % of the fall | difference |",
        "|" + "---|" * 10,
    ]
    names = {"e2e": "E2E", "dart": "DART"}
    for row in results["summary"]:
        values, differences = row["values"], row["differences"]
        cells = [names[row["task"]], "–" if row["epsilon"] is None else f"{row['epsilon']:g}"]
        arm = row["shrinker"]
        cells += [arm if arm == REFERENCE else f"`{arm}`", f"{np.mean(values['start']):.3f}"]
        for name in ("mean", "end"):
            cells += [f"{np.mean(values[name]):.3f}", interval(differences.get(name), 3)]
        steps = ", ".join(f"{x:.1f}" for x in values.get("steps", [])) or "–"
        cells += [steps, interval(differences.get("steps"), 1)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(docs: Path, results: Row) -> None:
    """Loss against steps, a panel for each task and ε: thick the mean over seeds, thin each."""
    runs = results["runs"]
    panels = dict.fromkeys((run["key"]["task"], run["key"]["epsilon"]) for run in runs)
    panels = [panel for panel in panels if panel[1] is not None]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.3), squeeze=False, sharey="row",
        layout="constrained",
    )  # fmt: skip
    styles = dict(zip((*SHRINKERS, REFERENCE), (*STYLES, ("black", "x", "-")), strict=True))
    for ax, (task, epsilon) in zip(axes[0], panels, strict=True):
        for name, (colour, marker, line) in styles.items():
            wanted = (task, None if name == REFERENCE else epsilon, name)
            keys = ("task", "epsilon", "shrinker")
            own = [run for run in runs if tuple(run["key"][k] for k in keys) == wanted]
            if not own:
                continue
            steps = [point["step"] for point in own[0]["curve"]]
            curves = np.array([[point["loss"] for point in run["curve"]] for run in own])
            ax.plot(steps, curves.T, color=colour, ls=line, lw=0.6, alpha=0.5)
            ax.plot(
                steps, curves.mean(0), color=colour, ls=line, marker=marker, ms=5, lw=1.8,
                label=name,
            )  # fmt: skip
        ax.set_title(f"{task.upper()}, ε = {epsilon:g}", fontsize=9)
        ax.set_xlabel("steps")
        ax.legend(frameon=False)
    axes[0, 0].set_ylabel("held-out loss, nats a token")
    save_figure(docs, "p3_language_model", figure)


def options() -> argparse.Namespace:
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--report", action="store_true", help="table and figure from the json")
    found.add_argument("--choose", action="store_true", help="choose rates and clips anew")
    found.add_argument("--model", default="smollm2", help="smollm2, a local folder, or a hub id")
    found.add_argument("--layers", type=int, default=1, help="the last so many are adapted")
    found.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    found.add_argument("--epsilons", nargs="+", type=float, default=None, help="8, --full 8 1")
    found.add_argument("--seeds", type=int, default=None, help="3, with --full 5")
    found.add_argument("--steps", type=int, default=None, help="8, with --full 100")
    found.add_argument("--every", type=int, default=2, help="steps between scorings")
    found.add_argument("--batch-size", type=int, default=None, help="64, with --full 256")
    found.add_argument("--physical-batch-size", type=int, default=16)
    found.add_argument("--records", type=int, default=None, help="320, with --full 1000")
    found.add_argument("--tuning", type=int, default=32, help="held out to choose settings on")
    found.add_argument("--validation", type=int, default=40, help="held out for the results")
    found.add_argument("--max-length", type=int, default=60, help="longer pairs are left out")
    args = found.parse_args()
    quick = {
        "epsilons": ([8.0], [8.0, 1.0]),
        "seeds": (3, 5),
        "steps": (8, 100),
        "batch_size": (64, 256),
        "records": (320, 1000),
    }
    for name, (few, many) in quick.items():
        if getattr(args, name) is None:
            setattr(args, name, many if args.full else few)
    return args


def main() -> None:
    args = options()
    if args.report:
        path = args.docs / "reproduction" / f"{NAME}.json"
        report(args, json.loads(path.read_text(encoding="utf-8")))
        return
    runs = Runs(args.work / f"{NAME}.jsonl")
    choice = args.docs / "reproduction" / f"{NAME}-choice.json"
    shrinkers = ("none", "frobenius", "debias", "partial") if args.full else ("none", "frobenius")
    wanted = []
    for task in ("e2e", "dart") if args.full else ("e2e",):
        trainings = Trainings(task, runs, args)
        if task == "e2e" and (args.choose or not choice.exists()):
            save_json(args.docs, choice.stem, choose(trainings))
        chosen = json.loads(choice.read_text(encoding="utf-8"))["chosen"]
        rate, clip = chosen[REFERENCE]
        wanted.append(trainings.get("final", REFERENCE, args.epsilons[0], 0, rate, clip))
        for seed in range(args.seeds):
            for epsilon in args.epsilons:
                for shrinker in shrinkers:
                    rate, clip = chosen.get(shrinker, chosen["frobenius"])
                    wanted.append(trainings.get("final", shrinker, epsilon, seed, rate, clip))
    report(args, {"runs": wanted, "summary": summary_of(wanted)})


def report(args: argparse.Namespace, results: Row) -> None:
    """Write the json and the figure, and print the table."""
    save_json(args.docs, NAME, results)
    draw(args.docs, results)
    print(table_of(results))


if __name__ == "__main__":
    main()
