"""The page is self-contained, escaped and recomputable from report.json."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_assessment import example_assessment

from lora_privacy.assess import plots, tables
from lora_privacy.assess.readings import plain_readings
from lora_privacy.assess.result import Assessment, method_from_dict


class _Page(HTMLParser):
    """Collects tags, addresses and visible text; complains of unbalanced tags."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.images_without_alt = 0
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        self.images_without_alt += tag == "img" and not found.get("alt")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def assessment() -> Assessment:
    return example_assessment()


@pytest.fixture
def saved(assessment: Assessment, tmp_path: Path) -> Path:
    page = assessment.save(tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    return tmp_path / "out"


def test_the_page_fetches_nothing_and_runs_nothing(saved: Path) -> None:
    page = _Page((saved / "report.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.images_without_alt == 0
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "url(" not in (saved / "report.html").read_text(encoding="utf-8")


def test_text_of_the_data_set_is_escaped(saved: Path) -> None:
    text = (saved / "report.html").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;alert" in text
    assert "minilm &lt;b&gt;" in text


def test_the_page_says_what_is_missing_and_that_it_is_not_private(saved: Path) -> None:
    words = " ".join(_Page((saved / "report.html").read_text(encoding="utf-8")).words)
    assert "This report is itself not private" in words
    assert "Not finished: lora-fa" in words
    assert "no guarantee" in words
    assert "most flattering" in words
    assert "Not a guarantee" in words
    assert re.search(r"None of these runs protects", words)


def test_no_reading_is_printed_without_its_mark(saved: Path, assessment: Assessment) -> None:
    """The implied ε of the table stands under a heading that calls it a heuristic."""
    table = tables.main_table(assessment)
    implied = [heading for heading in table.headings if "implied" in heading]
    assert implied == ["implied ε (heuristic)"]
    assert {row[table.headings.index("proved ε")] for row in table.rows} == {"none"}
    assert saved.is_dir()


def test_numbers_of_the_tables_are_in_the_json(saved: Path, assessment: Assessment) -> None:
    data = json.loads((saved / "report.json").read_text())
    for method, result in zip(data["methods"], assessment.methods, strict=True):
        readings = plain_readings(assessment.config, result.shapes, 2_000, 4, None)
        assert method_from_dict(method, readings) == result
    assert data["methods"][0]["proved"]["epsilon"] == "inf"
    assert data["methods"][0]["dynamics"][0]["drift_bound"] == "inf"


def test_figures_are_files_too_and_the_same_numbers_draw_the_same_file(
    saved: Path, assessment: Assessment
) -> None:
    again = plots.draw_all(assessment)
    assert set(again) == {
        "noise-ratio",
        "quantiles-lora",
        "quantiles-flora",
        "distances",
        "dynamics",
        "training",
    }
    for name, figure in again.items():
        assert (saved / "figures" / f"{name}.svg").read_bytes() == figure.svg
        assert (saved / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_markdown_has_a_cell_for_every_heading(assessment: Assessment) -> None:
    for table in (tables.main_table(assessment), tables.layer_table(assessment.methods[0])):
        lines = table.markdown().splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) == 2 + len(table.rows)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.9996, "1.00"),
        (99.96, "100"),
        (999.6, "1,000"),
        (123456.0, "123,000"),
        (0.00123, "0.00123"),
        (-0.5, "-0.500"),
        (1e-9, "1.00e-09"),
        (float("inf"), "∞"),
    ],
)
def test_numbers_keep_three_digits(value: float, shown: str) -> None:
    assert tables.number(value) == shown
