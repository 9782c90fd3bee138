"""Loading from small files made here: what is read, and what every bad input says."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lora_privacy.data import load, tickets
from lora_privacy.errors import DataError, MissingPackageError

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a small file and return its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


PLAIN = "text\tlabel\ngood\tyes\nbad\tno\n"


def test_tickets_are_the_default() -> None:
    """Seed, split and limit reach the generator; columns are refused."""
    assert load("tickets", limit=20, seed=3) == tickets(20, seed=3)
    assert load("tickets", split="dev", limit=20) == tickets(20, seed=0, split="dev")
    assert len(load("tickets")) == 2_000
    with pytest.raises(ValueError, match="fixed columns"):
        load("tickets", text_columns="text")
    with pytest.raises(ValueError, match="split must be one of"):
        load("tickets", split="test")


def test_the_four_kinds_of_file_say_the_same(write: Write) -> None:
    """Oracle: the rows spelled out; a quote, a comma and a letter outside of ASCII survive."""
    files = [
        write("a.csv", 'id,text,label\n1,"He said ""no"", then left",b\n2,Çava,a\n'),
        write("a.tsv", 'id\ttext\tlabel\n1\tHe said "no", then left\tb\n2\tÇava\ta\n'),
        write("a.jsonl", '{"text": "He said \\"no\\", then left", "label": "b"}\n'
                         '{"text": "Çava", "label": "a"}\n'),
        write("a.json", '[{"text": "He said \\"no\\", then left", "label": "b"},'
                        ' {"text": "\\u00c7ava", "label": "a"}]'),
        write("b.txt", 'id;text;label\r\n1;"He said ""no"", then left";b\r\n2;Çava;a\r\n'),
    ]  # fmt: skip
    for path in files:
        data = load(path, delimiter=";" if path.suffix == ".txt" else None)
        assert data.texts == ('He said "no", then left', "Çava")
        assert data.labels == (1, 0)
        assert data.classes == ("a", "b")
        assert data.origin == path.name
        assert data.name == path.stem


def test_a_bare_quote_swallows_nothing_in_tsv(write: Write) -> None:
    """The same rows as CSV are refused with the line, not merged."""
    rows = [("a", '"open quote'), ("b", "next"), ("a", 'he said "hm" again')]
    tsv = write("q.tsv", "\n".join("\t".join(row) for row in rows))
    assert load(tsv, text_columns=1, label_column=0).texts == tuple(text for _, text in rows)
    with pytest.raises(DataError, match="row from line 1 is no valid CSV"):
        load(write("q.csv", "\n".join(",".join(row) for row in rows)), text_columns=1)


def test_odd_characters_do_not_break_lines(write: Write) -> None:
    """Python's splitlines would cut at U+2028 and form feed; a lone carriage return stays too."""
    path = write("u.tsv", "one\u2028two\t0\nthree\x0cfour\t1\nfive\rsix\t0\n")
    data = load(path, text_columns=0, label_column=1)
    assert data.texts == ("one\u2028two", "three\x0cfour", "five\rsix")


def test_windows_line_ends_leave_no_trace(write: Write) -> None:
    """In tab-separated files too, where the text may be the last column."""
    path = write("w.tsv", "label\ttext\r\na\tone\r\nb\ttwo\r\n")
    assert load(path).texts == ("one", "two")


def test_csv_line_numbers_count_lines_inside_quotes(write: Write) -> None:
    """The second row begins at line 4 of the file, not 3."""
    path = write("m.csv", 'text,label\n"two\nlines",a\n,b\n')
    with pytest.raises(DataError, match=r"1 empty texts of 2 \(line 4\)"):
        load(path)


def test_byte_order_mark_and_missing_last_newline(write: Write) -> None:
    """Neither becomes part of a name or a label."""
    data = load(write("bom.tsv", b"\xef\xbb\xbf" + PLAIN.strip().encode()))
    assert data.texts == ("good", "bad")


def test_whole_number_labels_sort_by_size(write: Write) -> None:
    """As text, "10" would come before "9"."""
    path = write("n.tsv", "".join(f"text {i}\t{i}\n" for i in (10, 9, 1, 10)))
    data = load(path, text_columns=0, label_column=1)
    assert data.classes == ("1", "9", "10")
    assert data.labels == (2, 1, 0, 2)
    path = write("n.jsonl", "".join(f'{{"text": "t", "label": {i}}}\n' for i in (10, 9, 1)))
    assert load(path).classes == ("1", "9", "10")


