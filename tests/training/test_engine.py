"""make_private: what is released at a step, what it costs, and the order it must happen in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lora_privacy.core import FLoRALinear, RandomProjection, adapt
from lora_privacy.dp import PldAccountant, ProjectedGaussian, SampledGaussian
from lora_privacy.errors import (
    BudgetSpentError,
    StaleParameterError,
    TrainingOrderError,
    UnsupportedLayerError,
    UnsupportedTrainingError,
)
from lora_privacy.training import NoiseMultiplier, PrivateTraining, TargetEpsilon, make_private
from lora_privacy.training.randomness import KeyedRandomness

DELTA = 1e-5
METHODS = ("dp-sgd", "dp-lora", "dp-lora-fa", "dp-flora")
LEVEL = 1e-5
NONE = 1e-30  # a noise multiplier that adds nothing in float32


def records(size: int = 40, width: int = 6) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, width, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def model_for(method: str, width: int = 6, rank: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 2))
    if method == "dp-flora":
        adapt(model, rank, method="flora", targets=("0", "2"), law="orthonormal", seed=0)
    elif method != "dp-sgd":
        name = "lora" if method == "dp-lora" else "lora-fa"
        adapt(model, rank, method=name, targets=("0",), seed=0, trainable=("2",))
    return model


def make(
    model: nn.Module,
    method: str = "dp-sgd",
    *,
    data: TensorDataset | None = None,
    rate: float = 0.25,
    lr: float = 0.1,
    z: float = 1.0,
    **options: Any,
) -> PrivateTraining:
    wanted = [p for p in model.parameters() if p.requires_grad]
    options.setdefault("privacy", NoiseMultiplier(z))
    options.setdefault("max_grad_norm", 1.0)
    return make_private(
        model,
        torch.optim.SGD(wanted, lr=lr),
        DataLoader(records() if data is None else data),
        method=method,  # pyright: ignore[reportArgumentType]
        delta=DELTA,
        sample_rate=rate,
        **options,
    )


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def run(private: PrivateTraining, epochs: int = 1) -> None:
    for _ in range(epochs):
        for batch in private.data_loader:
            loss_of(private.model, batch).backward()
            private.optimizer.step()


class Caught:
    """Gradients that the optimizer sees, by parameter path, one entry a step."""

    def __init__(self, private: PrivateTraining) -> None:
        self.steps: list[dict[str, Tensor]] = []
        # Registered last, so it runs after the hook that releases the gradient.
        private.optimizer.register_step_pre_hook(lambda *_: self._look(private))

    def _look(self, private: PrivateTraining) -> None:
        found = {n: p.grad for n, p in private.parameters.items() if p.grad is not None}
        if found:
            self.steps.append({name: grad.clone() for name, grad in found.items()})


class Silent(nn.Module):
    """A linear map whose loss is 0 for every sample, so that what is released is noise alone."""

    def __init__(self, rank: int | None, law: str = "orthonormal", outputs: int = 3) -> None:
        super().__init__()
        self.map = nn.Linear(4, outputs, bias=False)
        if rank is not None:
            adapt(self, rank, method="flora", targets=("map",), law=law, seed=0)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * self.map(x)


def noises(model: nn.Module, method: str, steps: int, **options: Any) -> np.ndarray:
    """Gradients of ``steps`` steps in which no sample contributes, (steps, outputs, 4)."""
    private = make(model, method, data=records(8, 4), rate=0.5, **options)
    caught = Caught(private)
    while private.step < steps:
        for batch in private.data_loader:
            model(batch[0]).sum().backward()
            private.optimizer.step()
    return np.stack([step["map.weight"].numpy() for step in caught.steps[:steps]])


# ---- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [None, 3])
@pytest.mark.parametrize("method", ["dp-sgd", "dp-lora", "dp-lora-fa"])
def test_without_noise_and_clip_it_is_plain_training(method: str, part: int | None) -> None:
    """Step by step the weights of a twin that autograd trains on the same batches; 1e-6."""
    private = make(
        model_for(method), method, z=NONE, max_grad_norm=1e6, physical_batch_size=part,
        secure=False,
    )  # fmt: skip
    twin = model_for(method)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    data = records()
    for _ in range(8):
        rows = private.data_loader.indices(private.step)
        before = private.step
        batches = iter(private.data_loader)
        while private.step == before and (batch := next(batches, None)) is not None:
            loss_of(private.model, batch).backward()
            private.optimizer.step()
        optimizer.zero_grad()
        if len(rows):
            x, y = (tensor[rows] for tensor in data.tensors)
            loss = functional.cross_entropy(twin(x), y, reduction="sum") / (0.25 * 40)
            loss.backward()
        optimizer.step()
        for mine, other in zip(private.model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("law", ["orthonormal", "gaussian"])
def test_without_noise_and_clip_flora_is_plain_flora_with_the_same_matrices(law: str) -> None:
    """The twin: FLoRA layers that autograd trains, given the A of each step."""

    def build() -> nn.Module:
        model = model_for("dp-sgd")
        return adapt(model, 2, method="flora", targets=("0", "2"), law=law, seed=0, alpha=3.0)  # pyright: ignore

    private = make(build(), "dp-flora", z=NONE, max_grad_norm=1e6, secure=False)
    source = private.randomness
    twin = build()
    layers = {n: m for n, m in twin.named_modules() if isinstance(m, FLoRALinear)}
    data = records()
    moved = 0.0
    for step in range(6):
        rows = private.data_loader.indices(step)
        if batch := next(iter(private.data_loader), None):
            loss_of(private.model, batch).backward()
            private.optimizer.step()
        seed = source.seed("projection", step)
        for name, layer in layers.items():
            layer.projection = RandomProjection(2, layer.in_features, law, seed=seed, layer=name)  # pyright: ignore
            layer._cycle, layer._a = 0, None
        x, y = (tensor[rows] for tensor in data.tensors)
        (functional.cross_entropy(twin(x), y, reduction="sum") / 10.0).backward()
        for layer in layers.values():
            layer.decompress()
            with torch.no_grad():
                layer.weight.sub_(0.1 * layer.weight.grad)
            layer.weight.grad = None
        for mine, other in zip(private.model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
            moved += float(other.detach().abs().sum())
    assert moved > 0


def test_a_dropped_batch_comes_again_with_the_same_records() -> None:
    """Else a look at its loss would choose who takes part: record 0 would be in every step."""
    private = make(model_for("dp-sgd"), data=records(40), rate=0.25)
    chosen = []
    for _ in range(30):
        x, _ = next(iter(private.data_loader))
        chosen.append(x)
    assert private.step == 0
    assert all(x.equal(chosen[0]) for x in chosen)
    for batch in private.data_loader:
        assert batch[0].equal(chosen[0])
        loss_of(private.model, batch).backward()
        private.optimizer.step()
        break
    others = [private.data_loader.indices(step).tolist() for step in range(1, 9)]
    assert len({tuple(rows) for rows in others}) > 4  # level 1e-20: other steps, other records


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_lie_in_memory_as_their_parameters_do(method: str, length: int) -> None:
    """Fused optimizers go through both by address: a transposed gradient moves other weights.

    Of eight positions the sums of B come out transposed; of one they do not.
    """
    x, y = records(40).tensors
    data = TensorDataset(x[:, None].expand(-1, length, -1).contiguous(), y)
    private = make(model_for(method), method, data=data, rate=0.5)
    caught: list[bool] = []
    private.optimizer.register_step_pre_hook(
        lambda *_: caught.extend(
            p.grad.stride() == p.stride()
            for p in private.parameters.values()
            if p.grad is not None
        )
    )
    for _ in range(2):
        for inputs, labels in private.data_loader:
            functional.cross_entropy(private.model(inputs).mean(1), labels).backward()
            private.optimizer.step()
    assert len(caught) == 4 * len(private.parameters)
    assert all(caught)


def test_the_sum_is_divided_by_the_expected_batch_size() -> None:
    """Each sample adds the same: the gradient is size·g/(q·N), whatever the realised size."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.map(torch.ones_like(x[:, :1]))

    private = make(Constant(), z=NONE, max_grad_norm=1e6, secure=False)
    caught = Caught(private)
    for step in range(8):
        size = len(private.data_loader.indices(step))
        batch = next(iter(private.data_loader), None)
        if batch is not None:
            private.model(batch[0]).mean().backward()
            private.optimizer.step()
        assert float(caught.steps[-1]["map.weight"]) == pytest.approx(size / 10, rel=1e-6)
        assert private.step == step + 1
    assert len({float(s["map.weight"]) for s in caught.steps}) > 2  # realised sizes would hide


