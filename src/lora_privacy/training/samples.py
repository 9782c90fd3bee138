"""Gradients of one parameter, sample by sample, in the smaller of two forms.

Sample i of a batch has the weight gradient ``G_i = g_iᵀ x_i``, with x_i (T, in) what entered the
linear map and g_i (T, out) the gradient of what left it. The matrix has ``out · in`` numbers and
costs ``T · out · in`` products; the pair has ``T (out + in)`` numbers, and its norm from the Gram
matrices, ``‖G_i‖² = Σ_tt' (x_t · x_t')(g_t · g_t')``, costs ``T² (out + in)``. One comparison
settles both: the matrix is smaller and quicker exactly when ``out · in <= T (out + in)``.

Sums over samples are in double precision. In single precision they round by what is summed
already, so that a record which adds nothing could move the sum by several clipping norms, by what
it does to the rounding of all that come after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DenseSamples", "FactoredSamples", "Samples", "matrix_samples", "wide"]

GRAM_RTOL = 1e-3
"""Largest relative error of a squared norm from Gram matrices."""

_GRAM_NUMBERS = 1 << 22  # of the Gram matrices held at a time, 16 MB each
_WIDE_NUMBERS = 1 << 20  # of single precision that are held in double at a time, 8 MB
_PIECE = 1 << 16  # numbers whose squares are summed at a time: a longer sum loses small ones
_EPS, _TINY = float(torch.finfo(torch.float32).eps), float(torch.finfo(torch.float32).tiny)
_DOUBLE = 2.0**-29  # roundings of double precision over those of single


class Samples(Protocol):
    """Gradients G_i of one parameter for the samples of a batch."""

    def square_norms(self) -> Tensor:
        """‖G_i‖², shape (batch,)."""
        ...

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ weights_i G_i, of the shape of G_i; ``weights`` (batch,)."""
        ...

    def projected(self, weights: Tensor, a: Tensor) -> Tensor:
        """Σ weights_i G_i Aᵀ, shape (out, rank); ``a`` (rank, in)."""
        ...


