"""Train one model privately by several processes, here two on one machine.

    torchrun --standalone --nproc-per-node 2 examples/train_dp_two_processes.py

Each process runs the records of its own share and clips them; the sums go to process 0, which adds
one noise for all, writes the ledger and sends the result back. What differs from one process is
marked [1] to [4]. The defaults sort synthetic support tickets into eight classes with the packaged
MiniLM, LoRA in its last two layers.
"""

import argparse
from pathlib import Path

import torch
from torch.distributed import destroy_process_group, get_rank, init_process_group
from torch.nn import functional
from torch.utils.data import DataLoader

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.models import load_model
from lora_privacy.core import adapt
from lora_privacy.data import tickets
from lora_privacy.training import TargetEpsilon, make_private

Batch = dict[str, torch.Tensor]

parser = argparse.ArgumentParser(description="Fine-tune LoRA privately by several processes.")
parser.add_argument("--epsilon", type=float, default=8.0, help="what the run may cost")
parser.add_argument("--delta", type=float, default=1e-5, help="well below 1/records")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--batch-size", type=int, default=100, help="expected records, of all")
parser.add_argument("--physical-batch-size", type=int, default=25, help="of one process at once")
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--output", type=Path, default=Path("reports/dp-two-processes"))
parser.add_argument("--train-size", type=int, default=600, help="tickets to train on")
parser.add_argument("--dev-size", type=int, default=100, help="tickets held out")


def loss_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The mean over the records of the batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return functional.cross_entropy(logits, batch["labels"])


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader) -> float:
    """Share of right classes, without dropout."""
    model.eval()
    right = 0
    for batch in loader:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        right += int((logits.argmax(1) == batch["labels"]).sum())
    model.train()
    return right / len(loader.dataset)


def main() -> None:
    args = parser.parse_args()
    init_process_group("gloo")  # [1] torchrun tells each process who it is
    train = tickets(args.train_size, seed=0)  # [2] every process holds all records, in one order
    dev = tickets(args.dev_size, seed=0, split="dev")
    torch.manual_seed(get_rank())  # of the head and dropout; all begin at the head of process 0
    model, tokenizer = load_model(AssessConfig(), len(train.classes))
    adapt(model, 8, targets=("query", "value"), layers=(-2, -1), seed=0, trainable=("head",))
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
    )

    def collate(rows: list[tuple[str, int]]) -> Batch:
        texts, labels = zip(*rows, strict=True)
        encoded = tokenizer(
            list(texts), truncation=True, max_length=64, padding=True, return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor(labels)}

    rows = sorted(zip(train.texts, train.require_labels(), strict=True), key=lambda r: len(r[0]))
    held_out = list(zip(dev.texts, dev.require_labels(), strict=True))
    private = make_private(
        model,  # [3] not in DistributedDataParallel, which would exchange unclipped gradients
        optimizer,
        DataLoader(rows, batch_size=args.batch_size, collate_fn=collate),
        method="dp-lora",
        max_grad_norm=1.0,
        privacy=TargetEpsilon(args.epsilon, epochs=args.epochs),
        delta=args.delta,
        physical_batch_size=args.physical_batch_size,
        ledger=args.output / "ledger.jsonl",
        distributed=True,  # [4]
    )
    while private.steps_left():
        for batch in private.data_loader:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        private.save(args.output / "checkpoint")  # process 0 writes
    if get_rank() == 0:
        right = accuracy(model, DataLoader(held_out, batch_size=50, collate_fn=collate))
        print(f"{right:.1%} right; {4 * private.exchanged_numbers:,} bytes a step each way")
        print(private.release(args.output / "release"))
        print(private.bound())
    destroy_process_group()


if __name__ == "__main__":
    main()
