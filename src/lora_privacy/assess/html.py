"""One self-contained page: no script, nothing fetched, all text of the data escaped.

The first screen answers "is this private, and how do we know?"; tables and figures follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy import _notebook
from lora_privacy.assess import markup
from lora_privacy.assess.escaping import html_text, visible
from lora_privacy.assess.page_sections import SECTIONS, sections
from lora_privacy.assess.page_style import STYLE
from lora_privacy.assess.result import NOTICE
from lora_privacy.assess.tables import main_table
from lora_privacy.assess.verdicts import (
    Statement,
    cautions,
    contradictions,
    headline,
    readings,
    statements,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_privacy.assess.plots import Drawing
    from lora_privacy.assess.result import Assessment, MethodResult

__all__ = ["notebook", "render"]

# Even a tag that slipped through could load and run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_QUESTION = "Is this private, and how do we know?"
_KINDS = (
    ("Guarantee", "an upper bound on ε with a proof; its assumptions are listed below"),
    ("Law", "how the injected noise is distributed; it bounds no attacker"),
    ("Reading", "an ε that would follow from assumptions which fail; not a guarantee"),
    ("Evidence", "what the attacks that were run got, with limits; others may get more"),
    ("Price", "the noise with which a bound would be proved"),
)


def render(result: Assessment, figures: Mapping[str, Drawing]) -> str:
    """The page as text.

    Args:
        result: The assessment.
        figures: Drawings by name, as ``plots.draw_all`` returns them.
    """
    title = f"{result.model_name} on {result.train.name}"
    links = "".join(f"<li><a href=#{name}>{html_text(t)}</a></li>" for name, t in SECTIONS.items())
    return "\n".join(
        [
            "<!doctype html><html lang=en><head><meta charset=utf-8>",
            f'<meta http-equiv=Content-Security-Policy content="{_POLICY}">',
            "<meta name=viewport content='width=device-width, initial-scale=1'>",
            f"<title>LoRA privacy assessment: {html_text(title)}</title>"
            f"<style>{STYLE}</style></head><body>",
            "<a class=skip href=#answer>To the answer</a>",
            "<header><p class=banner><strong>This report is itself not private.</strong> "
            f"{NOTICE}</p>",
            f"<h1>LoRA privacy assessment: <bdi>{html_text(title)}</bdi></h1></header>",
            f"<main>{_answer(result)}",
            f"<nav aria-label=Contents><ul>{links}</ul></nav>",
            f"{sections(result, figures)}</main></body></html>",
        ]
    )


def notebook(result: Assessment) -> str:
    """The answer and the main table, for a cell of a notebook."""
    lines = [headline(result)]
    lines += [f"Contradiction. {text}" for text in contradictions(result)]
    for method in result.methods:
        said = statements(method, result.config)
        lines.append(f"{method.method}. " + " ".join(f"{s.kind}: {s.text}" for s in said))
    lines += [f"{one.kind}: {one.text}" for one in readings(result)]
    box = _notebook.box(_QUESTION, [visible(line) for line in lines])
    table = markup.table(main_table(result), "One row a method")
    return f"{box}{table}{_notebook.box('Not private', [NOTICE, *cautions(result)])}"


def _answer(result: Assessment) -> str:
    kinds = "; ".join(f"<b>{kind}</b>: {html_text(means)}" for kind, means in _KINDS)
    return markup.section(
        "answer",
        _QUESTION,
        _missing(result),
        f"<p class=answer>{html_text(headline(result))}</p>",
        _alarm(result),
        f"<div class=cards>{''.join(_card(m, result) for m in result.methods)}</div>",
        "".join(map(_said, readings(result))),
        "".join(f"<p class=banner>{html_text(text)}</p>" for text in cautions(result)),
        f"<p class=quiet>{kinds}.</p>",
    )


def _missing(result: Assessment) -> str:
    if not result.missing:
        return ""
    names = html_text(", ".join(result.missing))
    return (
        f"<p class=banner><strong>Not finished: {names}.</strong> The run was interrupted; the "
        "same command with <code>--resume</code> goes on from here.</p>"
    )


def _alarm(result: Assessment) -> str:
    found = contradictions(result)
    if not found:
        return ""
    return (
        "<div class=alarm role=group aria-labelledby=alarm><h3 id=alarm>Contradiction</h3>"
        f"{markup.items(found)}</div>"
    )


def _card(method: MethodResult, result: Assessment) -> str:
    lines = "".join(map(_said, statements(method, result.config)))
    style = "card" if method.proved.reason is None else "card open"
    return f'<div class="{style}"><h3>{html_text(method.method)}</h3>{lines}</div>'


def _said(one: Statement) -> str:
    return f"<p><span class=kind>{html_text(one.kind)}:</span> {html_text(one.text)}</p>"
