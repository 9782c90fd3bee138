"""Private fine-tuning: clipping, noise, accounting and guards around an ordinary loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.training.callback import NoiseCallback
    from lora_privacy.training.clipping import (
        AutomaticClipping,
        FlatClipping,
        LayerClipping,
        RowScaling,
        clipped_sums,
        sample_norms,
    )
    from lora_privacy.training.denoising import (
        SingularValueDenoiser,
        denoise,
        predicted_cosine,
    )
    from lora_privacy.training.engine import make_private
    from lora_privacy.training.guard import WeightDeltaGuard, preflight
    from lora_privacy.training.privacy import NoiseMultiplier, PrivacyArguments, TargetEpsilon
    from lora_privacy.training.private_training import PrivateTraining
    from lora_privacy.training.recorder import SampleRecorder
    from lora_privacy.training.spectrum_profile import SpectrumProfile
    from lora_privacy.training.trainer import PrivateTrainer

__all__ = [
    "AutomaticClipping",
    "FlatClipping",
    "LayerClipping",
    "NoiseCallback",
    "NoiseMultiplier",
    "PrivacyArguments",
    "PrivateTrainer",
    "PrivateTraining",
    "RowScaling",
    "SampleRecorder",
    "SingularValueDenoiser",
    "SpectrumProfile",
    "TargetEpsilon",
    "WeightDeltaGuard",
    "clipped_sums",
    "denoise",
    "make_private",
    "predicted_cosine",
    "preflight",
    "sample_norms",
]

if not TYPE_CHECKING:  # checkers read the imports above; these would hide a misspelt name
    __getattr__, __dir__ = attach(
        __name__,
        {
            "AutomaticClipping": "clipping",
            "FlatClipping": "clipping",
            "LayerClipping": "clipping",
            "NoiseCallback": "callback",
            "NoiseMultiplier": "privacy",
            "PrivacyArguments": "privacy",
            "PrivateTrainer": "trainer",
            "PrivateTraining": "private_training",
            "RowScaling": "clipping",
            "SampleRecorder": "recorder",
            "SingularValueDenoiser": "denoising",
            "SpectrumProfile": "spectrum_profile",
            "TargetEpsilon": "privacy",
            "WeightDeltaGuard": "guard",
            "clipped_sums": "clipping",
            "denoise": "denoising",
            "make_private": "engine",
            "predicted_cosine": "denoising",
            "preflight": "guard",
            "sample_norms": "clipping",
        },
    )
