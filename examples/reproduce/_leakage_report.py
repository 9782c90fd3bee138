"""Tables and figure of docs/reproduction/p1-leakage.md, from its raw results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from _common import STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure", "tables"]

LINES = ("lora", "lora-fa", "shared", "fixed", "flora")
_NONE = "–"
# Part, quantity, view, digits, heading.
_COLUMNS = (
    ("members", "RMIA", "last", 3, "RMIA, last epoch"),
    ("members", "RMIA", "level", 3, "RMIA, equal loss"),
    ("members", "LiRA", "level", 3, "LiRA, equal loss"),
    ("members", "attack-P", "level", 3, "attack-P, equal loss"),
    ("secrets", "bits", "last", 2, "exposure, last epoch"),
    ("secrets", "bits", "level", 2, "exposure, equal loss"),
)
_SETTING = ("method", "rank")
_HEADINGS = tuple(column[-1] for column in _COLUMNS)


def figure(results: dict[str, Any]) -> Figure:
    """AUC and exposure against the rank: after the last epoch, and at equal training loss."""
    members, secrets = results["members"], results["secrets"]
    fig, axes = plt.subplots(3, 2, figsize=(7.2, 8.4), layout="constrained")
    for row, (part, quantity, label) in zip(
        axes,
        (
            (members, "RMIA", "members: AUC of RMIA,\nwhich has references"),
            (members, "attack-P", "members: AUC of attack-P,\nwhich has none"),
            (secrets, "bits", "secrets: exposure\nin bits, of 7"),
        ),
        strict=True,
    ):
        titles = (f"after {part['epochs']} epochs", f"at training loss {part['level']:g}")
        for ax, view, title in zip(row, ("last", "level"), titles, strict=True):
            draw(ax, part["rows"], view, quantity, tuple(results["ranks"]))
            ax.set_title(title)
        row[0].set_ylabel(label)
        row[1].sharey(row[0])
        if part is members:
            row[0].set_ylim(0.5, 1.0)
    for ax in axes[-1]:
        ax.set_xlabel("rank")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
    return fig


def draw(
    ax: Axes, rows: list[dict[str, Any]], view: str, quantity: str, ranks: tuple[int, ...]
) -> None:
    """One panel: means and 95 % intervals; what has no rank is a level line with a band."""
    found = {(row["method"], row["rank"]): row[view][quantity] for row in rows}
    for name, line in (("full", "-"), ("head", ":")):
        value = found.get((name, None))
        if value is not None:
            ax.axhspan(value["low"], value["high"], color="0.5", alpha=0.15, lw=0)
            ax.axhline(value["mean"], color="black", ls=line, lw=1.2, label=name)
    for number, (method, (colour, marker, line)) in enumerate(zip(LINES, STYLES, strict=False)):
        kept = [(rank, value) for rank in ranks if (value := found.get((method, rank)))]
        if not kept:
            continue
        ax.errorbar(
            [rank * 1.12 ** (number - 2) for rank, _ in kept],  # bars stay apart
            [value["mean"] for _, value in kept],
            yerr=[value["high"] - value["mean"] for _, value in kept],
            color=colour, marker=marker, ls=line, lw=1.4, ms=5, capsize=2.5, label=method,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(ranks, [str(rank) for rank in ranks])
    ax.minorticks_off()


def tables(results: dict[str, Any]) -> list[str]:
    """The tables of the page, as markdown."""
    members, secrets = results["members"], results["secrets"]
    return [
        _members(members, "last"), _members(members, "level"), _secrets(secrets),
        _slopes(results), _pairs(results),
    ]  # fmt: skip


def _members(part: dict[str, Any], view: str) -> str:
    settings = ("method", "rank", "rate", "training loss") if view == "last" else _SETTING
    head = (
        *settings, "training accuracy", "test accuracy", "RMIA, AUC", "TPR at 5 % FPR",
        "LiRA, AUC", "attack-P, AUC",
    )  # fmt: skip
    rows = []
    for row in part["rows"]:
        found = row[view]
        if found["RMIA"] is None:
            continue
        rate = (f"{row['rate']:g}", f"{found['loss']['mean']:.3f}") if view == "last" else ()
        shares = (_share(found[key]) for key in ("train_accuracy", "test_accuracy"))
        rows.append(
            (
                *_name(row), *rate, *shares, _mean(found["RMIA"], 3), _share(found["tpr"]),
                _mean(found["LiRA"], 3), _mean(found["attack-P"], 3),
            )
        )  # fmt: skip
    return _table(head, rows)


def _secrets(part: dict[str, Any]) -> str:
    level = f"at loss {part['level']:g}"
    head = (
        *_SETTING, "rate", "training loss", "bits, in", "bits, out", "p, in", "p, out",
        f"bits, in, {level}",
    )  # fmt: skip
    p_values = {(row["method"], row["rank"]): row for row in part["p_values"]}
    rows = []
    for row in part["rows"]:
        last, p = row["last"], p_values[row["method"], row["rank"]]
        rows.append(
            (
                *_name(row), f"{row['rate']:g}", f"{last['loss']['mean']:.2f}",
                _mean(last["bits"], 2),
                _mean(last["bits_out"], 2), _p(p["in"]), _p(p["out"]),
                _mean(row["level"]["bits"], 2),
            )
        )  # fmt: skip
    return _table(head, rows)


def _slopes(results: dict[str, Any]) -> str:
    rows = [
        (method, *_effects(results, "slopes", "slope", method=method))
        for method in LINES
        if method != "shared"  # of one rank
    ]
    return _table(("method", *_HEADINGS), rows)


def _pairs(results: dict[str, Any]) -> str:
    rows = []
    for row in results["members"]["compared"]["RMIA"]["differences"]:
        if row["view"] == "last":
            same = {"methods": row["methods"], "rank": row["rank"]}
            effects = _effects(results, "differences", "difference", **same)
            if any(effect != _NONE for effect in effects):
                rows.append((" − ".join(row["methods"]), str(row["rank"]), *effects))
    return _table(("difference", "rank", *_HEADINGS), rows)


def _effects(
    results: dict[str, Any],
    kind: str,
    name: str,
    **wanted: Any,  # noqa: ANN401
) -> list[str]:
    """One row of ``_COLUMNS``."""
    cells = []
    for part, quantity, view, digits, _ in _COLUMNS:
        (row,) = (
            row
            for row in results[part]["compared"][quantity][kind]
            if row["view"] == view and all(row[key] == value for key, value in wanted.items())
        )
        cells.append(_effect(row[name], digits))
    return cells


def _name(row: dict[str, Any]) -> tuple[str, str]:
    return row["method"], _NONE if row["rank"] is None else str(row["rank"])


def _mean(value: dict[str, float] | None, digits: int) -> str:
    if value is None:
        return _NONE
    return f"{value['mean']:.{digits}f} ± {value['error']:.{digits}f}"


def _share(value: dict[str, float] | None) -> str:
    if value is None:
        return _NONE
    return f"{value['mean']:.1%}".replace("%", " %")


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}".replace("e-0", "e-")


def _effect(value: dict[str, float] | None, digits: int) -> str:
    """Mean, interval and p-value."""
    if value is None:
        return _NONE
    mean, low, high = (
        f"{value[key]:+.{digits}f}".replace("-", "−") for key in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}], p = {_p(value['p'])}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
