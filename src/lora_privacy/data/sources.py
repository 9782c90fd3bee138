"""Load texts and labels from a local file, the hub, or the embedded synthetic tickets."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING

from lora_privacy import _validate
from lora_privacy.data import _files
from lora_privacy.data.dataset import TextDataset
from lora_privacy.data.synthetic import tickets
from lora_privacy.errors import DataError, MissingPackageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

__all__ = ["load"]

# Tried in this order when the caller names no column at all.
_TEXT_DEFAULTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("mr", "ref"),
    ("text",),
    ("sentence",),
    ("question",),
)
_LABEL_DEFAULT = "label"
_USUAL = frozenset({*(name for row in _TEXT_DEFAULTS for name in row), _LABEL_DEFAULT})
_TICKETS = "tickets"
_DEFAULT_TICKETS = 2_000
# Names that people give the split that the hub calls validation.
_HELD_OUT = ("validation", "valid", "val", "dev")
# What the hub appends to a split that is stored in one file.
_SHARD = re.compile(r"-0+-of-0+1$")


def load(
    source: str | PathLike[str],
    *,
    split: str | None = None,
    text_columns: str | int | Sequence[str | int] | None = None,
    label_column: str | int | None = None,
    classes: Sequence[str] | None = None,
    header: bool | None = None,
    delimiter: str | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> TextDataset:
    """Load a data set; what is wrong with it is an error here, not a surprise in training.

    Args:
        source: ``"tickets"`` for the synthetic default; a file (``.csv``, ``.tsv``, ``.json``,
            ``.jsonl``, ``.parquet``, or another delimited text file); a folder that holds one
            file per split; or a hub id such as ``"stanfordnlp/sst2"`` or
            ``"nyu-mll/glue:cola"`` (id:config).
        split: Split of a hub id or of the tickets (``"train"`` when None), or the name without
            suffix of the file to read in a folder (``validation`` also finds ``valid``, ``val`` or
            ``dev``). One file is read whole, whatever the split.
        text_columns: The column with the text, or two columns for pairs: names, or numbers from
            0. None looks for usual names such as ``text``, ``sentence`` or ``mr`` with ``ref``.
        label_column: The column with the class. None means no labels; only when
            ``text_columns`` is None too, a column named ``label`` is used.
        classes: Names of the classes in their order, to give a dev set those of its train set.
            None sorts the values found, whole numbers by size.
        header: Whether line 1 of a delimited file holds names. None: it does when it holds one
            of the names asked for, or where none is asked for by name, a usual one.
        delimiter: One character; None takes comma for ``.csv``, tab for ``.tsv`` and ``.tab``,
            and for other files tab if line 1 holds one. Tab-separated files are read without
            quoting (a quote is a character like any other), all others with standard quoting.
        limit: At most this many examples, a random subset.
        seed: For ``limit`` and for the tickets.

    Raises:
        DataError: Missing or empty source, not UTF-8, NUL bytes, rows of unequal width, missing
            column, empty texts, missing labels, one class only, or a label not in ``classes``;
            with the first lines where it is so.
        MissingPackageError: A hub id without the package ``datasets``, or Parquet without
            ``pyarrow``.
        ValueError: Arguments that contradict each other.
    """
    if limit is not None:
        limit = _validate.integer("limit", limit, 1)
    source = fspath(source)
    local = _local_path(source)
    if source == _TICKETS and local is None:
        if (text_columns, label_column, classes, header, delimiter) != (None,) * 5:
            raise ValueError(
                'source "tickets" has fixed columns; only split, limit and seed apply.'
            )
        _validate.choice("split", split or "train", ("train", "dev"))
        kind = "dev" if split == "dev" else "train"
        return tickets(limit or _DEFAULT_TICKETS, seed=seed, split=kind)
    wanted = None if text_columns is None else _as_list(text_columns)
    if local is None:
        if header is not None or delimiter is not None:
            raise ValueError(f"header and delimiter are for delimited files, {source!r} is none.")
        table, origin = _hub_table(source, split or "train")
        name = re.split(r"[/:]", source)[-1]
    else:
        path = _file_of(local, split)
        asked = [*(wanted or ()), *([] if label_column is None else [label_column])]
        table = _files.read(path, header, delimiter, asked, _USUAL)
        name, origin = path.stem, path.name
    if wanted is None:
        wanted = _default_texts(table)
        if label_column is None and _LABEL_DEFAULT in table.names:
            label_column = _LABEL_DEFAULT
    texts = [_texts(table, column) for column in wanted]
    labels = None
    if label_column is not None:
        labels, classes = _labels(table, label_column, classes)
    elif classes:
        raise ValueError("classes are given, but no label_column.")
    dataset = TextDataset(
        name=name,
        texts=texts[0],
        pairs=texts[1] if len(texts) == 2 else None,
        labels=labels,
        classes=tuple(classes or ()),
        origin=origin,
    )
    return dataset if limit is None or limit >= len(dataset) else dataset.take(limit, seed)


def _as_list(columns: str | int | Sequence[str | int]) -> list[str | int]:
    listed = [columns] if isinstance(columns, (str, int)) else list(columns)
    if len(listed) not in (1, 2):
        raise ValueError(f"text_columns must be one or two columns, got {len(listed)}.")
    return listed


def _default_texts(table: _files.Table) -> list[str | int]:
    for row in _TEXT_DEFAULTS:
        if set(row) <= set(table.names):
            return list(row)
    raise DataError(
        f"{table.where}: which column holds the text? Pass text_columns=… (and label_column=… for "
        f"classification); there are {_shown(table.names)}, numbered from 0."
    )


def _column(table: _files.Table, wanted: str | int, argument: str) -> str:
    """Name of the column asked for by name or number."""
    if isinstance(wanted, bool) or not isinstance(wanted, (str, int)):
        raise TypeError(f"{argument} must be a name or a number, got {wanted!r}.")
    if wanted in table.names:
        return str(wanted)
    if str(wanted).isdecimal() and int(wanted) < len(table.names):
        return table.names[int(wanted)]
    close = difflib.get_close_matches(str(wanted), table.names, 1)
    raise DataError(
        f"{table.where} has no column {wanted!r}"
        + (f"; did you mean {close[0]!r}?" if close else ".")
        + f" There are {_shown(table.names)}, numbered from 0."
        + ("" if table.named else " It was read as having no header; pass header=True if it has.")
    )


def _texts(table: _files.Table, wanted: str | int) -> tuple[str, ...]:
    name = _column(table, wanted, "text_columns")
    values = tuple(table.data[name])
    wrong = [i for i, value in enumerate(values) if not isinstance(value, str)]
    if wrong:
        raise DataError(
            f"{table.where}: column {name!r} must hold text, but {table.at(wrong)} "
            f"{'holds' if len(wrong) == 1 else 'hold'} something else or nothing "
            f"({_files.short(values[wrong[0]])})."
        )
    empty = [i for i, value in enumerate(values) if not value.strip()]
    if empty:
        raise DataError(
            f"{table.where}: column {name!r} has {len(empty)} empty texts of {len(values)} "
            f"({table.at(empty)}). Remove these rows, so that what is counted is what is trained "
            "on, or choose another column."
        )
    _refuse_surrogates(table, values)
    return values


def _refuse_surrogates(table: _files.Table, values: Sequence[str]) -> None:
    """Escapes in JSON can spell half of a character, which no tokenizer and no file takes."""
    for i, value in enumerate(values):
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise DataError(f"{table.where}: {table.at([i])} holds an unpaired surrogate escape.")


def _labels(
    table: _files.Table, wanted: str | int, classes: Sequence[str] | None
) -> tuple[tuple[int, ...], Sequence[str]]:
    name = _column(table, wanted, "label_column")
    values = [
        str(value).strip() if isinstance(value, (str, int)) else "" for value in table.data[name]
    ]
    hub_names = table.class_names.get(name)
    if hub_names is not None:  # numbers on the hub stand for names; −1 marks a hidden label
        known = {str(i): name for i, name in enumerate(hub_names)}
        values = [known.get(value, "") for value in values]
    missing = [i for i, value in enumerate(values) if not value]
    if missing:
        raise DataError(
            f"{table.where}: column {name!r} has no usable label in {len(missing)} of "
            f"{len(values)} rows ({table.at(missing)}). A label is a text or a whole number."
        )
    _refuse_surrogates(table, values)
    found = set(values)
    if classes is None:
        if len(found) > max(50, len(values) // 2):
            raise DataError(
                f"{table.where}: column {name!r} has {len(found)} different labels in "
                f"{len(values)} rows. Is it the text? There are {_shown(table.names)}."
            )
        if table.header_guessed and values.count(values[0]) == 1 and len(values) >= 10:
            raise DataError(
                f"{table.where}: the label {_files.short(values[0])} in line 1 occurs nowhere "
                "else, which looks like a header. Pass header=True or header=False."
            )
        if len(found) == 1:
            raise DataError(
                f"{table.where}: all {len(values)} rows have the label {_files.short(values[0])}; "
                "classification needs two classes. Is it the right column?"
            )
        whole = all(re.fullmatch(r"-?\d{1,18}", value) for value in found)
        classes = sorted(found, key=int) if whole else sorted(found)
        if hub_names is not None:
            classes = list(hub_names)
    elif unseen := found - set(classes):
        at = [i for i, value in enumerate(values) if value in unseen]
        raise DataError(
            f"{table.where}: label {_files.short(values[at[0]])} ({table.at(at)}) is none of "
            f"the classes {_shown(classes)}."
        )
    number = {value: i for i, value in enumerate(classes)}
    return tuple(number[value] for value in values), classes


def _local_path(source: str) -> Path | None:
    """The path that ``source`` means, or None for a hub id or the tickets."""
    try:
        path = Path(source).expanduser()
        if path.exists():
            path.name.encode()
            return path
    except (OSError, RuntimeError, ValueError) as error:
        # Longer than a path can be, the home of nobody, or a name that cannot be written down.
        raise DataError(f"The path {_files.short(source)} cannot be used: {error}.") from None
    if (
        path.suffix.lower() in _files.SUFFIXES
        or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source)
        or source.startswith(".")
        or (len(path.parts) == 2 and path.parent.is_dir())
    ):
        folder = path.parent
        there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, there, 3, 0.5)
        hint = f"close names there: {_shown(close)}" if close else f"it holds {_shown(there)}"
        raise DataError(
            f"There is no file {source!r}; "
            + (f"in its folder, {hint}." if there else "its folder is missing or empty too.")
        )
    return None


def _file_of(path: Path, split: str | None) -> Path:
    if not path.is_dir():
        return path
    there = sorted(p for p in path.iterdir() if p.suffix.lower() in _files.SUFFIXES)
    names = [_SHARD.sub("", p.stem) for p in there]
    match = [p for p, name in zip(there, names, strict=True) if name == split]
    if not match and split in _HELD_OUT:
        match = [p for p, name in zip(there, names, strict=True) if name in _HELD_OUT]
    if len(match) != 1:
        raise DataError(
            f"{path.name} is a folder: name one of its files by split=… (without suffix); "
            f"split={split!r} matches {len(match)} of {_shown([p.name for p in there])}."
        )
    return match[0]


def _hub_table(source: str, split: str) -> tuple[_files.Table, str]:
    try:
        hub = importlib.import_module("datasets")
    except ImportError:
        raise MissingPackageError(
            f"{source!r} is no file here; to load it from the Hugging Face hub: "
            'pip install "lora-privacy[hub]".'
        ) from None
    name, _, config = source.partition(":")
    try:  # the package itself obeys HF_HUB_OFFLINE and then uses its cache only
        rows = hub.load_dataset(name, config or None, split=split)
    except Exception as error:
        # Of many kinds: its own, those of the hub, of arrow, and of each format.
        offline = [n for n in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(n)]
        raise DataError(
            f"The hub data set {source!r} (split {split!r}) cannot be loaded: "
            f"{str(error).rstrip('.')}. A local file is given by its path with suffix."
            + (f" {offline[0]} is set: only what was fetched before is used." if offline else "")
        ) from error
    if len(rows) == 0:
        raise DataError(f"{source} (split {split!r}) is empty.")
    features = {column: getattr(kind, "names", None) for column, kind in rows.features.items()}
    table = _files.Table(
        where=source,
        names=tuple(rows.column_names),
        data=rows,
        lines=range(1, len(rows) + 1),
        unit="row",
        class_names={column: names for column, names in features.items() if names},
    )
    return table, f"{source} [{split}]"


def _shown(names: Sequence[str]) -> str:
    return (
        ", ".join(map(_files.short, names[:12])) + (", …" if len(names) > 12 else "") or "nothing"
    )
