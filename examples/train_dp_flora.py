"""The task of train_dp_lora.py by DP-FLoRA: weights move through projections drawn anew each step.

    python examples/train_dp_flora.py

A projection that is fresh, and drawn apart from the data, lets less noise prove the same ε. The
script prints how much less, and what of it the noise makes up for: projected back to the weight,
it is √(in_features/rank) longer at the same multiplier.
"""

import argparse
import math
from pathlib import Path

import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.models import load_model
from lora_privacy.core import adapt, flora_layers
from lora_privacy.data import TextDataset, load, tickets
from lora_privacy.dp import SampledGaussian, calibrate
from lora_privacy.training import TargetEpsilon, WeightDeltaGuard, make_private, preflight

Batch = dict[str, torch.Tensor]

parser = argparse.ArgumentParser(description="Fine-tune dense weights privately by DP-FLoRA.")
parser.add_argument("--epsilon", type=float, default=8.0, help="what the run may cost")
parser.add_argument("--delta", type=float, default=1e-5, help="well below 1/records")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=125, help="expected records of a step")
parser.add_argument("--physical-batch-size", type=int, default=50, help="most records at once")
parser.add_argument("--clip", type=float, default=1.0, help="norm that a gradient is cut to")
parser.add_argument("--rank", type=int, default=16, help="rows of every projection")
parser.add_argument("--learning-rate", type=float, default=0.05)
parser.add_argument("--output", type=Path, default=Path("reports/dp-flora"))
parser.add_argument("--resume", action="store_true", help="go on from the last finished epoch")
parser.add_argument("--model", default="minilm", help="minilm, a local folder, or a hub id")
parser.add_argument("--train", help="csv or tsv file; without it, synthetic tickets")
parser.add_argument("--dev", help="held-out file of the same form")
parser.add_argument("--text-column", default="text", help="name, or number from 0")
parser.add_argument("--label-column", default="label", help="name, or number from 0")
parser.add_argument("--train-size", type=int, default=1000, help="tickets to train on")
parser.add_argument("--dev-size", type=int, default=200, help="tickets held out")


def read(args: argparse.Namespace) -> tuple[TextDataset, TextDataset]:
    """Texts to train on, and others to score on."""
    if args.train is None:
        return tickets(args.train_size, seed=0), tickets(args.dev_size, seed=0, split="dev")
    columns = {"text_columns": args.text_column, "label_column": args.label_column}
    train = load(args.train, **columns)
    return train, load(args.dev, classes=train.classes, **columns)


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The mean over the records of the batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return functional.cross_entropy(logits, batch["labels"])


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader) -> float:
    """Share of right classes, without dropout; of the held-out texts, which no ε covers."""
    model.eval()
    right = 0
    for batch in loader:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        right += int((logits.argmax(1) == batch["labels"]).sum())
    model.train()
    return right / len(loader.dataset)


def main() -> None:
    args = parser.parse_args()
    if (args.train is None) != (args.dev is None):
        parser.error("--train and --dev go together.")
    ledger, checkpoint = args.output / "ledger.jsonl", args.output / "checkpoint"
    if ledger.exists() and not args.resume:
        parser.error(f"{args.output} holds a run: --resume it, or choose another --output.")

    # Everything that is trained must be projected: the head is a target like the others, and
    # adapt freezes the rest. The seed is that of the head and of dropout; the projections of
    # the training are drawn anew, from the operating system.
    train, dev = read(args)
    torch.manual_seed(0)
    model, tokenizer = load_model(AssessConfig(model=args.model), len(train.classes))
    torch.nn.init.zeros_(model.head.bias)  # not trained, so not in the release: 0 is easy to give
    adapt(
        model,
        args.rank,
        method="flora",
        law="orthonormal",
        targets=("query", "value", "head"),
        seed=0,
    )
    trained = [layer.weight for layer in flora_layers(model).values()]
    optimizer = torch.optim.SGD(trained, lr=args.learning_rate, momentum=0.9)

    def collate(rows: list[tuple[str, int]]) -> Batch:
        texts, labels = zip(*rows, strict=True)
        encoded = tokenizer(
            list(texts), truncation=True, max_length=64, padding=True, return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor(labels)}

    # By length, so that the parts of a batch are padded little. The order tells nothing: every
    # record enters a batch by a coin of its own.
    rows = sorted(zip(train.texts, train.require_labels(), strict=True), key=lambda r: len(r[0]))
    loader = DataLoader(rows, batch_size=args.batch_size, collate_fn=collate)
    held_out = list(zip(dev.texts, dev.require_labels(), strict=True))
    dev_loader = DataLoader(held_out, batch_size=100, collate_fn=collate)

    # An experiment on eight records: does the gradient of one depend on the others?
    preflight(model, optimizer, collate(rows[:: max(1, len(rows) // 8)][:8]), loss_of=loss_of)
    print("finding the noise of a projected run (a minute or less)", flush=True)
    private = make_private(
        model,
        optimizer,
        loader,
        method="dp-flora",
        max_grad_norm=args.clip,
        privacy=TargetEpsilon(args.epsilon, epochs=args.epochs),
        delta=args.delta,
        physical_batch_size=args.physical_batch_size,
        ledger=ledger,
        resume=checkpoint if args.resume else None,
    )
    if not args.resume:
        private.save(checkpoint)
    plain = calibrate(
        lambda z: SampledGaussian(z, private.sample_rate),
        epsilon=args.epsilon,
        delta=args.delta,
        steps=args.epochs * private.data_loader.steps_per_epoch,
    ).value
    width = max(layer.in_features for layer in flora_layers(model).values())
    longer = math.sqrt(width / args.rank)
    print(
        f"noise multiplier {private.noise_multiplier:.3f}; dp-sgd would need {plain:.3f}, "
        f"{plain / private.noise_multiplier:.2f} times as much\n"
        f"in the weights the noise is {longer:.2f} times as long at the same multiplier, so here "
        f"{longer * private.noise_multiplier / plain:.2f} times as long as that of dp-sgd"
    )

    with WeightDeltaGuard(model, optimizer):
        while private.steps_left():
            for batch in private.data_loader:
                loss_of(model, batch).backward()
                optimizer.step()
            private.save(checkpoint)
            print(f"step {private.step}: {accuracy(model, dev_loader):.1%} right", flush=True)

    private.release(args.output / "release")
    print(private.bound())


if __name__ == "__main__":
    main()
