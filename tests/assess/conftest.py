"""One saved report for all tests of files: drawing it takes seconds."""

from pathlib import Path

import pytest
from example_assessment import example_assessment


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the saved example; read only."""
    folder = tmp_path_factory.mktemp("report") / "out"
    assert example_assessment().save(folder) == folder / "report.html"
    return folder
