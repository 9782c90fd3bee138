"""Figure of docs/results-private-head.md: accuracy on TREC's test questions against the rank.

Run ``python docs/figures/private_head.py``; it reads docs/reproduction/private_head.jsonl and
writes the png and the svg beside itself.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

RANKS = (16, 64, 256)
# method, optimizer, label, marker, colour, offset of the rank so that error bars stay apart
LINES = (
    ("dp-flora", "sgd", "dp-flora", "o", "#0b5394", 1.0),
    ("dp-lora", "adam", "dp-lora, Adam", "D", "#b45f06", 1.05),
    ("dp-lora", "sgd", "dp-lora", "^", "#b45f06", 0.95),
    ("dp-lora-fa", "sgd", "dp-lora-fa", "s", "#666666", 1.0),
)

Row = dict[str, Any]


def mean(rows: list[Row], **wanted: object) -> tuple[float, float]:
    """Accuracy in % over the seeds, and its standard error."""
    wanted["stage"] = "final"
    found = [100 * row["accuracy"] for row in rows if wanted.items() <= row["key"].items()]
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(len(found)))


def draw(ax: Axes, rows: list[Row], epsilon: float) -> None:
    """All methods at one ε, and without noise the frozen projection and the whole head."""
    at, error = mean(rows, method="dp-sgd", epsilon=epsilon)
    ax.axhspan(at - error, at + error, color="0.85", lw=0)
    ax.axhline(at, color="black", lw=1.2, label="dp-sgd (no rank), ± standard error")
    plain, _ = mean(rows, method="sgd", epsilon=None)
    ax.axhline(plain, color="black", lw=1.2, ls=":", label="whole head without noise")
    frozen = [mean(rows, method="lora-fa", epsilon=None, rank=rank)[0] for rank in RANKS]
    ax.plot(RANKS, frozen, color="#666666", lw=1.2, ls=":", label="frozen A without noise")
    for method, optimizer, label, marker, colour, offset in LINES:
        found = [
            mean(rows, method=method, optimizer=optimizer, epsilon=epsilon, rank=rank)
            for rank in RANKS
        ]
        ax.errorbar(
            np.array(RANKS) * offset,
            [value for value, _ in found],
            yerr=[bar for _, bar in found],
            marker=marker,
            color=colour,
            ls="--" if optimizer == "adam" else "-",
            mfc="white" if method == "dp-lora" else colour,
            capsize=3,
            ms=6,
            lw=1.4,
            label=label,
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(RANKS, [str(rank) for rank in RANKS])
    ax.set_xlabel("rank r, of 384 inputs")
    ax.set_title(f"ε = {epsilon:g}, δ = 10⁻⁵")
    ax.grid(color="0.92", lw=0.6)


def main() -> None:
    """Draw both panels and save them."""
    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "private_head"})
    folder = Path(__file__).parent
    text = (folder.parent / "reproduction/private_head.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), sharey=True)
    draw(left, rows, 0.5)
    draw(right, rows, 2.0)
    left.set_ylabel("accuracy on 500 test questions, %\n(mean and standard error, five runs)")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.15, 1, 1))
    figure.savefig(folder / "private_head.png", dpi=160)
    figure.savefig(folder / "private_head.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
