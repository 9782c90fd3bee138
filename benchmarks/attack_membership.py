"""Membership inference on over-trained adapters of MiniLM, with and without privacy.

    OMP_NUM_THREADS=1 python benchmarks/attack_membership.py --data FOLDER

Few sentences, many epochs: ``lora`` learns them by heart. ``dp-lora`` trains on the same records
at ε = 1. Every shadow model is the target once, all others are its references, trained in the
same way on halves of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.adapter_fit import AdapterFit
from lora_privacy.assess.auditing import Game
from lora_privacy.assess.batches import Batch, TokenisedDataset
from lora_privacy.assess.models import load_model
from lora_privacy.assess.shadows import ShadowFit, Shadows, train_shadows
from lora_privacy.audit import auc, tpr_at_fpr
from lora_privacy.core import adapt
from lora_privacy.data import TextDataset, load, tickets
from lora_privacy.training import TargetEpsilon, make_private

if TYPE_CHECKING:
    import numpy.typing as npt

THREAT = "black box: log-probabilities of the true labels; references trained in the same way"


def sentences(
    folder: Path | None, records: int, population: int
) -> tuple[TextDataset, TextDataset]:
    if folder is None:
        return tickets(records, seed=0), tickets(population, seed=0, split="dev")
    columns: dict[str, Any] = {"text_columns": (0,), "label_column": 1, "header": False}
    path = folder / "sst2_sentences"
    train = load(str(path / "train.tsv"), split="train", **columns)
    dev = load(str(path / "dev.tsv"), split="validation", classes=train.classes, **columns)
    return train.take(records, seed=0), dev.take(population, seed=0)


@dataclass(frozen=True)
class PrivateFit:
    """dp-lora of the last two blocks and the head, at a target ε."""

    train: TextDataset
    population: TextDataset
    epsilon: float
    delta: float = 1e-3
    epochs: int = 10
    batch_size: int = 50
    learning_rate: float = 1e-2

    @property
    def records(self) -> int:
        """As ``ShadowFit`` says."""
        return len(self.train)

    def fingerprint(self) -> str:
        """As ``ShadowFit`` says."""
        rest = {k: v for k, v in asdict(self).items() if k not in ("train", "population")}
        parts = [self.train.sha256, self.population.sha256, rest]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def __call__(
        self, seed: int, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Train on ``rows``."""
        model, tokenizer = load_model(AssessConfig(), len(self.train.classes))
        adapt(
            model, 8, targets=("query", "value"), layers=(-2, -1), seed=seed, trainable=("head",)
        )
        train, population = (
            TokenisedDataset(texts, tokenizer, 40, causal=False)
            for texts in (self.train, self.population)
        )
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=self.learning_rate
        )
        loader = DataLoader(
            rows.tolist(),
            batch_size=self.batch_size,
            collate_fn=lambda some: train.batch(np.array(some)),
        )
        private = make_private(
            model, optimizer, loader, method="dp-lora", max_grad_norm=1.0, delta=self.delta,
            privacy=TargetEpsilon(self.epsilon, epochs=self.epochs),
        )  # fmt: skip
        while private.steps_left():
            for batch in private.data_loader:
                functional.cross_entropy(model(**batch.inputs()), batch.labels).backward()
                optimizer.step()
        assert private.bound().epsilon <= self.epsilon
        private.close()
        model.eval()

        @torch.no_grad()
        def log_probs(data: TokenisedDataset) -> npt.NDArray[np.float64]:
            found = np.empty(len(data))
            for batch in data.ordered(64):
                found[batch.ids.numpy()] = -losses(model, batch)
            return np.minimum(found, 0.0)

        return log_probs(train), log_probs(population)


def losses(model: torch.nn.Module, batch: Batch) -> npt.NDArray[np.float64]:
    logits = model(**batch.inputs()).double()
    return functional.cross_entropy(logits, batch.labels, reduction="none").numpy()


def game_of(shadows: Shadows, target: int) -> Game:
    """The shadow ``target`` is attacked, by the others as references."""
    others = np.arange(len(shadows.seeds)) != target
    return Game(
        target_log_probs=shadows.reference_log_probs[target],
        target_members=shadows.reference_members[target],
        population_log_probs=shadows.population_reference_log_probs[target],
        reference_log_probs=shadows.reference_log_probs[others],
        reference_members=shadows.reference_members[others],
        population_reference_log_probs=shadows.population_reference_log_probs[others],
    )


def standard_error(values: list[float]) -> float:
    """Of the mean over targets, whose training sets are drawn independently."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Membership inference on MiniLM.")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--population", type=int, default=300)
    parser.add_argument("--shadows", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=40, help="of lora")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=Path("reports/attack-membership"))
    parser.add_argument(
        "--output", type=Path, default=Path("docs/reproduction/attack_membership.json")
    )
    options = parser.parse_args()
    train, population = sentences(options.data, options.records, options.population)
    config = AssessConfig(
        methods=("lora",), last_layers=2, epochs=options.epochs, batch_size=16, max_length=40
    )
    fits: dict[str, ShadowFit] = {
        "lora": AdapterFit(config, train, population),
        f"dp-lora, ε = {options.epsilon:g}": PrivateFit(train, population, options.epsilon),
    }
    rows: list[dict[str, Any]] = []
    for name, fit in fits.items():
        begun = time.process_time()
        shadows = train_shadows(
            fit, options.folder / name.split(",")[0], count=options.shadows, seed=0
        )
        right = shadows.reference_log_probs > np.log(0.5)
        accuracy = {
            "members": float(right[shadows.reference_members].mean()),
            "others": float(right[~shadows.reference_members].mean()),
        }
        games = [game_of(shadows, target).attacks() for target in range(options.shadows)]
        for attack in games[0][0]:
            each = [auc(scores[attack], members).value for scores, members in games]
            rates = [
                tpr_at_fpr(scores[attack], members, fpr=0.05).value for scores, members in games
            ]
            rows.append(
                {
                    "training": name, "attack": attack, "threat_model": THREAT,
                    "auc": float(np.mean(each)), "auc_error": standard_error(each),
                    "tpr_at_5_percent": float(np.mean(rates)),
                    "tpr_error": standard_error(rates), "accuracy": accuracy,
                    "targets": len(each),
                }
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        print(f"{name}: {time.process_time() - begun:.0f} CPU seconds", flush=True)
    options.output.write_text(json.dumps({"data": train.name, "attacks": rows}, indent=1))


if __name__ == "__main__":
    main()
