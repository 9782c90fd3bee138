"""SGD on both factors: the recursion, its bounds, drift and the frozen-A prediction."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_privacy.core import (
    LoRALinear,
    RandomProjection,
    adapt,
    disagreement,
    drift,
    drift_bound,
    predicted_update,
    recursion,
    snapshot,
    update_bound,
)
from lora_privacy.errors import NonFiniteError, NoTargetError

N, M, R = 6, 9, 3


def train(
    steps: int, rate: float, alpha: float, *, train_a: bool = True, seed: int = 0
) -> tuple[LoRALinear, torch.Tensor, list[torch.Tensor]]:
    """SGD on a non-linear loss; the layer, A_0, and autograd's dense ∂L/∂W at every step."""
    g = torch.Generator().manual_seed(seed)
    base = nn.Linear(M, N, dtype=torch.float64)
    with torch.no_grad():
        base.weight.normal_(generator=g)
        base.bias.normal_(generator=g)
    layer = LoRALinear(base, R, alpha, RandomProjection(R, M, seed=seed), train_a)
    a0 = layer.project.weight.detach().clone()
    factors = [p for p in layer.parameters() if p.requires_grad]
    gradients = []
    for _ in range(steps):
        x = torch.randn(8, M, generator=g, dtype=torch.float64)
        y = torch.randn(8, N, generator=g, dtype=torch.float64)
        dense = (base.weight + layer.delta()).detach().requires_grad_()
        loss = (torch.tanh(x @ dense.T + base.bias) - y).square().mean()
        gradients.append(torch.autograd.grad(loss, dense)[0])
        ours = (torch.tanh(layer(x)) - y).square().mean()
        for p, grad in zip(factors, torch.autograd.grad(ours, factors), strict=True):
            p.data.sub_(rate * grad)
    return layer, a0, gradients


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius."""
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("alpha", [R, 5.0])
def test_recursion_is_sgd_on_both_factors(alpha: float) -> None:
    """Oracle: 50 autograd steps on A and B, float64; 1e-10 of what A and B moved."""
    layer, a0, gradients = train(50, 0.5, alpha)
    state = recursion(gradients, 0.5, scaling=alpha / R)
    moved = layer.project.weight.detach() - a0
    assert float(moved.norm() / a0.norm()) > 0.05
    assert relative(state.a(a0) - a0, moved) < 1e-10
    assert relative(state.b(a0), layer.expand.weight.detach()) < 1e-10


def test_frozen_a_makes_the_prediction_exact() -> None:
    """LoRA-FA: ΔW_T = −η s² Σ G_t A_0ᵀA_0 to rounding, for any number of steps."""
    layer, a0, gradients = train(30, 0.5, 5.0, train_a=False)
    predicted = predicted_update(iter(gradients), a0, 0.5, scaling=5.0 / R)
    assert disagreement(layer.delta(), predicted) < 1e-13
    wrong = predicted_update(gradients, a0, 0.5, scaling=1.0)
    assert disagreement(layer.delta(), wrong) > 0.1


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("seed", [1, 2])
def test_bounds_hold_on_real_trajectories(rate: float, seed: int) -> None:
    """Drift of A, η‖f_A‖ and the error of the prediction, each under its bound."""
    alpha = 2.0 * R
    layer, a0, gradients = train(25, rate, alpha, seed=seed)
    norms = [float(torch.linalg.matrix_norm(g, 2)) for g in gradients]
    state = recursion(gradients, rate, scaling=2.0)
    bound = drift_bound(norms, rate, scaling=2.0)
    assert relative(layer.project.weight.detach(), a0) <= bound
    assert rate * float(torch.linalg.matrix_norm(state.f_a, 2)) <= bound
    gap = layer.delta() - predicted_update(gradients, a0, rate, scaling=2.0)
    size = 2.0 * float(torch.linalg.matrix_norm(a0, 2)) ** 2
    assert float(torch.linalg.matrix_norm(gap, 2)) <= size * update_bound(norms, rate, scaling=2.0)
    x = rate * 2.0 * sum(norms)
    assert bound <= math.cosh(x) - 1
    assert update_bound(norms, rate, scaling=2.0) <= math.sinh(2 * x) / 2 - x


def scalar(gradients: list[float], rate: float) -> tuple[float, float, float]:
    """SGD on scalar a, b with loss gradient g: relative drift, ab, and −ηΣg (a_0 = 1)."""
    a, b = 1.0, 0.0
    for g in gradients:
        a, b = a - rate * b * g, b - rate * g * a
    return a - 1.0, a * b, -rate * sum(gradients)


def test_bounds_are_attained() -> None:
    """Scalar gradients of one sign, SGD written out: both bounds are equalities; 1e-12."""
    gradients = [1.0, 0.5, 2.0, 0.25]
    moved, update, predicted = scalar(gradients, 0.1)
    assert drift_bound(gradients, 0.1) == pytest.approx(moved, rel=1e-12, abs=0)
    assert update_bound(gradients, 0.1) == pytest.approx(predicted - update, rel=1e-12, abs=0)
    plus, minus = np.prod(1 + 0.1 * np.array(gradients)), np.prod(1 - 0.1 * np.array(gradients))
    assert drift_bound(gradients, 0.1) == pytest.approx((plus + minus) / 2 - 1, rel=1e-12, abs=0)


def test_a_bound_in_the_norm_of_the_sum_is_false() -> None:
    """g, −g, g, −g: partial sums stay below L = g, and A moves further than L would allow."""
    rate, g, steps = 0.1, 1.0, 4
    gradients = [g, -g, g, -g]
    assert max(abs(s) for s in np.cumsum(gradients)) == g
    moved = abs(scalar(gradients, rate)[0])
    h = (rate * g) ** 2
    published = h * (1 - h**steps) / (1 - h)
    assert moved > 1.9 * published
    assert moved <= drift_bound([abs(x) for x in gradients], rate)


def test_bounds_are_exact_for_small_steps_and_infinite_for_huge_ones() -> None:
    """No cancellation at h = 1e-12; an overflow gives inf, never NaN."""
    assert drift_bound([1e-12, 1e-12], 1.0) == pytest.approx(1e-24, rel=1e-12, abs=0)
    assert drift_bound([1e300] * 5, 1.0) == math.inf
    assert drift_bound([math.inf, 0.0], 1.0) == math.inf
    assert drift_bound([], 1.0) == 0.0
    with pytest.raises(ValueError, match="gradient_norms"):
        drift_bound([math.nan], 1.0)
    with pytest.raises(ValueError, match="learning_rate"):
        drift_bound([1.0], 0.0)


def test_drift_is_the_relative_move_of_each_a() -> None:
    """Set by hand on two layers; a snapshot is a copy."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapt(model, 2, targets=("0", "1"), seed=0)
    start = snapshot(model)
    assert drift(model, start) == {"0": 0.0, "1": 0.0}
    with torch.no_grad():
        model[0].project.weight.mul_(1.25)
    assert drift(model, start) == {"0": pytest.approx(0.25, rel=1e-6), "1": 0.0}
    with torch.no_grad():
        model[0].project.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        drift(model, start)


