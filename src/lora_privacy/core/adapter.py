"""Putting adapters into a model, and listing the adapters of one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from torch import nn

from lora_privacy import _validate
from lora_privacy.core.flora import FLoRALinear, check_dense
from lora_privacy.core.lora import LoRALinear, check_base, dense_shape
from lora_privacy.core.peft import (
    active_adapter,
    is_peft_layer,
    is_peft_module,
    peft_config,
    peft_law,
)
from lora_privacy.core.projection import RandomProjection
from lora_privacy.errors import AlreadyAdaptedError, NoTargetError, UnsupportedLayerError

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

    from lora_privacy.laws import EntryLaw, LawName

__all__ = [
    "DEFAULT_TARGETS",
    "Adapter",
    "AdapterKind",
    "MethodName",
    "adapt",
    "adapters",
    "find_targets",
    "unfreeze",
]

MethodName = Literal["lora", "lora-fa", "flora"]
AdapterKind = Literal["lora", "lora-fa", "flora", "peft"]

DEFAULT_TARGETS = (
    "query",
    "value",
    "q_proj",
    "v_proj",
    "c_attn",
    "q_lin",
    "v_lin",
    "q",
    "v",
    "query_proj",
    "value_proj",
    "query_key_value",
    "qkv_proj",
    "Wqkv",
)
"""Names of query and value projections, or of maps that hold them, in common models."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """One adapted layer of a model: ``y = (W + scaling · B A) x``.

    Attributes:
        name: Path of the layer in the model.
        layer: The adapted module; its input is x and its output y.
        kind: Who made it and how it is trained.
        in_features: Length of x, columns of A.
        out_features: Length of y, rows of B.
        rank: Rows of A.
        scaling: s, the factor of B A, as the layer has it (alpha/rank, or alpha/√rank).
        law: Law of an entry of A *at initialisation*: training moves A away from it (but not
            for ``"lora-fa"`` and ``"flora"``). ``"unknown"`` for initialisations that depend on
            weights or data.
        law_reason: Where ``law`` is known from, or why it is not.
        adapter_name: Name of the adapter inside a peft layer; None for ours.
    """

    name: str
    layer: nn.Module
    kind: AdapterKind
    in_features: int
    out_features: int
    rank: int
    scaling: float
    law: EntryLaw
    law_reason: str
    adapter_name: str | None = None

    def a(self) -> Tensor:
        """The current A (rank, in_features), not a copy."""
        if isinstance(self.layer, FLoRALinear):
            return self.layer.a()
        if isinstance(self.layer, LoRALinear):
            return self.layer.project.weight.detach()
        return cast("Any", self.layer).lora_A[self.adapter_name].weight.detach()

    def b(self) -> Tensor:
        """The current B (out_features, rank), not a copy; always 0 for ``"flora"``."""
        if isinstance(self.layer, FLoRALinear | LoRALinear):
            return self.layer.expand.weight.detach()
        return cast("Any", self.layer).lora_B[self.adapter_name].weight.detach()


def adapt(
    model: nn.Module,
    rank: int,
    *,
    method: MethodName = "lora",
    targets: Sequence[str] | str | None = None,
    alpha: float | None = None,
    law: LawName = "gaussian",
    seed: int,
    layers: Sequence[int] | None = None,
    trainable: Sequence[str] = (),
    resample_every: int = 1,
) -> nn.Module:
    """Put an adapter on every target layer, **in place**, and return the same model.

    All other parameters are frozen, a classification head too unless ``trainable`` names it.
    Nothing is changed when an error is raised.

    Args:
        model: Any module that holds ``nn.Linear`` or transformers' Conv1D layers.
        rank: Rows of every A, at least 1.
        method: ``"lora"`` trains A and B, ``"lora-fa"`` B only, ``"flora"`` the dense weight
            through compressed gradients (see ``FLoRALinear`` for its training loop).
        targets: Names that end a module's path, such as ``("query", "value")``; or a regular
            expression that matches whole paths; or None for ``DEFAULT_TARGETS``.
        alpha: Numerator of the scaling s = alpha/rank; None for s = 1.
        law: Law of A; all have variance 1/rank, so that E AᵀA = I.
        seed: Seed of every A, at least 0; layers are told apart by their path.
        layers: Blocks to adapt, counted by the first number in a path; negative ones count
            from the last block. None for all.
        trainable: Names that end the path of modules to train in full beside the adapters, such
            as ``("classifier",)``.
        resample_every: For ``"flora"``: cycles that share one A.

    Returns:
        ``model``.

    Raises:
        ValueError: An argument is out of range, or a trainable module holds a target.
        AlreadyAdaptedError: The model carries adapters, ours or peft's.
        NoTargetError: Nothing matches ``targets``, ``layers`` or ``trainable``.
        UnsupportedLayerError: A target is no linear map, or its weight is shared.
    """
    _validate.choice("method", method, get_args(MethodName))
    rank = _validate.integer("rank", rank, 1)
    alpha = float(rank) if alpha is None else alpha
    if method != "flora" and resample_every != 1:
        raise ValueError(f"resample_every is for method='flora', got method={method!r}.")
    _validate.integer("resample_every", resample_every, 1)
    found = find_targets(model, targets, layers)
    full = _check_trainable(model, trainable, found)
    projections: dict[str, RandomProjection] = {}
    for name, base in found.items():
        in_features = dense_shape(base)[1]
        projections[name] = RandomProjection(rank, in_features, law, seed=seed, layer=name)
        check_base(base, rank, alpha, projections[name])
        if method == "flora":
            check_dense(base)

    model.requires_grad_(False)
    for name, base in found.items():
        layer = (
            FLoRALinear(base, rank, alpha, projections[name], resample_every)
            if method == "flora"
            else LoRALinear(base, rank, alpha, projections[name], train_a=method == "lora")
        )
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    for name in full:
        model.get_submodule(name).requires_grad_(True)
    return model


def unfreeze(
    model: nn.Module,
    *,
    targets: Sequence[str] | str | None = None,
    layers: Sequence[int] | None = None,
    trainable: Sequence[str] = (),
) -> nn.Module:
    """Train the targets' own weights, **in place**: what ``adapt`` is to be compared with.

    Biases and all other parameters are frozen, but for the modules that ``trainable`` names.

    Args:
        model: As for ``adapt``, and so are all other arguments and the errors.
        targets: Whose weights train.
        layers: In which blocks.
        trainable: Modules to train in full beside them.
    """
    found = find_targets(model, targets, layers)
    full = _check_trainable(model, trainable, found)
    model.requires_grad_(False)
    for module in found.values():
        module.weight.requires_grad_(True)
    for name in full:
        model.get_submodule(name).requires_grad_(True)
    return model


def find_targets(
    model: nn.Module,
    targets: Sequence[str] | str | None = None,
    layers: Sequence[int] | None = None,
) -> dict[str, nn.Module]:
    """Path -> module that ``adapt`` would put an adapter on; its arguments and errors."""
    refuse_adapted(model)
    return _select(_find_targets(model, targets), layers)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Path -> adapter, of a model adapted by ``adapt``, by hand, or by peft.

    Of peft layers with several adapters the active one is read; layers without an active one
    are left out.

    Raises:
        NoTargetError: The model carries no adapter.
        UnsupportedLayerError: A peft layer is not plain LoRA on a linear map, or has several
            active adapters.
    """
    found: dict[str, Adapter] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | FLoRALinear):
            found[name] = _own_adapter(name, module)
        elif is_peft_layer(module):
            adapter = active_adapter(name, module)
            if adapter is not None:
                found[name] = _peft_adapter(model, name, module, adapter)
    if not found:
        raise NoTargetError("The model carries no adapter; call adapt(model, …) or use peft.")
    return found


