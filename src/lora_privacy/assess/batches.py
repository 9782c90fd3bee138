"""Tokenised examples and the batches made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from lora_privacy.errors import DataError
from lora_privacy.training.record_loss import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from lora_privacy.data import TextDataset

__all__ = ["Batch", "TokenisedDataset"]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded examples.

    Shape:
        ``ids`` (batch,) positions in the data set; ``input_ids`` and ``attention_mask``
        (batch, tokens); ``labels`` (batch,) classes, or (batch, tokens) next tokens with -100
        where padded; ``token_type_ids`` (batch, tokens), 1 in the second text of a pair, or None
        where the tokenizer tells the texts apart by separators alone.
    """

    ids: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_type_ids: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            inputs["token_type_ids"] = self.token_type_ids
        return inputs


class TokenisedDataset:
    """A data set as token ids, batched by index.

    Pairs of a language model, and of a tokenizer that puts nothing between two texts, are joined
    to one text by an arrow.

    Args:
        data: Texts, with labels for classification.
        tokenizer: A transformers tokenizer with a padding token.
        max_length: Tokens an example is cut to.
        causal: Labels are the tokens themselves; the end token, if there is one, closes each text.

    Raises:
        DataError: No labels for classification, or a text without a token to learn from.
        ValueError: ``max_length`` leaves no room beside the tokenizer's special tokens.
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
        texts, second = list(data.texts), None if data.pairs is None else list(data.pairs)
        if second and (causal or _separates_nothing(tokenizer)):
            texts = [f"{a} -> {b}" for a, b in zip(texts, second, strict=True)]
            second = None
        if causal and tokenizer.eos_token is not None:
            texts = [f"{text}{tokenizer.eos_token}" for text in texts]
        added = tokenizer.num_special_tokens_to_add(pair=second is not None)
        if max_length <= added:
            raise ValueError(
                f"max_length must be more than {added}, the special tokens that the tokenizer "
                f"adds to an example, got {max_length}."
            )
        # Asked for, since a tokenizer of no named kind makes them but does not return them.
        encoded = tokenizer(
            texts,
            second,
            truncation=True,
            max_length=max_length,
            return_token_type_ids=second is not None,
        )
        rows = cast("list[list[int]]", encoded["input_ids"])
        # Of one token, a language model has no next one to predict.
        short = [i for i, row in enumerate(rows) if len(row) < (2 if causal else 1)]
        if short:
            raise DataError(
                f"{data.name}: {len(short)} texts have no token to learn from, the first is text "
                f"{short[0] + 1}, {data.texts[short[0]][:40]!r}. Remove them."
            )
        self._tokens = [torch.tensor(row) for row in rows]
        types = cast("list[list[int]]", encoded.get("token_type_ids", [])) if second else []
        # Zeros only say nothing, and some models misread them.
        self._types = [torch.tensor(row) for row in types] if any(map(any, types)) else None
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
            input_ids.masked_fill(~mask, IGNORED)
            if self._labels is None
            else self._labels[torch.as_tensor(ids)]
        )
        types = None
        if self._types is not None:
            types = torch.nn.utils.rnn.pad_sequence(
                [self._types[i] for i in ids], batch_first=True
            )
        return Batch(torch.as_tensor(ids), input_ids, mask.long(), labels, types)

    def shuffled(self, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """One pass in random order; a last batch of fewer examples is kept."""
        order = rng.permutation(len(self))
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])

    def by_length(self, ids: np.ndarray) -> np.ndarray:
        """``ids`` from the shortest example to the longest."""
        return ids[np.argsort([len(self._tokens[i]) for i in ids], kind="stable")]

    def ordered(self, batch_size: int) -> Iterator[Batch]:
        """One pass by length, so that little is padded."""
        order = self.by_length(np.arange(len(self)))
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])


def _separates_nothing(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the two texts of a pair would run into each other, as those of GPT-2 do."""
    return tokenizer.num_special_tokens_to_add(pair=True) <= tokenizer.num_special_tokens_to_add()
