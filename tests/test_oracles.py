"""The page of oracles names tests that exist, and every public number of the pure packages."""

import importlib
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "oracles.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| number")
]
# Public names that return no number of their own: types, interfaces, draws.
NO_NUMBER = {
    "noise": {"Distance", "maximal_coupling"},
    "dp": {"Accountant", "Adjacency", "Aggregation", "Event", "PrivacyBound"}
    | {"ProjectionAttestation"},
    "audit": {"RateEstimate"},
}


@cache
def _names_in(file: str) -> set[str]:
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    return set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:50])
def test_each_oracle_is_a_test_that_exists(row: list[str]) -> None:
    _number, first, second, tests = row
    assert first
    assert second
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
    assert len(named) == tests.count("::") >= 1
    for file, name in named:
        assert name in _names_in(file), f"{file} has no {name}"


@pytest.mark.parametrize("package", NO_NUMBER)
def test_every_public_number_has_a_row(package: str) -> None:
    names = set(importlib.import_module(f"lora_privacy.{package}").__all__)
    numbers = names - NO_NUMBER[package]
    assert numbers < names
    part = PAGE.split(f"\n## {package}\n")[1].split("\n## ")[0]
    assert {name for name in numbers if not re.search(rf"`{name}\b", part)} == set()


def test_the_table_was_read() -> None:
    """So a table that could not be read does not pass for one without mistakes."""
    assert len(ROWS) > 110
    assert all(len(row) == 4 for row in ROWS)
