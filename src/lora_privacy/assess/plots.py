"""Figures of an assessment. Each takes a result and an ``ax``, labels its units, returns ``ax``.

Series differ by marker and line style as well as by colour, so that they survive a grey print.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from lora_privacy.assess.tables import short_names
from lora_privacy.plots import STYLES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

    from lora_privacy.assess.dynamics import LayerDynamics
    from lora_privacy.assess.measure import LayerNoise
    from lora_privacy.assess.result import Assessment, MethodResult

__all__ = [
    "Drawing",
    "draw_all",
    "plot_distances",
    "plot_dynamics",
    "plot_noise_ratio",
    "plot_quantiles",
    "plot_training",
]

_QQ_PANELS = 6
_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "svg.fonttype": "path",
    "svg.hashsalt": "lora-privacy",  # the same numbers give the same file
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure as files, with the sentence that stands in for it.

    Attributes:
        svg: Vector form. png: Raster form, 150 dots an inch.
        alt: What it shows, for those who cannot see it.
    """

    svg: bytes
    png: bytes
    alt: str


def draw_all(result: Assessment) -> dict[str, Drawing]:
    """All figures by name; empty when no method finished."""
    if not result.methods:
        return {}
    drawings: dict[str, Drawing] = {}

    def draw(
        name: str, alt: str, size: tuple[float, float], paint: Callable[[Figure], object]
    ) -> None:
        with mpl.rc_context(_SETTINGS):
            figure = Figure(figsize=size, layout="constrained")
            paint(figure)
            files = {}
            for kind in ("svg", "png"):
                buffer = io.BytesIO()
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
                files[kind] = buffer.getvalue()
        drawings[name] = Drawing(files["svg"], files["png"], alt)

    projected = [method for method in result.methods if method.layers]
    height = 1.6 + 0.22 * max((len(method.layers) for method in projected), default=0)
    if projected:
        draw(
            "noise-ratio",
            "Measured over predicted noise energy for every layer and method; one is exact.",
            (7.5, height),
            lambda figure: plot_noise_ratio(result, figure.add_subplot()),
        )
    for method in projected:
        layers = _spread(method.layers)
        rows = math.ceil(len(layers) / 3)
        draw(
            f"quantiles-{method.method}",
            f"Quantiles of one noise entry a layer against its exact law and a Gaussian, for "
            f"{method.method}.",
            (7.5, 2.6 * rows),
            lambda figure, layers=layers, rows=rows: _paint_quantiles(figure, layers, rows),
        )
    if projected:
        draw(
            "distances",
            "Total variation between the noise and a Gaussian for every layer: an entry, its proved "
            "bound, a row and the whole matrix.",
            (7.5, height),
            lambda figure: plot_distances(projected[0], figure.add_subplot()),
        )
    if any(method.dynamics for method in result.methods):
        draw(
            "dynamics",
            "Relative gap between the weight change of plain SGD and the linearised prediction.",
            (7.5, height),
            lambda figure: plot_dynamics(result, figure.add_subplot()),
        )
    draw(
        "training",
        "Training loss against the step, and held-out results after every epoch.",
        (7.5, 3.2),
        lambda figure: plot_training(result, *figure.subplots(1, 2)),
    )
    return drawings


def plot_noise_ratio(result: Assessment, ax: Axes) -> Axes:
    """Measured over predicted noise energy, a layer a line; bars are ±2 standard errors."""
    projected = [method for method in result.methods if method.layers]
    for index, method in enumerate(projected):
        colour, marker, _ = STYLES[index % len(STYLES)]
        places = [_place(method.layers, i, index, len(projected)) for i in _rows(method)]
        ax.errorbar(
            [layer.fresh_ratio for layer in method.layers],
            places,
            xerr=[2 * layer.fresh_standard_error for layer in method.layers],
            fmt=marker,
            color=colour,
            markersize=4,
            label=f"{method.method}: {method.layers[0].entry.draws:,} fresh draws of A",
        )
        ax.plot(
            [layer.training_ratio for layer in method.layers],
            places,
            marker,
            color=colour,
            markerfacecolor="white",
            markersize=5,
            label=f"{method.method}: in training",
        )
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_xlabel("noise energy ‖G(AᵀA − I)‖², measured / predicted")
    _name_layers(ax, projected[0].layers)
    _legend_above(ax, 2)
    return ax


