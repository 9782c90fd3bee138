"""Accuracy, time and memory of the private methods on MiniLM with a mean-pooled head.

    OMP_NUM_THREADS=1 python benchmarks/private_text.py sst2 --methods dp-lora --seeds 0 1 2

Data files are read from ``--data`` (SST-2 whole sentences, or the SMS spam collection: see
docs/results.md). Every finished run is a line of the output file at once.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.batches import Batch, TokenisedDataset
from lora_privacy.assess.models import load_model
from lora_privacy.assess.training import peak_memory, reset_peak_memory
from lora_privacy.core import adapt
from lora_privacy.data import TextDataset, load
from lora_privacy.training import TargetEpsilon, make_private

if TYPE_CHECKING:
    from lora_privacy.training.methods import Method

METHODS: tuple[Method, ...] = ("dp-lora", "dp-lora-fa", "dp-flora", "dp-sgd")
TARGETS = ("query", "value")
DELTA = 1e-5


def sst2(folder: Path) -> tuple[TextDataset, TextDataset]:
    """Whole sentences: 6,920 to train on, 872 held out."""
    columns: dict[str, Any] = {"text_columns": (0,), "label_column": 1, "header": False}
    train = load(str(folder / "sst2_sentences/train.tsv"), split="train", **columns)
    dev = load(
        str(folder / "sst2_sentences/dev.tsv"),
        split="validation",
        classes=train.classes,
        **columns,
    )
    return train, dev


def sms(folder: Path) -> tuple[TextDataset, TextDataset]:
    """2,000 messages to train on, 1,000 others held out, by a fixed shuffle."""
    lines = (folder / "sms_spam/SMSSpamCollection").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t", 1) for line in lines if line]
    order = np.random.default_rng(0).permutation(len(rows))
    parts = []
    for name, ids in (("train", order[:2000]), ("dev", order[2000:3000])):
        texts = tuple(rows[i][1] for i in ids)
        labels = tuple(int(rows[i][0] == "spam") for i in ids)
        parts.append(
            TextDataset(
                texts=texts, labels=labels, classes=("ham", "spam"), name=f"sms {name}",
                origin="SMS Spam Collection v.1",
            )
        )  # fmt: skip
    return parts[0], parts[1]


def build(method: Method, layers: int | None, rank: int, seed: int, classes: int) -> nn.Module:
    """The model that ``method`` trains: queries and values of the last blocks, and the head."""
    torch.manual_seed(seed)
    model, _ = load_model(AssessConfig(), classes)
    blocks = None if layers is None else range(-layers, 0)
    if method == "dp-sgd":
        adapt(model, 1, targets=TARGETS, seed=0, layers=blocks, trainable=("head",))
        for name, module in list(model.named_modules()):
            if hasattr(module, "expand"):  # what an adapter would sit on is trained itself
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.base)
                module.base.weight.requires_grad_(True)
        return model.train()
    if method == "dp-flora":
        model.requires_grad_(False)
        count = len(model.encoder.encoder.layer)
        first = 0 if layers is None else count - layers
        names = "|".join(str(i) for i in range(first, count))
        targets = rf"(encoder\.encoder\.layer\.({names})\.attention\.self\.(query|value))|head"
        adapt(model, rank, method="flora", law="orthonormal", targets=targets, seed=0)
        return model.train()
    # As a peft user would; its A is a twelfth of the size of adapt's, and rates go with it.
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(TARGETS),
        modules_to_save=["head"],
        layers_to_transform=blocks and list(range(6))[blocks.start :],
        layers_pattern=blocks and "layer",
    )
    return get_peft_model(model, config).train()


def run(
    method: Method,
    seed: int,
    options: argparse.Namespace,
    train: TokenisedDataset,
    dev: TokenisedDataset,
    classes: int,
) -> dict[str, Any]:
    """Train once and score."""
    model = build(method, options.last_layers, options.rank, seed, classes)
    wanted = [p for p in model.parameters() if p.requires_grad]
    rate = options.rates[method]
    if method in ("dp-lora", "dp-lora-fa"):
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(wanted, lr=rate, momentum=0.9)

    def collate(rows: list[int]) -> Batch:
        return train.batch(np.array(rows))

    # Rows by length: a Poisson batch comes in this order, so its parts are padded little.
    rows = np.concatenate([batch.ids.numpy() for batch in train.ordered(len(train))]).tolist()
    loader = DataLoader(rows, batch_size=options.batch_size, collate_fn=collate)  # pyright: ignore
    private = make_private(
        model, optimizer, loader, method=method, max_grad_norm=options.clip,
        privacy=TargetEpsilon(options.epsilon, epochs=options.epochs), delta=DELTA,
        physical_batch_size=64,
    )  # fmt: skip
    reset_peak_memory()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(options.epochs):
        bar = tqdm(private.data_loader, total=None, desc=f"{method} {seed}", leave=False)
        for batch in bar:
            functional.cross_entropy(model(**batch.inputs()), batch.labels).backward()
            optimizer.step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - started
    peak = peak_memory()
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in dev.ordered(128):
            right += int((model(**batch.inputs()).argmax(1) == batch.labels).sum())
    return {
        "method": method, "seed": seed, "accuracy": right / len(dev), "cpu_seconds": cpu,
        "wall_seconds": wall, "peak_bytes": peak, "epsilon": private.bound().epsilon,
        "delta": DELTA, "noise_multiplier": private.noise_multiplier, "steps": private.step,
        "trained": sum(p.numel() for p in private.parameters.values()),
        "rate": rate, "clip": options.clip, "batch_size": options.batch_size,
        "epochs": options.epochs, "rank": options.rank, "last_layers": options.last_layers,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Private fine-tuning of MiniLM.")
    parser.add_argument("task", choices=("sst2", "sms"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--last-layers", type=int, default=None)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rates", nargs="*", default=[], help="method=rate")
    parser.add_argument("--output", type=Path, default=Path("reports/private_text.jsonl"))
    options = parser.parse_args()
    rates = {"dp-lora": 1e-2, "dp-lora-fa": 1e-2, "dp-flora": 0.05, "dp-sgd": 0.05}
    rates |= {name: float(rate) for name, rate in (pair.split("=") for pair in options.rates)}
    options.rates = rates
    data = {"sst2": sst2, "sms": sms}[options.task](options.data)
    _, tokenizer = load_model(AssessConfig(), len(data[0].classes))
    train, dev = (
        TokenisedDataset(part, tokenizer, options.max_length, causal=False) for part in data
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for method in options.methods:
            row = run(method, seed, options, train, dev, len(data[0].classes))
            row["task"] = options.task
            with options.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
