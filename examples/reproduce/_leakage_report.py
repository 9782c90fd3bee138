"""Tables and figure of docs/reproduction/p1-leakage.md, from its raw results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from _common import STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure", "tables"]

LINES = ("lora", "lora-fa", "fixed", "flora")
_NONE = "–"


def figure(results: dict[str, Any]) -> Figure:
    """AUC and exposure against the rank: after the last epoch, and at equal training loss."""
    members, secrets = results["members"], results["secrets"]
    fig, axes = plt.subplots(2, 2, figsize=(7.2, 6.2), sharex=True, layout="constrained")
    panels = (
        (axes[0, 0], members, "last", "RMIA", f"after {members['epochs']} epochs"),
        (axes[0, 1], members, "level", "RMIA", f"at training loss {members['level']:g}"),
        (axes[1, 0], secrets, "last", "bits", f"after {secrets['epochs']} epochs"),
        (axes[1, 1], secrets, "level", "bits", f"at training loss {secrets['level']:g}"),
    )
    for ax, part, view, quantity, title in panels:
        draw(ax, part["rows"], view, quantity, tuple(results["ranks"]))
        ax.set_title(title)
    axes[0, 0].set_ylabel("RMIA, AUC")
    axes[1, 0].set_ylabel("exposure of secrets, bits of 7")
    for row in axes:
        row[1].sharey(row[0])
    for ax in axes[1]:
        ax.set_xlabel("rank")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
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
        kept = [(rank, found[method, rank]) for rank in ranks if found[method, rank] is not None]
        if not kept:
            continue
        ax.errorbar(
            [rank * 1.12 ** (number - 1.5) for rank, _ in kept],  # bars stay apart
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
    return [_members(members), _secrets(secrets), _slopes(members, secrets), _pairs(results)]


def _members(part: dict[str, Any]) -> str:
    level = f"at loss {part['level']:g}"
    head = (
        "method", "rank", "training loss", "training accuracy", "test accuracy", "RMIA, AUC",
        "TPR at 5 % FPR", "LiRA, AUC", f"RMIA, AUC, {level}", f"LiRA, AUC, {level}",
        f"test accuracy, {level}",
    )  # fmt: skip
    rows = []
    for row in part["rows"]:
        last, same = row["last"], row["level"]
        rows.append(
            (
                *_name(row), f"{last['loss']['mean']:.3f}", _share(last["train_accuracy"]),
                _share(last["test_accuracy"]), _mean(last["RMIA"], 3), _share(last["tpr"]),
                _mean(last["LiRA"], 3), _mean(same["RMIA"], 3), _mean(same["LiRA"], 3),
                _share(same["test_accuracy"]),
            )
        )  # fmt: skip
    return _table(head, rows)


def _secrets(part: dict[str, Any]) -> str:
    level = f"at loss {part['level']:g}"
    head = (
        "method", "rank", "training loss", "bits, in", "bits, out", "p, in", "p, out",
        f"bits, in, {level}",
    )  # fmt: skip
    p_values = {(row["method"], row["rank"]): row for row in part["p_values"]}
    rows = []
    for row in part["rows"]:
        last, p = row["last"], p_values[row["method"], row["rank"]]
        rows.append(
            (
                *_name(row), f"{last['loss']['mean']:.2f}", _mean(last["bits"], 2),
                _mean(last["bits_out"], 2), _p(p["in"]), _p(p["out"]),
                _mean(row["level"]["bits"], 2),
            )
        )  # fmt: skip
    return _table(head, rows)


def _slopes(members: dict[str, Any], secrets: dict[str, Any]) -> str:
    head = ("method", "compared", "RMIA, AUC", "LiRA, AUC", "exposure, bits")
    kinds = (members["rmia"], members["lira"], secrets["exposure"])
    rows = []
    for number, row in enumerate(members["rmia"]["slopes"]):
        cells = [
            _effect(kind["slopes"][number]["slope"], digits)
            for kind, digits in zip(kinds, (3, 3, 2), strict=True)
        ]
        rows.append((row["method"], _view(row["view"]), *cells))
    return _table(head, rows)


def _pairs(results: dict[str, Any]) -> str:
    head = ("difference", "rank", "compared", "RMIA, AUC", "LiRA, AUC", "exposure, bits")
    members, secrets = results["members"], results["secrets"]
    kinds = (members["rmia"], members["lira"], secrets["exposure"])
    rows = []
    for number, row in enumerate(members["rmia"]["differences"]):
        cells = [
            _effect(kind["differences"][number]["difference"], digits)
            for kind, digits in zip(kinds, (3, 3, 2), strict=True)
        ]
        first, second = row["methods"]
        rows.append((f"{first} − {second}", str(row["rank"]), _view(row["view"]), *cells))
    return _table(head, rows)


def _view(view: str) -> str:
    return {"last": "last epoch", "level": "equal loss"}[view]


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
