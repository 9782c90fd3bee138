"""Fail where a row is worse than its target by more than the measured spread.

    python benchmarks/check.py [FOLDER]

FOLDER holds the files of ``make bench``, reports/bench by default. One line a fault; exit code 1
if there is one. A row that is missing, a file that cannot be read, a target that no longer is the
one in ``_targets.py`` and files of different machines or versions are faults too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from _results import FOLDER, Results, Row, load
from _targets import TARGETS, Target

__all__ = ["faults", "known_misses", "measured", "read"]


def read(folder: Path) -> tuple[dict[str, Results], list[str]]:
    """All files of a folder by the names of their benchmarks, and a line for each unreadable."""
    found: dict[str, Results] = {}
    lines: list[str] = []
    for path in sorted(folder.glob("*.json")):
        try:
            results = load(path)
        except ValueError as error:
            lines.append(f"{path.name}: {error}")
            continue
        if results.benchmark != path.stem:
            lines.append(f"{path.name}: it holds the results of {results.benchmark!r}.")
        found[path.stem] = results
    return found, lines


def faults(found: dict[str, Results], targets: Sequence[Target] = TARGETS) -> list[str]:
    """A line for each target that is missed or cannot be looked at; empty if all is well."""
    lines: list[str] = []
    for target in targets:
        row = measured(found, target)
        if row is None:
            lines.append(f"{_name(target)}: not measured. Run `make bench`.")
            continue
        if row.target != target.limit:
            lines.append(f"{_name(target)}: measured for {row.target}, now {target.limit:g}.")
        limit = target.limit if target.known_miss is None else target.known_miss.limit
        if row.misses(limit):
            side = "above" if row.smaller_is_better else "below"
            held = "" if target.known_miss is None else f", held instead of {target.limit:g}"
            lines.append(
                f"{_name(target)}: {row.median:.4g} [{row.low:.4g}, {row.high:.4g}] {row.unit} "
                f"is {side} {limit:g}{held}."
            )
    known = {(t.benchmark, t.part, t.name, t.peer) for t in targets}
    for benchmark, results in found.items():
        lines += [
            f"{benchmark}, {row.part}, {row.name}: has a target that `_targets.py` lacks."
            for row in results.rows
            if row.target is not None and (benchmark, *row.key) not in known
        ]
    for what in ("machine", "versions"):
        kinds = {tuple(sorted(getattr(results, what).items())) for results in found.values()}
        if len(kinds) > 1:
            lines.append(f"The files come from {len(kinds)} different {what}: run all again.")
    return lines


def known_misses(found: dict[str, Results], targets: Sequence[Target] = TARGETS) -> list[str]:
    """A line for each target that is known to be out of reach, with what is held instead."""
    lines: list[str] = []
    for target in targets:
        row = measured(found, target)
        if target.known_miss is not None and row is not None:
            how = "missed" if row.misses(target.limit) else "no longer missed: drop the exemption"
            lines.append(
                f"{_name(target)}: {row.median:.4g}, {target.limit:g} is {how} "
                f"({target.known_miss.reason}); held: {target.known_miss.limit:g}."
            )
    return lines


def measured(found: dict[str, Results], target: Target) -> Row | None:
    """The row of ``target``, or None."""
    rows = found[target.benchmark].rows if target.benchmark in found else []
    key = (target.part, target.name, target.peer)
    return next((row for row in rows if row.key == key), None)


def _name(target: Target) -> str:
    over = "" if target.peer is None else f" against {target.peer}"
    return f"{target.benchmark}, {target.part}, {target.name}{over}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Hold results against their targets.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    found, lines = read(parser.parse_args().folder)
    lines += faults(found)
    for line in known_misses(found):
        print(f"known miss: {line}")
    for line in lines:
        print(f"FAULT: {line}")
    print(f"{len(TARGETS)} targets, {len(lines)} faults")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
