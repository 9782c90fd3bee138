"""Faults on purpose: a named error or the right result, and nothing finished is lost.

``docs/reliability.md`` lists them all, those too that other tests try.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from lora_privacy.assess import AssessConfig, Assessment, assess, plots, train_shadows
from lora_privacy.assess.config import toml_text
from lora_privacy.assess.folder import RunFolder
from lora_privacy.cli import app
from lora_privacy.errors import FolderInUseError, LedgerError, NonFiniteError, StorageError
from lora_privacy.training import NoiseMultiplier, PrivateTraining, make_private
from lora_privacy.training.ledger import Ledger, Mechanism, Release

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


def command(*arguments: object) -> str:
    """The one line of a mistake; anything else fails."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2, (arguments, done.output, done.exception)
    # Bars of work that had begun are wiped by carriage returns.
    line = done.stderr.rstrip("\n").rpartition("error: ")
    assert line[1], done.output
    assert "\n" not in line[2]
    assert "Traceback" not in done.output
    return line[2]


# Settings that the smallest assessment refuses, before work or in the middle of it.
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"seed": 10**30}, "seed must be below"),
    ({"rank": 10**30}, ""),
    ({"rank": 10**12}, ""),
    ({"alpha": 1e300}, "nan"),
    ({"learning_rate": 1e30}, "the loss is nan at step 2 of lora"),
    ({"dynamics_steps": 2, "dynamics_learning_rate": 1e30}, "must be finite"),
    ({"methods": ["dp-lora"], "private_learning_rate": 1e38}, "overflow"),
    ({"methods": ["dp-lora"], "max_grad_norm": 1e300}, "the loss is nan"),
    ({"methods": ["dp-lora"], "epsilon": 1e9}, "so loose that the noise"),
    ({"train": "a\0b"}, "There is no file"),
    ({"train": "nowhere.tsv"}, "nowhere.tsv"),
    ({"delimiter": ""}, "delimiter must be one character"),
    ({"label_column": "\x1b[31mred\n"}, "\\x1b[31mred\\n"),
    ({"targets": []}, ""),
    ({"rnak": 2}, "Did you mean 'rank'"),
    ({"references": 4}, "no population"),
]


@pytest.mark.parametrize(("wrong", "message"), MISTAKES)
def test_a_wrong_setting_is_one_line(
    job: dict[str, Any], tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    settings = toml_text({**job, "methods": ["lora"], **wrong})
    (tmp_path / "settings.toml").write_text(settings, encoding="utf-8")
    line = command("assess", "--config", tmp_path / "settings.toml", "--output", tmp_path / "out")
    assert message in line
    assert not (tmp_path / "out" / "report.json").exists()


@settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    command_name=st.sampled_from(["account", "calibrate", "audit", "noise", "report", "assess"]),
    content=st.binary(max_size=30) | st.sampled_from([b"[" * 10**5, b"{}", b"[]", b"PK\3\4"]),
    numbers=st.lists(
        st.sampled_from(["0", "-1", "nan", "inf", "-inf", "1e-320", "1e308", "0.5", "9" * 40]),
        min_size=4,
        max_size=4,
    ),
)
def test_no_input_of_a_command_ends_in_a_traceback(
    tmp_path: Path, command_name: str, content: bytes, numbers: list[str]
) -> None:
    """Broken files and numbers out of range: exit code 0 or 2, whatever comes."""
    for name in ("file.json", "file.csv", "file.npz", "file.toml", "report.json"):
        (tmp_path / name).write_bytes(content)
    a, b, c, d = numbers
    steps = c if c.lstrip("-").isdecimal() and len(c) < 9 else "3"
    options = {
        "account": ["--noise-multiplier", a, "--sample-rate", b, "--steps", steps, "--delta", d],
        "calibrate": ["--epsilon", a, "--delta", b, "--steps", steps, "--sample-rate", d],
        "audit": [tmp_path / "file.npz", "--delta", a, "--fpr", b, "--significance", d],
        "noise": [tmp_path / "file.json", "--rank", steps],
        "report": [tmp_path],
        "assess": ["--config", tmp_path / "file.toml", "--output", tmp_path / "x", "--alpha", a,
                   "--model", "nowhere/at/all", "--delta", b, "--epsilon", c],
    }[command_name]  # fmt: skip
    done = CliRunner().invoke(app, [command_name, *map(str, options)])
    assert done.exit_code in (0, 2), (options, done.output, done.exception)
    if done.exit_code:
        assert done.stderr.startswith(("error: ", "Usage: ")), done.stderr
        assert done.stderr.startswith("Usage: ") or done.stderr.count("\n") == 1


FORGED: list[tuple[tuple[str, ...], Any]] = [
    (("config", "rank"), "x"),
    (("methods",), None),
    (("methods", "0", "drift"), None),
    (("methods", "0", "curve", "scores"), []),
    (("methods", "0", "layers", "0", "layer"), None),
    (("methods", "0", "shapes"), [[None]]),
]


