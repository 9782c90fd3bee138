"""Figures of what is proved and what attacks got, with intervals: little must look little."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lora_privacy.assess.cells import accuracy_interval, at_most
from lora_privacy.assess.escaping import figure_label
from lora_privacy.assess.figure_style import legend_above, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lora_privacy.assess.result import Assessment, MethodResult
    from lora_privacy.assess.spectra import LayerSpectrum

__all__ = [
    "plot_areas",
    "plot_attacks",
    "plot_spectrum",
    "plot_utility",
]

_LEAST_RATE = 1e-3
_CURVE = 60


def plot_utility(result: Assessment, ax: Axes) -> Axes:
    """Held-out result against ε, in nats: from what attacks show to what is proved.

    The true ε of a method lies on its line. Where nothing is proved, the line is an arrow to ∞.
    Bars are the 95 % limits of the accuracy; of a loss there are none.
    """
    shown = [_audited(method) for method in result.methods]
    finite = [m.proved.epsilon for m in result.methods if math.isfinite(m.proved.epsilon)]
    end = 1.25 * max([*finite, *shown, 1.0])
    for index, (method, low) in enumerate(zip(result.methods, shown, strict=True)):
        colour, marker, line = series(index)
        score = method.curve.scores[-1]
        value, error = score.loss, None
        if score.accuracy is not None:
            value = 100 * score.accuracy
            limits = accuracy_interval(score)
            error = [[value - 100 * limits[0]], [100 * limits[1] - value]]
        proved = method.proved.epsilon
        high = min(proved, end)
        # Backwards where an attack refutes the proof: drawn loudly.
        width = 5.0 if low > high else 1.2
        ax.plot([low, high], [value, value], linestyle=line, color=colour, linewidth=width)
        ax.plot([low], [value], "|", color=colour, markersize=11, markeredgewidth=1.6)
        where = "no bound" if math.isinf(proved) else f"ε ≤ {at_most(proved)}"
        ax.errorbar(
            [high],
            [value],
            yerr=error,
            fmt=marker,
            color=colour,
            capsize=3,
            markerfacecolor="white" if math.isinf(proved) else colour,
            label=f"{figure_label(method.method)}: {where}",
        )
        if math.isinf(proved):
            ax.annotate(
                "",
                (1.1 * end, value),
                (high, value),
                arrowprops={"arrowstyle": "->", "color": colour},
                annotation_clip=False,
            )
    ax.set_xlim(-0.03 * end, 1.12 * end)
    ticks = [tick for tick in ax.get_xticks() if 0 <= tick <= 0.9 * end]
    ax.set_xticks([*ticks, 1.1 * end], [*(f"{tick:g}" for tick in ticks), "∞"])
    ax.set_xlabel("ε, nats: from what attacks show ( | ) to what is proved (marker)")
    causal = result.config.task == "causal-lm"
    ax.set_ylabel("held-out loss, nats" if causal else "held-out accuracy, %")
    legend_above(ax, 2)
    return ax


def plot_attacks(method: MethodResult, ax: Axes) -> Axes:
    """ROC curves of the membership attacks, and the region that a proof leaves to any attack.

    Both axes are logarithmic. Bars are limits of the TPR at one FPR, for all attacks together.

    Raises:
        ValueError: The method was not attacked.
    """
    found = method.membership
    if found is None:
        raise ValueError(f"{method.method!r} was not attacked, so there is no curve to draw.")
    seen = [x for fpr, _ in found.curves.values() for x in fpr if x > 0]
    least = max(_LEAST_RATE, min([*seen, found.report.fpr / 2]))
    grid = np.geomspace(least, 1, _CURVE)
    ax.plot(grid, grid, "-", color="#767676", linewidth=0.8, label="blind guessing")
    if method.noise is not None and math.isfinite(method.proved.epsilon):
        limit = np.minimum(1.0, method.noise.accountant().tpr_bound(grid))
        ax.plot(grid, limit, "-", color="black", linewidth=1.4, label="proved: no attack is above")
        ax.fill_between(grid, limit, 1.0, color="#000000", alpha=0.1, linewidth=0, hatch="//")
    for index, (name, (fpr, tpr)) in enumerate(found.curves.items()):
        colour, marker, line = series(index)
        ax.step(
            np.maximum(fpr, least),
            np.maximum(tpr, least / 10),
            linestyle=line,
            color=colour,
            where="post",
            linewidth=1.1,
            label=figure_label(name),
        )
        rate = found.report.rates[name][1]
        if not isinstance(rate, str):
            spot = found.report.fpr * 1.12 ** (index - 1.5)  # side by side
            value = max(rate.value, least / 10)
            bars = [[value - max(rate.low, least / 10)], [max(rate.high, value) - value]]
            bars = np.maximum(bars, 0)
            ax.errorbar([spot], [value], yerr=bars, fmt=marker, color=colour, capsize=2, ms=4)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(least, 1)
    ax.set_ylim(least / 2, 1.05)
    ax.set_xlabel("false positive rate")
    ax.set_ylabel("true positive rate")
    proved = method.proved.epsilon
    title = "nothing is proved" if math.isinf(proved) else f"ε ≤ {at_most(proved)} is proved"
    ax.set_title(f"{figure_label(method.method)}: {title}", fontsize=9)
    return ax


def plot_areas(result: Assessment, ax: Axes) -> Axes:
    """AUC of every attack with its limits, a method a block; ▶ marks the most that is proved."""
    names: list[str] = []
    for index, method in enumerate(result.methods):
        colour, marker, _ = series(index)
        rates = []
        if method.membership is not None:
            rates += [(name, area) for name, (area, _) in method.membership.report.rates.items()]
        if method.update is not None:
            rates.append(("one update, white box", method.update.auc))
        for name, area in rates:
            spot = len(names)
            names.append(f"{figure_label(method.method)}: {figure_label(name)}")
            ax.plot([area.low, area.high], [spot, spot], "|-", color=colour, markersize=7)
            ax.plot([area.value], [spot], marker, color=colour, markersize=5)
        best = None if method.update is None else method.update.best_auc
        if best is not None:
            ax.plot([best], [len(names) - 1], ">", color="black", markersize=6)
    ax.axvline(0.5, color="#767676", linewidth=0.8)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 1.02)
    ax.set_xlabel("AUC (0.5 = blind guessing), with confidence limits; ▶ = most that is proved")
    ax.set_ylabel("attack")
    return ax


def plot_spectrum(layer: LayerSpectrum, ax: Axes, title: str | None = None) -> Axes:
    """Largest singular values of one update, in units of the gradient, before and after noise."""
    profiles = (
        ("clean (not private)", layer.before),
        ("with its noise", layer.after),
        ("restored", layer.restored),
    )
    for index, (label, values) in enumerate(profiles):
        if values is None:
            continue
        colour, marker, line = series(index)
        places = range(1, len(values) + 1)
        ax.plot(places, values, marker, linestyle=line, color=colour, markersize=4, label=label)
    if layer.edge is not None:
        ax.axhline(layer.edge, color="#767676", linewidth=0.9, label="largest of noise alone")
    ax.set_xlabel("number of the singular value")
    ax.set_ylabel("singular value, unit of the gradient")
    ax.set_ylim(bottom=0)
    ax.set_title(figure_label(title or layer.layer), fontsize=8)
    return ax


def _audited(method: MethodResult) -> float:
    found = None if method.membership is None else method.membership.report.epsilon
    return 0.0 if found is None or isinstance(found, str) else found.epsilon
