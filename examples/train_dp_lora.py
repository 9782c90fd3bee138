"""Fine-tune LoRA adapters of peft privately, from the data to a folder that may leave the machine.

    python examples/train_dp_lora.py
    python examples/train_dp_lora.py --train train.csv --dev dev.csv \
        --text-column text --label-column label

[1] to [5] mark what a plain peft script has otherwise. The defaults sort synthetic support tickets
into eight classes, with the packaged MiniLM, in about three minutes of one core.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from torch.utils.data import DataLoader

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.models import load_model
from lora_privacy.data import TextDataset, load, tickets
from lora_privacy.training import TargetEpsilon, WeightDeltaGuard, make_private, preflight

Batch = dict[str, torch.Tensor]

parser = argparse.ArgumentParser(description="Fine-tune LoRA adapters and a head privately.")
parser.add_argument("--method", choices=("dp-lora", "dp-lora-fa"), default="dp-lora")
parser.add_argument("--epsilon", type=float, default=8.0, help="what the run may cost")
parser.add_argument("--delta", type=float, default=1e-5, help="well below 1/records")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--batch-size", type=int, default=125, help="expected records of a step")
parser.add_argument("--physical-batch-size", type=int, default=50, help="most records at once")
parser.add_argument("--clip", type=float, default=1.0, help="norm that a gradient is cut to")
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--output", type=Path, default=Path("reports/dp-lora"))
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

    # The model and its data, as ever. The seed is that of the head, A and dropout; noise and
    # sampling have generators of their own.
    train, dev = read(args)
    torch.manual_seed(0)
    model, tokenizer = load_model(AssessConfig(model=args.model), len(train.classes))
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"]
    )
    model = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)

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
    private = make_private(  # [1] noise for the target ε; the model and the optimizer get hooks
        model,
        optimizer,
        loader,
        method=args.method,
        max_grad_norm=args.clip,
        privacy=TargetEpsilon(args.epsilon, epochs=args.epochs),
        delta=args.delta,
        physical_batch_size=args.physical_batch_size,
        ledger=ledger,
        resume=checkpoint if args.resume else None,
    )
    if not args.resume:
        private.save(checkpoint)
    print(
        f"noise multiplier {private.noise_multiplier:.3f}, {private.steps_left()} steps at "
        f"sampling rate {private.sample_rate:.3f}"
    )

    with WeightDeltaGuard(model, optimizer):
        while private.steps_left():  # [2] in place of: for epoch in range(args.epochs)
            for batch in private.data_loader:  # [3] in place of: loader
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            private.save(checkpoint)
            print(f"step {private.step}: {accuracy(model, dev_loader):.1%} right", flush=True)

    private.release(args.output / "release")  # [4] in place of: model.save_pretrained
    print(private.bound())  # [5] what is proved


if __name__ == "__main__":
    main()
