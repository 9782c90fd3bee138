"""White-box attack on updates of MiniLM: without noise at any rank, and as noise grows.

    OMP_NUM_THREADS=1 python benchmarks/attack_projection.py --data FOLDER [--trials 400]

Gradients are those of real sentences (SST-2 in ``--data``, else synthetic tickets) at the
pretrained weights, where the first step of LoRA-FA takes them; that step, taken by torch, must
equal the formula that the games are played with. A game: a batch of 16, its last member in by a
fair coin; the attacker knows the other 15 and scores the last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import tqdm

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.batches import Batch, TokenisedDataset
from lora_privacy.assess.gradients import sample_gradients
from lora_privacy.assess.methods import MethodName
from lora_privacy.assess.models import load_model
from lora_privacy.assess.updates import attack_updates
from lora_privacy.audit import RateEstimate, auc, projection_attack
from lora_privacy.core import adapt, adapters
from lora_privacy.data import TextDataset, load, tickets

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.float64]

LAYERS = (
    "encoder.encoder.layer.5.attention.self.query",
    "encoder.encoder.layer.5.attention.self.value",
)
BATCH, POOL, DELTA, RATE = 16, 256, 1e-5, 0.1
WIDTH, REFERENCES = 384, 32


def sentences(folder: Path | None) -> TextDataset:
    if folder is None:
        return tickets(POOL, seed=0)
    path = str(folder / "sst2_sentences/train.tsv")
    found = load(path, split="train", text_columns=(0,), label_column=1, header=False)
    return found.take(POOL, seed=0)


def model_of(classes: int) -> tuple[nn.Module, Any]:
    """Without dropout, which would be one more thing the attacker does not know."""
    torch.manual_seed(0)
    model, tokenizer = load_model(AssessConfig(), classes)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, tokenizer


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return functional.cross_entropy(model(**batch.inputs()), batch.labels)


def check_a_real_step(data: TokenisedDataset, classes: int, pool: dict[str, Array]) -> float:
    """Relative difference of the weights that a step of LoRA-FA adds, and of the formula."""
    model, _ = model_of(classes)
    adapt(model, 8, method="lora-fa", targets=LAYERS, seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    loss_of(model, data.batch(np.arange(BATCH))).backward()
    optimizer.step()
    worst = 0.0
    for name, adapter in adapters(model).items():
        a = adapter.a().double().numpy()
        layer: Any = adapter.layer
        added = layer.expand.weight.detach().double().numpy() @ a
        wanted = -RATE * pool[name][:BATCH].mean(0) @ a.T @ a
        worst = max(worst, float(np.linalg.norm(added - wanted) / np.linalg.norm(wanted)))
    return worst


def without_the_rest(
    pool: dict[str, Array], rank: int, trials: int, knowledge: str, seed: int
) -> RateEstimate:
    """The game of an attacker who does not know the other records, without noise."""
    rng = np.random.default_rng([rank, seed])
    scores, members = np.zeros(trials), np.empty(trials, np.bool_)
    for trial in tqdm(range(trials), desc=f"{knowledge}, r={rank}", leave=False):
        rows = rng.permutation(POOL)
        members[trial] = rng.integers(2)
        for gradients in pool.values():
            a = rng.standard_normal((rank, WIDTH)) / rank**0.5
            used = gradients[rows[: BATCH if members[trial] else BATCH - 1]]
            options: dict[str, Any] = {}
            if knowledge == "sample and other texts":
                options["reference"] = gradients[rows[BATCH : BATCH + REFERENCES]] / BATCH
            update = -RATE * used.sum(0) / BATCH @ a.T @ a
            one = gradients[rows[BATCH - 1]] / BATCH
            scores[trial] += float(projection_attack(update, one[None], **options)[0])
    return auc(scores, members, threat_model=f"white box; knows {knowledge}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Attack updates of MiniLM.")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument(
        "--output", type=Path, default=Path("docs/reproduction/attack_projection.json")
    )
    options = parser.parse_args()
    texts = sentences(options.data)
    _, tokenizer = model_of(len(texts.classes))
    data = TokenisedDataset(texts, tokenizer, 40, causal=False)
    model, _ = model_of(len(texts.classes))
    pool = sample_gradients(model, data, LAYERS, np.arange(POOL), "classification")
    step = check_a_real_step(data, len(texts.classes), pool)
    print(f"A step of LoRA-FA by torch is {step:.1e} from the formula.")
    if step > 1e-4:
        raise SystemExit("The games would not be about real updates.")
    sizes = np.sqrt(sum((g**2).sum((1, 2)) for g in pool.values()))
    # In units of the clip, which nine in ten exceed by far: the worst case of the bound.
    large = {layer: 2 * g / np.quantile(sizes, 0.1) for layer, g in pool.items()}
    rows: list[dict[str, Any]] = []

    def record(
        knowledge: str, rank: int, z: float, found: RateEstimate, **more: float | None
    ) -> None:
        row: dict[str, Any] = {
            "knows": knowledge, "rank": rank, "z": z, "auc": found.value, "low": found.low,
            "high": found.high, "trials": options.trials, **more,
        }  # fmt: skip
        rows.append(row)
        print(
            "| "
            + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
            + " |",
            flush=True,
        )

    def play(knowledge: str, method: MethodName, rank: int, z: float) -> None:
        found = attack_updates(
            large if z else pool,
            method=method,
            rank=rank,
            law="orthonormal" if method == "dp-flora" else "gaussian",
            noise_multiplier=z,
            batch_size=BATCH,
            games=options.trials,
            seed=len(rows),
            delta=DELTA,
        )
        proved = {"epsilon": found.epsilon, "best_auc": found.best_auc} if z else {}
        record(knowledge, rank, z, found.auc, **proved)
        if found.contradicts:
            raise SystemExit("An attack did better than is proved possible: something is wrong.")

    for rank in (2, 8, 64):
        play("rest", "flora", rank, 0.0)
    for rank in (2, 8, 64):
        found = without_the_rest(pool, rank, options.trials, "sample", len(rows))
        record("sample", rank, 0.0, found)
    knowledge = "sample and other texts"
    record(knowledge, 8, 0.0, without_the_rest(pool, 8, options.trials, knowledge, len(rows)))
    for z in (0.3, 1.0, 3.0, 10.0):
        play("rest, A public", "dp-lora-fa", 8, z)
    for z in (0.03, 0.1, 0.3, 1.0):
        play("rest, A public, noise before A", "dp-flora", 8, z)
    options.output.write_text(
        json.dumps({"data": texts.name, "step": step, "games": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