@dataclass(slots=True, eq=False)
class DenseSamples:
    """The gradients themselves, (batch, *shape)."""

    gradients: Tensor

    def add(self, gradients: Tensor) -> None:
        """Add those of another use of the same parameter."""
        self.gradients = self.gradients + gradients

    def square_norms(self) -> Tensor:
        """‖G_i‖², shape (batch,)."""
        pieces = self._stored().flatten(1).split(_PIECE, dim=1)
        return torch.stack(
            [torch.linalg.vector_norm(piece, dim=1).square() for piece in pieces]
        ).sum(0)

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ weights_i G_i."""
        stored = self._stored()
        flat = stored.flatten(1)
        rows = max(1, _WIDE_NUMBERS // max(1, flat.shape[1]))
        total = sum(
            wide(w) @ wide(part)
            for w, part in zip(weights.split(rows), flat.split(rows), strict=True)
        )
        total = cast("Tensor", total).view(stored.shape[1:])
        return total if stored is self.gradients else total.mT

    def _stored(self) -> Tensor:
        """The gradients in the order of their memory: flattening them copies nothing."""
        by_column = self.gradients.dim() == 3 and not self.gradients.is_contiguous()
        return self.gradients.mT if by_column else self.gradients

    def projected(self, weights: Tensor, a: Tensor) -> Tensor:
        """Σ weights_i G_i Aᵀ."""
        return self.weighted(weights) @ wide(a).T


@dataclass(slots=True, eq=False)
class FactoredSamples:
    """Pairs x (batch, T, in), g (batch, T, out) with G_i = g_iᵀ x_i, summed over the pairs."""

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add another use of the same weight."""
        self.pairs.append((x, g))

    def square_norms(self) -> Tensor:
        """‖G_i‖², shape (batch,), from Gram matrices."""
        x, g = self._joined()
        if x.shape[1] == 1:  # in double: a square that is lost may meet a large one
            return (wide(x).square().sum((1, 2)) * wide(g).square().sum((1, 2))).to(x.dtype)
        norms = _gram_norms(x, g)
        # Positions that nearly cancel leave rounding: the norm could come out far too small, and
        # the clip would bound nothing. Products of n numbers round by about n/16 eps, and those
        # below the least number of single precision are lost, whatever is multiplied with them.
        by_x, by_g = (wide(torch.linalg.vector_norm(t, dim=2)) for t in (x, g))
        slack = _EPS * (16 + (x.shape[2] + g.shape[2]) / 16) * (by_x * by_g).sum(1).square()
        lost = x.shape[2] * by_g.sum(1).square() + g.shape[2] * by_x.sum(1).square()
        unsure = torch.nonzero(~(slack + _TINY * lost <= GRAM_RTOL * norms)).flatten()
        if len(unsure):
            # With what double precision may lose added, a sample of terms that cancel to nothing
            # has a weight so small that their sum rounds by next to nothing.
            exact = _gram_norms(wide(x[unsure]), wide(g[unsure])) + _DOUBLE * slack[unsure]
            norms[unsure] = exact.to(norms.dtype)
        return norms

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ weights_i G_i, as a product over samples and positions."""
        return self._product(weights)

    def projected(self, weights: Tensor, a: Tensor) -> Tensor:
        """Σ weights_i G_i Aᵀ; no (out, in) matrix is formed."""
        return self._product(weights, wide(a).T)

    def _product(self, weights: Tensor, right: Tensor | None = None) -> Tensor:
        """Σ weights_i g_iᵀ x_i ``right``; the weights multiply the narrower factor."""
        x, g = self._joined()
        rows = max(1, _WIDE_NUMBERS // (x.shape[1] * max(x.shape[2], g.shape[2], 1)))
        total: Tensor | None = None
        for x_, g_, w_ in zip(x.split(rows), g.split(rows), weights.split(rows), strict=True):
            x_, g_, scale = wide(x_), wide(g_), wide(w_)[:, None, None]
            x_ = x_ if right is None else x_ @ right
            x_, g_ = (x_ * scale, g_) if x_.shape[2] <= g_.shape[2] else (x_, g_ * scale)
            part = g_.flatten(0, 1).T @ x_.flatten(0, 1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Uses of one weight in one pass add up like further positions."""
        if len(self.pairs) > 1:
            x, g = (torch.cat(parts, dim=1) for parts in zip(*self.pairs, strict=True))
            self.pairs = [(x, g)]
        return self.pairs[0]


def matrix_samples(x: Tensor, g: Tensor, *, dense: bool = False) -> DenseSamples | FactoredSamples:
    """Gradients g_iᵀ x_i in the smaller form, or ``dense`` ones.

    Args:
        x: Inputs, (batch, T, in).
        g: Gradients of the outputs, (batch, T, out).
        dense: Form the matrices whatever their size.
    """
    length, inputs, outputs = x.shape[1], x.shape[2], g.shape[2]
    if dense or inputs * outputs <= length * (inputs + outputs):
        return DenseSamples(outer(x, g))
    return FactoredSamples([(x, g)])


def outer(x: Tensor, g: Tensor) -> Tensor:
    """g_iᵀ x_i for each sample, (batch, out, in)."""
    # The wider factor second: up to twice as quick.
    return torch.bmm(g.mT, x) if g.shape[2] <= x.shape[2] else torch.bmm(x.mT, g).mT


def _gram_norms(x: Tensor, g: Tensor) -> Tensor:
    chunk = max(1, _GRAM_NUMBERS // (x.shape[1] * x.shape[1]))
    sums = [
        (torch.bmm(a, a.mT) * torch.bmm(b, b.mT)).sum((1, 2))
        for a, b in zip(x.split(chunk), g.split(chunk), strict=True)
    ]
    return torch.cat(sums).clamp_(min=0)


def wide(tensor: Tensor) -> Tensor:
    """In double precision; on a device without it, as it is."""
    return tensor if tensor.device.type == "mps" else tensor.double()
