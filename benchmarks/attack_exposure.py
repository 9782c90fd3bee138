"""Exposure of planted secrets in SmolLM2-135M, fine-tuned with and without privacy.

    OMP_NUM_THREADS=1 python benchmarks/attack_exposure.py [--methods lora dp-lora]

Secrets are synthetic sentences with eight random digits. A fair coin puts each into the training
set or leaves it out; those left out show what exposure is without memorisation.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.models import load_model
from lora_privacy.assess.secrets import (
    SecretScore,
    SecretsResult,
    secret_log_probs,
    threat_model,
)
from lora_privacy.assess.training import loss_of
from lora_privacy.audit import exposure
from lora_privacy.core import adapt
from lora_privacy.data import TextDataset, plant_secrets, tickets
from lora_privacy.dp import PrivacyBound
from lora_privacy.training import PrivateTraining, TargetEpsilon, make_private

MAX_LENGTH, RANK, RATE, PART = 64, 8, 2e-3, 8


def train(
    model: nn.Module, data: TokenisedDataset, options: argparse.Namespace, private: bool
) -> PrivacyBound | None:
    """The proved bound, or None."""
    adapt(model, RANK, targets=("q_proj", "v_proj"), seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    loader = DataLoader(
        range(len(data)),  # pyright: ignore[reportArgumentType]
        batch_size=options.batch_size,
        shuffle=True,
        collate_fn=lambda rows: data.batch(np.array(rows)),
        generator=torch.Generator().manual_seed(0),
    )
    found: PrivateTraining | None = None
    if private:
        found = make_private(
            model, optimizer, loader, method="dp-lora", max_grad_norm=1.0, delta=1e-3,
            privacy=TargetEpsilon(options.epsilon, epochs=options.epochs),
            physical_batch_size=PART,
        )  # fmt: skip
        loader = found.data_loader
    model.train()
    for _ in tqdm(range(options.epochs), desc="epochs"):
        for batch in loader:
            loss_of(model, batch, "causal-lm")[0].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return None if found is None else found.bound()


def main() -> None:
    parser = argparse.ArgumentParser(description="Exposure of secrets in SmolLM2.")
    parser.add_argument("--methods", nargs="+", default=["lora", "dp-lora"])
    parser.add_argument("--tickets", type=int, default=60)
    parser.add_argument("--secrets", type=int, default=8)
    parser.add_argument("--alternatives", type=int, default=250)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument(
        "--output", type=Path, default=Path("docs/reproduction/attack_exposure.jsonl")
    )
    options = parser.parse_args()
    plain = tickets(options.tickets, seed=0)
    unlabelled = TextDataset(name=plain.name, texts=plain.texts, origin=plain.origin)
    texts, secrets = plant_secrets(unlabelled, options.secrets, seed=0)
    for method in options.methods:
        begun = time.process_time()
        torch.manual_seed(0)
        config = AssessConfig(
            model="smollm2", task="causal-lm", max_length=MAX_LENGTH, batch_size=16
        )
        model, tokenizer = load_model(config, 0)
        data = TokenisedDataset(texts, tokenizer, MAX_LENGTH, causal=True)
        bound = train(model, data, options, private=method != "lora")
        trained = time.process_time() - begun
        scores, extrapolated = [], []
        for number, secret in enumerate(tqdm(secrets, desc="secrets")):
            found = secret_log_probs(
                model, tokenizer, secret, config, alternatives=options.alternatives, seed=number
            )
            ranked = exposure(found[0], found[1:], space=secret.space)
            further = exposure(found[0], found[1:], space=secret.space, method="skew-normal")
            scores.append(
                SecretScore(included=secret.included, log_prob=float(found[0]), exposure=ranked)
            )
            extrapolated.append(further.bits)
        exposed = SecretsResult(
            task=config.task, threat_model=threat_model(config.task), scores=tuple(scores)
        )
        result = {
            "method": method,
            "epsilon": None if bound is None else bound.epsilon,
            "delta": None if bound is None else bound.delta,
            "settings": {k: v for k, v in vars(options).items() if k not in ("output", "methods")},
            "secrets": [
                {
                    "included": score.included,
                    "bits": score.bits,
                    "extrapolated": bits,
                    "log_prob": score.log_prob,
                }
                for score, bits in zip(scores, extrapolated, strict=True)
            ],
            "p_value_in": exposed.p_value_in,
            "p_value_out": exposed.p_value_out,
            "cpu_seconds_training": trained,
            "cpu_seconds": time.process_time() - begun,
        }
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
