"""GradientProbe against autograd's dense gradient, and what it must leave alone."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_privacy.core.adapter import adapt, adapters
from lora_privacy.core.probe import GradientProbe
from lora_privacy.errors import NonFiniteError, NoTargetError, ProbeError

if TYPE_CHECKING:
    from collections.abc import Callable

    Loss = Callable[[nn.Module], torch.Tensor]

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Net(nn.Module):
    """Two linear maps with a non-linearity, of either kind."""

    def __init__(self, conv1d: bool = False, dims: tuple[int, int, int] = (12, 10, 7)) -> None:
        super().__init__()
        conv = transformers.pytorch_utils.Conv1D
        make = (lambda i, o: conv(o, i)) if conv1d else nn.Linear
        self.first, self.second = make(dims[0], dims[1]), make(dims[1], dims[2])
        for p in self.parameters():
            p.data.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(p.numel()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def lora(model: nn.Module, targets: str = ".*", rank: int = 3, **options: Any) -> nn.Module:
    """Adapt ``model`` and move every B away from 0, so that A matters to the forward pass."""
    adapt(model, rank, targets=targets, seed=7, alpha=2.0 * rank, **options)
    rng = torch.Generator().manual_seed(11)
    for adapter in adapters(model).values():
        if adapter.kind != "flora":
            adapter.layer.expand.weight.data.normal_(0.0, 0.3, generator=rng)
    return model


def net(conv1d: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """Two adapted maps."""
    return lora(Net(conv1d).to(dtype), "first|second", **options)


def batch(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers from a fixed seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def square(x: torch.Tensor) -> Loss:
    """A loss that is not linear in the output."""
    return lambda model: model(x).square().sum()


def base_of(layer: nn.Module) -> nn.Module:
    """The frozen map inside an adapted layer."""
    return layer.base if hasattr(layer, "base") else layer.base_layer


def dense(model: nn.Module, *losses: Loss) -> dict[str, torch.Tensor]:
    """Oracle: autograd's gradient of the base weights of a copy in which they are trainable."""
    model = copy.deepcopy(model)
    found = adapters(model)
    for adapter in found.values():
        base_of(adapter.layer).weight.requires_grad_(True)
    for loss in losses:
        loss(model).backward()
    gradients = {}
    for name, adapter in found.items():
        base = base_of(adapter.layer)
        gradient = base.weight.grad
        gradients[name] = gradient.T if type(base).__name__ == "Conv1D" else gradient
    return gradients


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Frobenius distance relative to the size, which must not be 0."""
    assert got.shape == expected.shape
    assert expected.norm() > 0
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, f"relative error {error:.2g}"


def probe_and_compare(model: nn.Module, *losses: Loss, tolerance: float = 1e-6) -> None:
    """Compare every record with autograd."""
    expected = dense(model, *losses)
    with GradientProbe(model) as probe:
        for loss in losses:
            loss(model).backward()
        assert set(probe.records) == set(expected)
        for name, record in probe.records.items():
            close(record.gradient, expected[name], tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 1, 4), ()])
@pytest.mark.parametrize("method", ["lora", "lora-fa"])
def test_gradient_is_autograds(
    dtype: torch.dtype, conv1d: bool, shape: tuple[int, ...], method: str
) -> None:
    """Oracle: autograd with W trainable; 1e-6 in float32, 1e-12 in float64."""
    x = batch(*shape, 12, dtype=dtype)
    probe_and_compare(net(conv1d, dtype, method=method), square(x), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("conv1d", [False, True])
def test_gradient_of_flora_is_that_of_the_plain_model(conv1d: bool) -> None:
    """Oracle: autograd on the model before it was adapted, since FLoRA detaches its weight."""
    plain, x = Net(conv1d), batch(5, 12)
    square(x)(plain).backward()
    model = lora(copy.deepcopy(plain), "first|second", method="flora")
    with GradientProbe(model) as probe:
        square(x)(model).backward()
        for name, record in probe.records.items():
            weight = plain.get_submodule(name).weight.grad
            close(record.gradient, weight.T if conv1d else weight, 1e-6)


def test_gradient_sums_over_micro_batches_until_step() -> None:
    """Oracle: autograd, which accumulates too."""
    model = net()
    losses = [square(batch(n, 12, seed=n)) for n in (2, 3, 5)]
    probe_and_compare(model, *losses)
    with GradientProbe(model) as probe:
        losses[0](model).backward()
        early = probe.records["first"].gradient
        kept = early.clone()
        losses[1](model).backward()
        assert not torch.equal(probe.records["first"].gradient, kept)
        assert torch.equal(early, kept), "what was read must not change later"
        probe.step()
        assert probe.records == {}
        losses[2](model).backward()
        close(probe.records["first"].gradient, dense(model, losses[2])["first"], 1e-6)


def test_gradient_with_a_layer_that_is_called_several_times() -> None:
    """Oracle: autograd, which sums over the calls."""
    model = lora(Net(dims=(6, 6, 6)), "first|second")
    x = batch(4, 6)

    def twice(m: nn.Module) -> torch.Tensor:
        return m(torch.tanh(m(x))).square().sum() + m.first(x).sum()

    probe_and_compare(model, twice)


def test_gradient_with_a_retained_graph() -> None:
    """Oracle: autograd; two passes count twice."""
    model, x = net(), batch(4, 12)
    with GradientProbe(model) as probe:
        loss = square(x)(model)
        loss.backward(retain_graph=True)
        loss.backward()
        close(probe.records["first"].gradient, 2 * dense(model, square(x))["first"], 1e-6)


def test_gradient_when_the_output_is_overwritten_afterwards() -> None:
    """Also through a view, which replaces the node of the whole output."""
    model, x = net(), batch(4, 12)

    def loss(m: nn.Module) -> torch.Tensor:
        y = m.first(x)
        y.mul_(3.0)
        y[:, 2:5].mul_(0.5)
        y.view(-1)[3].add_(1.0)
        return y.square().sum() + m.second(torch.tanh(y)).sum()

    probe_and_compare(model, loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_under_plain_checkpointing(reentrant: bool) -> None:
    """Oracle: autograd under the same checkpointing; recomputation must not count twice."""
    model, x = net(), batch(4, 12).requires_grad_()

    def loss(m: nn.Module) -> torch.Tensor:
        return checkpoint(m, x, use_reentrant=reentrant).square().sum()

    probe_and_compare(model, loss)


def tiny(family: str, **options: Any) -> nn.Module:
    """A model of two blocks with random weights from a fixed seed."""
    t = transformers
    configs = {
        "bert": lambda: t.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=32, **options,
        ),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False,
            bos_token_id=0, eos_token_id=0, **options,
        ),
        "llama": lambda: t.LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=32, use_cache=False,
            bos_token_id=0, eos_token_id=0, **options,
        ),
    }  # fmt: skip
    classes = {
        "bert": t.BertForSequenceClassification,
        "gpt2": t.GPT2LMHeadModel,
        "llama": t.LlamaForCausalLM,
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = classes[family](configs[family]())
    return model.train()


def lm_loss(family: str) -> Loss:
    """Loss on three padded rows of tokens."""
    tokens = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(2))
    labels = tokens[:, 0] % 2 if family == "bert" else tokens
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0

    def loss(model: nn.Module) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(9)  # the same dropout with and without the probe
            return model(input_ids=tokens, attention_mask=mask, labels=labels).loss

    return loss


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_of_transformers_with_checkpointing(family: str, reentrant: bool | None) -> None:
    """Oracle: autograd without checkpointing; dropout is on, and recomputed with its state."""
    model = lora(tiny(family), ".*(query|value|q_proj|v_proj|c_attn|mlp.c_proj|down_proj)")
    loss = lm_loss(family)
    expected = dense(model, loss)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with GradientProbe(model) as probe:
        loss(model).backward()
        assert set(probe.records) == set(expected)
        for name, record in probe.records.items():
            close(record.gradient, expected[name], 5e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_of_peft_models(family: str, dropout: float) -> None:
    """Oracle: autograd; dropout in front of A is no part of W."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["query", "value", "c_attn"]
        if family == "bert" else ["c_attn"], fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    model = peft.get_peft_model(tiny(family), config)
    probe_and_compare(model, lm_loss(family), tolerance=5e-6)


