"""The command line: what it prints, and that a user's mistake is one line."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lora_privacy.assess import AssessConfig
from lora_privacy.cli import app
from lora_privacy.noise import EntryNoise

LLAMA_70B = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "vocab_size": 128256,
}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_70B))
    return str(path)


def test_laws_of_a_models_shapes_as_json(config: str) -> None:
    done = CliRunner().invoke(app, ["noise", config, "--rank", "8", "--rank", "64", "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output)
    assert [row["rank"] for row in rows] == [8] * 4 + [64] * 4
    assert sum(row["count"] for row in rows if row["rank"] == 8) == 7 * 80
    law = EntryNoise(8, 1.0, 8192**-0.5)
    assert rows[0]["relative_std"] == pytest.approx(law.std(), rel=1e-12)


def test_laws_as_a_table_say_that_they_are_no_guarantee(config: str) -> None:
    done = CliRunner().invoke(app, ["noise", config])
    assert done.exit_code == 0, done.output
    assert "| layers.\\*.self_attn.q_proj, layers.\\*.self_attn.o_proj | 160 |" in done.output
    assert "no guarantee" in done.output
    assert "ε" not in done.output


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "no file"),
        ("not json", [], "JSON"),
        ('{"model_type": "poem"}', [], "model_type 'poem' is not known"),
        ('{"model_type": "llama"}', [], "hidden_size"),
        (json.dumps(LLAMA_70B), ["--rank", "0"], "rank must be at least 1"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, content: str | None, options: list[str], message: str
) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(app, ["noise", str(path), *options])
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert message in done.output
    assert "Traceback" not in done.output


# Settings that are lists are options that may be repeated, named for one of them.
REPEATED = {"methods": "method", "targets": "target", "text_columns": "text_column"}
# What is no setting: it changes no number of a report, or says where the settings are.
NO_SETTING = {"output", "config", "jobs", "resume", "overwrite", "debug"}
WORDS: dict[str, Any] = {
    "task": "causal-lm", "law": "uniform", "header": False, "methods": ("dp-lora", "full"),
    "targets": ("query", "key"), "text_columns": ("a", 1),
}  # fmt: skip


def options_of_assess() -> dict[str, str]:
    """Name -> help."""
    command: Any = typer.main.get_command(app)
    return {option.name: option.help for option in command.commands["assess"].params}


def other(name: str) -> Any:
    """A value of the setting that is not its default."""
    default = next(field.default for field in fields(AssessConfig) if field.name == name)
    if name in WORDS:
        return WORDS[name]
    if name in ("alpha", "distortion", "delta"):
        return 0.25
    if name in ("model", "gguf_file", "train", "dev", "label_column", "delimiter"):
        return f"a {name}"
    return 7 if default is None else default + 7


def test_every_setting_of_an_assessment_has_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is given a value that is not its default, and arrives."""
    assert options_of_assess().keys() - NO_SETTING == {
        REPEATED.get(field.name, field.name) for field in fields(AssessConfig)
    }
    wanted = {field.name: other(field.name) for field in fields(AssessConfig)}
    assert not any(getattr(AssessConfig(), name) == value for name, value in wanted.items())
    given: list[str] = []
    for name, value in wanted.items():
        option = f"--{REPEATED.get(name, name).replace('_', '-')}"
        if value is False:
            given.append(f"--no-{name}")
            continue
        for one in value if isinstance(value, tuple) else (value,):
            given += [option, str(one)]
    seen: list[AssessConfig] = []

    def run(config: AssessConfig, *_: object, **__: object) -> None:
        seen.append(config)
        raise KeyboardInterrupt  # no work

    monkeypatch.setattr("lora_privacy.assess.run.assess", run)
    done = CliRunner().invoke(app, ["assess", "--output", str(tmp_path), *given])
    assert done.exit_code == 130, done.output
    assert seen == [AssessConfig(**wanted)]


def test_the_help_of_an_option_names_the_default_of_its_setting() -> None:
    """Where it is a number; 1e-5 and 0.001 are written as the help does."""
    texts = options_of_assess()
    for field in fields(AssessConfig):
        default = field.default
        if isinstance(default, int | float) and not isinstance(default, bool):
            shown = {f"{default:,}", f"{default:g}", f"{default:.0e}".replace("e-0", "e-")}
            assert any(f" {one}" in texts[field.name] for one in shown), field.name


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyError("x"), AssertionError()])
def test_a_bug_is_one_line_that_says_so(
    config: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Not what a user did wrong: another exit code, and where to look."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lora_privacy.noise.table.laws_table", fail)
    done = CliRunner().invoke(app, ["noise", config])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: this is a bug in lora-privacy; --debug shows where.")
    assert type(error).__name__ in done.stderr
    assert done.stderr.count("\n") == 1
    done = CliRunner().invoke(app, ["noise", config, "--debug"])
    assert done.exception is error
