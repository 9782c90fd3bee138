"""What each private method needs of model and optimizer, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn

from lora_privacy import _validate
from lora_privacy._digest import tensor_digest
from lora_privacy.core import FLoRALinear, LoRALinear, adapters
from lora_privacy.core.peft import is_peft_layer, peft_config
from lora_privacy.dp.attestation import HAAR_LAWS
from lora_privacy.errors import (
    NoTargetError,
    StaleParameterError,
    UnsupportedLayerError,
    UnsupportedTrainingError,
)
from lora_privacy.training.freshness import FreshProjections

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

    from lora_privacy.core import Adapter
    from lora_privacy.training.clipping import ClippingName, Transform

__all__ = [
    "METHODS",
    "Method",
    "check_optimizer",
    "frozen_digest",
    "known_adapters",
    "prepare",
    "refuse_joined_samples",
    "refuse_packing",
]

Method = Literal["dp-lora", "dp-lora-fa", "dp-flora", "dp-sgd"]
METHODS: tuple[Method, ...] = get_args(Method)

# How the names of peft's initialisations begin that look at training data before any noise.
_DATA_READING = ("eva", "corda", "lora_ga", "loraga", "lora-ga")
# Wrappers of torch that exchange gradients between processes or copies of the model.
_PARALLEL = {
    "DataParallel",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
}


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    *,
    transform: Transform | None,
    clipping: ClippingName,
) -> FreshProjections | None:
    """Check that ``method`` fits, freeze what it does not train, **in place**.

    Returns:
        The projections of ``"dp-flora"``; None for the other methods.

    Raises:
        UnsupportedTrainingError: The method does not cover this model or optimizer.
        UnsupportedLayerError: An adapter of peft is not plain LoRA.
        StaleParameterError: The optimizer holds parameters that the model does not have.
    """
    _validate.choice("method", method, METHODS)
    _refuse_wrappers(model, optimizer)
    refuse_joined_samples(model)
    _refuse_target_parameters(model)
    found = known_adapters(model)
    _refuse_initialisations(model, found)
    _refuse_idle(found, method)
    fresh = None
    if method in ("dp-lora", "dp-lora-fa"):
        _prepare_lora(method, found)
    elif method == "dp-flora":
        fresh = _prepare_flora(model, optimizer, found, transform, clipping)
    elif any(adapter.kind == "flora" for adapter in found.values()):
        raise UnsupportedTrainingError(
            "method='dp-sgd' trains dense weights as they are; FLoRA layers are for "
            "method='dp-flora'."
        )
    check_optimizer(model, optimizer)
    return fresh


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """See that the optimizer holds the trained parameters of ``model``.

    Raises:
        StaleParameterError: It holds others, or lacks one.
    """
    own = {id(parameter): path for path, parameter in model.named_parameters()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    foreign = held - set(own)
    if foreign:
        raise StaleParameterError(
            f"{len(foreign)} parameters of the optimizer are not in the model, which was moved, "
            "converted or wrapped after the optimizer was made: training would move copies. Make "
            "the optimizer from model.parameters() last."
        )
    inside = {
        id(layer.expand.weight) for layer in model.modules() if isinstance(layer, FLoRALinear)
    }
    missing = [
        path
        for path, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in held | inside
    ]
    if missing:
        raise StaleParameterError(
            f"The optimizer lacks the trained parameters {', '.join(missing[:5])}: they would be "
            "clipped for and never move. Give them to the optimizer, or freeze them."
        )


def _prepare_lora(method: Method, found: dict[str, Adapter]) -> None:
    if not found or any(adapter.kind == "flora" for adapter in found.values()):
        raise UnsupportedTrainingError(
            f"method={method!r} needs LoRA adapters: adapt(model, rank, method="
            f"'{method.removeprefix('dp-')}', …) or peft.get_peft_model. For a model without "
            "adapters take method='dp-sgd'."
        )
    for name, adapter in found.items():
        a, b = _factors(adapter)
        if not b.requires_grad:
            raise UnsupportedTrainingError(
                f"B of {name!r} is frozen, so that the adapter would not be trained. Load it with "
                "PeftModel.from_pretrained(…, is_trainable=True), or call set_adapter."
            )
        if method == "dp-lora-fa":
            a.requires_grad_(False)
        elif not a.requires_grad:
            raise UnsupportedTrainingError(
                f"A of {name!r} is frozen; method='dp-lora-fa' trains B alone."
            )


def _prepare_flora(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    found: dict[str, Adapter],
    transform: Transform | None,
    clipping: ClippingName,
) -> FreshProjections:
    layers = {n: a.layer for n, a in found.items() if isinstance(a.layer, FLoRALinear)}
    if not layers or len(layers) < len(found):
        raise UnsupportedTrainingError(
            "method='dp-flora' needs adapt(model, rank, method='flora', law='orthonormal', "
            "targets=…), with the head among the targets."
        )
    laws = {layer.projection.law for layer in layers.values()}
    if len(laws) > 1 or not laws <= set(HAAR_LAWS):
        raise UnsupportedTrainingError(
            f"A of law {', '.join(sorted(laws))}: the row space must be uniform (Haar) for the "
            "projection to amplify; adapt with law='orthonormal' or law='gaussian' for all layers."
        )
    for name, layer in layers.items():
        if layer.rank > layer.in_features:
            raise UnsupportedTrainingError(
                f"rank {layer.rank} exceeds the {layer.in_features} inputs of {name!r}."
            )
        if layer.resample_every != 1:
            raise UnsupportedTrainingError(
                f"{name!r} keeps an A for {layer.resample_every} steps; only a fresh A at every "
                "step amplifies. Adapt with resample_every=1."
            )
    if transform is not None:
        raise UnsupportedTrainingError(
            "method='dp-flora' takes no transform: one that looks at A, as row scaling does, "
            "voids the amplification, and this cannot be told from outside. Use dp-lora-fa."
        )
    if clipping == "per-layer":
        raise UnsupportedTrainingError(
            "method='dp-flora' clips the norm of the whole gradient; take clipping='flat' or "
            "'automatic'."
        )
    if type(optimizer) is not torch.optim.SGD:
        raise UnsupportedTrainingError(
            f"method='dp-flora' needs torch.optim.SGD, with or without momentum, got "
            f"{type(optimizer).__name__}. Every step has another A, so moments cannot be kept "
            "compressed: Adam's two would lie in full size beside every weight."
        )
    own = {id(layer.weight) for layer in layers.values()}
    own |= {id(layer.expand.weight) for layer in layers.values()}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if others:
        raise UnsupportedTrainingError(
            f"{', '.join(others[:5])} would be trained without a projection, which amplifies "
            "nothing for them. Name their layers among the targets of adapt, or freeze them "
            "(biases and norms always)."
        )
    return FreshProjections(layers)


def known_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Path -> adapter; empty for a model without any."""
    try:
        return adapters(model)
    except NoTargetError:
        return {}


