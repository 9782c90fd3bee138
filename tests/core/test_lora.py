"""LoRALinear against its definition, and against peft with the same weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_privacy.core import LoRALinear, RandomProjection, is_conv1d
from lora_privacy.errors import LoraPrivacyError, NonFiniteError, UnsupportedLayerError

N, M, R = 7, 12, 3
BASES = {"linear": lambda: nn.Linear(M, N), "conv1d": lambda: Conv1D(N, M)}


def make(kind: str = "linear", dtype: torch.dtype = torch.float64, **options: bool) -> LoRALinear:
    """A layer with scaling 8/3 and non-zero B."""
    torch.manual_seed(0)
    base = BASES[kind]().to(dtype)
    layer = LoRALinear(base, R, 8.0, RandomProjection(R, M, seed=1), **options)
    with torch.no_grad():
        layer.expand.weight.normal_(generator=torch.Generator().manual_seed(3))
    return layer


def dense(layer: LoRALinear) -> torch.Tensor:
    """W as (out, in), from the base's own layout."""
    return layer.weight.T if is_conv1d(layer.base) else layer.weight


@pytest.mark.parametrize("kind", BASES)
def test_output_is_the_definition(kind: str) -> None:
    """Oracle: W x + b + s B A x written out with dense matrices; 1e-12."""
    layer = make(kind)
    x = torch.randn(5, 2, M, dtype=torch.float64)
    full = dense(layer) + (8 / 3) * layer.expand.weight @ layer.project.weight
    assert torch.allclose(layer(x), x @ full.T + layer.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_those_of_peft(kind: str, dtype: torch.dtype) -> None:
    """Oracle: peft's own layer with the same A and B; 1e-6 of the largest entry."""
    torch.manual_seed(2)
    model = nn.Sequential(BASES[kind]().to(dtype), nn.Tanh())
    ours = LoRALinear(copy.deepcopy(model[0]), R, 8.0, RandomProjection(R, M, seed=1))
    config = LoraConfig(r=R, lora_alpha=8, target_modules=["0"], fan_in_fan_out=kind == "conv1d")
    peers = get_peft_model(model, config).base_model.model[0]
    a, b = peers.lora_A["default"].weight, peers.lora_B["default"].weight
    with torch.no_grad():
        b.normal_()
        ours.project.weight.copy_(a)
        ours.expand.weight.copy_(b)
    x = torch.randn(9, M, dtype=dtype)
    grads = []
    for layer, weights in ((ours, (ours.project.weight, ours.expand.weight)), (peers, (a, b))):
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        loss = output.float().square().sum()
        grads.append([output, *torch.autograd.grad(loss, [inputs, *weights])])
    assert ours.project.weight.dtype == torch.float32
    for mine, peer in zip(*grads, strict=True):
        assert mine.dtype == peer.dtype
        # A bf16 value may round to the other neighbour where the order of products differs.
        tolerance = 1e-6 if dtype == torch.float32 else 2**-7
        gap = (mine - peer).float().abs().max() / peer.float().abs().max()
        assert gap.item() <= tolerance


@pytest.mark.parametrize("train_a", [True, False])
def test_only_the_factors_train(train_a: bool) -> None:
    """The base is frozen, LoRA-FA freezes A, and the wrapper itself owns no tensor."""
    layer = make(train_a=train_a)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"expand.weight"} | ({"project.weight"} if train_a else set())
    assert not list(layer.parameters(recurse=False))
    assert not list(layer.buffers())
    assert type(layer.project) is type(layer.expand) is nn.Linear


def test_a_fresh_adapter_changes_nothing_and_moves_no_generator() -> None:
    """B = 0 at the start, A is the drawn one, and the training mode is that of the base."""
    base = nn.Linear(M, N).eval()
    before = torch.get_rng_state()
    layer = LoRALinear(base, R, 8.0, RandomProjection(R, M, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    x = torch.randn(4, M)
    assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.project.weight, RandomProjection(R, M, seed=1).matrix(0))
    assert not layer.training


@pytest.mark.parametrize("kind", BASES)
def test_merge_keeps_the_output_and_unmerge_restores_every_bit(kind: str) -> None:
    """In float32, where W + Δ − Δ would not give W back."""
    layer = make(kind, torch.float32).eval()
    x = torch.randn(6, M)
    before, weight = layer(x), layer.weight.clone()
    layer.merge()
    assert layer.merged
    assert torch.allclose(layer(x), before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(layer.weight, weight)
    delta = layer.delta().T if kind == "conv1d" else layer.delta()
    assert not torch.equal(layer.weight - delta, weight)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)


def test_merged_layers_refuse_what_would_be_lost() -> None:
    """No second merge, no unmerge of the unmerged, no training while merged."""
    layer = make()
    with pytest.raises(LoraPrivacyError, match="not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(LoraPrivacyError, match="merged already"):
        layer.merge()
    x = torch.randn(2, M, dtype=torch.float64)
    with pytest.raises(LoraPrivacyError, match="unmerge"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)


def test_merge_refuses_nan() -> None:
    """And leaves the base as it was."""
    layer = make()
    weight = layer.weight.clone()
    with torch.no_grad():
        layer.expand.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="nothing was merged"):
        layer.merge()
    assert torch.equal(layer.weight, weight)
    assert not layer.merged


def test_half_precision_base_under_autocast() -> None:
    """A and B stay float32, the output has the type the base gives."""
    layer = make(dtype=torch.bfloat16)
    assert layer.expand.weight.dtype == torch.float32
    assert layer(torch.randn(2, M, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        output = make(dtype=torch.float32)(torch.randn(2, M))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()


@pytest.mark.parametrize(
    "base",
    [nn.Conv1d(M, N, 1), nn.Embedding(M, N), nn.MultiheadAttention(M, 2).out_proj, nn.Identity()],
    ids=lambda base: type(base).__name__,
)
def test_other_layers_are_refused(base: nn.Module) -> None:
    """The out-projection of MultiheadAttention is an nn.Linear that is never called."""
    with pytest.raises(UnsupportedLayerError, match=r"nn\.Linear or a transformers Conv1D"):
        LoRALinear(base, R, 1.0, RandomProjection(R, M, seed=1))


@pytest.mark.parametrize(
    ("rank", "alpha", "shape", "match"),
    [
        (0, 1.0, (R, M), "rank must be at least 1"),
        (R, 0.0, (R, M), "alpha must be positive"),
        (R, float("nan"), (R, M), "alpha must be positive"),
        (R, 1.0, (R + 1, M), "projection must have shape"),
        (R, 1.0, (R, M + 1), "projection must have shape"),
    ],
)
def test_bad_arguments(rank: int, alpha: float, shape: tuple[int, int], match: str) -> None:
    """Each error names the argument."""
    with pytest.raises(ValueError, match=match):
        LoRALinear(nn.Linear(M, N), rank, alpha, RandomProjection(*shape, seed=1))
