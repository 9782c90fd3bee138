"""Round trips: LoRA through peft's own loader, FLoRA through factors or weights."""

import copy
import json
from pathlib import Path

import opacus
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from lora_privacy.core import (
    FLoRAMomentum,
    LoRALinear,
    RandomProjection,
    adapt,
    adapters,
    decompress,
    flora_layers,
    load_flora,
    refresh,
    save_flora,
    save_peft,
    sgd_step,
)
from lora_privacy.errors import (
    AlreadyAdaptedError,
    LoraPrivacyError,
    NonFiniteError,
    StorageError,
    UnsupportedLayerError,
)

BERT = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    vocab_size=40,
    max_position_embeddings=16,
)
# Maps through which gradients of a random model flow; those of its queries nearly vanish.
TARGETS = ("value", "output.dense", "c_attn")
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
IDS = torch.arange(24).reshape(3, 8)


def base(kind: str = "bert") -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BERT) if kind == "bert" else GPT2LMHeadModel(GPT2)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    """On fixed tokens."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def disturb(model: nn.Module) -> None:
    """Stand in for training: move every trainable parameter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {"trainable": ("classifier",)}),
        ("bert", {"method": "lora-fa", "alpha": 5.5, "layers": (1,)}),
        ("gpt2", {"law": "orthonormal"}),
        ("gpt2", {"targets": ("mlp.c_fc", "attn.c_proj")}),
    ],
)
def test_peft_loads_what_was_saved(kind: str, options: dict, tmp_path: Path) -> None:
    """Oracle: peft's PeftModel.from_pretrained on a fresh base; outputs equal to 1e-6."""
    model = adapt(base(kind), 4, seed=1, **options)
    disturb(model)
    assert save_peft(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    expected = logits(model)
    assert (expected - logits(base(kind))).abs().max() > 1e-3
    loaded = peft.PeftModel.from_pretrained(base(kind), str(tmp_path / "new" / "folder"))
    assert (logits(loaded) - expected).abs().max() < 1e-6
    read, ours = adapters(loaded), adapters(model)
    assert {f"base_model.model.{name}" for name in ours} == set(read)
    for name, adapter in ours.items():
        twin = read[f"base_model.model.{name}"]
        assert torch.equal(twin.a(), adapter.a())
        assert twin.scaling == adapter.scaling
        assert twin.law.name == "unknown"  # peft has no name for ours


def test_the_saved_names_are_short_where_they_suffice(tmp_path: Path) -> None:
    """('query', 'value') for all blocks, a regular expression for some; no pickle."""
    save_peft(adapt(base(), 4, seed=1), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["query", "value"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    save_peft(adapt(base(), 4, seed=1, layers=(0,)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], str)


def test_wrappers_of_opacus_are_looked_through(tmp_path: Path) -> None:
    """No `_module.` in the keys, which peft would not find."""
    model = adapt(base(), 4, seed=1)
    disturb(model)
    save_peft(opacus.GradSampleModule(model), tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    assert (logits(loaded) - logits(model)).abs().max() < 1e-6


def test_heads_whose_names_end_alike(tmp_path: Path) -> None:
    """DistilBERT: peft takes pre_classifier for the trained classifier and wants its weights."""
    config = DistilBertConfig(dim=32, n_heads=2, n_layers=1, hidden_dim=32, vocab_size=40)
    plain = DistilBertForSequenceClassification(config)
    model = adapt(copy.deepcopy(plain), 4, seed=1, trainable=("classifier",))
    disturb(model)
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    assert (logits(loaded) - logits(model)).abs().max() < 1e-6
    clash = nn.ModuleDict({"value": nn.Linear(4, 4), "lue": nn.Linear(4, 4)})
    with pytest.raises(UnsupportedLayerError, match="end alike"):
        save_peft(adapt(clash, 2, seed=0, trainable=("lue",)), tmp_path)


def test_merged_adapters_are_saved_as_adapters(tmp_path: Path) -> None:
    """The base is not part of the file, so the update is not applied twice."""
    model = adapt(base(), 4, seed=1)
    disturb(model)
    expected = logits(model)
    for adapter in adapters(model).values():
        adapter.layer.merge()
    save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    assert (logits(loaded) - expected).abs().max() < 1e-6


def test_peft_format_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    """Each by its name, and nothing is written."""
    folder = tmp_path / "out"
    with pytest.raises(LoraPrivacyError, match="use save_flora"):
        save_peft(adapt(base(), 4, seed=1, method="flora"), folder)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(LoraPrivacyError, match="save_pretrained"):
        save_peft(theirs, folder)
    model = adapt(base(), 4, seed=1)
    name, adapter = next(iter(adapters(model).items()))
    adapter.layer.base.bias.requires_grad_(True)
    with pytest.raises(UnsupportedLayerError, match=f"{name}.base.bias"):
        save_peft(model, folder)
    tied = adapt(base("gpt2"), 4, seed=1)
    tied.lm_head.weight.requires_grad_(True)
    with pytest.raises(UnsupportedLayerError, match="shared"):
        save_peft(tied, folder)
    mixed = nn.Sequential(
        *(LoRALinear(nn.Linear(4, 4), r, 1.0, RandomProjection(r, 4, seed=0)) for r in (1, 2))
    )
    with pytest.raises(UnsupportedLayerError, match="one rank and alpha"):
        save_peft(mixed, folder)
    broken = adapt(base(), 4, seed=1)
    with torch.no_grad():
        adapters(broken)[name].layer.project.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="nothing was written"):
        save_peft(broken, folder)
    assert not folder.exists()


def train_flora(model: nn.Module, steps: int, how: str) -> nn.Module:
    """A few steps on fixed tokens."""
    momentum = FLoRAMomentum(model, lr=0.1) if how == "momentum" else None
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2) if how == "adamw" else None
    for _ in range(steps):
        output = model(input_ids=IDS).logits
        (10 * output.float()).square().mean().backward()
        if optimizer is not None:
            decompress(model)
            optimizer.step()
            optimizer.zero_grad()
            refresh(model)
        elif momentum is not None:
            momentum.step()
        else:
            sgd_step(model, 0.02)
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize(
    ("how", "steps", "stored"),
    [
        ("sgd", 4, "factors"),
        ("momentum", 4, "factors"),
        ("sgd", 40, "weight"),
        ("adamw", 3, "weight"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flora_round_trip(
    kind: str, how: str, steps: int, stored: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Into a plain fresh base; the weights that ran, to rounding where factors are replayed."""
    model = adapt(base(kind).to(dtype), 2, seed=2**70, method="flora", targets=TARGETS, alpha=3.0)
    train_flora(model, steps, how)
    save_flora(model, tmp_path)
    keys = {key.partition(".")[0] for key in load_file(tmp_path / "flora_model.safetensors")}
    assert keys - {"trained"} == ({"factors", "sketch"} if stored == "factors" else {"weight"})
    plain = base(kind).to(dtype)
    start = copy.deepcopy(plain)
    assert load_flora(plain, tmp_path) is plain
    for name, layer in flora_layers(model).items():
        trained = plain.get_submodule(name).weight.float()
        moved = (trained - start.get_submodule(name).weight.float()).abs().max()
        assert moved > 1e-4
        # A bf16 weight may round the other way where the master differs in its last bit.
        tolerance = 1e-6 if dtype == torch.float32 or stored == "weight" else 2**-8
        gap = (trained - layer.base.weight.float()).abs()
        assert (gap <= tolerance * trained.abs() + 1e-7).all()
    if dtype == torch.float32:
        assert (logits(plain) - logits(model)).abs().max() < 1e-5


def test_the_smaller_form_is_chosen(tmp_path: Path) -> None:
    """4 steps at rank 2 take 2·4·2/32 of the dense weights; the file shows it."""
    sizes = []
    for steps in (4, 40):
        model = train_flora(
            adapt(base(), 2, seed=1, method="flora", targets=TARGETS), steps, "sgd"
        )
        save_flora(model, tmp_path)
        sizes.append((tmp_path / "flora_model.safetensors").stat().st_size)
    assert sizes[0] < 0.6 * sizes[1]


def test_a_trained_head_travels_along(tmp_path: Path) -> None:
    """Under its name in the plain model; an unmoved layer costs its sketch."""
    model = adapt(base(), 2, seed=1, method="flora", targets=TARGETS, trainable=("classifier",))
    with torch.no_grad():
        model.classifier.weight.mul_(3)
        model.classifier.bias.add_(1)
    save_flora(opacus.GradSampleModule(model, strict=False), tmp_path)
    tensors = load_file(tmp_path / "flora_model.safetensors")
    assert "trained.classifier.weight" in tensors
    loaded = load_flora(base(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_the_bias_of_a_new_head_travels_along(tmp_path: Path) -> None:
    """A head drawn for the task and then compressed: its bias is that of no base model."""
    model = adapt(base(), 2, seed=1, method="flora", targets=("classifier",))
    for layer in flora_layers(model).values():
        layer.bias.data.copy_(torch.tensor([0.5, -2.0]))
    save_flora(train_flora(model, 2, "sgd"), tmp_path)
    plain = base()
    assert not bool(plain.classifier.bias.any())
    loaded = load_flora(plain, tmp_path)
    assert torch.equal(loaded.classifier.bias, torch.tensor([0.5, -2.0]))
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5


def test_factors_refuse_another_base(tmp_path: Path) -> None:
    """Other weights, and the same in another precision; the model is left as it was."""
    save_flora(
        train_flora(adapt(base(), 2, seed=1, method="flora", targets=TARGETS), 3, "sgd"), tmp_path
    )
    other = base()
    with torch.no_grad():
        other.bert.encoder.layer[1].attention.self.value.weight[3] *= 1.001
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StorageError, match=r"layer\.1.*value' were folded into other weights"):
        load_flora(other, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    with pytest.raises(StorageError, match="same precision"):
        load_flora(base().bfloat16(), tmp_path)
    with pytest.raises(StorageError, match="no dense linear map"):
        load_flora(base("gpt2"), tmp_path)
    with pytest.raises(AlreadyAdaptedError):
        load_flora(adapt(base(), 2, seed=1), tmp_path)


def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    """Each with a message that names the file; never a half-loaded model."""
    config, weights = tmp_path / "flora_config.json", tmp_path / "flora_model.safetensors"
    with pytest.raises(StorageError, match=r"flora_config\.json is missing"):
        load_flora(base(), tmp_path)
    save_flora(
        train_flora(adapt(base(), 2, seed=1, method="flora", targets=TARGETS), 3, "sgd"), tmp_path
    )
    good, good_weights = config.read_text(), weights.read_bytes()
    tensors = {key: value.clone() for key, value in load_file(weights).items()}
    name = next(iter(json.loads(good)["layers"]))

    def changed(**entry: object) -> str:
        parsed = json.loads(good)
        parsed["layers"][name] |= entry
        return json.dumps(parsed)

    for text, match in (
        (good[:-9], "no readable JSON"),
        ("[]", "not written by save_flora"),
        ('{"format": "other"}', "not written by save_flora"),
        (good.replace('"version": 1', '"version": 2'), "version 2"),
        (good.replace('"layers"', '"lairs"'), "lists no layers"),
        (changed(seed=-1), "damaged: seed"),
        (changed(seed=2), "folded into other weights"),
        (changed(rank="two"), "damaged: rank"),
        (changed(steps=[0]), "damaged"),
        (changed(out_features=31), "shape"),
    ):
        config.write_text(text)
        with pytest.raises(StorageError, match=match):
            load_flora(base(), tmp_path)
    config.write_text(good)

    weights.write_bytes(good_weights[:-50])
    with pytest.raises(StorageError, match="no readable safetensors"):
        load_flora(base(), tmp_path)
    for change, match in (
        ({"foreign": torch.zeros(2)}, "foreign tensor 'foreign'"),
        ({"trained.classifier.weight": torch.zeros(3, 3)}, r"no parameter 'classifier\.weight'"),
        ({f"sketch.{name}": torch.full((32,), float("nan"))}, "NaN"),
        ({f"factors.{name}": torch.zeros(3, 5, 2)}, "damaged: shapes must be"),
        ({f"factors.{name}": torch.zeros(3, 1, 2)}, "damaged: shapes must be"),
        ({f"sketch.{name}": torch.zeros(1)}, "damaged: shapes must be"),
    ):
        save_file(tensors | change, weights)
        with pytest.raises(StorageError, match=match):
            load_flora(base(), tmp_path)
    save_file({k: v for k, v in tensors.items() if k != f"factors.{name}"}, weights)
    with pytest.raises(StorageError, match="damaged"):
        load_flora(base(), tmp_path)
    weights.unlink()
    with pytest.raises(StorageError, match=r"flora_model\.safetensors is missing"):
        load_flora(base(), tmp_path)
    with pytest.raises(LoraPrivacyError, match="no FLoRA layer"):
        save_flora(base(), tmp_path)
