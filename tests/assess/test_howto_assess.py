"""The page on assessments shows what happens, on a model that the test makes."""

import doctest
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lora_privacy.assess import AssessConfig, plots
from lora_privacy.data import tickets

PAGE = Path(__file__).parents[2] / "docs" / "howto-assess.md"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``my-model``, an untrained BERT, and the two files of data."""
    monkeypatch.chdir(tmp_path)
    # Drawing takes most of a tiny run; tests/assess/test_report.py looks at the figures.
    monkeypatch.setattr(plots, "draw_all", lambda _: {})
    for name, count in (("train", 48), ("dev", 24)):
        data = tickets(count, seed=0, split="train" if name == "train" else "dev")
        assert data.labels is not None
        rows = zip(data.texts, data.labels, strict=True)
        lines = ["text,label", *(f'"{text}",{data.classes[label]}' for text, label in rows)]
        Path(f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = sorted({word for text in tickets(200, seed=0).texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=32, max_position_embeddings=64,
            )
        )  # fmt: skip
    model.save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    return tmp_path


def test_examples_of_the_page_are_true(place: Path) -> None:
    result = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert result.attempted > 10
    assert result.failed == 0
    # The table of files names all there is, and nothing else.
    names = {path.name for path in (place / "reports" / "mine").iterdir()}
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}" in text for name in names), names
    listed = re.findall(
        r"^\| (`[a-z./`, *]+`) \|", text.split("## What is in the folder")[1], re.M
    )
    stems = {re.split(r"[/`]", cell)[1] for cell in listed}
    assert stems <= names


def test_the_file_of_settings_is_one() -> None:
    block = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    config = AssessConfig.from_dict(tomllib.loads(block))
    assert config.private_epochs == 6


def test_the_table_of_costs_names_settings() -> None:
    """So a setting that is renamed does not stay on the page under its old name."""
    text = PAGE.read_text(encoding="utf-8")
    table = text.split("## What each part costs")[1].split("\n\n")[1]
    named = set(re.findall(r"`([a-z_]+)(?: = 0)?`", table))
    assert len(named) > 8
    assert named <= {field.name for field in fields(AssessConfig)}
