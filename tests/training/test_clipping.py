"""Rules and transforms against gradients that are clipped by hand, one sample at a time."""

import math

import pytest
import torch
from private_models import (
    INFINITE,
    assert_close,
    assert_is_the_loop,
    clipped_by_hand,
    gpt2,
    loop,
    lora_mlp,
    norms_of,
    numbers,
    output_losses,
    randomise,
    recorded,
    token_losses,
    trained,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_privacy.errors import IsolationError, NonFiniteError
from lora_privacy.training.clipping import (
    AutomaticClipping,
    Clipping,
    FlatClipping,
    LayerClipping,
    RowScaling,
    Transform,
    clipped_sums,
    clipping_of,
    sample_norms,
)
from lora_privacy.training.recorder import LayerTap, SampleRecorder

LAYERS = ["0.project", "0.expand", "2.expand", "3"]  # of lora_mlp
SHAPES = [(6, 9), (6, 2, 9), (6, 12, 9)]


def sums_of(
    model: nn.Module,
    x: Tensor,
    clipping: Clipping,
    transform: Transform | None = None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Clipped sums of one pass of ``output_losses``."""
    losses_of = output_losses(x)
    with SampleRecorder(model, dense=transform is not None) as recorder:
        recorded(recorder, lambda m: losses_of(m) / scale, model)
        return clipped_sums(recorder, clipping, scale=scale, transform=transform)


def by_layer(gradients: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Path of a layer -> its part of ``gradients``."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, gradient in gradients.items():
        parts.setdefault(name.rpartition(".")[0], {})[name] = gradient
    return parts


def size(sums: dict[str, Tensor]) -> float:
    """Frobenius norm over all parameters, in double precision."""
    return math.hypot(*(float(term.double().norm()) for term in sums.values()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.1, 1.0, 10.0])
def test_flat_clips_are_those_by_hand(shape: tuple[int, ...], share: float) -> None:
    """A clip below all norms, between them, and above them all."""
    model, x = lora_mlp(), numbers(*shape)
    gradients = loop(model, output_losses(x))
    limit = share * float(norms_of(gradients).median())
    clipped = (norms_of(gradients) > limit).sum()
    assert clipped == 6 if share == 0.1 else clipped == 0 if share == 10.0 else 0 < clipped < 6
    assert_close(sums_of(model, x, FlatClipping(limit)), clipped_by_hand(gradients, limit), 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_clips_are_those_by_hand(shape: tuple[int, ...]) -> None:
    """Each layer is clipped as if it were the model; its bias goes with its weight."""
    model, x = lora_mlp(), numbers(*shape)
    parts = by_layer(loop(model, output_losses(x)))
    assert list(parts) == LAYERS
    limits = {name: float(norms_of(part).median()) for name, part in parts.items()}
    expected = {
        key: value
        for name, part in parts.items()
        for key, value in clipped_by_hand(part, limits[name]).items()
    }
    assert_close(sums_of(model, x, LayerClipping(limits)), expected, 1e-5)
    flat = sums_of(model, x, FlatClipping(LayerClipping(limits).sensitivity))
    assert size({n: flat[n] - expected[n] for n in flat}) > 0.01 * size(flat)


@pytest.mark.parametrize("stability", [0.01, 3.0])
def test_automatic_clips_are_those_by_hand(stability: float) -> None:
    """Weight C/(‖G_i‖ + γ)."""
    model, x = lora_mlp(), numbers(6, 2, 9)
    gradients = loop(model, output_losses(x))
    weights = 0.7 / (norms_of(gradients) + stability)
    expected = {n: torch.einsum("b,b...->...", weights, g.double()) for n, g in gradients.items()}
    assert_close(sums_of(model, x, AutomaticClipping(0.7, stability)), expected, 1e-5)


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_an_infinite_clip_is_autograd(scale: float) -> None:
    """Oracle: the gradients of a plain backward pass; the loss may be a mean."""
    model, x = lora_mlp(), numbers(6, 2, 9)
    output_losses(x)(model).sum().backward()
    expected = {name: parameter.grad for name, parameter in trained(model).items()}
    model.zero_grad()
    assert_close(sums_of(model, x, INFINITE, scale=scale), expected, 1e-5)


def test_a_mean_loss_is_clipped_by_its_samples_own_norms() -> None:
    """The scale enters norm and sum: the loss divided by 6 and not divided give the same."""
    model, x = lora_mlp(), numbers(6, 2, 9)
    gradients = loop(model, output_losses(x))
    limit = float(norms_of(gradients).median())
    assert_close(
        sums_of(model, x, FlatClipping(limit), scale=6.0), clipped_by_hand(gradients, limit), 1e-5
    )


RULES: dict[str, Clipping] = {
    "flat": FlatClipping(0.3),
    "per-layer": LayerClipping(dict(zip(LAYERS, (0.1, 0.2, 0.3, 0.4), strict=True))),
    "automatic": AutomaticClipping(0.3),
}


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("length", [1, 2, 12])
@pytest.mark.parametrize("kind", RULES)
def test_no_sample_exceeds_its_clip(kind: str, length: int, factor: float) -> None:
    """Each sample alone, norms in double precision: at most the sensitivity, + 1e-6 relative."""
    model, rule = lora_mlp(), RULES[kind]
    largest = 0.0
    for seed in range(8):
        losses_of = output_losses(numbers(1, length, 9, seed=seed))
        with SampleRecorder(model) as recorder:
            (factor * losses_of(model)).sum().backward()
            sums = clipped_sums(recorder, rule)
        largest = max(largest, size(sums))
        assert size(sums) <= rule.sensitivity * (1 + 1e-6)
        if isinstance(rule, LayerClipping):
            for name, part in by_layer(sums).items():
                assert size(part) <= rule.max_grad_norms[name] * (1 + 1e-6)
    if factor == 1e6:
        assert largest >= 0.99 * rule.sensitivity  # the bound is met: it is no larger than need be


@pytest.mark.parametrize("rest", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("kind", ["flat", "automatic"])
def test_a_sample_whose_terms_cancel_is_clipped(kind: str, rest: float) -> None:
    """Two positions with nearly opposite gradients: the norm is small beside its terms.

    The bound of ``test_no_sample_exceeds_its_clip``, with 1e-3 for roundings of the sum itself.
    """
    layer = nn.Linear(64, 64, bias=False)
    x = 100.0 * numbers(1, 1, 64).expand(1, 2, 64)
    upstream = 100.0 * numbers(1, 1, 64, seed=1) * torch.tensor([1.0, rest - 1.0])[:, None]
    with SampleRecorder(layer) as recorder:
        (layer(x) * upstream).sum().backward()
        assert type(recorder.taps[""].samples["weight"]).__name__ == "FactoredSamples"
        sums = clipped_sums(recorder, RULES[kind])
    assert size(sums) <= 0.3 * (1 + 1e-3)


@pytest.mark.parametrize("kind", RULES)
def test_one_sample_moves_the_sum_by_its_sensitivity(kind: str) -> None:
    """Added or removed, each of six samples; doubled limits are rejected for one of them."""
    model, x, rule = lora_mlp(), 5 * numbers(6, 2, 9), RULES[kind]
    whole, moved = sums_of(model, x, rule), []
    for i in range(6):
        rest = sums_of(model, torch.cat([x[:i], x[i + 1 :]]), rule)
        moved.append(size({name: whole[name] - rest[name] for name in whole}))
    assert max(moved) <= rule.sensitivity * (1 + 1e-5)
    assert max(moved) > 0.5 * rule.sensitivity


def test_sensitivities() -> None:
    """C, and √ΣC_l² for layers; a single C is shared out so that it stays C."""
    assert FlatClipping(0.5).sensitivity == AutomaticClipping(0.5).sensitivity == 0.5
    assert LayerClipping({"a": 3.0, "b": 4.0}).sensitivity == pytest.approx(5.0, rel=1e-15)
    shared = clipping_of("per-layer", 2.0, LAYERS)
    assert isinstance(shared, LayerClipping)
    assert dict(shared.max_grad_norms) == dict.fromkeys(LAYERS, 1.0)
    assert shared.sensitivity == pytest.approx(2.0, rel=1e-15)
    given = dict.fromkeys(LAYERS, 0.1)
    assert clipping_of("per-layer", given, LAYERS) == LayerClipping(given)
    assert clipping_of("flat", 2.0, LAYERS) == FlatClipping(2.0)
    assert clipping_of("automatic", 2.0, LAYERS) == AutomaticClipping(2.0)


def test_a_sample_without_a_gradient_adds_nothing() -> None:
    """Its norm is 0, and no rule divides by it; the others are as without it."""
    model, x = nn.Linear(9, 7, bias=False), numbers(5, 9)
    x[2] = 0
    others = torch.cat([x[:2], x[3:]])
    layer = LayerClipping({"": 0.3})
    for rule in (FlatClipping(0.3), layer, AutomaticClipping(0.3), INFINITE):
        with SampleRecorder(model) as recorder:
            (model(x) * numbers(5, 7, seed=1)).sum().backward()
            assert sample_norms(recorder)[""][2] == 0
            sums = clipped_sums(recorder, rule)
        with SampleRecorder(model) as recorder:
            weights = torch.cat([numbers(5, 7, seed=1)[:2], numbers(5, 7, seed=1)[3:]])
            (model(others) * weights).sum().backward()
            assert_close(sums, clipped_sums(recorder, rule), 1e-5)


@pytest.mark.parametrize("kind", ["lora", "conv1d"])
def test_row_scaling(kind: str) -> None:
    """Oracle: every row of every matrix of the loop scaled by hand, then clipped by hand.

    The rows are those of (out, in) for a Conv1D, too, which stores (in, out).
    """
    model = lora_mlp() if kind == "lora" else randomise(nn.Sequential(Conv1D(7, 9), nn.Tanh()))
    x = numbers(6, 2, 9)
    gradients = loop(model, output_losses(x))
    for name, gradient in gradients.items():
        if gradient.dim() == 3:
            rows = gradient.mT if kind == "conv1d" else gradient
            rows = 0.2 * rows / rows.norm(dim=2, keepdim=True)
            gradients[name] = rows.mT if kind == "conv1d" else rows
    limit = float(norms_of(gradients).median())
    sums = sums_of(model, x, FlatClipping(limit), transform=RowScaling(0.2))
    assert_close(sums, clipped_by_hand(gradients, limit), 1e-5)


def test_row_scaling_of_b() -> None:
    """Rows of B of a LoRA-FA layer get norm c; a row of 0, and a vector, stay as they are."""
    scaling = RowScaling(0.2)
    gradients = numbers(3, 8, 4)
    gradients[1, 5] = 0
    scaled = scaling("2.expand.weight", gradients)
    norms = scaled.norm(dim=2)
    assert norms[1, 5] == 0
    norms[1, 5] = 0.2
    assert torch.allclose(norms, torch.full((3, 8), 0.2), rtol=1e-6, atol=0)
    cosines = torch.cosine_similarity(scaled, gradients, dim=2)
    assert cosines.sum() == pytest.approx(23, abs=1e-4)
    assert torch.equal(scaling("3.bias", numbers(3, 8)), numbers(3, 8))
    with pytest.raises(ValueError, match="norm must be positive"):
        RowScaling(0.0)


def test_row_scaling_leaves_norms_alone() -> None:
    """The weight of a norm over two dimensions is no matrix: it has no rows of q Aᵀ."""
    layer, x = randomise(nn.LayerNorm((3, 4))), numbers(5, 3, 4)
    assert_close(
        sums_of(layer, x, INFINITE, transform=RowScaling(0.2)), sums_of(layer, x, INFINITE), 1e-6
    )


def test_transforms_come_before_the_clip_and_after_the_scale() -> None:
    """Oracle: G_i halved and cut at ±.1 by hand; the loss is a mean over six samples."""
    model, x = lora_mlp(), numbers(6, 2, 9)
    gradients = {n: (g / 2).clamp(-0.1, 0.1) for n, g in loop(model, output_losses(x)).items()}
    limit = float(norms_of(gradients).median())
    seen: list[str] = []

    def transform(name: str, gradients: Tensor) -> Tensor:
        seen.append(name)
        return (gradients / 2).clamp(-0.1, 0.1)

    sums = sums_of(model, x, FlatClipping(limit), transform, scale=6.0)
    assert_close(sums, clipped_by_hand(gradients, limit), 1e-5)
    assert set(seen) == set(trained(model))


MIXING = {
    "centred": lambda name, g: g - g.mean(0),
    "normalised by the batch": lambda name, g: g / g.norm(),
    "summed up to": lambda name, g: g.cumsum(0),
    "sorted": lambda name, g: g.sort(dim=0).values,
    "two swapped": lambda name, g: g[[0, 2, 1, *range(3, len(g))]] if len(g) > 2 else g,
    "by position": lambda name, g: (
        g * torch.arange(1.0, len(g) + 1).view(-1, *[1] * (g.dim() - 1))
    ),
}


@pytest.mark.parametrize("kind", MIXING)
def test_a_transform_that_mixes_samples_is_refused(kind: str) -> None:
    """Whichever sample it mixes with which: the clip after it would bound nothing."""
    with pytest.raises(IsolationError, match="must treat each sample by itself"):
        sums_of(lora_mlp(), numbers(6, 2, 9), FlatClipping(1.0), transform=MIXING[kind])


def test_a_transform_that_changes_a_shape_is_refused() -> None:
    """The optimizer could not use the result."""
    for transform in (lambda _, g: g[..., :1], lambda _, g: g[:1], lambda _, g: g.sum(0)):
        with pytest.raises(ValueError, match=r"transform must keep the shape \(6, 4, 9\)"):
            sums_of(lora_mlp(), numbers(6, 2, 9), FlatClipping(1.0), transform=transform)


def test_sums_of_another_kind() -> None:
    """``reduce`` gets each layer, the name inside it, and the weights times the scale."""
    model, x = nn.Linear(9, 7), numbers(6, 9)
    gradients = loop(model, output_losses(x))
    limit = float(norms_of(gradients).median())
    seen: dict[str, Tensor] = {}

    def reduce(tap: LayerTap, key: str, weights: Tensor) -> Tensor:
        assert tap.module is model
        seen[key] = weights
        return torch.zeros(2)

    losses_of = output_losses(x)
    with SampleRecorder(model) as recorder:
        losses_of(model).mean().backward()
        sums = clipped_sums(recorder, FlatClipping(limit), scale=6.0, reduce=reduce)
    assert {name: term.shape for name, term in sums.items()} == dict.fromkeys(seen, (2,))
    expected = 6 * (limit / norms_of(gradients)).clamp(max=1)
    assert list(seen) == ["bias", "weight"]
    assert all(torch.allclose(w.double(), expected, rtol=1e-5, atol=0) for w in seen.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
@pytest.mark.parametrize("kind", RULES)
def test_a_gradient_that_is_not_finite_is_refused(kind: str, value: float) -> None:
    """Of one sample, in one layer: NaN, infinity, or a norm that overflows."""
    model = lora_mlp()
    weights = torch.ones(6)
    weights[4] = value
    with SampleRecorder(model) as recorder:
        (output_losses(numbers(6, 2, 9))(model) * weights).sum().backward()
        with pytest.raises(NonFiniteError, match="nothing was released"):
            clipped_sums(recorder, RULES[kind])


def test_large_half_precision_gradients_do_not_overflow() -> None:
    """Norms are float32 at least: 300² is no float16 number, but a clip must see 300."""
    layer = nn.Linear(9, 1, bias=False)
    x = torch.full((1, 9), 100.0)
    with SampleRecorder(layer) as recorder:
        with torch.autocast("cpu", torch.float16):
            output = layer(x.half())
            assert output.dtype == torch.float16
            output.sum().backward()
        assert float(sample_norms(recorder)[""]) == pytest.approx(9e4, rel=1e-6)
        assert size(clipped_sums(recorder, FlatClipping(1.0))) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 2, 9), (6, 12, 9)], ids=str)
def test_autocast_rounds_no_norm(shape: tuple[int, ...]) -> None:
    """A backward pass inside autocast: each sample alone stays within its clip, + 1e-6."""
    model, rule = lora_mlp(), FlatClipping(1e-3)
    for x in numbers(*shape).split(1):
        with SampleRecorder(model) as recorder:
            with torch.autocast("cpu", torch.bfloat16):
                output_losses(x)(model).sum().backward()
            sums = clipped_sums(recorder, rule)
        assert {term.dtype for term in sums.values()} == {torch.float64}
        assert size(sums) == pytest.approx(1e-3, rel=1e-6)


def test_layer_clips_of_a_whole_model() -> None:
    """GPT-2 in full: no layer's sum of one sample exceeds its share, and the whole not C."""
    model = gpt2(dropout=0.0)
    rule = clipping_of("per-layer", 0.05, list(SampleRecorder(model).taps))
    for row in range(3):
        losses_of = token_losses(6)
        with SampleRecorder(model) as recorder:
            losses_of(model)[row].backward()
            sums = clipped_sums(recorder, rule)
        parts = by_layer(sums)
        share = 0.05 / math.sqrt(len(parts))
        assert len(parts) == 13
        assert all(size(part) <= share * (1 + 1e-6) for part in parts.values())
        assert size(sums) <= 0.05 * (1 + 1e-6)
    assert_is_the_loop(model, token_losses(6))


def test_bad_arguments() -> None:
    """Each error says what must hold."""
    for bad in (0.0, -1.0, math.nan):
        for rule in (FlatClipping, AutomaticClipping, lambda c: LayerClipping({"a": c})):
            with pytest.raises(ValueError, match="max_grad_norm must be positive"):
                rule(bad)
        with pytest.raises(ValueError, match="max_grad_norm must be positive"):
            clipping_of("per-layer", bad, LAYERS)
        with pytest.raises(ValueError, match="stability must be positive"):
            AutomaticClipping(1.0, bad)
    for rule in (FlatClipping, lambda c: LayerClipping({"a": c})):
        with pytest.raises(ValueError, match="at least 1e-08, got 9e-09: squares"):
            rule(9e-9)  # a gradient of 1e-25 was seen as 0, and passed a clip of 1e-30
    with pytest.raises(ValueError, match="clipping must be one of"):
        clipping_of("global", 1.0, LAYERS)
    with pytest.raises(ValueError, match="needs clipping='per-layer', got 'flat'"):
        clipping_of("flat", {"3": 1.0}, LAYERS)
    with pytest.raises(ValueError, match="must name exactly the trained layers"):
        clipping_of("per-layer", {"3": 1.0}, LAYERS)
