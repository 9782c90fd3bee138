import re
from collections import Counter
from dataclasses import replace

import pytest
from scipy import stats

from lora_privacy.data import LABEL_NOISE, TextDataset, plant_secrets, tickets
from lora_privacy.data.synthetic import _grammar  # the words, to find the true class again
from lora_privacy.errors import DataError


def sentences(data: TextDataset) -> set[str]:
    """The sentences of a set, letters and digits only."""
    parts = (part for text in data.texts for part in re.split(r"(?<=[.!?])\s+", text))
    return {re.sub(r"\W", "", part.casefold()) for part in parts}


@pytest.mark.parametrize("seeds", [(0, 0), (0, 7), (3, 2)])
def test_train_and_dev_share_no_sentence(seeds: tuple[int, int]) -> None:
    """Case and punctuation aside, and whatever the seeds; two train sets do share some."""
    train = sentences(tickets(2_000, seed=seeds[0]))
    assert train.isdisjoint(sentences(tickets(800, seed=seeds[1], split="dev")))
    assert not train.isdisjoint(sentences(tickets(800, seed=99)))


def test_the_default_is_what_it_was() -> None:
    """Pinned content: published numbers rest on it, so a change of the grammar must be seen."""
    train, dev = tickets(500, seed=0), tickets(500, seed=0, split="dev")
    assert train.sha256 == "6decd556287b2d29fb3dc9766d249b5abe1fb790f70b1e6aae80dffa2801bdb5"
    assert dev.sha256 == "87b419c6fe31c3999b094ca3781c08ae29a4164c93784e740b76eec42092b358"


def test_tickets_are_distinct_repeatable_and_nested() -> None:
    """A smaller set begins a larger one; another seed differs."""
    data = tickets(1_000, seed=4)
    assert len(set(data.texts)) == 1_000
    assert tickets(300, seed=4).texts == data.texts[:300]
    assert tickets(300, seed=4).labels == data.labels[:300]  # type: ignore[index]
    assert set(data.texts[:300]) != set(tickets(300, seed=5).texts)


def test_classes_are_balanced_and_texts_short() -> None:
    """Majority near 1/8; 98 % of the tickets have 8 to 48 words and no slot is left open."""
    data = tickets(4_000, seed=1)
    assert len(data.classes) == 8
    assert max(Counter(data.labels).values()) / 4_000 < 0.16
    lengths = sorted(len(text.split()) for text in data.texts)
    assert lengths[40] >= 8
    assert lengths[2_000] <= 32
    assert lengths[-40] <= 48
    assert not any("{" in text or "}" in text for text in data.texts)


def test_words_alone_do_not_decide_the_class() -> None:
    """TF-IDF and logistic regression: far above chance, yet clearly short of the 98 % ceiling."""
    text = pytest.importorskip("sklearn.feature_extraction.text")
    linear = pytest.importorskip("sklearn.linear_model")
    train, dev = tickets(1_500, seed=0), tickets(600, seed=0, split="dev")
    words = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = linear.LogisticRegression(C=30, max_iter=300)
    model.fit(words.fit_transform(train.texts), train.labels)
    assert 0.65 < model.score(words.transform(dev.texts), dev.labels) < 0.88


def test_label_noise_is_as_documented() -> None:
    """Oracle: the templates themselves, searched in tickets of one sentence without a typo.

    Binomial test at level 1e-4 on about two thousand such tickets; 5 % noise must be rejected.
    """
    data = tickets(20_000, seed=3)
    patterns = {
        topic: re.compile(
            "|".join(re.sub(r"\\{\w+\\}", "[^.!?]+", re.escape(t)) for t in templates), re.I
        )
        for topic, templates in _grammar.REQUESTS.items()
    }
    right = wrong = 0
    for text, label in zip(data.texts, data.require_labels(), strict=True):
        truth = [topic for topic, pattern in patterns.items() if pattern.fullmatch(text)]
        if len(truth) == 1:
            right += truth[0] == data.classes[label]
            wrong += truth[0] != data.classes[label]
    assert right + wrong > 1_500
    assert stats.binomtest(wrong, right + wrong, LABEL_NOISE).pvalue > 1e-4
    assert stats.binomtest(wrong, right + wrong, 0.05).pvalue < 1e-4


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": 0, "seed": 0}, "size must be at least 1"),
        ({"size": 5, "seed": -1}, "seed must be at least 0"),
        ({"size": 5, "seed": 0, "split": "test"}, "split must be one of 'train', 'dev'"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], match: str) -> None:
    """Size, seed and split are checked."""
    with pytest.raises(ValueError, match=match):
        tickets(**arguments)  # type: ignore[arg-type]


