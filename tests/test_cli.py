"""The command line: what it prints, and that a user's mistake is one line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

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
