"""The output folder: one run at a time, and nothing finished is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_privacy.assess.result import write_json
from lora_privacy.errors import FolderInUseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_privacy.assess.config import AssessConfig

__all__ = ["RunFolder"]


class RunFolder:
    """Finished methods of one configuration, a file each, below ``folder``.

    Args:
        folder: Made if absent.
        config: Its fingerprint is stored; another configuration is refused.
        resume: Keep the finished methods that are there.
        overwrite: Replace what another run left.

    Raises:
        FolderInUseError: The folder holds another run, or one is running in it.
    """

    def __init__(
        self, folder: Path, config: AssessConfig, *, resume: bool, overwrite: bool
    ) -> None:
        self.path = folder
        self._lock = folder / ".running"
        self._stamp = {"fingerprint": config.fingerprint()}
        self._config, self._resume, self._overwrite = config, resume, overwrite

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder while working in it; checks what is there on entry."""
        if self.path.exists() and not self.path.is_dir():
            raise FolderInUseError(f"{self.path} is a file; name a folder for the report.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        try:
            self._check()
            yield
        finally:
            self._lock.unlink(missing_ok=True)

    def saved(self, method: str, part: str = "training") -> dict[str, Any] | None:
        """A finished part of a method of an earlier run, or None, also if its file is damaged."""
        if not self._resume:
            return None
        try:
            return json.loads(self._file(method, part).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None

    def save(self, method: str, data: dict[str, Any], part: str = "training") -> None:
        """Keep a finished part of a method."""
        write_json(self._file(method, part), data)

    def shadows(self, method: str) -> Path:
        """Folder of the shadow models of ``method``, which keeps itself."""
        return self.path / "shadows" / method

    def _file(self, method: str, part: str) -> Path:
        return self.path / "methods" / f"{method}.{part}.json"

    def _take(self) -> None:
        for _ in range(2):
            try:
                descriptor = os.open(self._lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                owner = self._owner()
                if owner is not None:
                    raise FolderInUseError(
                        f"process {owner} is writing to {self.path}; wait for it, or choose "
                        "another --output."
                    ) from None
                self._lock.unlink(missing_ok=True)  # its process died
                continue
            with os.fdopen(descriptor, "w") as file:
                file.write(str(os.getpid()))
            return
        raise FolderInUseError(f"another process has just started in {self.path}; try again.")

    def _owner(self) -> int | None:
        """The process that holds the lock, or None when it is gone."""
        try:
            pid = int(self._lock.read_text())
        except (ValueError, FileNotFoundError):
            return None
        try:
            os.kill(pid, 0)  # asks whether it lives, sends nothing
        except ProcessLookupError:
            return None
        except PermissionError:
            pass  # it lives and is another user's
        return pid

    def _check(self) -> None:
        stamp = self.path / "methods" / "config.json"
        if not self._overwrite and not (self._resume and self._same(stamp)):
            others = [entry.name for entry in self.path.iterdir() if entry != self._lock]
            if others:
                does = (
                    "holds a run with other settings"
                    if self._resume and stamp.exists()
                    else f"is not empty (it holds {', '.join(sorted(others)[:3])})"
                )
                raise FolderInUseError(
                    f"{self.path} {does}; choose another --output, or --resume to go on with the "
                    "same settings, or --overwrite to replace what is there."
                )
        stamp.parent.mkdir(exist_ok=True)
        if self._overwrite and not (self._resume and self._same(stamp)):
            for old in stamp.parent.glob("*.json"):
                old.unlink()
            shutil.rmtree(self.path / "shadows", ignore_errors=True)
        write_json(stamp, {**self._stamp, "config": self._config.to_dict()})
        (self.path / "config.toml").write_text(self._config.to_toml(), encoding="utf-8")

    def _same(self, stamp: Path) -> bool:
        try:
            found = json.loads(stamp.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return found.get("fingerprint") == self._stamp["fingerprint"]