@pytest.mark.parametrize("method", METHODS)
def test_no_sample_moves_the_sum_by_more_than_the_clip(method: str) -> None:
    """With and without one record, same coins, no noise: the released sums differ by ≤ C."""
    limit = 0.05
    sums = []
    for size in (40, 39):
        data = TensorDataset(*(t[:size] for t in records().tensors))
        private = make(
            model_for(method), method, data=data, rate=1.0, z=NONE, max_grad_norm=limit,
            secure=False,
        )  # fmt: skip
        if private._fresh is not None:
            private._fresh.draw = lambda: 7  # the same A in both runs
        seen: dict[str, Tensor] = {}
        for batch in private.data_loader:
            loss_of(private.model, batch).backward()
            private._absorb()
            seen = dict(private._sums)
            break
        sums.append(seen)
        if method == "dp-flora":
            # Projections have orthonormal rows times √(m/r): undo the length.
            layers = private._fresh.layers  # pyright: ignore
            for name, total in seen.items():
                layer = layers[name.removesuffix(".weight")]
                seen[name] = total * math.sqrt(layer.rank / layer.in_features)
    gap = math.sqrt(sum(float((sums[0][n] - sums[1][n]).square().sum()) for n in sums[0]))
    least = 0.1 if method == "dp-flora" else 0.9  # A keeps a part of the gradient
    assert least * limit < gap <= limit * (1 + 1e-5)


