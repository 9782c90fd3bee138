"""Which layers `adapt` takes, what it freezes, what it refuses, and what `adapters` reads."""

import math
import subprocess
import sys

import peft
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import lora_privacy.core as core
from lora_privacy.core import (
    FLoRALinear,
    LoRALinear,
    RandomProjection,
    adapt,
    adapters,
    find_targets,
    is_conv1d,
    unfreeze,
)
from lora_privacy.errors import AlreadyAdaptedError, NoTargetError, UnsupportedLayerError
from lora_privacy.laws import LAW_NAMES, EntryLaw, entry_law, peft_default_law

BERT = BertConfig(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    vocab_size=40,
    max_position_embeddings=16,
)
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)


def bert() -> BertForSequenceClassification:
    """Three blocks, 16 wide."""
    return BertForSequenceClassification(BERT)


def test_default_targets_are_queries_and_values() -> None:
    """Of every block; the same model comes back, with all else frozen."""
    model = bert()
    assert adapt(model, 4, seed=3) is model
    expected = {
        f"bert.encoder.layer.{k}.attention.self.{t}" for k in range(3) for t in ("query", "value")
    }
    assert set(adapters(model)) == expected
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.{f}.weight" for n in expected for f in ("project", "expand")}


def test_unfreeze_trains_the_weights_that_adapt_would_adapt() -> None:
    """The same targets, blocks and head, and nothing else; no layer is replaced."""
    model = bert()
    kinds = [type(module) for module in model.modules()]
    chosen = {"layers": (-1,), "targets": ("query", "key")}
    assert unfreeze(model, **chosen, trainable=("classifier",)) is model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = set(adapters(adapt(bert(), 2, **chosen, seed=0)))
    assert set(find_targets(bert(), ("query", "key"), (-1,))) == adapted
    assert trained == {f"{name}.weight" for name in adapted} | {
        "classifier.weight",
        "classifier.bias",
    }
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(AlreadyAdaptedError):
        unfreeze(adapt(bert(), 2, seed=0))
    with pytest.raises(NoTargetError, match="trainable='nothing'"):
        unfreeze(model, trainable=("nothing",))


@pytest.mark.parametrize(("method", "kind"), [("lora", LoRALinear), ("flora", FLoRALinear)])
def test_methods_on_a_conv1d_model(method: str, kind: type[nn.Module]) -> None:
    """GPT-2's c_attn, which is tied to nothing; a forward and a backward pass."""
    model = adapt(GPT2LMHeadModel(GPT2), 2, method=method, seed=0)
    found = adapters(model)
    assert set(found) == {f"transformer.h.{k}.attn.c_attn" for k in range(2)}
    for adapter in found.values():
        assert isinstance(adapter.layer, kind)
        assert is_conv1d(adapter.layer.base)
        assert (adapter.in_features, adapter.out_features) == (16, 48)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(adapter.layer.expand.weight.grad is not None for adapter in found.values())


@pytest.mark.parametrize("law", LAW_NAMES)
def test_adapters_state_what_was_drawn(law: str) -> None:
    """Scaling, law and A of every layer; the matrices differ from layer to layer."""
    model = adapt(bert(), 4, method="lora-fa", alpha=6.0, law=law, seed=3)
    found = adapters(model)
    for name, adapter in found.items():
        assert (adapter.name, adapter.kind, adapter.rank) == (name, "lora-fa", 4)
        assert adapter.layer is model.get_submodule(name)
        assert adapter.scaling == 1.5
        assert adapter.law == entry_law(law, 4, 16)
        assert torch.equal(adapter.a(), RandomProjection(4, 16, law, seed=3, layer=name).matrix(0))
        assert adapter.b().shape == (16, 4)
        assert not adapter.b().any()
        assert not adapter.a().requires_grad
    assert len({tuple(adapter.a()[0].tolist()) for adapter in found.values()}) == 6


def test_default_alpha_gives_scaling_one() -> None:
    """So that the update is that of theory, B A."""
    assert {x.scaling for x in adapters(adapt(bert(), 4, seed=0)).values()} == {1.0}


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("key",), 3), (("self.key", "classifier"), 4), (r".*layer\.[01]\..*\.(query|key)", 4)],
)
def test_targets_are_path_endings_or_a_regular_expression(targets: object, count: int) -> None:
    """Endings count from a dot: 'ey' is none."""
    assert len(adapters(adapt(bert(), 4, targets=targets, seed=0))) == count
    with pytest.raises(NoTargetError):
        adapt(bert(), 4, targets=("ey",), seed=0)


@pytest.mark.parametrize(
    ("layers", "blocks"), [((0, 2), {0, 2}), ((-1,), {2}), ((-2, -1), {1, 2})]
)
def test_layers_choose_blocks(layers: tuple[int, ...], blocks: set[int]) -> None:
    """By the first number in a path, from the front or the back."""
    model = adapt(bert(), 4, targets=("query",), layers=layers, seed=0)
    assert {int(name.split(".")[3]) for name in adapters(model)} == blocks


