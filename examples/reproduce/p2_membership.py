"""Membership inference on LoRA-FA without noise, then with noise: arXiv:2601.21719's attack.

    OMP_NUM_THREADS=1 python examples/reproduce/p2_membership.py [--data FOLDER] [--full]

A small CNN is trained on scikit-learn's digits by LoRA-FA at the paper's ranks. Every step is a
game: the last of 16 images is in the batch by a fair coin, and attackers who see the weights
before and after the step score it. MiniLM's games are on its first step, on SST-2 sentences of
``--data`` or else on synthetic tickets. With noise the same attack stands beside the proved limit.
docs/reproduction/p2-membership.md explains the results.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _common import STYLES, Runs, parser, save_figure, save_json
from _pages import fill, markdown
from torch import nn
from torch.nn import functional

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.gradients import sample_gradients
from lora_privacy.assess.models import load_model
from lora_privacy.assess.updates import attack_updates
from lora_privacy.audit import auc, projection_attack
from lora_privacy.core import adapt, adapters
from lora_privacy.data import load, tickets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

NAME = "p2-membership"
PUBLISHED = {"16": 99.86, "32": 99.64, "128": 100.0, "256": 100.0, "512": 100.0}  # AUC in %
DELTA, BATCH, REFERENCES, NOISE_RANK = 1e-5, 16, 16, 16
INPUTS, OUTPUTS = 1024, 128  # of the CNN's dense layer
RATE, TRAINED, PRIVATE_POOL = 0.2, 800, 96
NOISES = {"dp-lora-fa": (0.3, 1.0, 3.0, 10.0), "dp-flora": (0.03, 0.1, 0.3, 1.0)}
LAYERS = (
    "encoder.encoder.layer.5.attention.self.query",
    "encoder.encoder.layer.5.attention.self.value",
)
ATTACKERS = {
    "adapter": "adapter and A, rest of the batch",
    "weights": "merged weights, rest of the batch",
    "sample": "adapter and A, 16 other images",
    "final": "last adapter and A, 16 other images",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run."""

    ranks: tuple[int, ...] = tuple(int(rank) for rank in PUBLISHED)
    seeds: tuple[int, ...] = (0,)
    steps: int = 300
    every: int = 6  # a game without the rest of the batch costs more
    candidates: int = 160  # of either kind, for the last adapter
    games: int = 200


class Digits:
    """Images (records, 1, 8, 8) in [0, 1] and classes, in a fixed random order."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        found: Any = load_digits()
        order = np.random.default_rng(0).permutation(len(found.target))
        images = torch.tensor(found.images[order] / 16.0, dtype=torch.float32)
        self.images = images[:, None]
        self.labels = torch.tensor(found.target[order])


def cnn(seed: int) -> nn.Sequential:
    """Two convolutions, the dense layer that is adapted, and a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, INPUTS // 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(INPUTS, OUTPUTS), nn.ReLU(), nn.Linear(OUTPUTS, 10),
        )  # fmt: skip


def factors(model: nn.Sequential, images: torch.Tensor, labels: torch.Tensor) -> list[Array]:
    """δ (records, 128) and x (records, 1024): a record's gradient of the dense weight is δ xᵀ.

    In double precision, whatever the training's: the attacker has time.
    """
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        x = exact[:6](images.double())
        hidden = exact[6](x)
    hidden.requires_grad_(True)
    loss = functional.cross_entropy(exact[7:](hidden), labels, reduction="sum")
    (delta,) = torch.autograd.grad(loss, hidden)
    return [delta.numpy(), x.numpy()]


def outer(delta: Array, x: Array) -> Array:
    """Gradient of each record, (records, 128, 1024)."""
    return delta[:, :, None] * x[:, None, :]


