"""Reproduction P3: singular values of private gradients, and steps to an accuracy, on sentences.

    OMP_NUM_THREADS=1 python examples/reproduce/p3_denoising.py --data FOLDER

MiniLM with adapters on its last layers, or their whole matrices, learns SST-2's sentences
(with --full also CoLA) privately, with and without denoising. Writes
docs/reproduction/p3-denoising.json and two figures, and prints the tables of
docs/reproduction/p3-denoising.md. A finished run is kept in --work and not run again; --report
only reads the json.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from _common import Runs, parser, save_json
from _p3_report import draw, summary_of, tables_of
from _p3_training import Comparison, Plan, Records, lora, noisy_law, train, without_dropout
from torch import nn
from torch.nn import functional

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.batches import Batch, TokenisedDataset
from lora_privacy.assess.models import load_model
from lora_privacy.core import CachedPrefix
from lora_privacy.data import load

NAME = "p3-denoising"
TARGETS = ("query", "value")
CLIP = 1.0
RATES = {"dp-lora": (1e-2, 3e-2), "dp-sgd": (1e-3, 3e-3)}
TUNED_AT = 8.0  # ε; its rates serve at all
TUNING_SEED = 100
KEPT = 40  # singular values of a profile, the largest

# Folder, training file, dev file, column of the text; the label is column 1 of both.
TASKS = {
    "sst2": ("sst2_sentences", "train.tsv", "dev.tsv", 0),
    "cola": ("cola", "in_domain_train.tsv", "in_domain_dev.tsv", 3),
}


def adapted(method: str, seed: int, layers: int) -> tuple[nn.Module, Any]:
    """MiniLM, ready for ``"dp-lora"`` or, on whole matrices, for ``"dp-sgd"``; its tokenizer."""
    torch.manual_seed(seed)
    model, tokenizer = load_model(AssessConfig(model="minilm"), 2)
    if method == "dp-lora":
        last = range(-layers, 0)
        lora(model, seed, targets=TARGETS, layers=last, trainable=("head",))
    else:
        blocks = len(model.encoder.encoder.layer)
        last = [f"layer.{i}." for i in range(blocks - layers, blocks)]
        ends = tuple(f"{name}.weight" for name in TARGETS)
        for path, parameter in model.named_parameters():
            inside = any(layer in path for layer in last) and path.endswith(ends)
            parameter.requires_grad_(inside or path.startswith("head."))
    return without_dropout(model).train(), tokenizer


class Sentences:
    """The texts of a task, and what the frozen layers make of them, computed once.

    The training file is split: a fixed random part is held out to score on while training. The
    dev file scores finished runs.
    """

    def __init__(self, task: str, args: argparse.Namespace) -> None:
        folder, train_file, dev_file, column = TASKS[task]
        model, tokenizer = adapted("dp-lora", 0, args.layers)
        self.args, self._sets, self._prefixes = args, [], []
        for file, limit in ((train_file, args.records), (dev_file, args.dev)):
            path = args.data / folder / file
            texts = load(path, text_columns=column, label_column=1, header=False, limit=limit)
            tokens = TokenisedDataset(texts, tokenizer, args.max_length, causal=False)
            prefix = CachedPrefix(model)
            prefix.fill((batch.ids, batch.inputs()) for batch in tokens.ordered(128))
            self._sets.append(tokens)
            self._prefixes.append(prefix)
        by_length = np.concatenate([batch.ids for batch in self._sets[0].ordered(128)]).tolist()
        split = np.random.default_rng(0).permutation(len(by_length))
        held_out = set(split[: args.validation].tolist())
        self.validation = [i for i in by_length if i in held_out]
        self.training = [i for i in by_length if i not in held_out]
        self.key = {
            "task": task,
            "layers": args.layers,
            "records": len(self.training),
            "validation": len(self.validation),
            "max_length": args.max_length,
        }
        self.dev = np.concatenate([batch.ids for batch in self._sets[1].ordered(128)]).tolist()

    def records(self, model: nn.Module) -> Records:
        """The training part, for ``model``."""
        tokens = self._sets[0]
        prefix = self._prefixes[0].over(model)

        def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
            with prefix.using(batch.ids, batch.attention_mask):
                return functional.cross_entropy(model(**batch.inputs()), batch.labels)

        return Records(
            order=self.training,
            batch=lambda ids: tokens.batch(np.asarray(ids)),
            loss=loss,
            score=lambda model: self.score(model, prefix, tokens, self.validation),
            physical=self.args.physical_batch_size,
        )

    def dev_score(self, model: nn.Module) -> dict[str, float]:
        """Of the dev file."""
        return self.score(model, self._prefixes[1].over(model), self._sets[1], self.dev)

    @staticmethod
    @torch.no_grad()
    def score(
        model: nn.Module, prefix: CachedPrefix, tokens: TokenisedDataset, ids: list[int]
    ) -> dict[str, float]:
        """Mean loss, accuracy, and Matthews' correlation (0 where one class is predicted)."""
        logits, labels = [], []
        for start in range(0, len(ids), 100):
            batch = tokens.batch(np.asarray(ids[start : start + 100]))
            with prefix.using(batch.ids, batch.attention_mask):
                logits.append(model(**batch.inputs()))
            labels.append(batch.labels)
        out, truth = torch.cat(logits), torch.cat(labels)
        said = out.argmax(1)
        right, wrong = (int(((said == 1) & (truth == k)).sum()) for k in (1, 0))
        missed, rest = (int(((said == 0) & (truth == k)).sum()) for k in (1, 0))
        sides = (right + wrong) * (right + missed) * (rest + wrong) * (rest + missed)
        return {
            "loss": float(functional.cross_entropy(out, truth)),
            "accuracy": (right + rest) / len(ids),
            "mcc": (right * rest - wrong * missed) / math.sqrt(sides) if sides else 0.0,
        }


