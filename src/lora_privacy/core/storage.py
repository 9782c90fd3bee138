"""Saving trained adapters: LoRA in peft's format, FLoRA as factors and seeds or as weights.

Tensors go to safetensors, the rest to JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_privacy.core.adapter import adapters, refuse_adapted
from lora_privacy.core.flora import FLoRALinear, check_dense
from lora_privacy.core.flora_steps import flora_layers
from lora_privacy.core.lora import LoRALinear, dense_shape, is_conv1d, thin_linear
from lora_privacy.core.projection import RandomProjection
from lora_privacy.errors import (
    LoraPrivacyError,
    NonFiniteError,
    StorageError,
    UnsupportedLayerError,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["load_flora", "save_flora", "save_peft"]

_PEFT_WEIGHTS = "adapter_model.safetensors"
_FLORA_WEIGHTS = "flora_model.safetensors"
_FLORA_CONFIG = "flora_config.json"
_FORMAT = "lora-privacy FLoRA"
_VERSION = 1
# Replayed folds differ from the trained weight by float32 rounding; another base, or the same
# one in another precision, differs by far more.
_SKETCH_RTOL = 1e-5


def save_peft(model: nn.Module, folder: str | Path) -> Path:
    """Save the LoRA or LoRA-FA adapters of ``model`` in peft's format.

    ``PeftModel.from_pretrained(base_model, folder)`` then gives the same outputs. Modules with
    trained parameters beside the adapters, such as a head, are saved whole, as peft's
    ``modules_to_save``. peft has no name for our laws of A, so the file says
    ``init_lora_weights=False``, and ``adapters`` reads the law of a model loaded from it as
    unknown.

    Args:
        model: Adapted by ``adapt`` with one rank and one scaling; wrappers of Opacus and of
            torch's data parallelism are looked through.
        folder: Made if absent; ``adapter_config.json`` and ``adapter_model.safetensors`` in it
            are replaced.

    Returns:
        ``folder``.

    Raises:
        LoraPrivacyError: The adapters are not LoRA layers of this library.
        UnsupportedLayerError: peft's format cannot hold what was trained.
        NonFiniteError: A weight holds NaN or infinity; nothing is written.
    """
    model = _unwrap(model)
    layers: dict[str, LoRALinear] = {}
    for name, adapter in adapters(model).items():
        if not isinstance(adapter.layer, LoRALinear):
            use = "save_flora" if adapter.kind == "flora" else "peft's own save_pretrained"
            raise LoraPrivacyError(f"{name!r} is a {adapter.kind} adapter; use {use}.")
        layers[name] = adapter.layer
    shapes = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(shapes) > 1:
        raise UnsupportedLayerError(
            f"All adapters must share one rank and alpha to be saved, got {sorted(shapes)}."
        )
    prefix = "base_model.model."
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = layer.project.weight
        tensors[f"{prefix}{name}.lora_B.weight"] = layer.expand.weight
    whole = _trained_modules(model, set(layers))
    for name in _wrapped_by_peft(model, whole, set(layers)):
        state = model.get_submodule(name).state_dict()
        tensors.update({f"{prefix}{name}.{key}": value for key, value in state.items()})
    folder = Path(folder)
    _write_tensors(tensors, folder / _PEFT_WEIGHTS)
    _peft_config(model, layers, whole).save_pretrained(str(folder))
    return folder


def save_flora(model: nn.Module, folder: str | Path) -> Path:
    """Save what FLoRA trained: each layer as factors and seeds or as its weight, if smaller.

    Factors are known when every move of the weight was a ``fold`` (``sgd_step``,
    ``FLoRAMomentum``) and few enough; after a dense optimiser the weight is stored. With
    factors goes a sketch of the trained weight, against which ``load_flora`` checks the base.
    Other trained parameters, such as a head, are stored as they are, and so are the biases of
    FLoRA layers: that of a new head is frozen where it was drawn. A half-precision layer is stored
    as it runs; its float32 master is for the state dict of a run to be resumed.

    Args:
        model: Adapted with ``method="flora"``.
        folder: Made if absent; ``flora_config.json`` and ``flora_model.safetensors`` in it are
            replaced.

    Returns:
        ``folder``.

    Raises:
        LoraPrivacyError: The model has no FLoRA layer.
        NonFiniteError: A weight holds NaN or infinity; nothing is written.
    """
    model = _unwrap(model)
    layers = flora_layers(model)
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        projection, factors = layer.projection, layer.factors()
        entry: dict[str, Any] = {
            "rank": layer.rank,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "alpha": layer.alpha,
            "resample_every": layer.resample_every,
            "cycle": layer.cycle,
            "law": projection.law,
            "seed": projection.seed,
            "projection_layer": projection.layer,
        }
        dense = layer.base.weight
        sketch = _sketch(_rows(layer.base, layer.weight))
        if factors is not None and _bytes(*factors.values(), sketch) < _bytes(dense):
            entry["steps"] = list(factors)
            if factors:
                tensors[f"factors.{name}"] = torch.stack(list(factors.values()))
            tensors[f"sketch.{name}"] = sketch
        else:
            tensors[f"weight.{name}"] = dense
        described[name] = entry
    own = {id(p) for layer in layers.values() for p in (layer.weight, layer.expand.weight)}
    biases = {id(layer.bias) for layer in layers.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in biases or (parameter.requires_grad and id(parameter) not in own):
            tensors[f"trained.{_plain_name(name, layers)}"] = parameter
    folder = Path(folder)
    _write_tensors(tensors, folder / _FLORA_WEIGHTS)
    config = {"format": _FORMAT, "version": _VERSION, "layers": described}
    (folder / _FLORA_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def load_flora(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put the weights of ``save_flora`` into a plain model, **in place**, and return it.

    Nothing is changed when an error is raised.

    Args:
        model: The base model that was adapted, unadapted and with its original weights.
        folder: Written by ``save_flora``.

    Returns:
        ``model``, without adapters, with the trained weights (to float32 rounding where they
        were stored as factors), in its own types.

    Raises:
        AlreadyAdaptedError: ``model`` carries adapters.
        StorageError: A file is missing, damaged or foreign, or ``model`` is not the base.
    """
    refuse_adapted(model)
    folder = Path(folder)
    layers = _read_config(folder / _FLORA_CONFIG)
    tensors = _read_tensors(folder / _FLORA_WEIGHTS)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    moved: dict[str, Tensor] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "trained":
            moved[name] = value
        elif kind not in ("weight", "factors", "sketch") or name not in layers:
            raise StorageError(f"{folder / _FLORA_WEIGHTS} holds a foreign tensor {key!r}.")
    for name, entry in layers.items():
        try:
            base = model.get_submodule(name)
            check_dense(base)
        except (AttributeError, UnsupportedLayerError):
            raise StorageError(f"The model has no dense linear map {name!r}.") from None
        try:
            moved[f"{name}.weight"] = _trained_weight(name, base, entry, tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"The entry of {name!r} in {folder} is damaged: {error}") from error
    for name, value in moved.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise StorageError(
                f"The model has no parameter {name!r} of shape {tuple(value.shape)}; load the "
                "model that was adapted."
            )
    with torch.no_grad():
        for name, value in moved.items():
            parameters[name].copy_(value)
    return model


