"""Cost of GradientProbe on a LoRA training step of MiniLM (query and value, r = 8, batch 32).

    OMP_NUM_THREADS=1 python benchmarks/probe.py [--pairs 100]

Every step ends with AdamW and includes dropout. "off" is a step that the probe was not asked
for; "every 10" is (9 off + 1 with G and noise of all layers) / 10, since the median of single
steps would hide the one that costs.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch
from torch import nn

from _measure import MIN_PAIRS, measure, median, ratio
from _results import Results
from _tasks import CLASSES, minilm
from lora_privacy.core.adapter import adapt
from lora_privacy.core.probe import GradientProbe

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, RANK, TOKENS = 16, 8, 40


def build() -> nn.Module:
    """MiniLM with adapters, in training mode."""
    model = minilm(TOKENS).model
    adapt(model, RANK, targets=("query", "value"), trainable=("classifier",), seed=0)
    return model


def works(model: nn.Module) -> dict[str, Callable[[], None]]:
    """One step of each kind, all on the same model."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(1000, 20_000, (BATCH, TOKENS), generator=rng)
    y = torch.randint(0, CLASSES, (BATCH,), generator=rng)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(look: Callable[[], object] = lambda: None) -> None:
        nn.functional.cross_entropy(model(x), y).backward()
        look()
        optimizer.step()
        optimizer.zero_grad()

    def probed(look: Callable[[GradientProbe], object], on: bool = True) -> Callable[[], None]:
        probe = GradientProbe(model, every=2)

        def run() -> None:
            with probe:
                if probe.probing != on:
                    probe.step()
                step(lambda: look(probe))
                probe.step()

        return run

    def nothing(probe: GradientProbe) -> None:
        pass

    return {
        "plain": step,
        "off": probed(nothing, on=False),
        "saving": probed(nothing),
        "G and noise": probed(lambda p: [(r.gradient, r.noise) for r in p.records.values()]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of GradientProbe on MiniLM.")
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS)
    options = parser.parse_args()
    results = Results("probe")
    part = f"GradientProbe on a LoRA step of MiniLM, {BATCH} × {TOKENS} tokens"
    seconds = measure(works(build()), options.pairs)
    plain, off, full = (seconds[k] for k in ("plain", "off", "G and noise"))
    results.add(part, "plain step", median(1e3 * plain), unit="ms")
    rows = {
        "a step not asked for": off,
        "every step, nothing read": seconds["saving"],
        "every step, G and noise of all layers": full,
        "every 10 steps, G and noise of all layers": (9 * off + full) / 10,
    }
    for name, work in rows.items():
        results.add(part, name, ratio(work, plain), peer="plain step")
    results.save()


if __name__ == "__main__":
    main()