def test_columns_by_number_with_a_header(write: Write) -> None:
    """Names and numbers mix; ``header`` overrules the guess."""
    path = write("h.tsv", "sentiment\twords\nup\tgood\ndown\tbad\n")
    data = load(path, text_columns="words", label_column=0)
    assert data.texts == ("good", "bad")
    assert load(path, text_columns=1, label_column=0, header=True) == data
    assert load(path, text_columns=1, label_column=0, header=False).texts[0] == "words"


def test_text_without_labels(write: Write) -> None:
    """Naming the text column alone leaves the labels out, also where a column could be one."""
    assert load(write("p.tsv", PLAIN), text_columns="text").labels is None
    assert load(write("p.tsv", PLAIN), text_columns="text", classes=()).classes == ()


def test_dev_uses_the_classes_of_train(write: Write) -> None:
    """Same numbers as in training; an unseen label is named."""
    dev = write("dev.tsv", "text\tlabel\nx\tc\ny\tc\n")
    assert load(dev, classes=("a", "b", "c")).labels == (2, 2)
    with pytest.raises(
        DataError, match=r"label 'c' \(lines 2, 3\) is none of the classes 'a', 'b'"
    ):
        load(dev, classes=("a", "b"))


def test_a_folder_holds_splits(write: Write, tmp_path: Path) -> None:
    """One file per split, found by its stem."""
    write("train.tsv", PLAIN)
    write("dev.tsv", PLAIN)
    assert load(tmp_path, split="train").origin == "train.tsv"
    with pytest.raises(DataError, match=r"split='test' matches 0 of 'dev.tsv', 'train.tsv'"):
        load(tmp_path, split="test")
    assert load(tmp_path / "train.tsv", split="validation") == load(tmp_path, split="train")


