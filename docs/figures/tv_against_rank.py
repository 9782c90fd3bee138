"""Figure of docs/theory/distance-to-gaussian.md: distance of an entry against inputs and rank.

Run ``python docs/figures/tv_against_rank.py``; it writes the png and the svg beside itself.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from lora_privacy.noise.bounds import lyapunov_ratio, tv_bound
from lora_privacy.noise.entry import EntryNoise
from lora_privacy.noise.gaussianity import tv_to_gaussian

SEED = 20240921
RANK, INPUTS = 8, 16
DRAWS = 200_000
BATCH = 2_000


def centred_row(inputs: int) -> np.ndarray:
    """Equal entries but a zero at the entry that is looked at, so that ρ = 0 at every m."""
    row = np.ones(inputs)
    row[0] = 0.0
    return row / math.sqrt(inputs - 1)


def monte_carlo(rank: int, inputs: int, rng: np.random.Generator) -> tuple[float, float]:
    """P(B) − Φ(B) on draws of q(AᵀA − I) itself, B = {p > φ}, and its standard error.

    For B the difference is the total variation; an error in B could only lower it.
    """
    law, row = EntryNoise(rank), centred_row(inputs)
    std = law.std()
    inside = 0
    gaussian = np.linspace(-8 * std, 8 * std, 200_000)  # Φ(B) by a sum over a grid
    density = np.exp(-0.5 * (gaussian / std) ** 2) / (std * math.sqrt(2 * math.pi))
    share = float(np.sum(density[law.pdf(gaussian) > density]) * (gaussian[1] - gaussian[0]))
    for _ in range(DRAWS // BATCH):
        a = rng.standard_normal((BATCH, rank, inputs)) / math.sqrt(rank)
        noise = np.einsum("sr,sr->s", a @ row, a[:, :, 0])
        gauss = np.exp(-0.5 * (noise / std) ** 2) / (std * math.sqrt(2 * math.pi))
        inside += int(np.count_nonzero(law.pdf(noise) > gauss))
    seen = inside / DRAWS
    return seen - share, math.sqrt(seen * (1 - seen) / DRAWS)


def draw(
    ax: Axes, x: np.ndarray, ranks: np.ndarray, inputs: np.ndarray, points: list[int], vary: str
) -> None:
    """Exact distance, proved bound, published shape and simulated points along one axis."""
    exact = [tv_to_gaussian(EntryNoise(int(r))).value for r in ranks]
    bound = [tv_bound(EntryNoise(int(r))).value for r in ranks]
    shape = [
        lyapunov_ratio(centred_row(int(m)), int(r), index=0)
        for r, m in zip(ranks, inputs, strict=True)
    ]
    ax.plot(x, bound, color="0.45", lw=2.5, ls="-", label="proved bound, section 2")
    ax.plot(x, exact, color="black", lw=1.2, ls="-", label="exact total variation")
    ax.plot(x, shape, color="black", lw=1.4, ls="--", label="published shape C·L₃, here C = 1")
    rng = np.random.default_rng(SEED)
    seen = [monte_carlo(*((p, INPUTS) if vary == "rank" else (RANK, p)), rng=rng) for p in points]
    ax.errorbar(
        points,
        [value for value, _ in seen],
        yerr=[2 * error for _, error in seen],
        fmt="o",
        ms=5,
        mfc="white",
        mec="black",
        ecolor="black",
        capsize=3,
        label="simulated q(AᵀA − I), ±2 standard errors",
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylabel("distance to the Gaussian of equal variance\n(½∫|p − φ|, dimensionless)")
    ax.grid(color="0.9", lw=0.6)


def main() -> None:
    """Draw both panels and save them."""
    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "tv_against_rank"})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.6), sharey=True)
    m = np.unique(np.geomspace(2, 1e6, 40).astype(int))
    draw(left, m, np.full(m.size, RANK), m, [4, 16, 64, 256], "inputs")
    left.set_xlabel("inputs m (entries of the row)")
    left.set_title(f"rank r = {RANK}")
    r = np.unique(np.geomspace(1, 1024, 40).astype(int))
    draw(right, r, r, np.full(r.size, INPUTS), [1, 2, 4, 8, 16, 32], "rank")
    right.set_xlabel("rank r (rows of A)")
    right.set_title(f"inputs m = {INPUTS}")
    right.set_ylabel("")
    left.set_ylim(2e-4, 1.5)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    folder = Path(__file__).parent
    figure.savefig(folder / "tv_against_rank.png", dpi=160)
    figure.savefig(folder / "tv_against_rank.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
