"""Text that others wrote, shown as text: in a terminal, Markdown, HTML, LaTeX and a figure.

Names of classes, models, layers and files are data. None of them may end a cell, start a tag or a
formula, move a terminal's cursor or turn the direction of writing.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import lru_cache

__all__ = ["figure_label", "html_text", "latex_text", "markdown_cell", "visible"]

# Controls, formats (among them the overrides of direction), halves of pairs, line separators.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # formats too, but words of Persian and Hindi are written with them

# Backslash escapes of GitHub's Markdown; "_" within a word, and "<" before a number, do nothing.
_MARKDOWN = re.compile(r"[\\`|*$~]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|<(?=[A-Za-z/!?])")
_ENTITY = re.compile(r"&(?=#?[0-9A-Za-z]+;)")
_DASHES = re.compile("-(?=-)")  # two hyphens would be set as one dash
_LINK = re.compile(r"\](?=[(\[:])")

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "`": "{}`{}",
    # After the end of a row these would be options of it.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    "ε": r"$\varepsilon$",
    "δ": r"$\delta$",
    "η": r"$\eta$",
    "μ": r"$\mu$",
    "ρ": r"$\rho$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
    "Δ": r"$\Delta$",
    "Σ": r"$\Sigma$",
    "²": "$^{2}$",
    "ᵀ": r"$^{\mathsf{T}}$",
    "‖": r"$\Vert$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "∞": r"$\infty$",
    "−": "$-$",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "…": r"\ldots{}",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
    "ß": r"\ss{}",
    "æ": r"\ae{}",
    "ø": r"\o{}",
    "\xa0": "~",
}
_ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0308": '"',
    "\u0327": "c",
    "\u030a": "r",
    "\u030c": "v",
}


def visible(text: str) -> str:
    r"""``text`` on one line, with what cannot be seen written out as an escape.

    >>> visible("a\nb\x1b[2J\u202ec\ud800")
    'a b\\x1b[2J\\u202ec\\ud800'
    """
    return "".join(_seen(char) for char in text)


def html_text(text: str) -> str:
    """``text`` for HTML, between tags and in quoted attributes."""
    return html.escape(visible(text))


def markdown_cell(text: str) -> str:
    r"""``text`` for a cell of a table in GitHub's Markdown, and for the terminal that shows it.

    >>> markdown_cell("a|b <script> [x](y) q_proj 0.5 in [0.4, 0.6]")
    'a\\|b \\<script> [x\\](y) q_proj 0.5 in [0.4, 0.6]'
    """
    text = _MARKDOWN.sub(r"\\\g<0>", visible(text))
    return _LINK.sub(r"\\]", _ENTITY.sub(r"\\&", text))


def latex_text(text: str) -> str:
    r"""``text`` for LaTeX, in ASCII; a letter that it cannot set is named by its number.

    >>> latex_text(r"\input{x} 5 % é ε 猫")
    "\\textbackslash{}input\\{x\\} 5 \\% \\'{e} $\\varepsilon$ {[}U+732B{]}"
    """
    return _DASHES.sub("-{}", "".join(_latex(char) for char in visible(text)))


def figure_label(text: str) -> str:
    r"""``text`` for matplotlib: no formula, and no letter that its font lacks.

    >>> print(figure_label("$x^2$ 猫"))
    \$x^2\$ \u732b
    """
    known = _glyphs()
    shown = (c if ord(c) in known else _escape(c) for c in visible(text))
    return "".join(shown).replace("$", r"\$")


def _seen(char: str) -> str:
    if char in "\n\t":
        return " "
    code = ord(char)
    without = code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF  # no characters by definition
    if without or (unicodedata.category(char) in _UNSEEN and char not in _JOINERS):
        return _escape(char)
    return char


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _latex(char: str) -> str:
    if char in _LATEX:
        return _LATEX[char]
    if char.isascii():
        return char
    base, *marks = unicodedata.normalize("NFD", char)
    if len(marks) == 1 and marks[0] in _ACCENTS and base.isascii():
        return f"\\{_ACCENTS[marks[0]]}{{{base}}}"
    return f"{{[}}U+{ord(char):04X}{{]}}"


@lru_cache
def _glyphs() -> frozenset[int]:
    from matplotlib import font_manager  # here: text for a terminal needs no matplotlib

    # Its own font, which its figures use wherever they are drawn.
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())
