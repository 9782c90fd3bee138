"""Formulas as MathML, written at the build.

A page then needs no script and no server to show its mathematics. MathJax would come from a third
party's network at every visit, or be a bundle larger than the site.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.errors import ExtensionError

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

_TAG = re.compile(r"\\tag\{(?P<label>[^}]*)\}")


def mathml(latex: str, display: str) -> str:
    """``latex`` as one ``<math>`` element; ``display`` is ``"inline"`` or ``"block"``.

    Raises:
        ExtensionError: A command is unknown, so the reader would see its name and not its sign.
    """
    # The converter knows the bars of a norm, but not by this name after \Big.
    markup = convert(latex.replace(r"\|", "‖"), display=display)
    unknown = re.search(r">(\\[^<]*)<", markup)
    if unknown:
        raise ExtensionError(f"no MathML for {unknown[1]} in {latex!r}; write it in another way.")
    return markup


def visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula of a line."""
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula of its own line, and its number beside it."""
    latex = node.astext()
    tag = _TAG.search(latex)
    number = f'<span class="number">({tag["label"]})</span>' if tag else ""
    formula = mathml(_TAG.sub("", latex), "block")
    self.body.append(f'<div class="formula"><div>{formula}</div>{number}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Take the place of the renderers that Sphinx has for HTML."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_inline, None), block_renderers=(visit_block, None)
    )
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
