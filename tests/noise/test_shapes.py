"""Shapes from a config against transformers' own models, and the table of laws."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lora_privacy.errors import DataError, UnsupportedLayerError
from lora_privacy.noise import (
    EntryNoise,
    LayerShape,
    jl_distortion,
    joint_tv_to_gaussian,
    kolmogorov_to_gaussian,
    laws_table,
    model_shapes,
    tv_bound,
    tv_to_gaussian,
)

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
}
GROUPED = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "vocab_size": 32,
    "pad_token_id": 0,
}
BERT = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "vocab_size": 32,
}
GPT2 = {"n_embd": 48, "n_head": 6, "n_layer": 3, "vocab_size": 32}
T5 = {"d_model": 48, "d_kv": 5, "d_ff": 80, "num_heads": 6, "num_layers": 3, "vocab_size": 32}
OPT = {
    "hidden_size": 48,
    "ffn_dim": 80,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "vocab_size": 32,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", GROUPED),
    ("llama", GROUPED | {"head_dim": 10, "num_key_value_heads": 3}),
    ("mistral", GROUPED),
    ("qwen2", GROUPED),
    ("qwen3", GROUPED | {"head_dim": 10}),
    ("gemma", GROUPED | {"head_dim": 10}),
    ("gemma2", GROUPED | {"head_dim": 10}),
    ("phi3", GROUPED),
    ("bert", BERT),
    ("roberta", BERT),
    ("distilbert", {"dim": 48, "hidden_dim": 80, "n_heads": 6, "n_layers": 3, "vocab_size": 32}),
    ("gpt2", GPT2),
    ("gpt2", GPT2 | {"n_inner": 50}),
    ("gpt_neox", BERT),
    ("opt", OPT),
    ("opt", OPT | {"word_embed_proj_dim": 20}),
    ("t5", T5),
    ("t5", T5 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 2}),
]


@pytest.mark.parametrize(("kind", "sizes"), MODELS)
def test_shapes_are_those_of_transformers(kind: str, sizes: dict[str, Any]) -> None:
    """Oracle: the linear maps inside the blocks of the model itself, on the meta device."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    config = transformers.AutoConfig.for_model(kind, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    expected: Counter[tuple[str, int, int]] = Counter()
    for name, module in model.named_modules():
        # The first number in a name is the block's; T5 has a second one inside.
        pattern, blocks = re.subn(r"\.\d+\.", ".*.", name, count=1)
        if blocks and isinstance(module, torch.nn.Linear):
            expected[pattern, module.in_features, module.out_features] += 1
        elif blocks and isinstance(module, Conv1D):
            expected[pattern, module.nx, module.nf] += 1
    shapes = model_shapes({"model_type": kind} | sizes)
    found = Counter({(s.name, s.in_features, s.out_features): s.count for s in shapes})
    assert found == expected
    # A config as transformers writes it must read the same.
    assert model_shapes(json.loads(config.to_json_string())) == shapes


def test_llama_70b() -> None:
    """68.5 billion weights in the blocks of Llama-3-70B, counted by hand."""
    shapes = model_shapes(LLAMA_70B)
    weights = sum(s.in_features * s.out_features * s.count for s in shapes)
    by_hand = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    assert weights == by_hand == 68_451_041_280


@pytest.mark.parametrize(
    ("kind", "sizes", "weights"),
    [
        # Models as published: their blocks' weights without biases and norms, multiplied by hand.
        ("gpt2", {"n_embd": 768, "n_head": 12, "n_layer": 12}, 12 * 12 * 768**2),
        ("gpt2", {"n_embd": 10, "n_inner": 7, "n_layer": 3}, 3 * (4 * 100 + 2 * 70)),
        ("bert", BERT, 3 * (4 * 48 * 48 + 2 * 48 * 80)),
        ("distilbert", {"dim": 6, "hidden_dim": 5, "n_heads": 3, "n_layers": 2}, 2 * (144 + 60)),
        ("gpt_neox", BERT, 3 * (3 * 48 * 48 + 48 * 48 + 2 * 48 * 80)),
        ("opt", OPT, 3 * (4 * 48 * 48 + 2 * 48 * 80)),
        ("t5", T5, 3 * (4 * 48 * 30 + 2 * 48 * 80) + 3 * (8 * 48 * 30 + 2 * 48 * 80)),
        (
            "t5",
            T5 | {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 2},
            3 * (4 * 48 * 30 + 3 * 48 * 80) + 2 * (8 * 48 * 30 + 3 * 48 * 80),
        ),
        ("phi3", GROUPED, 3 * (48 * (48 + 2 * 16) + 48 * 48 + 3 * 48 * 80)),
        ("mistral", GROUPED, 3 * (2 * 48 * 48 + 2 * 48 * 16 + 3 * 48 * 80)),
        ("qwen3", GROUPED | {"head_dim": 10}, 3 * (2 * 48 * 60 + 2 * 48 * 20 + 3 * 48 * 80)),
        ("gemma", GROUPED | {"head_dim": 10}, 3 * (2 * 48 * 60 + 2 * 48 * 20 + 3 * 48 * 80)),
    ],
)
def test_weights_counted_by_hand(kind: str, sizes: dict[str, Any], weights: int) -> None:
    """Attention in and out, and the layers of the feed-forward part, over all blocks."""
    shapes = model_shapes({"model_type": kind} | sizes)
    assert sum(s.in_features * s.out_features * s.count for s in shapes) == weights
    # A stack of one kind maps its width in and out.
    assert all(min(s.in_features, s.out_features, s.count) > 0 for s in shapes)