def test_trainable_modules_stay_trainable() -> None:
    """A head named in `trainable`, and nothing else."""
    model = adapt(bert(), 4, seed=0, method="lora-fa", trainable=("classifier",))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "expand" not in n}
    assert trained == {"classifier.weight", "classifier.bias"}


def test_no_target_lists_the_candidates() -> None:
    """Names that end linear maps of this model, and the blocks that hold targets."""
    with pytest.raises(NoTargetError, match=r"targets=\('qqq',\).*classifier, dense, key, query"):
        adapt(bert(), 4, targets=("qqq",), seed=0)
    with pytest.raises(NoTargetError, match="dense_out"):
        adapt(nn.ModuleDict({"dense_out": nn.Linear(2, 2)}), 1, seed=0)
    with pytest.raises(NoTargetError, match="there are none"):
        adapt(nn.Linear(2, 2), 1, seed=0)
    with pytest.raises(NoTargetError, match=r"block 3; blocks with targets: \[0, 1, 2\]"):
        adapt(bert(), 4, layers=(3,), seed=0)
    with pytest.raises(ValueError, match="layers must be at least -3"):
        adapt(bert(), 4, layers=(-4,), seed=0)
    with pytest.raises(NoTargetError, match="trainable='score'"):
        adapt(bert(), 4, trainable=("score",), seed=0)
    with pytest.raises(NoTargetError, match="no adapter"):
        adapters(bert())


def test_adapted_models_are_refused() -> None:
    """Ours, peft's model, and a model that peft has injected layers into."""
    ours = adapt(bert(), 4, seed=0)
    config = peft.LoraConfig(r=2, target_modules=["query"])
    theirs = peft.get_peft_model(bert(), config)
    injected = peft.inject_adapter_in_model(config, bert())
    for model in (ours, theirs, injected):
        with pytest.raises(AlreadyAdaptedError, match="carries adapters already"):
            adapt(model, 4, seed=0)


def test_layers_that_cannot_carry_an_adapter_are_refused() -> None:
    """Embeddings, containers, tied weights, shared modules, layers that are not called."""
    with pytest.raises(UnsupportedLayerError, match="Embedding"):
        adapt(bert(), 4, targets=("word_embeddings",), seed=0)
    with pytest.raises(UnsupportedLayerError, match="BertSelfAttention"):
        adapt(bert(), 4, targets=("self",), seed=0)
    with pytest.raises(UnsupportedLayerError, match=r"shared \(transformer.wte.weight, lm_head"):
        adapt(GPT2LMHeadModel(GPT2), 4, targets=("lm_head",), seed=0)
    one = nn.Linear(4, 4)
    with pytest.raises(UnsupportedLayerError, match="shared"):
        adapt(nn.ModuleDict({"value": one, "again": nn.Sequential(one)}), 2, seed=0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 1)
    with pytest.raises(UnsupportedLayerError, match="skipped without a word"):
        adapt(encoder, 2, targets=("linear1",), seed=0)
    with pytest.raises(UnsupportedLayerError, match="NonDynamicallyQuantizableLinear"):
        adapt(encoder, 2, targets=("out_proj",), seed=0)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 17, "law": "orthonormal"}, ValueError, "rank must be at most in_features = 16"),
        ({"rank": 2.0}, TypeError, "rank must be an integer"),
        ({"alpha": -1.0}, ValueError, "alpha must be positive"),
        ({"alpha": math.nan}, ValueError, "alpha must be positive"),
        ({"method": "dora"}, ValueError, "method must be one of"),
        ({"law": "cauchy"}, ValueError, "law must be one of"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"resample_every": 2}, ValueError, "resample_every is for method='flora'"),
        ({"resample_every": 0, "method": "flora"}, ValueError, "resample_every must be"),
        ({"layers": ()}, ValueError, "layers must name at least one block"),
        ({"trainable": "classifier"}, TypeError, "trainable must be a sequence"),
        ({"trainable": ("encoder",)}, ValueError, "holds the target"),
        ({"targets": (3,)}, TypeError, "targets must be names"),
        ({"alpah": 1.0}, TypeError, "alpah"),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(
    change: dict, error: type[Exception], match: str
) -> None:
    """Also the flags of its parameters."""
    model = bert()
    model.classifier.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        adapt(model, **({"rank": 4, "seed": 0} | change))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not any(isinstance(m, LoRALinear | FLoRALinear) for m in model.modules())


UNKNOWN = "unknown"
INITS = [
    (True, peft_default_law(16)),
    ("gaussian", EntryLaw("gaussian", 1 / 16, 3.0)),
    (False, UNKNOWN),
    ("pissa", UNKNOWN),
    ("olora", UNKNOWN),
    ("orthogonal", UNKNOWN),
]


