"""Both forms of per-sample gradients against g_iᵀ x_i in double precision."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from private_models import (
    INFINITE,
    assert_close,
    dense_twin,
    loop,
    norms_of,
    numbers,
    output_losses,
    recorded,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_privacy.core import FLoRALinear, RandomProjection, is_conv1d
from lora_privacy.training.clipping import FlatClipping, clipped_sums, sample_norms
from lora_privacy.training.recorder import SampleRecorder
from lora_privacy.training.samples import DenseSamples, FactoredSamples, matrix_samples

SIZES = st.integers(1, 12)


def products(x: Tensor, g: Tensor) -> Tensor:
    """g_iᵀ x_i, one sample and one position after the other."""
    return torch.stack(
        [
            sum(torch.outer(g_t, x_t) for x_t, g_t in zip(x_i.double(), g_i.double(), strict=True))
            for x_i, g_i in zip(x, g, strict=True)
        ]
    )


def relative(actual: Tensor, expected: Tensor, scale: Tensor | float = 0.0) -> float:
    """‖difference‖ over ‖expected‖ + ``scale``."""
    return float((actual.double() - expected).norm() / (expected.norm() + scale))


@given(st.integers(1, 5), st.integers(1, 40), SIZES, SIZES, st.integers(0, 2**31))
def test_both_forms_are_the_gradients(
    batch: int, length: int, inputs: int, outputs: int, seed: int
) -> None:
    """Norms to 1e-5 relative, and sums to 1e-5 of Σ_t ‖x_t‖‖g_t‖, which bounds their rounding.

    A gradient of few numbers may cancel: then the norms' error is measured by that sum, too.
    """
    x, g = (
        numbers(batch, length, inputs, seed=seed),
        numbers(batch, length, outputs, seed=seed + 1),
    )
    weights, a = numbers(batch, seed=seed + 2).abs(), numbers(3, inputs, seed=seed + 3)
    exact = products(x, g)
    size = (x.norm(dim=2) * g.norm(dim=2)).sum(1).double()
    total = torch.einsum("b,boi->oi", weights.double(), exact)
    scale = float((weights * size).sum())
    for samples in (DenseSamples(exact.float()), FactoredSamples([(x, g)])):
        error = (samples.square_norms() - exact.square().sum((1, 2))).abs()
        assert (error <= 1e-5 * exact.square().sum((1, 2)) + 1e-6 * size.square()).all()
        assert samples.weighted(weights).shape == (outputs, inputs)
        assert relative(samples.weighted(weights), total, scale) < 1e-5
        projected = total @ a.double().T
        assert relative(samples.projected(weights, a), projected, scale * a.norm()) < 1e-5


@given(st.integers(1, 4), st.integers(1, 40), SIZES, SIZES)
@example(1, 1, 2, 2)  # as many numbers in both
def test_the_smaller_form_is_taken(batch: int, length: int, inputs: int, outputs: int) -> None:
    """By the count of its numbers; ``dense`` overrules it."""
    x, g = torch.zeros(batch, length, inputs), torch.zeros(batch, length, outputs)
    smaller = outputs * inputs <= length * (inputs + outputs)
    assert isinstance(matrix_samples(x, g), DenseSamples) is smaller
    assert isinstance(matrix_samples(x, g, dense=True), DenseSamples)


def test_long_sequences_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrices of two samples at a time give what those of five do, bit for bit."""
    samples = FactoredSamples([(numbers(5, 6, 40), numbers(5, 6, 50, seed=1))])
    whole = samples.square_norms()
    monkeypatch.setattr("lora_privacy.training.samples._GRAM_NUMBERS", 2 * 6 * 6)
    assert torch.equal(samples.square_norms(), whole)


