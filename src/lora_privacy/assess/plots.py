"""All figures of an assessment as files, with the words that go with them.

What draws is in ``noise_plots`` and ``evidence_plots``: each function takes a result and an
``ax``, labels its units and returns the ``ax``.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import matplotlib as mpl
from matplotlib.figure import Figure

from lora_privacy.assess.cells import score_cell
from lora_privacy.assess.evidence_plots import (
    plot_areas,
    plot_attacks,
    plot_spectrum,
    plot_utility,
)
from lora_privacy.assess.figure_style import METADATA, SETTINGS
from lora_privacy.assess.noise_plots import (
    plot_distances,
    plot_dynamics,
    plot_noise_ratio,
    plot_quantiles,
    plot_training,
)
from lora_privacy.assess.tables import short_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_privacy.assess.measure import LayerNoise
    from lora_privacy.assess.result import Assessment, MethodResult

__all__ = ["Drawing", "Section", "draw_all"]

_QQ_PANELS = 6
Section = Literal["privacy", "attacks", "utility", "projection"]


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure as files, with the words that go with it.

    Attributes:
        svg: Vector form. pdf: The same with embedded fonts. png: Raster form, 150 dots an inch.
        alt: What it shows, for those who cannot see it.
        caption: How to read it.
        section: Where on the page it stands.
    """

    svg: bytes
    png: bytes
    pdf: bytes
    alt: str
    caption: str
    section: Section


def draw_all(result: Assessment) -> dict[str, Drawing]:
    """All figures by name; empty when no method finished."""
    if not result.methods:
        return {}
    return {
        **_evidence(result),
        "training": _draw(
            lambda figure: plot_training(result, *figure.subplots(1, 2)),
            size=(7.5, 3.2),
            alt="Training loss against the step, and held-out results after every epoch.",
            caption="Training loss (mean of 20 steps) and held-out result. A private method's "
            "loss is that of the records that its coins drew.",
            section="utility",
        ),
        **_projection(result),
    }


def _evidence(result: Assessment) -> dict[str, Drawing]:
    """What is proved and what attacks got."""
    places = "; ".join(f"{m.method} {score_cell(m.curve.scores[-1])}" for m in result.methods)
    drawings = {
        "utility-privacy": _draw(
            lambda figure: plot_utility(result, figure.add_subplot()),
            size=(7.5, 3.2 + 0.16 * len(result.methods)),
            alt=f"Held-out result of each method against its ε: {places}. The bounds are those of "
            "the table of privacy.",
            caption="What each method scores, against ε. The marker is what is proved of it "
            "(guarantee), the tick what attacks showed of a target trained likewise (evidence, at "
            "its confidence). A hollow marker with an arrow to ∞: nothing is proved. Vertical "
            "bars: 95 % limits of the accuracy. A line near 0 on the left says that these attacks "
            "showed little, not that ε is small.",
            section="privacy",
        )
    }
    attacked = [method for method in result.methods if method.membership is not None]
    if attacked:
        rows = math.ceil(len(attacked) / 2)
        drawings["attacks"] = _draw(
            lambda figure: _paint_attacks(figure, attacked, rows),
            size=(7.5, 0.5 + 3.3 * rows),
            alt="True against false positive rate of every membership attack, a panel a method; "
            "for private methods the region that a proof excludes is hatched.",
            caption="Membership attacks. Every curve describes one target's records and stops "
            "where the false positive rate is that of one record; bars at one FPR are limits of "
            "the TPR as if records were independent, for all attacks together. Hatched: proved to "
            "be out of reach for every attack, known or not, on average over targets; the curve "
            "of one target may stray into it. Without noise there is no such region.",
            section="attacks",
        )
    if attacked or any(method.update is not None for method in result.methods):
        rates = sum(
            (0 if m.membership is None else len(m.membership.report.rates))
            + (m.update is not None)
            for m in result.methods
        )
        drawings["areas"] = _draw(
            lambda figure: plot_areas(result, figure.add_subplot()),
            size=(7.5, 1.2 + 0.2 * rates),
            alt="Area under the curve of every attack, with confidence limits; the numbers are in "
            "the tables of attacks.",
            caption="How well each attack tells members from others. A wide interval says that "
            "there was little evidence. ▶ beside the attack on one update: the most that any "
            "attack on that step can have, which is proved.",
            section="attacks",
        )
    for method in result.methods:
        if method.spectra:
            drawings[f"spectra-{method.method}"] = _draw(
                lambda figure, method=method: _paint_spectra(figure, method),
                size=(7.5, 3.0 * math.ceil(len(method.spectra) / 2)),
                alt=f"Singular values of one update of {method.method}, clean, with noise and "
                "restored.",
                caption=f"{method.method}: one update's largest singular values. The clean ones "
                "are computed without noise: no guarantee covers them.",
                section="projection",
            )
    return drawings