def test_a_record_that_adds_nothing_does_not_move_the_sum_of_parts() -> None:
    """One record of gradient 0 in front shifts what parts of two add: by nothing.

    In float32 parts of .3 and .6 units in the last place of the sum were lost or made whole, parts
    of .45 all lost: with 16,000 records the sums differed by a clipping norm.
    """
    unit = 2.0 ** (7 - 23)  # of 128
    tail = [0.15 * unit, 0.15 * unit, 0.3 * unit, 0.3 * unit] * 16
    totals = []
    for front in ([], [0.0]):
        values = torch.tensor([*front, *[1.0] * 129, *tail])[:, None]
        private = make(
            nn.Linear(1, 1, bias=False), data=TensorDataset(values), rate=1.0, secure=False,
            physical_batch_size=2, loss="per-sample-sum",
        )  # fmt: skip
        release, seen = private._noising.release, []
        private._noising.release = lambda sums, *rest: seen.append(sums) or release(sums, *rest)  # noqa: B023
        for (batch,) in private.data_loader:
            private.model(batch).sum().backward()
            private.optimizer.step()
        totals.append(float(seen[0]["weight"]))
    assert totals[0] == pytest.approx(totals[1], abs=1e-9)


# ---- the noise ---------------------------------------------------------------------------------


def test_the_noise_has_the_stated_deviation() -> None:
    """χ² test at level 1e-5 on 96,000 numbers; σ off by 3 %, or no 1/b, is rejected.

    The noise is the system's, another one in every run: 3 % is 9 standard errors beyond the level.
    """
    found = noises(Silent(None, outputs=16), "dp-sgd", 1500, z=1.3, max_grad_norm=0.7)
    std = 1.001 * 1.3 * 0.7 / (0.5 * 8)

    def p_value(sigma: float) -> float:
        total = float(np.square(found / sigma).sum())
        return 2 * min(stats.chi2.cdf(total, found.size), stats.chi2.sf(total, found.size))

    assert p_value(std) > LEVEL
    for wrong in (1.03 * std, std / 1.03, std * 4, std * 2):
        assert p_value(wrong) < LEVEL
    assert stats.kstest(found.ravel() / std, "norm").pvalue > LEVEL
    flat = found.reshape(len(found), -1)
    off = np.corrcoef(flat, rowvar=False)[~np.eye(64, dtype=bool)]
    assert np.abs(off).max() < 6 / len(found) ** 0.5
    later = np.corrcoef(flat[:-1].ravel(), flat[1:].ravel())[0, 1]
    assert abs(later) < 5 / flat[1:].size ** 0.5


@pytest.mark.parametrize(("clipping", "norm", "sensitivity"), [
    ("automatic", 0.7, 0.7), ("per-layer", 0.7, 0.7), ("per-layer", {"map": 0.3}, 0.3),
])  # fmt: skip
def test_the_noise_follows_the_sensitivity_of_the_clip(
    clipping: str, norm: Any, sensitivity: float
) -> None:
    """χ² test at level 1e-5 on 38,400 numbers; 5 % off is rejected."""
    model = Silent(None, outputs=16)
    found = noises(model, "dp-sgd", 600, clipping=clipping, max_grad_norm=norm)
    total = float(np.square(found * 4 / (1.001 * sensitivity)).sum())
    law = stats.chi2(found.size)
    assert LEVEL < law.cdf(total) < 1 - LEVEL
    assert not LEVEL < law.cdf(total * 1.05**2) < 1 - LEVEL


