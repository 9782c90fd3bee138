"""What one of several processes does in ``test_processes``; ``python process_runs.py`` runs it.

Arguments: the folder to meet and to write in, the rank, the number of processes, what to run.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lora_privacy.core import adapt
from lora_privacy.errors import LoraPrivacyError, ProcessError
from lora_privacy.training import NoiseMultiplier, PrivateTraining, make_private

METHODS = ("dp-lora", "dp-lora-fa", "dp-sgd", "dp-flora")
RECORDS, EPOCHS, DELTA = 41, 4, 1e-5
NOISE_STEPS, NOISE_RATE, NOISE_MULTIPLIER = 300, 0.5, 2.0
NONE = 1e-30  # a noise multiplier that adds nothing in float32


def records(size: int = RECORDS, width: int = 6) -> TensorDataset:
    x = torch.randn(size, width, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 0).long())


def model_for(method: str, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    if method == "dp-flora":
        # At full rank AᵀA = I whatever A is: two runs with other matrices are comparable.
        adapt(model, 5, method="flora", targets=("2",), law="orthonormal", seed=0)
        model[0].requires_grad_(False)
    elif method != "dp-sgd":
        name = "lora" if method == "dp-lora" else "lora-fa"
        adapt(model, 2, method=name, targets=("0",), seed=0, trainable=("2",))
    return model


def make(method: str, model: nn.Module, data: TensorDataset, **options: Any) -> PrivateTraining:
    wanted = [p for p in model.parameters() if p.requires_grad]
    options = {
        "privacy": NoiseMultiplier(NONE), "max_grad_norm": 0.1, "sample_rate": 1.0, **options
    }  # fmt: skip
    return make_private(
        model,
        torch.optim.SGD(wanted, lr=0.5, momentum=0.9),
        DataLoader(data),
        method=method,  # pyright: ignore[reportArgumentType]
        delta=DELTA,
        **options,
    )


def train(private: PrivateTraining, epochs: int = EPOCHS) -> None:
    for _ in range(epochs):
        for x, y in private.data_loader:
            functional.cross_entropy(private.model(x), y).backward()
            private.optimizer.step()


def quiet(method: str, distributed: bool, rank: int, part: int | None) -> dict[str, Any]:
    """Train without noise on everything; other processes begin elsewhere."""
    private = make(
        method, model_for(method, seed=1 + rank), records(), distributed=distributed,
        physical_batch_size=part,
    )  # fmt: skip
    train(private)
    flat = torch.cat([p.detach().flatten() for p in private.parameters.values()])
    return {
        "weights": flat.numpy(),
        "steps": private.step,
        "sent": private.exchanged_numbers,
        "trained": sum(p.numel() for p in private.parameters.values()),
    }


class Silent(nn.Module):
    """Each record's gradient is 0, so that what is released is noise alone."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(6, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.0 * self.map(x)


def noise(distributed: bool, **options: Any) -> dict[str, Any]:
    """Gradients of steps that no record contributes to, and the rows each of them drew."""
    model = Silent()
    private = make(
        "dp-sgd", model, records(), privacy=NoiseMultiplier(NOISE_MULTIPLIER), max_grad_norm=1.0,
        sample_rate=NOISE_RATE, distributed=distributed, **options,
    )  # fmt: skip
    found: list[torch.Tensor] = []
    private.optimizer.register_step_pre_hook(
        lambda *_: found.append(model.map.weight.grad.clone())  # pyright: ignore
    )
    rows = [private.data_loader.indices(step) for step in range(NOISE_STEPS)]
    while private.step < NOISE_STEPS:
        for x, _ in private.data_loader:
            model(x).sum().backward()
            private.optimizer.step()
    return {
        "noise": torch.stack(found[:NOISE_STEPS]).numpy(),
        "coins": np.stack([np.isin(np.arange(RECORDS), r) for r in rows]),
        "epsilon": private.bound().epsilon,
        "steps": private.step,
    }


