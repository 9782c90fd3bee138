"""The papers of ``lora_privacy.references``, as a page and a ``references.bib`` beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_privacy.references import REFERENCES, Reference, bibtex

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_PAGE = "references"
_FILE = "references.bib"


def fill(app: Sphinx, docname: str, source: list[str]) -> None:  # noqa: ARG001
    """Append the file's address and one line a paper to the page of references."""
    if docname == _PAGE:
        lines = map(_line, REFERENCES.values())
        link = f'All of them for BibTeX: <a href="{_FILE}">{_FILE}</a>.'
        source[0] += "\n".join(["", link, "", *lines, ""])


def _line(item: Reference) -> str:
    authors = f"{item.authors.replace(' and ', '; ')}: " if item.authors else ""
    year = "" if str(item.year) in item.venue else f", {item.year}"
    return f"- {authors}*{item.title}*. {item.venue}{year}. `{item.key}`"


def write(app: Sphinx, error: Exception | None) -> None:
    """Write the BibTeX file that the page links to."""
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / _FILE).write_text(bibtex() + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Fill the page when it is read, write the file when all is built."""
    app.connect("source-read", fill)
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
