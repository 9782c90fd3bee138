"""Checks of the parameters that every event has."""

from __future__ import annotations

from lora_privacy import _validate


def check_sample_rate(sample_rate: float) -> None:
    """Raise ValueError unless ``sample_rate`` is in (0, 1]; NaN raises."""
    if not 0 < sample_rate <= 1:
        raise ValueError(
            f"sample_rate must lie in (0, 1], got {sample_rate!r}. It is the probability that "
            "one record takes part in a step, expected batch size over number of records."
        )


def check_noise_multiplier(noise_multiplier: float) -> None:
    """Raise ValueError unless ``noise_multiplier`` is positive and finite; NaN raises."""
    _validate.positive(
        "noise_multiplier", noise_multiplier, "A release without noise has no finite ε."
    )
