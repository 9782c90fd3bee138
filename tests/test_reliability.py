"""Faults on purpose: a named error or the right result, and nothing finished is lost.

``docs/reliability.md`` lists them all, those too that other tests try.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lora_privacy.assess import AssessConfig, assess, plots
from lora_privacy.errors import FolderInUseError

WORDS = ("blue", "cold", "fast", "green", "hot", "late", "loud", "new", "old", "red", "slow")
# As little as an assessment can be asked for.
LITTLE: dict[str, Any] = {
    "methods": ("lora",),
    "epochs": 1,
    "batch_size": 8,
    "rank": 2,
    "last_layers": 1,
    "max_length": 8,
    "noise_draws": 2,
    "dynamics_steps": 0,
    "private_batch_size": 8,
    "references": 0,
    "secrets": 0,
    "update_games": 0,
}


def write_model(folder: Path, seed: int = 0) -> None:
    """A 2-block BERT of random weights, 16 wide."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=16,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(path: Path, shift: int = 0) -> None:
    """24 labelled texts of three words."""
    rows = [
        f"{WORDS[i % 11]} {WORDS[(3 * i + shift) % 11]} {WORDS[i % 7]}\t{i % 2}" for i in range(24)
    ]
    path.write_text("\n".join(["text\tlabel", *rows]), encoding="utf-8")


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Settings of the smallest assessment, on a model and data of its own."""
    write_model(tmp_path / "model")
    for name in ("train", "dev"):
        write_data(tmp_path / f"{name}.tsv")
    return {
        "model": str(tmp_path / "model"),
        "train": str(tmp_path / "train.tsv"),
        "dev": str(tmp_path / "dev.tsv"),
        **LITTLE,
    }


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of so small a run."""
    monkeypatch.setattr(plots, "draw_all", lambda _: {})


def test_a_run_does_not_go_on_with_other_inputs(job: dict[str, Any], tmp_path: Path) -> None:
    """The settings are the same: the files that they name are not."""
    first = assess(AssessConfig(**job), tmp_path / "out")
    before = (tmp_path / "out" / "report.json").read_bytes()
    config = AssessConfig(**{**job, "methods": ("lora", "lora-fa")})
    for changed, message in (
        ("train.tsv", "on other training data: they have changed since"),
        ("dev.tsv", "on other held-out data: they have changed since"),
        ("model/model.safetensors", "on another model: its files have changed since"),
    ):
        kept = (tmp_path / changed).read_bytes()
        if changed.startswith("model"):
            write_model(tmp_path / "model", seed=1)
        else:
            write_data(tmp_path / changed, shift=1)
        with pytest.raises(FolderInUseError, match=message):
            assess(config, tmp_path / "out", resume=True)
        (tmp_path / changed).write_bytes(kept)
    assert (tmp_path / "out" / "report.json").read_bytes() == before
    assert assess(config, tmp_path / "out", resume=True).methods[0] == first.methods[0]
    write_data(tmp_path / "train.tsv", shift=1)
    anew = assess(AssessConfig(**job), tmp_path / "out", resume=True, overwrite=True)
    assert anew.train.sha256 != first.train.sha256
    assert anew.methods[0].curve.losses != first.methods[0].curve.losses