@pytest.mark.parametrize("law", ["orthonormal", "gaussian"])
def test_projected_noise_has_the_covariance_of_noise_that_was_projected(law: str) -> None:
    """Given A the rows of the released (n, r) noise are N(0, σ² A Aᵀ).

    Whitened by an inverse of our own, their squares are χ² (level 1e-5); noise that was drawn
    i.i.d. on the (n, r) matrix, and σ off by 3 %, are rejected.
    """
    model = Silent(2, law, outputs=32)
    private = make(model, "dp-flora", data=records(8, 4), rate=0.5, z=1.3, max_grad_norm=0.7)
    seen: list[tuple[np.ndarray, np.ndarray]] = []  # dense gradient and A, a step each
    caught = Caught(private)
    fresh = private._fresh
    assert fresh is not None
    private.optimizer.register_step_pre_hook(
        lambda *_: (
            seen.append(
                (
                    caught.steps[-1]["map.weight"].double().numpy(),
                    fresh._matrices["map"].double().numpy(),
                )
            )
            if "map" in fresh._matrices
            else None
        )
    )
    while private.step < 1500:
        for batch in private.data_loader:
            model(batch[0]).sum().backward()
            private.optimizer.step()
    std = 1.001 * 1.3 * 0.7 / 4
    squares, unwhitened = [], []
    for dense, a in seen:
        gram = a @ a.T
        released = dense @ a.T @ np.linalg.inv(gram)  # undo ... @ A
        squares.append(np.einsum("ni,ij,nj->", released, np.linalg.inv(gram), released))
        unwhitened.append(np.square(released).sum())
    law_of_sum = stats.chi2(len(seen) * 64)

    def accepted(values: list[float], sigma: float) -> bool:
        return bool(LEVEL < law_of_sum.cdf(np.sum(values) / sigma**2) < 1 - LEVEL)

    assert accepted(squares, std)
    assert not accepted(squares, 1.03 * std)
    assert not accepted(squares, std / 1.03)
    assert not accepted(unwhitened, std)


def test_every_step_has_a_projection_of_its_own() -> None:
    """Row spaces of 800 steps average to (r/m) I within 5 standard errors; a reused A does not."""

    def spread(dense: np.ndarray) -> float:
        total = np.zeros((4, 4))
        for step in dense:
            basis = np.linalg.svd(step, full_matrices=False)[2][:2]
            total += basis.T @ basis
        return float(np.abs(total / len(dense) - 0.5 * np.eye(4)).max())

    found = noises(Silent(2), "dp-flora", 800)
    assert np.linalg.matrix_rank(found[0], tol=1e-5) == 2
    # Var of an entry of a projector is below 1/8 at m = 4, r = 2.
    limit = 5 * math.sqrt(1 / 8 / 800)
    assert spread(found) < limit
    assert spread(np.broadcast_to(found[0], found.shape)) > limit


def test_one_global_seed_does_not_fix_the_noise() -> None:
    draws = []
    for options in ({}, {}, {"secure": False}, {"secure": False, "deterministic": True}):
        torch.manual_seed(42)
        np.random.seed(42)  # noqa: NPY002 - the global one is the point
        draws.append(noises(Silent(None), "dp-sgd", 1, **options).ravel())
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert not np.isclose(first, second).any()


def test_the_noise_of_two_parameters_differs() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    private = make(model, data=records(8, 3), rate=0.5, secure=False)
    caught = Caught(private)
    for batch in private.data_loader:
        (0.0 * model(batch[0])).sum().backward()
        private.optimizer.step()
    assert not torch.isclose(caught.steps[0]["0.weight"], caught.steps[0]["1.weight"]).any()


# ---- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_bound_is_that_of_the_steps_taken(method: str) -> None:
    """Oracle: the accountant, told by hand. It says what it assumes."""
    private = make(model_for(method), method, z=1.1)
    run(private, 2)
    assert private.step == 8
    event: Any = SampledGaussian(1.1, 0.25)
    if method == "dp-flora":
        event = ProjectedGaussian([(6, 2), (5, 2)], 1.1, 0.25)
    bound = private.bound()
    assert bound.epsilon == PldAccountant().compose(event, 8).epsilon(DELTA).epsilon
    assert bound.delta == DELTA
    text = " ".join(bound.assumptions)
    assert "expected batch size is public" in text
    assert "training losses" in text
    assert "seed known" not in text
    assert private.bound(1e-3).epsilon < bound.epsilon


