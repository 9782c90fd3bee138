"""The tables of a report as rows of text, for the page, the terminal and Markdown."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_privacy._notebook import frame
from lora_privacy.assess.cells import (
    NONE,
    at_least,
    at_most,
    number,
    rate_cell,
    score_cell,
    target_of,
)
from lora_privacy.assess.escaping import markdown_cell
from lora_privacy.noise.table import JL_FAILURE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_privacy.assess.result import Assessment, MethodResult
    from lora_privacy.dp import ImpliedPrivacy
    from lora_privacy.noise import LawsRow

__all__ = [
    "Table",
    "absent",
    "audited_cell",
    "implied_cell",
    "laws_text",
    "main_table",
    "membership_cell",
    "price_cell",
    "proved_cell",
    "short_names",
]


@dataclass(frozen=True, slots=True)
class Table:
    """Text cells with a heading each; the first column names the row."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in GitHub's Markdown; all text is shown as it is, on one line."""
        head, *body = (tuple(map(markdown_cell, row)) for row in (self.headings, *self.rows))
        lines = [head, tuple("---" for _ in head), *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def to_pandas(self) -> Any:  # noqa: ANN401  (pandas is no dependency)
        """A ``pandas.DataFrame`` of the text cells; MissingPackageError without pandas."""
        return frame([dict(zip(self.headings, row, strict=True)) for row in self.rows])


def main_table(result: Assessment) -> Table:
    """One row a method, narrow enough for a terminal; privacy comes first.

    The page has more: ``lora_privacy.assess.report_tables``.
    """
    causal = result.config.task == "causal-lm"
    headings = (
        "method",
        "proved ε ≤",
        "attacks show ε ≥",
        "RMIA AUC",
        "held-out loss, nats" if causal else "held-out accuracy, %",
        f"noise for {target_of(result.config.epsilon)}",
        "implied ε (a reading, no guarantee)",
    )
    rows = tuple(
        (
            method.method,
            proved_cell(method),
            audited_cell(method, result),
            membership_cell(method, result, "RMIA", "auc"),
            score_cell(method.curve.scores[-1]),
            price_cell(method),
            implied_cell(method.implied),
        )
        for method in result.methods
    )
    return Table(headings, rows)


def proved_cell(method: MethodResult) -> str:
    """The proved ε, rounded up, or ``none``."""
    return "none" if math.isinf(method.proved.epsilon) else at_most(method.proved.epsilon)


def price_cell(method: MethodResult) -> str:
    """The noise multiplier that would buy the target ε, rounded up."""
    return "out of reach" if method.price is None else at_most(method.price.noise_multiplier, 5)


def implied_cell(reading: ImpliedPrivacy | None) -> str:
    """The ε that an accountant would print for the injected noise, as if it were Gaussian."""
    return NONE if reading is None else number(reading.epsilon)


def audited_cell(method: MethodResult, result: Assessment) -> str:
    """The lower bound on ε from membership attacks, rounded down."""
    if method.membership is None:
        return absent(result)
    found = method.membership.report.epsilon
    return "none" if isinstance(found, str) else at_least(found.epsilon)


def membership_cell(
    method: MethodResult, result: Assessment, attack: str, rate: Literal["auc", "tpr"]
) -> str:
    """One rate of one membership attack, with its limits."""
    if method.membership is None:
        return absent(result)
    rates = method.membership.report.rates.get(attack)
    return NONE if rates is None else rate_cell(rates[rate == "tpr"])


def absent(result: Assessment) -> str:
    """Why there is nothing of a membership attack."""
    return "not finished" if result.config.references else "not run"


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
