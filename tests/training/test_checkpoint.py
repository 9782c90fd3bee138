"""Save, kill, resume and release."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lora_privacy.core import adapt, load_flora
from lora_privacy.errors import (
    LedgerError,
    StorageError,
    TrainingOrderError,
    UnsupportedLayerError,
)
from lora_privacy.training import NoiseMultiplier, PrivateTraining, TargetEpsilon, make_private

DELTA = 1e-5
STEPS = 30

# A training that saves every 7 steps, as a process of its own that can be killed.
SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_checkpoint import begin, one_step
mode, method, folder, first = sys.argv[1:]
private = begin(method, mode, folder, resume=first == "resume")
while private.step < {steps}:
    one_step(private)
    if private.step % 7 == 0:
        private.save(folder)
    time.sleep(0.02)  # so that a kill can land anywhere
private.save(folder)
"""


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def network(method: str) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Tanh(), nn.Linear(5, 2))
    if method == "dp-flora":
        return adapt(model, 2, method="flora", targets=("0", "3"), law="orthonormal", seed=0)
    if method == "dp-lora":
        return adapt(model, 2, method="lora", targets=("0",), seed=0, trainable=("3",))
    return model


def begin(
    method: str,
    mode: str,
    folder: str | Path | None,
    *,
    resume: bool | Path = False,
    **changes: Any,
) -> PrivateTraining:
    """A training in ``mode``; its ledger lies in ``folder``."""
    model = network(method)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(wanted, lr=0.1, momentum=0.9)
    if method == "dp-lora":
        optimizer = torch.optim.AdamW(wanted, lr=0.01)
    options: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "privacy": NoiseMultiplier(1.0),
        "secure": mode == "secure",
        "deterministic": mode == "deterministic",
        "physical_batch_size": 4,
        "ledger": None if folder is None else Path(folder) / "ledger.jsonl",
        "resume": folder if resume is True else (resume or None),
    }
    options.update(changes)
    return make_private(
        model, optimizer, DataLoader(data()), method=method, delta=DELTA,  # pyright: ignore
        sample_rate=0.2, **options,
    )  # fmt: skip


def one_step(private: PrivateTraining) -> None:
    """One whole step, the last ones of an epoch included."""
    before = private.step
    for x, y in private.data_loader:
        functional.cross_entropy(private.model(x), y).backward()
        private.optimizer.step()
        if private.step > before:
            return


def weights(private: PrivateTraining) -> list[torch.Tensor]:
    return [p.detach().clone() for p in private.model.parameters()]


def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parent), steps=STEPS))
    return path


