"""Summaries, tables and figures of reproduction P3, from finished runs alone."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from _common import STYLES, save_figure
from _p3_training import SHRINKERS, paired

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["draw", "summary_of", "tables_of"]

SHARES = (0.9, 0.95)
LAST = 3  # scorings whose mean is the final value of a run

Row = dict[str, Any]

METRIC = {"sst2": "accuracy", "cola": "mcc"}
MODELS = {"dp-lora": "adapters, r = 8", "dp-sgd": "whole matrices"}


def summary_of(runs: list[Row]) -> dict[str, Any]:
    """Everything that the tables print: cosines, and what the arms of a comparison reached."""
    return {"cosines": cosines_of(runs), "arms": arms_of(runs)}


def kind_of(path: str) -> str:
    """Which matrix a parameter is: ``"value, A"``, or ``"head"``."""
    if path.startswith("head"):
        return "head"
    target = "query" if ".query." in path else "value"
    return f"{target}, {'A' if 'project' in path else 'B' if 'expand' in path else 'W'}"


def cosines_of(runs: list[Row]) -> list[Row]:
    """For each ε and kind of matrix: cosines to the clean gradient, and gains by denoising.

    A gain is a mean over the layers of a step, of the same noised gradient with and without, and
    its t interval is over steps.
    """
    found = []
    for run in runs:
        if run["key"]["stage"] != "spectra":
            continue
        by_kind: dict[str, list[Row]] = defaultdict(list)
        for row in run["rows"]:
            by_kind[kind_of(row["path"])].append(row)
        for kind, rows in sorted(by_kind.items()):
            steps: dict[int, list[Row]] = defaultdict(list)
            for row in rows:
                steps[row["step"]].append(row)
            gains = {
                name: paired(
                    [
                        float(np.mean([r["found"][name] - r["found"]["none"] for r in at]))
                        for at in steps.values()
                    ]
                )
                for name in SHRINKERS
                if name != "none"
            }
            found.append(
                {
                    "method": run["key"]["method"],
                    "epsilon": run["key"]["epsilon"],
                    "kind": kind,
                    "shape": rows[0]["shape"],
                    "gradients": len(rows),
                    "strongest": float(np.mean([r["strongest"] for r in rows])),
                    "above": float(np.mean([r["above"] for r in rows])),
                    "found": _means([r["found"] for r in rows]),
                    "predicted": _means([r["predicted"] for r in rows]),
                    "gains": gains,
                }
            )
    return found


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def arms_of(runs: list[Row]) -> list[Row]:
    """For each task, ε and method: what every arm reached, and its paired difference to ``none``.

    The reference is the mean over seeds of the final held-out value of ``none``: training as
    private, without denoising. Differences are of runs of the same seed.
    """
    cells: dict[tuple[str, str, float], dict[str, dict[int, Row]]] = {}
    for run in runs:
        key = run["key"]
        if key["stage"] == "final":
            cell = cells.setdefault((key["task"], key["method"], key["epsilon"]), {})
            cell.setdefault(key["shrinker"], {})[key["seed"]] = run
    found = []
    for (task, method, epsilon), cell in sorted(
        cells.items(), key=lambda x: (*x[0][:2], -x[0][2])
    ):
        metric = METRIC[task]
        reference = float(np.mean([_final(run, metric) for run in cell["none"].values()]))
        base = {seed: _measures(run, metric, reference) for seed, run in cell["none"].items()}
        for shrinker, by_seed in cell.items():
            own = {seed: _measures(run, metric, reference) for seed, run in by_seed.items()}
            both = sorted(own.keys() & base.keys())
            found.append(
                {
                    "task": task,
                    "method": method,
                    "epsilon": epsilon,
                    "shrinker": shrinker,
                    "rate": next(iter(by_seed.values()))["key"]["rate"],
                    "noise_multiplier": next(iter(by_seed.values()))["noise_multiplier"],
                    "reference": reference,
                    "values": {
                        name: [own[seed][name] for seed in sorted(own)] for name in own[both[0]]
                    },
                    "differences": {
                        name: paired([own[s][name] - base[s][name] for s in both])
                        for name in own[both[0]]
                        if shrinker != "none"
                    },
                }
            )
    return found


def _final(run: Row, metric: str) -> float:
    return float(np.mean([point[metric] for point in run["curve"][-LAST:]]))


def _measures(run: Row, metric: str, reference: float) -> dict[str, float]:
    """Steps to shares of the reference, held-out mean and final value, and the dev file's."""
    curve = run["curve"]
    return {
        **{
            f"steps_{share:g}": float(_steps_to(curve, metric, share * reference))
            for share in SHARES
        },
        "mean": float(np.mean([point[metric] for point in curve[1:]])),
        "final": _final(run, metric),
        "dev": run["dev"][metric],
    }


