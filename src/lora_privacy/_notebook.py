"""What a result looks like in a notebook: a box of HTML from the sentences that ``str`` joins.

The markup names no colour and no file, so it is readable in light and dark pages and offline.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_privacy.errors import MissingPackageError

__all__ = ["Listed", "Part", "box", "frame", "paragraph", "table"]

_BOX = "border-left:0.2em solid currentColor;padding:0.1em 0 0.1em 0.8em;max-width:54em"
_LINE = "margin:0.25em 0"


@dataclass(frozen=True, slots=True)
class Listed:
    """A sentence that ends in a list, such as ``Listed("Assumes:", ("a", "b"))``.

    >>> str(Listed("Assumes:", ("a", "b")))
    'Assumes: a; b.'
    """

    lead: str
    items: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.lead} {'; '.join(self.items)}."


Part = str | Listed


def paragraph(parts: Iterable[Part]) -> str:
    """The sentences as one paragraph of plain text, for ``__str__``."""
    return " ".join(str(part) for part in parts)


def box(kind: str, parts: Iterable[Part]) -> str:
    """The same sentences as HTML, for ``_repr_html_``; without its tags it reads as they do.

    Args:
        kind: What kind of statement it is, such as ``"Evidence, not a guarantee"``; comes first.
        parts: Sentences; all text is escaped.

    >>> box("Guarantee", ["ε < 1."])[-75:]
    '<strong>Guarantee.</strong> <p style="margin:0.25em 0">ε &lt; 1.</p> </div>'
    """
    lines = [f"<strong>{html.escape(kind)}.</strong>", *map(_line, parts)]
    return f'<div style="{_BOX}">{" ".join(lines)} </div>'


def table(kind: str, rows: Sequence[Mapping[str, Any]], note: str) -> str:
    """Rows of equal keys as an HTML table, under its kind and above a note.

    Numbers are shown in four significant digits, sequences joined by commas.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (rows[0] if rows else ()))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(x))}</td>" for x in row.values()) + "</tr>"
        for row in rows
    )
    return (
        f'<div style="{_BOX};overflow-x:auto"><strong>{html.escape(kind)}.</strong> '
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table> {_line(note)}</div>"
    )


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:  # noqa: ANN401  (pandas is no dependency)
    """``rows`` as a ``pandas.DataFrame``, a key a column.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    try:
        import pandas as pd  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
    except ImportError:
        raise MissingPackageError(
            "to_pandas() needs pandas, which is not installed; run: pip install pandas."
        ) from None
    return pd.DataFrame.from_records([dict(row) for row in rows])


def _line(part: Part) -> str:
    if isinstance(part, str):
        return f'<p style="{_LINE}">{html.escape(part)}</p>'
    ends = [";"] * (len(part.items) - 1) + ["."]
    items = " ".join(
        f"<li>{html.escape(item)}{end}</li>" for item, end in zip(part.items, ends, strict=True)
    )
    return f'<p style="{_LINE}">{html.escape(part.lead)}</p> <ul style="{_LINE}">{items}</ul>'


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
