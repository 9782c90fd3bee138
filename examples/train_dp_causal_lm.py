"""Fine-tune a causal language model privately with transformers' Trainer.

    python examples/train_dp_causal_lm.py --train devset.csv --dev testset_w_refs.csv

The files hold pairs: what is told (column --prompt-column) and how it is to be said
(--text-column), as E2E NLG does; the loss is that of the latter. The default model is the packaged
SmolLM2-135M. Without files, synthetic tickets are learned, a class name the prompt of each.
"""

import argparse
import csv
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.models import load_model
from lora_privacy.data import tickets
from lora_privacy.training import PrivacyArguments, PrivateTrainer

IGNORED = -100  # label of a token that is not learned

parser = argparse.ArgumentParser(description="Fine-tune LoRA of a causal LM privately.")
parser.add_argument("--epsilon", type=float, default=8.0, help="what the run may cost")
parser.add_argument("--delta", type=float, default=1e-5, help="well below 1/records")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--batch-size", type=int, default=48, help="expected records of a step")
parser.add_argument("--physical-batch-size", type=int, default=8, help="most records at once")
parser.add_argument("--clip", type=float, default=1.0, help="norm that a gradient is cut to")
parser.add_argument("--learning-rate", type=float, default=2e-3)
parser.add_argument("--rank", type=int, default=8)
parser.add_argument("--output", type=Path, default=Path("reports/dp-causal-lm"))
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
parser.add_argument("--model", default="smollm2", help="smollm2, a local folder, or a hub id")
parser.add_argument("--train", type=Path, help="csv file; without it, synthetic tickets")
parser.add_argument("--dev", type=Path, help="held-out file of the same form")
parser.add_argument("--prompt-column", default="mr")
parser.add_argument("--text-column", default="ref")
parser.add_argument("--train-size", type=int, help="take the first so many")
parser.add_argument("--dev-size", type=int, default=200)


def read(path: Path | None, split: str, args: argparse.Namespace) -> list[tuple[str, str]]:
    """Pairs of prompt and text."""
    if path is None:
        found = tickets(args.train_size or 500, seed=0, split=split)
        classes = [found.classes[label] for label in found.require_labels()]
        return list(zip(classes, found.texts, strict=True))
    with path.open(encoding="utf-8", newline="") as file:
        return [(row[args.prompt_column], row[args.text_column]) for row in csv.DictReader(file)]


def main() -> None:
    args = parser.parse_args()
    if (args.train is None) != (args.dev is None):
        parser.error("--train and --dev go together.")
    torch.manual_seed(0)  # of A and dropout; noise and sampling have generators of their own
    model, tokenizer = load_model(AssessConfig(model=args.model, task="causal-lm"), 0)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(model, config)

    def tokenised(pair: tuple[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(f"{pair[0]} -> ")["input_ids"]
        text = tokenizer(pair[1] + tokenizer.eos_token)["input_ids"]
        return {"input_ids": prompt + text, "labels": [IGNORED] * len(prompt) + text}

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([v + [fill] * (length - len(v)) for v in values])

        ids = [row["input_ids"] for row in rows]
        return {
            "input_ids": padded(ids, tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(v) for v in ids], 0),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }

    pairs = read(args.train, "train", args)[: args.train_size]
    # By length, so that the parts of a batch are padded little. The order tells nothing: every
    # record enters a batch by a coin of its own.
    train = sorted(map(tokenised, pairs), key=lambda row: len(row["input_ids"]))
    held_out = read(args.dev, "dev", args)
    dev = [tokenised(pair) for pair in held_out[:: max(1, len(held_out) // args.dev_size)]]

    trainer = PrivateTrainer(
        model,
        TrainingArguments(
            str(args.output),
            per_device_train_batch_size=args.physical_batch_size,
            gradient_accumulation_steps=args.batch_size // args.physical_batch_size,
            max_steps=args.steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            eval_strategy="steps",
            eval_steps=10,
            eval_on_start=True,
            per_device_eval_batch_size=args.physical_batch_size,
            prediction_loss_only=True,
            save_steps=10,
            save_total_limit=2,
            logging_steps=10,
            report_to=[],
            remove_unused_columns=False,
        ),
        train_dataset=train,
        eval_dataset=dev[: args.dev_size],
        data_collator=collate,
        privacy=PrivacyArguments(
            target_epsilon=args.epsilon, delta=args.delta, max_grad_norm=args.clip
        ),
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.private.release(args.output / "release")
    print(trainer.bound())


if __name__ == "__main__":
    main()