def _steps_to(curve: list[Row], metric: str, goal: float) -> int:
    """Step of the first scoring that reaches ``goal``; one scoring past the end if none does."""
    for point in curve:
        if point[metric] >= goal:
            return point["step"]
    return 2 * curve[-1]["step"] - curve[-2]["step"]


def tables_of(results: dict[str, Any]) -> str:
    """The tables of the page, in Markdown."""
    summary = results["summary"]
    return "\n\n".join([_cosine_table(summary["cosines"]), *_arm_tables(summary["arms"])]) + "\n"


def _cosine_table(rows: list[Row]) -> str:
    names = [name for name in SHRINKERS if name != "none"]
    lines = [
        "| ε | trained | gradient of | strongest | above the edge | noised | predicted | "
        + " | ".join(f"`{name}`" for name in names)
        + " | predicted `frobenius` | gain of `frobenius` |",
        "|" + "---|" * (len(names) + 9),
    ]
    for row in rows:
        n, m = row["shape"]
        lines.append(
            f"| {row['epsilon']:g} | {MODELS[row['method']]} | {row['kind']}, {n} × {m} "
            f"| {row['strongest']:.2f} "
            f"| {row['above']:.2f} | {row['found']['none']:.3f} "
            f"| {row['predicted']['none']:.3f} | "
            + " | ".join(f"{row['found'][name]:.3f}" for name in names)
            + f" | {row['predicted']['frobenius']:.3f} "
            f"| {interval(row['gains']['frobenius'], 3)} |"
        )
    return "\n".join(lines)


