"""Settings of all tests."""

from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: a failure is a finding about the code, never about the day.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the saved example of a report, read only: drawing it takes seconds."""
    from example_assessment import example_assessment  # lies beside the tests that use it

    folder = tmp_path_factory.mktemp("report") / "out"
    assert example_assessment().save(folder) == folder / "report.html"
    return folder
