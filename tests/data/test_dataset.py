import hashlib
import json
import subprocess
import sys
from collections import Counter

import pytest

import lora_privacy.data as room
from lora_privacy.data import TextDataset
from lora_privacy.errors import DataError


def made(n: int = 10) -> TextDataset:
    """A labelled set of ``n`` short texts."""
    return TextDataset(
        name="made",
        texts=tuple(f"text {i}" for i in range(n)),
        labels=tuple(i % 2 for i in range(n)),
        classes=("a", "b"),
        origin="test",
    )


def test_public_names() -> None:
    """The list is a contract; each name resolves to the object of its module."""
    assert sorted(room.__all__) == dir(room)
    assert room.__all__ == [
        "LABEL_NOISE",
        "Secret",
        "TextDataset",
        "load",
        "plant_secrets",
        "tickets",
    ]
    for name in room.__all__:
        assert getattr(room, name) is not None


def test_data_needs_no_torch() -> None:
    """A fresh interpreter that made tickets has not loaded torch, pandas or datasets."""
    code = (
        "import sys; from lora_privacy.data import load; load('tickets', limit=5); "
        "print([m for m in ('torch', 'pandas', 'datasets', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_hash_is_recomputable_and_sees_every_field() -> None:
    """Oracle: the formula of the docstring, spelled out; each change of content moves the hash."""
    data = made(2)
    text = '[["text 0", "text 1"], null, [0, 1], ["a", "b"]]'
    assert data.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert json.loads(text)[0] == list(data.texts)
    fields = {"name": "x", "origin": "x"}
    same = TextDataset(texts=data.texts, labels=data.labels, classes=data.classes, **fields)
    assert same.sha256 == data.sha256
    others = [
        TextDataset(texts=("text 0", "text 2"), labels=(0, 1), classes=("a", "b"), **fields),
        TextDataset(texts=data.texts, labels=(1, 0), classes=("a", "b"), **fields),
        TextDataset(texts=data.texts, labels=(0, 1), classes=("a", "c"), **fields),
        TextDataset(texts=data.texts, pairs=("", ""), labels=(0, 1), classes=("a", "b"), **fields),
        TextDataset(texts=data.texts, **fields),
        TextDataset(texts=("text 0text 1", ""), **fields),
    ]
    assert len({data.sha256, *(other.sha256 for other in others)}) == 7


def test_take_is_a_subset_in_order_and_leaves_no_trace_in_global_state() -> None:
    """Same seed, same subset; another seed, another; the examples keep their labels."""
    data = made(200)
    one, two = data.take(50, seed=1), data.take(50, seed=1)
    assert one == two
    assert one.texts != data.take(50, seed=2).texts
    places = [data.texts.index(text) for text in one.texts]
    assert places == sorted(set(places))
    assert one.labels == tuple(data.labels[i] for i in places)  # type: ignore[index]
    assert one.origin == "test (50 of 200, seed=1)"
    assert data.take(200, seed=3).texts == data.texts


def test_take_is_uniform() -> None:
    """Each of 10 examples is in a subset of 3 with probability 0.3.

    1,000 seeds: χ² with 9 degrees of freedom, level 1e-4 (33.7, before the factor 0.7 by which
    sampling without replacement narrows it). Taking the first three must be rejected.
    """

    def statistic(counts: Counter[str]) -> float:
        return sum((counts[f"text {i}"] - 300) ** 2 / 300 for i in range(10))

    drawn = Counter(text for seed in range(1_000) for text in made().take(3, seed).texts)
    first = Counter(text for _ in range(1_000) for text in made().texts[:3])
    assert statistic(drawn) < 33.7
    assert statistic(first) > 33.7


def test_split_is_a_partition() -> None:
    """Each example lies in exactly one part, and the seed decides which."""
    data = made(100)
    first, second = data.split(0.3, seed=0)
    assert (len(first), len(second)) == (30, 70)
    assert sorted(first.texts + second.texts) == sorted(data.texts)
    assert first.texts != data.split(0.3, seed=1)[0].texts
    assert first.classes == data.classes


@pytest.mark.parametrize("n", [0, 11])
def test_take_refuses_what_is_not_there(n: int) -> None:
    """No empty subset, and none larger than the set."""
    with pytest.raises(ValueError, match="n must"):
        made().take(n, seed=0)


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan"), 0.01])
def test_split_refuses_an_empty_part(share: float) -> None:
    """NaN and a share that rounds to nothing included."""
    with pytest.raises(ValueError, match="share"):
        made().split(share, seed=0)


def test_select_refuses_a_negative_index() -> None:
    """A negative index would silently count from the end."""
    with pytest.raises(ValueError, match="0 … 9"):
        made().select([-1])


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"texts": ()}, ValueError, "texts must not be empty"),
        ({"texts": ["a"]}, TypeError, "texts must be a tuple"),
        ({"texts": ("a",), "pairs": ("b", "c")}, ValueError, "1 texts, 2 pairs"),
        ({"texts": ("a",), "labels": (0, 1), "classes": ("x",)}, ValueError, "2 labels"),
        ({"texts": ("a",), "labels": (1,), "classes": ("x",)}, ValueError, "got 1 … 1"),
        ({"texts": ("a",), "labels": (-1,), "classes": ("x",)}, ValueError, "got -1"),
        ({"texts": ("a",), "classes": ("x",)}, ValueError, "classes must be empty"),
    ],
)
def test_a_set_that_does_not_fit_together_is_refused(
    fields: dict[str, object], error: type[Exception], match: str
) -> None:
    """The message says which field, and what came."""
    with pytest.raises(error, match=match):
        TextDataset(name="x", origin="x", **fields)  # type: ignore[arg-type]


def test_missing_labels_are_named() -> None:
    """The message names the set, its origin and the argument to pass."""
    unlabelled = TextDataset(name="notes", texts=("a",), origin="notes.tsv")
    with pytest.raises(DataError, match=r"notes \(notes.tsv\) has no labels.*label_column"):
        unlabelled.require_labels()
    assert made(2).require_labels() == (0, 1)
