"""Hostile text is shown as text by readers of each format that share no code with us."""

import io
import re
import unicodedata
from dataclasses import replace

import pytest
from example_assessment import HOSTILE, LAYERS, example_assessment, make_layer
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import cbook, mathtext
from matplotlib.figure import Figure

from lora_privacy.assess.escaping import (
    figure_label,
    html_text,
    latex_text,
    markdown_cell,
    visible,
)
from lora_privacy.assess.evidence_plots import plot_spectrum
from lora_privacy.assess.latex import latex_table
from lora_privacy.assess.noise_plots import plot_distances
from lora_privacy.assess.report_tables import all_tables
from lora_privacy.assess.tables import Table, main_table

ANY_TEXT = st.text(st.characters(), max_size=40)  # halves of pairs among them

# Everything that the tables may use; none of them reads a file or defines anything.
COMMANDS = frozenset(
    "\\" + name
    for name in (
        *("begin", "end", "hline", "textbackslash", "textasciitilde", "textasciicircum"),
        *("ldots", "textendash", "textemdash", "ss", "ae", "o", "c", "r", "v"),
        *"{}$&%#_`'^~\"\\",
    )
)
IN_FORMULA = frozenset(
    "\\" + name
    for name in (
        *("varepsilon", "delta", "eta", "mu", "rho", "sigma", "tau", "Delta", "Sigma"),
        *("mathsf", "Vert", "times", "cdot", "pm", "leq", "geq", "infty"),
    )
)


def latex_cells(text: str) -> list[list[str]]:
    """A strict reader of one ``tabular``: cells of all rows; AssertionError for anything odd."""
    assert re.fullmatch(r"[\x20-\x7e\n]*", text), "only printable ASCII"
    depth, formula, rows, cell = 0, False, [[]], ""
    for token in re.findall(r"\\(?:[A-Za-z]+|.)|[^\\]", text, re.DOTALL):
        if token == "$":
            formula = not formula
        elif token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            assert depth >= 0
        elif token.startswith("\\"):
            assert token in (IN_FORMULA if formula else COMMANDS), token
        else:
            assert token not in "%#", token
            assert token not in "_^" or formula, token
        if token in ("&", "\\\\"):
            assert depth == 0
            assert not formula
            rows[-1].append(cell)
            cell = ""
            if token == "\\\\":
                rows.append([])
            continue
        cell += token
    assert depth == 0
    assert not formula
    assert re.fullmatch(r"\s*(\\hline)?\s*(\\end\{tabular\})?\s*", cell)
    return rows[:-1]


@given(ANY_TEXT)
def test_nothing_unseen_is_left(text: str) -> None:
    """Oracle: the categories of the Unicode database; joiners within words stay."""
    for char in visible(text):
        if char not in "\u200c\u200d":
            assert unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    visible(text).encode("utf-8")
    html_text(text).encode("utf-8")


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


@given(ANY_TEXT, ANY_TEXT)
def test_latex_has_no_command_of_the_data(first: str, second: str) -> None:
    cells = latex_cells(latex_table(Table((first, second), ((second, first), (first, second)))))
    assert [len(row) for row in cells] == [2, 2, 2]


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40))
def test_latex_sets_every_ascii_character(text: str) -> None:
    """Oracle: a reader that knows what each escape prints; quotes and spaces may look alike."""
    prints = {
        r"\textbackslash{}": "\\",
        r"\textasciitilde{}": "~",
        r"\textasciicircum{}": "^",
        "$<$": "<",
        "$>$": ">",
        "$|$": "|",
        "''": '"',
        "{}`{}": "`",
        "{[}": "[",
        "{]}": "]",
        "{*}": "*",
        "-{}": "-",
        **{"\\" + char: char for char in "{}$&%#_"},
    }
    pattern = "|".join(re.escape(key) for key in sorted(prints, key=len, reverse=True))
    read = re.sub(pattern, lambda found: prints[found.group()], latex_text(text))
    assert read.replace('"', "''") == text.replace('"', "''")


def test_latex_formulas_are_formulas() -> None:
    """Oracle: matplotlib's own reader of formulas."""
    symbols = "".join(chr(code) for code in range(0xA0, 0x2300))
    reader = mathtext.MathTextParser("path")
    formulas = set(re.findall(r"\$[^$]+\$", latex_text(symbols).replace(r"\$", "")))
    assert len(formulas) > 15
    for formula in formulas:
        reader.parse(formula)


def test_tables_of_the_report_are_strict_latex_and_markdown() -> None:
    report = example_assessment()
    found = all_tables(report)
    assert len(found) == 9
    for name, table in found.items():
        cells = latex_cells(latex_table(table))
        assert len(cells) == 1 + len(table.rows), name
        assert {len(row) for row in cells} == {len(table.headings)}, name
    assert r"\textbackslash{}input\{/etc/passwd\}" in latex_table(found["settings"])


def markdown_cells(text: str) -> list[list[str]]:
    """What a reader of CommonMark with tables sees; AssertionError for any markup in a cell."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(text)
    assert tokens[0].type == "table_open"
    assert tokens[-1].type == "table_close"
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline":
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "text_special"}, (kinds, token.content)
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def test_markdown_shows_hostile_cells_as_they_are() -> None:
    """Oracle: markdown-it."""
    table = Table(tuple(HOSTILE), (tuple(HOSTILE), tuple(reversed(HOSTILE))))
    expected = [[visible(cell).strip() for cell in row] for row in (table.headings, *table.rows)]
    assert markdown_cells(table.markdown()) == expected


@given(ANY_TEXT)
def test_markdown_shows_any_cell_as_it_is(text: str) -> None:
    """Oracle: markdown-it. Spaces at the ends of a cell have no meaning."""
    found = markdown_cells(Table(("a", "b"), ((text, "c"),)).markdown())
    assert found[1][1] == "c"
    assert found[1][0].split() == visible(text).split()


def test_markdown_leaves_common_cells_readable() -> None:
    for cell in ("0.534 [0.481, 0.588]", "q_proj.weight", "ε ≤ 8", "n × m", "p < 0.05", "C & A"):
        assert markdown_cell(cell) == cell


def test_the_terminal_gets_no_control_character() -> None:
    report = example_assessment()
    for table in (main_table(report), *all_tables(report).values()):
        shown = table.markdown()
        unseen = r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
        assert not re.search(unseen, shown)
        assert len(shown.split("\n")) == 2 + len(table.rows)


@pytest.mark.parametrize("text", HOSTILE)
def test_labels_of_figures_are_no_formulas(text: str) -> None:
    """Oracle: matplotlib's own test for formulas, and what it prints instead."""
    label = figure_label(text)
    assert not cbook.is_math_text(label)
    printed = label.replace(r"\$", "$")
    known = re.sub(r"\\(u[0-9a-f]{4}|U[0-9a-f]{8}|x[0-9a-f]{2})", "", printed)
    assert all(char in visible(text) for char in known)


@pytest.mark.filterwarnings("error")
def test_figures_of_hostile_names_can_be_drawn() -> None:
    """A bad formula would raise, and a missing letter would warn."""
    report = example_assessment()
    layers = tuple(make_layer(name) for name in (*HOSTILE, *LAYERS))
    figure = Figure(figsize=(9, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_distances(replace(report.methods[1], layers=layers), left)
    plot_spectrum(report.methods[4].spectra[1], right)
    figure.savefig(io.BytesIO(), format="svg")
    texts = [text.get_text() for text in left.get_yticklabels()]
    assert any("input{/etc/passwd}" in text for text in texts)
