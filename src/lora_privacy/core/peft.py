"""Reading peft's LoRA layers, with the law that their A really was drawn from.

peft is never imported here: a model that holds its layers has done so.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from lora_privacy.errors import UnsupportedLayerError
from lora_privacy.laws import EntryLaw, peft_default_law

if TYPE_CHECKING:
    from torch import nn

__all__ = ["active_adapter", "is_peft_layer", "is_peft_module", "peft_config", "peft_law"]

_UNKNOWN = EntryLaw("unknown", math.nan, math.nan)


def is_peft_module(module: nn.Module) -> bool:
    """Whether the class of ``module``, or one it inherits from, comes from peft."""
    return any(t.__module__.split(".")[0] == "peft" for t in type(module).__mro__)


def is_peft_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a layer adapted by peft, by whatever method."""
    return any(
        t.__name__ == "BaseTunerLayer" and t.__module__ == "peft.tuners.tuners_utils"
        for t in type(module).__mro__
    )


def active_adapter(name: str, module: nn.Module) -> str | None:
    """The one active LoRA adapter of a peft layer; None when it has none that is active.

    Raises:
        UnsupportedLayerError: Several are active, or the layer is not plain LoRA on a linear map.
    """
    if not type(module).__module__.startswith("peft.tuners.lora"):
        raise UnsupportedLayerError(
            f"{name!r} is adapted by peft's {type(module).__name__}; only LoRA is read."
        )
    layer = cast("Any", module)
    active = [key for key in layer.active_adapters if key in layer.lora_A]
    embedded = [key for key in layer.active_adapters if key in layer.lora_embedding_A]
    if embedded:
        raise UnsupportedLayerError(
            f"{name!r} is LoRA on an embedding, which is no linear map of its input."
        )
    if len(active) > 1:
        raise UnsupportedLayerError(
            f"{name!r} has several active adapters ({', '.join(active)}); "
            "choose one with set_adapter."
        )
    if active and active[0] in layer.lora_variant:
        raise UnsupportedLayerError(
            f"{name!r} is {type(layer.lora_variant[active[0]]).__name__}, not plain LoRA: its "
            "output is not (W + s B A) x."
        )
    return active[0] if active else None


def peft_config(model: nn.Module, adapter: str) -> Any:  # noqa: ANN401 - a type of peft
    """Configuration of ``adapter``; None when the model carries none."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter in configs:
            return configs[adapter]
    return None


def peft_law(config: Any, rank: int, in_features: int) -> tuple[EntryLaw, str]:  # noqa: ANN401
    """Law of A at its initialisation, and the reason for it.

    Args:
        config: peft's ``LoraConfig``, or None.
        rank: Rows of A.
        in_features: Columns of A.
    """
    if config is None:
        return _UNKNOWN, "the model carries no peft configuration"
    init = config.init_lora_weights
    if init is True:
        return peft_default_law(in_features), "init_lora_weights=True, at initialisation"
    if isinstance(init, str) and init.lower() == "gaussian":
        # peft draws with standard deviation 1/rank, not 1/√rank.
        law = EntryLaw("gaussian", 1.0 / rank**2, 3.0)
        return law, "init_lora_weights='gaussian', standard deviation 1/rank, at initialisation"
    if init is False:
        return _UNKNOWN, "init_lora_weights=False leaves A to whoever made or saved it"
    return _UNKNOWN, f"init_lora_weights={init!r} computes A from weights or data"
