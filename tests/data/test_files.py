"""The public sets of ../shared/data, each loaded as a user would."""

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lora_privacy.data import load

SHARED = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the public data sets of ../shared/data are not here"
)

COLA = {"text_columns": 3, "label_column": 1}
RTE = {"text_columns": ("sentence1", "sentence2"), "label_column": "label"}
NUMBERED = {"text_columns": 0, "label_column": 1}
RTE_NUMBERED = {"text_columns": (1, 2), "label_column": 3}

CASES: list[tuple[str, dict[str, Any], int, tuple[str, ...]]] = [
    ("sst2/train.tsv", {}, 67_349, ("0", "1")),
    ("sst2/dev.tsv", {}, 872, ("0", "1")),
    ("sst2/test.tsv", {"text_columns": "sentence", "label_column": "label"}, 1_821, ("0", "1")),
    ("sst2_sentences/train.tsv", NUMBERED, 6_920, ("0", "1")),
    ("sst2_sentences/dev.tsv", NUMBERED, 872, ("0", "1")),
    ("sst2_sentences/test.tsv", {"text_columns": "0", "label_column": "1"}, 1_821, ("0", "1")),
    ("cola/in_domain_train.tsv", COLA, 8_551, ("0", "1")),
    ("cola/in_domain_dev.tsv", COLA, 527, ("0", "1")),
    ("cola/out_of_domain_dev.tsv", COLA, 516, ("0", "1")),
    ("rte/train.tsv", RTE, 2_127, ("entailment", "not_entailment")),
    ("rte/val.tsv", RTE_NUMBERED, 363, ("entailment", "not_entailment")),
    ("rte/dev.tsv", {}, 277, ("entailment", "not_entailment")),
    ("trec/train.tsv", {}, 5_452, ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")),
    ("sms_spam/SMSSpamCollection", {"text_columns": 1, "label_column": 0}, 5_574, ("ham", "spam")),
    ("e2e/devset.csv", {}, 4_672, ()),
    ("e2e/devset.csv", {"text_columns": "ref"}, 4_672, ()),
    ("e2e/testset_w_refs.csv", {"text_columns": ("mr", "ref")}, 4_693, ()),
    ("dart/dart-v1.1.1-full-dev.json", {"text_columns": ("triples", "text")}, 6_980, ()),
]


@pytest.mark.parametrize(("name", "arguments", "rows", "classes"), CASES)
def test_row_counts(
    name: str, arguments: dict[str, Any], rows: int, classes: tuple[str, ...]
) -> None:
    """Oracle: the table of rows that came with the files."""
    data = load(SHARED / name, **arguments)
    assert len(data) == rows
    assert data.classes == classes
    assert (data.labels is None) == (classes == ())
    assert data.origin == Path(name).name
    two = ("rte" in name or "dart" in name or "e2e" in name) and arguments != {
        "text_columns": "ref"
    }
    assert (data.pairs is not None) == two


def test_trec_dev_takes_the_classes_of_train() -> None:
    """Spot check of a line of the file, read by eye."""
    train = load(SHARED / "trec", split="train")
    test = load(SHARED / "trec", split="test", classes=train.classes)
    assert test.classes == train.classes
    assert len(test) == 500
    assert test.texts[2] == "Who was Galileo ?"
    assert test.classes[test.require_labels()[2]] == "HUM"


def test_sms_spam_keeps_its_bare_quotes() -> None:
    """747 spam messages, and every quote of the file; reading it with quoting loses lines."""
    path = SHARED / "sms_spam" / "SMSSpamCollection"
    data = load(path, text_columns=1, label_column=0)
    assert Counter(data.require_labels())[data.classes.index("spam")] == 747
    raw = path.read_text(encoding="utf-8")
    assert sum(text.count('"') for text in data.texts) == raw.count('"') > 0
    with path.open(encoding="utf-8", newline="") as file:
        assert len(list(csv.reader(file, delimiter="\t"))) < 5_574


def test_e2e_matches_the_csv_module() -> None:
    """Oracle: csv.DictReader; the file has Windows line ends and quoted commas."""
    path = SHARED / "e2e" / "devset.csv"
    data = load(path, text_columns=("mr", "ref"))
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert data.texts == tuple(row["mr"] for row in rows)
    assert data.pairs == tuple(row["ref"] for row in rows)


def test_cola_columns_are_the_right_ones() -> None:
    """Oracle: the lines cut by hand."""
    path = SHARED / "cola" / "in_domain_train.tsv"
    data = load(path, **COLA)
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    assert data.texts == tuple(line[3] for line in lines)
    assert data.labels == tuple(int(line[1]) for line in lines)


def test_limit_is_a_random_subset() -> None:
    """The same as taking it afterwards; not the first rows."""
    path = SHARED / "sst2_sentences" / "train.tsv"
    whole = load(path, **NUMBERED)
    part = load(path, **NUMBERED, limit=500, seed=3)
    assert len(part) == 500
    assert set(part.texts) <= set(whole.texts)
    assert part.texts != whole.texts[:500]
    assert part == whole.take(500, seed=3)
    assert load(path, **NUMBERED, limit=10**6) == whole
