"""Where noise, sampling and projections get their randomness. No global generator is touched."""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["KEY_BYTES", "KeyedRandomness", "Randomness", "SystemRandomness", "new_key"]

KEY_BYTES = 32
_SEED_BITS = 128
_FEW_BITS = np.uint64(1 << 44)
_HASH_DOMAIN = b"lora-privacy run"  # at most 16 bytes, by blake2b's limit


class Randomness(Protocol):
    """Independent streams, told apart by a purpose: words and numbers that are used once."""

    def normal(self, size: int, *purpose: str | int) -> npt.NDArray[np.float64]:
        """``size`` independent N(0, 1) numbers."""
        ...

    def uniform(self, size: int, *purpose: str | int) -> npt.NDArray[np.float64]:
        """``size`` independent uniform numbers in [0, 1), with 53 bits."""
        ...

    def seed(self, *purpose: str | int) -> int:
        """An integer of 128 bits that tells nothing about any other stream."""
        ...


@dataclass(frozen=True, slots=True)
class SystemRandomness:
    """Every bit comes from the operating system's generator; there is no state to keep or lose.

    Purposes are ignored: no number is ever drawn twice.
    """

    def normal(self, size: int, *purpose: str | int) -> npt.NDArray[np.float64]:  # noqa: ARG002
        """Box and Muller's method. The radius has 117 bits: no tail that matters is cut."""
        half = (size + 1) // 2
        words = np.frombuffer(os.urandom(8 * half), np.uint64)
        u = words.astype(np.float64)
        # One word in a million is so small that its own bits are too few for the tail.
        small = np.flatnonzero(words < _FEW_BITS)
        u[small] += _uniform(len(small)) + 2.0**-54
        radius = np.sqrt(-2.0 * np.minimum(np.log(u * 2.0**-64), 0.0))
        # torch's sine and cosine are ten times as quick as numpy's.
        angle = torch.from_numpy(2 * math.pi * _uniform(half))
        parts = (radius * torch.cos(angle).numpy(), radius * torch.sin(angle).numpy())
        return np.concatenate(parts)[:size]

    def uniform(self, size: int, *purpose: str | int) -> npt.NDArray[np.float64]:  # noqa: ARG002
        """The top 53 bits of words of 64."""
        return _uniform(size)

    def seed(self, *purpose: str | int) -> int:  # noqa: ARG002
        """128 bits."""
        return secrets.randbits(_SEED_BITS)


@dataclass(frozen=True, slots=True)
class KeyedRandomness:
    """Streams that a secret key and their purpose fix, so that they can be drawn again.

    Whoever holds the key knows the noise: there is no guarantee against him.

    Args:
        key: ``KEY_BYTES`` bytes from ``new_key``.
    """

    key: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"key must have {KEY_BYTES} bytes, got {len(self.key)}.")

    def normal(self, size: int, *purpose: str | int) -> npt.NDArray[np.float64]:
        """By numpy's ziggurat on a Philox stream of its own."""
        return self._stream("normal", *purpose).standard_normal(size)

    def uniform(self, size: int, *purpose: str | int) -> npt.NDArray[np.float64]:
        """From a Philox stream of its own."""
        return self._stream("uniform", *purpose).random(size)

    def seed(self, *purpose: str | int) -> int:
        """A keyed hash."""
        return int.from_bytes(self._digest("seed", *purpose), "little")

    def digest(self, data: bytes, *purpose: str | int) -> str:
        """Keyed hash of ``data``: without the key it tells nothing about it."""
        key = self._digest("digest", *purpose)
        return hashlib.blake2b(data, digest_size=_SEED_BITS // 8, key=key).hexdigest()

    def _stream(self, *purpose: str | int) -> np.random.Generator:
        key = int.from_bytes(self._digest(*purpose), "little")
        return np.random.Generator(np.random.Philox(key=key))

    def _digest(self, *purpose: str | int) -> bytes:
        digest = hashlib.blake2b(digest_size=_SEED_BITS // 8, key=self.key, person=_HASH_DOMAIN)
        for part in purpose:
            # The type too, so that 1 and "1" are two purposes.
            data = f"{type(part).__name__}:{part}".encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()


def new_key() -> bytes:
    """A key from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def _uniform(size: int) -> npt.NDArray[np.float64]:
    words = np.frombuffer(os.urandom(8 * size), np.uint64) >> np.uint64(11)
    return words.astype(np.float64) * 2.0**-53
