"""The main job: fine-tune, measure what the projection does, and say what it proves."""

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.assess.config import AssessConfig
    from lora_privacy.assess.result import Assessment
    from lora_privacy.assess.run import assess
    from lora_privacy.assess.shadows import ShadowFit, Shadows, train_shadows

__all__ = ["AssessConfig", "Assessment", "ShadowFit", "Shadows", "assess", "train_shadows"]

if not TYPE_CHECKING:  # checkers read the imports above; these would hide a misspelt name
    __getattr__, __dir__ = attach(
        __name__,
        {
            "AssessConfig": "config",
            "Assessment": "result",
            "ShadowFit": "shadows",
            "Shadows": "shadows",
            "assess": "run",
            "train_shadows": "shadows",
        },
    )