@pytest.mark.parametrize(("init", "variance"), [(True, 1 / (3 * 16)), ("gaussian", 1 / 4**2)])
def test_projection_of_peft_models_uses_their_law(init: bool | str, variance: float) -> None:
    """Oracle: the formula with the variance that peft draws A with, written out; m=16, r=4."""
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query"], init_lora_weights=init)
    model = peft.get_peft_model(tiny("bert"), config)
    with GradientProbe(model) as probe:
        lm_loss("bert")(model).backward()
    name, record = next(iter(probe.records.items()))
    a = adapters(model)[name].a()
    close(record.projected, record.gradient @ a.T @ a / (variance * 4), 1e-5)
    close(record.actual_update, record.gradient @ a.T @ a * 4.0**2, 1e-5)


def test_gradient_over_a_bf16_base() -> None:
    """Oracle: the float64 model with the same weights; 2e-2, the rounding of activations."""
    model, x = net(dtype=torch.bfloat16), batch(64, 12, dtype=torch.bfloat16)
    expected = dense(copy.deepcopy(model).double(), square(x.double()))
    with GradientProbe(model) as probe:
        square(x)(model).backward()
        record = probe.records["second"]
        assert record.gradient.dtype == torch.float32
        close(record.gradient, expected["second"], 2e-2)
        assert record.projected.dtype == torch.float32


