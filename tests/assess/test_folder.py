"""The output folder keeps what is finished and refuses what is not its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_privacy.assess.config import AssessConfig
from lora_privacy.assess.folder import RunFolder
from lora_privacy.errors import FolderInUseError

CONFIG = AssessConfig(train_size=10)


def _folder(path: Path, config: AssessConfig = CONFIG, **options: bool) -> RunFolder:
    return RunFolder(path, config, inputs={}, **{"resume": False, "overwrite": False, **options})


def test_what_was_saved_is_found_on_resume_only(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "run")
    with folder.held():
        folder.save("lora", {"method": "lora"})
    again = _folder(tmp_path / "run", resume=True)
    with again.held():
        assert again.saved("lora") == {"method": "lora"}
        assert again.saved("flora") is None
    fresh = _folder(tmp_path / "run", overwrite=True)
    with fresh.held():
        assert fresh.saved("lora") is None
        assert not (tmp_path / "run" / "methods" / "lora.training.json").exists()


def test_methods_do_not_tell_runs_apart_but_settings_do(tmp_path: Path) -> None:
    with _folder(tmp_path / "run").held():
        pass
    more = AssessConfig(train_size=10, methods=("flora",))
    with _folder(tmp_path / "run", more, resume=True).held():
        pass
    other = AssessConfig(train_size=11)
    with (
        pytest.raises(FolderInUseError, match="holds a run with other settings"),
        _folder(tmp_path / "run", other, resume=True).held(),
    ):
        pass


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with (
        pytest.raises(FolderInUseError, match=r"not empty.*thesis\.tex"),
        _folder(tmp_path).held(),
    ):
        pass
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(FolderInUseError, match="is a file"), _folder(tmp_path / "run").held():
        pass


def test_two_runs_cannot_share_a_folder_but_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    with _folder(tmp_path / "run").held():
        second = _folder(tmp_path / "run", resume=True)
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"), second.held():
            pass
        assert (tmp_path / "run" / ".running").exists()
    assert not (tmp_path / "run" / ".running").exists()
    # The number of a process that has ended for sure.
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    (tmp_path / "run" / ".running").write_text(gone.stdout.strip())
    with _folder(tmp_path / "run", resume=True).held():
        pass


def test_a_file_cut_short_counts_as_not_finished(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "run", resume=True)
    with folder.held():
        folder.save("lora", {"method": "lora", "x": list(range(100))})
        whole = (tmp_path / "run" / "methods" / "lora.training.json").read_text()
        (tmp_path / "run" / "methods" / "lora.training.json").write_text(whole[: len(whole) // 2])
        assert folder.saved("lora") is None
        assert json.loads(whole)["method"] == "lora"
