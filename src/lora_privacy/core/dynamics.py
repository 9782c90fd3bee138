"""How far training moves A, and what the frozen-A story says of the update of W."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_privacy import _validate
from lora_privacy.core.adapter import adapters
from lora_privacy.errors import NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor, nn

__all__ = [
    "AdapterSnapshot",
    "Recursion",
    "disagreement",
    "drift",
    "drift_bound",
    "predicted_update",
    "recursion",
    "snapshot",
    "update_bound",
]


@dataclass(frozen=True, slots=True, eq=False)
class AdapterSnapshot:
    """Copies of A (rank, in_features) of every layer that keeps one, by path.

    FLoRA layers have none: their A is another one every cycle.
    """

    a: dict[str, Tensor]


def snapshot(model: nn.Module) -> AdapterSnapshot:
    """Copy the A of every LoRA layer, ours or peft's.

    Raises:
        NoTargetError: The model carries no adapter.
    """
    found = adapters(model).values()
    return AdapterSnapshot({x.name: x.a().clone() for x in found if x.kind != "flora"})


def drift(model: nn.Module, reference: AdapterSnapshot) -> dict[str, float]:
    """‖A_t − A_0‖ / ‖A_0‖ (Frobenius, in float64) of every layer of ``reference``.

    Raises:
        ValueError: The layers of ``model`` are not those of ``reference``, or an A_0 is 0.
        NonFiniteError: An A holds NaN or infinity.
    """
    now = snapshot(model).a
    if now.keys() != reference.a.keys():
        odd = ", ".join(sorted(now.keys() ^ reference.a.keys()))
        raise ValueError(f"The snapshot must be of this model; layers in only one: {odd}.")
    return {name: _relative(now[name], start) for name, start in reference.a.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Recursion:
    """State of SGD on A and B after t steps, without A_0.

    ``A_t = A_0 + η A_0 f_a`` and ``B_t = η f_b A_0ᵀ``, for B_0 = 0 and every A_0.

    Attributes:
        f_a: (in_features, in_features), in units of the gradient.
        f_b: (out_features, in_features), in units of the gradient.
        learning_rate: η.
    """

    f_a: Tensor
    f_b: Tensor
    learning_rate: float

    def a(self, a0: Tensor) -> Tensor:
        """A_t, shape (rank, in_features)."""
        return a0 + self.learning_rate * (a0 @ self.f_a)

    def b(self, a0: Tensor) -> Tensor:
        """B_t, shape (out_features, rank)."""
        return self.learning_rate * (self.f_b @ a0.T)


def recursion(
    gradients: Iterable[Tensor], learning_rate: float, *, scaling: float = 1.0
) -> Recursion:
    """Run the recursion of SGD on both factors over the dense gradients that it met.

    ``f_B ← f_B − s G (I + η f_Aᵀ)``, ``f_A ← f_A − η s f_Bᵀ G``, both from 0.

    Args:
        gradients: G_t = ∂L/∂W at step t, each (out_features, in_features), at least one.
        learning_rate: η, > 0.
        scaling: s of the adapter, > 0.

    Raises:
        ValueError: An argument is out of range, or there is no gradient.

    References:
        Hao, Cao & Mou, ICML 2024, arXiv:2402.03293, Theorem 2.1; docs/theory/dynamics.md.
    """
    _validate.positive("learning_rate", learning_rate)
    _validate.positive("scaling", scaling)
    state: tuple[Tensor, Tensor] | None = None
    for gradient in gradients:
        g = scaling * gradient
        if state is None:
            state = g.new_zeros(g.shape[1], g.shape[1]), torch.zeros_like(g)
        f_a, f_b = state
        state = (
            f_a - learning_rate * (f_b.T @ g),
            f_b - g - learning_rate * (g @ f_a.T),
        )
    if state is None:
        raise ValueError("gradients must hold at least one matrix, got none.")
    return Recursion(*state, learning_rate)


def drift_bound(
    gradient_norms: Iterable[float], learning_rate: float, *, scaling: float = 1.0
) -> float:
    """Upper bound on ‖A_T − A_0‖/‖A_0‖ under SGD on both factors, B_0 = 0; for every A_0.

    It is ``½(Π(1 + h_t) + Π(1 − h_t)) − 1 ≤ cosh(Σ h_t) − 1`` with ``h_t = η s ‖G_t‖₂``, holds
    without any condition on η, and is attained by scalar gradients of one sign. It bounds
    ``η‖f_A‖₂`` too.

    Args:
        gradient_norms: ‖G_t‖ of the dense gradient at every step; spectral norms give the
            tightest bound, Frobenius norms a valid one.
        learning_rate: η, > 0.
        scaling: s of the adapter, > 0.

    Raises:
        ValueError: An argument is out of range or NaN.

    References:
        docs/theory/dynamics.md, which says how the published bound differs.
    """
    return _majorant(gradient_norms, learning_rate, scaling)[0]


def update_bound(
    gradient_norms: Iterable[float], learning_rate: float, *, scaling: float = 1.0
) -> float:
    """Upper bound on ``‖ΔW_T + η s² Σ G_t A_0ᵀA_0‖₂ / (s ‖A_0‖₂²)`` under SGD on both factors.

    It is at most ``½ sinh(2x) − x`` with ``x = η s Σ‖G_t‖₂``, of third order in x, while the
    update itself is of first order. Arguments and errors as in ``drift_bound``.
    """
    norms = list(gradient_norms)
    alpha, beta = _majorant(norms, learning_rate, scaling)
    total = learning_rate * scaling * math.fsum(norms)
    # ‖ηf_B + ηsΣG‖ ≤ β − x, and ηf_B · ηf_A adds β α; the difference may round below 0.
    return max(beta - total, 0.0) + beta * alpha


def predicted_update(
    gradients: Iterable[Tensor], a0: Tensor, learning_rate: float, *, scaling: float = 1.0
) -> Tensor:
    """``−η s² Σ G_t A_0ᵀA_0``, the update of W if A had stayed at A_0; exact for LoRA-FA.

    Args:
        gradients: G_t = ∂L/∂W, each (out_features, in_features); an iterator is read once and
            never held.
        a0: A at the start (rank, in_features).
        learning_rate: η, > 0.
        scaling: s of the adapter, > 0.

    Raises:
        ValueError: An argument is out of range, or there is no gradient.
    """
    _validate.positive("learning_rate", learning_rate)
    _validate.positive("scaling", scaling)
    total: Tensor | None = None
    for gradient in gradients:
        term = gradient @ a0.T
        total = term if total is None else total + term
    if total is None:
        raise ValueError("gradients must hold at least one matrix, got none.")
    return (-learning_rate * scaling**2) * (total @ a0)


def disagreement(update: Tensor, predicted: Tensor) -> float:
    """``‖update − predicted‖ / ‖update‖`` (Frobenius, in float64), 0 when they agree.

    Raises:
        ValueError: The shapes differ, or ``update`` is 0.
        NonFiniteError: One of them holds NaN or infinity.
    """
    return _relative(predicted, update)


def _majorant(norms: Iterable[float], learning_rate: float, scaling: float) -> tuple[float, float]:
    """Bounds on (η‖f_A‖₂, η‖f_B‖₂): the recursion run on norms, in which nothing cancels."""
    _validate.positive("learning_rate", learning_rate)
    _validate.positive("scaling", scaling)
    alpha = beta = 0.0
    for norm in norms:
        _validate.between("gradient_norms", norm, 0.0, math.inf)
        h = learning_rate * scaling * norm
        alpha, beta = alpha + h * beta, beta + h * (1.0 + alpha)
    # 0 · inf is NaN: nothing is known then.
    return (math.inf, math.inf) if math.isnan(alpha + beta) else (alpha, beta)


def _relative(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        raise ValueError(
            f"Shapes must agree, got {tuple(value.shape)} and {tuple(reference.shape)}."
        )
    base = reference.detach().to("cpu", torch.float64)
    gap = float((value.detach().to("cpu", torch.float64) - base).norm())
    size = float(base.norm())
    if not math.isfinite(gap) or not math.isfinite(size):
        raise NonFiniteError("A matrix to compare holds NaN or infinity.")
    if size == 0.0:
        raise ValueError("The matrix to compare with must not be 0.")
    return gap / size
