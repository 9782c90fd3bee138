"""Pieces of the page: tables, figures and lists as accessible HTML, all text escaped."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

from lora_privacy.assess.escaping import html_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_privacy.assess.plots import Drawing
    from lora_privacy.assess.tables import Table

__all__ = ["figure", "items", "paragraph", "section", "table"]


def section(name: str, title: str, *parts: str, wide: bool = False) -> str:
    """A landmark of its own, that the list of contents can link to; ``parts`` are HTML."""
    style = " class=wide" if wide else ""
    body = "\n".join(part for part in parts if part)
    return (
        f"<section id={name} aria-labelledby={name}-title{style}>"
        f"<h2 id={name}-title>{html_text(title)}</h2>{body}</section>"
    )


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{html_text(text)}</p>"


def items(texts: Iterable[str]) -> str:
    """Plain texts as a list; nothing for none."""
    lines = "".join(f"<li>{html_text(text)}</li>" for text in texts)
    return f"<ul>{lines}</ul>" if lines else ""


def table(table: Table, caption: str, *, text: bool = False) -> str:
    """A table whose first column names the rows; a region of its own that keys can scroll.

    Args:
        table: What it shows.
        caption: Its title.
        text: Whether cells hold words, which are broken, instead of numbers.
    """
    title = html_text(caption)
    head = "".join(f"<th scope=col>{html_text(cell)}</th>" for cell in table.headings)
    body = "".join(
        f"<tr><th scope=row>{html_text(row[0])}</th>"
        + "".join(f"<td>{html_text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    style = " class=text" if text else ""
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{title}"><table{style}>'
        f"<caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "</div>"
    )


def figure(drawing: Drawing) -> str:
    """A figure inside the page itself, with its caption and the words that stand in for it."""
    data = base64.b64encode(drawing.svg).decode()
    alt = html_text(drawing.alt)
    return (
        f'<figure><div class=scroll tabindex=0 role=region aria-label="Figure"><img alt="{alt}" '
        f'src="data:image/svg+xml;base64,{data}"></div>'
        f"<figcaption>{html_text(drawing.caption)}</figcaption></figure>"
    )
