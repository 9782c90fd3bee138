"""The types that a user of the installed library sees, as pyright reads them in strict mode."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "user_program.py"
ROOMS = ("assess", "audit", "core", "data", "dp", "noise", "training")

# Mistakes of a user, one a line, each with the rule that must see it.
MISTAKES = """\
from lora_privacy.dp import PldAccountant, RdpAcountant  # reportAttributeAccessIssue
from lora_privacy.noise import EntryNoise, tv_to_gaussian
import untyped

wrong: int = tv_to_gaussian(EntryNoise(8))  # reportAssignmentType
tv_to_gaussian(EntryNoise(8), varaince="exact")  # reportCallIssue
tv_to_gaussian(EntryNoise(8), "exakt")  # reportArgumentType
PldAccountant().compose("one step", 10)  # reportArgumentType
unknown = untyped.distance(1.0)  # reportUnknownVariableType, reportUnknownMemberType
print(wrong, unknown, RdpAcountant)  # reportUnknownArgumentType
"""


def _imported() -> dict[str, set[str]]:
    """Namespace -> names that the program takes from it."""
    found: dict[str, set[str]] = {}
    for node in ast.parse(PROGRAM.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.setdefault(node.module, set()).update(name.name for name in node.names)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_the_program_uses_every_public_name(room: str) -> None:
    """A name that is imported and not used is a mistake in strict mode."""
    package = importlib.import_module(f"lora_privacy.{room}")
    assert _imported()[f"lora_privacy.{room}"] == set(package.__all__)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """File name -> what pyright says of it; one run, outside of the repository."""
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("user")
    (folder / PROGRAM.name).write_text(PROGRAM.read_text("utf-8"), "utf-8")
    (folder / "mistakes.py").write_text(MISTAKES, "utf-8")
    (folder / "untyped.py").write_text("def distance(x): return helper(x)\n", "utf-8")
    settings = {"typeCheckingMode": "strict", "include": [PROGRAM.name, "mistakes.py"]}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2, done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in report["generalDiagnostics"]:
        found.setdefault(Path(finding["file"]).name, []).append(finding)
    return found


def test_every_public_name_has_a_known_type(findings: dict[str, list[dict[str, Any]]]) -> None:
    lines = [
        f"{found['range']['start']['line'] + 1}: {found['message']} ({found.get('rule')})"
        for found in findings.get(PROGRAM.name, [])
    ]
    assert lines == []


def test_mistakes_of_a_user_are_seen(findings: dict[str, list[dict[str, Any]]]) -> None:
    """A misspelt name, option or value, a wrong type, and a type that is not known."""
    seen = {(x["range"]["start"]["line"], x["rule"]) for x in findings["mistakes.py"]}
    for number, line in enumerate(MISTAKES.splitlines()):
        for rule in line.partition("# ")[2].split(", "):
            assert not rule or (number, rule) in seen, (line, seen)
