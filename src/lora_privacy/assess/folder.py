"""The output folder: one run at a time, and nothing finished is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from lora_privacy._plain import plain
from lora_privacy.assess.files import write_json, write_text
from lora_privacy.assess.result import versions
from lora_privacy.errors import FolderInUseError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lora_privacy.assess.config import AssessConfig

__all__ = ["RunFolder"]

_NO_JSON = (ValueError, RecursionError)  # nor UTF-8; or nested too deeply
_CHECK = "sha256"  # of the rest of a saved part
# What a stamp holds -> how a folder is refused whose stamp says otherwise.
_DIFFERENT = {
    "fingerprint": "a run with other settings",
    "train": "a run on other training data: they have changed since",
    "dev": "a run on other held-out data: they have changed since",
    "model": "a run on another model: its files have changed since",
    "version": "a run of another version of lora-privacy",
}


class RunFolder:
    """Finished methods of one configuration, a file each, below ``folder``.

    Args:
        folder: Made if absent.
        config: Its fingerprint is stored; another configuration is refused.
        inputs: Hashes of what the settings name but do not hold: ``train``, ``dev``, ``model``.
            They are stored too, so that no part of a run on other inputs is taken up.
        resume: Keep the finished methods that are there.
        overwrite: Replace what another run left.

    Raises:
        FolderInUseError: The folder holds another run, or one is running in it.
    """

    def __init__(
        self,
        folder: Path,
        config: AssessConfig,
        *,
        inputs: dict[str, str],
        resume: bool,
        overwrite: bool,
    ) -> None:
        self.path = folder
        self._lock = folder / ".running"
        version = versions()["lora-privacy"]
        self._stamp = {"fingerprint": config.fingerprint(), **inputs, "version": version}
        self._config, self._resume, self._overwrite = config, resume, overwrite

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder while working in it; checks what is there on entry."""
        if self.path.exists() and not self.path.is_dir():
            raise FolderInUseError(f"{self.path} is a file; name a folder for the report.")
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = self._take()
        try:
            self._check()
            yield
        finally:
            with contextlib.suppress(OSError):  # where an open file cannot be removed
                self._lock.unlink()
            os.close(descriptor)

    def saved(self, method: str, part: str = "training") -> dict[str, Any] | None:
        """A finished part of a method of an earlier run, or None, also if its file is damaged."""
        if not self._resume:
            return None
        try:
            found = json.loads(self._file(method, part).read_text(encoding="utf-8"))
        except (FileNotFoundError, *_NO_JSON):
            return None
        if not isinstance(found, dict) or found.pop(_CHECK, None) != _digest(found):
            return None
        return found

    def save(self, method: str, data: dict[str, Any], part: str = "training") -> None:
        """Keep a finished part of a method, with a hash that shows damage."""
        write_json(self._file(method, part), {**data, _CHECK: _digest(data)})

    def shadows(self, method: str) -> Path:
        """Folder of the shadow models of ``method``, which keeps itself."""
        return self.path / "shadows" / method

    def _file(self, method: str, part: str) -> Path:
        return self.path / "methods" / f"{method}.{part}.json"

    def _take(self) -> int:
        """Lock the folder; the lock goes with the process, however that ends."""
        descriptor = os.open(self._lock, os.O_CREAT | os.O_RDWR)
        try:
            self._exclude(descriptor)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _exclude(self, descriptor: int) -> None:
        with contextlib.suppress(ImportError):  # a system without it has no lock
            import fcntl

            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 32).decode(errors="replace")
                raise FolderInUseError(
                    f"process {owner} is writing to {self.path}; wait for it, or choose another "
                    "--output."
                ) from None
        # What was locked may be a file that its last owner has just removed.
        here = os.stat(self._lock) if self._lock.exists() else None
        if here is None or not os.path.samestat(here, os.fstat(descriptor)):
            raise FolderInUseError(f"a run in {self.path} has just ended; try again.")

    def _check(self) -> None:
        stamp = self.path / "methods" / "config.json"
        if not self._overwrite and not (self._resume and self._same(stamp)):
            others = [entry.name for entry in self.path.iterdir() if entry != self._lock]
            if others:
                does = f"is not empty (it holds {', '.join(sorted(others)[:3])})"
                if self._resume and stamp.exists():
                    does = f"holds {self._different(stamp)}"
                raise FolderInUseError(
                    f"{self.path} {does}; choose another --output, or --resume to go on with the "
                    "same settings, or --overwrite to replace what is there."
                )
        stamp.parent.mkdir(exist_ok=True)
        if self._overwrite and not (self._resume and self._same(stamp)):
            if stamp.exists():  # else the folder is not ours, nor are its figures
                for name in ("shadows", "figures", "tables"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
                for name in ("report.html", "report.json", "references.bib"):
                    (self.path / name).unlink(missing_ok=True)
            for old in stamp.parent.glob("*.json"):
                old.unlink()
        write_json(stamp, {**self._stamp, "config": self._config.to_dict()})
        write_text(self.path / "config.toml", self._config.to_toml())

    def _same(self, stamp: Path) -> bool:
        return self._different(stamp) is None

    def _different(self, stamp: Path) -> str | None:
        """What the run that left ``stamp`` was, if not this one."""
        try:
            found = json.loads(stamp.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "no run"
        except _NO_JSON:
            found = None
        if not isinstance(found, dict):
            return f"a run whose {stamp.name} is damaged"
        for name, value in self._stamp.items():
            if found.get(name) != value:
                return _DIFFERENT[name]
        return None


def _digest(data: dict[str, Any]) -> str:
    # In the order of the file: keys that are numbers sort otherwise once they are text.
    return hashlib.sha256(json.dumps(plain(data)).encode()).hexdigest()