def _trained_weight(
    name: str, base: nn.Module, entry: dict[str, Any], tensors: dict[str, Tensor]
) -> Tensor:
    """The trained weight of one layer, in the layout of the base."""
    if "steps" not in entry:
        return tensors[f"weight.{name}"]
    projection = RandomProjection(
        entry["rank"],
        entry["in_features"],
        entry["law"],
        seed=entry["seed"],
        layer=entry["projection_layer"],
    )
    out_features, steps = entry["out_features"], entry["steps"]
    if dense_shape(base) != (out_features, projection.in_features):
        raise StorageError(f"{name!r} has shape {dense_shape(base)} in the model, not the saved.")
    sketch = tensors[f"sketch.{name}"]
    shape = (len(steps), out_features, projection.rank)
    factors = tensors[f"factors.{name}"] if steps else torch.zeros(shape)
    if factors.shape != shape or sketch.shape != (out_features,):
        raise ValueError(f"shapes must be {shape} and ({out_features},)")
    linear = cast("nn.Linear", base)
    # The type of the master, as FLoRALinear chooses it.
    dtype = thin_linear(1, 1, linear).weight.dtype
    weight = _rows(base, linear.weight).to("cpu", dtype, copy=True)
    for factor, step in zip(factors, steps, strict=True):
        weight += factor.to(dtype) @ projection.matrix(step, dtype)
    gap = (_sketch(weight) - sketch).abs()
    if not bool((gap <= _SKETCH_RTOL * weight.double().norm(dim=1)).all()):
        raise StorageError(
            f"The factors of {name!r} were folded into other weights than this model's; load "
            "the same base model, in the same precision."
        )
    return weight.T if is_conv1d(base) else weight


