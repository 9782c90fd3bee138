"""Files that are written whole or not at all, so that a crash leaves the one that was there.

Named arrays and JSON are read back without pickle.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_privacy._plain import plain
from lora_privacy.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "array_names",
    "read_arrays",
    "read_json",
    "write_arrays",
    "write_bytes",
    "write_json",
    "write_text",
]

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


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data``."""
    # Two processes may write the same file: each has a temporary one of its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write ``data``, infinities as strings; NaN has no place in a report."""
    write_text(path, json.dumps(plain(data), indent=1, allow_nan=False))


def read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; StorageError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise StorageError(f"{path} must hold a JSON object, got a {type(found).__name__}.")
    return found


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
    """Write an ``.npz``."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_bytes(path, file.getvalue())


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
