"""Reproduction P3: held-out loss of SmolLM2-135M on table-to-text, with and without denoising.

    OMP_NUM_THREADS=1 python examples/reproduce/p3_language_model.py --data FOLDER

Adapters on the last four layers learn short pairs of E2E (with --full also DART) privately. Writes
docs/reproduction/p3-language-model.json and a figure, and prints the table of
docs/reproduction/p3-denoising.md. Finished runs are kept in --work; --report only reads the json.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import STYLES, Runs, parser, save_figure, save_json
from _p3_report import interval
from _p3_training import SHRINKERS, Plan, Records, lora, paired, train, without_dropout
from torch import Tensor, nn
from torch.nn import functional

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.models import load_model
from lora_privacy.core import CachedPrefix

if TYPE_CHECKING:
    from pathlib import Path

NAME = "p3-language-model"
IGNORED = -100  # label of a token that is not learned
CLIP = 1.0

Pair = tuple[list[int], list[int]]


def pairs_of(task: str, data: Path) -> list[tuple[str, str]]:
    """What is told and how it is said, from the file that is trained on."""
    if task == "e2e":
        with (data / "e2e" / "devset.csv").open(encoding="utf-8", newline="") as file:
            return [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    (path,) = (data / "dart").glob("*.json")
    found = []
    for item in json.loads(path.read_text(encoding="utf-8")):
        told = ", ".join(" | ".join(triple) for triple in item["tripleset"])
        found.append((told, item["annotations"][0]["text"]))
    return found


class Pairs:
    """Short pairs of a task, split at random, and what the frozen layers make of them."""

    def __init__(
        self,
        task: str,
        base: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        args: argparse.Namespace,
    ) -> None:
        rng = np.random.default_rng(0)
        rows: list[Pair] = []
        for told, said in pairs_of(task, args.data):
            prompt = tokenizer(f"{told} -> ")["input_ids"]
            text = tokenizer(said + tokenizer.eos_token)["input_ids"]
            if len(prompt) + len(text) <= args.max_length:
                rows.append((prompt, text))
        wanted = args.records + args.validation
        if len(rows) < wanted:
            raise ValueError(f"{task} has {len(rows)} pairs this short; {wanted} are asked for.")
        kept = [rows[i] for i in rng.permutation(len(rows))[:wanted]]
        self.rows, self.args = kept, args
        length = [len(prompt) + len(text) for prompt, text in kept]
        self.validation = sorted(range(args.validation), key=lambda i: length[i])
        self.training = sorted(range(args.validation, wanted), key=lambda i: length[i])
        self.base = base
        self._prefix = CachedPrefix(base)
        everyone = [*self.validation, *self.training]
        parts = (everyone[i : i + 16] for i in range(0, wanted, 16))
        self._prefix.fill((part, self._inputs(part)) for part in parts)

    def _padded(self, values: list[list[int]], fill: int) -> Tensor:
        longest = max(len(row) for row in values)
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    def _inputs(self, ids: list[int]) -> dict[str, Tensor]:
        both = [[*self.rows[i][0], *self.rows[i][1]] for i in ids]
        mask = [[1] * len(row) for row in both]
        return {"input_ids": self._padded(both, 0), "attention_mask": self._padded(mask, 0)}

    def losses(self, model: nn.Module, prefix: CachedPrefix, ids: list[int]) -> Tensor:
        """Mean over each pair's own tokens, the prompt's left out, (pairs,)."""
        inputs = self._inputs(ids)
        labels = [[IGNORED] * len(self.rows[i][0]) + self.rows[i][1] for i in ids]
        wanted = self._padded(labels, IGNORED)[:, 1:]
        with prefix.using(ids, inputs["attention_mask"]):
            logits = model(**inputs).logits[:, :-1]
        loss = functional.cross_entropy(
            logits.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED
        )
        return loss.sum(1) / (wanted != IGNORED).sum(1)

    def records(self, model: nn.Module) -> Records:
        """The training part, for ``model``."""
        prefix = self._prefix.over(model)

        @torch.no_grad()
        def score(model: nn.Module) -> dict[str, float]:
            held_out = self.validation
            parts = [held_out[i : i + 8] for i in range(0, len(held_out), 8)]
            found = torch.cat([self.losses(model, prefix, part) for part in parts])
            return {"loss": float(found.mean())}

        return Records(
            order=self.training,
            batch=list,
            loss=lambda model, ids: self.losses(model, prefix, ids).mean(),
            score=score,
            physical=self.args.physical_batch_size,
        )


def summary_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each task and arm: losses, and paired differences of runs of the same seed."""
    cells: dict[str, dict[str, dict[int, Any]]] = {}
    for run in runs:
        key = run["key"]
        cells.setdefault(key["task"], {}).setdefault(key["shrinker"], {})[key["seed"]] = run
    found = []
    for task, cell in cells.items():
        for shrinker, by_seed in cell.items():
            own = {seed: _measures(run) for seed, run in by_seed.items()}
            base = {seed: _measures(run) for seed, run in cell["none"].items()}
            both = sorted(own.keys() & base.keys())
            found.append(
                {
                    "task": task,
                    "shrinker": shrinker,
                    "noise_multiplier": next(iter(by_seed.values()))["noise_multiplier"],
                    "values": {name: [own[s][name] for s in both] for name in own[both[0]]},
                    "differences": {
                        name: paired([own[s][name] - base[s][name] for s in both])
                        for name in own[both[0]]
                        if shrinker != "none"
                    },
                }
            )
    return found


