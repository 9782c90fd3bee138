"""The notebooks print today what is stored in them, and nothing of the machine they ran on."""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")

# Laws and accounting are the same everywhere but for the last digits. Training is not: another
# processor rounds otherwise, and a rank of records or a right guess may change.
RELATIVE = {"audit_your_fine_tune": 0.25}
ABSOLUTE = {"audit_your_fine_tune": 0.1}


def _execute() -> ModuleType:
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def shown(output: Any) -> tuple[str, str]:
    """What kind of output it is, and what a reader sees of it as text."""
    if output["output_type"] == "stream":
        return output["name"], "".join(output["text"])
    data = output["data"]
    if "text/html" in data:
        return "html", " ".join(_Text("".join(data["text/html"])).words)
    if "image/png" in data:
        return "figure", ""
    return "text", "".join(data["text/plain"])


def outputs(notebook: Any) -> list[list[tuple[str, str]]]:
    """Of each cell of code."""
    return [
        [shown(one) for one in cell["outputs"]]
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def same(text: str, other: str, relative: float, absolute: float) -> bool:
    """Equal words, and numbers that are close."""
    if NUMBER.sub("#", text) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(text), NUMBER.findall(other), strict=True)
    values = [tuple(float(number.replace(",", "")) for number in pair) for pair in pairs]
    return all(a == pytest.approx(b, rel=relative, abs=absolute) for a, b in values)


def test_the_comparison_can_fail() -> None:
    assert same("ε ≤ 1,024.1 nats", "ε ≤ 1,024.3 nats", 1e-3, 0)
    assert not same("ε ≤ 1,024.1 nats", "ε ≤ 1,027.1 nats", 1e-3, 0)
    assert not same("ε ≤ 1.0 nats", "ε ≥ 1.0 nats", 1e-3, 0)


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["audit_your_fine_tune", "equal_epsilon", "laws"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole_and_name_no_machine(path: Path) -> None:
    """Run from top to bottom, without errors, progress bars, folders, times or user names."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    kinds = {kind for cell in outputs(notebook) for kind, _ in cell}
    assert "figure" in kinds
    assert "html" in kinds
    assert not kinds & {"stderr"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert not re.search(r"/(home|root|tmp|work|Users|usr)/|it/s\]|Traceback", text)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_stored(path: Path) -> None:
    """Runs it in a kernel; `python docs/notebooks/execute.py` stores what it prints now."""
    pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    stored = outputs(json.loads(path.read_text(encoding="utf-8")))
    fresh = outputs(_execute().executed(path))
    relative, absolute = RELATIVE.get(path.stem, 1e-3), ABSOLUTE.get(path.stem, 1e-6)
    for number, (old, new) in enumerate(zip(stored, fresh, strict=True), 1):
        assert [kind for kind, _ in old] == [kind for kind, _ in new], f"cell {number}"
        for (_, before), (_, now) in zip(old, new, strict=True):
            assert same(before, now, relative, absolute), f"cell {number}: {before!r} != {now!r}"