def learn(data: Sentences, plan: Plan, *, dev: bool) -> dict[str, Any]:
    """One run; with ``dev`` its final model is scored on the dev file."""
    model, _ = adapted(plan.method, plan.seed, data.args.layers)
    found = train(model, data.records(model), plan)
    if dev:
        found["dev"] = data.dev_score(model)
    return found


def spectra(data: Sentences, plan: Plan) -> dict[str, Any]:
    """A plain run whose gradients are looked at: cosines of all, singular values of the last."""
    model, _ = adapted(plan.method, plan.seed, data.args.layers)
    seen = Comparison()
    found = train(model, data.records(model), plan, seen)
    profiles = {}
    for path, history in seen.profile.records.items():
        if f"layer.{len(model.encoder.encoder.layer) - 1}." not in path or "value" not in path:
            continue
        last = history[-1]  # one step, as means over steps would mix kept and restored ones
        std = last.noise_std
        values = {
            "before": last.before / std,
            "noisy": last.noisy / std,
            "restored": last.restored / std,
            "predicted": noisy_law(last.before / std, last.shape),
        }
        profiles[path] = {
            "shape": list(last.shape),
            "step": last.step,
            # in units of the noise's standard deviation
            **{name: [round(float(x), 4) for x in v[:KEPT]] for name, v in values.items()},
        }
    return {**found, "rows": seen.rows, "profiles": profiles}


def chosen_rates(runs: Runs, data: Sentences, args: argparse.Namespace) -> dict[str, float]:
    """Method -> the rate of the best held-out mean over the last three scorings, undenoised.

    One run a rate, at one ε. Every denoiser is put into the training that was tuned without it.
    """
    found = {}
    for method in args.methods:
        means = {}
        for rate in RATES[method]:
            plan = plan_of(args, method, "none", TUNED_AT, TUNING_SEED, rate)
            key = {"stage": "tune", **data.key, **asdict(plan)}
            row = runs.get(key, lambda plan=plan: learn(data, plan, dev=False))
            means[rate] = np.mean([point["accuracy"] for point in row["curve"][-3:]])
        found[method] = max(means, key=lambda rate: means[rate])
    return found