def _sketch(weight: Tensor) -> Tensor:
    """One random number a row, (out_features,) in float64: equal weights have equal ones."""
    probe = RandomProjection(1, weight.shape[1], "rademacher", seed=0, layer="sketch")
    return weight.detach().to("cpu", torch.float64) @ probe.matrix(0, torch.float64)[0]


def _rows(base: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` as (out_features, in_features)."""
    weight = weight.detach()
    return weight.T if is_conv1d(base) else weight


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _trained_modules(model: nn.Module, layers: set[str]) -> list[str]:
    """Modules that own trained parameters beside the adapters."""
    owners: list[str] = []
    paths: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    for path, parameter in model.named_parameters():
        owner = path.rpartition(".")[0]
        layer = owner.removesuffix(".project").removesuffix(".expand")
        if not parameter.requires_grad or layer in layers:
            continue
        holds = not owner or any(f"{name}.".startswith(f"{owner}.") for name in layers)
        inside = any(owner.startswith(f"{name}.") for name in layers)
        if holds or inside or len(paths[id(parameter)]) > 1:
            raise UnsupportedLayerError(
                f"peft's format cannot hold the trained parameter {path!r}: it is shared, or "
                "belongs to an adapted layer or to a module around one. Freeze it."
            )
        if owner not in owners:
            owners.append(owner)
    return owners


def _wrapped_by_peft(model: nn.Module, whole: list[str], layers: set[str]) -> list[str]:
    """Modules that peft takes for ``whole``: it matches endings without regard to dots.

    It then wants the weights of all of them: for DistilBERT's ``classifier`` those of
    ``pre_classifier`` too.
    """
    found = [name for name, _ in model.named_modules() if name.endswith(tuple(whole))]
    clash = [n for n in found if any(f"{layer}.".startswith(f"{n}.") for layer in layers)]
    if clash:
        raise UnsupportedLayerError(
            f"peft would take the adapted {clash[0]!r} for one of the trained modules "
            f"({', '.join(whole)}), whose names end alike; freeze those."
        )
    return found


def _peft_config(model: nn.Module, layers: dict[str, LoRALinear], whole: list[str]) -> Any:  # noqa: ANN401 - a type of peft
    from peft import LoraConfig

    layer = next(iter(layers.values()))
    names = [name for name, _ in model.named_modules() if name]
    tails = sorted({name.rpartition(".")[2] for name in layers})
    matched = {n for n in names if any(n == t or n.endswith("." + t) for t in tails)}
    # Short names, as other tools expect them, where they mean the same layers.
    pattern = "|".join(re.escape(name) for name in layers)
    config = LoraConfig(
        r=layer.rank,
        lora_alpha=cast(
            "int", int(layer.alpha) if layer.alpha == int(layer.alpha) else layer.alpha
        ),
        target_modules=tails if matched == set(layers) else pattern,
        modules_to_save=whole or None,
        init_lora_weights=False,
        fan_in_fan_out=all(is_conv1d(layer.base) for layer in layers.values()),
        inference_mode=True,
        base_model_name_or_path=getattr(getattr(model, "config", None), "name_or_path", None)
        or None,
    )
    config.auto_mapping = {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
    }
    return config


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside Opacus' and torch's wrappers."""
    wrappers = ("opacus.", "torch.nn.parallel.", "torch._dynamo.")
    while type(model).__module__.startswith(wrappers):
        inner = next((c for c in model.children()), None)
        if inner is None:
            break
        model = inner
    return model


def _plain_name(path: str, layers: dict[str, FLoRALinear]) -> str:
    """Path of a parameter in the unadapted model."""
    for name in layers:
        if path.startswith(f"{name}.base."):
            return f"{name}.{path.removeprefix(f'{name}.base.')}"
    return path


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{name!r} holds NaN or infinity; nothing was written.")
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    temporary = path.with_name(f"{path.name}.part")
    try:
        save_file(ready, str(temporary), metadata={"format": "pt"})
        temporary.replace(path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written, and is as it was: {error}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(str(path))
    except FileNotFoundError:
        raise StorageError(f"{path} is missing; name a folder written by save_flora.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path} is no readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise StorageError(f"{name!r} in {path} holds NaN or infinity.")
    return tensors


def _read_config(path: Path) -> dict[str, dict[str, Any]]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{path} is missing; name a folder written by save_flora.") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise StorageError(f"{path} was not written by save_flora.")
    if config.get("version") != _VERSION:
        raise StorageError(
            f"{path} has version {config.get('version')!r}, this release reads {_VERSION}."
        )
    layers = config.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(e, dict) for e in layers.values()):
        raise StorageError(f"{path} lists no layers.")
    return layers
