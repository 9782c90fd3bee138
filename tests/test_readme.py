"""Every number that the README and the page on training print is computed here."""

import doctest
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PAGES = (
    "README.md",
    "docs/howto-train-privately.md",
    "docs/howto-restore-singular-values.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_the_page_are_true(page: str) -> None:
    result = doctest.testfile(str(ROOT / page), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
