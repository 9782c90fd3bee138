"""What the scripts of the reproductions share: options, finished runs, raw results and figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

__all__ = ["Runs", "parser", "save_figure", "save_json"]

DOCS = Path(__file__).parents[2] / "docs"

# Colour, marker and line differ together, so that figures survive a grey print.
STYLES = (
    ("#1b4f8a", "o", "-"),
    ("#c8553d", "s", "--"),
    ("#3c7a3c", "D", "-."),
    ("#4a4a4a", "^", ":"),
    ("#8a5fa8", "v", (0, (5, 1, 1, 1, 1, 1))),
)
_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "figure.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "lora-privacy",  # the same numbers give the same file
    "pdf.fonttype": 42,
}
plt.rcParams.update(_SETTINGS)


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every script has; each adds its own."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--full", action="store_true", help="more seeds and settings, for hours")
    found.add_argument(
        "--data",
        type=Path,
        default=Path("../shared/data"),
        help="folder of public data sets: docs/reproduction.md names them",
    )
    found.add_argument("--docs", type=Path, default=DOCS, help="where results and figures go")
    found.add_argument("--work", type=Path, default=Path("reports/reproduce"), help="for caches")
    return found


def save_json(docs: Path, name: str, results: dict[str, Any]) -> None:
    """Write ``docs/reproduction/<name>.json``, readable and the same for the same numbers."""
    path = docs / "reproduction" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"results: {path}")


def save_figure(docs: Path, name: str, figure: Figure) -> None:
    """Write ``docs/figures/<name>`` as svg and png."""
    folder = docs / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    figure.savefig(folder / f"{name}.png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    print(f"figure: {folder / name}.svg")


class Runs:
    """Finished runs, a JSON line each: what is there is not run again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def get(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The run of these settings, from the file or run now and kept."""
        for row in self.rows:
            if row["key"] == key:
                return row
        row = {"key": key, **run()}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        return row
