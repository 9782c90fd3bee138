"""Shapes of a model's linear layers, from its config alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lora_privacy import _validate
from lora_privacy.errors import DataError, UnsupportedLayerError

__all__ = ["LayerShape", "model_shapes"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Linear maps of one kind in a model's blocks.

    Attributes:
        name: Module name below the base model, ``*`` for the number of the block.
        in_features: m, the input size.
        out_features: n, the output size, the number of rows of the gradient.
        count: How many blocks have it.
    """

    name: str
    in_features: int
    out_features: int
    count: int


def model_shapes(config: Mapping[str, Any] | str | Path) -> tuple[LayerShape, ...]:
    """Shapes of the linear maps in a model's blocks, from its config; no weights are read.

    Embeddings, poolers and output heads are left out.

    Args:
        config: Content of a transformers ``config.json``, or a path to one, or to its folder.

    Raises:
        UnsupportedLayerError: The model type is not known here; the message lists those that are.
        ValueError: The config lacks a size, or a size is no positive integer.
        DataError: The file is missing or is no JSON object.
    """
    values = config if isinstance(config, Mapping) else _read(Path(config))
    kind = values.get("model_type")
    if kind not in _FAMILIES:
        raise UnsupportedLayerError(
            f"model_type {kind!r} is not known here; known: {', '.join(sorted(_FAMILIES))}. "
            "Pass a list of LayerShape to laws_table for other models."
        )
    if values.get("add_cross_attention"):
        raise UnsupportedLayerError(
            f"a {kind} with add_cross_attention is not known here. Pass a list of LayerShape."
        )
    return tuple(_FAMILIES[kind](_Sizes(values)))


def _read(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no file {path}. Pass the config.json of a model.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no JSON file ({error}). Pass a model's config.json.") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object. Pass the config.json of a model.")
    return cast("dict[str, Any]", values)


class _Sizes:
    """Sizes of a config; a missing one raises instead of taking some version's default."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __call__(self, name: str, default: int | None = None) -> int:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"the config must hold {name!r}, which sets a layer's size; add it.")
        return _validate.integer(name, value, 1)

    def per_head(self, heads: str, width: int) -> int:
        """Size of a head: ``width`` over the number of heads, which must divide it."""
        size, rest = divmod(width, self(heads))
        if rest:
            raise ValueError(f"{heads} must divide the width {width}, got {self(heads)}.")
        return size

    def text(self, name: str) -> str:
        return str(self._values.get(name) or "")


def _stack(prefix: str, count: int, layers: Mapping[str, tuple[int, int]]) -> Iterable[LayerShape]:
    return [LayerShape(f"{prefix}.*.{name}", m, n, count) for name, (m, n) in layers.items()]


def _attention(size: _Sizes, *, stated: bool) -> tuple[int, int, int]:
    """Width of the model, of all query heads, and of all key heads (grouped-query attention).

    With ``stated``, sizes whose default is a constant of the model type must be in the config.
    """
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    head = size("head_dim") if stated else size("head_dim", size.per_head(_HEADS, hidden))
    groups = size("num_key_value_heads", None if stated else heads)
    return hidden, heads * head, groups * head


def _llama(size: _Sizes, *, stated_head: bool = False) -> Iterable[LayerShape]:
    hidden, query, key = _attention(size, stated=stated_head)
    inner = size("intermediate_size")
    layers = {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, key),
        "self_attn.v_proj": (hidden, key),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return _stack("layers", size("num_hidden_layers"), layers)


def _mistral(size: _Sizes) -> Iterable[LayerShape]:
    size("num_key_value_heads")  # defaults to a constant of the model type, not to all heads
    return _llama(size)


def _gemma(size: _Sizes) -> Iterable[LayerShape]:
    return _llama(size, stated_head=True)


def _phi3(size: _Sizes) -> Iterable[LayerShape]:
    hidden, query, key = _attention(size, stated=False)
    inner = size("intermediate_size")
    layers = {
        "self_attn.qkv_proj": (hidden, query + 2 * key),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_up_proj": (hidden, 2 * inner),
        "mlp.down_proj": (inner, hidden),
    }
    return _stack("layers", size("num_hidden_layers"), layers)


def _bert(size: _Sizes) -> Iterable[LayerShape]:
    hidden, inner = size("hidden_size"), size("intermediate_size")
    size.per_head(_HEADS, hidden)
    layers = {f"attention.self.{name}": (hidden, hidden) for name in ("query", "key", "value")}
    layers |= {
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (hidden, inner),
        "output.dense": (inner, hidden),
    }
    return _stack("encoder.layer", size("num_hidden_layers"), layers)


def _distilbert(size: _Sizes) -> Iterable[LayerShape]:
    hidden, inner = size("dim"), size("hidden_dim")
    size.per_head("n_heads", hidden)
    layers = {f"attention.{name}_lin": (hidden, hidden) for name in ("q", "k", "v", "out")}
    layers |= {"ffn.lin1": (hidden, inner), "ffn.lin2": (inner, hidden)}
    return _stack("transformer.layer", size("n_layers"), layers)


def _gpt2(size: _Sizes) -> Iterable[LayerShape]:
    hidden = size("n_embd")
    inner = size("n_inner", 4 * hidden)
    layers = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    return _stack("h", size("n_layer"), layers)


def _gpt_neox(size: _Sizes) -> Iterable[LayerShape]:
    hidden, inner = size("hidden_size"), size("intermediate_size")
    layers = {
        "attention.query_key_value": (hidden, 3 * hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (hidden, inner),
        "mlp.dense_4h_to_h": (inner, hidden),
    }
    return _stack("layers", size("num_hidden_layers"), layers)


def _opt(size: _Sizes) -> Iterable[LayerShape]:
    hidden, inner = size("hidden_size"), size("ffn_dim")
    layers = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("k", "v", "q", "out")}
    layers |= {"fc1": (hidden, inner), "fc2": (inner, hidden)}
    return _stack("decoder.layers", size("num_hidden_layers"), layers)


def _t5(size: _Sizes) -> Iterable[LayerShape]:
    hidden, inner = size("d_model"), size("d_ff")
    query = size("d_kv") * size("num_heads")
    gated = size.text("feed_forward_proj").startswith("gated-")

    def attention(name: str) -> dict[str, tuple[int, int]]:
        inward = {f"{name}.{part}": (hidden, query) for part in ("q", "k", "v")}
        return inward | {f"{name}.o": (query, hidden)}

    def feed_forward(name: str) -> dict[str, tuple[int, int]]:
        ways = ("wi_0", "wi_1") if gated else ("wi",)
        return {f"{name}.{w}": (hidden, inner) for w in ways} | {f"{name}.wo": (inner, hidden)}

    encoder = attention("layer.0.SelfAttention") | feed_forward("layer.1.DenseReluDense")
    decoder = attention("layer.0.SelfAttention") | attention("layer.1.EncDecAttention")
    decoder |= feed_forward("layer.2.DenseReluDense")
    depth = size("num_layers")
    return [
        *_stack("encoder.block", depth, encoder),
        *_stack("decoder.block", size("num_decoder_layers", depth), decoder),
    ]


_HEADS = "num_attention_heads"
_FAMILIES: dict[str, Callable[[_Sizes], Iterable[LayerShape]]] = {
    "bert": _bert,
    "distilbert": _distilbert,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _mistral,
    "qwen3": _gemma,
    "roberta": _bert,
    "t5": _t5,
}