def test_secrets_are_where_they_say() -> None:
    """Heads: in the set, once, at the index and with the label; tails: nowhere."""
    base = tickets(200, seed=0)
    data, secrets = plant_secrets(base, 60, seed=1)
    assert data.texts[:200] == base.texts
    assert data.require_labels()[:200] == base.labels
    assert data.origin.startswith(base.origin + " + ")
    assert len(data) == 200 + sum(secret.included for secret in secrets)
    for secret in secrets:
        assert data.texts.count(secret.text) == secret.included
        assert re.search(r"\b\d\d-\d\d-\d\d-\d\d\b", secret.text)
        if secret.index is not None:
            assert data.texts[secret.index] == secret.text
            assert data.require_labels()[secret.index] == secret.label
        assert secret.included == (secret.index is not None)
    assert len({secret.template for secret in secrets}) == 60
    assert plant_secrets(base, 60, seed=1) == (data, secrets)


def test_coins_and_codes_are_uniform() -> None:
    """Coins: binomial test at 1e-4 that p = 1/2 (p = 0.4 rejected). Digits: χ² at 1e-4."""
    _, secrets = plant_secrets(tickets(10, seed=0), 1_600, seed=2)
    heads = sum(secret.included for secret in secrets)
    assert stats.binomtest(heads, 1_600).pvalue > 1e-4
    assert stats.binomtest(heads, 1_600, 0.4).pvalue < 1e-4
    digits = Counter("".join(secret.code for secret in secrets).replace("-", ""))
    assert stats.chisquare([digits[d] for d in "0123456789"]).pvalue > 1e-4
    labels = Counter(secret.label for secret in secrets)
    assert stats.chisquare([labels[i] for i in range(8)]).pvalue > 1e-4


def test_alternatives_are_other_codes_in_the_same_sentence() -> None:
    """Distinct, and never the secret itself."""
    _, secrets = plant_secrets(tickets(10, seed=0), 1, seed=0)
    others = secrets[0].alternatives(500, seed=3)
    assert len(set(others)) == 500
    assert secrets[0].text not in others
    head, tail = secrets[0].template.split("{code}")
    assert all(text.startswith(head) and text.endswith(tail) for text in others)
    assert secrets[0].space == 10**8
    tiny = replace(secrets[0], code="00-00-00-07", space=10)
    assert len(set(tiny.alternatives(9, seed=0))) == 9
    assert tiny.text not in tiny.alternatives(9, seed=0)
    with pytest.raises(ValueError, match="count must be at least 1"):
        secrets[0].alternatives(0, seed=0)


def test_secrets_in_unlabelled_text() -> None:
    """No label is made up for language modelling."""
    base = TextDataset(name="x", texts=("some text",), origin="x")
    data, secrets = plant_secrets(base, 20, seed=0)
    assert data.labels is None
    assert all(secret.label is None for secret in secrets)


def test_secrets_refuse_pairs_and_too_many() -> None:
    """The message says what must hold."""
    pairs = TextDataset(name="x", texts=("a",), pairs=("b",), origin="x")
    with pytest.raises(DataError, match="single sentences: ask for no secrets"):
        plant_secrets(pairs, 2, seed=0)
    with pytest.raises(ValueError, match="name of its own"):
        plant_secrets(tickets(2, seed=0), 1_601, seed=0)
