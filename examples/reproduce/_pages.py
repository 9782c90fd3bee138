"""Tables of a page, written by the script that made their numbers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["fill", "markdown"]


def markdown(rows: Iterable[Iterable[str]]) -> str:
    """A table; the second row is the rule."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fill(docs: Path, name: str, tables: dict[str, str]) -> None:
    """Print the tables, and put each behind its line ``<!-- table: … -->`` where a page has it."""
    path = docs / "reproduction" / f"{name}.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for title, table in tables.items():
        print(f"\n{title}\n\n{table}")
        place = re.compile(rf"(<!-- table: {re.escape(title)} -->\n\n)(?:\|.*\n)*")
        text = place.sub(lambda found, table=table: f"{found[1]}{table}\n", text)
    if text:
        path.write_text(text, encoding="utf-8")
