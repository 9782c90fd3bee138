"""What a low-rank adapter does to a gradient: projections, adapters, probes, storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.core.adapter import Adapter, adapt, adapters, find_targets, unfreeze
    from lora_privacy.core.dynamics import (
        AdapterSnapshot,
        Recursion,
        disagreement,
        drift,
        drift_bound,
        predicted_update,
        recursion,
        snapshot,
        update_bound,
    )
    from lora_privacy.core.flora import FLoRALinear
    from lora_privacy.core.flora_steps import (
        FLoRAMomentum,
        decompress,
        flora_layers,
        refresh,
        sgd_step,
    )
    from lora_privacy.core.lora import LoRALinear, is_conv1d
    from lora_privacy.core.prefix import CachedPrefix
    from lora_privacy.core.probe import GradientProbe, GradientRecord
    from lora_privacy.core.projection import RandomProjection
    from lora_privacy.core.storage import load_flora, save_flora, save_peft

__all__ = [
    "Adapter",
    "AdapterSnapshot",
    "CachedPrefix",
    "FLoRALinear",
    "FLoRAMomentum",
    "GradientProbe",
    "GradientRecord",
    "LoRALinear",
    "RandomProjection",
    "Recursion",
    "adapt",
    "adapters",
    "decompress",
    "disagreement",
    "drift",
    "drift_bound",
    "find_targets",
    "flora_layers",
    "is_conv1d",
    "load_flora",
    "predicted_update",
    "recursion",
    "refresh",
    "save_flora",
    "save_peft",
    "sgd_step",
    "snapshot",
    "unfreeze",
    "update_bound",
]

if not TYPE_CHECKING:  # checkers read the imports above; these would hide a misspelt name
    __getattr__, __dir__ = attach(
        __name__,
        {
            "Adapter": "adapter",
            "AdapterSnapshot": "dynamics",
            "CachedPrefix": "prefix",
            "FLoRALinear": "flora",
            "FLoRAMomentum": "flora_steps",
            "GradientProbe": "probe",
            "GradientRecord": "probe",
            "LoRALinear": "lora",
            "RandomProjection": "projection",
            "Recursion": "dynamics",
            "adapt": "adapter",
            "adapters": "adapter",
            "decompress": "flora_steps",
            "disagreement": "dynamics",
            "drift": "dynamics",
            "drift_bound": "dynamics",
            "find_targets": "adapter",
            "flora_layers": "flora_steps",
            "is_conv1d": "lora",
            "load_flora": "storage",
            "predicted_update": "dynamics",
            "recursion": "dynamics",
            "refresh": "flora_steps",
            "save_flora": "storage",
            "save_peft": "storage",
            "sgd_step": "flora_steps",
            "snapshot": "dynamics",
            "unfreeze": "adapter",
            "update_bound": "dynamics",
        },
    )
