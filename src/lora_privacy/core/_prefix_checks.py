"""What a batch must be like to be run from a cached prefix, and an output from one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_privacy.errors import PrefixError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["check_agreement", "check_batch", "check_output", "checksums", "right_padded"]

_IGNORED_LABEL = -100  # what transformers' token losses leave out
_HASH_STEP = -7046029254386353131  # 2^64 over the golden ratio, odd, as int64


def right_padded(given: Tensor) -> Tensor:
    """``given`` as booleans on the CPU; PrefixError unless it is 1s followed by 0s."""
    mask = given.detach().cpu()
    if mask.dim() != 2:
        raise PrefixError(
            f"attention_mask must have shape (batch, tokens), got {tuple(mask.shape)}."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise PrefixError("attention_mask must hold 0 and 1 only.")
    mask = mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise PrefixError(
            "Padding must be on the right, got a token after padding. Set "
            "tokenizer.padding_side = 'right'."
        )
    return mask


def checksums(input_ids: Tensor | None, mask: Tensor) -> list[int | None]:
    """One number for the tokens of each row, to tell a wrong example id; None without tokens."""
    if not isinstance(input_ids, Tensor) or input_ids.shape != mask.shape:
        return [None] * len(mask)
    factors = (torch.arange(mask.shape[1]) * 2 + 1) * _HASH_STEP  # int64, wraps around
    factors = factors ^ (factors >> 29)
    sums: list[int | None] = ((input_ids.cpu().long() + 1) * mask * factors).sum(1).tolist()
    return sums


def check_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor, expected: list[int | None]
) -> None:
    """Raise PrefixError unless the model is called on the batch that using() was given."""
    given = kwargs.get("attention_mask")
    same = torch.equal(given.cpu().bool(), mask) if given is not None else bool(mask.all())
    if not same and (given is not None or not args):
        raise PrefixError("The model must be called with the attention_mask given to using().")
    found = checksums(kwargs.get("input_ids"), mask)
    wrong = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a and b and a != b]
    if wrong:
        raise PrefixError(
            f"The tokens of row {wrong[0]} are not those cached under its example id; "
            "do ids and rows have the same order?"
        )
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != mask.shape:
        return
    if bool((labels.cpu()[~mask] != _IGNORED_LABEL).any()):
        raise PrefixError(
            "Labels at padding must be -100: the outputs there are not those of an uncached "
            "run. Set labels[attention_mask == 0] = -100."
        )


def check_output(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
    """Raise PrefixError if the model returned what the skipped blocks should have computed."""
    for name in ("past_key_values", "hidden_states", "attentions"):
        if getattr(output, name, None) is not None:
            flag = "use_cache" if name == "past_key_values" else f"output_{name}"
            raise PrefixError(
                f"The output must not hold {name}, since the cached blocks have none; pass "
                f"{flag}=False."
            )


def check_agreement(
    full: object, cached: object, mask: Tensor | None, stored: torch.dtype
) -> None:
    """Raise PrefixError unless both outputs agree outside of padding."""
    pairs = list(zip(_tensors(full), _tensors(cached), strict=True))
    for expected, got in pairs:
        if mask is not None and expected.shape[: mask.dim()] == mask.shape:
            expected, got = expected[mask.bool()], got[mask.bool()]
        # Half of the digits: sums run in the same order, so that what differs is an error.
        eps = max(torch.finfo(d).eps for d in (expected.dtype, got.dtype, stored))
        error, scale = (expected - got).abs().max(), expected.abs().max()
        if not bool(error <= eps**0.5 * scale):
            raise PrefixError(
                "The model must give the same output from remembered states, got a difference "
                f"of {float(error):.2g} beside {float(scale):.2g}. Its blocks share more than "
                "hidden states, or its output depends on padding; this model cannot be cached."
            )


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    values: Iterable[Any] = ()
    if hasattr(output, "values"):
        values = output.values()  # pyright: ignore
    elif isinstance(output, tuple | list):
        values = output
    return [t for value in values for t in _tensors(value)]