def test_empty_batches_cost_and_are_noise() -> None:
    """Three records at q = .05: nearly every batch is empty, and every step counts."""
    data = records(3)
    private = make(model_for("dp-sgd"), data=data, rate=0.05)
    caught = Caught(private)
    before = [p.clone() for p in private.model.parameters()]
    run(private)
    assert private.step == len(caught.steps) == 20
    assert len(private.accountant.events) == 1
    assert private.accountant.events[0][1] == 20
    assert not any(
        torch.equal(a, b) for a, b in zip(before, private.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_target_is_met_and_never_exceeded(method: str) -> None:
    private = make(model_for(method), method, privacy=TargetEpsilon(2.0, epochs=3), rate=0.1)
    run(private, 3)
    assert private.step == 30
    assert private.steps_left() == 0
    assert 1.9 < private.bound().epsilon <= 2.0
    before = [p.clone() for p in private.model.parameters()]
    with pytest.raises(BudgetSpentError, match="All 30 steps are taken"):
        run(private)
    assert all(torch.equal(a, b) for a, b in zip(before, private.model.parameters(), strict=True))


def test_replaced_records_cost_more_than_added_ones() -> None:
    """With every record in every batch, exchanging one moves the sum by 2C."""
    bounds = {}
    for adjacency in ("add-remove", "replace"):
        private = make(model_for("dp-sgd"), rate=1.0, z=4.0, adjacency=adjacency)
        run(private)
        bounds[adjacency] = private.bound()
    assert bounds["replace"].adjacency == "replace"
    wanted = PldAccountant().compose(SampledGaussian(2.0, 1.0)).epsilon(DELTA).epsilon
    assert bounds["replace"].epsilon == pytest.approx(wanted, rel=1e-9)
    assert bounds["add-remove"].epsilon < wanted


def test_a_known_seed_is_stamped() -> None:
    private = make(model_for("dp-sgd"), secure=False, deterministic=True)
    run(private)
    assert "noise seed known: no guarantee against its holder" in private.bound().assumptions
    with pytest.raises(ValueError, match="secure=False"):
        make(model_for("dp-sgd"), deterministic=True)


# ---- order -------------------------------------------------------------------------------------


def test_another_optimizer_moves_nothing() -> None:
    """A backward pass leaves no gradient for it."""
    model = model_for("dp-sgd")
    private = make(model)
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.clone() for p in model.parameters()]
    batch = next(iter(private.data_loader))
    loss_of(model, batch).backward()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_steps_need_a_batch_and_a_backward_pass_of_their_own() -> None:
    private = make(model_for("dp-sgd"), rate=0.9)
    model, optimizer = private.model, private.optimizer
    with pytest.raises(TrainingOrderError, match="without a batch"):
        optimizer.step()
    batches = iter(private.data_loader)
    batch = next(batches)
    with pytest.raises(TrainingOrderError, match="No backward pass"):
        optimizer.step()
    loss_of(model, batch).backward()
    with pytest.raises(TrainingOrderError, match="closure"):
        optimizer.step(lambda: 0.0)
    optimizer.step()
    with pytest.raises(TrainingOrderError, match="without a batch"):
        optimizer.step()
    assert private.step == len(private._ledger) == 1


def test_a_batch_without_a_step_is_refused() -> None:
    private = make(model_for("dp-sgd"), rate=0.5)
    batches = iter(private.data_loader)
    batch = next(batches)
    loss_of(private.model, batch).backward()
    with pytest.raises(TrainingOrderError, match=r"optimizer.step\(\) was not called"):
        next(batches)


def test_a_backward_pass_outside_of_a_batch_is_refused() -> None:
    private = make(model_for("dp-sgd"), rate=0.5)
    batches = iter(private.data_loader)
    loss_of(private.model, next(batches)).backward()
    private.optimizer.step()
    loss_of(private.model, [t[:3] for t in records().tensors]).backward()
    with pytest.raises(TrainingOrderError, match="belongs to no batch"):
        next(batches)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_the_loop_left_enters_no_later_step(method: str) -> None:
    """Ten parts of left batches, then a step: the sum holds the last batch alone."""
    private = make(
        model_for(method), method, rate=0.9, z=NONE, physical_batch_size=4, secure=False
    )  # fmt: skip
    for _ in range(10):
        loss_of(private.model, next(iter(private.data_loader))).backward()
        private.optimizer.step()
    assert private.step == 0
    caught = Caught(private)
    run(private)
    twin = make(model_for(method), method, rate=0.9, z=NONE, physical_batch_size=4, secure=False)
    twin._randomness = private._randomness
    other = Caught(twin)
    run(twin)
    for name, gradient in caught.steps[0].items():
        torch.testing.assert_close(gradient, other.steps[0][name])


def test_two_iterations_at_once_are_refused() -> None:
    private = make(model_for("dp-sgd"), rate=0.5)
    first, second = iter(private.data_loader), iter(private.data_loader)
    for batches in (first, second):
        loss_of(private.model, next(batches)).backward()
        private.optimizer.step()
    with pytest.raises(TrainingOrderError, match="Another iteration"):
        next(first)


def test_nothing_moves_without_clip_and_noise() -> None:
    """Unfrozen, added or left-over gradients are refused or dropped before any weight moves."""
    model = model_for("dp-lora-fa")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for parameter in frozen:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private = make_private(
        model, optimizer, DataLoader(records()), method="dp-lora-fa", max_grad_norm=1.0,
        privacy=NoiseMultiplier(1.0), delta=DELTA, sample_rate=0.9,
    )  # fmt: skip
    before = [p.clone() for p in frozen]
    run(private)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True))

    def attempt(change: Any, error: type[Exception], message: str) -> None:
        model = model_for("dp-flora")
        private = make(model, "dp-flora", rate=0.9)
        batch = next(iter(private.data_loader))
        change(model, private.optimizer)
        loss_of(model, batch).backward()
        moved = [p.clone() for p in model.parameters()]
        with pytest.raises(error, match=message):
            private.optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(moved, model.parameters(), strict=True))
        assert not len(private._ledger)

    def unfreeze(model: Any, optimizer: Any) -> None:
        optimizer.add_param_group({"params": [model[0].bias]})
        model[0].bias.requires_grad_(True)

    def add(model: Any, optimizer: Any) -> None:
        extra = nn.Parameter(torch.zeros(2))
        extra.grad = torch.ones(2)
        optimizer.add_param_group({"params": [extra]})

    attempt(unfreeze, UnsupportedLayerError, "asks for a gradient, but did not")
    attempt(add, TrainingOrderError, "neither clipped nor noised")


