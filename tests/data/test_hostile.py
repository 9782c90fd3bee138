"""Broken and malicious files: the right text, or a named error with the place; nothing else."""

import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_privacy.data import TextDataset, load
from lora_privacy.errors import DataError, MissingPackageError

HOSTILE = (
    "<script>alert(1)</script>",
    "\\input{/etc/passwd} \\write18{rm -rf} $x_1^2$ % #",
    "right\u202eto left\u202c",
    "\x1b[31mred\x07\x08",
    "=cmd|'/c calc'!A1",
    "{{ 7 * 7 }} {% raw %} %s %(a)s {0}",
    "e\u0301\u200d\ufeff \U0001f468\u200d\U0001f469",
    "\" ' `",
    "a,b;c|d",
)
# Neither half characters nor NUL, which are refused; no blanks at the ends, which labels lose.
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
).filter(lambda text: text == text.strip() != "")


def _load(name: str, content: bytes, **arguments: Any) -> TextDataset:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return load(path, **arguments)


def _jsonl(rows: list[tuple[str, str]]) -> bytes:
    lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
    return "\n".join(lines).encode()


def _csv(rows: list[tuple[str, str]], end: str = "\r\n") -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(
        [("text", "label"), *rows]
    )
    return out.getvalue().encode()


def _tsv(rows: list[tuple[str, str]]) -> bytes:
    return "\n".join("\t".join(row) for row in [("text", "label"), *rows]).encode()


@pytest.mark.parametrize(
    ("name", "write"), [("a.csv", _csv), ("a.tsv", _tsv), ("a.jsonl", _jsonl)]
)
def test_hostile_text_and_class_names_survive(name: str, write: Any) -> None:
    """Verbatim: whoever shows them escapes them."""
    rows = [(text, label) for text in HOSTILE for label in HOSTILE[:2]]
    rows = [(text, HOSTILE[i % len(HOSTILE)]) for i, (text, _) in enumerate(rows)]
    data = _load(name, write(rows))
    assert data.texts == tuple(text for text, _ in rows)
    assert set(data.classes) == set(HOSTILE)
    assert [data.classes[label] for label in data.require_labels()] == [label for _, label in rows]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=5),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_what_csv_and_json_write_is_what_is_read(rows: list[tuple[str, str]], end: str) -> None:
    """Oracle: the rows themselves, also with line ends, quotes and separators inside of them."""
    classes = sorted({label for _, label in rows})
    for name, content in (("a.csv", _csv(rows, end)), ("a.jsonl", _jsonl(rows))):
        data = _load(name, content, text_columns="text", label_column="label", classes=classes)
        assert data.texts == tuple(text for text, _ in rows)
        assert data.labels == tuple(classes.index(label) for _, label in rows)


PIECES = st.lists(
    st.sampled_from(
        [b"text", b"label", b"\t", b",", b"\n", b"\r\n", b"\r", b'"', b"a", b"1", b"-2", b" ",
         b"\0",
         b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\xc3\xa9", b"{", b"}", b"[", b"]", b":", b"null",
         b'{"text": "a", "label": 1}', b'"\\ud83d"', b"1e999", b"9" * 5000, b"text\tlabel\n",
         b"text,label\n", b"[" * 2000, "٣²".encode(), b"tripleset", b"annotations", b"PAR1"]
    ),
    max_size=12,
).map(b"".join)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    content=PIECES | st.binary(max_size=40),
    name=st.sampled_from(["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"]),
    arguments=st.sampled_from(
        [{}, {"text_columns": 0}, {"text_columns": 0, "label_column": 1}, {"text_columns": "text"}]
    ),
)
def test_any_bytes_give_data_or_a_named_error(
    content: bytes, name: str, arguments: dict[str, Any]
) -> None:
    try:
        data = _load(name, content, **arguments)
    except (DataError, MissingPackageError) as error:
        str(error).encode()  # can be printed
    else:
        assert all(text.strip() for text in data.texts)
        json.dumps([data.texts, data.classes], ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.tsv", b"text\tlabel\na\t1\nb\xff\t2", r"byte 0xff at offset 16 \(line 3\)"),
        ("a.tsv", b"text\tlabel\na\0\t1", r"NUL byte at offset 12 \(line 2\)"),
        ("a.tsv", "text\n".encode("utf-32"), "is UTF-32; convert it: iconv -f UTF-32"),
        ("a.tsv", b"text\tlabel\na\t1\n\nb\t2", r"another number \(line 3\)"),
        ("a.csv", b"text,label\na,1\n\nb,2", r"another number \(line 3\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"}', "not valid JSON in line 2"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 10**5, "nests lists or objects too deeply"),
        ("a.json", b'{"a":' * 10**5, "nests lists or objects too deeply"),
        ("a.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b", "label": "\\ud83d"}',
         "line 2 holds an unpaired surrogate"),
        ("a.jsonl", b'{"x": 1}\n{"text": "b"}', r"must hold text, but line 1 holds"),
        ("a.jsonl", b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}", r"line 1 holds .*\[\[\["),
        ("a.csv", b'text,label\n"a\rb\nc",1\n"d,2', "row from line 4 is no valid CSV"),
    ],
)  # fmt: skip
def test_the_place_of_what_is_broken(name: str, content: bytes, match: str) -> None:
    with pytest.raises(DataError, match=match) as raised:
        _load(name, content)
    assert len(str(raised.value)) < 1_000


@pytest.mark.parametrize("name", ["x" * 5_000, "a\0b.csv", "~nobody-here/a.csv", "a\nb"])
def test_a_path_that_cannot_be_is_named(name: str) -> None:
    with pytest.raises(DataError):
        load(name)


def test_a_file_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    """It would break every report that names its data."""
    path = tmp_path / os.fsdecode(b"caf\xe9.csv")
    path.write_text("text,label\na,1\nb,2\n")
    with pytest.raises(DataError, match="cannot be used"):
        load(path)


def test_numbers_of_any_length_are_labels() -> None:
    """Python refuses to make a number of 5,000 digits; as names they sort as text."""
    long = "9" * 5_000
    assert _load("a.tsv", f"text\tlabel\na\t1\nb\t{long}".encode()).classes == ("1", long)


def test_long_and_many() -> None:
    """A text of a million characters, at which csv alone gives up, and 100,000 rows."""
    long = "word " * 200_000 + "end"
    limit = csv.field_size_limit()
    for name, write in (("a.csv", _csv), ("a.tsv", _tsv), ("a.jsonl", _jsonl)):
        assert _load(name, write([(long, "a"), ("b", "b")])).texts == (long, "b")
    assert csv.field_size_limit() == limit
    rows = [(f"text number {i}", str(i % 3)) for i in range(100_000)]
    start = time.process_time()
    for name, write in (("a.csv", _csv), ("a.tsv", _tsv), ("a.jsonl", _jsonl)):
        data = _load(name, write(rows))
        assert len(data) == 100_000
        assert data.texts[-1] == "text number 99999"
    assert time.process_time() - start < 20


def test_a_folder_finds_the_held_out_split_under_its_other_names(tmp_path: Path) -> None:
    for name in ("train-00000-of-00001.tsv", "dev.tsv"):
        (tmp_path / name).write_bytes(_tsv([("a", "1"), ("b", "2")]))
    assert load(tmp_path, split="validation").origin == "dev.tsv"
    assert load(tmp_path, split="train").origin == "train-00000-of-00001.tsv"
    (tmp_path / "val.csv").write_bytes(_csv([("a", "1"), ("b", "2")]))
    assert load(tmp_path, split="val").origin == "val.csv"
    with pytest.raises(DataError, match="'validation' matches 2 of"):
        load(tmp_path, split="validation")


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingPackageError, match="pip install pyarrow"):
        load(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="for delimited files"):
        load(tmp_path / "a.parquet", header=True)


