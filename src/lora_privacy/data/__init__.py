"""Text to fine-tune on: local files, hub data sets and the embedded synthetic tickets."""

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.data.dataset import TextDataset
    from lora_privacy.data.sources import load
    from lora_privacy.data.synthetic import LABEL_NOISE, Secret, plant_secrets, tickets

__all__ = ["LABEL_NOISE", "Secret", "TextDataset", "load", "plant_secrets", "tickets"]

if not TYPE_CHECKING:  # checkers read the imports above; these would hide a misspelt name
    __getattr__, __dir__ = attach(
        __name__,
        {
            "LABEL_NOISE": "synthetic",
            "Secret": "synthetic",
            "TextDataset": "dataset",
            "load": "sources",
            "plant_secrets": "synthetic",
            "tickets": "synthetic",
        },
    )