def test_drift_refuses_other_models_and_skips_flora() -> None:
    """The layers must be the same; FLoRA keeps no A."""
    one = adapt(nn.Sequential(nn.Linear(4, 4)), 2, targets=("0",), seed=0)
    two = adapt(nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), 2, targets=("1",), seed=0)
    with pytest.raises(ValueError, match="0, 1"):
        drift(two, snapshot(one))
    fresh = adapt(nn.Sequential(nn.Linear(4, 4)), 2, targets=("0",), seed=0, method="flora")
    assert snapshot(fresh).a == {}
    assert drift(fresh, snapshot(fresh)) == {}
    with pytest.raises(NoTargetError, match="no adapter"):
        snapshot(nn.Linear(2, 2))


def test_bad_arguments() -> None:
    """Nothing to sum, nothing to compare with."""
    for call in (
        lambda: recursion([], 0.1),
        lambda: predicted_update([], torch.zeros(R, M), 0.1),
        lambda: recursion([torch.zeros(N, M)], math.nan),
        lambda: disagreement(torch.zeros(2), torch.ones(2)),
        lambda: disagreement(torch.ones(2), torch.ones(3)),
    ):
        with pytest.raises(ValueError, match="must"):
            call()


@pytest.mark.parametrize(("alpha", "rank", "in_features", "expected"), [(16, 8, 768, 1 / 72)])
def test_effective_rate_with_the_default_of_peft(
    alpha: int, rank: int, in_features: int, expected: float
) -> None:
    """η s² r/(3m): peft's own A, 200 draws, tr(AᵀA)/m; 1 %. The factor 1 it is not."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"])
    factors = []
    for seed in range(200):
        torch.manual_seed(seed)
        layer = get_peft_model(nn.Sequential(nn.Linear(in_features, 2)), config).base_model.model[
            0
        ]
        a, s = layer.lora_A["default"].weight, layer.scaling["default"]
        factors.append(s**2 * float(a.detach().square().sum()) / in_features)
    assert expected == pytest.approx((alpha / rank) ** 2 * rank / (3 * in_features), rel=1e-12)
    assert np.mean(factors) == pytest.approx(expected, rel=0.01)
    assert expected == pytest.approx(0.0139, abs=5e-5)
