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
from lora_privacy.assess.models import load_model
from lora_privacy.audit import auc, projection_attack
from lora_privacy.core import adapt, adapters
from lora_privacy.data import TextDataset, load, tickets
from lora_privacy.dp import GaussianEvent, PldAccountant, ProjectedGaussian
from lora_privacy.training import SampleRecorder

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


def gradients_of(data: TokenisedDataset, classes: int) -> dict[str, Array]:
    """Layer -> gradient of each sentence with respect to the base weight, (POOL, out, in)."""
    model, _ = model_of(classes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in LAYERS)
    found: dict[str, list[Array]] = {layer: [] for layer in LAYERS}
    for start in range(0, POOL, 32):
        batch = data.batch(np.arange(start, start + 32))
        with SampleRecorder(model, dense=True) as recorder:
            loss_of(model, batch).backward()
            recorder.check(32)
            for layer in LAYERS:
                sums: Any = recorder.taps[layer].samples["weight"]
                found[layer].append(32 * sums.gradients.double().numpy())
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


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


def clipped(pool: dict[str, Array], norm: float, sized: dict[str, Array]) -> dict[str, Array]:
    """Gradients times min(1, norm/size), the size that of ``sized`` over all layers."""
    sizes = np.sqrt(sum((g**2).sum((1, 2)) for g in sized.values()))
    factor = np.minimum(1, norm / sizes)[:, None, None]
    return {layer: g * factor for layer, g in pool.items()}


def game(
    pool: dict[str, Array], rank: int, rng: np.random.Generator, knowledge: str, z: float
) -> tuple[float, bool]:
    """Score of one candidate, and whether it was in; where z > 0 the clip is 1."""
    rows = rng.permutation(POOL)
    member = bool(rng.integers(2))
    matrices = {layer: rng.standard_normal((rank, WIDTH)) / rank**0.5 for layer in pool}
    if knowledge == "rest, A public, noise before A":
        # dp-flora draws rows that are orthonormal up to a factor.
        matrices = {k: np.linalg.qr(a.T)[0].T * (WIDTH / rank) ** 0.5 for k, a in matrices.items()}
    used = {layer: g[rows[:BATCH]] for layer, g in pool.items()}
    if knowledge == "rest, A public":
        # LoRA-FA clips what B gets, G Aᵀ of both layers together, to 1.
        used = clipped(used, 1.0, {k: g @ matrices[k].T for k, g in used.items()})
    elif z:
        used = clipped(used, 1.0, used)
    score = 0.0
    for layer, g in used.items():
        a = matrices[layer]
        known, one = g[: BATCH - 1].sum(0) / BATCH, g[BATCH - 1] / BATCH
        total = known + member * one
        std = z / BATCH
        options: dict[str, Any] = {}
        if knowledge == "rest, A public":
            update = -RATE * (total @ a.T + std * rng.standard_normal((WIDTH, rank)))
            options = {"known": known, "a": a, "step_size": RATE, "noise_std": std}
        elif knowledge == "rest, A public, noise before A":
            update = -RATE * (total + std * rng.standard_normal(total.shape)) @ a.T
            options = {
                "known": known, "a": a, "step_size": RATE, "noise_std": std,
                "noise_at": "gradient",
            }  # fmt: skip
        else:
            update = -RATE * total @ a.T @ a
            if knowledge == "rest":
                options = {"known": known}
            elif knowledge == "sample and other texts":
                options = {"reference": pool[layer][rows[BATCH : BATCH + REFERENCES]] / BATCH}
        score += float(projection_attack(update, one[None], **options)[0])
    return score, member


def best_auc(accountant: PldAccountant) -> float:
    """Upper bound of the AUC of any attack: the area over the proved trade-off curve."""
    fpr = np.concatenate([[0.0], np.geomspace(1e-9, 1, 4000)])
    fnr = np.asarray(accountant.trade_off(fpr))
    # The curve falls: its value at the right end of a step is below it on the whole step.
    return float(min(1.0, 1 - np.sum(np.diff(fpr) * fnr[1:])))


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
    pool = gradients_of(data, len(texts.classes))
    step = check_a_real_step(data, len(texts.classes), pool)
    print(f"A step of LoRA-FA by torch is {step:.1e} from the formula.")
    if step > 1e-4:
        raise SystemExit("The games would not be about real updates.")
    sizes = np.sqrt(sum((g**2).sum((1, 2)) for g in pool.values()))
    # In units of the clip, which nine in ten exceed by far: the worst case of the bound.
    large = {layer: 2 * g / np.quantile(sizes, 0.1) for layer, g in pool.items()}
    rows: list[dict[str, Any]] = []

    def play(knowledge: str, rank: int, z: float, gradients: dict[str, Array]) -> None:
        rng = np.random.default_rng([rank, len(rows)])
        games = [
            game(gradients, rank, rng, knowledge, z)
            for _ in tqdm(range(options.trials), desc=f"{knowledge}, r={rank}, z={z}", leave=False)
        ]
        scores, members = (np.array(column) for column in zip(*games, strict=True))
        found = auc(scores, members, threat_model=f"white box; knows {knowledge}")
        row: dict[str, Any] = {
            "knows": knowledge, "rank": rank, "z": z, "auc": found.value, "low": found.low,
            "high": found.high, "trials": options.trials,
        }  # fmt: skip
        if z:
            event = GaussianEvent(z) if knowledge.endswith("public") else ProjectedGaussian(
                layers=[(WIDTH, rank)] * len(LAYERS), noise_multiplier=z
            )  # fmt: skip
            spent = PldAccountant().compose(event, 1)
            row |= {"epsilon": spent.epsilon(DELTA).epsilon, "best_auc": best_auc(spent)}
        rows.append(row)
        print(
            "| "
            + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
            + " |",
            flush=True,
        )

    for rank in (2, 8, 64):
        play("rest", rank, 0.0, pool)
    for rank in (2, 8, 64):
        play("sample", rank, 0.0, pool)
    play("sample and other texts", 8, 0.0, pool)
    for z in (0.3, 1.0, 3.0, 10.0):
        play("rest, A public", 8, z, large)
    for z in (0.03, 0.1, 0.3, 1.0):
        play("rest, A public, noise before A", 8, z, large)
    options.output.write_text(
        json.dumps({"data": texts.name, "step": step, "games": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