@pytest.mark.parametrize(("init", "law"), INITS, ids=[str(init) for init, _ in INITS])
def test_peft_models_are_read_with_the_law_they_have(init: object, law: object) -> None:
    """Scaling, A and B are the layer's own; weight-dependent laws are unknown, with a reason."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["query"], init_lora_weights=init, use_rslora=True
    )
    model = peft.get_peft_model(bert(), config)
    found = adapters(model)
    assert len(found) == 3
    for name, adapter in found.items():
        layer = model.get_submodule(name)
        assert (adapter.kind, adapter.rank) == ("peft", 4)
        assert (adapter.in_features, adapter.out_features) == (16, 16)
        assert adapter.scaling == 3.0  # 6/√4: rank-stabilised, as the layer has it
        assert adapter.a().data_ptr() == layer.lora_A["default"].weight.data_ptr()
        assert adapter.b().data_ptr() == layer.lora_B["default"].weight.data_ptr()
        if law == UNKNOWN:
            assert adapter.law.name == "unknown"
            assert math.isnan(adapter.law.variance)
            assert f"init_lora_weights={init!r}" in adapter.law_reason
        else:
            assert adapter.law == law


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_the_law_read_is_that_of_the_draws(init: object) -> None:
    """Mean square of 48,000 entries within 4 standard errors; variance 1/r is rejected."""
    torch.manual_seed(5)
    config = BertConfig(
        hidden_size=1000,
        num_attention_heads=10,
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=10,
    )
    model = peft.get_peft_model(
        BertModel(config),
        peft.LoraConfig(r=24, target_modules=["query", "value"], init_lora_weights=init),
    )
    found = list(adapters(model).values())
    a = torch.cat([adapter.a().flatten() for adapter in found]).double()
    law = found[0].law
    error = law.variance * math.sqrt((law.kurtosis - 1) / a.numel())
    assert abs(a.square().mean().item() - law.variance) < 4 * error
    assert abs(1 / 24 - law.variance) > 4 * error
    fourth = a.pow(4).mean().item() / law.variance**2
    assert fourth == pytest.approx(law.kurtosis, rel=0.05)


def test_the_active_peft_adapter_is_read() -> None:
    """One active: that one. Two: refused. None: no adapter."""
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query"]))
    model.add_adapter(
        "second", peft.LoraConfig(r=3, target_modules=["query"], init_lora_weights="gaussian")
    )
    assert {adapter.rank for adapter in adapters(model).values()} == {2}
    model.set_adapter("second")
    assert {adapter.law.variance for adapter in adapters(model).values()} == {1 / 9}
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(UnsupportedLayerError, match="default, second"):
        adapters(model)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (peft.LoraConfig(r=2, target_modules=["query"], use_dora=True), "Dora"),
        (peft.LoraConfig(r=2, target_modules=["word_embeddings"]), "embedding"),
        (peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "only LoRA"),
    ],
    ids=["dora", "embedding", "ia3"],
)
def test_peft_layers_that_are_not_plain_lora_are_refused(
    config: peft.PeftConfig, match: str
) -> None:
    """They would be read as something they are not."""
    with pytest.raises(UnsupportedLayerError, match=match):
        adapters(peft.get_peft_model(bert(), config))


@pytest.mark.slow
def test_importing_core_loads_no_torch_and_adapting_no_peft() -> None:
    """In a fresh process: torch on first use, transformers and peft not at all."""
    code = (
        "import sys, lora_privacy.core as core\n"
        "assert 'torch' not in sys.modules\n"
        "core.adapt; core.save_peft; core.snapshot; core.FLoRAMomentum\n"
        "from torch import nn\n"
        "model = core.adapt(nn.Sequential(nn.Linear(3, 3)), 2, targets=('0',), seed=0)\n"
        "core.adapters(model)\n"
        "assert callable(core.adapt)\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'transformers', 'peft', 'opacus', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_pinned() -> None:
    """And each resolves."""
    assert sorted(core.__all__) == core.__all__ == dir(core)
    assert all(getattr(core, name) is not None for name in core.__all__)
    assert {
        *("Adapter", "AdapterSnapshot", "CachedPrefix", "FLoRALinear", "FLoRAMomentum"),
        *("GradientProbe", "GradientRecord", "LoRALinear", "RandomProjection", "Recursion"),
        *("adapt", "adapters", "decompress", "disagreement", "drift", "drift_bound"),
        *(
            "find_targets",
            "flora_layers",
            "is_conv1d",
            "load_flora",
            "predicted_update",
            "recursion",
            "refresh",
        ),
        *("save_flora", "save_peft", "sgd_step", "snapshot", "unfreeze", "update_bound"),
    } == set(core.__all__)
