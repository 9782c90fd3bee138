"""FLoRALinear against −η G AᵀA from the definition, its master weights and its momentum."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_privacy.core import (
    FLoRALinear,
    FLoRAMomentum,
    RandomProjection,
    decompress,
    flora_layers,
    is_conv1d,
    refresh,
    sgd_step,
)
from lora_privacy.errors import LoraPrivacyError, NonFiniteError, UnsupportedLayerError

N, M, R, RATE = 7, 12, 3, 0.1
BASES = {"linear": lambda: nn.Linear(M, N), "conv1d": lambda: Conv1D(N, M)}


def make(
    kind: str = "linear",
    dtype: torch.dtype = torch.float64,
    alpha: float = R,
    resample_every: int = 1,
) -> FLoRALinear:
    """A layer with projection seed 1 on a base drawn from seed 0."""
    torch.manual_seed(0)
    base = BASES[kind]().to(dtype)
    return FLoRALinear(base, R, alpha, RandomProjection(R, M, seed=1), resample_every)


def rows(layer: FLoRALinear) -> torch.Tensor:
    """A copy of the trained weight as (out, in)."""
    weight = layer.weight.detach().clone()
    return weight.T if is_conv1d(layer.base) else weight


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(5, k, generator=g, dtype=torch.float64).to(dtype) for k in (M, N))


def loss_of(module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient depends on the weight."""
    return (torch.tanh(module(x)) - y).square().sum()


def dense_gradient(weight: torch.Tensor, bias: torch.Tensor, seed: int) -> torch.Tensor:
    """G by autograd on a plain dense map."""
    weight = weight.clone().requires_grad_()
    x, y = batch(seed)
    loss = (torch.tanh(x @ weight.T + bias) - y).square().sum()
    return torch.autograd.grad(loss, weight)[0]


def a_of(step: int) -> torch.Tensor:
    """A of the test projection."""
    return RandomProjection(R, M, seed=1).matrix(step, torch.float64)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("alpha", [R, 2.0 * R])
def test_sgd_steps_are_projected_gradients(kind: str, alpha: float) -> None:
    """Oracle: W − η s² G AᵀA with autograd's dense G and a fresh A each step; 1e-12."""
    layer = make(kind, alpha=alpha)
    expected = rows(layer)
    for step in range(3):
        gradient = dense_gradient(expected, layer.bias.detach(), 10 + step)
        a = a_of(step)
        expected = expected - RATE * (alpha / R) ** 2 * gradient @ a.T @ a
        loss_of(layer, *batch(10 + step)).backward()
        compressed = layer.expand.weight.grad
        assert torch.allclose(compressed, alpha / R * gradient @ a.T, rtol=1e-12, atol=1e-12)
        sgd_step(layer, RATE)
        assert torch.allclose(rows(layer), expected, rtol=1e-12, atol=1e-12)
        assert layer.expand.weight.grad is None
    assert layer.cycle == 3


def test_a_fresh_layer_changes_nothing() -> None:
    """B = 0: outputs and input gradients are those of the base, bit for bit."""
    layer = make()
    plain = copy.deepcopy(layer.base)
    x, y = batch(1)
    grads = []
    for module in (layer, plain):
        inputs = x.clone().requires_grad_()
        loss = loss_of(module, inputs, y)
        grads.append((loss, torch.autograd.grad(loss, inputs, retain_graph=True)[0]))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.allclose(grads[0][1], grads[1][1], rtol=1e-14, atol=1e-14)


def test_dense_gradient_is_never_formed() -> None:
    """The weight asks for a gradient, but a backward pass leaves none there."""
    layer = make()
    loss_of(layer, *batch(1)).backward()
    assert layer.weight.requires_grad
    assert layer.weight.grad is None
    assert layer.expand.weight.grad is not None


class Undrawn:
    """A projection that must not be asked for."""

    def matrix(self, *args: object) -> torch.Tensor:
        raise AssertionError("A was drawn")


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_idle_layer_is_its_base(kind: str, dtype: torch.dtype) -> None:
    """B frozen, or gradients off: output and input gradient as before, and A is not drawn.

    Oracle: the same layer with its compressed branch, bit for bit.
    """
    layer = make(kind, dtype)
    x, y = batch(1, dtype)
    inputs = x.clone().requires_grad_()
    active = layer(inputs)
    expected = torch.autograd.grad((torch.tanh(active) - y).square().sum(), inputs)[0]
    idle = make(kind, dtype)
    idle.projection = Undrawn()
    with torch.no_grad():
        assert torch.equal(idle(x), active)
    with pytest.raises(AssertionError, match="A was drawn"):
        idle(x)
    idle.expand.weight.requires_grad_(False)
    output = idle(inputs)
    assert output.dtype == active.dtype == dtype
    assert torch.equal(output, active)
    loss = (torch.tanh(output) - y).square().sum()
    assert torch.equal(torch.autograd.grad(loss, inputs)[0], expected)
    assert all(parameter.grad is None for parameter in idle.parameters())


