"""Files of named arrays: read without pickle, written whole or not at all."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_privacy.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["array_names", "read_arrays", "write_arrays"]

# What numpy and zipfile raise on files that are cut short, forged or hold Python objects.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


def array_names(path: Path) -> tuple[str, ...]:
    """Names of the arrays of an ``.npz``; StorageError where it is none."""
    return tuple(_open(path, lambda archive: archive.files))


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Name -> array; others in the file are not looked at.

    Raises:
        StorageError: The file is missing, damaged, no ``.npz``, lacks an array, or holds Python
            objects, which are never loaded.
    """
    missing = [name for name in names if name not in array_names(path)]
    if missing:
        raise StorageError(
            f"{path} has no array {', '.join(missing)}; expected {', '.join(names)}."
        )
    return _open(path, lambda archive: {name: archive[name] for name in names})


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write an ``.npz``: a crash leaves the file that was there before."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(temporary, path)


def _open(path: Path, read: Any) -> Any:  # noqa: ANN401 - whatever ``read`` returns
    if not path.is_file():
        raise StorageError(f"There is no file {path}; an .npz of named arrays is expected.")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name")
        with archive:
            return read(archive)
    except _DAMAGE as error:
        raise StorageError(
            f"{path} is damaged or no .npz of plain arrays ({error}); write it by numpy.savez, "
            "without Python objects."
        ) from error
