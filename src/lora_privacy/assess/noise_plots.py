"""Figures of the injected noise beside its laws, and of training. Each returns its ``ax``.

Series differ by marker and line style as well as by colour, so that they survive a grey print.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy.assess.escaping import figure_label
from lora_privacy.assess.figure_style import legend_above, series
from lora_privacy.assess.tables import short_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from lora_privacy.assess.dynamics import LayerDynamics
    from lora_privacy.assess.measure import LayerNoise
    from lora_privacy.assess.result import Assessment, MethodResult

__all__ = [
    "plot_distances",
    "plot_dynamics",
    "plot_noise_ratio",
    "plot_quantiles",
    "plot_training",
]


def plot_noise_ratio(result: Assessment, ax: Axes) -> Axes:
    """Measured over predicted noise energy, a layer a line; bars are ±2 standard errors."""
    projected = [method for method in result.methods if method.layers]
    for index, method in enumerate(projected):
        colour, marker, _ = series(index)
        name = figure_label(method.method)
        places = [_place(method.layers, i, index, len(projected)) for i in _rows(method)]
        ax.errorbar(
            [layer.fresh_ratio for layer in method.layers],
            places,
            xerr=[2 * layer.fresh_standard_error for layer in method.layers],
            fmt=marker,
            color=colour,
            markersize=4,
            label=f"{name}: {method.layers[0].entry.draws:,} fresh draws of A",
        )
        ax.plot(
            [layer.training_ratio for layer in method.layers],
            places,
            marker,
            color=colour,
            markerfacecolor="white",
            markersize=5,
            label=f"{name}: in training",
        )
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_xlabel("noise energy ‖G(AᵀA − I)‖², measured / predicted")
    _name_layers(ax, projected[0].layers)
    legend_above(ax, 2)
    return ax


def plot_quantiles(layer: LayerNoise, ax: Axes, title: str | None = None) -> Axes:
    """Quantiles of one entry over fresh draws of A against the exact law and a Gaussian."""
    entry = layer.entry
    low, high = entry.expected[0], entry.expected[-1]
    ax.plot([low, high], [low, high], color="black", linewidth=0.8, label="exact law")
    ax.plot(entry.expected, entry.normal, "--", color="#c8553d", linewidth=1.2, label="Gaussian")
    ax.plot(entry.expected, entry.observed, ".", color="#1b4f8a", markersize=3.5, label="drawn")
    ax.set_title(f"{figure_label(title or layer.layer)}, r = {layer.rank}", fontsize=8)
    return ax


def plot_distances(method: MethodResult, ax: Axes) -> Axes:
    """Total variation to a Gaussian of an entry, a row and the matrix, a layer a line."""
    places = _rows(method)
    series = (
        ("entry, median", "tv_median", "o", "#1b4f8a"),
        ("entry, largest", "tv_largest", "s", "#1b4f8a"),
        ("entry, proved bound", "tv_bound", "|", "#4a4a4a"),
        ("entry, published variance, largest", "tv_published_largest", "x", "#7a7a7a"),
        ("row (joint)", "joint_tv", "D", "#c8553d"),
        ("whole matrix", "matrix_tv", "^", "#000000"),
    )
    for label, field, marker, colour in series:
        values = [getattr(layer, field) for layer in method.layers]
        ax.plot(values, places, marker, color=colour, markersize=5, label=label)
    ax.set_xscale("log")
    ax.set_xlabel("total variation distance to a Gaussian (1 = a test tells them apart surely)")
    _name_layers(ax, method.layers)
    legend_above(ax, 3)
    return ax


def plot_dynamics(result: Assessment, ax: Axes) -> Axes:
    """Relative gap between ΔW of plain SGD and its linearised prediction, a layer a line."""
    for index, method in enumerate(result.methods):
        if not method.dynamics:
            continue
        colour, marker, _ = series(index)
        name = figure_label(method.method)
        gaps = [max(layer.disagreement, 1e-9) for layer in method.dynamics]
        ax.plot(gaps, range(len(gaps)), marker, color=colour, markersize=5, label=name)
    ax.set_xscale("log")
    first = next(method for method in result.methods if method.dynamics)
    ax.set_xlabel(
        f"‖ΔW + ηs²ΣG·AᵀA‖ / ‖ΔW‖ after {first.dynamics[0].steps} SGD steps "
        f"at η = {first.dynamics[0].learning_rate:g}"
    )
    _name_layers(ax, first.dynamics)
    legend_above(ax, 3)
    return ax


def plot_training(result: Assessment, left: Axes, right: Axes) -> tuple[Axes, Axes]:
    """Training loss, smoothed over 20 steps, and the held-out result after each epoch."""
    for index, method in enumerate(result.methods):
        colour, marker, line = series(index)
        losses = method.curve.losses
        window = max(1, min(20, len(losses)))
        smooth = [sum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)]
        steps = range(window, len(losses) + 1)
        left.plot(steps, smooth, linestyle=line, color=colour, label=figure_label(method.method))
        scores = method.curve.scores
        shown = [s.loss if s.accuracy is None else 100 * s.accuracy for s in scores]
        epochs = range(1, len(shown) + 1)
        right.plot(epochs, shown, marker, linestyle=line, color=colour)
    left.set_xlabel("step")
    left.set_ylabel("training loss, nats")
    causal = result.config.task == "causal-lm"
    right.set_xlabel("epoch")
    left.set_xlim(left=0)
    right.set_ylabel("held-out loss, nats" if causal else "held-out accuracy, %")
    right.set_xticks(range(1, max(len(m.curve.scores) for m in result.methods) + 1))
    left.legend(frameon=False, fontsize=7)
    return left, right


def _rows(method: MethodResult) -> range:
    return range(len(method.layers))


def _place(layers: tuple[LayerNoise, ...], row: int, index: int, count: int) -> float:
    """Methods sit side by side within a layer's line."""
    return row + (index - (count - 1) / 2) * 0.22 if layers else row


def _name_layers(ax: Axes, layers: Sequence[LayerNoise | LayerDynamics]) -> None:
    names = [figure_label(name) for name in short_names([x.layer for x in layers])]
    ax.set_yticks(range(len(layers)), names, fontsize=7)
    ax.set_ylabel("layer")
    ax.set_ylim(-0.6, len(layers) - 0.4)
    ax.invert_yaxis()