def test_a_file_or_a_folder_reads_as_its_content(tmp_path: Path) -> None:
    """A path to config.json, or to its folder, as text or Path."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    shapes = model_shapes(LLAMA_70B)
    assert model_shapes(tmp_path) == model_shapes(str(tmp_path / "config.json")) == shapes


def test_bad_configs_are_refused(tmp_path: Path) -> None:
    """Fail closed: unknown type (list the known), missing or impossible sizes, bad files."""
    with pytest.raises(UnsupportedLayerError, match=r"'mamba' is not known.*llama.*t5"):
        model_shapes({"model_type": "mamba"})
    with pytest.raises(UnsupportedLayerError, match="None is not known"):
        model_shapes({})
    with pytest.raises(UnsupportedLayerError, match="add_cross_attention"):
        model_shapes(BERT | {"model_type": "bert", "add_cross_attention": True})
    with pytest.raises(ValueError, match="must hold 'intermediate_size'"):
        model_shapes({k: v for k, v in LLAMA_70B.items() if k != "intermediate_size"})
    for kind in ("mistral", "qwen2"):
        with pytest.raises(ValueError, match="must hold 'num_key_value_heads'"):
            model_shapes(BERT | {"model_type": kind})
    with pytest.raises(ValueError, match="must hold 'head_dim'"):
        model_shapes(GROUPED | {"model_type": "gemma"})
    with pytest.raises(ValueError, match="hidden_size must be at least 1"):
        model_shapes(LLAMA_70B | {"hidden_size": 0})
    with pytest.raises(TypeError, match="hidden_size must be an integer"):
        model_shapes(LLAMA_70B | {"hidden_size": 8192.5})
    with pytest.raises(ValueError, match="num_attention_heads must divide"):
        model_shapes(BERT | {"model_type": "bert", "num_attention_heads": 7})
    with pytest.raises(DataError, match="there is no file"):
        model_shapes(tmp_path)
    for text, message in (("{", "no JSON file"), ("[1]", "no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=message):
            model_shapes(tmp_path)


def test_laws_table_states_each_law() -> None:
    """Every column is the number of the function that owns it, at the average entry."""
    rows = laws_table(model_shapes(LLAMA_70B), 8)
    assert [(row.in_features, row.out_features, row.count) for row in rows] == [
        (8192, 8192, 160),
        (8192, 1024, 160),
        (8192, 28672, 160),
        (28672, 8192, 80),
    ]
    assert rows[1].layers == ("layers.*.self_attn.k_proj", "layers.*.self_attn.v_proj")
    for row in rows:
        law = EntryNoise(8, 1.0, 1 / math.sqrt(row.in_features))
        assert row.rank == 8
        assert row.relative_std == pytest.approx(math.sqrt((1 + 1 / row.in_features) / 8))
        assert row.excess_kurtosis == pytest.approx(6 / 8, rel=1e-3)
        assert row.tv == tv_to_gaussian(law).value < row.tv_bound == tv_bound(law).value
        assert row.kolmogorov == kolmogorov_to_gaussian(law).value < row.tv < row.joint_tv
        assert row.joint_tv == joint_tv_to_gaussian(8, row.in_features).value
        assert row.jl_distortion == jl_distortion(8, 0.05, vectors=row.out_features)
        assert json.loads(json.dumps(row.to_dict()))["layers"] == list(row.layers)


def test_laws_table_refuses_what_is_not_there() -> None:
    """No layers, or a rank or size out of range."""
    with pytest.raises(ValueError, match="at least one layer"):
        laws_table([], 8)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        laws_table(model_shapes(LLAMA_70B), 0)
    with pytest.raises(ValueError, match="in_features must be at least 1"):
        laws_table([LayerShape("x", 0, 3, 1)], 2)