def refuse_joined_samples(model: nn.Module) -> None:
    """Raise UnsupportedTrainingError for batch norms, and norms that keep running statistics."""
    for name, module in model.named_modules():
        kind = nn.modules.batchnorm._NormBase  # pyright: ignore[reportPrivateUsage]
        joins = isinstance(module, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]
        if joins or (isinstance(module, kind) and module.track_running_stats):
            raise UnsupportedTrainingError(
                f"{name!r} is a {type(module).__name__}: it joins the samples of a batch or keeps "
                "their statistics without noise, so that clipping one gradient does not bound "
                "what one sample does. Replace it by a group or layer norm."
            )


def refuse_packing(loader: DataLoader[Any]) -> None:
    """Raise UnsupportedTrainingError when ``loader`` joins the records of a batch in one row."""
    collate = cast("Any", loader.collate_fn)
    classes = [t.__name__ for t in type(collate).__mro__]
    # trl's collators flatten when they are told to be free of padding.
    if "DataCollatorWithFlattening" in classes or getattr(collate, "padding_free", False):
        raise UnsupportedTrainingError(
            f"The loader's collate_fn is a {classes[0]}, which joins the records of a batch in "
            "one row, where their gradients cannot be told apart. Pad, one record a row, as "
            "DataCollatorWithPadding and DataCollatorForSeq2Seq do."
        )


