"""One digest of several tensors, to tell whether they are the same ones as before."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = ["tensor_digest"]


def tensor_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, hexadecimal, of each tensor's label, shape, type and entries, in this order."""
    found = hashlib.sha256()
    for label, tensor in tensors:
        entries = tensor.detach().cpu().contiguous()
        found.update(f"{label}{tuple(entries.shape)} {entries.dtype} ".encode())
        found.update(entries.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
