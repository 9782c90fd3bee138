"""The pages of docs/ say where things are; this looks whether they are there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "theory" / "claims.md"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))
)
STATUSES = ("published", "proved here", "measured here", "heuristic")

_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")


def _rows() -> list[list[str]]:
    """Cells of the rows of the table of claims, without heads and rules."""
    lines = CLAIMS.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip() != "claim"]


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the built site make them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def _broken(page: Path, text: str) -> list[str]:
    """Links of ``text`` at ``page`` that lead nowhere; addresses of the web are not looked at."""
    broken = []
    for match in _LINK.finditer(_CODE.sub("", text)):
        path, _, anchor = match["target"].partition("#")
        if "://" in path or path.startswith("mailto:"):
            continue
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(match["target"])
    return broken


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0][:50])
def test_each_claim_names_a_function_and_a_test_that_exist(row: list[str]) -> None:
    _claim, status, functions, tests = row
    assert status.startswith(STATUSES) or "proved here" in status
    names, files = (re.findall(r"`([^`]+)`", cell) for cell in (functions, tests))
    assert names
    assert files
    assert all(Path(file).name.startswith("test_") for file in files)
    text = "".join((ROOT / "tests" / file).read_text(encoding="utf-8") for file in files)
    for name in names:
        room, function = name.rsplit(".", 1)
        package = importlib.import_module(f"lora_privacy.{room}")
        assert function in package.__all__
        assert getattr(package, function).__module__.startswith(package.__name__)
        assert re.search(rf"\b{function}\b", text), f"no file of this row uses {name}"


def test_the_table_has_every_kind_of_claim() -> None:
    """So a table that could not be read does not pass for one without mistakes."""
    text = CLAIMS.read_text(encoding="utf-8")
    assert len(_rows()) > 40
    assert all(f"| {status}" in text for status in (*STATUSES, "published, corrected"))


def test_the_map_of_the_house_names_every_module() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    modules = {path.stem for path in (ROOT / "src").rglob("*.py") if path.stem[0] != "_"}
    assert len(modules) > 80
    assert {name for name in modules if not re.search(rf"\b{name}\b", text)} == set()


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = ROOT / page
    assert _broken(path, path.read_text(encoding="utf-8")) == []


def test_the_check_of_links_sees_a_broken_one() -> None:
    text = "[a](rdp.md) [b](no.md) [c](../results.md#no) `[d](no.md)` [e](https://example.org)"
    assert _broken(CLAIMS, text) == ["no.md", "../results.md#no"]


def _unended_tables(text: str) -> list[str]:
    """Lines that stand right behind a table: Markdown reads them as one more row."""
    prose = re.sub(r"^```[^`]*^```|^    .*$", "", text, flags=re.MULTILINE)
    return re.findall(r"^\|.*\|\n([^|\n].*)$", prose, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_every_table_ends_with_an_empty_line(page: str) -> None:
    assert _unended_tables((ROOT / page).read_text(encoding="utf-8")) == []


def test_the_check_of_tables_sees_text_that_would_become_a_row() -> None:
    assert _unended_tables("| a |\n|---|\n| b |\nThen.\n\n```text\n| c |\n...\n```\n") == ["Then."]


def test_every_page_is_in_the_table_of_contents() -> None:
    docs = ROOT / "docs"
    blocks = re.findall(r"```\{toctree\}(.*?)```", (docs / "index.md").read_text(), re.DOTALL)
    listed = {line for block in blocks for line in block.split() if not line.startswith(":")}
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")}
    assert pages - {"index"} <= listed


def test_every_package_has_a_page() -> None:
    packages = {path.parent.name for path in (ROOT / "src/lora_privacy").glob("*/__init__.py")}
    assert packages <= {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}
    assert len(packages) == 7