def start(tmp_path: Path, mode: str, method: str, folder: Path, first: str) -> Any:
    return subprocess.Popen(
        [sys.executable, str(script(tmp_path)), mode, method, str(folder), first],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def kill_at(process: Any, ledger: Path, lines: int) -> None:
    """Kill −9 once the ledger has ``lines`` steps."""
    for _ in range(900_000):
        if ledger.exists() and len(ledger.read_text().splitlines()) > lines:
            break
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("method", ["dp-lora", "dp-flora"])
def test_a_killed_deterministic_run_goes_on_bit_by_bit(tmp_path: Path, method: str) -> None:
    """Oracle: the same run without the kill; weights equal bit by bit, ledgers line by line."""
    first = tmp_path / "first"
    private = begin(method, "deterministic", first)
    private.save(first)
    private.close()
    folders = {}
    for name in ("whole", "killed"):
        folders[name] = tmp_path / name
        subprocess.run(["cp", "-r", str(first), str(folders[name])], check=True)
    whole = start(tmp_path, "deterministic", method, folders["whole"], "resume")
    killed = start(tmp_path, "deterministic", method, folders["killed"], "resume")
    kill_at(killed, folders["killed"] / "ledger.jsonl", 1 + int.from_bytes(os.urandom(1)) % 20)
    again = start(tmp_path, "deterministic", method, folders["killed"], "resume")
    for process in (whole, again):
        assert process.wait(timeout=900) == 0, process.stderr.read().decode()
    ledgers = [(folder / "ledger.jsonl").read_text() for folder in folders.values()]
    assert len(ledgers[0].splitlines()) == STEPS + 1
    assert ledgers[0] == ledgers[1]
    a, b = (load_file(folder / "training_state.safetensors") for folder in folders.values())
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    start_state = load_file(first / "training_state.safetensors")
    assert not any(torch.equal(a[n], start_state[n]) for n in a if n.startswith("weight"))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_secure_run_counts_the_steps_that_it_lost(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    private = begin("dp-lora", "secure", folder)
    private.save(folder)
    private.close()
    process = start(tmp_path, "secure", "dp-lora", folder, "resume")
    kill_at(process, folder / "ledger.jsonl", 17)
    charged = len((folder / "ledger.jsonl").read_text().splitlines()) - 1
    assert charged >= 17
    again = begin("dp-lora", "secure", folder, resume=True)
    assert again.step % 7 == 0
    assert again.step < charged
    assert len(again._ledger) == charged
    lost = charged - again.step
    one_step(again)
    assert len(again._ledger) == charged + 1
    assert again.accountant.events[0][1] == again.step + lost
    assert not (folder / "private").exists()


def test_lost_steps_are_taken_from_the_budget(tmp_path: Path) -> None:
    target = TargetEpsilon(3.0, steps=12)
    private = begin("dp-lora", "secure", tmp_path, privacy=target)
    for _ in range(5):
        one_step(private)
    private.save(tmp_path)
    for _ in range(3):
        one_step(private)
    private.close()  # and what these three steps did is lost
    again = begin("dp-lora", "secure", tmp_path, privacy=target, resume=True)
    assert again.step == 5
    assert again.noise_multiplier == private.noise_multiplier
    assert again.steps_left() == 4
    while again.steps_left():
        one_step(again)
    assert again.step == 9
    assert len(again._ledger) == 12
    assert again.bound().epsilon <= 3.0


def test_a_replay_is_free_and_then_the_budget_goes_on(tmp_path: Path) -> None:
    target = TargetEpsilon(3.0, steps=12)
    private = begin("dp-lora", "deterministic", tmp_path, privacy=target)
    for _ in range(5):
        one_step(private)
    private.save(tmp_path)
    for _ in range(3):
        one_step(private)
    expected = weights(private)
    private.close()
    again = begin("dp-lora", "deterministic", tmp_path, privacy=target, resume=True)
    assert again.steps_left() == 7
    for _ in range(3):
        one_step(again)
    assert len(again._ledger) == 8
    assert all(torch.equal(a, b) for a, b in zip(expected, weights(again), strict=True))
    while again.steps_left():
        one_step(again)
    assert again.step == len(again._ledger) == 12


def test_an_earlier_training_in_the_ledger_is_part_of_the_cost(tmp_path: Path) -> None:
    first = begin("dp-lora", "secure", tmp_path)
    for _ in range(4):
        one_step(first)
    spent = first.bound().epsilon
    first.close()
    second = begin("dp-lora", "secure", tmp_path)
    assert second.step == 0
    assert second.bound().epsilon == spent
    one_step(second)
    assert second.bound().epsilon > spent


def test_another_frozen_a_is_refused(tmp_path: Path) -> None:
    """B was trained for the A that the checkpoint does not hold."""
    for seed in (0, 1):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        adapt(model, 2, method="lora-fa", targets=("0",), seed=seed)
        wanted = [p for p in model.parameters() if p.requires_grad]
        arguments: dict[str, Any] = {
            "method": "dp-lora-fa", "max_grad_norm": 1.0, "privacy": NoiseMultiplier(1.0),
            "delta": DELTA, "sample_rate": 0.2,
        }  # fmt: skip
        loader = DataLoader(data())
        if seed == 0:
            private = make_private(model, torch.optim.SGD(wanted, lr=0.1), loader, **arguments)
            private.save(tmp_path)
            private.close()
            continue
        with pytest.raises(StorageError, match="frozen_a"):
            make_private(
                model, torch.optim.SGD(wanted, lr=0.1), loader, resume=tmp_path, **arguments
            )


@pytest.mark.parametrize("method", ["dp-sgd", "dp-lora", "dp-flora"])
def test_a_checkpoint_restores_weights_and_optimizer(tmp_path: Path, method: str) -> None:
    private = begin(method, "secure", tmp_path)
    for _ in range(3):
        one_step(private)
    private.save(tmp_path)
    expected, state = weights(private), private.optimizer.state_dict()["state"]
    private.close()
    again = begin(method, "secure", tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, weights(again), strict=True))
    found = again.optimizer.state_dict()["state"]
    assert found.keys() == state.keys()
    for index, entries in state.items():
        for name, value in entries.items():
            if value is not None:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(found[index][name]))


def test_private_state_is_apart_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    private = begin("dp-lora", "deterministic", None)
    private.save(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"ledger.jsonl", "training_state.safetensors", "private"}
    key = tmp_path / "private" / "key.hex"
    if os.name == "posix":
        assert key.stat().st_mode & 0o077 == 0
    secret = key.read_text()
    for file in tmp_path.iterdir():
        if file.is_file():
            assert secret.encode() not in file.read_bytes()
            assert bytes.fromhex(secret) not in file.read_bytes()