def _own_adapter(name: str, layer: LoRALinear | FLoRALinear) -> Adapter:
    kind: AdapterKind = "flora"
    reason = "drawn from its seed, a matrix a cycle"
    if isinstance(layer, LoRALinear):
        kind = "lora" if layer.train_a else "lora-fa"
        reason = "drawn from its seed" + (", at initialisation" if layer.train_a else "")
    return Adapter(
        name=name,
        layer=layer,
        kind=kind,
        in_features=layer.in_features,
        out_features=layer.out_features,
        rank=layer.rank,
        scaling=layer.scaling,
        law=layer.projection.entry_law,
        law_reason=reason,
    )


def _peft_adapter(model: nn.Module, name: str, module: nn.Module, adapter: str) -> Adapter:
    layer = cast("Any", module)
    out_features, in_features = dense_shape(layer.get_base_layer())
    rank = layer.lora_A[adapter].weight.shape[0]
    law, reason = peft_law(peft_config(model, adapter), rank, in_features)
    return Adapter(
        name=name,
        layer=module,
        kind="peft",
        in_features=in_features,
        out_features=out_features,
        rank=rank,
        scaling=float(layer.scaling[adapter]),
        law=law,
        law_reason=reason,
        adapter_name=adapter,
    )


def refuse_adapted(model: nn.Module) -> None:
    """Raise AlreadyAdaptedError when ``model`` carries adapters, ours or peft's."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear | FLoRALinear) or is_peft_module(module):
            raise AlreadyAdaptedError(
                f"The model carries adapters already (module {name!r}, "
                f"{type(module).__name__}); load a fresh model."
            )


def _find_targets(model: nn.Module, targets: Sequence[str] | str | None) -> dict[str, nn.Module]:
    """The modules to adapt, all of a supported kind and with a weight of their own."""
    candidates = {name: m for name, m in model.named_modules() if name and _is_linear(m)}
    names = _matching(model, DEFAULT_TARGETS if targets is None else targets)
    if targets is None:
        names = [name for name in names if name in candidates]
    if not names:
        tails = sorted({name.rpartition(".")[2] for name in candidates})
        raise NoTargetError(
            f"No module matches targets={targets!r}. Linear maps of this model end in: "
            f"{', '.join(tails) or '(there are none)'}."
        )
    owners = defaultdict(list)
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(path)
    modules = {name: model.get_submodule(name) for name in names}
    for name, module in modules.items():
        _check_target(model, name, module)
        shared = owners[id(module.weight)]
        if len(shared) > 1:
            raise UnsupportedLayerError(
                f"The weight of {name!r} is shared ({', '.join(shared)}): adapting one use "
                "would change or miss the others. Name other targets."
            )
    return modules


def _check_target(model: nn.Module, name: str, module: nn.Module) -> None:
    try:
        dense_shape(module)
    except UnsupportedLayerError as error:
        raise UnsupportedLayerError(f"{name!r}: {error}") from None
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fast path in evaluation reads the weights and never calls the layers.
        raise UnsupportedLayerError(
            f"{name!r} belongs to torch's TransformerEncoderLayer, which does not always call "
            "it: an adapter there would be skipped without a word."
        )


def _is_linear(module: nn.Module) -> bool:
    try:
        dense_shape(module)
    except UnsupportedLayerError:
        return False
    return True


def _matching(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    if any(not isinstance(target, str) or not target for target in targets):
        raise TypeError(f"targets must be names, or one regular expression, got {targets!r}.")
    return [n for n in names if any(n == t or n.endswith("." + t) for t in targets)]


def _select(found: dict[str, nn.Module], layers: Sequence[int] | None) -> dict[str, nn.Module]:
    """Keep the modules of the blocks asked for."""
    if layers is None:
        return found
    block = {
        name: next((int(part) for part in name.split(".") if part.isdecimal()), None)
        for name in found
    }
    known = sorted({number for number in block.values() if number is not None})
    count = known[-1] + 1 if known else 0
    wanted: set[int] = set()
    for layer in layers:
        number = _validate.integer("layers", layer, -count)
        number = number + count if number < 0 else number
        if number not in known:
            raise NoTargetError(f"No target lies in block {layer}; blocks with targets: {known}.")
        wanted.add(number)
    if not wanted:
        raise ValueError("layers must name at least one block; None stands for all.")
    return {name: module for name, module in found.items() if block[name] in wanted}


def _check_trainable(
    model: nn.Module, trainable: Sequence[str], found: dict[str, nn.Module]
) -> list[str]:
    """Paths of the modules to train in full: each name matches, and none touches a target."""
    if isinstance(trainable, str):
        raise TypeError(f"trainable must be a sequence of names, got {trainable!r}.")
    full: list[str] = []
    for pattern in trainable:
        names = _matching(model, (pattern,))
        if not names:
            raise NoTargetError(f"No module matches trainable={pattern!r}.")
        full += names
    for name in full:
        for target in found:
            if f"{target}.".startswith(f"{name}."):
                raise ValueError(
                    f"trainable module {name!r} holds the target {target!r}, whose base must "
                    "stay frozen; name another module."
                )
    return full
