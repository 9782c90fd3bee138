"""Shapes of a model's linear layers from its config alone, and the laws of their noise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lora_privacy import _notebook, _validate
from lora_privacy._plain import plain_fields
from lora_privacy.errors import DataError, UnsupportedLayerError
from lora_privacy.noise.bounds import tv_bound
from lora_privacy.noise.entry import EntryNoise
from lora_privacy.noise.gaussianity import kolmogorov_to_gaussian, tv_to_gaussian
from lora_privacy.noise.jl import jl_distortion
from lora_privacy.noise.joint import joint_tv_to_gaussian

__all__ = ["JL_FAILURE", "LawsRow", "LawsTable", "LayerShape", "laws_table", "model_shapes"]

#: Failure probability that the distortion in a table is stated at.
JL_FAILURE = 0.05

_KIND = "Laws, not a guarantee"
_NOTE = (
    "For Gaussian A and an entry of average size. tv, kolmogorov and joint_tv are distances to "
    "the Gaussian of the same covariance, 0 to 1. All rows of one gradient keep their norm within "
    f"1 ± jl_distortion but for a probability of {JL_FAILURE:g}. Two rows or more are at distance "
    "1 from independent Gaussian noise at every rank."
)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class LawsRow:
    """Laws of the noise that a Gaussian A injects into gradients of one shape.

    Entry laws are for an entry of average size, q_i² = ‖q‖²/m. Laws and distances, no guarantee.

    Attributes:
        layers: Names of the layers of this shape.
        count: Number of layers of this shape in the model.
        in_features: m.
        out_features: n.
        rank: r.
        relative_std: Standard deviation of an entry over ‖q‖, dimensionless.
        excess_kurtosis: Kurtosis of an entry minus 3.
        tv: Total variation of an entry to the Gaussian of its own variance.
        tv_bound: Proved upper bound on ``tv``.
        kolmogorov: Kolmogorov distance to the same Gaussian.
        joint_tv: Total variation of a whole row to the Gaussian of its own covariance.
        jl_distortion: Least τ at which all n rows keep their norm within 1 ± τ, but for a
            probability of ``JL_FAILURE``; from 1 on the lower side says nothing.
    """

    layers: tuple[str, ...]
    count: int
    in_features: int
    out_features: int
    rank: int
    relative_std: float
    excess_kurtosis: float
    tv: float
    tv_bound: float
    kolmogorov: float
    joint_tv: float
    jl_distortion: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return plain_fields(self)

    def _repr_html_(self) -> str:
        return _notebook.table(_KIND, [self.to_dict()], _NOTE)


class LawsTable(tuple[LawsRow, ...]):
    """Rows of laws: a tuple that a notebook shows as a table."""

    __slots__ = ()

    def to_pandas(self) -> Any:  # noqa: ANN401  (pandas is no dependency)
        """A ``pandas.DataFrame``, a row a shape; MissingPackageError without pandas."""
        return _notebook.frame([row.to_dict() for row in self])

    def _repr_html_(self) -> str:
        return _notebook.table(_KIND, [row.to_dict() for row in self], _NOTE)


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


def laws_table(shapes: Iterable[LayerShape], rank: int) -> LawsTable:
    """State the laws of the noise for every distinct shape, at one rank, for Gaussian A.

    Args:
        shapes: Layers, as :func:`model_shapes` lists them.
        rank: r, at least 1.

    Returns:
        A tuple of one row per distinct (in_features, out_features), in the order of first
        appearance.

    Raises:
        ValueError: The rank or a shape is out of range, or there are no shapes.
        ConvergenceError: A quadrature missed its tolerance.
    """
    rank = _validate.integer("rank", rank, 1)
    groups: dict[tuple[int, int], list[LayerShape]] = {}
    for shape in shapes:
        groups.setdefault((shape.in_features, shape.out_features), []).append(shape)
    if not groups:
        raise ValueError("shapes must name at least one layer, got none.")
    # Layers of one input size share all laws but the distortion.
    laws = {m: _laws(m, rank) for m in dict.fromkeys(m for m, _ in groups)}
    return LawsTable(
        LawsRow(
            layers=tuple(layer.name for layer in layers),
            count=sum(layer.count for layer in layers),
            in_features=m,
            out_features=n,
            rank=rank,
            jl_distortion=jl_distortion(rank, JL_FAILURE, vectors=n),
            **laws[m],
        )
        for (m, n), layers in groups.items()
    )


def _laws(in_features: int, rank: int) -> dict[str, float]:
    m = _validate.integer("in_features", in_features, 1)
    law = EntryNoise(rank, 1.0, 1.0 / math.sqrt(m))
    return {
        "relative_std": law.std(),
        "excess_kurtosis": law.kurtosis() - 3.0,
        "tv": tv_to_gaussian(law).value,
        "tv_bound": tv_bound(law).value,
        "kolmogorov": kolmogorov_to_gaussian(law).value,
        "joint_tv": joint_tv_to_gaussian(rank, m).value,
    }


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