def test_an_optimizer_that_moves_on_its_own_is_refused() -> None:
    model = model_for("dp-sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_of(model, records().tensors).backward()
    optimizer.step()
    with pytest.raises(UnsupportedTrainingError, match="state of earlier steps"):
        make_private(
            model, optimizer, DataLoader(records()), method="dp-sgd", max_grad_norm=1.0,
            privacy=NoiseMultiplier(1.0), delta=DELTA,
        )  # fmt: skip


def test_what_is_accounted_cannot_be_changed_by_hand() -> None:
    private = make(model_for("dp-sgd"))
    for name in ("sample_rate", "noise_multiplier", "step", "expected_batch_size"):
        with pytest.raises(AttributeError):
            setattr(private, name, 1)
    assert not hasattr(private.data_loader, "sample_rate")


def test_one_noise_never_covers_two_sums() -> None:
    """Keyed noise depends on the sums, so that even a copied key and step give other noise."""
    sums = []
    for scale in (1.0, 2.0):
        data = TensorDataset(scale * records().tensors[0], records().tensors[1])
        private = make(model_for("dp-sgd"), data=data, rate=1.0, secure=False, deterministic=True)
        private._randomness = KeyedRandomness(bytes(32))
        caught = Caught(private)
        seen: dict[str, Tensor] = {}
        private.optimizer.register_step_pre_hook(lambda *_, p=private, s=seen: s.update(p._sums))
        run(private)
        noise = caught.steps[0]["0.weight"] * 40 - seen["0.weight"]
        sums.append(noise)
    assert not torch.isclose(sums[0], sums[1]).any()


def test_autocast_does_not_reach_clip_and_noise() -> None:
    """A step under bf16 autocast gives the gradient of one without, to float32 rounding."""
    found = []
    for enabled in (False, True):
        private = make(model_for("dp-sgd"), rate=1.0, secure=False)
        private._randomness = KeyedRandomness(bytes(32))
        caught = Caught(private)
        loss_of(private.model, next(iter(private.data_loader))).backward()
        with torch.autocast("cpu", enabled=enabled):
            private.optimizer.step()
        found.append(caught.steps[0]["0.weight"])
    torch.testing.assert_close(found[0], found[1])


def test_a_batch_of_another_size_is_refused() -> None:
    private = make(model_for("dp-sgd"), rate=0.9)
    batch = next(iter(private.data_loader))
    loss_of(private.model, [t[:2] for t in batch]).backward()
    with pytest.raises(UnsupportedLayerError, match="saw 2 samples of a batch of"):
        private.optimizer.step()
    assert not len(private._ledger)


def test_a_step_that_failed_after_its_release_is_not_released_again() -> None:
    """Other noise on the same sum would be a second release for one price."""
    private = make(model_for("dp-sgd"), rate=0.9)

    def fail(*_: object) -> None:
        raise MemoryError

    handle = private.optimizer.register_step_pre_hook(fail)
    loss_of(private.model, next(iter(private.data_loader))).backward()
    with pytest.raises(MemoryError):
        private.optimizer.step()
    assert len(private._ledger) == 1
    handle.remove()
    with pytest.raises(TrainingOrderError, match="neither clipped nor noised"):
        private.optimizer.step()
    for parameter in private.model.parameters():
        parameter.grad = None
    with pytest.raises(TrainingOrderError, match="released, but the optimizer failed"):
        private.optimizer.step()
    run(private)  # a new iteration counts the lost step and goes on
    assert private.step == len(private._ledger) == 2


def test_micro_batches_move_the_weights_once_a_step() -> None:
    private = make(model_for("dp-lora"), "dp-lora", rate=0.9, physical_batch_size=7)
    caught = Caught(private)
    before = {n: p.clone() for n, p in private.model.named_parameters()}
    for batch in private.data_loader:
        loss_of(private.model, batch).backward()
        unmoved = all(torch.equal(p, before[n]) for n, p in private.model.named_parameters())
        assert unmoved
        private.optimizer.step()
    assert len(caught.steps) == private.step == 1


def test_close_leaves_an_ordinary_model() -> None:
    private = make(model_for("dp-sgd"))
    run(private)
    private.close()
    loss = loss_of(private.model, records().tensors)
    loss.backward()
    assert all(p.grad is not None for p in private.model.parameters())
    private.optimizer.step()


# ---- what is refused ---------------------------------------------------------------------------


def test_a_uniform_a_a_held_a_and_an_unprojected_parameter_are_refused() -> None:
    for law, message in (("uniform", "Haar"), ("rademacher", "Haar")):
        model = adapt(nn.Sequential(nn.Linear(6, 2)), 2, method="flora", targets=("0",), law=law,
                      seed=0)  # fmt: skip
        with pytest.raises(UnsupportedTrainingError, match=message):
            make(model, "dp-flora")
    model = adapt(nn.Sequential(nn.Linear(6, 2)), 2, method="flora", targets=("0",), seed=0,
                  resample_every=2)  # fmt: skip
    with pytest.raises(UnsupportedTrainingError, match="only a fresh A at every step"):
        make(model, "dp-flora")
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    adapt(model, 2, method="flora", targets=("0",), seed=0, trainable=("1",))
    with pytest.raises(UnsupportedTrainingError, match="without a projection"):
        make(model, "dp-flora")


def test_flora_refuses_adam_transforms_and_denoisers() -> None:
    model = model_for("dp-flora")
    wanted = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(UnsupportedTrainingError, match="Adam's two would lie in full size"):
        make_private(
            model, torch.optim.AdamW(wanted), DataLoader(records()), method="dp-flora",
            max_grad_norm=1.0, privacy=NoiseMultiplier(1.0), delta=DELTA,
        )  # fmt: skip
    for options, message in (
        ({"transform": lambda _, g: g}, "takes no transform"),
        ({"denoiser": lambda _, g, __: g}, "takes no denoiser"),
        ({"clipping": "per-layer"}, "whole gradient"),
    ):
        with pytest.raises(UnsupportedTrainingError, match=message):
            make(model_for("dp-flora"), "dp-flora", **options)


@pytest.mark.parametrize("method", ["dp-lora", "dp-lora-fa", "dp-flora"])
def test_a_method_without_its_adapters_is_refused(method: str) -> None:
    with pytest.raises(UnsupportedTrainingError, match="adapt"):
        make(model_for("dp-sgd"), method)
    with pytest.raises(UnsupportedTrainingError, match="dp-flora"):
        make(model_for("dp-flora"), "dp-sgd")


def test_batch_norm_and_stale_parameters_are_refused() -> None:
    with pytest.raises(UnsupportedTrainingError, match="BatchNorm1d"):
        make(nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2)))
    model = model_for("dp-sgd")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(StaleParameterError, match="1 parameters of the optimizer"):
        make_private(
            model, optimizer, DataLoader(records()), method="dp-sgd", max_grad_norm=1.0,
            privacy=NoiseMultiplier(1.0), delta=DELTA,
        )  # fmt: skip
    private = make(model_for("dp-sgd"), rate=0.9)
    private.model[0].weight = nn.Parameter(private.model[0].weight.detach().clone())  # pyright: ignore
    loss_of(private.model, next(iter(private.data_loader))).backward()
    with pytest.raises(StaleParameterError, match=r"0\.weight"):
        private.optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": math.nan}, "max_grad_norm"),
        ({"physical_batch_size": 0}, "physical_batch_size"),
        ({"loss": "mean"}, "loss"),
        ({"adjacency": "zero-out"}, "adjacency"),
        ({"clipping": "soft"}, "clipping"),
        ({"clipping": "per-layer", "max_grad_norm": {"0": 1.0}}, "exactly the trained layers"),
        ({"max_grad_norm": {"0": 1.0, "2": 1.0}}, "clipping='per-layer'"),
        ({"rate": 1.5}, "sample_rate"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(model_for("dp-sgd"), **options)


def test_half_precision_of_numpy_does_not_round_the_noise() -> None:
    """z·C in float16 was 0 at C = 2e-8: no noise at all, accounted as z = 1."""
    private = make(
        model_for("dp-sgd"), privacy=NoiseMultiplier(np.float16(1.0)), max_grad_norm=2e-8
    )
    assert float(private.noise_std) == pytest.approx(1.001 * 2e-8 / 10, rel=1e-12, abs=0)
    assert type(NoiseMultiplier(np.float16(1.0), np.float16(2.0)).epsilon) is float
    target = TargetEpsilon(np.float16(2.0), steps=np.int8(100))
    assert (type(target.epsilon), type(target.steps)) == (float, int)


def test_targets_are_checked() -> None:
    for wrong in ({"epsilon": 0.0, "steps": 1}, {"epsilon": 1.0}, {"epsilon": 1.0, "steps": 0},
                  {"epsilon": 1.0, "steps": 1, "epochs": 1}):  # fmt: skip
        with pytest.raises(ValueError, match=r"epsilon|steps"):
            TargetEpsilon(**wrong)
    with pytest.raises(ValueError, match="noise_multiplier"):
        NoiseMultiplier(0.0)
    with pytest.raises(TypeError, match="TargetEpsilon"):
        make(model_for("dp-sgd"), privacy=1.0)


def test_keyed_runs_are_the_same_and_a_denoiser_sees_the_noise() -> None:
    """The plug point gets path, gradient and deviation; its result is what moves the weight."""
    seen: list[tuple[str, float]] = []

    def halve(name: str, gradient: Tensor, std: float) -> Tensor:
        seen.append((name, std))
        return gradient / 2

    results = []
    for denoiser in (None, halve):
        private = make(model_for("dp-sgd"), denoiser=denoiser, secure=False, rate=1.0)
        private._randomness = KeyedRandomness(bytes(32))
        before = [p.clone() for p in private.model.parameters()]
        run(private)
        results.append([b - p for b, p in zip(before, private.model.parameters(), strict=True)])
    for whole, half in zip(*results, strict=True):
        torch.testing.assert_close(whole / 2, half, rtol=1e-4, atol=1e-7)
    assert {name for name, _ in seen} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {std for _, std in seen} == {private.noise_std}
    assert private.noise_std == pytest.approx(1.001 / 40, rel=1e-12)


def test_the_divisor_may_be_given_where_the_number_of_records_is_not_public() -> None:
    """Then the noise of a step is the same for 40 records and for 41; q·N would tell which."""
    found = {}
    for given in (None, 10.0):
        for size in (40, 41):
            private = make(model_for("dp-sgd"), data=records(size), expected_batch_size=given)
            found[given, size] = (private.noise_std, private.expected_batch_size)
    assert found[None, 40] == found[10.0, 40]
    assert found[None, 41] != found[None, 40]
    assert found[10.0, 41] == found[10.0, 40]
    # What is released is what is said: gradients without noise, ten times those of divisor 10.
    steps = {}
    for given in (10.0, 1.0):
        private = make(model_for("dp-sgd"), z=NONE, rate=1.0, expected_batch_size=given)
        caught = Caught(private)
        run(private)
        steps[given] = caught.steps[0]
    for name, gradient in steps[10.0].items():
        assert torch.allclose(10 * gradient, steps[1.0][name], rtol=1e-5)
    with pytest.raises(ValueError, match="expected_batch_size must be positive"):
        make(model_for("dp-sgd"), expected_batch_size=0.0)
