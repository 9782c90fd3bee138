"""Second oracles of the numbers of ``training``: Opacus, dp-accounting, torch.func, closed forms.

``docs/oracles.md`` lists both of each number.
"""

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as peer
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant as OpacusAccountant
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer
from private_models import numbers, output_losses
from scipy import stats
from test_engine import DELTA, Silent, make, model_for, noises, run
from torch import Tensor, nn

from lora_privacy.training import (
    AutomaticClipping,
    FlatClipping,
    LayerClipping,
    RowScaling,
    SampleRecorder,
    TargetEpsilon,
    clipped_sums,
    predicted_cosine,
    sample_norms,
)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 4)).double()


def recorded(model: nn.Module, x: Tensor, rule: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Squared norms by layer, and clipped sums by parameter."""
    with SampleRecorder(model) as recorder:
        output_losses(x)(model).sum().backward()
        return sample_norms(recorder), clipped_sums(recorder, rule)


def by_opacus(model: nn.Module, x: Tensor, norm: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Per-sample gradients of Opacus' hooks, and the sums that its optimizer clips."""
    copied = copy.deepcopy(model)
    hooked = GradSampleModule(copied, loss_reduction="sum")
    kind: Any = DPPerLayerOptimizer if isinstance(norm, list) else DPOptimizer
    optimizer = kind(
        torch.optim.SGD(copied.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=norm,
        expected_batch_size=len(x),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output_losses(x)(hooked).sum().backward()
    samples = {name: p.grad_sample.clone() for name, p in copied.named_parameters()}
    optimizer.clip_and_accumulate()
    return samples, {name: p.summed_grad for name, p in copied.named_parameters()}


@pytest.mark.parametrize("shape", [(7, 9), (7, 3, 9)])
def test_norms_and_clipped_sums_are_those_of_opacus(shape: tuple[int, ...]) -> None:
    """1e-10 of the norms; 2e-6 in the sums, as Opacus adds 1e-6 to a norm. Half are clipped.

    The sum of another clip is rejected.
    """
    model, x = mlp(), numbers(*shape).double()
    samples, _ = by_opacus(model, x, 1.0)
    whole = sum(g.flatten(1).square().sum(1) for g in samples.values()).sqrt()
    limit = float(whole.median())
    norms, sums = recorded(model, x, FlatClipping(limit))
    for layer, squares in norms.items():
        own = [g.flatten(1).square().sum(1) for n, g in samples.items() if n.startswith(layer)]
        assert squares.numpy() == pytest.approx(sum(own).numpy(), rel=1e-10)
    _, expected = by_opacus(model, x, limit)
    for name, value in sums.items():
        assert value.numpy() == pytest.approx(expected[name].numpy(), rel=0, abs=2e-6)
    _, other = by_opacus(model, x, 0.9 * limit)
    assert any(not torch.allclose(v, other[n], rtol=1e-3) for n, v in sums.items())


def test_layers_are_clipped_as_opacus_clips_parameters() -> None:
    """One parameter a layer, so that both have the same parts; 2e-6."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))
    model, x = model.double(), numbers(8, 9).double()
    _, sums = recorded(model, x, LayerClipping({"0": 0.4, "2": 0.7}))
    _, expected = by_opacus(model, x, [0.4, 0.7])
    for name, value in sums.items():
        assert value.numpy() == pytest.approx(expected[name].numpy(), rel=0, abs=2e-6)


@pytest.mark.parametrize("stability", [0.01, 1.0])
def test_automatic_clips_are_those_of_torch_func(stability: float) -> None:
    """Σ C/(‖G_i‖ + γ) G_i by ``vmap`` of ``grad``; 1e-10."""
    model, x = mlp(), numbers(5, 9).double()
    parameters = dict(model.named_parameters())

    weights = numbers(4, seed=1).double()  # those of output_losses

    def loss(values: dict[str, Tensor], one: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, one[None])
        return (torch.tanh(output[0]) * weights).sum()

    samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    size = sum(g.flatten(1).square().sum(1) for g in samples.values()).sqrt()
    _, sums = recorded(model, x, AutomaticClipping(0.3, stability))
    for name, value in sums.items():
        expected = torch.tensordot(0.3 / (size + stability), samples[name], 1)
        assert value.detach().numpy() == pytest.approx(
            expected.detach().numpy(), rel=1e-9, abs=1e-12
        )


def test_scaled_rows_are_those_that_torch_normalises() -> None:
    """Samples of Opacus, rows by ``functional.normalize``, the clip by hand; 1e-9."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False))
    model, x = model.double(), numbers(8, 9).double()
    samples, _ = by_opacus(model, x, 1.0)
    scaled = {n: 0.3 * nn.functional.normalize(g, dim=2) for n, g in samples.items()}
    size = sum(g.flatten(1).square().sum(1) for g in scaled.values()).sqrt()
    with SampleRecorder(model, dense=True) as recorder:
        output_losses(x)(model).sum().backward()
        sums = clipped_sums(recorder, FlatClipping(0.5), transform=RowScaling(0.3))
    for name, value in sums.items():
        expected = torch.tensordot((0.5 / size).clamp(max=1.0), scaled[name], 1)
        assert value.numpy() == pytest.approx(expected.numpy(), rel=1e-9, abs=1e-12)


def test_the_noise_is_as_large_as_that_of_opacus() -> None:
    """F test at level 1e-5 on 25,600 numbers each; 8 % more σ is rejected.

    Ours is drawn with .1 % more, for rounding in the clip.
    """
    z, norm, batch, steps = 1.3, 0.7, 4, 100
    ours = noises(Silent(None, outputs=64), "dp-sgd", steps, z=z, max_grad_norm=norm) / 1.001
    layer = nn.Linear(4, 64, bias=False)
    optimizer = DPOptimizer(
        torch.optim.SGD(layer.parameters(), lr=0.1),
        noise_multiplier=z,
        max_grad_norm=norm,
        expected_batch_size=batch,
        generator=torch.Generator().manual_seed(2),
    )
    weight: Any = layer.weight
    theirs = []
    for _ in range(steps):
        weight.grad_sample = torch.zeros(batch, 64, 4)
        optimizer.pre_step()
        theirs.append(weight.grad.clone().numpy())
        optimizer.zero_grad()
    ratio = float(np.mean(ours**2) / np.mean(np.square(theirs)))
    law = stats.f(ours.size, np.size(theirs))
    assert 5e-6 < law.cdf(ratio) < 1 - 5e-6
    assert not 5e-6 < law.cdf(ratio * 1.08**2) < 1 - 5e-6


def peer_epsilon(z: float, rate: float, steps: int, *, upper: bool) -> float:
    one = peer.from_gaussian_mechanism(
        z,
        sampling_prob=rate,
        value_discretization_interval=1e-3,
        pessimistic_estimate=upper,
        use_connect_dots=upper,
    )
    return one.self_compose(steps).get_epsilon_for_delta(DELTA)


def test_the_bound_of_a_run_is_that_of_two_peers() -> None:
    """Between both ends of dp-accounting, 1 %; below Opacus' Rényi ε. One step less is less."""
    private = make(model_for("dp-sgd"), z=1.1)
    run(private, 2)
    found = private.bound().epsilon
    assert peer_epsilon(1.1, 0.25, 8, upper=False) <= found
    assert found <= 1.01 * peer_epsilon(1.1, 0.25, 8, upper=True)
    assert peer_epsilon(1.1, 0.25, 7, upper=True) < found * 0.99
    opacus = OpacusAccountant()
    opacus.history = [(1.1, 0.25, 8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found < opacus.get_epsilon(DELTA) < 1.5 * found


def test_the_noise_for_a_target_is_the_least_by_a_peer() -> None:
    """dp-accounting: at z it is met, at 2 % less it is not."""
    private = make(model_for("dp-sgd"), privacy=TargetEpsilon(2.0, epochs=3), rate=0.1)
    z = private.noise_multiplier
    assert peer_epsilon(z, 0.1, 30, upper=False) <= 2.0
    assert peer_epsilon(0.98 * z, 0.1, 30, upper=False) > 2.0


@pytest.mark.parametrize("shape", [(300, 500), (64, 768)])
@pytest.mark.parametrize("shrinker", ["frobenius", "debias", "hard"])
def test_the_cosine_of_one_value_is_its_overlap(shape: tuple[int, int], shrinker: Any) -> None:
    """Oracle: c_l c_r of Benaych-Georges and Nadakuditi, whatever f makes of the value; 1e-10."""
    n, m = shape
    x = 2.3 * (n * m) ** 0.25
    left = (x**4 - n * m) / (x**2 * (x**2 + n))
    right = (x**4 - n * m) / (x**2 * (x**2 + m))
    found = predicted_cosine([x], 1.0, shape, shrinker)
    assert found == pytest.approx(math.sqrt(left * right), rel=1e-10)
