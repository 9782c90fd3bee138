"""The page of assessments shows what is kept of them, and that is enough to render it again."""

import importlib.util
import json
from pathlib import Path

import pytest

from lora_privacy.assess.stored import assessment_from_dict

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results-assessments.md"
SCRIPT = ROOT / "examples" / "assessments" / "run.py"

pytestmark = pytest.mark.skipif(
    not (PAGE.exists() and SCRIPT.exists()), reason="docs/ is not part of this installation"
)


@pytest.mark.parametrize("name", ["sst2", "trec", "sms", "e2e"])
def test_tables_are_those_of_the_results(name: str) -> None:
    """Every proved number is computed anew on the way."""
    spec = importlib.util.spec_from_file_location("run_assessments", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    data = json.loads((ROOT / "docs" / "reproduction" / f"assess-{name}.json").read_text())
    result = assessment_from_dict(data)
    assert script.kept(result) == data
    assert script.page_tables(result) in PAGE.read_text(encoding="utf-8")