def training(digits: Digits, rank: int, seed: int, plan: Plan) -> dict[str, Any]:
    """Scores of each attacker over the steps of one training, and those of its last adapter."""
    model = adapt(
        cnn(seed), rank, method="lora-fa", targets=("6",), seed=seed, trainable=("0", "3", "8")
    )
    adapter: Any = adapters(model)["6"]
    single, b = adapter.a().float(), adapter.layer.expand.weight
    a, base = single.double().numpy(), adapter.layer.base.weight.detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    rng = np.random.default_rng([rank, seed])
    start, cpu = copy.deepcopy(model), time.process_time()
    others = np.arange(TRAINED, TRAINED + REFERENCES)
    found: dict[str, list[tuple[float, bool]]] = {name: [] for name in ATTACKERS}

    def merged() -> Array:
        """What is released when A stays secret: the weight, in single precision."""
        return (base + b.detach() @ single).double().numpy()

    for step in range(plan.steps):
        rows = rng.choice(TRAINED, BATCH, replace=False)
        member = bool(rng.integers(2))
        used = rows if member else rows[:-1]
        delta, x = factors(model, digits.images[rows], digits.labels[rows])
        known, one = delta[:-1].T @ x[:-1] / BATCH, outer(delta[-1:], x[-1:]) / BATCH
        public = step % plan.every == 0
        if public:
            other = factors(model, digits.images[others], digits.labels[others])
        before, weight = b.detach().double().numpy().copy(), merged()
        optimizer.zero_grad()
        logits = model(digits.images[used])
        (functional.cross_entropy(logits, digits.labels[used], reduction="sum") / BATCH).backward()
        optimizer.step()
        moved = b.detach().double().numpy() - before
        scores = {
            "adapter": projection_attack(moved, one, known=known, a=a, step_size=RATE),
            # Single precision: the attack must not read rounding as rows of A.
            "weights": projection_attack((merged() - weight).astype(np.float32), one, known=known),
        }
        if public:
            scores["sample"] = projection_attack(moved, one, a=a, reference=outer(*other) / BATCH)
        for name, score in scores.items():
            found[name].append((float(score[0]), member))
    with torch.no_grad():
        right = model(digits.images).argmax(1) == digits.labels
    # The last adapter alone: members of the training set against images that no step saw.
    ends = [(0, True), (TRAINED + REFERENCES, False)]
    reference = outer(*factors(start, digits.images[others], digits.labels[others]))
    total = b.detach().double().numpy()
    for first, member in ends:
        for at in range(first, first + plan.candidates, 40):
            part = slice(at, min(at + 40, first + plan.candidates))
            tested = outer(*factors(start, digits.images[part], digits.labels[part]))
            scored = projection_attack(total, tested, a=a, reference=reference)
            found["final"] += [(float(score), member) for score in scored]
    return {
        "scores": {n: [round(s, 6) for s, _ in pairs] for n, pairs in found.items()},
        "members": {n: [int(m) for _, m in pairs] for n, pairs in found.items()},
        "train_accuracy": 100 * float(right[:TRAINED].double().mean()),
        "test_accuracy": 100 * float(right[TRAINED:].double().mean()),
        "cpu_seconds": time.process_time() - cpu,
    }  # fmt: skip


def digits_rows(plan: Plan, runs: Runs) -> list[dict[str, Any]]:
    """AUC of each attacker at each rank, over the games of all seeds together."""
    digits, rows = Digits(), []
    for rank in plan.ranks:
        done = [
            runs.get(
                {"part": "digits", "rank": rank, "seed": seed, "steps": plan.steps},
                lambda rank=rank, seed=seed: training(digits, rank, seed, plan),
            )
            for seed in plan.seeds
        ]
        row: dict[str, Any] = {"rank": rank, "published": PUBLISHED.get(str(rank))}
        for key in ("train_accuracy", "test_accuracy"):
            row[key] = float(np.mean([one[key] for one in done]))
        for name, threat in ATTACKERS.items():
            scores = np.concatenate([one["scores"][name] for one in done])
            members = np.concatenate([one["members"][name] for one in done]).astype(bool)
            estimate = auc(scores, members, threat_model=threat)
            row[name] = {**percent(estimate), "games": len(scores)}
        rows.append(row)
    return rows


def percent(estimate: Any) -> dict[str, float]:  # noqa: ANN401 - RateEstimate
    """AUC and its interval, in %."""
    return {key: 100 * getattr(estimate, key) for key in ("value", "low", "high")}


def digits_gradients(seed: int) -> dict[str, Array]:
    """Gradients of training images at the weights before the first step."""
    digits = Digits()
    part = slice(0, PRIVATE_POOL)
    return {"6": outer(*factors(cnn(seed), digits.images[part], digits.labels[part]))}


