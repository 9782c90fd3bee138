"""The random matrix A: a value that is drawn again on demand and never stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from lora_privacy import _validate
from lora_privacy.laws import EntryLaw, LawName, entry_law

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

__all__ = ["RandomProjection"]

_HASH_DOMAIN = b"lora-privacy random projection 1"
_KEY_BYTES = 16  # of Philox, whose streams differ for every 128-bit key


@dataclass(frozen=True, slots=True)
class RandomProjection:
    """The matrices A_0, A_1, … (rank, in_features) of one layer, scaled so that E AᵀA = I.

    Every matrix is a function of ``(seed, layer, step)`` alone: it is the same on every device
    and in every process, no global generator is read or moved, and matrices of different
    layers, steps or seeds are independent. The float32 matrix is the float64 one, rounded.

    A dimensionless matrix; the laws differ in the kurtosis of an entry only, but for
    ``"orthonormal"``, √(in_features/rank) times an orthonormal frame with a Haar row space.

    Args:
        rank: Rows of A, at least 1; at most ``in_features`` for the orthonormal law.
        in_features: Columns of A, at least 1.
        law: Law of the entries.
        seed: Integer of any size, at least 0; required, so that nothing is left to a global
            generator.
        layer: Name of the layer, to tell the matrices of one model apart.

    Raises:
        ValueError: An argument is out of range.
        TypeError: ``rank``, ``in_features`` or ``seed`` is no integer, ``layer`` no string.

    >>> RandomProjection(2, 3, seed=7).matrix(0).shape
    torch.Size([2, 3])
    """

    rank: int
    in_features: int
    law: LawName = "gaussian"
    seed: int = field(kw_only=True)
    layer: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        # Plain ints, so that a numpy integer neither changes the hash of the seed nor the repr.
        for name, low in (("rank", 1), ("in_features", 1), ("seed", 0)):
            object.__setattr__(self, name, _validate.integer(name, getattr(self, name), low))
        if not isinstance(self.layer, str):
            raise TypeError(f"layer must be a string, got {self.layer!r}.")
        entry_law(self.law, self.rank, self.in_features)

    @property
    def entry_law(self) -> EntryLaw:
        """Law of one entry."""
        return entry_law(self.law, self.rank, self.in_features)

    @property
    def variance(self) -> float:
        """Variance of an entry, 1/rank for every law."""
        return self.entry_law.variance

    @property
    def kurtosis(self) -> float:
        """Fourth moment of an entry over its squared variance, not the excess."""
        return self.entry_law.kurtosis

    def matrix(
        self,
        step: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw A of ``step``, shape (rank, in_features).

        Args:
            step: Which matrix, at least 0.
            dtype: Floating-point type it is rounded to.
            device: Where it goes; it is always drawn on the CPU in float64.

        Raises:
            ValueError: ``step`` is negative.
            TypeError: ``step`` is no integer, or ``dtype`` no floating-point type.
        """
        step = _validate.integer("step", step, 0)
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}.")
        return torch.from_numpy(self._draw(step)).to(device=device, dtype=dtype)

    def _draw(self, step: int) -> npt.NDArray[np.float64]:
        rng = np.random.Generator(np.random.Philox(key=self._key(step)))
        shape, std = (self.rank, self.in_features), self.rank**-0.5
        if self.law == "gaussian":
            return rng.standard_normal(shape) * std
        if self.law == "uniform":
            return rng.uniform(-std * 3**0.5, std * 3**0.5, shape)
        if self.law == "rademacher":
            return (2.0 * rng.integers(0, 2, shape) - 1.0) * std
        # Q of a Gaussian matrix is Haar only when R has a positive diagonal (Mezzadri,
        # arXiv:math-ph/0609050); its columns are the frame.
        q, r = np.linalg.qr(rng.standard_normal((self.in_features, self.rank)))
        return np.ascontiguousarray((q * np.sign(np.diag(r))).T) * (self.in_features**0.5 * std)

    def _key(self, step: int) -> int:
        """Key of the stream: a hash, in which no two (seed, layer, step) share an encoding.

        torch.Generator is no home for it: its CPU engine reads the low 32 bits of a seed only,
        so that among 10⁵ matrices two would be expected to be equal.
        """
        digest = hashlib.blake2b(_HASH_DOMAIN, digest_size=_KEY_BYTES)
        for part in (str(self.seed), self.layer, str(step)):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return int.from_bytes(digest.digest(), "little")
