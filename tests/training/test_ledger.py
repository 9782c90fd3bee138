"""The ledger: what it counts, what survives, what it refuses."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_privacy.dp import PldAccountant, ProjectionAttestation, SampledGaussian
from lora_privacy.errors import AttestationError, FolderInUseError, LedgerError
from lora_privacy.training.ledger import Ledger, Mechanism, Release

PLAIN = Mechanism(adjacency="add-remove")
PROJECTED = Mechanism(adjacency="add-remove", layers=((16, 2),))


def release(step: int, run: str = "a", **changes: Any) -> Release:
    base = Release(run=run, step=step, noise_multiplier=1.0, sample_rate=0.1)
    return replace(base, **changes)


def attested(turn: int, digest: str | None = None) -> ProjectionAttestation:
    return ProjectionAttestation(
        step=turn,
        law="orthonormal",
        layers=((16, 2),),
        seed_digest=f"{turn:064x}",
        matrix_digest=digest or f"{turn + 1000:064x}",
        clipped_whole=True,
        noised_whole=True,
        factors_reset=True,
        all_projected=True,
    )


def test_every_release_costs_what_the_accountant_says() -> None:
    """Oracle: the accountant itself, told the same by hand."""
    ledger = Ledger(PLAIN)
    for step in range(7):
        ledger.charge(release(step, noise_multiplier=1.0 if step < 4 else 2.0))
    wanted = PldAccountant().compose(SampledGaussian(1.0, 0.1), 4)
    wanted = wanted.compose(SampledGaussian(2.0, 0.1), 3)
    assert ledger.accountant().epsilon(1e-5).epsilon == wanted.epsilon(1e-5).epsilon
    assert len(ledger) == 7
    assert ledger.reached("a") == 7
    assert ledger.reached("b") == 0


def test_a_replay_is_free_and_another_release_under_its_name_is_refused() -> None:
    ledger = Ledger(PLAIN)
    ledger.charge(release(0))
    ledger.charge(release(0))
    ledger.charge(release(0, run="b"))
    assert len(ledger) == 2
    assert not ledger.seed_known
    with pytest.raises(LedgerError, match="released before"):
        ledger.charge(release(0, noise_multiplier=2.0))
    ledger.charge(release(1, sum_digest="12"))
    with pytest.raises(LedgerError, match="One noise must not cover two sums"):
        ledger.charge(release(1, sum_digest="13"))
    assert ledger.seed_known


def test_it_is_on_disk_before_charge_returns_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    ledger = Ledger(PLAIN, path)
    for step in range(3):
        ledger.charge(release(step))
        assert len(path.read_text().splitlines()) == step + 2
    ledger.close()
    again = Ledger(PLAIN, path)
    assert list(again) == [release(step) for step in range(3)]
    again.charge(release(3, run="b"))
    again.close()
    assert len(Ledger(PLAIN, path)) == 4


def test_a_line_that_was_cut_off_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(PLAIN, path)
    ledger.charge(release(0))
    ledger.close()
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[1][:20])
    again = Ledger(PLAIN, path)
    assert len(again) == 1
    again.charge(release(1))
    again.close()
    assert len(Ledger(PLAIN, path)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2"),
        ('{"run": "a"}', "Line 2"),
        (json.dumps({"run": 1, "step": 0, "noise_multiplier": 1.0, "sample_rate": 0.1,
                     "attestation": None}), "Line 2"),
        (json.dumps({"run": "a", "step": 0, "noise_multiplier": 0.0, "sample_rate": 0.1,
                     "attestation": None}), "noise_multiplier"),
    ],
)  # fmt: skip
def test_damage_is_an_error(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(PLAIN, path).close()
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(LedgerError, match=message):
        Ledger(PLAIN, path)


def test_another_mechanism_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    Ledger(PLAIN, path).close()
    for other in (PROJECTED, Mechanism(adjacency="replace")):
        with pytest.raises(LedgerError, match="no ledger of this mechanism"):
            Ledger(other, path)
    (tmp_path / "foreign").write_text("hello\n")
    with pytest.raises(LedgerError, match="hello"):
        Ledger(PLAIN, tmp_path / "foreign")


def _charge_once(path: str, queue: Any) -> None:
    try:
        Ledger(PLAIN, path).charge(release(0, run="other"))
    except FolderInUseError as error:
        queue.put(str(error))
    else:
        queue.put("entered")


def test_two_processes_cannot_write_to_one_ledger(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(PLAIN, path)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for held, wanted in ((True, "Another process writes"), (False, "entered")):
        if not held:
            ledger.close()
        process = context.Process(target=_charge_once, args=(str(path), queue))
        process.start()
        assert wanted in queue.get(timeout=60)
        process.join()


def test_a_projection_needs_an_attestation_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(PROJECTED, path)
    ledger.charge(release(0, attestation=attested(0)))
    ledger.charge(release(0, attestation=attested(0)))  # drawn again
    with pytest.raises(AttestationError, match="must return a ProjectionAttestation"):
        ledger.charge(release(1))
    with pytest.raises(AttestationError, match="A is one that an earlier step has used"):
        ledger.charge(release(1, attestation=attested(1, f"{1000:064x}")))
    with pytest.raises(LedgerError, match="released before"):
        ledger.charge(release(0, attestation=replace(attested(0), matrix_digest=f"{7:064x}")))
    ledger.charge(release(1, attestation=attested(1)))
    ledger.close()
    again = Ledger(PROJECTED, path)
    assert len(again) == 2
    plain = PldAccountant().compose(SampledGaussian(1.0, 0.1), 2).epsilon(1e-5).epsilon
    assert 0 < again.accountant().epsilon(1e-5).epsilon < plain


def test_a_ledger_in_memory_can_be_put_into_a_new_file_only(tmp_path: Path) -> None:
    ledger = Ledger(PLAIN)
    ledger.charge(release(0))
    ledger.attach(tmp_path / "a.jsonl")
    ledger.charge(release(1))
    ledger.close()
    assert len(Ledger(PLAIN, tmp_path / "a.jsonl")) == 2
    other = Ledger(PLAIN)
    other.charge(release(0, run="c"))
    with pytest.raises(LedgerError, match="another ledger"):
        other.attach(tmp_path / "a.jsonl")
