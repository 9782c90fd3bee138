"""A table as LaTeX, for a paper: plain ``tabular``, no package, ASCII only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy.assess.escaping import latex_text

if TYPE_CHECKING:
    from lora_privacy.assess.tables import Table

__all__ = ["latex_table"]


def latex_table(table: Table) -> str:
    r"""``table`` as a ``tabular``; put it into a ``table`` with a caption of your own.

    All text is escaped: no command, comment or formula of the data survives.

    >>> from lora_privacy.assess.tables import Table
    >>> print(latex_table(Table(("a", "b_c"), (("1 %", "x & y"),))))
    \begin{tabular}{lr}
    \hline
    a & b\_c \\
    \hline
    1 \% & x \& y \\
    \hline
    \end{tabular}
    """
    columns = "l" + "r" * (len(table.headings) - 1)
    lines = [
        f"\\begin{{tabular}}{{{columns}}}",
        r"\hline",
        _row(table.headings),
        r"\hline",
        *map(_row, table.rows),
        r"\hline",
        r"\end{tabular}",
    ]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    return " & ".join(map(latex_text, cells)) + r" \\"
