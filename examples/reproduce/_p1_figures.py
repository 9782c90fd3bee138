"""Figures of docs/reproduction/p1-noise.md, from its raw results."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _common import STYLES
from _p1_tables import short
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["draw_gradients", "draw_tv"]

_BLUE, _RED, _GREEN, _GREY, _ = (style[0] for style in STYLES)


def draw_tv(results: dict[str, Any]) -> Figure:
    """Total variation of an entry with ρ = 0 along m and along r."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharey=True)
    _tv(axes[0], [row for row in results["distances"] if row["rank"] == 8], "inputs")
    _tv(axes[1], [row for row in results["distances"] if row["inputs"] == 768], "rank")
    axes[0].set_title("rank r = 8, growing m")
    axes[0].set_xlabel("inputs m, entries of the gradient's row")
    axes[1].set_title("m = 768 inputs, growing rank")
    axes[1].set_xlabel("rank r")
    axes[0].set_ylabel("total variation to the Gaussian\nof equal variance, ½∫|p − φ|")
    axes[0].set_ylim(1e-3, 2)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    return figure


def _tv(axis: Axes, rows: list[dict[str, Any]], along: str) -> None:
    rows = sorted(rows, key=lambda row: row[along])
    x = [row[along] for row in rows]
    ratio, bound = [row["published_ratio"] for row in rows], [row["bound"] for row in rows]
    axis.plot(x, ratio, color=_RED, ls="--", label="published shape C·L₃, here C = 1: no bound")
    axis.plot(x, bound, color=_GREEN, ls="-.", lw=2, label="proved bound")
    axis.plot(x, [row["exact"] for row in rows], color=_BLUE, label="exact")
    seen = [row for row in rows if "simulated" in row]
    axis.errorbar(
        [row[along] for row in seen],
        [row["simulated"]["tv"] for row in seen],
        yerr=[2 * row["simulated"]["standard_error"] for row in seen],
        fmt="o",
        ms=5,
        mfc="white",
        mec="black",
        ecolor="black",
        capsize=3,
        label="simulated q(AᵀA − I), ±2 standard errors",
    )
    axis.set_xscale("log")
    axis.set_yscale("log")


def draw_gradients(results: dict[str, Any]) -> Figure:
    """Variance against rank and against ρ, and distances of the drawn entries to both laws."""
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.6), width_ratios=(1, 1, 1.25))
    _variance_by_rank(axes[0], results)
    _variance_by_cosine(axes[1], results)
    _distances(axes[2], results)
    handles, labels = axes[2].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, title="right panel")
    figure.tight_layout(w_pad=1.5, rect=(0, 0.1, 1, 1))
    return figure


def _variance_by_rank(axis: Axes, results: dict[str, Any]) -> None:
    """Of the layer whose row has the largest entry, and of that row's median entry."""
    layers = results["ranks"][0]["layers"]
    pick = max(range(len(layers)), key=lambda i: abs(layers[i]["peak"]["cosine"]))
    r = np.array([run["rank"] for run in results["ranks"]])
    axis.plot(r, 1 / r, color=_RED, ls="--", label="published, 1/r")
    for kind, colour, marker, fill in (
        ("peak", _BLUE, "o", _BLUE),
        ("median", _GREY, "s", "white"),
    ):
        entries = [run["layers"][pick][kind] for run in results["ranks"]]
        rho = abs(entries[0]["cosine"])
        if kind == "peak":
            axis.plot(r, (1 + rho**2) / r, color=_BLUE, label=f"exact, ρ = {rho:.2f}")
        seen = [entry["variance"] for entry in entries]
        label = f"measured, ρ = {rho:.2f}" if rho >= 0.01 else "measured, ρ ≈ 0"
        axis.plot(r, seen, ls="none", marker=marker, color=colour, mfc=fill, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(r, [str(rank) for rank in r])
    parts = 2 ** np.arange(1, 7)
    axis.set_yticks(1 / parts, [f"1/{part}" for part in parts])
    axis.set_xlabel("rank r")
    axis.set_ylabel("variance of one noise entry / ‖q‖²")
    axis.set_title(f"against the rank (block {short(layers[pick]['layer'])})", fontsize=9)
    axis.legend(frameon=False, fontsize=8)


def _variance_by_cosine(axis: Axes, results: dict[str, Any]) -> None:
    """All layers: r·Var/‖q‖² is 1 + ρ², and not 1."""
    top = 0.0
    for run, (colour, marker, _) in zip(results["ranks"], STYLES, strict=False):
        entries = [layer[kind] for layer in run["layers"] for kind in ("peak", "median")]
        rho = [abs(entry["cosine"]) for entry in entries]
        top = max(top, *rho)
        axis.errorbar(
            rho,
            [entry["variance"] * run["rank"] for entry in entries],
            yerr=[2 * entry["error"] * run["rank"] for entry in entries],
            fmt=marker,
            ms=4,
            color=colour,
            mfc="none",
            lw=0.8,
            label=f"measured, r = {run['rank']}",
        )
    x = np.linspace(0, 1.05 * top, 100)
    axis.plot(x, 1 + x**2, color="black", lw=1, label="exact, 1 + ρ²")
    axis.plot(x, np.ones_like(x), color=_RED, ls="--", label="published, 1")
    axis.set_xlabel("|ρ| = |q_i| / ‖q‖")
    axis.set_ylabel("r · variance / ‖q‖²")
    axis.set_title("all layers, peak and median entries", fontsize=9)
    axis.legend(frameon=False, fontsize=8)


def _distances(axis: Axes, results: dict[str, Any]) -> None:
    """Kolmogorov distances at rank 8, a line a layer."""
    run = next(run for run in results["ranks"] if run["rank"] == 8)
    y = np.arange(len(run["layers"]))[::-1]
    for kind, law, colour, marker, fill in (
        ("peak", "published", _RED, "s", _RED),
        ("median", "published", _RED, "s", "white"),
        ("peak", "exact", _BLUE, "o", _BLUE),
        ("median", "exact", _BLUE, "o", "white"),
    ):
        axis.plot(
            [layer[kind][f"ks_{law}"] for layer in run["layers"]],
            y,
            ls="none",
            marker=marker,
            color=colour,
            mfc=fill,
            label=f"{'published Gaussian' if law == 'published' else 'exact law'}, {kind} entry",
        )
    axis.axvline(results["band"], color="black", lw=1, ls=":", label="99 % band, all together")
    axis.set_xscale("log")
    axis.set_yticks(y, [short(layer["layer"]) for layer in run["layers"]])
    axis.set_xlabel("largest gap of distribution functions")
    axis.set_title("drawn entries against two laws, r = 8", fontsize=9)
    ticks = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    low, high = axis.get_xlim()
    shown = [tick for tick in ticks if low < tick < high]
    axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axis.minorticks_off()