def test_forged_and_cut_reports_and_parts(job: dict[str, Any], tmp_path: Path) -> None:
    """A report is refused by name; a damaged part of a method counts as not finished."""
    out = tmp_path / "out"
    first = assess(AssessConfig(**job), out)
    whole = (out / "report.json").read_text()
    for path, value in FORGED:
        data = found = json.loads(whole)
        for key in path[:-1]:
            found = found[int(key) if key.isdecimal() else key]
        found[path[-1]] = value
        (out / "report.json").write_text(json.dumps(data))
        assert "no saved assessment" in command("report", out), path
    for text in ("", "[" * 10**5, "[]", whole[:500], "\0"):
        (out / "report.json").write_text(text)
        assert "report.json" in command("report", out)
    part = out / "methods" / "lora.training.json"
    kept = part.read_text()
    for text in ("", "{}", "[1]", kept[:500], kept.replace("0", "1"), "[" * 10**5):
        part.write_text(text)
        again = assess(AssessConfig(**job), out, resume=True)
        assert again.methods[0].curve.losses == first.methods[0].curve.losses
        assert json.loads(part.read_text())["curve"]["losses"]
    (out / "methods" / "config.json").write_text("[]")
    with pytest.raises(FolderInUseError, match=r"config\.json is damaged"):
        assess(AssessConfig(**job), out, resume=True)


def test_a_number_that_another_process_has_got_is_no_lock(tmp_path: Path) -> None:
    """In a container numbers come back at once: process 1 was killed, and process 1 begins."""
    (tmp_path / ".running").write_text(str(os.getpid()))
    folder = RunFolder(tmp_path, AssessConfig(), inputs={}, resume=False, overwrite=True)
    with folder.held(), pytest.raises(FolderInUseError, match=f"process {os.getpid()} is writing"):
        folder._take()
    assert not (tmp_path / ".running").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_in_an_assessment(job: dict[str, Any], tmp_path: Path) -> None:
    """What was finished before is used afterwards, and nothing is cut short."""
    out = tmp_path / "out"
    assess(AssessConfig(**job), out)
    before = (out / "report.json").read_bytes()
    more = AssessConfig(**{**job, "methods": ("lora", "lora-fa")})
    with largest_file(2_000), pytest.raises(OSError, match="File too large"):
        assess(more, out, resume=True)
    assert (out / "report.json").read_bytes() == before
    assert not (out / ".running").exists()
    assert [m.method for m in assess(more, out, resume=True).methods] == ["lora", "lora-fa"]


def step_of(number: int) -> Release:
    return Release(
        run="a", step=number, noise_multiplier=1.0, sample_rate=0.1, sum_digest=f"{number}"
    )


def test_a_full_disk_while_the_ledger_is_written(tmp_path: Path) -> None:
    """The same step, drawn again, is on disk before it is let through."""
    path, mechanism = tmp_path / "ledger.jsonl", Mechanism(adjacency="add-remove")
    ledger = Ledger(mechanism, path)
    ledger.charge(step_of(0))
    with largest_file(path.stat().st_size + 20):
        for _ in range(2):
            with pytest.raises(LedgerError, match="cannot be written: File too large"):
                ledger.charge(step_of(1))
    ledger.charge(step_of(1))
    assert path.read_text().count("\n") == 3
    ledger.charge(step_of(2))
    ledger.close()
    assert [release.step for release in Ledger(mechanism, path)] == [0, 1, 2]