def frozen_digest(model: nn.Module) -> str:
    """Hash of every A that is not trained: what the trained B of a LoRA-FA layer belongs to."""
    return tensor_digest(
        (f"{name} ", adapter.a())
        for name, adapter in known_adapters(model).items()
        if adapter.kind != "flora" and not _factors(adapter)[0].requires_grad
    )


def _factors(adapter: Adapter) -> tuple[Tensor, Tensor]:
    """The parameters A and B of a LoRA layer."""
    if isinstance(adapter.layer, LoRALinear):
        return adapter.layer.project.weight, adapter.layer.expand.weight
    layer, name = cast("Any", adapter.layer), adapter.adapter_name
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _refuse_wrappers(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    # By name: none of the packages need be installed, nor the modules of torch imported.
    for path, module in model.named_modules():
        where = f"{path!r}" if path else "The model"
        classes = type(module).__mro__
        parallel = [t.__name__ for t in classes if t.__module__.split(".")[0] == "torch"]
        parallel = [name for name in parallel if name in _PARALLEL]
        if parallel:
            raise UnsupportedTrainingError(
                f"{where} is wrapped in {parallel[0]}, which would exchange gradients that are "
                "not clipped. Pass the model inside (.module), and distributed=True to train it "
                "by several processes: make_private exchanges the clipped sums itself."
            )
        wrapped = any(t.__module__.startswith("opacus.grad_sample") for t in classes)
        # What Opacus plants on a model that it hooks without a wrapper.
        if wrapped or "autograd_grad_sample_hooks" in vars(module):
            raise UnsupportedTrainingError(
                f"{where} carries the hooks of Opacus ({type(module).__name__}), which clip and "
                "name its parameters in another way. Pass the plain model: make_private needs no "
                "wrapper."
            )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise UnsupportedTrainingError(
            f"The optimizer is a {type(optimizer).__name__}, a wrapper whose step calls no hooks "
            "of torch. Pass the one inside: .original_optimizer of Opacus, .optimizer of "
            "accelerate."
        )


def _refuse_target_parameters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if is_peft_layer(module) and any(
            t.__name__ == "ParamWrapper" for t in type(module).__mro__
        ):
            raise UnsupportedLayerError(
                f"{name!r} is adapted by peft's target_parameters, which adds B A to the weight "
                "itself: samples cannot be told apart there. Name linear layers in target_modules."
            )


def _refuse_initialisations(model: nn.Module, found: dict[str, Adapter]) -> None:
    names = {adapter.adapter_name for adapter in found.values() if adapter.adapter_name}
    for name in names:
        config = peft_config(model, name)
        init = getattr(config, "init_lora_weights", None)
        if not isinstance(init, str):
            continue
        if init.lower().startswith(_DATA_READING):
            raise UnsupportedTrainingError(
                f"init_lora_weights={init!r} computes A from training data before any noise; take "
                "True, 'gaussian' or an initialisation from weights."
            )
        if init.startswith("pissa_niter"):
            raise UnsupportedTrainingError(
                f"init_lora_weights={init!r} changes the base by a random decomposition, so that "
                "the adapter fits no other copy of it: peft, loading a release, and a resumed run "
                "would draw another one. Take 'pissa', which is exact."
            )


def _refuse_idle(found: dict[str, Adapter], method: Method) -> None:
    """Refuse trained adapters that the forward pass goes around: they would take noise alone."""
    for name, adapter in found.items():
        if adapter.kind == "flora":
            continue
        if method == "dp-sgd" and not any(f.requires_grad for f in _factors(adapter)):
            continue  # part of a frozen base
        layer = cast("Any", adapter.layer)
        if layer.merged:
            raise UnsupportedTrainingError(
                f"{name!r} is merged into its base, and A and B are not used; call unmerge() "
                "(peft: unmerge_adapter()) first."
            )
        if getattr(layer, "disable_adapters", False):
            raise UnsupportedTrainingError(
                f"{name!r} is disabled, and A and B are not used; call enable_adapter_layers() "
                "first."
            )
