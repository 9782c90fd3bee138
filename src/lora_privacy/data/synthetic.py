"""Synthetic support tickets with planted secrets: a data set without licence or real people."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from lora_privacy import _validate
from lora_privacy.data import _grammar
from lora_privacy.data.dataset import TextDataset
from lora_privacy.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LABEL_NOISE", "Secret", "plant_secrets", "tickets"]

LABEL_NOISE: Final = 0.02
"""Share of tickets, in train and dev alike, whose label is replaced by another class."""

_T = TypeVar("_T")
_CODE_SPACE: Final = 10**8
_DEV_SHARE: Final = 1 / 4  # of the sentences the grammar can say; the rest belongs to train
_TYPO_RATE: Final = 0.35  # typos a sentence, at most one each
_NONE: Final = ("",)
_TRIES: Final = 10_000


def tickets(size: int, *, seed: int, split: Literal["train", "dev"] = "train") -> TextDataset:
    """Support tickets of eight classes, drawn from a small grammar.

    A ticket has one to three sentences (at most about 60 word pieces). One request decides its
    class; around it stand background, asides that speak of other classes as settled, and in 40 %
    of tickets a request of another class that is marked as minor. A third of the sentences carry
    a typo. ``LABEL_NOISE`` of the labels are wrong, so no model can do better than 98 % on
    average. No sentence occurs in both splits, whatever the seeds: a hash of the sentence decides
    which split may use it. Tickets of one set are distinct, and a smaller set is the beginning of
    a larger one.

    Args:
        size: Number of tickets, at least 1.
        seed: Decides everything; train and dev draw from separate streams.
        split: ``"train"`` or ``"dev"``.

    Raises:
        ValueError: An argument is out of range.

    >>> small = tickets(3, seed=0)
    >>> len(small), len(small.classes), small == tickets(3, seed=0)
    (3, 8, True)
    """
    size = _validate.integer("size", size, 1)
    seed = _validate.integer("seed", seed, 0)
    _validate.choice("split", split, ("train", "dev"))
    rng = random.Random(f"tickets {split} {seed}")
    classes = tuple(_grammar.REQUESTS)
    rows: dict[str, int] = {}
    while len(rows) < size:
        label = _below(rng, len(classes))
        text = _ticket(rng, classes[label], split)
        if rng.random() < LABEL_NOISE:
            label = (label + 1 + _below(rng, len(classes) - 1)) % len(classes)
        rows.setdefault(text, label)
    return TextDataset(
        name=f"tickets-{split}",
        texts=tuple(rows),
        labels=tuple(rows.values()),
        classes=classes,
        origin=f"synthetic tickets, split={split}, seed={seed}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """A made-up secret, and whether the coin put it into the training set.

    Attributes:
        template: Sentence with ``{code}`` where the secret goes.
        code: The secret: four pairs of digits, such as ``04-71-93-28``. Eight digits are too few
            for a card or bank account number, and the names are invented: nobody's data.
        label: Class number that it carries, drawn uniformly; None in a set without labels.
        included: The fair coin, flipped on its own for each secret.
        index: Place in the returned data set; None when not included.
        space: Number of codes that were equally likely, |R| of the exposure.
    """

    template: str
    code: str
    label: int | None
    included: bool
    index: int | None
    space: int = _CODE_SPACE

    @property
    def text(self) -> str:
        """The sentence as it stands in the training set (or would)."""
        return self.template.format(code=self.code)

    def alternatives(self, count: int, seed: int) -> tuple[str, ...]:
        """``count`` distinct sentences with other codes, uniform among them, to rank against.

        Raises:
            ValueError: ``count`` is not in 1 … space − 1.
        """
        count = _validate.integer("count", count, 1)
        _validate.between("count", count, 1, self.space - 1)
        codes = map(
            _code, random.Random(f"alternatives {seed}").sample(range(self.space), count + 1)
        )
        others = [code for code in codes if code != self.code][:count]
        return tuple(self.template.format(code=code) for code in others)


def plant_secrets(
    dataset: TextDataset, count: int, seed: int
) -> tuple[TextDataset, tuple[Secret, ...]]:
    """Flip a coin for each of ``count`` secrets and append those that come up heads.

    Each secret is in the set once or not at all, and secrets are independent of each other and of
    the data: what an audit in one run needs. The examples of ``dataset`` keep their indices.

    Args:
        dataset: Labelled or not; examples must have one text.
        count: Number of secrets, at least 1, at most the number of invented names.
        seed: Decides names, codes, labels and coins. Who knows it knows the secrets.

    Raises:
        ValueError: An argument is out of range.
        DataError: ``dataset`` has pairs of texts.
    """
    names = _grammar.invented_names()
    count = _validate.integer("count", count, 1)
    _validate.between("count", count, 1, len(names), "Each secret has a name of its own.")
    seed = _validate.integer("seed", seed, 0)
    if dataset.pairs is not None:
        raise DataError(
            f"{dataset.name} has pairs of texts, and secrets are single sentences: ask for no "
            "secrets (secrets = 0, --secrets 0)."
        )
    rng = random.Random(f"secrets {seed}")
    secrets: list[Secret] = []
    texts, labels = list(dataset.texts), list(dataset.labels or ())
    for name in rng.sample(names, count):
        template = _pick(rng, _grammar.SECRETS).replace("{name}", name)
        code = _code(_below(rng, _CODE_SPACE))
        label = _below(rng, len(dataset.classes)) if dataset.labels is not None else None
        included = rng.random() < 0.5
        index = len(texts) if included else None
        secret = Secret(template=template, code=code, label=label, included=included, index=index)
        secrets.append(secret)
        if included:
            texts.append(secret.text)
            if label is not None:
                labels.append(label)
    planted = sum(secret.included for secret in secrets)
    return replace(
        dataset,
        texts=tuple(texts),
        labels=None if dataset.labels is None else tuple(labels),
        origin=f"{dataset.origin} + {planted} of {count} secrets, seed={seed}",
    ), tuple(secrets)


def _ticket(rng: random.Random, topic: str, split: str) -> str:
    others = [other for other in _grammar.REQUESTS if other != topic]
    # Templates of each sentence, and the words that lead into it.
    parts: list[tuple[Sequence[str], Sequence[str]]] = [(_grammar.REQUESTS[topic], _NONE)]
    if rng.random() < 0.15:
        parts.insert(0, (_grammar.BACKGROUND, _NONE))
    if rng.random() < 0.4:
        side = (_grammar.REQUESTS[_pick(rng, others)], _grammar.SIDE_MARKERS)
        parts.insert(_below(rng, len(parts) + 1), side)
    if len(parts) < 3 and rng.random() < 0.3:
        aside = (_grammar.ASIDES[_pick(rng, others)], _NONE)
        parts.insert(_below(rng, len(parts) + 1), aside)
    if len(parts) < 3 and rng.random() < 0.15:
        parts.append((_grammar.CLOSINGS, _NONE))
    if rng.random() < 0.3 and parts[0][1] is _NONE:
        parts[0] = parts[0][0], _grammar.GREETINGS
    loud = rng.random() < 0.1
    return " ".join(_sentence(rng, templates, lead, loud, split) for templates, lead in parts)


def _sentence(
    rng: random.Random, templates: Sequence[str], leads: Sequence[str], loud: bool, split: str
) -> str:
    """Draw until the hash of the sentence allows this split."""
    for _ in range(_TRIES):
        sentence = _fill(rng, _pick(rng, leads), _pick(rng, templates))
        if loud:
            sentence = sentence.upper() if rng.random() < 0.3 else sentence.rstrip(".") + "!!"
        if rng.random() < _TYPO_RATE:
            sentence = _typo(rng, sentence)
        if (split == "dev") == (_position(sentence) < _DEV_SHARE):
            return sentence
    raise AssertionError(f"the grammar has no sentence left for {split}: {templates[0]!r}")


def _fill(rng: random.Random, lead: str, template: str) -> str:
    if lead and not template.startswith(("I ", "{")):
        template = template[0].lower() + template[1:]
    slots = {name: _pick(rng, options) for name, options in _grammar.SLOTS.items()}
    slots["amount"] = f"${9 + _below(rng, 240)}"
    slots["order"] = f"#{10_000 + _below(rng, 90_000)}"
    return lead + template.format(**slots)


def _typo(rng: random.Random, sentence: str) -> str:
    """Swap two neighbouring letters, or drop or double one."""
    places = [i for i in range(1, len(sentence) - 1) if sentence[i : i + 2].isalpha()]
    i = _pick(rng, places)
    a, b = sentence[i], sentence[i + 1]
    return sentence[:i] + _pick(rng, (b + a, b, a + a + b)) + sentence[i + 2 :]


def _position(sentence: str) -> float:
    """A number in [0, 1) from the letters and digits alone; case and punctuation do not count."""
    letters = "".join(filter(str.isalnum, sentence.casefold()))
    return int.from_bytes(hashlib.sha256(letters.encode()).digest()[:6], "big") / 2**48


def _code(number: int) -> str:
    digits = f"{number:08d}"
    return "-".join(digits[i : i + 2] for i in range(0, 8, 2))


# Only Random.random() is promised to give the same numbers in every Python release.
def _below(rng: random.Random, n: int) -> int:
    return int(rng.random() * n)


def _pick(rng: random.Random, options: Sequence[_T]) -> _T:
    return options[_below(rng, len(options))]