@pytest.mark.parametrize("method", ["dp-sgd", "dp-lora", "dp-flora"])
def test_a_release_holds_weights_and_bound_and_nothing_private(
    tmp_path: Path, method: str
) -> None:
    private = begin(method, "deterministic", tmp_path / "run")
    for _ in range(3):
        one_step(private)
    private.save(tmp_path / "run")
    folder = private.release(tmp_path / "out")
    bound = json.loads((folder / "privacy.json").read_text())
    assert bound["epsilon"] == private.bound().epsilon
    assert any("seed known" in line for line in bound["assumptions"])
    secret = (tmp_path / "run" / "private" / "key.hex").read_text()
    for file in folder.rglob("*"):
        assert file.name not in ("private", "ledger.jsonl", "training_state.safetensors")
        if file.is_file():
            assert file.suffix in (".json", ".safetensors", ".md")
            assert secret.encode() not in file.read_bytes()
    trained = private.model.eval()
    x = data().tensors[0]
    if method == "dp-sgd":
        fresh = network(method).eval()
        fresh.load_state_dict(load_file(folder / "trained.safetensors"))
        torch.testing.assert_close(fresh(x), trained(x))
    elif method == "dp-flora":
        fresh = load_flora(network("plain"), folder).eval()
        torch.testing.assert_close(fresh(x), trained(x))
    else:
        from peft import PeftModel

        fresh = PeftModel.from_pretrained(network("plain"), str(folder)).eval()
        torch.testing.assert_close(fresh(x), trained(x))


def test_nothing_is_saved_in_the_middle_of_a_step(tmp_path: Path) -> None:
    private = begin("dp-lora", "secure", None)
    next(iter(private.data_loader))
    for call in (private.save, private.release):
        with pytest.raises(TrainingOrderError, match="between a batch and its"):
            call(tmp_path)


def test_one_checkpoint_holds_the_ledger_or_a_file_outside_does(tmp_path: Path) -> None:
    private = begin("dp-lora", "secure", None)
    private.save(tmp_path / "a")
    private.save(tmp_path / "a")
    with pytest.raises(ValueError, match="file outside"):
        private.save(tmp_path / "b")
    private.close()
    other = begin("dp-lora", "secure", None, ledger=tmp_path / "all.jsonl")
    other.save(tmp_path / "c")
    other.save(tmp_path / "d")
    other.close()
    with pytest.raises(LedgerError, match="no ledger at"):
        begin("dp-lora", "secure", None, resume=tmp_path / "d")


def test_a_ledger_that_lost_steps_is_refused(tmp_path: Path) -> None:
    private = begin("dp-lora", "secure", tmp_path)
    one_step(private)
    private.save(tmp_path)
    private.close()
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text(ledger.read_text().splitlines()[0] + "\n")
    with pytest.raises(LedgerError, match="does not begin with the 1 steps"):
        begin("dp-lora", "secure", tmp_path, resume=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_grad_norm": 2.0}, "clipping"),
        ({"privacy": NoiseMultiplier(2.0)}, "privacy"),
        ({"secure": False}, "nothing"),
        ({"adjacency": "replace"}, "adjacency"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    private = begin("dp-lora", "secure", None)
    private.save(tmp_path)
    private.close()
    if message == "nothing":
        begin("dp-lora", "secure", None, resume=tmp_path, **changes)
        return
    with pytest.raises((StorageError, LedgerError), match=message):
        begin("dp-lora", "secure", None, resume=tmp_path, **changes)


def test_damage_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    private = begin("dp-lora", "deterministic", None)
    one_step(private)
    private.save(tmp_path)
    private.close()
    state = tmp_path / "training_state.safetensors"
    whole = state.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not a tensor"):
        state.write_bytes(damage)
        with pytest.raises(StorageError, match="cannot be read"):
            begin("dp-lora", "deterministic", None, resume=tmp_path)
    state.write_bytes(whole)
    (tmp_path / "private" / "key.hex").write_text("zz")
    with pytest.raises(StorageError, match="holds no key"):
        begin("dp-lora", "deterministic", None, resume=tmp_path)
    ledger = tmp_path / "ledger.jsonl"
    with pytest.raises(StorageError, match="cannot be read"):
        begin("dp-lora", "deterministic", None, resume=tmp_path / "absent", ledger=ledger)


def test_the_ledger_of_another_training_is_refused(tmp_path: Path) -> None:
    """A cheaper run of equal length would make ε smaller."""
    for name, z in (("dear", 0.5), ("cheap", 5.0)):
        private = begin("dp-lora", "secure", tmp_path / name, privacy=NoiseMultiplier(z))
        one_step(private)
        private.save(tmp_path / name)
        private.close()
    with pytest.raises(LedgerError, match="ledger of another training"):
        begin(
            "dp-lora", "secure", None, privacy=NoiseMultiplier(0.5), resume=tmp_path / "dear",
            ledger=tmp_path / "cheap" / "ledger.jsonl",
        )  # fmt: skip


def test_a_replay_of_other_data_is_refused(tmp_path: Path) -> None:
    """Its noise was used, and the difference of the two releases would show the sums."""
    private = begin("dp-lora", "deterministic", tmp_path)
    private.save(tmp_path)
    for _ in range(2):
        one_step(private)
    private.close()
    again = begin("dp-lora", "deterministic", tmp_path, resume=True)
    again.data_loader._dataset._tensors = tuple(t.flip(0) for t in data().tensors)  # pyright: ignore
    before = weights(again)
    with pytest.raises(LedgerError, match="One noise must not cover two sums"):
        one_step(again)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(again), strict=True))