def _projection(result: Assessment) -> dict[str, Drawing]:
    """Laws of the injected noise beside what was measured."""
    drawings: dict[str, Drawing] = {}
    projected = [method for method in result.methods if method.layers]
    height = 1.8 + 0.22 * max((len(method.layers) for method in projected), default=0)
    if projected:
        drawings["noise-ratio"] = _draw(
            lambda figure: plot_noise_ratio(result, figure.add_subplot()),
            size=(7.5, height + 0.15 * len(projected)),
            alt="Measured over predicted noise energy for every layer and method; one is exact.",
            caption="The energy of the injected noise N = G(AᵀA − I), measured over predicted by "
            "its exact law. Filled: over fresh draws of A, with bars of two standard errors. "
            "Hollow: with the A of training. LoRA-FA keeps one A, a single draw, which scatters; "
            "LoRA trains its A, which then follows the gradients and may leave the prediction "
            "for good.",
            section="projection",
        )
        drawings["distances"] = _draw(
            lambda figure: plot_distances(projected[0], figure.add_subplot()),
            size=(7.5, height),
            alt="Total variation between the noise and a Gaussian for every layer: an entry, its "
            "proved bound, a row and the whole matrix.",
            caption=f"{projected[0].method}: how far the noise is from a Gaussian. An entry comes "
            "close as the rank grows, never as the layer widens; a whole row stays far, and two "
            "non-zero rows or more are told apart surely, so no Gaussian mechanism can be read "
            "off.",
            section="projection",
        )
    for method in projected:
        layers = _spread(method.layers)
        rows = math.ceil(len(layers) / 3)
        drawings[f"quantiles-{method.method}"] = _draw(
            lambda figure, layers=layers, rows=rows: _paint_quantiles(figure, layers, rows),
            size=(7.5, 2.6 * rows),
            alt="Quantiles of one noise entry a layer against its exact law and a Gaussian, for "
            f"{method.method}.",
            caption=f"{method.method}: one noise entry a layer over fresh draws of A. Dots on the "
            "line: the exact law holds. The dashed line is a Gaussian of the same variance; it "
            "leaves the dots in the tails.",
            section="projection",
        )
    if any(method.dynamics for method in result.methods):
        drawings["dynamics"] = _draw(
            lambda figure: plot_dynamics(result, figure.add_subplot()),
            size=(7.5, max(height, 2.6)),
            alt="Relative gap between the weight change of plain SGD and the linearised "
            "prediction.",
            caption="How far the weight change of plain SGD is from −ηs²ΣG·AᵀA. LoRA-FA and FLoRA "
            "follow it to rounding; LoRA does as far as A stays where it was.",
            section="projection",
        )
    return drawings


def _draw(
    paint: Callable[[Figure], object],
    *,
    size: tuple[float, float],
    alt: str,
    caption: str,
    section: Section,
) -> Drawing:
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.draw_without_rendering()  # lays it out, once for all three files
        figure.set_layout_engine("none")
        files = {}
        for kind, metadata in METADATA.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            files[kind] = buffer.getvalue()
    return Drawing(**files, alt=alt, caption=caption, section=section)


def _paint_attacks(figure: Figure, methods: list[MethodResult], rows: int) -> None:
    axes = figure.subplots(rows, min(2, len(methods)), squeeze=False).ravel()
    for ax, method in zip(axes, methods, strict=False):
        plot_attacks(method, ax)
    for ax in axes[len(methods) :]:
        ax.set_axis_off()
    # One legend for all panels; only those of private methods have the proved line.
    found = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        found.values(), found.keys(), loc="outside upper left", ncols=3, frameon=False, fontsize=7
    )


def _paint_spectra(figure: Figure, method: MethodResult) -> None:
    rows = math.ceil(len(method.spectra) / 2)
    axes = figure.subplots(rows, min(2, len(method.spectra)), squeeze=False).ravel()
    names = short_names([layer.layer for layer in method.spectra])
    for ax, layer, name in zip(axes, method.spectra, names, strict=False):
        plot_spectrum(layer, ax, f"{name}: cosine to the clean one {layer.cosine_after:.2f}")
    for ax in axes[len(method.spectra) :]:
        ax.set_axis_off()
    axes[0].legend(frameon=False, fontsize=7)


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