def test_sums_are_not_rounded_to_16_bits() -> None:
    """Oracle: the same bf16 factors multiplied in float64; also when read under autocast."""
    model, x = net(dtype=torch.bfloat16), batch(300, 12, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    with GradientProbe(model) as probe:
        y = model.first(x)
        y.register_hook(kept.append)
        y.float().square().sum().backward()
        expected = kept[0].double().T @ x.double()
        with torch.autocast("cpu", torch.bfloat16):
            record = probe.records["first"]
            close(record.projected_row_norms, (expected @ record.a.T.double()).norm(dim=1), 1e-5)
            close(record.gradient, expected, 1e-6)


def test_what_the_adapter_makes_of_the_gradient() -> None:
    """Oracle: NumPy with G and A; the factored and the dense way must agree."""
    model = net(dtype=torch.float64)  # Gaussian A: v r = 1
    for read_first in ("projected", "gradient"):
        with GradientProbe(model) as probe:
            square(batch(4, 12, dtype=torch.float64))(model).backward()
        record = probe.records["first"]
        getattr(record, read_first)
        g, a = record.gradient.numpy(), adapters(model)["first"].a().numpy()
        assert (record.rank, record.scaling, record.law.name) == (3, 2.0, "gaussian")
        np.testing.assert_allclose(record.projected.numpy(), g @ a.T @ a, rtol=1e-10)
        np.testing.assert_allclose(record.noise.numpy(), g @ (a.T @ a - np.eye(12)), rtol=1e-9)
        np.testing.assert_allclose(record.actual_update.numpy(), 4 * g @ a.T @ a, rtol=1e-10)
        norms = np.linalg.norm(g @ a.T, axis=1)
        np.testing.assert_allclose(record.projected_row_norms.numpy(), norms, rtol=1e-10)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("method", ["lora-fa", "flora"])
def test_actual_update_is_a_step_of_sgd(conv1d: bool, method: str) -> None:
    """Oracle: the weight that is in effect, read off unit vectors, before and after the step."""
    model = net(conv1d, torch.float64, method=method)
    eye = torch.eye(12, dtype=torch.float64)
    with GradientProbe(model) as probe:
        square(batch(4, 12, dtype=torch.float64))(model).backward()
        with torch.no_grad():
            before = model.first(eye)
        if method == "flora":
            layer = model.first
            layer.fold(-0.01 * layer.scaling * layer.expand.weight.grad)
        else:
            weights = [p for p in model.parameters() if p.requires_grad]
            torch.optim.SGD(weights, lr=0.01).step()
        with torch.no_grad():
            moved = (model.first(eye) - before).T
        close(moved, -0.01 * probe.records["first"].actual_update, 1e-10)


@pytest.mark.parametrize(("tokens", "dims"), [(3, (40, 30, 20)), (64, (12, 10, 7))])
def test_row_norms_by_either_way(tokens: int, dims: tuple[int, int, int]) -> None:
    """Oracle: norms of autograd's rows. The first case must not form G, the second must."""
    model = lora(Net(dims=dims), "first|second")
    x = batch(tokens, dims[0])
    expected = dense(model, square(x))["first"].norm(dim=1)
    with GradientProbe(model) as probe:
        square(x)(model).backward()
    record = probe.records["first"]
    close(record.row_norms, expected, 1e-6)
    assert (record._total is None) == (tokens == 3)
    close(record.gradient.norm(dim=1), expected, 1e-6)
    close(record.row_norms, expected, 1e-6)


def test_row_norms_survive_cancellation() -> None:
    """Oracle: float64. In float32 the Gram form would lose half of the digits here."""
    model = lora(Net(dims=(400, 300, 4)), "first")
    x = batch(1, 400).repeat(2, 1)
    x[1, 0] += 1e-3
    sign = torch.tensor([[1.0], [-1.0]])
    with GradientProbe(model) as probe:
        (model.first(x) * sign).sum().backward()
    expected = (x.double() * sign.double()).sum(0).norm().expand(300)
    close(probe.records["first"].row_norms, expected, 1e-6)


def test_a_is_the_one_of_the_forward_pass() -> None:
    """Oracle: the formula with a copy of A made before it moved."""
    model = net()
    adapter = adapters(model)["first"]
    then = adapter.a().clone()
    with GradientProbe(model) as probe:
        square(batch(4, 12))(model).backward()
        record = probe.records["first"]
        adapter.layer.project.weight.data.add_(1.0)
        assert torch.equal(record.a, then)
        close(record.projected, record.gradient @ then.T @ then, 1e-5)


def test_a_step_that_was_not_ended_is_noticed() -> None:
    """A second optimizer step without probe.step() moves A between passes."""
    model = net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with GradientProbe(model) as probe:
        for _ in range(2):
            square(batch(4, 12))(model).backward()
            optimizer.step()
    record = probe.records["first"]
    assert record.gradient.isfinite().all()
    with pytest.raises(ProbeError, match=r"'first' changed .* probe.step\(\)"):
        _ = record.projected


def test_every_and_layers_restrict_what_is_recorded() -> None:
    """Steps 0, 3 and 6 of 7, and one layer of two."""
    model = net()
    with GradientProbe(model, every=3, layers=["second"]) as probe:
        seen = []
        for _ in range(7):
            square(batch(4, 12))(model).backward()
            seen.append(sorted(probe.records))
            probe.step()
    assert seen == [["second"], [], [], ["second"], [], [], ["second"]]


def test_evaluation_and_other_blocks_are_not_recorded() -> None:
    """No gradients, or a forward or backward outside of the block."""
    model, x = net(), batch(4, 12)
    outside = square(x)(model)
    with GradientProbe(model) as probe:
        with torch.no_grad():
            model(x)
        with torch.inference_mode():
            model(x)
        outside.backward()
        assert probe.records == {}
        inside = square(x)(model)
    inside.backward()
    assert probe.records == {}


def test_inference_tensors_may_be_inputs() -> None:
    """Oracle: the gradient of a sum, by hand. Such tensors have no version counter."""
    model = net(method="lora-fa")
    with torch.inference_mode():
        x = batch(4, 12)
    with GradientProbe(model, layers=["first"]) as probe:
        model.first(x).sum().backward()
        close(probe.records["first"].gradient[0], x.clone().sum(0), 1e-6)


def trace(model: nn.Module, loss: Loss) -> list[torch.Tensor]:
    """Loss and all gradients."""
    value = loss(model)
    value.backward()
    found = [value.detach()]
    for p in model.parameters():
        if p.grad is not None:
            found.append(p.grad)
            p.grad = None
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_model_computes_the_same_bits(family: str) -> None:
    """Oracle: the same model without the probe, dropout on."""
    model = lora(tiny(family), ".*(query|value|q_proj|v_proj|c_attn)")
    loss = lm_loss(family)
    plain = trace(model, loss)
    with GradientProbe(model) as probe:
        probed = trace(model, loss)
        assert all(r.noise.isfinite().all() for r in probe.records.values())
    assert len(plain) > 4
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))