def plot_quantiles(layer: LayerNoise, ax: Axes, title: str | None = None) -> Axes:
    """Quantiles of one entry over fresh draws of A against the exact law and a Gaussian."""
    entry = layer.entry
    low, high = entry.expected[0], entry.expected[-1]
    ax.plot([low, high], [low, high], color="black", linewidth=0.8, label="exact law")
    ax.plot(entry.expected, entry.normal, "--", color="#c8553d", linewidth=1.2, label="Gaussian")
    ax.plot(entry.expected, entry.observed, ".", color="#1b4f8a", markersize=3.5, label="drawn")
    ax.set_title(f"{title or layer.layer}, r = {layer.rank}", fontsize=8)
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
    _legend_above(ax, 3)
    return ax


def plot_dynamics(result: Assessment, ax: Axes) -> Axes:
    """Relative gap between ΔW of plain SGD and its linearised prediction, a layer a line."""
    for index, method in enumerate(result.methods):
        if not method.dynamics:
            continue
        colour, marker, _ = STYLES[index % len(STYLES)]
        gaps = [max(layer.disagreement, 1e-9) for layer in method.dynamics]
        ax.plot(gaps, range(len(gaps)), marker, color=colour, markersize=5, label=method.method)
    ax.set_xscale("log")
    first = next(method for method in result.methods if method.dynamics)
    ax.set_xlabel(
        f"‖ΔW + ηs²ΣG·AᵀA‖ / ‖ΔW‖ after {first.dynamics[0].steps} SGD steps "
        f"at η = {first.dynamics[0].learning_rate:g}"
    )
    _name_layers(ax, first.dynamics)
    _legend_above(ax, 3)
    return ax


def plot_training(result: Assessment, left: Axes, right: Axes) -> tuple[Axes, Axes]:
    """Training loss, smoothed over 20 steps, and the held-out result after each epoch."""
    for index, method in enumerate(result.methods):
        colour, marker, line = STYLES[index % len(STYLES)]
        losses = method.curve.losses
        window = max(1, min(20, len(losses)))
        smooth = [sum(losses[i - window : i]) / window for i in range(window, len(losses) + 1)]
        steps = range(window, len(losses) + 1)
        left.plot(steps, smooth, line, color=colour, label=method.method)
        scores = method.curve.scores
        shown = [s.loss if s.accuracy is None else 100 * s.accuracy for s in scores]
        epochs = range(1, len(shown) + 1)
        right.plot(epochs, shown, line, marker=marker, color=colour, label=method.method)
    left.set_xlabel("step")
    left.set_ylabel("training loss, nats")
    causal = result.config.task == "causal-lm"
    right.set_xlabel("epoch")
    right.set_ylabel("held-out loss, nats" if causal else "held-out accuracy, %")
    right.set_xticks(range(1, max(len(m.curve.scores) for m in result.methods) + 1))
    left.legend(frameon=False)
    return left, right


def _paint_quantiles(figure: Figure, layers: list[LayerNoise], rows: int) -> None:
    axes = figure.subplots(rows, 3, squeeze=False).ravel()
    titles = short_names([layer.layer for layer in layers])
    for ax, layer, title in zip(axes, layers, titles, strict=False):
        plot_quantiles(layer, ax, title)
    for ax in axes[len(layers) :]:
        ax.set_axis_off()
    axes[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("quantile of the exact law, in predicted standard deviations", fontsize=9)
    figure.supylabel("quantile drawn / of a Gaussian", fontsize=9)


def _spread(layers: tuple[LayerNoise, ...]) -> list[LayerNoise]:
    """At most six layers, spread over the depth of the model."""
    if len(layers) <= _QQ_PANELS:
        return list(layers)
    last = len(layers) - 1
    return [layers[round(i * last / (_QQ_PANELS - 1))] for i in range(_QQ_PANELS)]


def _rows(method: MethodResult) -> range:
    return range(len(method.layers))


def _place(layers: tuple[LayerNoise, ...], row: int, index: int, count: int) -> float:
    """Methods sit side by side within a layer's line."""
    return row + (index - (count - 1) / 2) * 0.22 if layers else row


def _name_layers(ax: Axes, layers: Sequence[LayerNoise | LayerDynamics]) -> None:
    ax.set_yticks(range(len(layers)), short_names([x.layer for x in layers]), fontsize=7)
    ax.set_ylabel("layer")
    ax.set_ylim(-0.6, len(layers) - 0.4)
    ax.invert_yaxis()


def _legend_above(ax: Axes, columns: int) -> None:
    ax.legend(frameon=False, fontsize=7, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0))