def test_an_idle_pass_changes_no_later_one() -> None:
    """Evaluation between the steps, and B frozen for a while, leave the same weights."""
    layer, twin = make(), make()
    for step in range(3):
        with torch.no_grad():
            layer(next(batch(40 + step)))
        layer.expand.weight.requires_grad_(False)
        layer(next(batch(50 + step)))
        layer.expand.weight.requires_grad_(True)
        for module in (layer, twin):
            loss_of(module, *batch(step)).backward()
            sgd_step(module, RATE)
    assert torch.equal(rows(layer), rows(twin))


def test_a_moved_b_is_reported_in_an_idle_pass() -> None:
    """An evaluation without the branch would differ from the training that B took part in."""
    layer = make()
    with torch.no_grad():
        layer.expand.weight[0, 0] = 1.0
        with pytest.raises(LoraPrivacyError, match="must stay 0"):
            layer(next(batch(0)))
    layer.expand.weight.requires_grad_(False)
    with pytest.raises(LoraPrivacyError, match="must stay 0"):
        layer(next(batch(0)))


def test_accumulation_over_a_cycle_is_the_sum() -> None:
    """Three micro-batches in one cycle: −η Σ G_i AᵀA with one A."""
    layer = make()
    start, a = rows(layer), a_of(0)
    total = sum(dense_gradient(start, layer.bias.detach(), seed) for seed in (1, 2, 3))
    for seed in (1, 2, 3):
        loss_of(layer, *batch(seed)).backward()
    sgd_step(layer, RATE)
    assert torch.allclose(rows(layer), start - RATE * total @ a.T @ a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(
    ("optimiser", "options"),
    [
        (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
        # Adam hides a wrong scale of the gradient, momentum does not.
        (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    ],
)
def test_any_dense_optimiser_sees_the_decompressed_gradient(
    kind: str, optimiser: type[torch.optim.Optimizer], options: dict
) -> None:
    """Oracle: the optimiser on a plain weight fed s² G AᵀA by hand, ten steps; 1e-12."""
    layer = make(kind, alpha=2.0 * R)
    expected = nn.Parameter(rows(layer))
    ours = optimiser([p for p in layer.parameters() if p.requires_grad], **options)
    theirs = optimiser([expected], **options)
    for step in range(10):
        expected.grad = dense_gradient(expected.detach(), layer.bias.detach(), step)
        a = a_of(step)
        expected.grad = 4.0 * expected.grad @ a.T @ a
        theirs.step()
        loss_of(layer, *batch(step)).backward()
        decompress(layer)
        ours.step()
        ours.zero_grad()
        refresh(layer)
        assert torch.allclose(rows(layer), expected, rtol=1e-12, atol=1e-12)
    assert not layer.expand.weight.any()


def test_a_weight_cast_to_half_after_adapting_is_refused() -> None:
    """With or without a master, by every way to end a cycle."""
    for layer in (make(dtype=torch.float32).bfloat16(), make(dtype=torch.bfloat16).bfloat16()):
        for end in (layer.decompress, layer.refresh, lambda: layer.fold(torch.zeros(N, R))):  # noqa: B023
            with pytest.raises(LoraPrivacyError, match="Cast the model first"):
                end()


def test_small_steps_into_bf16_are_kept() -> None:
    """200 updates of 1e-5 into weights of .05: .052, where bf16 itself would keep .05."""
    base = nn.Linear(M, N, dtype=torch.bfloat16)
    with torch.no_grad():
        base.weight.fill_(0.05)
    layer = FLoRALinear(base, R, R, RandomProjection(R, M, "orthonormal", seed=1))
    naive, start = base.weight.detach().clone(), base.weight.detach().float().clone()
    step = torch.full((N, M), 1e-5)
    for _ in range(200):
        naive += step.to(torch.bfloat16)
        a = layer.a()
        # Rank r cannot hold the constant matrix: fold its projection, which has a known sum.
        layer.fold(step @ a.T)
        layer.refresh()
    assert torch.equal(naive.float(), start)
    moved = layer.weight.detach() - start
    a = RandomProjection(R, M, "orthonormal", seed=1)
    expected = sum(step @ a.matrix(t).T @ a.matrix(t) for t in range(200))
    assert torch.allclose(moved, expected, rtol=1e-3, atol=1e-7)
    assert 1.5e-3 < float(moved.mean()) < 2.5e-3
    # What the model runs with is the master, rounded.
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.base.weight, layer.weight.to(torch.bfloat16))
    assert not torch.equal(layer.base.weight.float(), start)


def test_half_precision_trains_through_its_master() -> None:
    """AdamW moves the float32 master; refresh rounds the base from it."""
    layer = make(dtype=torch.bfloat16)
    trained = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trained == ["master", "expand.weight"]
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    x, y = batch(0, torch.bfloat16)
    losses = []
    for _ in range(60):
        loss = loss_of(layer, x, y)
        losses.append(loss.item())
        loss.backward()
        decompress(layer)
        optimizer.step()
        refresh(layer)
        assert torch.equal(layer.base.weight, layer.weight.to(torch.bfloat16))
    assert losses[-1] < 0.8 * losses[0]


def test_a_changes_every_resample_every_cycles() -> None:
    """And is never part of the state dict."""
    layer = make(resample_every=3)
    seen = []
    for _ in range(7):
        seen.append(layer.a().clone())
        layer.refresh()
    steps = [next(k for k in range(4) if torch.equal(a, a_of(k))) for a in seen]
    assert steps == [0, 0, 0, 1, 1, 1, 2]
    shapes = [tuple(t.shape) for t in layer.state_dict().values()]
    assert (R, M) not in shapes
    assert not list(layer.buffers())


def test_momentum_follows_its_recursion() -> None:
    """Oracle: C ← βC + (1−β)GAᵀ, W ← W − ηCA, C ← (C A_old)A_newᵀ with dense products."""
    layer = make(resample_every=2)
    optimizer = FLoRAMomentum(layer, lr=RATE, momentum=0.8)
    expected, state = rows(layer), torch.zeros(N, R, dtype=torch.float64)
    for step in range(7):
        a, following = a_of(step // 2), a_of((step + 1) // 2)
        gradient = dense_gradient(expected, layer.bias.detach(), step)
        state = 0.8 * state + 0.2 * gradient @ a.T
        expected = expected - RATE * state @ a
        if (step + 1) % 2 == 0:
            state = (state @ a) @ following.T
        loss_of(layer, *batch(step)).backward()
        optimizer.step()
        assert torch.allclose(rows(layer), expected, rtol=1e-11, atol=1e-12)
        assert torch.allclose(optimizer.state_dict()[""], state, rtol=1e-11, atol=1e-12)


def test_momentum_is_not_a_fresh_projection() -> None:
    """The two uses differ from the second step on, also at resample_every = 1."""
    one, other = make(), make()
    momentum = FLoRAMomentum(one, lr=RATE, momentum=0.5)
    for step in range(2):
        for layer in (one, other):
            loss_of(layer, *batch(step)).backward()
        momentum.step()
        sgd_step(other, RATE / 2)
        assert torch.allclose(rows(one), rows(other), rtol=1e-12) is (step == 0)


def test_a_momentum_carried_along_grows() -> None:
    """E‖q M₁M₂M₃‖² = (1 + (m+1)/r)³ ‖q‖², 20,000 draws, 4 standard errors; m/r is rejected.

    The draws are numpy's; the claim is that of docs/theory/dynamics.md.
    """
    rng, r, m = np.random.default_rng(4), 12, 4
    q = np.tile(rng.standard_normal(m), (20_000, 1))
    size = (q[0] ** 2).sum()
    for _ in range(3):
        a = rng.standard_normal((len(q), r, m)) / np.sqrt(r)
        q = np.einsum("sr,srj->sj", np.einsum("sj,srj->sr", q, a), a)
    grown = (q**2).sum(1) / size
    error = grown.std() / np.sqrt(len(grown))
    assert abs(grown.mean() - (1 + (m + 1) / r) ** 3) < 4 * error
    assert abs(grown.mean() - (1 + m / r) ** 3) > 4 * error


def test_momentum_state_goes_through_a_checkpoint() -> None:
    """A restored run takes the same step; a foreign state is refused."""
    layer = make()
    optimizer = FLoRAMomentum(layer, lr=RATE)
    loss_of(layer, *batch(0)).backward()
    optimizer.step()
    twin = make()
    twin.load_state_dict(layer.state_dict())
    restored = FLoRAMomentum(twin, lr=RATE)
    restored.load_state_dict(optimizer.state_dict())
    for module, stepped in ((layer, optimizer), (twin, restored)):
        loss_of(module, *batch(1)).backward()
        stepped.step()
    assert torch.equal(rows(layer), rows(twin))
    with pytest.raises(ValueError, match="No FLoRA layer 'x'"):
        restored.load_state_dict({"x": torch.zeros(N, R)})


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimiser_step_without_decompress_is_reported(fused: bool) -> None:
    """B has moved: the next forward pass says so, and does not go on with B ≠ 0."""
    layer = make()
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], fused=fused)
    loss_of(layer, *batch(0)).backward()
    optimizer.step()
    with pytest.raises(LoraPrivacyError, match="decompress"):
        layer(next(batch(0)))


def test_refresh_refuses_to_lose_a_gradient() -> None:
    """A gradient compressed by one A means nothing under the next."""
    layer = make()
    loss_of(layer, *batch(0)).backward()
    with pytest.raises(LoraPrivacyError, match="not used"):
        layer.refresh()
    layer.expand.weight.grad = None
    layer.refresh()


def test_nan_gradients_move_nothing() -> None:
    """Neither by folding nor by decompression, in any layer of the model."""
    model = nn.Sequential(make(), nn.Tanh(), nn.Linear(N, M, dtype=torch.float64), make("conv1d"))
    loss_of(model, *batch(0)).backward()
    list(flora_layers(model).values())[1].expand.weight.grad[0, 0] = float("nan")
    before = [rows(layer) for layer in flora_layers(model).values()]
    with pytest.raises(NonFiniteError, match="'3' holds NaN"):
        sgd_step(model, RATE)
    with pytest.raises(NonFiniteError, match="'3' holds NaN"):
        FLoRAMomentum(model, RATE).step()
    with pytest.raises(NonFiniteError, match="compressed gradient"):
        decompress(model)
    with pytest.raises(NonFiniteError, match="factor"):
        model[0].fold(torch.full((N, R), float("inf")))
    after = [rows(layer) for layer in flora_layers(model).values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_resumed_run_goes_on_with_the_next_matrix() -> None:
    """The number of the cycle is in the state dict: a seed's matrices are not met twice."""
    layer = make(dtype=torch.bfloat16)
    for step in range(3):
        loss_of(layer, *batch(step, torch.bfloat16)).backward()
        sgd_step(layer, RATE)
    twin = make(dtype=torch.bfloat16)
    twin.load_state_dict(layer.state_dict())
    assert twin.cycle == 3
    assert torch.equal(twin.a(), layer.a())
    x, _ = batch(9, torch.bfloat16)
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(twin.weight, layer.weight)


def test_factors_say_all_or_nothing() -> None:
    """Sums per A; dropped when something else moves the weight or when they outgrow it."""
    layer = make(resample_every=2)
    start = rows(layer)
    for step in range(3):
        loss_of(layer, *batch(step)).backward()
        sgd_step(layer, RATE)
    factors = layer.factors()
    assert list(factors) == [0, 1]
    replayed = start + sum(factor @ a_of(step) for step, factor in factors.items())
    assert torch.allclose(replayed, rows(layer), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert layer.factors() is None
    stepped, layer = make(), make()
    assert stepped.factors() == {}
    loss_of(stepped, *batch(0)).backward()
    stepped.decompress()
    assert stepped.factors() is None
    for step in range(12):
        loss_of(layer, *batch(step)).backward()
        sgd_step(layer, RATE)
    assert layer.factors() is None


def test_bad_layers_and_arguments() -> None:
    """Each error says what must hold."""
    projection = RandomProjection(R, M, seed=1)
    with pytest.raises(ValueError, match="resample_every must be at least 1"):
        FLoRALinear(nn.Linear(M, N), R, R, projection, 0)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        FLoRALinear(nn.Linear(M, N), 0, R, projection)
    packed = nn.Linear(M, N)
    packed.weight = nn.Parameter(packed.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match="unquantised"):
        FLoRALinear(packed, R, R, projection)
    with pytest.raises(ValueError, match="factor must have shape"):
        make().fold(torch.zeros(R, N))
    with pytest.raises(LoraPrivacyError, match="no FLoRA layer"):
        refresh(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lr must be positive"):
        sgd_step(make(), float("nan"))
    with pytest.raises(ValueError, match="momentum must lie in"):
        FLoRAMomentum(make(), 0.1, 1.0)