def test_nothing_is_left_behind_also_after_an_exception() -> None:
    """Hooks, attributes and weights, compared with those before."""
    model = net()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}

    def fail() -> None:
        with GradientProbe(model):
            assert sum(len(m._forward_hooks) for m in model.modules()) == 2
            square(batch(4, 12))(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    for m in model.modules():
        assert not m._forward_hooks
        assert not m._forward_hooks_with_kwargs
        assert not m._backward_hooks
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_forward_pass_without_backward_frees_its_input() -> None:
    """The array under the input dies with the graph, not with the probe."""
    model = net()

    class Array(np.ndarray):
        """A plain ndarray takes no weak reference."""

    with GradientProbe(model) as probe:
        array = np.ones((4, 12), np.float32).view(Array)
        alive = weakref.ref(array)
        y = model(torch.from_numpy(array))
        del array
        gc.collect()
        assert alive() is not None, "the graph still needs it"
        del y
        gc.collect()
        assert alive() is None

        array = np.ones((4, 12), np.float32).view(Array)
        alive = weakref.ref(array)
        model(torch.from_numpy(array)).sum().backward()
        del array
        assert alive() is not None
        probe.step()
        gc.collect()
        assert alive() is None


def test_an_exception_between_forward_and_backward_loses_that_batch_only() -> None:
    """Oracle: autograd on the batch after it."""
    model, x = net(), batch(4, 12)
    with GradientProbe(model) as probe:
        try:
            _ = square(batch(9, 12))(model)
            raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        square(x)(model).backward()
        close(probe.records["first"].gradient, dense(model, square(x))["first"], 1e-6)


def test_probes_nest_but_one_probe_is_entered_once() -> None:
    """Two probes see the same; one may be entered again after its exit."""
    model, x = net(), batch(4, 12)
    with GradientProbe(model) as outer, GradientProbe(model, layers=["second"]) as inner:
        square(x)(model).backward()
        assert torch.equal(outer.records["second"].gradient, inner.records["second"].gradient)
        with pytest.raises(ProbeError, match="active already"):
            outer.__enter__()
    with outer:
        outer.step()
        square(x)(model).backward()
        assert set(outer.records) == {"first", "second"}


@pytest.mark.parametrize("quantity", ["gradient", "projected", "row_norms", "projected_row_norms"])
def test_an_overwritten_input_is_an_error_not_a_wrong_number(quantity: str) -> None:
    """Before it is used; afterwards the input may change."""
    model = net(method="lora-fa")  # autograd keeps no x here, so it does not notice
    x = batch(4, 12)
    with GradientProbe(model) as probe:
        y = model.first(x)
        x.zero_()
        y.sum().backward()
        with pytest.raises(ProbeError, match=r"input of layer 'first'.*overwritten in place"):
            getattr(probe.records["first"], quantity)
        probe.step()
        y = model.first(x)
        y.sum().backward()
        _ = probe.records["first"].gradient  # from here on the factors are not needed
        x.add_(1.0)
        getattr(probe.records["first"], quantity)


def test_second_order_is_refused_and_first_order_is_not() -> None:
    """Oracle: autograd for the first order."""
    model, x = net(), batch(4, 12).requires_grad_()
    expected = dense(model, square(x.detach()))["first"]
    with GradientProbe(model) as probe:
        (slope,) = torch.autograd.grad(square(x)(model), x, create_graph=True)
        close(probe.records["first"].gradient, expected, 1e-6)
        slope.square().sum().backward()
        with pytest.raises(ProbeError, match="second-order"):
            _ = probe.records["first"].gradient
        probe.step()
        torch.autograd.grad(model.first(x).sum(), x, create_graph=True)
        with pytest.raises(ProbeError, match="second-order"):
            _ = probe.records["first"].gradient


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "quantity", ["gradient", "projected", "noise", "row_norms", "projected_row_norms"]
)
def test_non_finite_gradients_name_the_layer(bad: float, quantity: str) -> None:
    """Every way to a number checks."""
    model = lora(Net(dims=(40, 30, 20)), "first|second")
    x = batch(2, 40)
    x[0, 0] = bad
    with GradientProbe(model) as probe:
        model.first(x).sum().backward()
        with pytest.raises(NonFiniteError, match="layer 'first'"):
            getattr(probe.records["first"], quantity)


