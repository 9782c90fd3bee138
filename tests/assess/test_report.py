"""The page answers first, fetches nothing, mixes no kinds, and escapes all text of the data."""

import itertools
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_assessment import (
    HOSTILE,
    causal_assessment,
    contradicting_assessment,
    example_assessment,
)

from lora_privacy.assess import html, plots, tables, verdicts
from lora_privacy.assess.escaping import visible
from lora_privacy.assess.page_sections import SECTIONS
from lora_privacy.assess.page_style import STYLE
from lora_privacy.assess.result import Assessment
from lora_privacy.references import REFERENCES


class Page(HTMLParser):
    """Collects tags, addresses and visible text; complains of unbalanced tags."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def assessment() -> Assessment:
    return example_assessment()


@pytest.fixture(scope="module")
def source(saved: Path) -> str:
    return (saved / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def page_of(result: Assessment) -> Page:
    return Page(html.render(result, {}))


def test_the_page_fetches_nothing_and_runs_nothing(page: Page, source: str) -> None:
    allowed = {"section", "style", "svg"}
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form"}
    assert "svg" not in {tag for tag, _ in page.tags} - allowed
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        if "src" in attributes:
            assert tag == "img"
            assert (attributes["src"] or "").startswith("data:image/svg+xml;base64,")
        if "href" in attributes:
            assert (attributes["href"] or "").startswith("#")
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    assert "default-src 'none'" in source


def test_the_first_section_answers(assessment: Assessment, page: Page) -> None:
    """What is proved, why not, what attacks got and what it costs, before any table."""
    names = [attributes.get("id") for tag, attributes in page.tags if tag == "section"]
    assert names == ["answer", *SECTIONS]
    answer = page.text.split("What is proved, and what it would cost", 1)[0]
    for text in (
        "This report is itself not private.",
        "Proved at δ = 1e-05: dp-sgd ε ≤",
        "Nothing is proved of full, lora and flora.",
        "Nothing is proved, because no noise was added",
        "Membership attacks: not finished.",
        "These attacks found little; that is not to say that there is little to find.",
        "Not finished: lora-fa, dp-sgd (attacks).",
        "include 3 planted secrets; a proved ε holds for each of them",
        "on a random half of 240 records",
        "by simple composition, ε ≤",
    ):
        assert text in answer, text
    assert "Contradiction" not in answer
    for method in assessment.methods:
        kinds = {one.kind for one in verdicts.statements(method, assessment.config)}
        private = method.method.startswith("dp-")
        assert ("Guarantee" in kinds) is private
        assert ("No guarantee" in kinds) is not private
        assert {"Evidence", "Price"} <= kinds


def test_little_is_said_of_the_weak_attack_and_not_of_the_strong_one(
    assessment: Assessment,
) -> None:
    said = {
        method.method: " ".join(s.text for s in verdicts.statements(method, assessment.config))
        for method in assessment.methods
    }
    assert "found little" in said["dp-flora"]
    assert "found little" not in said["lora"]


def test_readings_are_marked_wherever_they_stand(assessment: Assessment, page: Page) -> None:
    """The size of a reading is printed beside "not a guarantee", or below such a heading."""
    for table in (tables.main_table(assessment), *_tables(assessment).values()):
        for heading in table.headings:
            if "implied" in heading or "flattering" in heading:
                assert "no guarantee" in heading or "not a guarantee" in heading
    for statement in verdicts.readings(assessment):
        assert statement.kind == "Reading, not a guarantee"
    # Cards speak of proofs, evidence and prices only.
    cards = page.text.split("Is this private")[1].split("Reading, not a guarantee")[0]
    assert "implied" not in cards
    assert "flattering" not in cards


def _tables(result: Assessment) -> dict[str, tables.Table]:
    from lora_privacy.assess.report_tables import all_tables

    return all_tables(result)


def test_a_contradiction_is_loud() -> None:
    result = contradicting_assessment()
    found = verdicts.contradictions(result)
    assert len(found) == 2
    assert "membership attacks show ε ≥" in found[0]
    assert "the run did not do what the proof assumes" in found[0]
    assert "attack on one update has AUC ≥ 0.950" in found[1]
    page = page_of(result)
    assert page.text.index("Do not rely on this page") < page.text.index("dp-lora+denoise")
    assert any(attributes.get("class") == "alarm" for _, attributes in page.tags)
    assert "Contradiction." in result._repr_html_()


def test_an_audited_bound_at_a_smaller_delta_refutes_nothing() -> None:
    """ε ≥ 5 at δ = 0 is compatible with ε ≤ 0.3 at δ = 1e-5: the latter may fail at δ = 0."""
    result = contradicting_assessment()
    method = result.methods[1]
    assert method.membership is not None
    report = method.membership.report
    smaller = replace(report, epsilon=replace(report.epsilon, delta=0.0))
    method = replace(method, membership=replace(method.membership, report=smaller), update=None)
    assert verdicts.contradictions(replace(result, methods=(method,))) == ()


def test_a_check_that_fails_is_said(assessment: Assessment) -> None:
    from example_assessment import make_secrets

    wrong = replace(assessment.methods[1], secrets=make_secrets((50,), (1, 1, 1)))
    text = " ".join(verdicts.cautions(replace(assessment, methods=(wrong,))))
    assert "lora: a check fails" in text
    assert "a check fails" not in " ".join(verdicts.cautions(assessment))


def test_hostile_text_is_shown_as_text(page: Page, source: str) -> None:
    shown = page.text
    for text in HOSTILE:
        assert re.sub(r"\s+", " ", visible(text)) in shown, text
    assert "<script>" not in source
    for char in ("\x1b", "\x00", "\x07", "\u202e", "\u2066", "\u200f", "\ud800"):
        assert char not in source


def test_no_method_and_a_language_model_have_pages_too(assessment: Assessment) -> None:
    empty = replace(assessment, methods=(), missing=("lora",))
    assert "No method finished" in page_of(empty).text
    assert plots.draw_all(empty) == {}
    assert empty.cite() == ""
    causal = causal_assessment()
    text = page_of(causal).text
    assert "held-out loss, nats" in text
    assert "accuracy" not in text.split("What it scored and cost")[2].split("Layer by layer")[0]
    assert "Membership attacks: not run." in text
    none = replace(causal, methods=causal.methods[:1])
    assert "No. None of these runs protects" in page_of(none).text


def test_accessible_names_and_landmarks(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == tags.count("main") == tags.count("header") == tags.count("nav") == 1
    identifiers = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    for tag, attributes in page.tags:
        if tag == "html":
            assert attributes["lang"] == "en"
        if tag == "img":
            assert len(attributes.get("alt") or "") > 20
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")
        if tag == "section":
            assert attributes["aria-labelledby"] in identifiers
        if attributes.get("class") == "scroll":
            assert attributes.get("tabindex") == "0"
            assert attributes.get("role") == "region"
            assert attributes.get("aria-label")
        if "href" in attributes:
            assert (attributes["href"] or "")[1:] in identifiers
    assert tags.count("table") == tags.count("caption") > 5
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_light_dark_and_on_paper() -> None:
    """WCAG 2 contrast of every colour of text on every ground, at least 4.5."""
    palettes = [dict(re.findall(r"--(\w+): (#\w+)", p)) for p in STYLE.split(":root")[1:]]
    palettes = [p for p in palettes if p]
    assert len(palettes) == 3
    for palette in palettes:
        for ink in ("ink", "warn", "link", "alarm", "quiet"):
            for ground in ("paper", "soft"):
                light, dark = sorted(
                    (_luminance(palette[ink]), _luminance(palette[ground])), reverse=True
                )
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground, palette)


def test_a_notebook_shows_the_answer(assessment: Assessment) -> None:
    text = Page(assessment._repr_html_()).text
    assert "Is this private, and how do we know?" in text
    assert "proved ε ≤" in text
    assert "<script>" not in assessment._repr_html_()


def test_only_works_that_were_used_are_cited(assessment: Assessment, saved: Path) -> None:
    keys = set(re.findall(r"@\w+\{([^,]+),", assessment.cite()))
    assert keys <= set(REFERENCES)
    assert {
        "hu-lora-2022",
        "flora-2024",
        "abadi-dpsgd-2016",
        "zarifzadeh-rmia-2024",
        "carlini-secrets-2019",
        "p1-implicit-2024",
        "p3-denoising-2025",
    } <= keys
    assert (saved / "references.bib").read_text(encoding="utf-8") == assessment.cite() + "\n"
    alone = replace(assessment, methods=assessment.methods[:1])
    few = set(re.findall(r"@\w+\{([^,]+),", alone.cite()))
    assert not few & {"hu-lora-2022", "zarifzadeh-rmia-2024", "carlini-secrets-2019"}
    # Keys that the JSON names beside its numbers are cited too.
    named = set(re.findall(r'"references": \[([^\]]*)\]', json.dumps(assessment.to_dict())))
    assert {key for group in named for key in re.findall(r'"([^"]+)"', group)} <= keys


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