BAD: list[tuple[str, str | bytes, dict[str, Any], str]] = [
    ("e.tsv", "", {}, "e.tsv is empty"),
    ("e.tsv", " \n\n", {}, "e.tsv is empty"),
    ("e.tsv", "text\tlabel\n", {}, "empty but for its header"),
    ("e.jsonl", "\n", {}, "e.jsonl is empty"),
    ("e.json", "[]", {}, "non-empty list"),
    ("e.json", '{"text": "a"}', {}, "non-empty list"),
    ("e.json", "[1]", {}, "item 1 must be an object"),
    ("e.jsonl", '{"text": "a"}\n{"text": \n', {}, "not valid JSON in line 2"),
    ("n.tsv", "good\tyes\nbad\tno\n", {}, "which column holds the text"),
    ("c.tsv", PLAIN, {"text_columns": "txt", "label_column": "label"},
     "no column 'txt'; did you mean 'text'.*'text', 'label'"),
    ("c.tsv", PLAIN, {"text_columns": "body"}, "no column 'body'.*line 1 holds.*by number"),
    ("c.tsv", PLAIN, {"text_columns": 2}, "no column 2. There are 'text', 'label'"),
    ("c.tsv", PLAIN, {"text_columns": -1}, "no column -1"),
    ("c.jsonl", '{"text": "a"}', {"text_columns": "body"}, "no column 'body'.*'text'"),
    ("d.tsv", "text\ttext\na\tb\n", {}, "names a column twice"),
    ("w.tsv", "text\tlabel\na\t0\nb\nc\t1\t2\nd\nb\nb\t0\n", {},
     r"line 1 has 2 columns, but 4 rows .*\(lines 3, 4, 5, …\)"),
    ("l.tsv", b"text\tlabel\ncaf\xe9\t0\n", {}, r"not UTF-8: byte 0xe9 at offset 14.*iconv"),
    ("l.tsv", b"\xef\xbb\xbftext\tlabel\ncaf\xe9\t0\n", {}, "at offset 17"),
    ("l.tsv", "text\tlabel\n".encode("utf-16"), {}, "UTF-16; convert"),
    ("z.tsv", b"text\tlabel\na\0b\t1\n", {}, "NUL byte at offset 12"),
    ("x.tsv", "text\tlabel\na\t0\n \t1\n\t1\nb\t1\n", {}, r"2 empty texts of 4 \(lines 3, 4\)"),
    ("y.tsv", "text\tlabel\na\t0\nb\t\n", {}, r"no usable label in 1 of 2 rows \(line 3\)"),
    ("y.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', {}, r"no usable label.*\(line 2\)"),
    ("y.jsonl", '{"text": "a", "label": 0.5}\n', {}, "text or a whole number"),
    ("t.jsonl", '{"text": "a"}\n{"body": "b"}\n', {}, r"must hold text, but line 2 holds.*None"),
    ("s.jsonl", '{"text": "\\ud83d"}\n', {}, "unpaired surrogate"),
    ("o.tsv", "text\tlabel\na\t1\nb\t1\n", {}, "all 2 rows have the label '1'"),
    ("m.tsv", "".join(f"{i % 2}\ttext {i}\n" for i in range(200)),
     {"text_columns": 0, "label_column": 1}, "200 different labels in 200 rows. Is it the text"),
    ("g.tsv", "words\tmood\n" + "good\t1\nbad\t0\n" * 5, {"text_columns": 0, "label_column": 1},
     "label 'mood' in line 1 occurs nowhere else.*header=True or header=False"),
    ("k.csv", 'text,label\na,0\n"b,1\nc,0\n', {}, "row from line 3 is no valid CSV"),
    ("i.json", '[{"tripleset": [["a", "b", "c"]], "annotations": [{}]}]', {},
     "item 1 lacks a tripleset"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "arguments", "match"), BAD)
def test_bad_file(
    write: Write, name: str, content: str | bytes, arguments: dict[str, Any], match: str
) -> None:
    """Each is refused with a message that says what and where."""
    with pytest.raises(DataError, match=match):
        load(write(name, content), **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("a.tsv", {"text_columns": ("text", "a", "b")}, ValueError, "one or two columns, got 3"),
        ("a.tsv", {"text_columns": True}, TypeError, "text_columns must be a name or a number"),
        ("a.tsv", {"delimiter": ",,"}, ValueError, "delimiter must be one character"),
        ("a.tsv", {"limit": 0}, ValueError, "limit must be at least 1"),
        ("a.tsv", {"text_columns": "text", "classes": ("a",)}, ValueError, "no label_column"),
        ("a.jsonl", {"header": True}, ValueError, "header and delimiter are for delimited"),
    ],
)
def test_bad_argument(
    write: Write, name: str, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    """Arguments are checked before they can mislead."""
    with pytest.raises(error, match=match):
        load(write(name, PLAIN), **arguments)


def test_no_delimiter_to_guess(write: Write) -> None:
    """Without suffix or tab the library does not guess."""
    with pytest.raises(ValueError, match="pass for example delimiter"):
        load(write("words.txt", "one line\nand another\n"), text_columns=0)


def test_missing_file_suggests_close_names(write: Write, tmp_path: Path) -> None:
    """Names of the folder, closest first."""
    write("train.tsv", PLAIN)
    with pytest.raises(DataError, match=r"close names there: 'train.tsv'"):
        load(tmp_path / "trian.tsv")
    with pytest.raises(DataError, match=r"it holds 'train.tsv'"):
        load(tmp_path / "xyzzy.csv")
    with pytest.raises(DataError, match="missing or empty too"):
        load(tmp_path / "nowhere" / "train.tsv")


def test_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is the command to run."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r'pip install "lora-privacy\[hub\]"'):
        load("owner/some-set")


class FakeHub(ModuleType):
    """Stands in for ``datasets``: records the call and answers with two columns."""

    def __init__(self, labels: list[int]) -> None:
        super().__init__("datasets")
        self.calls: list[tuple[str, str | None, str]] = []
        self._labels = labels

    def load_dataset(self, name: str, config: str | None, *, split: str) -> object:
        self.calls.append((name, config, split))
        if name == "owner/absent":
            raise FileNotFoundError("no such set in the cache.")
        columns = {"sentence": [f"text {i}" for i in range(len(self._labels))]}

        class Rows(dict[str, Any]):
            column_names = ("sentence", "label")
            features = {  # noqa: RUF012
                "sentence": SimpleNamespace(),
                "label": SimpleNamespace(names=["neg", "pos"]),
            }

            def __len__(self) -> int:
                return len(self["label"])

        return Rows(columns, label=self._labels)


def test_hub_names_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Id, config and split are passed on; numbers get the names of the set."""
    hub = FakeHub([1, 0, 1])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = load("owner/set:part", split="validation")
    assert hub.calls == [("owner/set", "part", "validation")]
    assert data.classes == ("neg", "pos")
    assert data.labels == (1, 0, 1)
    assert data.origin == "owner/set:part [validation]"
    assert load("single").origin == "single [train]"


def test_hub_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden labels, an unreachable set, and an empty split."""
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([-1, -1]))
    with pytest.raises(DataError, match=r"no usable label in 2 of 2 rows \(rows 1, 2\)"):
        load("owner/set", split="test")
    with pytest.raises(DataError, match="cannot be loaded: no such set in the cache"):
        load("owner/absent")
    with pytest.raises(ValueError, match="for delimited files"):
        load("owner/set", header=True)
    monkeypatch.setitem(sys.modules, "datasets", FakeHub([]))
    with pytest.raises(DataError, match="is empty"):
        load("owner/set")