def test_uses_of_one_weight_add_up() -> None:
    """Two pairs are the sum of their gradients, norms with the cross term."""
    pairs = [(numbers(3, t, 20, seed=t), numbers(3, t, 30, seed=t + 9)) for t in (2, 4)]
    samples = FactoredSamples()
    for x, g in pairs:
        samples.add(x, g)
    exact = sum(products(x, g) for x, g in pairs)
    assert relative(samples.square_norms(), exact.square().sum((1, 2))) < 1e-5
    apart = sum(FactoredSamples([pair]).square_norms() for pair in pairs)
    assert relative(apart, exact.square().sum((1, 2))) > 1e-2
    assert relative(samples.weighted(torch.ones(3)), exact.sum(0)) < 1e-5


@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("rest", [1e-2, 1e-4])
def test_a_norm_is_never_understated(size: float, rest: float) -> None:
    """Terms that nearly cancel: a norm below the truth would let a sample pass its clip.

    Oracle: the matrix in double precision, 64 samples; at most 1e-6 below it.
    """
    x = size * numbers(64, 1, 64).expand(64, 2, 64)
    g = size * numbers(64, 1, 64, seed=1) * torch.tensor([1.0, rest - 1.0])[:, None]
    truth = products(x, g).square().sum((1, 2)).sqrt()
    norms = FactoredSamples([(x, g)]).square_norms().double().sqrt()
    assert (norms >= (1 - 1e-6) * truth).all()


def test_the_norm_of_a_long_gradient_is_not_understated() -> None:
    """Ten million equal numbers, whose squares lost 1.5 % when one sum in float32 took them all.

    The noise is larger than stated by 1e-3 for what norms may lose.
    """
    samples = DenseSamples(torch.full((1, 9_649_344), 0.8384615))
    exact = samples.gradients.numel() * float(samples.gradients[0, 0]) ** 2
    assert abs(float(samples.square_norms()) / exact - 1) < 3e-4


@pytest.mark.parametrize("length", [1, 2])
def test_a_small_input_before_a_large_gradient_is_seen(length: int) -> None:
    """The square of 3e-23 is 0 in single precision; times 1e19, squared, it is 9e-8."""
    x, g = torch.zeros(1, length, 4), torch.zeros(1, length, 4)
    x[0, 0, 0], g[0, 0, 0] = 3e-23, 1e19
    exact = (float(x[0, 0, 0]) * float(g[0, 0, 0])) ** 2
    assert float(FactoredSamples([(x, g)]).square_norms()) == pytest.approx(exact, rel=1e-6, abs=0)


@pytest.mark.parametrize("projected", [False, True])
def test_terms_that_cancel_leave_the_others_alone(projected: bool) -> None:
    """A record whose two positions cancel to nothing is far larger than the sum at its first one.

    In float32 the sum of eight others was lost there: a record of gradient 0 moved it by eight
    clipping norms.
    """
    for size in (2.0**15, 2.0**30):
        x, g = torch.zeros(9, 2, 16), torch.zeros(9, 2, 16)
        x[:8, 0, 0] = g[:8, 0, 0] = 1.0
        x[8, :, 0], g[8, 0, 0], g[8, 1, 0] = size, size, -size
        samples, a = FactoredSamples([(x, g)]), torch.eye(16)
        weights = (1 / samples.square_norms().sqrt()).clamp(max=1.0)
        total = samples.projected(weights, a) if projected else samples.weighted(weights)
        assert float(total[0, 0]) == pytest.approx(8.0, rel=1e-6), size


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_record_that_adds_nothing_moves_no_sum(form: str) -> None:
    """Gradients by turns of norm 1 and 0, then by turns small and 0: one 0 between shifts them.

    In float32 the small ones met the lanes of the large ones or others, and the sums of 16,384
    records differed by half a clipping norm. All of these sums are exact in double precision.
    """
    half, width = 8192, 64
    large, small = torch.zeros(half), torch.zeros(half - 2)
    large[::2], small[::2] = 1.0, 0.49 * 2.0**-12
    totals = []
    for between in (torch.zeros(0), torch.zeros(1)):
        x = torch.zeros(len(large) + len(small) + len(between), 1, width)
        x[:, 0, 0] = torch.cat([large, between, small])
        g = torch.zeros_like(x)
        g[:, 0, 0] = 1.0
        samples = DenseSamples(x) if form == "dense" else FactoredSamples([(x, g)])
        totals.append(samples.weighted(torch.ones(len(x)))[0, 0])
    exact = float(large.double().sum() + small.double().sum())
    assert float(totals[0]) == float(totals[1]) == exact