def sparse(folder: Path, rank: int) -> dict[str, Any]:
    """dp-flora with batches of one record, so that shares are empty nearly always."""
    data = records(20)
    private = make(
        "dp-flora", model_for("dp-flora"), data, privacy=NoiseMultiplier(1.0), sample_rate=0.05,
        distributed=True, ledger=folder / f"ledger-{rank}.jsonl", secure=False,
    )  # fmt: skip
    train(private, 1)
    private.save(folder / "checkpoint")
    private.close()
    torch.distributed.barrier()
    again = make(
        "dp-flora", model_for("dp-flora", seed=5 + rank), data, privacy=NoiseMultiplier(1.0),
        sample_rate=0.05, distributed=True, resume=folder / "checkpoint",
        ledger=folder / f"ledger-{rank}.jsonl", secure=False,
    )  # fmt: skip
    train(again, 1)
    flat = torch.cat([p.detach().flatten() for p in again.parameters.values()])
    return {"weights": flat.numpy(), "steps": again.step, "epsilon": again.bound().epsilon}


def refusals(rank: int) -> dict[str, Any]:
    """Messages of settings that do not fit."""
    found: dict[str, Any] = {}
    tried: dict[str, dict[str, Any]] = {
        "unsaid": {},
        "clip": {"distributed": True, "max_grad_norm": 1.0 + rank},
        "seeds": {"distributed": True, "secure": False, "deterministic": True},
    }
    for name, options in tried.items():
        try:
            make("dp-sgd", model_for("dp-sgd"), records(), **options)
        except (LoraPrivacyError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    model = model_for("dp-sgd")
    try:
        make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1 + rank), DataLoader(records()),
            method="dp-sgd", max_grad_norm=1.0, privacy=NoiseMultiplier(1.0), delta=DELTA,
            distributed=True,
        )  # fmt: skip
    except ProcessError as error:
        found["rate"] = str(error)
    try:
        make("dp-sgd", model_for("dp-lora" if rank else "dp-sgd"), records(), distributed=True)
    except ProcessError as error:
        found["model"] = str(error)
    x, y = records().tensors
    mixed = TensorDataset(x.roll(rank, 0), y.roll(rank, 0))
    try:
        make("dp-sgd", model_for("dp-sgd"), mixed, distributed=True)
    except ProcessError as error:
        found["order"] = str(error)
    private = make("dp-sgd", model_for("dp-sgd"), records(), distributed=True)
    found["own"] = len(private.data_loader.indices(0))
    next(iter(private.data_loader))
    try:
        next(iter(private.data_loader))
    except LoraPrivacyError as error:
        found["left"] = f"{type(error).__name__}: {error}"
    return found


def death(folder: Path, rank: int) -> dict[str, Any]:
    """Process 1 is gone at its third step; the message that process 0 gets, and its weights."""
    private = make(
        "dp-sgd", model_for("dp-sgd"), records(), distributed=True,
        privacy=NoiseMultiplier(1.0), ledger=folder / "ledger.jsonl",
    )  # fmt: skip
    before = torch.zeros(0)
    try:
        for _ in range(5):
            for x, y in private.data_loader:
                before = torch.cat([p.detach().flatten() for p in private.parameters.values()])
                if rank == 1 and private.step == 2:
                    os._exit(9)
                functional.cross_entropy(private.model(x), y).backward()
                private.optimizer.step()
    except ProcessError as error:
        after = torch.cat([p.detach().flatten() for p in private.parameters.values()])
        return {"message": str(error), "moved": not torch.equal(before, after)}
    return {"message": ""}


def main() -> None:
    folder, rank, size, what = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size,
        timeout=timedelta(seconds=120),
    )  # fmt: skip
    found: dict[str, Any] = {}
    if what == "death":
        found = death(folder, rank)
    else:
        for method in METHODS:
            for part in (None, 4):
                for key, value in quiet(method, True, rank, part).items():
                    found[f"{method}-{part}-{key}"] = value
        found |= noise(True)
        found |= {f"sparse-{key}": value for key, value in sparse(folder, rank).items()}
        found |= refusals(rank)
    np.savez(folder / f"{what}-{rank}.npz", **found)
    if what != "death":
        destroy_process_group()


if __name__ == "__main__":
    main()