def text_gradients(folder: Path) -> dict[str, Array]:
    """The same of MiniLM's last queries and values, on sentences of up to 40 tokens."""
    path = folder / "sst2_sentences/train.tsv"
    texts = tickets(PRIVATE_POOL, seed=0)
    if path.exists():
        found = load(str(path), split="train", text_columns=(0,), label_column=1, header=False)
        texts = found.take(PRIVATE_POOL, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the head
        model, tokenizer = load_model(AssessConfig(), len(texts.classes))
    data = TokenisedDataset(texts, tokenizer, 40, causal=False)
    return sample_gradients(model, data, LAYERS, range(len(data)), "classification")


def first_steps(
    name: str, gradients: Callable[[], Mapping[str, Array]], ranks: tuple[int, ...], plan: Plan,
    runs: Runs,
) -> list[dict[str, Any]]:  # fmt: skip
    """Games on the first step: without noise at ``ranks``, then both private methods."""
    pool: dict[str, Any] = {}
    games = [("lora-fa", rank, 0.0) for rank in ranks]
    games += [(method, NOISE_RANK, z) for method, tried in NOISES.items() for z in tried]
    rows = []
    for method, rank, z in games:
        key = {"part": name, "method": method, "rank": rank, "z": z, "games": plan.games}

        def play(method: str = method, rank: int = rank, z: float = z) -> dict[str, Any]:
            if not pool:
                pool.update(gradients())
            sizes = np.sqrt(sum((g**2).sum((1, 2)) for g in pool.values()))
            cpu = time.process_time()
            private = {
                # Nine in ten exceed the clip by far: the worst case of the bound.
                "max_grad_norm": float(np.quantile(sizes, 0.1)) / 2,
                "noise_multiplier": z,
            }
            found = attack_updates(
                pool, method=method, rank=rank, batch_size=BATCH, games=plan.games, seed=rank,
                law="orthonormal" if method == "dp-flora" else "gaussian", delta=DELTA,
                **(private if z else {}),
            )  # fmt: skip
            best = None if found.best_auc is None else 100 * found.best_auc
            return {
                **percent(found.auc), "epsilon": found.epsilon, "best": best,
                "shapes": [list(shape) for shape in found.shapes],
                "threat": found.knowledge, "cpu_seconds": time.process_time() - cpu,
            }  # fmt: skip

        row = runs.get(key, play)
        rows.append({**row["key"], **{k: v for k, v in row.items() if k != "key"}})
    return rows


def shown(row: Mapping[str, float], digits: int = 1) -> str:
    """AUC in % with its interval."""
    return f"{row['value']:.{digits}f} [{row['low']:.1f}, {row['high']:.1f}]"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Markdown, by its name on the page: attackers by rank; MiniLM by rank; noise."""
    head = ["rank", "published", *ATTACKERS.values(), "test accuracy"]
    ranks = [head, ["---"] * len(head)]
    for row in results["digits"]:
        published = "–" if row["published"] is None else f"{row['published']:.2f}"
        found = [
            shown(row[name], 2 if name in ("adapter", "weights") else 1) for name in ATTACKERS
        ]
        ranks.append([str(row["rank"]), published, *found, f"{row['test_accuracy']:.1f}"])
    text = [["rank", "published", "merged weights, rest of the batch"], ["---"] * 3]
    noise = [["data", "method", "z", "proved ε", "AUC found", "proved limit"], ["---"] * 6]
    for row in results["first_steps"]:
        if row["z"]:
            noise.append([
                row["part"], row["method"], f"{row['z']:g}", f"{row['epsilon']:.3g}",
                shown(row), f"{row['best']:.1f}",
            ])  # fmt: skip
        else:
            published = f"{PUBLISHED[str(row['rank'])]:.2f}"
            text.append([str(row["rank"]), published, shown(row, 2)])
    named = {"digits": ranks, "MiniLM": text, "noise": noise}
    return {name: markdown(rows) for name, rows in named.items()}


def figure(results: dict[str, Any]) -> plt.Figure:
    """AUC against rank without noise; AUC found and proved limit against z, a panel a method."""
    drawn, axes = plt.subplots(1, 3, figsize=(10.5, 3.9), sharey=True)
    left = axes[0]
    rows = results["digits"]
    ranks = [row["rank"] for row in rows]
    for name, (colour, marker, line) in zip(ATTACKERS, STYLES, strict=False):
        found = [row[name] for row in rows]
        left.errorbar(
            ranks, [f["value"] for f in found],
            yerr=[[f["value"] - f["low"] for f in found], [f["high"] - f["value"] for f in found]],
            color=colour, marker=marker, ls=line, ms=4, lw=1.2, capsize=2, label=ATTACKERS[name],
        )  # fmt: skip
    known = [(row["rank"], row["published"]) for row in rows if row["published"] is not None]
    if known:
        left.plot(*zip(*known, strict=True), "k*", ms=9, mfc="none", label="published, CIFAR-10")
    left.set_xscale("log", base=2)
    left.set_xticks(ranks, [str(rank) for rank in ranks])
    left.minorticks_off()
    left.set_xlabel("rank")
    left.set_ylabel("AUC, %")
    left.set_title("no noise: digits, LoRA-FA", fontsize=9)
    for ax, method in zip(axes[1:], NOISES, strict=True):
        for part, (colour, marker, line) in zip(("digits", "MiniLM"), STYLES, strict=False):
            found = [
                row for row in results["first_steps"]
                if row["part"] == part and row["method"] == method and row["z"]
            ]  # fmt: skip
            if not found:
                continue
            z = [row["z"] for row in found]
            ax.plot(z, [row["best"] for row in found], color=colour, ls=line, lw=1.2,
                    label=f"{part}: proved limit")  # fmt: skip
            nudge = 1.06 if part == "MiniLM" else 1 / 1.06  # so that bars do not cover each other
            ax.errorbar(
                [value * nudge for value in z], [row["value"] for row in found],
                yerr=[[r["value"] - r["low"] for r in found],
                      [r["high"] - r["value"] for r in found]],
                color=colour, marker=marker, ls="none", ms=4, capsize=2,
                label=f"{part}: found",
            )  # fmt: skip
        ax.axhline(50, color="black", lw=0.8, ls=":")
        ax.set_xscale("log")
        ax.set_xticks(NOISES[method], [f"{z:g}" for z in NOISES[method]])
        ax.minorticks_off()
        ax.set_xlabel("noise multiplier z")
        ax.set_title(f"{method}, rank {NOISE_RANK}", fontsize=9)
    left.axhline(50, color="black", lw=0.8, ls=":")
    left.set_ylim(30, 103)
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(
            handles, labels, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False,
            fontsize=8,
        )  # fmt: skip
    drawn.tight_layout()
    return drawn


def collect(plan: Plan, folder: Path, runs: Runs, *, text: bool = True) -> dict[str, Any]:
    """Everything of the json."""
    rows = digits_rows(plan, runs)
    steps = first_steps("digits", lambda: digits_gradients(0), (), plan, runs)
    if text:
        ranks = tuple(rank for rank in plan.ranks if rank <= 384)  # MiniLM's width
        steps += first_steps("MiniLM", lambda: text_gradients(folder), ranks, plan, runs)
    return {
        "published": PUBLISHED,
        "plan": {
            "seeds": list(plan.seeds), "steps": plan.steps, "every": plan.every,
            "candidates": plan.candidates, "games": plan.games, "batch": BATCH, "rate": RATE,
            "trained": TRAINED, "pool": PRIVATE_POOL, "delta": DELTA, "inputs": INPUTS,
            "outputs": OUTPUTS,
        },
        "digits": rows,
        "first_steps": steps,
        "cpu_seconds": sum(row["cpu_seconds"] for row in runs.rows),
    }  # fmt: skip


def main() -> None:
    options = parser("Membership inference on updates of LoRA-FA.").parse_args()
    plan = Plan(seeds=tuple(range(10)), every=1, games=1000) if options.full else Plan()
    name = "p2_membership_full" if options.full else "p2_membership"
    results = collect(plan, options.data, Runs(options.work / f"{name}.jsonl"))
    save_json(options.docs, NAME, results)
    save_figure(options.docs, NAME.replace("-", "_"), figure(results))
    fill(options.docs, NAME, tables(results))


if __name__ == "__main__":
    main()