FLORA_CASES = [(kind, dtype) for kind in ("linear", "conv1d") for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("shape", [(5, 9), (5, 2, 9), (5, 12, 9), (5, 2, 6, 9)], ids=str)
@pytest.mark.parametrize(("kind", "dtype"), FLORA_CASES)
def test_projected_sums_of_flora_layers(kind: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Oracle: Σ w_i G_i Aᵀ with G_i by autograd on the plain layer in its place.

    1e-5 in float32; 1e-2 beside a bfloat16 base, whose own gradient is rounded to 8 bits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Linear(9, 7) if kind == "linear" else Conv1D(7, 9)
    precision = getattr(torch, dtype)
    layer = FLoRALinear(base.to(precision), 3, 6.0, RandomProjection(3, 9, seed=1))
    layer.expand.weight.requires_grad_(False)
    model, losses_of = nn.ModuleDict({"it": layer}), output_losses(numbers(*shape).to(precision))
    twin = dense_twin(model)
    gradients = loop(twin["it"], losses_of)
    limit, a = float(norms_of(gradients).median()), layer.a()
    weights = (limit / norms_of(gradients)).clamp(max=1.0)
    expected = torch.einsum("b,b...->...", weights, gradients["weight"].double())
    rows = expected.T if is_conv1d(base) else expected
    with SampleRecorder(model) as recorder:
        losses = losses_of(layer)
        losses.sum().backward()
        tap = recorder.taps["it"]
        kept = FlatClipping(limit).weights(sample_norms(recorder))["it"]
        projected = {"it": tap.samples["weight"].projected(kept, a)}
        sums = clipped_sums(recorder, FlatClipping(limit))
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    assert_close(projected, {"it": rows @ a.double().T}, tolerance)
    assert_close(sums, {"it.weight": expected}, tolerance)
    assert layer.weight.grad is None
    assert layer.expand.weight.grad is None


def test_a_projection_forms_no_matrix() -> None:
    """Counted by the storage of every tensor that the factored form makes."""
    x, g, a = numbers(2, 3, 400), numbers(2, 3, 300, seed=1), numbers(4, 400, seed=2)
    samples = FactoredSamples([(x, g)])
    with LargestTensor() as counted:
        samples.square_norms()
        samples.projected(torch.ones(2), a)
    assert counted.numbers == 2 * 3 * 400  # x itself, squared at most
    with LargestTensor() as counted:
        samples.weighted(torch.ones(2))
    assert counted.numbers == 300 * 400


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """The most numbers that an operation inside the block returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_a_flora_model_is_a_dense_model() -> None:
    """Infinite clip: the sums are autograd's gradients of the plain model, to 1e-5."""
    model = nn.Sequential(
        FLoRALinear(nn.Linear(9, 7), 3, 3.0, RandomProjection(3, 9, seed=1)),
        nn.Tanh(),
        FLoRALinear(Conv1D(9, 7), 3, 3.0, RandomProjection(3, 7, seed=2)),
    )
    for layer in (model[0], model[2]):
        layer.expand.weight.requires_grad_(False)
    losses_of = output_losses(numbers(4, 2, 9))
    expected = {n: g.sum(0) for n, g in loop(without_biases(dense_twin(model)), losses_of).items()}
    with SampleRecorder(model) as recorder:
        recorded(recorder, losses_of, model)
        assert_close(clipped_sums(recorder, INFINITE), expected, 1e-5)


def without_biases(model: nn.Module) -> nn.Module:
    """FLoRA freezes them."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    return model
