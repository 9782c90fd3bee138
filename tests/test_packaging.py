"""What is built from the repository: the wheel, the source archive, and what they state."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import lora_privacy

if TYPE_CHECKING:
    from email.message import Message

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NAME = f"lora_privacy-{lora_privacy.__version__}"

needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None,
    reason="hatchling is not installed: pip install -e '.[dev]'",
)


def _build(target: str, folder: Path) -> Path:
    """Build as ``python -m build`` does, without a network: hatchling is the build backend."""
    hook = "build_wheel" if target == "wheel" else "build_sdist"
    script = f"from hatchling import build; print(build.{hook}({str(folder)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as pip would."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(_build("wheel", folder)) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return message_from_string((wheel / f"{NAME}.dist-info" / "METADATA").read_text("utf-8"))


def _git(*arguments: str) -> set[str]:
    done = subprocess.run(
        ["git", "ls-files", "-z", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}


@needs_hatchling
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    files = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    package = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in files if not name.startswith(f"{NAME}.dist-info/")} == package
    assert "lora_privacy/py.typed" in files
    assert f"{NAME}.dist-info/licenses/LICENSE" in files


@needs_hatchling
def test_the_wheel_states_what_the_project_states(wheel: Path, metadata: Message) -> None:
    assert metadata["Version"] == lora_privacy.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert (ROOT / "README.md").read_text("utf-8").strip() == str(metadata.get_payload()).strip()
    stated = {str(Requirement(line)) for line in metadata.get_all("Requires-Dist", [])}
    assert {str(Requirement(line)) for line in PROJECT["dependencies"]} <= stated
    scripts = (wheel / f"{NAME}.dist-info" / "entry_points.txt").read_text("utf-8")
    assert "lora-privacy = lora_privacy.cli:app" in scripts


@needs_hatchling
def test_the_wheel_works_outside_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    """The entry point, from another folder, with nothing of the repository on the path."""
    script = (
        "import lora_privacy; from lora_privacy.cli import app; print(lora_privacy.__file__); "
        "app(['account', '--noise-multiplier', '1', '--sample-rate', '0.01', '--steps', '10', "
        "'--delta', '1e-5', '--json'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(wheel)
    assert '"epsilon"' in done.stdout


@needs_hatchling
@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="not in a clone of the repository, whose files the archive is compared with",
)
def test_the_source_archive_is_the_repository(tmp_path: Path) -> None:
    """No file in version control is missing, and none that git ignores is in it."""
    with tarfile.open(_build("sdist", tmp_path)) as archive:
        files = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    assert _git() <= files
    assert files <= _git("--cached", "--others", "--exclude-standard") | {"PKG-INFO"}
    assert {"Makefile", "constraints.txt", "requirements/demo.txt", "tests/conftest.py"} <= files


def test_one_version_everywhere() -> None:
    """``__init__`` has it, and the build reads it there; CITATION.cff has it a second time."""
    assert PROJECT["dynamic"] == ["version"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.M) == [lora_privacy.__version__]
    assert re.findall(r"^license: (.*)$", citation, re.M) == [PROJECT["license"]]


def test_each_change_is_a_file_that_says_what_kind_it_is() -> None:
    files = sorted((ROOT / "changelog.d").iterdir())
    assert files
    for file in files:
        assert re.fullmatch(r"[a-z0-9-]+\.(change|fix|breaking)\.md", file.name), file.name
        assert file.read_text("utf-8").strip(), file.name


def _pins(name: str) -> dict[str, Version]:
    """Package -> version of a file of constraints."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        pin.name.lower().replace("_", "-"): Version(str(pin.specifier).removeprefix("=="))
        for pin in found
    }


def test_the_tested_versions_are_allowed_and_complete() -> None:
    pins = _pins("constraints.txt")
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for line in [*PROJECT["dependencies"], *extras]:
        need = Requirement(line)
        if need.name == "datasets":  # 250 MB with what it needs: its tests use a stand-in
            continue
        assert pins[need.name.lower()] in need.specifier, need


def test_the_lowest_versions_stated_are_the_lowest_tested() -> None:
    needs = [Requirement(line) for line in PROJECT["dependencies"]]
    stated = {need.name: Version(str(need.specifier).removeprefix(">=")) for need in needs}
    assert _pins("constraints-lowest.txt") == stated


def test_each_python_that_is_named_is_allowed() -> None:
    named = [
        line.rpartition(" ")[2]
        for line in PROJECT["classifiers"]
        if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert len(named) >= 3
    least = Version(PROJECT["requires-python"].removeprefix(">="))
    assert min(map(Version, named)) == least
    table = (ROOT / "docs" / "install.md").read_text("utf-8")
    assert all(f"| {version} |" in table for version in named)