def plan_of(
    args: argparse.Namespace, method: str, shrinker: str, epsilon: float, seed: int, rate: float
) -> Plan:
    """The settings that all runs share, and these."""
    return Plan(
        method=method,
        shrinker=shrinker,
        epsilon=epsilon,
        seed=seed,
        rate=rate,
        clip=args.clip,
        steps=args.steps,
        batch_size=args.batch_size,
        every=args.every,
    )


def arms(method: str, epsilon: float, *, full: bool) -> tuple[str, ...]:
    """Shrinkers that are trained with; the quick form trains whole matrices at one ε only."""
    if full:
        return ("none", "frobenius", "debias", "partial", "hard")
    if method == "dp-lora":
        return ("none", "frobenius", "debias", "partial")
    return ("none", "frobenius") if epsilon == TUNED_AT else ()


def options() -> argparse.Namespace:
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--report", action="store_true", help="tables and figures from the json")
    found.add_argument("--part", choices=("spectra", "tuning", "accuracy", "all"), default="all")
    found.add_argument("--methods", nargs="+", default=["dp-lora", "dp-sgd"])
    found.add_argument("--epsilons", nargs="+", type=float, default=[8.0, 1.0])
    found.add_argument("--seeds", type=int, default=None, help="3, with --full 5")
    found.add_argument("--layers", type=int, default=None, help="trained: the last 1, --full 2")
    found.add_argument("--steps", type=int, default=None, help="10, with --full 100")
    found.add_argument("--spectrum-steps", type=int, default=5)
    found.add_argument("--every", type=int, default=1, help="steps between scorings")
    found.add_argument("--batch-size", type=int, default=400)
    found.add_argument("--physical-batch-size", type=int, default=64)
    found.add_argument("--clip", type=float, default=CLIP)
    found.add_argument("--max-length", type=int, default=32)
    found.add_argument("--records", type=int, default=4000, help="of the training file")
    found.add_argument("--validation", type=int, default=250, help="of these, held out")
    found.add_argument("--dev", type=int, default=None, help="of the dev file; all")
    args = found.parse_args()
    args.seeds = args.seeds or (5 if args.full else 3)
    args.layers = args.layers or (2 if args.full else 1)
    args.steps = args.steps or (100 if args.full else 10)
    return args


def main() -> None:
    args = options()
    if args.report:
        text = (args.docs / "reproduction" / f"{NAME}.json").read_text(encoding="utf-8")
        report(args, json.loads(text))
        return
    runs = Runs(args.work / f"{NAME}.jsonl")
    wanted: list[dict[str, Any]] = []
    rates: dict[str, float] = {}
    for task in ("sst2", "cola") if args.full else ("sst2",):
        data = Sentences(task, args)
        print(f"{task}: {len(data.training)} to train on, {len(data.validation)} held out")
        if task == "sst2" and args.part in ("spectra", "all"):
            for method in args.methods:
                for epsilon in args.epsilons:
                    plan = plan_of(args, method, "none", epsilon, 0, RATES[method][0])
                    plan = replace(plan, steps=args.spectrum_steps)
                    key = {"stage": "spectra", **data.key, **asdict(plan)}
                    wanted.append(runs.get(key, lambda plan=plan, data=data: spectra(data, plan)))
        if args.part == "spectra":
            continue
        if task == "sst2":
            rates = chosen_rates(runs, data, args)
            print(rates)
        if args.part == "tuning":
            continue
        for seed in range(args.seeds):
            for epsilon in args.epsilons:
                for method in args.methods:
                    for shrinker in arms(method, epsilon, full=args.full):
                        plan = plan_of(args, method, shrinker, epsilon, seed, rates[method])
                        key = {"stage": "final", **data.key, **asdict(plan)}
                        row = runs.get(
                            key, lambda plan=plan, data=data: learn(data, plan, dev=True)
                        )
                        wanted.append(row)
                        print(key, flush=True)
    if args.part == "all":
        tuned = [row for row in runs.rows if row["key"]["stage"] == "tune"]
        report(args, {"rates": rates, "runs": [*tuned, *wanted]})


def report(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the json and the figures, and print the tables."""
    results = {**results, "summary": summary_of(results["runs"])}
    save_json(args.docs, NAME, results)
    draw(args.docs, results)
    print(tables_of(results))


if __name__ == "__main__":
    main()
