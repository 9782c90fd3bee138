"""What notebooks show of a result: all that ``str`` says, after the kind of the statement."""

import math
import sys
import types
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from lora_privacy import _notebook
from lora_privacy.assess.tables import Table
from lora_privacy.audit import auc, epsilon_one_run, exposure
from lora_privacy.dp import (
    GaussianEvent,
    RdpAccountant,
    VectorProjection,
    calibrate,
    implied_privacy,
)
from lora_privacy.dp.result import PairDivergence, PrivacyBound
from lora_privacy.errors import MissingPackageError
from lora_privacy.noise import EntryNoise, LayerShape, laws_table, tv_bound, tv_to_gaussian

RNG = np.random.default_rng(20240917)
NASTY = "<script>alert('&')</script>"
NO_BOUND = PrivacyBound(
    epsilon=math.inf,
    delta=1e-5,
    adjacency="add-remove",
    method="none",
    assumptions=(),
    references=(),
    reason="no noise was added.",
)

STATEMENTS = [
    ("Guarantee", RdpAccountant().compose(GaussianEvent(4.0)).epsilon(1e-5)),
    ("No guarantee", NO_BOUND),
    (
        "Guarantee",
        calibrate(GaussianEvent, epsilon=2.0, delta=1e-5, steps=1, accountant=RdpAccountant()),
    ),
    (
        "Reading, not a guarantee",
        implied_privacy(
            layers=[(768, 8)],
            batch_size=32,
            dataset_size=3200,
            steps=100,
            delta=1e-5,
            distortion=0.5,
        ),
    ),
    (
        "Divergence of one pair, not a guarantee",
        VectorProjection(768, 8, 0.999).epsilon(0.01),
    ),
    (
        "Evidence, not a guarantee",
        epsilon_one_run(
            canaries=100,
            guesses=50,
            correct=40,
            delta=1e-5,
            significance=0.05,
            threat_model=NASTY,
        ),
    ),
    ("Evidence, not a guarantee", auc([0.9, 0.1], np.array([True, False]), threat_model=NASTY)),
    ("Law, not a guarantee", tv_to_gaussian(EntryNoise(8))),
    ("Law, not a guarantee", tv_bound(EntryNoise(8))),
    ("Evidence, not a guarantee", exposure(3.0, [0.0, 1.0, 2.0], space=4)),
    (
        "Heuristic evidence, not a guarantee",
        exposure(9.0, RNG.standard_normal(300), space=10**6, method="skew-normal"),
    ),
]


class Text(HTMLParser):
    """The text of a page, and its tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(("kind", "result"), STATEMENTS, ids=lambda x: type(x).__name__)
def test_html_says_its_kind_and_then_what_str_says(kind: str, result: Any) -> None:
    """Oracle: Python's HTML parser; word by word, so nothing is lost, added or left unescaped."""
    page = Text(result._repr_html_())
    assert page.words == f"{kind}. {result}".split()
    assert not page.open


@pytest.mark.parametrize(("kind", "result"), STATEMENTS, ids=lambda x: type(x).__name__)
def test_html_brings_no_colour_no_file_and_no_script(kind: str, result: Any) -> None:
    """A page of any colours shows it, and shows it without a network."""
    page = Text(result._repr_html_())
    assert {tag for tag, _ in page.tags} <= {"div", "strong", "p", "ul", "li"}
    for _, attributes in page.tags:
        assert set(attributes) <= {"style"}
        style = attributes.get("style", "").replace("currentColor", "")
        assert not any(word in style for word in ("color", "background", "url", "#", "rgb"))


def test_only_a_bound_is_headed_as_a_guarantee() -> None:
    """No heading of a law, a reading or evidence can be taken for one."""
    for kind, result in STATEMENTS:
        first = " ".join(Text(result._repr_html_()).words).partition(".")[0]
        proved = type(result).__name__ in ("PrivacyBound", "Calibration")
        assert (first == "Guarantee") == (proved and result is not NO_BOUND)
        assert first == kind


def test_text_of_a_caller_is_escaped() -> None:
    pair = PairDivergence(
        epsilon=1.0,
        forward=1.0,
        backward=0.5,
        delta=0.1,
        method=NASTY,
        pair=NASTY,
        references=("p2-projections-2026",),
    )
    assert "<script" not in pair._repr_html_()
    assert NASTY in " ".join(Text(pair._repr_html_()).words)
    layer = LayerShape(NASTY, 16, 16, 1)
    assert "<script" not in laws_table([layer], 4)._repr_html_()


def test_laws_show_as_a_table_with_what_they_are() -> None:
    rows = laws_table([LayerShape("query", 384, 384, 6), LayerShape("up", 384, 1536, 6)], 8)
    page = Text(rows._repr_html_())
    assert page.words[:4] == ["Laws,", "not", "a", "guarantee."]
    assert [tag for tag, _ in page.tags].count("tr") == 3
    for row in rows:
        assert f"{row.tv:.4g}" in page.words
        one = Text(row._repr_html_())
        assert one.words[:4] == page.words[:4]
        assert f"{row.joint_tv:.4g}" in one.words
        assert f"{rows[1 - rows.index(row)].jl_distortion:.4g}" not in one.words
    assert isinstance(rows, tuple)


def test_rows_become_a_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pandas, which need not be installed, sees one record a row."""
    fake = types.ModuleType("pandas")
    fake.DataFrame = types.SimpleNamespace(from_records=lambda records: ("frame", records))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", fake)
    rows = laws_table([LayerShape("query", 384, 384, 6)], 8)
    assert rows.to_pandas() == ("frame", [rows[0].to_dict()])
    cells = Table(("method", "ε"), (("lora", "none"), ("flora", "8")))
    assert cells.to_pandas() == (
        "frame",
        [{"method": "lora", "ε": "none"}, {"method": "flora", "ε": "8"}],
    )


def test_without_pandas_the_error_says_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pip install pandas"):
        laws_table([LayerShape("query", 384, 384, 6)], 8).to_pandas()


def test_an_empty_table_is_still_one() -> None:
    page = Text(_notebook.table("Laws", [], "none"))
    assert page.words == ["Laws.", "none"]
    assert not page.open
