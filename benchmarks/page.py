"""Fill the tables of docs/performance.md from the results of ``make bench``.

    python benchmarks/page.py [FOLDER]

The prose is written by hand; what stands between ``<!-- begin NAME -->`` and ``<!-- end -->`` is
written here. The results are copied to docs/performance/, so that a test can render the page
again. NAME is a benchmark, ``machine``, ``targets`` or ``growth``. What is not measured yet is
named as such.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from _results import FOLDER, Curve, Results, Row
from _targets import TARGETS, Target
from check import measured, read

__all__ = ["KEPT", "PAGE", "render"]

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
KEPT = PAGE.with_suffix("")  # docs/performance/
_PART = re.compile(r"(<!-- begin (?P<name>[\w-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
_LATER = "not measured yet"
_GROWTH = ("tokens", "rank", "layers", "steps", "events", "canaries")
_UNITS = {"time": "× its CPU time", "faster": "× faster", "memory": "× its memory"}


def render(template: str, found: dict[str, Results]) -> str:
    """The page with every generated part written anew.

    Raises:
        ValueError: The results of a benchmark have no part.
    """
    names = {match["name"] for match in _PART.finditer(template)}
    homeless = set(found) - names - {f"growth-{one}" for one in _GROWTH}
    if homeless:
        raise ValueError(f"The page has no part for {sorted(homeless)}. Add its two markers.")
    whole = {
        "machine": lambda: machine(found),
        "targets": lambda: targets(found),
        "growth": lambda: growth(found),
    }

    def part(match: re.Match[str]) -> str:
        name = match["name"]
        if name in whole:
            text = whole[name]()
        else:
            text = tables(found[name]) if name in found else f"\n`{name}`: {_LATER}.\n"
        return f"{match[1]}{text}\n"

    return _PART.sub(part, template)


def number(value: float, unit: str) -> str:
    """Three decimals of a ratio of times, else three digits."""
    if unit in ("time", "memory") and 0.1 <= abs(value) < 100:
        return f"{value:.3f}"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:#.3g}"


def interval(row: Row) -> str:
    """The median and its interval, if it has one."""
    middle, low, high = (number(x, row.unit) for x in (row.median, row.low, row.high))
    return middle if row.low == row.high else f"{middle} [{low}, {high}]"


def goal(row: Row) -> str:
    if row.target is None:
        return "–"
    return f"{'≤' if row.smaller_is_better else '≥'} {row.target:g}"


def unit(row: Row) -> str:
    return _UNITS.get(row.unit, row.unit)


def what(row: Row) -> str:
    if row.peer is None:
        return row.name
    return f"{row.name}, {'against' if row.unit == 'faster' else 'over'} {row.peer}"


def tables(results: Results) -> str:
    """One table a part: ratios first."""
    lines: list[str] = []
    for part in dict.fromkeys(row.part for row in results.rows):
        rows = [row for row in results.rows if row.part == part]
        rows.sort(key=lambda row: (row.target is None, row.peer is None))
        lines += [f"\n### {heading(part)}\n"]
        lines += ["| what | median [95 %] | unit | rounds | target | met |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {what(row)} | {interval(row)} | {unit(row)} | {row.pairs} | {goal(row)} | "
            f"{row.verdict()} |"
            for row in rows
        ]
    return "\n".join(lines) + f"\n\n{raw([results.benchmark])}\n"


def heading(part: str) -> str:
    """With a capital, but for a symbol and the name of a method."""
    keeps = part.startswith("dp-") or not part[0].isascii()
    return part if keeps else part[0].upper() + part[1:]


def raw(names: list[str]) -> str:
    """Where the results lie."""
    links = ", ".join(f"[{name}.json](performance/{name}.json)" for name in names)
    return f"Raw results: {links}."


def targets(found: dict[str, Results]) -> str:
    """Every target, and how many are met."""
    rows = [measured(found, target) for target in TARGETS]
    verdicts = [_LATER if row is None else row.verdict() for row in rows]
    lines = [
        f"\n{len(rows)} targets: {verdicts.count('yes')} met, {verdicts.count('NO')} missed, "
        f"{verdicts.count('open')} open, {verdicts.count(_LATER)} {_LATER}.\n",
        "| where | what | median [95 %] | unit | target | met |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_held(target, row) for target, row in zip(TARGETS, rows, strict=True)]
    return "\n".join(lines) + "\n"


def _held(target: Target, row: Row | None) -> str:
    if row is None:
        over = "" if target.peer is None else f", over {target.peer}"
        return f"| {target.part} | {target.name}{over} | {_LATER} | – | {target.limit:g} | |"
    return (
        f"| {row.part} | {what(row)} | {interval(row)} | {unit(row)} | {goal(row)} | "
        f"{row.verdict()} |"
    )


def machine(found: dict[str, Results]) -> str:
    """What all was measured on."""
    one = next(iter(found.values()))
    days = sorted({results.date for results in found.values()})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
    on = one.machine
    return (
        f"\n{when}; {on['processor']}, {on['cores']} cores, {on['architecture']}, {on['system']}, "
        f"OMP_NUM_THREADS={on['threads']}; {versions}.\n"
    )


def growth(found: dict[str, Results]) -> str:
    """The exponent of every curve."""
    lines = [
        "\n| grows in | what | expected | over all sizes [95 %] | between the two largest | why |",
        "|---|---|---|---|---|---|",
    ]
    names = [f"growth-{one}" for one in _GROWTH if f"growth-{one}" in found]
    left = [f"`growth-{one}`" for one in _GROWTH if f"growth-{one}" not in found]
    for results in (found[name] for name in names):
        rows = {row.name: row for row in results.rows}
        lines += [_exponents(curve, rows) for curve in results.curves]
    lines += ["", raw(names)]
    lines += [f"\n{', '.join(left)}: {_LATER}."] if left else []
    return "\n".join(lines) + "\n"


def _exponents(curve: Curve, rows: dict[str, Row]) -> str:
    ends = f"{curve.sizes[0]:,} to {curve.sizes[-1]:,}"
    fits = [rows[curve.name], rows[f"{curve.name}, between the two largest"]]
    shown = [
        f"{row.median:.2f}"
        if row.low == row.high
        else f"{row.median:.2f} [{row.low:.2f}, {row.high:.2f}]"
        for row in fits
    ]
    return (
        f"| {curve.part}, {ends} | {curve.name} | {curve.expected} | {' | '.join(shown)} | "
        f"{curve.comment} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/performance.md.")
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder: Path = parser.parse_args().folder
    found, lines = read(folder)
    if lines:
        raise SystemExit("\n".join(lines))
    page = render(PAGE.read_text(encoding="utf-8"), found)
    KEPT.mkdir(exist_ok=True)
    if folder.resolve() != KEPT:
        for old in KEPT.glob("*.json"):
            old.unlink()
        for path in sorted(folder.glob("*.json")):
            (KEPT / path.name).write_bytes(path.read_bytes())
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
