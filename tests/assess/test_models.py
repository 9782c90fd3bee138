"""Models of many architectures, made here with random weights: no network, no packaged model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.models import MeanPoolClassifier, load_model, model_digest
from lora_privacy.core import adapt, decompress, refresh
from lora_privacy.errors import (
    DataError,
    MissingPackageError,
    NoTargetError,
    UnsupportedLayerError,
)

WORDS = [
    "[PAD]",
    "[UNK]",
    "[EOS]",
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "one",
    "dog",
    "ran",
    "off",
    "with",
    "its",
    "bone",
]
WIDTH = 16

Save = Callable[..., str]


def _tokenizer(words: list[str] = WORDS, **special: str) -> tf.PreTrainedTokenizerFast:
    special = special or {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Save a model of random weights and a tokenizer to a folder."""

    def save(
        kind: str, settings: tf.PretrainedConfig, tokenizer: Any = None, name: str = "model"
    ) -> str:
        folder = tmp_path / name
        with torch.random.fork_rng():
            torch.manual_seed(0)
            getattr(tf, kind)(settings).save_pretrained(folder)
        (tokenizer or _tokenizer()).save_pretrained(folder)
        return str(folder)

    return save


def _bert(**changes: Any) -> tf.BertConfig:
    return tf.BertConfig(**{**_SIZES, **changes})


_SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
# hidden_size goes by the names dim, d_model, n_embd; OPT's states have word_embed_proj_dim.
_DISTILBERT = tf.DistilBertConfig(
    vocab_size=len(WORDS), dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=32
)
_T5 = tf.T5Config(
    vocab_size=len(WORDS),
    d_model=WIDTH,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    decoder_start_token_id=0,
)
_BART = tf.BartConfig(
    vocab_size=len(WORDS),
    d_model=WIDTH,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    pad_token_id=0,
    eos_token_id=2,
)
_GPT2 = tf.GPT2Config(vocab_size=len(WORDS), n_embd=WIDTH, n_layer=2, n_head=2, n_positions=40)
_OPT = tf.OPTConfig(
    vocab_size=len(WORDS),
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=32,
    word_embed_proj_dim=8,
    max_position_embeddings=40,
)
_BLOOM = tf.BloomConfig(vocab_size=len(WORDS), hidden_size=WIDTH, n_layer=2, n_head=2)
_MPNET = tf.MPNetConfig(**_SIZES, pad_token_id=0)
_LLAMA = tf.LlamaConfig(**_SIZES, num_key_value_heads=1)

# Class, config, width of the states, targets (None where the default ones must do).
Architecture = tuple[str, tf.PretrainedConfig, int, tuple[str, ...] | None]
ENCODERS: list[Architecture] = [
    ("BertModel", _bert(), WIDTH, None),
    ("BertForMaskedLM", _bert(), WIDTH, None),
    ("RobertaModel", tf.RobertaConfig(**_SIZES, type_vocab_size=1, pad_token_id=0), WIDTH, None),
    ("DistilBertModel", _DISTILBERT, WIDTH, None),
    ("AlbertModel", tf.AlbertConfig(**_SIZES, embedding_size=8), WIDTH, None),
    ("ElectraModel", tf.ElectraConfig(**_SIZES, embedding_size=8), WIDTH, None),
    ("BartModel", _BART, WIDTH, None),
    ("MPNetModel", _MPNET, WIDTH, ("q", "v")),
    ("T5Model", _T5, WIDTH, ("q", "v")),
    ("T5EncoderModel", _T5, WIDTH, ("q", "v")),
]
DECODERS: list[Architecture] = [
    ("GPT2LMHeadModel", _GPT2, WIDTH, None),
    ("LlamaForCausalLM", _LLAMA, WIDTH, None),
    ("OPTForCausalLM", _OPT, 8, None),
    ("GPTNeoXForCausalLM", tf.GPTNeoXConfig(**_SIZES), WIDTH, None),
    ("BloomForCausalLM", _BLOOM, WIDTH, None),
]


