"""Figure of docs/performance.md: CPU time against size, one panel for each thing that grows.

Run ``python docs/figures/growth.py``; it reads docs/performance/growth-*.json and writes the png
and the svg beside itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PANELS = ("tokens", "rank", "layers", "steps", "events", "canaries")
# Shape and line tell the curves apart in grey, too.
STYLES = (
    ("#0b5394", "o", "-"),
    ("#b45f06", "s", "--"),
    ("#38761d", "^", "-."),
    ("#741b47", "D", ":"),
    ("#555555", "v", "-"),
)

Curve = dict[str, Any]


def draw(ax: Axes, curves: list[Curve], exponents: dict[str, float]) -> None:
    """All curves of one panel that are times, on logarithmic axes."""
    for curve, (colour, marker, line) in zip(curves, STYLES, strict=False):
        ax.plot(
            curve["sizes"],
            curve["medians"],
            color=colour,
            marker=marker,
            ls=line,
            ms=5,
            lw=1.4,
            label=f"{curve['name']}: {exponents[curve['name']]:.2f}",
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(curves[0]["part"])
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.55)  # room for the legend
    ax.legend(fontsize=7.5, loc="upper left", frameon=False, title_fontsize=7.5)
    ax.grid(color="0.92", lw=0.6)


def main() -> None:
    """Draw the six panels and save them."""
    plt.rcParams.update({"font.size": 9.5, "svg.hashsalt": "growth"})
    folder = Path(__file__).parent
    figure, axes = plt.subplots(2, 3, figsize=(11.5, 7.2))
    for ax, panel in zip(axes.flat, PANELS, strict=True):
        path = folder.parent / f"performance/growth-{panel}.json"
        if not path.exists():
            ax.set_title(f"{panel}: not measured yet")
            continue
        found = json.loads(path.read_text(encoding="utf-8"))
        curves = [curve for curve in found["curves"] if curve["unit"] == "s"]
        draw(ax, curves, {row["name"]: row["median"] for row in found["rows"]})
    for ax in axes[:, 0]:
        ax.set_ylabel("CPU time, s")
    figure.suptitle("CPU time against size; the numbers are exponents fitted over all sizes")
    figure.tight_layout()
    figure.savefig(folder / "growth.png", dpi=150)
    figure.savefig(folder / "growth.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
