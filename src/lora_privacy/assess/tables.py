"""The tables of a report as rows of text, for the page, the terminal and Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_privacy._notebook import frame
from lora_privacy.noise.shapes import JL_FAILURE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_privacy.assess.result import Assessment, MethodResult
    from lora_privacy.noise import LawsRow

__all__ = ["Table", "laws_text", "layer_table", "main_table", "number", "short_names"]


@dataclass(frozen=True, slots=True)
class Table:
    """Text cells with a heading each; the first column names the row."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [self.headings, tuple("---" for _ in self.headings), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def to_pandas(self) -> Any:  # noqa: ANN401  (pandas is no dependency)
        """A ``pandas.DataFrame`` of the text cells; MissingPackageError without pandas."""
        return frame([dict(zip(self.headings, row, strict=True)) for row in self.rows])


def number(value: float, digits: int = 3) -> str:
    """A number to ``digits`` significant digits, with ``∞`` for infinity.

    >>> number(12345.678), number(0.000123), number(float("inf")), number(1.0)
    ('12,300', '1.23e-04', '∞', '1.00')
    """
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    scientific = f"{value:.{digits - 1}e}"  # rounds first, so that 0.9996 counts as 1.00
    power = int(scientific.split("e")[1])
    if power < -3:
        return scientific
    return f"{float(scientific):,.{max(0, digits - 1 - power)}f}"


def main_table(result: Assessment) -> Table:
    """One row a method: what it scored and cost, what the noise did, what is proved."""
    causal = result.config.task == "causal-lm"
    headings = (
        "method",
        "held-out loss, nats" if causal else "held-out accuracy",
        "trained numbers",
        "seconds a step",
        "peak memory",
        "noise measured / predicted",
        "entry TV",
        "row TV",
        "matrix TV",
        "drift of A",
        "SGD: ΔW off −ηs²ΣGAᵀA",
        "proved ε",
        "implied ε (heuristic)",
    )
    return Table(headings, tuple(_row(method) for method in result.methods))


def _row(method: MethodResult) -> tuple[str, ...]:
    score = method.curve.scores[-1]
    if score.accuracy is None:
        shown = f"{score.loss:.4f}"
    else:
        shown = f"{100 * score.accuracy:.1f} % ± {196 * (score.accuracy_error or 0):.1f}"
    memory = method.curve.peak_bytes
    return (
        method.method,
        shown,
        f"{method.trained_parameters:,}",
        number(method.curve.wall_seconds / method.curve.steps, 2),
        "unknown" if memory is None else f"{memory / 2**20:,.0f} MiB",
        _pooled_ratio(method),
        number(_median([layer.tv_median for layer in method.layers])) if method.layers else "–",
        number(_median([layer.joint_tv for layer in method.layers])) if method.layers else "–",
        number(max(layer.matrix_tv for layer in method.layers)) if method.layers else "–",
        f"{100 * _median(list(method.drift.values())):.1f} %" if method.drift else "–",
        f"{100 * _median([d.disagreement for d in method.dynamics]):.2g} %"
        if method.dynamics
        else "–",
        "none" if math.isinf(method.proved.epsilon) else number(method.proved.epsilon),
        "–" if method.implied is None else number(method.implied.epsilon),
    )


def _pooled_ratio(method: MethodResult) -> str:
    """Mean over layers of the fresh-draw ratio, ± 2 standard errors; layers draw separately."""
    if not method.layers:
        return "–"
    count = len(method.layers)
    mean = sum(layer.fresh_ratio for layer in method.layers) / count
    error = math.sqrt(sum(layer.fresh_standard_error**2 for layer in method.layers)) / count
    return f"{mean:.4f} ± {2 * error:.4f}"


def layer_table(method: MethodResult) -> Table:
    """One row a layer: shapes, noise ratios, law, distances and dynamics."""
    headings = (
        "layer",
        "n × m",
        "r",
        "law of A",
        "rms ‖G‖",
        "ratio in training",
        "A's seen",
        "ratio, fresh A",
        "spread of one draw",
        "law gap / band",
        "entry TV, median",
        "entry TV, largest",
        "its proved bound",
        "row TV",
        "matrix TV",
        "drift of A",
        "SGD: ΔW off −ηs²ΣGAᵀA",
    )
    gaps = {layer.layer: layer.disagreement for layer in method.dynamics}
    names = short_names([layer.layer for layer in method.layers])
    rows = [
        (
            name,
            f"{layer.out_features} × {layer.in_features}",
            str(layer.rank),
            layer.law,
            number(layer.gradient_norm),
            number(layer.training_ratio),
            str(layer.projections),
            f"{layer.fresh_ratio:.4f} ± {2 * layer.fresh_standard_error:.4f}",
            number(layer.one_draw_spread, 2),
            f"{layer.entry.distance:.4f} / {layer.entry.band:.4f}",
            number(layer.tv_median),
            number(layer.tv_largest),
            number(layer.tv_bound),
            number(layer.joint_tv),
            number(layer.matrix_tv),
            f"{100 * method.drift[layer.layer]:.2g} %" if layer.layer in method.drift else "–",
            f"{100 * gaps[layer.layer]:.2g} %" if layer.layer in gaps else "–",
        )
        for name, layer in zip(names, method.layers, strict=True)
    ]
    return Table(headings, tuple(rows))


def short_names(names: Sequence[str]) -> list[str]:
    """Drop the dotted parts that all ``names`` share, so that labels fit.

    >>> short_names(["encoder.layer.0.query", "encoder.layer.1.value"])
    ['0.query', '1.value']
    """
    parts = [name.split(".") for name in names]
    if len(names) < 2 or len({len(part) for part in parts}) > 1:
        return list(names)
    varying = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    return [".".join(part[i] for i in varying) for part in parts] if varying else list(names)


def laws_text(rows: Sequence[LawsRow]) -> str:
    """The laws of the noise for a model's shapes, as a Markdown table with what it means."""
    headings = (
        "layers",
        "count",
        "n × m",
        "r",
        "entry std / ‖q‖",
        "excess kurtosis",
        "entry TV",
        "its proved bound",
        "entry Kolmogorov",
        "row TV",
        "least distortion τ",
    )
    cells = tuple(
        (
            ", ".join(row.layers),
            f"{row.count:,}",
            f"{row.out_features:,} × {row.in_features:,}",
            str(row.rank),
            number(row.relative_std),
            number(row.excess_kurtosis),
            number(row.tv),
            number(row.tv_bound),
            number(row.kolmogorov),
            number(row.joint_tv),
            number(row.jl_distortion),
        )
        for row in rows
    )
    return (
        Table(headings, cells).markdown()
        + "\n\nFor Gaussian A and an entry of average size. TV is the total variation distance "
        "to a\nGaussian of the same variance (0 to 1). τ: all rows of one gradient keep their "
        f"norm within\n1 ± τ but for a probability of {JL_FAILURE:g}; from 1 on it bounds nothing "
        "from below. Laws and\ndistances, no guarantee. Two rows or more are at distance 1 from "
        "independent Gaussian noise\nat every rank."
    )


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