@pytest.mark.parametrize("method", ["lora", "lora-fa", "flora"])
@pytest.mark.parametrize(
    ("task", "architecture"),
    [
        *(("classification", a) for a in (*ENCODERS, *DECODERS)),
        *(("causal-lm", a) for a in DECODERS),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_model_loads_adapts_and_learns(
    save: Save, task: Any, architecture: Architecture, method: Any
) -> None:
    """Its loss on one batch falls, in some steps of plain SGD by each way to train."""
    kind, settings, width, targets = architecture
    folder = save(kind, settings)
    config = AssessConfig(model=folder, task=task, max_length=16)
    torch.manual_seed(0)
    model, tokenizer = load_model(config, classes=2)
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    causal = task == "causal-lm"
    if not causal:
        assert isinstance(model, MeanPoolClassifier)
        assert model.head.in_features == width
    adapt(model, 4, method=method, targets=targets, seed=0, trainable=() if causal else ("head",))
    model.eval()  # without dropout, so that the loss must fall
    batch = dict(tokenizer(["the cat sat on a mat", "dog ran off"], padding=True))
    ids = torch.tensor(batch["input_ids"])
    mask = torch.tensor(batch["attention_mask"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        output = model(input_ids=ids, attention_mask=mask)
        if causal:
            labels = ids.masked_fill(mask == 0, -100)[:, 1:]
            loss = functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels)
        else:
            loss = functional.cross_entropy(output, torch.tensor([0, 1]))
        losses.append(loss.item())
        loss.backward()
        if method == "flora":
            decompress(model)
        optimizer.step()
        optimizer.zero_grad()
        if method == "flora":
            refresh(model)
    assert losses[-1] < losses[0]


def test_the_head_sees_the_mean_of_real_tokens_only(save: Save) -> None:
    """Oracle: transformers' own model on each text alone, and the mean by numpy."""
    folder = save("GPT2LMHeadModel", _GPT2)
    model, tokenizer = load_model(AssessConfig(model=folder, max_length=16), 3)
    model.eval()
    own = tf.AutoModel.from_pretrained(folder).eval()
    texts = ["the cat sat on a mat", "dog ran"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    got = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert batch["attention_mask"].min() == 0
    for row, text in zip(got.detach(), texts, strict=True):
        states = own(torch.tensor([tokenizer(text)["input_ids"]]))[0][0].detach().numpy()
        expected = model.head(torch.tensor(states.mean(0)))
        torch.testing.assert_close(row, expected.detach(), rtol=1e-4, atol=1e-6)


def test_token_types_reach_an_encoder_that_has_them_and_no_other(save: Save) -> None:
    """GPT-2 would add the embeddings of words 0 and 1; RoBERTa has one type and would fail."""
    ids = torch.tensor([[3, 4, 5, 6]])
    types = torch.tensor([[0, 0, 1, 1]])
    roberta = tf.RobertaConfig(**_SIZES, type_vocab_size=1, pad_token_id=0)
    for kind, settings, matters in [
        ("BertModel", _bert(), True),
        ("RobertaModel", roberta, False),
        ("GPT2LMHeadModel", _GPT2, False),
        ("DistilBertModel", _DISTILBERT, False),
    ]:
        folder = save(kind, settings, name=kind)
        model, _ = load_model(AssessConfig(model=folder, max_length=16), 2)
        model.eval()
        plain = model(ids, torch.ones_like(ids))
        typed = model(ids, torch.ones_like(ids), types)
        assert torch.equal(plain, typed) != matters


def test_loading_leaves_random_numbers_and_environment_alone(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is the first thing drawn: the same as right after the seed."""
    folder = save("BertModel", _bert())
    monkeypatch.delenv("DISABLE_SAFETENSORS_CONVERSION", raising=False)
    torch.manual_seed(7)
    model, _ = load_model(AssessConfig(model=folder, max_length=16), 2)
    torch.manual_seed(7)
    assert torch.equal(model.head.weight, nn.Linear(WIDTH, 2).weight)
    assert "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"eos_token": "[EOS]", "unk_token": "[UNK]"}, "[EOS]"),
        ({"unk_token": "[UNK]"}, "[UNK]"),
        ({"mask_token": "[PAD]"}, "[PAD]"),
    ],
)
def test_a_missing_pad_token_is_replaced_and_sides_are_set(
    save: Save, special: dict[str, str], pad: str
) -> None:
    tokenizer = _tokenizer(**special)
    tokenizer.padding_side = "left"
    folder = save("BertModel", _bert(), tokenizer)
    _, loaded = load_model(AssessConfig(model=folder, max_length=16), 2)
    assert loaded.pad_token == pad
    assert loaded.padding_side == "right"


def test_default_targets_that_are_not_there_name_what_is(save: Save) -> None:
    folder = save("MambaForCausalLM", tf.MambaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, num_hidden_layers=1, state_size=4
    ))  # fmt: skip
    model, _ = load_model(AssessConfig(model=folder, task="causal-lm", max_length=16), 0)
    with pytest.raises(NoTargetError, match="dt_proj, in_proj, lm_head, out_proj, x_proj"):
        adapt(model, 2, seed=0)


_FNET = tf.FNetConfig(**{k: v for k, v in _SIZES.items() if k != "num_attention_heads"})
_VIT = tf.ViTConfig(
    hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)


@pytest.mark.parametrize(
    ("kind", "settings", "task", "error", "match"),
    [
        ("ViTModel", _VIT, "classification", UnsupportedLayerError, "no embedding of tokens"),
        ("FNetModel", _FNET, "classification", UnsupportedLayerError, "depend on the padding"),
        ("BertForMaskedLM", _bert(), "causal-lm", UnsupportedLayerError, "looks at later tokens"),
        ("T5Model", _T5, "causal-lm", DataError, "no such model for task='causal-lm'; try the"),
        ("BertModel", _bert(), "causal-lm", DataError, "lack 6 tensors of .*drawn at random"),
        ("BartForCausalLM", _BART, "classification", DataError, "lack 35 tensors of BartModel"),
        ("BertModel", _bert(vocab_size=9), "classification", DataError, "up to 16, but .* only 9"),
        (
            "BertModel",
            _bert(max_position_embeddings=12),
            "classification",
            ValueError,
            "max_length=16 is more than .* runs on; its config states 12 positions",
        ),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_loaded(
    save: Save,
    kind: str,
    settings: tf.PretrainedConfig,
    task: Any,
    error: type[Exception],
    match: str,
) -> None:
    folder = save(kind, settings)
    with pytest.raises(error, match=match):
        load_model(AssessConfig(model=folder, task=task, max_length=16), 2)


@pytest.mark.parametrize("harmful", [True, False])
def test_pickled_weights_are_refused(save: Save, harmful: bool) -> None:
    """Such a file can run code when it is read; one of these would, and must not."""
    folder = Path(save("BertModel", _bert()))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "ran",)

    torch.save({**weights, "trap": Trap()} if harmful else weights, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"not stored as safetensors.*save_pretrained"):
        load_model(AssessConfig(model=str(folder), max_length=16), 2)
    assert not (folder / "ran").exists()


def test_code_that_comes_with_a_model_is_never_run(save: Save) -> None:
    """And nobody is asked whether it may."""
    folder = Path(save("BertModel", _bert()))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModel": "own.M"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="is never run"):
        load_model(AssessConfig(model=str(folder), max_length=16), 2)
    assert not (folder / "ran").exists()


def _break(folder: Path, how: str) -> None:
    weights, settings = folder / "model.safetensors", folder / "config.json"
    match how:
        case "cut":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "garbage":
            weights.write_bytes(b"\xff" * 1000)
        case "nan":
            tensors = load_file(weights)
            save_file({k: v * torch.nan for k, v in tensors.items()}, weights, {"format": "pt"})
        case "shape":
            text = settings.read_text().replace('"hidden_size": 16', '"hidden_size": 18')
            settings.write_text(text)
        case "type":
            text = settings.read_text().replace('"hidden_size": 16', '"hidden_size": "x"')
            settings.write_text(text)
        case "json":
            settings.write_text("{")
        case "list":
            settings.write_text("[]")
        case "no config":
            settings.unlink()
        case "no tokenizer":
            for file in folder.glob("token*"):
                file.unlink()
        case _:
            (folder / "tokenizer.json").write_text('{"model": 3}')


@pytest.mark.parametrize(
    "how",
    ["cut", "garbage", "nan", "shape", "type", "json", "list", "no config", "no tokenizer", "tok"],
)
def test_a_damaged_folder_is_named(save: Save, how: str) -> None:
    """Whatever transformers, tokenizers or safetensors raise, it is one of our errors."""
    folder = Path(save("BertModel", _bert()))
    _break(folder, how)
    error = UnsupportedLayerError if how == "nan" else (DataError, MissingPackageError)
    with pytest.raises(error, match="model"):
        load_model(AssessConfig(model=str(folder), max_length=16), 2)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("a/b/c", "no folder 'a/b/c'"),
        ("./near", "no folder './near'"),
        ("~/near", "no folder '~/near'"),
        (__file__, "is a file; give the folder"),
    ],
)
def test_a_path_is_not_taken_for_a_hub_id(name: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        load_model(AssessConfig(model=name), 2)


_OFFLINE = """
import socket

def refuse(*_, **__):
    raise SystemExit("the network was tried")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.models import load_model
from lora_privacy.errors import DataError

for task in ("classification", "causal-lm"):
    try:
        load_model(AssessConfig(model="someone/no-such-model", task=task), 2)
    except DataError as error:
        assert "HF_HUB_OFFLINE" in str(error), error
        print("named")
"""


def test_a_hub_id_offline_tries_no_network(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _OFFLINE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["named", "named"], done.stderr


def test_a_new_revision_on_the_hub_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of the hub, as huggingface_hub lays it out, with two commits of one model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = AssessConfig(model="some/model")
    assert model_digest(config) == "some/model@None"
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    seen = []
    for commit in ("a" * 40, "b" * 40):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
        (folder / "refs" / "main").write_text(commit)
        seen.append(model_digest(config))
    assert seen == [f"some/model@{'a' * 40}", f"some/model@{'b' * 40}"]
