"""A configuration is refused before any work starts, with a message that helps."""

import pytest

from lora_privacy.assess.config import AssessConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, "rank must be an integer"),
        ({"methods": ()}, "methods must name at least one of lora, lora-fa, flora"),
        ({"methods": ("lora", "lora")}, "names one twice"),
        ({"methods": ("qlora",)}, "must be one of 'lora'"),
        ({"law": "cauchy"}, "law must be one of 'gaussian'"),
        ({"task": "regression"}, "task must be one of"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"delta": 1.0}, r"delta must lie in \(0, 1\)"),
        ({"distortion": 0.0}, r"distortion must lie in \(0, 1\)"),
        ({"noise_draws": 1}, "noise_draws must be at least 2"),
        ({"last_layers": 0}, "last_layers must be at least 1"),
        ({"alpha": -1.0}, "alpha must be positive"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        AssessConfig(**settings)


def test_the_fingerprint_sees_every_setting_but_the_methods() -> None:
    base = AssessConfig()
    assert base.fingerprint() == AssessConfig(methods=("flora",)).fingerprint()
    assert base.fingerprint() != AssessConfig(seed=1).fingerprint()
    assert base.fingerprint() != AssessConfig(text_columns=("a",)).fingerprint()
    assert (
        AssessConfig(text_columns=(0,)).fingerprint()
        != AssessConfig(text_columns=("0",)).fingerprint()
    )