def test_a_known_seed_stays_stamped_when_a_secure_run_goes_on(tmp_path: Path) -> None:
    private = begin("dp-lora", "deterministic", tmp_path)
    one_step(private)
    private.close()
    again = begin("dp-lora", "secure", tmp_path)
    assert any("seed known" in line for line in again.bound().assumptions)


def test_a_release_does_not_go_into_a_checkpoint(tmp_path: Path) -> None:
    private = begin("dp-lora", "deterministic", None)
    private.save(tmp_path)
    with pytest.raises(ValueError, match="folder of its own"):
        private.release(tmp_path)


def test_a_release_of_peft_holds_the_trained_adapter_and_all_that_was_trained(
    tmp_path: Path,
) -> None:
    """The other adapter stays at home; a head that peft's format leaves out comes beside it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["0"])
    model = get_peft_model(network("plain"), config)  # pyright: ignore[reportArgumentType]
    model.add_adapter("two", config)
    model.set_adapter("two")
    model.base_model.model[3].requires_grad_(True)  # pyright: ignore
    wanted = [p for p in model.parameters() if p.requires_grad]
    private = make_private(
        model, torch.optim.SGD(wanted, lr=0.1), DataLoader(data()), method="dp-lora",
        max_grad_norm=1.0, privacy=NoiseMultiplier(1.0), delta=DELTA, sample_rate=0.2,
    )  # fmt: skip
    one_step(private)
    folder = private.release(tmp_path)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")}
    assert names == {"two/adapter_model.safetensors", "trained.safetensors"}
    head = load_file(folder / "trained.safetensors")
    assert set(head) == {"base_model.model.3.weight", "base_model.model.3.bias"}
    assert torch.equal(head["base_model.model.3.bias"], model.base_model.model[3].bias)  # pyright: ignore


def test_a_parameter_that_was_converted_is_refused() -> None:
    private = begin("dp-lora", "secure", None)
    batches = iter(private.data_loader)
    x, y = next(batches)
    private.model.to(torch.bfloat16)
    functional.cross_entropy(private.model(x.to(torch.bfloat16)), y).backward()
    with pytest.raises(UnsupportedLayerError, match="was converted to"):
        private.optimizer.step()


def test_a_ledger_that_went_on_with_less_noise_leaves_fewer_steps(tmp_path: Path) -> None:
    """The target is one on all that was paid; a count of lines would overrun it."""
    ledger = tmp_path / "ledger.jsonl"

    def begin_with(privacy: Any, **options: Any) -> PrivateTraining:
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        return make_private(
            model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data(), batch_size=4),
            method="dp-sgd", max_grad_norm=1.0, privacy=privacy, delta=DELTA, ledger=ledger,
            **options,
        )  # fmt: skip

    def steps(private: PrivateTraining, count: int) -> None:
        while count and private.steps_left() != 0:
            for x, y in private.data_loader:
                functional.cross_entropy(private.model(x), y).backward()
                private.optimizer.step()
                count -= 1
                if not count:
                    break
        private.close()

    limited = NoiseMultiplier(2.0, epsilon=4.0)
    first = begin_with(limited)
    allowed = first.steps_left()
    first_steps = 5
    loop = iter(first.data_loader)
    for _ in range(first_steps):
        x, y = next(loop)
        functional.cross_entropy(first.model(x), y).backward()
        first.optimizer.step()
    first.save(tmp_path / "checkpoint")
    first.close()
    steps(begin_with(NoiseMultiplier(1.2)), 10)
    resumed = begin_with(limited, resume=tmp_path / "checkpoint")
    left = resumed.steps_left()
    assert allowed is not None
    assert left is not None
    assert left < allowed - first_steps - 10
    steps(resumed, 10_000)
    assert resumed.bound().epsilon <= 4.0