def test_parquet(tmp_path: Path) -> None:
    """Oracle: the columns written; categories, numbers and an unused column beside the text."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow comes with the extra hub")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "label=7"  # a name that readers of whole data sets take for a column
    folder.mkdir()
    path = folder / "a.parquet"

    def write(texts: list[str | None], **columns: Any) -> Path:
        parquet.write_table(arrow.table({"text": texts, **columns}), path)
        return path

    texts: list[str | None] = [*HOSTILE]
    kinds = arrow.array([str(i % 3) for i in range(len(texts))]).dictionary_encode()
    vectors = [[0.5] * 3 for _ in texts]
    data = load(write(texts, label=kinds, vector=vectors))
    assert data.texts == HOSTILE
    assert data.labels == tuple(i % 3 for i in range(len(texts)))
    assert load(write(texts, label=[3, 4, 5] * 3), text_columns=0, label_column=1).classes == (
        "3", "4", "5"
    )  # fmt: skip
    with pytest.raises(DataError, match="must hold text, but row 2 holds"):
        load(write(["a", None], label=[1, 2]))
    with pytest.raises(DataError, match="is empty"):
        load(write([], label=[]))
    path.write_bytes(b"PAR1" + b"\xff" * 100 + b"PAR1")
    with pytest.raises(DataError, match="no readable Parquet file"):
        load(path)


@pytest.mark.parametrize("error", [RuntimeError("odd"), KeyError("odd"), OSError("odd")])
def test_whatever_the_hub_raises_is_named(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    hub = ModuleType("datasets")
    monkeypatch.setattr(hub, "load_dataset", fail, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(DataError, match=r"cannot be loaded: .*odd.*HF_DATASETS_OFFLINE is set"):
        load("someone/some-set")


_OFFLINE = """
import socket

def refuse(*_, **__):
    raise SystemExit("the network was tried")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

from lora_privacy.data import load
from lora_privacy.errors import DataError, MissingPackageError

for name in ("someone/no-such-set", "no-such-set:part"):
    try:
        load(name, split="train")
    except MissingPackageError as error:
        assert "lora-privacy[hub]" in str(error), error
        print("named")
    except DataError as error:
        assert "HF_HUB_OFFLINE is set" in str(error), error
        print("named")
"""


def test_a_hub_id_offline_tries_no_network(tmp_path: Path) -> None:
    """With the package that loads it, and without."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _OFFLINE],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["named", "named"], done.stderr


def test_a_real_hub_table_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the rows; loaded from local files by the package itself, so that names are kept."""
    datasets = pytest.importorskip("datasets", reason="the extra hub is not installed")
    (tmp_path / "train.jsonl").write_bytes(_jsonl([("good", "1"), ("bad", "0")]))
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    plain = datasets.load_dataset

    def local(_: str, __: str | None, *, split: str) -> object:
        files = str(tmp_path / f"{split}.jsonl")
        options = {"split": split, "features": features, "cache_dir": str(tmp_path / "cache")}
        return plain("json", data_files={split: files}, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    data = load("someone/some-set")
    assert (data.texts, data.labels, data.classes) == (("good", "bad"), (1, 0), ("no", "yes"))
    with pytest.raises(DataError, match="cannot be loaded"):
        load("someone/some-set", split="absent")