def _arm_tables(rows: list[Row]) -> list[str]:
    tables = []
    for task in dict.fromkeys(row["task"] for row in rows):
        lines = [
            "| ε | trained | denoiser | steps to 90 % | difference | steps to 95 % | difference "
            "| mean over training | difference | final | difference | dev | difference |",
            "|" + "---|" * 13,
        ]
        for row in rows:
            if row["task"] != task:
                continue
            cells = [f"{row['epsilon']:g}", MODELS[row["method"]], f"`{row['shrinker']}`"]
            for name in ("steps_0.9", "steps_0.95"):
                cells.append(", ".join(f"{x:g}" for x in row["values"][name]))
                cells.append(interval(row["differences"].get(name), 1))
            for name in ("mean", "final", "dev"):
                cells.append(f"{100 * np.mean(row['values'][name]):.1f}")
                cells.append(interval(row["differences"].get(name), 1, scale=100))
            lines.append("| " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return tables


def interval(value: dict[str, Any] | None, digits: int, scale: float = 1.0) -> str:
    """``+1.2 [−.3, 2.7]``, and a dash where there is nothing to compare."""
    if value is None:
        return "–"
    mean = f"{scale * value['mean']:+.{digits}f}"
    if value["low"] is None:
        return mean
    return f"{mean} [{scale * value['low']:.{digits}f}, {scale * value['high']:.{digits}f}]"


def draw(docs: Path, results: dict[str, Any]) -> None:
    """Both figures, as far as there are runs for them."""
    spectra = [run for run in results["runs"] if run["key"]["stage"] == "spectra"]
    if spectra:
        _spectra(docs, spectra)
    final = [run for run in results["runs"] if run["key"]["stage"] == "final"]
    for task in dict.fromkeys(run["key"]["task"] for run in final):
        _curves(docs, task, [run for run in final if run["key"]["task"] == task], results)


def _spectra(docs: Path, runs: list[Row]) -> None:
    """A row for each ε; A, B and the whole matrix of the last layer's values."""
    panels: dict[tuple[float, str], Row] = {}
    for run in runs:
        for path, profile in run["profiles"].items():
            panels[run["key"]["epsilon"], kind_of(path)] = profile
    epsilons = list(dict.fromkeys(epsilon for epsilon, _ in panels))
    kinds = [f"value, {x}" for x in "ABW" if any(k == f"value, {x}" for _, k in panels)]
    figure, axes = plt.subplots(
        len(epsilons), len(kinds), figsize=(3.1 * len(kinds), 2.5 * len(epsilons) + 0.5),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    labels = {
        "before": "clipped mean, before the noise",
        "noisy": "after the noise",
        "restored": "restored by frobenius",
    }
    for i, epsilon in enumerate(epsilons):
        for j, kind in enumerate(kinds):
            ax, profile = axes[i, j], panels[epsilon, kind]
            n, m = profile["shape"]
            count = len(profile["noisy"])
            index = np.arange(1, count + 1)
            for (name, label), (colour, marker, line) in zip(labels.items(), STYLES, strict=False):
                ax.plot(
                    index, profile[name][:count], color=colour, ls=line, label=label, lw=1.3,
                    marker=marker, ms=4, markevery=max(1, count // 10),
                )  # fmt: skip
            ax.plot(
                index, profile["predicted"][:count], color="black", ls="none", marker="x", ms=5,
                label="after the noise, predicted", markevery=max(1, count // 10),
            )  # fmt: skip
            ax.axhline(
                np.sqrt(n) + np.sqrt(m),
                color="#777777",
                lw=0.9,
                ls=(0, (1, 2)),
                label="edge of the noise alone",
            )
            ax.set_ylim(bottom=0)
            ax.set_xticks([1, *range(2, count + 1, 2)] if count <= 8 else [1, 10, 20, 30, 40])
            ax.set_title(f"{kind}, {n} × {m}, ε = {epsilon:g}", fontsize=9)
            if i == len(epsilons) - 1:
                ax.set_xlabel("index of the singular value")
            if j == 0:
                ax.set_ylabel("singular value / s")
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    save_figure(docs, "p3_spectra", figure)


def _curves(docs: Path, task: str, runs: list[Row], results: dict[str, Any]) -> None:
    """Held-out value against steps: thick the mean over seeds, thin every seed."""
    metric = METRIC[task]
    arms = [arm for arm in results["summary"]["arms"] if arm["task"] == task]
    panels = dict.fromkeys((arm["method"], arm["epsilon"], arm["reference"]) for arm in arms)
    panels = sorted(panels, key=lambda panel: (panel[0], -panel[1]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.3 * len(panels), 3.3), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, (method, epsilon, reference) in zip(axes[0], panels, strict=True):
        for name, (colour, marker, line) in zip(SHRINKERS, STYLES, strict=True):
            wanted = (method, epsilon, name)
            keys = ("method", "epsilon", "shrinker")
            own = [run for run in runs if tuple(run["key"][k] for k in keys) == wanted]
            if not own:
                continue
            steps = [point["step"] for point in own[0]["curve"]]
            curves = np.array([[100 * p[metric] for p in run["curve"]] for run in own])
            ax.plot(steps, curves.T, color=colour, ls=line, lw=0.5, alpha=0.3)
            ax.plot(
                steps, curves.mean(0), color=colour, ls=line, marker=marker, ms=4, lw=1.6,
                label=name, markevery=2,
            )  # fmt: skip
        for share in SHARES:
            ax.axhline(100 * share * reference, color="#777777", lw=0.9, ls=(0, (1, 2)))
        ax.set_title(f"{MODELS[method]}, ε = {epsilon:g}", fontsize=9)
        ax.set_xlabel("private steps")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("held-out accuracy, %" if metric == "accuracy" else "held-out MCC, %")
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    save_figure(docs, f"p3_steps_{task}", figure)
