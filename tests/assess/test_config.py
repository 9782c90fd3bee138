"""A configuration is refused before any work starts, with a message that helps."""

import tomllib
from pathlib import Path

import pytest

from lora_privacy.assess.config import AssessConfig, read_settings
from lora_privacy.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 2.0}, "rank must be an integer"),
        ({"methods": ()}, "methods must name at least one, such as lora, flora"),
        ({"methods": ("lora", "lora")}, "names one twice"),
        ({"methods": ("qlora",)}, "methods must be of full, lora, lora-fa"),
        ({"methods": ("lora+denoise",)}, "lora' adds no noise"),
        ({"methods": ("dp-flora+denoise",)}, "not independent from entry to entry"),
        ({"methods": ("dp-flora+scaling",)}, "row scaling looks at A"),
        ({"methods": ("dp-lora+denoise+scaling",)}, "in this order"),
        ({"methods": ("dp-lora+denoise+denoise",)}, "each once"),
        ({"methods": ("dp-lora+",)}, "may be followed by"),
        ({"references": 3}, "references must be 0, .* or at least 4, got 3"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"audit_records": 3}, "audit_records must be at least 4"),
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


def test_methods_are_taken_apart() -> None:
    found = AssessConfig(methods=("full", "dp-sgd", "dp-lora-fa+scaling+denoise")).recipes
    assert [(r.base, r.trains, r.private) for r in found] == [
        ("full", "full", False),
        ("dp-sgd", "full", True),
        ("dp-lora-fa", "lora-fa", True),
    ]
    assert [(r.scaling, r.denoise) for r in found] == [
        (False, False),
        (False, False),
        (True, True),
    ]


def test_a_file_of_settings_gives_the_same_configuration(tmp_path: Path) -> None:
    config = AssessConfig(
        model='C:\\odd "name"\x7f\n',
        text_columns=("a", 1),
        label_column=0,
        header=False,
        alpha=1e-30,
        methods=("dp-lora+denoise", "full"),
        train_size=None,
    )
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert tomllib.loads(config.to_toml())["delta"] == 1e-5
    assert AssessConfig.from_dict(read_settings(path)) == config
    assert AssessConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*config.toml: No such file"),
        ("rank = ", "config.toml is no TOML"),
        ("ranks = 8", "there is no setting 'ranks'. Did you mean 'rank'"),
        ("[assess]\nrank = 8", r"\[assess\] is a table"),
        ("rank = 'eight'", "rank must be int, got 'eight'"),
        ("rank = 8.5", "rank must be int, got 8.5"),
        ("rank = true", "rank must be int, got True"),
        ("header = 1", "header must be bool"),
        ("methods = 'lora'", "methods must be a list, got 'lora'"),
        ("methods = [1.5]", "a list of names, got 1.5"),
        ("delta = '1e-5'", "delta must be int or float"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        AssessConfig.from_dict(read_settings(path))
