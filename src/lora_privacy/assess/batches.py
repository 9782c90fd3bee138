"""Tokenised examples and the batches made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from lora_privacy.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from lora_privacy.data import TextDataset

__all__ = ["Batch", "TokenisedDataset"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded examples.

    Shape:
        ``ids`` (batch,) positions in the data set; ``input_ids`` and ``attention_mask``
        (batch, tokens); ``labels`` (batch,) classes, or (batch, tokens) next tokens with -100
        where padded.
    """

    ids: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


class TokenisedDataset:
    """A data set as token ids, batched by index.

    Args:
        data: Texts, with labels for classification.
        tokenizer: A transformers tokenizer with a padding token.
        max_length: Tokens an example is cut to.
        causal: Labels are the tokens themselves; an end token closes each text.
    """

    def __init__(
        self,
        data: TextDataset,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        causal: bool,
    ) -> None:
        if not causal and data.labels is None:
            raise DataError(
                f"{data.name} has no labels; name its label column, or assess a causal language "
                "model on it."
            )
        second = list(data.pairs) if data.pairs is not None else None
        if causal:
            texts = (
                [f"{a} -> {b}" for a, b in zip(data.texts, second, strict=True)]
                if second
                else list(data.texts)
            )
            texts = [f"{text}{tokenizer.eos_token}" for text in texts]
            encoded = tokenizer(texts, truncation=True, max_length=max_length)
        else:
            encoded = tokenizer(list(data.texts), second, truncation=True, max_length=max_length)
        self._tokens = [torch.tensor(row) for row in encoded["input_ids"]]
        self._labels = None if causal else torch.tensor(data.labels)
        self._pad = cast("int", tokenizer.pad_token_id)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._tokens)

    def batch(self, ids: np.ndarray) -> Batch:
        """The examples at positions ``ids``, padded to the longest of them."""
        rows = [self._tokens[i] for i in ids]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self._pad
        )
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        labels = (
            input_ids.masked_fill(~mask, -100)
            if self._labels is None
            else self._labels[torch.as_tensor(ids)]
        )
        return Batch(torch.as_tensor(ids), input_ids, mask.long(), labels)

    def shuffled(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """One pass in random order; a last batch of fewer examples is kept."""
        order = rng.permutation(len(self))
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])

    def ordered(self, batch_size: int) -> Iterator[Batch]:
        """One pass by length, so that little is padded."""
        order = np.argsort([len(row) for row in self._tokens], kind="stable")
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])