def private(folder: Path | None = None, x: torch.Tensor | None = None) -> PrivateTraining:
    """A training of one layer on 12 records; goes on from ``folder``."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    data = TensorDataset(torch.ones(12, 4) if x is None else x, torch.arange(12) % 2)
    return make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        DataLoader(data, batch_size=6),
        method="dp-sgd",
        max_grad_norm=1.0,
        privacy=NoiseMultiplier(1.0),
        delta=1e-5,
        resume=folder,
    )


def one_step(training: PrivateTraining) -> None:
    for x, y in training.data_loader:
        functional.cross_entropy(training.model(x), y).backward()
        training.optimizer.step()
        return


def steps(training: PrivateTraining, count: int) -> None:
    for _ in range(count):
        one_step(training)


def test_a_checkpoint_that_is_forged_or_meets_a_full_disk(tmp_path: Path) -> None:
    training = private()
    one_step(training)
    training.save(tmp_path)
    file = tmp_path / "training_state.safetensors"
    whole, taken = file.read_bytes(), training.step
    with largest_file(100), pytest.raises(StorageError, match="is as it was"):
        training.save(tmp_path)
    assert file.read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "ledger.jsonl"}
    training.close()
    with safe_open(str(file), framework="pt") as opened:
        facts = json.loads(opened.metadata()["facts"])
    tensors = load_file(file)
    for name, value in (
        ("settings", None), ("noise_multiplier", -1.0), ("noise_multiplier", "x"), ("step", -1),
        ("budget", "x"), ("charged", None), ("ledger", "x"), ("groups", {"a": 1}),
        ("numbers", {"a": 1}), ("version", 99),
    ):  # fmt: skip
        forged = {**facts, name: value}
        save_file(tensors, file, metadata={"facts": json.dumps(forged)})
        with pytest.raises((StorageError, LedgerError)):
            private(tmp_path)
    for text in ("[1]", "[" * 10**5, "{}", ""):
        save_file(tensors, file, metadata={"facts": text})
        with pytest.raises(StorageError):
            private(tmp_path)
    broken = {name: tensor * float("nan") for name, tensor in tensors.items()}
    save_file(broken, file, metadata={"facts": json.dumps(facts)})
    with pytest.raises(StorageError, match="NaN or infinity"):
        private(tmp_path)
    file.write_bytes(whole)
    again = private(tmp_path)
    assert again.step == taken
    again.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_record_that_is_not_finite_stops_a_private_training(value: float) -> None:
    """Before the noise: a NaN that went through would show who was in the batch."""
    training = private(x=torch.full((12, 4), value))
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    with pytest.raises(NonFiniteError):
        steps(training, 5)
    assert all(map(torch.equal, before, training.model.parameters()))
    training.close()


KILLED = """
import sys
from pathlib import Path
from lora_privacy.assess import AssessConfig, Assessment, assess, plots, train_shadows
from lora_privacy.assess.config import read_settings
plots.draw_all = lambda _: {}
assess(AssessConfig.from_dict(read_settings(sys.argv[1])), sys.argv[2], resume=True)
"""


def test_kill_9_in_an_assessment_loses_nothing_finished(
    job: dict[str, Any], tmp_path: Path
) -> None:
    """Killed once the first method is on disk; another run meanwhile is refused."""
    out, file = tmp_path / "out", tmp_path / "settings.toml"
    job = {**job, "methods": ["lora", "lora-fa"], "epochs": 100, "probe_every": 1000}
    file.write_text(toml_text({**job, "methods": ["lora", "lora-fa"]}), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(file), str(out)],
        stderr=subprocess.DEVNULL,
    )
    first = out / "methods" / "lora.training.json"
    try:
        while not first.exists():
            assert process.poll() is None
            time.sleep(0.05)
        config = AssessConfig(**{**job, "methods": ("lora",)})
        with pytest.raises(FolderInUseError, match=f"process {process.pid} is writing"):
            assess(config, out, resume=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = json.loads(first.read_text())
    assert (out / ".running").exists()
    result = assess(config, out, resume=True)
    assert result.methods[0].curve.wall_seconds == kept["curve"]["wall_seconds"]


def files_of(folder: Path) -> dict[str, bytes]:
    """Whole files only: what a killed write leaves behind ends in .tmp."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_kill_9_while_a_report_is_written(job: dict[str, Any], tmp_path: Path) -> None:
    """At every file in turn, half of it on disk: each file is the old or the new one, whole."""
    out, new = tmp_path / "out", tmp_path / "new"
    first = assess(AssessConfig(**job), out)
    second = replace(first, missing=("lora-fa",))
    old = {name: data for name, data in files_of(out).items() if "methods" not in name}
    second.save(new)
    wanted, write = files_of(new), Path.write_bytes
    for number in range(len(wanted)):
        process = os.fork()
        if not process:
            left = iter(range(number, -1, -1))

            def half(path: Path, data: bytes, left: Iterator[int] = left) -> int:
                if next(left):
                    return write(path, data)
                write(path, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
                raise AssertionError("it is dead")

            Path.write_bytes = half  # pyright: ignore[reportAttributeAccessIssue]
            second.save(out)
            os._exit(0)  # so many files are not written
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status), number
        for name, data in files_of(out).items():
            assert data in (old.get(name), wanted.get(name)) or "methods" in name, name
        assert Assessment.load(out).missing in ((), ("lora-fa",))
    Assessment.load(out).save(out)
    assert {name: files_of(out)[name] for name in wanted} == wanted


SHADOWS = """
import os, sys, time
import numpy as np
class Fit:
    records = 10
    def fingerprint(self):
        return "no model"
    def __call__(self, seed, rows):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        rng = np.random.default_rng(seed)
        return -rng.random(10), -rng.random(4)
if __name__ == "__main__":
    from lora_privacy.assess import train_shadows
    train_shadows(Fit(), sys.argv[1], count=8)
"""


def test_kill_9_in_shadows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with two on disk and one half written: these are kept, and all bits are the same."""
    (tmp_path / "the_fit.py").write_text(SHADOWS)
    monkeypatch.syspath_prepend(tmp_path)
    from the_fit import Fit  # pyright: ignore[reportMissingImports]

    out = tmp_path / "out"
    finished = out / "finished"
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "the_fit.py"), str(out)],
        env={**os.environ, "PAUSE": "0.3"},
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (finished / "00001.npz").exists():
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (finished / f"00002.npz.{process.pid}.tmp").write_bytes(b"PK half")
    kept = (finished / "00000.npz").stat().st_mtime_ns
    assert len(list(finished.glob("*.npz"))) < 8
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # to see that none was made again
    resumed = train_shadows(Fit(), out, count=8)
    assert (finished / "00000.npz").stat().st_mtime_ns == kept
    anew = train_shadows(Fit(), tmp_path / "anew", count=8)
    for name, array in anew.arrays().items():
        assert np.array_equal(getattr(resumed, name), array)
