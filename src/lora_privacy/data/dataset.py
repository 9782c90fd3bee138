"""A set of texts, with or without labels, that knows where it came from."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_privacy import _validate
from lora_privacy.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TextDataset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDataset:
    """Texts in memory; one entry is one example, the unit that privacy statements are about.

    Attributes:
        name: Short name for tables.
        texts: First (or only) text of each example, verbatim.
        pairs: Second text of each example; None where examples have one text.
        labels: Class number of each example; None for language modelling.
        classes: Names of the classes; ``classes[label]``. Empty without labels.
        origin: Hub id, file name without its folders, or ``"synthetic …"`` with the seed.

    Raises:
        TypeError: A field is not a tuple; tuples are what makes the set immutable.
        ValueError: No texts, fields of different lengths, or a label that names no class.
    """

    name: str
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None = None
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    origin: str

    def __post_init__(self) -> None:
        for field in ("texts", "pairs", "labels", "classes"):
            value = getattr(self, field)
            if value is None and field in ("pairs", "labels"):
                continue
            if not isinstance(value, tuple):
                raise TypeError(f"{field} must be a tuple, got {type(value).__name__}.")
            if field != "classes" and len(value) != len(self.texts):
                raise ValueError(
                    f"{field} must have one entry per text: {len(self.texts)} texts, "
                    f"{len(value)} {field}."
                )
        if not self.texts:
            raise ValueError("texts must not be empty.")
        if self.labels is None and self.classes:
            raise ValueError("classes must be empty where there are no labels.")
        if self.labels is not None and not set(self.labels) <= set(range(len(self.classes))):
            raise ValueError(
                f"labels must lie in 0 … {len(self.classes) - 1} ({len(self.classes)} classes), "
                f"got {min(self.labels)} … {max(self.labels)}."
            )

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """Hash of the content, hexadecimal; name and origin do not enter.

        It is SHA-256 over ``json.dumps([texts, pairs, labels, classes])`` with the defaults of
        Python's ``json``, so the same content has the same hash on every machine.
        """
        content = json.dumps([self.texts, self.pairs, self.labels, self.classes])
        return hashlib.sha256(content.encode("ascii")).hexdigest()

    def require_labels(self) -> tuple[int, ...]:
        """Return the labels; DataError where there are none."""
        if self.labels is None:
            raise DataError(
                f"{self.name} ({self.origin}) has no labels, and classification needs them: "
                "pass label_column=… when loading it, or choose language modelling."
            )
        return self.labels

    def select(self, indices: Sequence[int]) -> TextDataset:
        """Examples at ``indices``, in that order; name, classes and origin stay.

        Raises:
            ValueError: No indices, or one outside of 0 … len − 1.
        """
        if not indices or min(indices) < 0 or max(indices) >= len(self):
            raise ValueError(f"indices must be some of 0 … {len(self) - 1}.")
        return replace(
            self,
            texts=tuple(self.texts[i] for i in indices),
            pairs=None if self.pairs is None else tuple(self.pairs[i] for i in indices),
            labels=None if self.labels is None else tuple(self.labels[i] for i in indices),
        )

    def take(self, n: int, seed: int) -> TextDataset:
        """Random subset of ``n`` examples without replacement, in their old order.

        Raises:
            ValueError: ``n`` is not in 1 … len.
        """
        n = _validate.integer("n", n, 1)
        _validate.between("n", n, 1, len(self), f"{self.name} has {len(self)} examples.")
        chosen = sorted(random.Random(f"take {seed}").sample(range(len(self)), n))
        subset = self.select(chosen)
        return replace(subset, origin=f"{self.origin} ({n} of {len(self)}, seed={seed})")

    def split(self, share: float, seed: int) -> tuple[TextDataset, TextDataset]:
        """Two disjoint random parts, the first with ``share`` of the examples (rounded).

        The parts are disjoint as examples; a text that occurs twice can lie in both.

        Raises:
            ValueError: ``share`` is not in (0, 1), or one part would be empty.
        """
        _validate.inside("share", share, 0, 1)
        size = round(share * len(self))
        if not 0 < size < len(self):
            raise ValueError(f"share {share!r} of {len(self)} examples leaves one part empty.")
        order = random.Random(f"split {seed}").sample(range(len(self)), len(self))
        parts = sorted(order[:size]), sorted(order[size:])
        first, second = (
            replace(
                self.select(part),
                origin=f"{self.origin} ({len(part)} of {len(self)}, seed={seed})",
            )
            for part in parts
        )
        return first, second
