"""Docstrings are written to be read as they are, by ``help``; this makes them reStructuredText."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_LITERAL = re.compile(r"(``.*?``)", re.DOTALL)
_PAGE = re.compile(r"docs/([\w/-]+)\.md")
_ROMAN = re.compile(r"^( *)(\([ivx]+\) )(.*(?:\n\1 +\S.*)*)", re.MULTILINE)


def readable(*event: Any) -> None:  # noqa: ANN401
    """Keep bars of norms as bars, align lists by (i), (ii), and link pages that are named."""
    lines: list[str] = event[-1]
    text = _ROMAN.sub(_aligned, "\n".join(lines))
    parts = _LITERAL.split(text)
    parts[::2] = [_PAGE.sub(r":doc:`/\1`", part.replace("|", r"\|")) for part in parts[::2]]
    lines[:] = "".join(parts).split("\n")


def _aligned(match: re.Match[str]) -> str:
    indent, number, item = match.groups()
    return indent + number + re.sub(r"\n +", "\n" + indent + " " * len(number), item)


def setup(app: Sphinx) -> dict[str, bool]:
    """Run before napoleon has seen the sections, which keeps them as they are."""
    app.connect("autodoc-process-docstring", readable, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
