"""Weights that must neither be trained nor change."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from lora_privacy.errors import PrefixError, StalePrefixError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FrozenWeights"]

_SAMPLES = 16  # entries of each weight that are compared at every check


class FrozenWeights:
    """Named weights and buffers as they are now.

    Args:
        weights: Name -> tensor; kept by reference.

    Raises:
        PrefixError: One of them is trainable.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights
        self._check_frozen()
        self._seen, self._digest = self._fingerprint(), self._hash()

    def check(self) -> None:
        """Compare with the state at construction.

        Raises:
            PrefixError: One of them is trainable by now.
            StalePrefixError: One of them changed.
        """
        self._check_frozen()
        seen = self._fingerprint()
        if seen == self._seen:
            return
        # Loading the same weights again moves the versions and nothing else.
        if self._hash() != self._digest:
            raise StalePrefixError(
                "The weights below the first adapted block changed since fill(); make a new "
                "CachedPrefix."
            )
        self._seen = seen

    def of(self, model: nn.Module) -> FrozenWeights:
        """The weights of these names in another model.

        Raises:
            PrefixError: One of them is missing or trainable.
            StalePrefixError: One of them is not what it was here at construction.
        """
        tensors = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        missing = [name for name in self._weights if name not in tensors]
        if missing:
            raise PrefixError(f"The other model has no {', '.join(missing[:5])}.")
        others = FrozenWeights({name: tensors[name] for name in self._weights})
        if others._digest != self._digest:
            raise StalePrefixError(
                "The other model has other weights below its first adapted block; give it a "
                "CachedPrefix of its own."
            )
        return others

    def _check_frozen(self) -> None:
        trainable = [name for name, tensor in self._weights.items() if tensor.requires_grad]
        if trainable:
            raise PrefixError(
                "Everything before the first adapted block must be frozen, got trainable "
                f"{', '.join(trainable[:5])}. Call requires_grad_(False) on it."
            )

    def _fingerprint(self) -> tuple[object, ...]:
        """Version of every weight and a few of its entries: microseconds each.

        The version misses writes through ``.data``; the entries catch all that touch many.
        """
        return tuple(
            (t._version, *t.detach().reshape(-1)[:: max(1, t.numel() // _SAMPLES)].tolist())
            for t in self._weights.values()
        )

    def _hash(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self._weights.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.digest()