def _measures(run: dict[str, Any]) -> dict[str, float]:
    losses = [point["loss"] for point in run["curve"]]
    return {"start": losses[0], "mean": float(np.mean(losses[1:])), "end": losses[-1]}


def table_of(results: dict[str, Any]) -> str:
    """The table of the page, in Markdown."""
    lines = [
        "| data | denoiser | before | mean over training | difference | end | difference |",
        "|" + "---|" * 7,
    ]
    names = {"e2e": "E2E", "dart": "DART"}
    for row in results["summary"]:
        cells = [names[row["task"]], f"`{row['shrinker']}`"]
        cells.append(f"{np.mean(row['values']['start']):.3f}")
        for name in ("mean", "end"):
            cells.append(f"{np.mean(row['values'][name]):.3f}")
            cells.append(interval(row["differences"].get(name), 3))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(docs: Path, results: dict[str, Any]) -> None:
    """Loss against steps, a panel for each task: thick the mean over seeds, thin every seed."""
    tasks = list(dict.fromkeys(run["key"]["task"] for run in results["runs"]))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(4.6 * len(tasks), 3.1), squeeze=False, layout="constrained"
    )
    styles = dict(zip(SHRINKERS, STYLES, strict=True))
    for ax, task in zip(axes[0], tasks, strict=True):
        for name, (colour, marker, line) in styles.items():
            own = [
                run
                for run in results["runs"]
                if (run["key"]["task"], run["key"]["shrinker"]) == (task, name)
            ]
            if not own:
                continue
            steps = [point["step"] for point in own[0]["curve"]]
            curves = np.array([[point["loss"] for point in run["curve"]] for run in own])
            ax.plot(steps, curves.T, color=colour, ls=line, lw=0.6, alpha=0.5)
            ax.plot(
                steps,
                curves.mean(0),
                color=colour,
                ls=line,
                marker=marker,
                ms=5,
                lw=1.8,
                label=name,
            )
        epsilon = results["runs"][0]["key"]["epsilon"]
        ax.set_title(f"{task.upper()}, ε = {epsilon:g}", fontsize=9)
        ax.set_xlabel("private steps")
        ax.set_ylabel("held-out loss, nats a token")
        ax.legend(frameon=False)
    save_figure(docs, "p3_language_model", figure)


def options() -> argparse.Namespace:
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--report", action="store_true", help="table and figure from the json")
    found.add_argument("--model", default="smollm2", help="smollm2, a local folder, or a hub id")
    found.add_argument("--layers", type=int, default=4, help="the last so many are adapted")
    found.add_argument("--epsilon", type=float, default=8.0)
    found.add_argument("--rate", type=float, default=2e-3)
    found.add_argument("--clip", type=float, default=CLIP)
    found.add_argument("--seeds", type=int, default=None, help="3, with --full 5")
    found.add_argument("--steps", type=int, default=None, help="10, with --full 100")
    found.add_argument("--every", type=int, default=5, help="steps between scorings")
    found.add_argument("--batch-size", type=int, default=None, help="16, with --full 48")
    found.add_argument("--physical-batch-size", type=int, default=8)
    found.add_argument("--records", type=int, default=None, help="200, with --full 1500")
    found.add_argument("--validation", type=int, default=24, help="pairs held out")
    found.add_argument("--max-length", type=int, default=64, help="longer pairs are left out")
    args = found.parse_args()
    quick = {"seeds": (3, 5), "steps": (10, 100), "batch_size": (16, 48), "records": (200, 1500)}
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
    model, tokenizer = load_model(AssessConfig(model=args.model, task="causal-lm"), 0)
    without_dropout(model)
    last = range(-args.layers, 0)

    def adapted(seed: int) -> nn.Module:
        return lora(copy.deepcopy(model), seed, layers=last)

    arms = ("none", "frobenius", "debias", "partial") if args.full else ("none", "frobenius")
    wanted = []
    for task in ("e2e", "dart") if args.full else ("e2e",):
        pairs = Pairs(task, adapted(0), tokenizer, args)
        for seed in range(args.seeds):
            for shrinker in arms:
                plan = Plan(
                    method="dp-lora",
                    shrinker=shrinker,
                    epsilon=args.epsilon,
                    seed=seed,
                    rate=args.rate,
                    clip=args.clip,
                    steps=args.steps,
                    batch_size=args.batch_size,
                    every=args.every,
                )

                def run(plan: Plan = plan, pairs: Pairs = pairs) -> dict[str, Any]:
                    own = adapted(plan.seed)
                    return train(own, pairs.records(own), plan)

                key = {"task": task, "records": args.records, **asdict(plan)}
                wanted.append(runs.get(key, run))
                print(key, flush=True)
    report(args, {"runs": wanted, "summary": summary_of(wanted)})


def report(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the json and the figure, and print the table."""
    save_json(args.docs, NAME, results)
    draw(args.docs, results)
    print(table_of(results))


if __name__ == "__main__":
    main()
