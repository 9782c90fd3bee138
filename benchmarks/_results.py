"""Rows of a benchmark and the file that keeps them: ``reports/bench/<benchmark>.json``."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from _targets import target_of

if TYPE_CHECKING:
    from _measure import Median

__all__ = ["FOLDER", "Curve", "Results", "Row", "Verdict", "load"]

FOLDER = Path(__file__).parents[1] / "reports" / "bench"
PACKAGES = (
    "lora-privacy", "torch", "numpy", "scipy", "transformers", "peft", "opacus", "dp-accounting",
)  # fmt: skip
_SLACK = 0.05  # a target is met when the far end of the interval is within 5 % of it

Verdict = Literal["yes", "NO", "open", ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured number.

    Attributes:
        part: What the table is about that the row stands in.
        name: What was measured.
        peer: What it was divided by, or divides; None for a number by itself.
        unit: Of the numbers; ``"time"`` and ``"faster"`` are ratios of CPU time, dimensionless.
        median: Over rounds.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        pairs: Rounds.
        target: What was to be reached; None where nothing was promised.
        smaller_is_better: Whether the target is an upper limit.
    """

    part: str
    name: str
    peer: str | None
    unit: str
    median: float
    low: float
    high: float
    pairs: int
    target: float | None
    smaller_is_better: bool

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.median, self.low, self.high))) or self.pairs < 1:
            raise ValueError(f"{self.part}, {self.name}: not finite, or measured no time.")
        if not self.low <= self.median <= self.high:
            raise ValueError(f"{self.part}, {self.name}: the median lies outside its interval.")

    @property
    def key(self) -> tuple[str, str, str | None]:
        """Names the row within its file."""
        return self.part, self.name, self.peer

    def misses(self, limit: float) -> bool:
        """Whether all of the interval is worse than ``limit``: by more than the spread."""
        return self.low > limit if self.smaller_is_better else self.high < limit

    def verdict(self) -> Verdict:
        """``"NO"``: a miss. ``"yes"``: the worse end is within 5 % of the target. Else open."""
        if self.target is None:
            return ""
        if self.misses(self.target):
            return "NO"
        if self.smaller_is_better:
            return "yes" if self.high <= self.target * (1 + _SLACK) else "open"
        return "yes" if self.low >= self.target * (1 - _SLACK) else "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """How a work grows.

    Attributes:
        part: The panel that it is drawn in.
        name: What was measured.
        size: What varies.
        sizes: Its values.
        unit: Of the medians.
        medians: One a size.
        expected: The exponent in theory, in words.
        comment: Why.
    """

    part: str
    name: str
    size: str
    sizes: list[int]
    unit: str
    medians: list[float]
    expected: str
    comment: str


@dataclass(slots=True)
class Results:
    """What one benchmark has found so far; ``save`` writes it all at once.

    Args:
        benchmark: Name of its file.
    """

    benchmark: str
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    def add(
        self,
        part: str,
        name: str,
        found: Median,
        *,
        peer: str | None = None,
        unit: str = "time",
        smaller_is_better: bool = True,
    ) -> Row:
        """Keep a row, with its target if ``_targets`` has one, and print it."""
        target = target_of(self.benchmark, part, name, peer)
        row = Row(
            part=part, name=name, peer=peer, unit=unit, median=found.value, low=found.low,
            high=found.high, pairs=found.count, target=None if target is None else target.limit,
            smaller_is_better=smaller_is_better,
        )  # fmt: skip
        if row.key in {other.key for other in self.rows}:
            raise ValueError(f"{self.benchmark} has the row {row.key} twice.")
        self.rows.append(row)
        over = "" if peer is None else f" / {peer}"
        goal = "" if row.target is None else f", target {row.target:g}: {row.verdict()}"
        print(
            f"{part}: {name}{over}: {row.median:.4g} [{row.low:.4g}, {row.high:.4g}] {unit}, "
            f"{row.pairs} rounds{goal}",
            flush=True,
        )
        return row

    def save(self, folder: Path | None = None) -> None:
        """Write the file, whole or not at all."""
        self.machine, self.versions = machine(), versions()
        self.date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        folder = FOLDER if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.json"
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")
        draft.replace(path)


def load(path: Path) -> Results:
    """Read a file; ValueError where it is not one of ``save``."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in found.pop("rows")]
        curves = [Curve(**curve) for curve in found.pop("curves")]
        return Results(rows=rows, curves=curves, **found)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is no result of a benchmark: {error}") from error


def machine() -> dict[str, str]:
    """What it runs on, without names of hosts or users."""
    model = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "architecture": platform.machine(),
        "system": platform.system(),
        "threads": os.environ.get("OMP_NUM_THREADS", "not set"),
    }


def versions() -> dict[str, str]:
    """Of Python and of all that is compared."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found