def test_an_unknown_law_has_no_normalisation() -> None:
    """PiSSA computes A from W: G and the update work, the rest says why not."""
    model = peft.get_peft_model(
        tiny("bert"),
        peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights="pissa"),
    )
    with GradientProbe(model) as probe:
        lm_loss("bert")(model).backward()
    record = next(iter(probe.records.values()))
    assert record.law.name == "unknown"
    assert record.gradient.norm() > 0
    assert record.actual_update.norm() > 0
    for quantity in ("projected", "noise"):
        with pytest.raises(ValueError, match=r"law of A in layer .* use \.actual_update"):
            getattr(record, quantity)


def test_bad_arguments_say_what_to_do() -> None:
    """Each error names what came and what there is."""
    with pytest.raises(NoTargetError, match="no adapter"):
        GradientProbe(Net())
    model = net()
    with pytest.raises(NoTargetError, match="The model has: first, second"):
        GradientProbe(model, layers=["third"])
    with pytest.raises(NoTargetError, match="must name adapted layers"):
        GradientProbe(model, layers=[])
    with pytest.raises(TypeError, match="iterable of names"):
        GradientProbe(model, layers="first")
    with pytest.raises(ValueError, match="every must be at least 1"):
        GradientProbe(model, every=0)
    with pytest.raises(TypeError, match="every must be an integer"):
        GradientProbe(model, every=1.5)


def test_the_howto_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The code of docs/howto-probe.md, as it stands there."""
    page = Path(__file__).parents[2] / "docs" / "howto-probe.md"
    if not page.exists():
        pytest.skip("docs/howto-probe.md is not part of this installation")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, str(page), "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "2"] * 3 + ["3"]
