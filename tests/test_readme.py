"""What the README, the tutorial, the FAQ and pages on training print is true."""

import doctest
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lora_privacy.cli import app

ROOT = Path(__file__).parents[1]


PAGES = (
    "README.md",
    "docs/faq.md",
    "docs/tutorial.md",
    "docs/howto-train-privately.md",
    "docs/howto-restore-singular-values.md",
)
WITH_COMMANDS = ("README.md", "docs/tutorial.md", "docs/howto-assess.md", "docs/faq.md")

_SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
_MAKE = re.compile(r"(?:^|`)make ([a-z]+)", re.MULTILINE)


def _commands(page: str) -> list[list[str]]:
    """Arguments of each ``lora-privacy`` that the blocks of a page show, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = "".join(_SHELL.findall(text)).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and line[0] == "lora-privacy"]


def _mistake(arguments: list[str]) -> str:
    """What the command does not take of ``arguments``; nothing is run, for help comes before."""
    done = CliRunner().invoke(app, [*arguments, "--help"])
    return "" if done.exit_code == 0 else done.output


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_the_page_are_true(page: str) -> None:
    result = doctest.testfile(str(ROOT / page), module_relative=False, encoding="utf-8")
    assert result.attempted > 0
    assert result.failed == 0


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_of_the_page_take_what_they_are_given(page: str) -> None:
    for arguments in _commands(page):
        assert _mistake(arguments) == ""
    rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert set(_MAKE.findall((ROOT / page).read_text(encoding="utf-8"))) <= set(rules)


def test_the_check_of_commands_sees_a_wrong_one() -> None:
    assert len(_commands("README.md")) > 1
    assert "--methods" in _mistake(["assess", "--methods", "lora", "--output", "x"])
    assert "asess" in _mistake(["asess"])
