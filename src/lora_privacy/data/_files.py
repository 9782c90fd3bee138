"""Local files as tables of named columns: delimited text, JSON, JSON lines and Parquet."""

from __future__ import annotations

import csv
import importlib
import io
import json
import reprlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_privacy.errors import DataError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = ["SUFFIXES", "Columns", "Table", "read", "short"]

# Byte order marks; that of UTF-32 begins with that of UTF-16.
_WIDE = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
SUFFIXES = (*_DELIMITERS, ".json", ".jsonl", ".parquet")

# Values are shown in messages, however long or deeply nested they are.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
short = _SHORT.repr


class Columns(Protocol):
    """Anything that gives a column by its name."""

    def __getitem__(self, name: str, /) -> Iterable[Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns by name, and where each row stood.

    Attributes:
        where: File name without folders, or hub id; opens every message.
        names: Column names; ``"0"``, ``"1"``, … without a header.
        data: Column name -> values.
        lines: Number of each row in ``unit``, from 1.
        unit: What ``lines`` counts.
        named: Whether the names come from the source.
        header_guessed: Whether it was guessed that there is no header.
        class_names: Column -> names that its numbers stand for.
    """

    where: str
    names: tuple[str, ...]
    data: Columns
    lines: Sequence[int]
    unit: str = "line"
    named: bool = True
    header_guessed: bool = False
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def at(self, rows: Sequence[int]) -> str:
        """The first three places, for a message: ``lines 3, 8, 9, …``."""
        return _places(self.unit, [self.lines[i] for i in rows[:4]])


def read(
    path: Path,
    header: bool | None,
    delimiter: str | None,
    wanted: Sequence[str | int],
    usual: Collection[str],
) -> Table:
    """Read ``path``.

    With ``header=None``, line 1 is a header when it holds a name in ``wanted``, the columns asked
    for; when those are all numbers or none, when it holds a name in ``usual``.
    """
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".parquet"):
        if header is not None or delimiter is not None:
            raise ValueError(f"header and delimiter are for delimited files, {path.name} is none.")
        return _parquet_table(path) if suffix == ".parquet" else _json_table(path, _text(path))
    text = _text(path)
    if delimiter is None:
        first = text.split("\n", 1)[0]
        delimiter = _DELIMITERS.get(suffix, "\t" if "\t" in first else None)
    if delimiter is None or len(delimiter) != 1 or delimiter in '\r\n"':
        raise ValueError(
            f"delimiter must be one character for {path.name}, got {delimiter!r}; pass for "
            'example delimiter=","  (a suffix .csv or .tsv says it too).'
        )
    named = [name for name in wanted if isinstance(name, str) and not name.isdecimal()]
    return _delimited_table(path, text, header, delimiter, named, usual)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror}.") from error
    for mark, name in _WIDE.items():
        if raw.startswith(mark):
            raise DataError(
                f"{path.name} is {name}; convert it: iconv -f {name} -t UTF-8 {path.name} > new."
            )
    if (offset := raw.find(b"\0")) >= 0:
        raise DataError(
            f"{path.name} holds a NUL byte at offset {offset} (line {_line(raw, offset)}): it is "
            "no text file, or damaged."
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(
            f"{path.name} is not UTF-8: byte {raw[start]:#04x} at offset {start} (line "
            f"{_line(raw, start)}). If it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8 "
            f"{path.name} > new."
        ) from None
    text = text.rstrip("\r\n")
    if not text.strip():
        raise DataError(f"{path.name} is empty.")
    return text


def _line(raw: bytes, offset: int) -> int:
    return raw.count(b"\n", 0, offset) + 1


def _delimited_table(
    path: Path,
    text: str,
    header: bool | None,
    delimiter: str,
    named: Sequence[str],
    usual: Collection[str],
) -> Table:
    rows: list[list[str]]
    if delimiter == "\t":
        rows = [line.split("\t") for line in text.replace("\r\n", "\n").split("\n")]
        lines = list(range(1, len(rows) + 1))
    else:
        rows, lines = _csv_rows(path, text, delimiter)
    guessed = header is None
    if header is None:
        header = any(name in rows[0] for name in named or usual)
    width = len(rows[0])
    odd = [line for line, row in zip(lines, rows, strict=True) if len(row) != width]
    if odd:
        raise DataError(
            f"{path.name}: line 1 has {width} columns, but {len(odd)} rows have another number "
            f"({_places('line', odd[:4])}). Mend them, or is the delimiter not {delimiter!r}?"
        )
    if header:
        names = tuple(name.strip() for name in rows[0])
        rows, lines = rows[1:], lines[1:]
        if len(set(names)) != width:
            raise DataError(f"{path.name}: the header {short(names)} names a column twice.")
        if not rows:
            raise DataError(f"{path.name} is empty but for its header.")
    else:
        names = tuple(map(str, range(width)))
        if named:
            raise DataError(
                f"{path.name} has no column {named[0]!r}: line 1 holds {short(rows[0])}. "
                "Without a header, name columns by number from 0."
            )
    data = dict(zip(names, zip(*rows, strict=True), strict=True))
    return Table(
        where=path.name,
        names=names,
        data=data,
        lines=lines,
        named=header,
        header_guessed=guessed and not header,
    )


def _csv_rows(path: Path, text: str, delimiter: str) -> tuple[list[list[str]], list[int]]:
    """Rows and the line each begins at; strict, so that no open quote swallows lines."""
    # Lines end as in an editor: a lone carriage return inside a quoted text is none.
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
        with _any_length():
            for row in reader:
                rows.append(row)
                lines.append(start)
                start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path.name}: the row from line {start} is no valid CSV ({error}). Quotes inside a "
            "quoted text are doubled; a file without quoting is read with a tab as delimiter."
        ) from None
    return rows, lines


@contextmanager
def _any_length() -> Iterator[None]:
    """Let a text be longer than the 131072 characters that csv takes by default."""
    before = csv.field_size_limit(2**31 - 1)  # the largest that fits a C long everywhere
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _json_table(path: Path, text: str) -> Table:
    unit = "line" if path.suffix.lower() == ".jsonl" else "item"
    items: list[Any] = []
    try:
        if unit == "line":
            for line in text.split("\n"):
                items.append(json.loads(line))
        else:
            items = json.loads(text)
    except ValueError as error:
        at = f" in line {len(items) + 1}" if unit == "line" else ""
        raise DataError(f"{path.name} is not valid JSON{at}: {error}.") from None
    except RecursionError:
        raise DataError(f"{path.name} nests lists or objects too deeply to be read.") from None
    if not isinstance(items, list) or not items:
        raise DataError(f"{path.name} must be a non-empty list of objects.")
    wrong = [i for i, item in enumerate(items, 1) if not isinstance(item, dict)]
    if wrong:
        raise DataError(f"{path.name}: {_places(unit, wrong[:4])} must be an object.")
    lines = list(range(1, len(items) + 1))
    if {"tripleset", "annotations"} <= set(items[0]):
        items, lines = _dart_rows(path, items)
    names = tuple(dict.fromkeys(name for item in items for name in item))
    # A missing key gives None, which the checks of texts and labels refuse by line.
    data = {name: [item.get(name) for item in items] for name in names}
    return Table(where=path.name, names=names, data=data, lines=lines, unit=unit)


def _dart_rows(path: Path, items: Sequence[dict[str, Any]]) -> tuple[list[Any], list[int]]:
    """One row per reference text of a file in the format of DART (Nan et al., NAACL 2021)."""
    rows: list[Any] = []
    lines: list[int] = []
    for number, item in enumerate(items, 1):
        try:
            triples = " ; ".join(" | ".join(triple) for triple in item["tripleset"])
            rows += [{"triples": triples, "text": note["text"]} for note in item["annotations"]]
        except (KeyError, TypeError):
            raise DataError(
                f"{path.name}: item {number} lacks a tripleset or annotations with a text."
            ) from None
        lines += [number] * (len(rows) - len(lines))
    return rows, lines


def _parquet_table(path: Path) -> Table:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MissingPackageError(
            f"{path.name} is a Parquet file; to read it: pip install pyarrow."
        ) from None
    unreadable = (arrow.ArrowException, OSError, ValueError)
    try:
        file = parquet.ParquetFile(path)
        names, rows = tuple(file.schema_arrow.names), file.metadata.num_rows
    except unreadable as error:
        raise DataError(f"{path.name} is no readable Parquet file: {error}.") from None
    if not rows:
        raise DataError(f"{path.name} is empty.")
    if len(set(names)) != len(names):
        raise DataError(f"{path.name}: the header {short(names)} names a column twice.")

    class Parts:
        """Reads a column when it is asked for: a file may hold long vectors beside the text."""

        def __getitem__(self, name: str) -> list[Any]:
            try:
                return file.read(columns=[name]).column(name).to_pylist()
            except (*unreadable, KeyError) as error:
                raise DataError(f"{path.name}: column {name!r} cannot be read: {error}.") from None

    lines = range(1, rows + 1)
    return Table(where=path.name, names=names, data=Parts(), lines=lines, unit="row")


def _places(unit: str, lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:3])) + (", …" if len(lines) > 3 else "")
    return f"{unit}{'s' if len(lines) > 1 else ''} {shown}"
