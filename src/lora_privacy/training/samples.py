"""Gradients of one parameter, sample by sample, in the smaller of two forms.

Sample i of a batch has the weight gradient ``G_i = g_iᵀ x_i``, with x_i (T, in) what entered the
linear map and g_i (T, out) the gradient of what left it. The matrix has ``out · in`` numbers and
costs ``T · out · in`` products; the pair has ``T (out + in)`` numbers, and its norm from the Gram
matrices, ``‖G_i‖² = Σ_tt' (x_t · x_t')(g_t · g_t')``, costs ``T² (out + in)``. One comparison
settles both: the matrix is smaller and quicker exactly when ``out · in <= T (out + in)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DenseSamples", "FactoredSamples", "Samples", "matrix_samples"]

GRAM_RTOL = 1e-3
"""Largest relative error of a squared norm from Gram matrices."""

_GRAM_NUMBERS = 1 << 22  # of the Gram matrices held at a time, 16 MB each
_EPS = float(torch.finfo(torch.float32).eps)


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
        return torch.linalg.vector_norm(self._stored().flatten(1), dim=1).square()

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ weights_i G_i."""
        stored = self._stored()
        total = (weights.to(stored.dtype) @ stored.flatten(1)).view(stored.shape[1:])
        return total if stored is self.gradients else total.mT

    def _stored(self) -> Tensor:
        """The gradients in the order of their memory: flattening them copies nothing."""
        by_column = self.gradients.dim() == 3 and not self.gradients.is_contiguous()
        return self.gradients.mT if by_column else self.gradients

    def projected(self, weights: Tensor, a: Tensor) -> Tensor:
        """Σ weights_i G_i Aᵀ."""
        return self.weighted(weights) @ a.T


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
        if x.shape[1] == 1:
            return x.square().sum((1, 2)) * g.square().sum((1, 2))
        norms = _gram_norms(x, g)
        if x.dtype == torch.float32:
            # Positions that nearly cancel leave rounding: the norm could come out far too small,
            # and the clip would bound nothing. Products of n numbers round by about n/16 eps.
            lengths = torch.linalg.vector_norm(x, dim=2) * torch.linalg.vector_norm(g, dim=2)
            slack = _EPS * (16 + (x.shape[2] + g.shape[2]) / 16) * lengths.sum(1).square()
            unsure = torch.nonzero(~(slack <= GRAM_RTOL * norms)).flatten()
            if len(unsure):
                norms[unsure] = _gram_norms(x[unsure].double(), g[unsure].double()).float()
        return norms

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ weights_i G_i, as one product over samples and positions."""
        x, g = self._joined()
        return _product(x, g, weights)

    def projected(self, weights: Tensor, a: Tensor) -> Tensor:
        """Σ weights_i G_i Aᵀ; no (out, in) matrix is formed."""
        x, g = self._joined()
        return _product(x @ a.T.to(x.dtype), g, weights)

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


def _product(x: Tensor, g: Tensor, weights: Tensor) -> Tensor:
    """Σ weights_i g_iᵀ x_i; the weights multiply the narrower factor."""
    scale = weights.to(x.dtype)[:, None, None]
    x, g = (x * scale, g) if x.shape[2] <= g.shape[2] else (x, g * scale)
    return g.flatten(0, 1).T @ x.flatten(0, 1)
