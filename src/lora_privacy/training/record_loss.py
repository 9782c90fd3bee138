"""Losses of single records, each a function of its record alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from lora_privacy.errors import UnsupportedTrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

__all__ = ["IGNORED", "is_by_token", "record_losses", "refuse_ignored"]

IGNORED = -100
"""Label that takes no part in a loss, as transformers and cross entropy have it."""

_ANSWERS = ("start_positions", "end_positions")


def record_losses(logits: Tensor, labels: Tensor, *, shift: bool) -> Tensor:
    """Cross entropy of tokens, averaged over a record's own tokens, (batch,).

    Args:
        logits: (batch, length, classes).
        labels: (batch, length); -100 takes no part, and a record without labels has loss 0.
        shift: Whether position t predicts label t + 1.
    """
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    at_least_float = torch.promote_types(logits.dtype, torch.float32)
    each = functional.cross_entropy(
        logits.to(at_least_float).flatten(0, 1),
        labels.flatten(),
        reduction="none",
        ignore_index=IGNORED,
    ).view_as(labels)
    return each.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


def is_by_token(labels: object) -> bool:
    """Whether there is a class for each token."""
    return (
        isinstance(labels, torch.Tensor) and labels.dim() == 2 and not labels.is_floating_point()
    )


def refuse_ignored(inputs: Mapping[str, Any]) -> None:
    """Refuse a record that a mean over records would leave out, and weigh the others more.

    Raises:
        UnsupportedTrainingError: A record has the label -100, or an answer that begins or ends
            beyond its input, as transformers' models for question answering leave out.
    """
    labels, tokens = inputs.get("labels"), inputs.get("input_ids")
    for name in _ANSWERS:
        places = inputs.get(name)
        if not isinstance(places, torch.Tensor) or not isinstance(tokens, torch.Tensor):
            continue
        if bool((places >= tokens.shape[-1]).any()):
            raise UnsupportedTrainingError(
                f"A record has {name} beyond its input, which a mean over the batch leaves out, "
                "so that the others weigh more. Let it point to a token, as the first one, or "
                "take such records out of the data set."
            )
    if isinstance(labels, torch.Tensor) and labels.dim() == 1 and bool((labels == IGNORED).any()):
        raise UnsupportedTrainingError(
            f"A record has the label {IGNORED}, which a mean over the batch leaves out, so that "
            "the others weigh more. Take such records out of the data set."
        )
