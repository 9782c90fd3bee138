"""Local files as tables of named columns: delimited text, JSON and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lora_privacy.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["SUFFIXES", "Columns", "Table", "read"]

_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
SUFFIXES = (*_DELIMITERS, ".json", ".jsonl")


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
    text = _text(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        if header is not None or delimiter is not None:
            raise ValueError(f"header and delimiter are for delimited files, {path.name} is none.")
        return _json_table(path, text)
    if delimiter is None:
        first = text.split("\n", 1)[0]
        delimiter = _DELIMITERS.get(path.suffix.lower(), "\t" if "\t" in first else None)
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
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path.name} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8 {path.name} > new."
        )
    if (offset := raw.find(b"\0")) >= 0:
        raise DataError(
            f"{path.name} holds a NUL byte at offset {offset}: it is no text file, or damaged."
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        raise DataError(
            f"{path.name} is not UTF-8: byte {raw[start]:#04x} at offset {start}. If it is "
            f"Latin-1, convert it: iconv -f LATIN1 -t UTF-8 {path.name} > new."
        ) from None
    text = text.replace("\r\n", "\n").rstrip("\n")
    if not text.strip():
        raise DataError(f"{path.name} is empty.")
    return text


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
        rows = [line.split("\t") for line in text.split("\n")]
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
            raise DataError(f"{path.name}: the header {list(names)} names a column twice.")
        if not rows:
            raise DataError(f"{path.name} is empty but for its header.")
    else:
        names = tuple(map(str, range(width)))
        if named:
            raise DataError(
                f"{path.name} has no column {named[0]!r}: line 1 holds {rows[0]}. Without a "
                "header, name columns by number from 0."
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
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    start = 1
    try:
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
    if not isinstance(items, list) or not items:
        raise DataError(f"{path.name} must be a non-empty list of objects.")
    wrong = [i for i, item in enumerate(items, 1) if not isinstance(item, dict)]
    if wrong:
        raise DataError(f"{path.name}: {_places(unit, wrong[:4])} must be an object.")
    lines = list(range(1, len(items) + 1))
    if {"tripleset", "annotations"} <= set(items[0]):
        items, lines = _dart_rows(path, items)
    names = tuple(items[0])
    # A key missing further down gives None, which the checks of texts and labels refuse by line.
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


def _places(unit: str, lines: Sequence[int]) -> str:
    shown = ", ".join(map(str, lines[:3])) + (", …" if len(lines) > 3 else "")
    return f"{unit}{'s' if len(lines) > 1 else ''} {shown}"
