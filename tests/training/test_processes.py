"""Two processes that train one model: the same steps as one, one noise, one ledger."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import process_runs
import pytest
from scipy import stats

from lora_privacy.dp import PldAccountant, ProjectedGaussian, SampledGaussian

SCRIPT = Path(process_runs.__file__)
LEVEL = 1e-6


def run(folder: Path, what: str) -> list[dict[str, Any]]:
    """Results of both processes; None of one that ended early."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(rank), "2", what],
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(processes):
        _, errors = process.communicate(timeout=600)
        wanted = 9 if (what, rank) == ("death", 1) else 0
        assert process.returncode == wanted, errors.decode()
    return [
        dict(np.load(path)) if (path := folder / f"{what}-{rank}.npz").exists() else {}
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    return folder, run(folder, "all")


@pytest.mark.parametrize("part", [None, 4])
@pytest.mark.parametrize("method", process_runs.METHODS)
def test_two_processes_take_the_steps_of_one(
    together: tuple[Path, list[dict[str, Any]]], method: str, part: int | None
) -> None:
    """Without noise, on the same global batch; 1e-6. Both begin at the weights of the first."""
    alone = process_runs.quiet(method, False, 0, part)
    ranks = [
        {k: found[f"{method}-{part}-{k}"] for k in ("weights", "steps")} for found in together[1]
    ]
    start = np.concatenate(
        [p.detach().numpy().ravel() for p in process_runs.model_for(method).parameters()]
    )
    assert alone["steps"] == ranks[0]["steps"] == ranks[1]["steps"] == process_runs.EPOCHS
    np.testing.assert_array_equal(ranks[0]["weights"], ranks[1]["weights"])
    np.testing.assert_allclose(ranks[0]["weights"], alone["weights"], rtol=1e-6, atol=1e-6)
    assert not np.isin(alone["weights"], start).any()  # it moved


def test_one_noise_is_drawn_for_all(together: tuple[Path, list[dict[str, Any]]]) -> None:
    """χ² at level 1e-6; two draws (variance times 2), and 6 % in σ, are rejected."""
    first, second = (found["noise"] for found in together[1])
    np.testing.assert_array_equal(first, second)
    std = process_runs.NOISE_MULTIPLIER / (process_runs.NOISE_RATE * process_runs.RECORDS) * 1.001
    law = stats.chi2(first.size)

    def accepted(scale: float) -> bool:
        total = float(np.square(first / (std * scale)).sum())
        return law.ppf(LEVEL / 2) < total < law.isf(LEVEL / 2)

    assert accepted(1.0)
    assert not accepted(2**0.5)
    assert not accepted(0.5**0.5)
    assert not accepted(1.06)
    # No step's noise comes again; a few numbers of 24 bits coincide.
    assert len(np.unique(first)) > 0.99 * first.size


def test_the_rate_is_that_of_the_whole_job(together: tuple[Path, list[dict[str, Any]]]) -> None:
    """Each record is drawn by one process, with probability q; level 1e-6. q/2 is rejected."""
    coins = [found["coins"] for found in together[1]]
    assert not (coins[0] & coins[1]).any()
    owners = [set(np.flatnonzero(c.any(0))) for c in coins]
    assert owners[0] & owners[1] == set()
    assert owners[0] | owners[1] == set(range(process_runs.RECORDS))
    drawn, tossed = int((coins[0] | coins[1]).sum()), coins[0].size
    q = process_runs.NOISE_RATE
    assert stats.binomtest(drawn, tossed, q).pvalue > LEVEL
    assert stats.binomtest(drawn, tossed, q / 2).pvalue < LEVEL


def test_the_bound_is_that_of_one_process(together: tuple[Path, list[dict[str, Any]]]) -> None:
    event = SampledGaussian(process_runs.NOISE_MULTIPLIER, process_runs.NOISE_RATE)
    for found in together[1]:
        wanted = PldAccountant().compose(event, int(found["steps"])).epsilon(process_runs.DELTA)
        assert float(found["epsilon"]) == wanted.epsilon


def test_empty_shares_and_a_resume_keep_the_processes_together(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    """dp-flora, batches of one record: no process waits in vain, and one ledger goes on."""
    folder, (first, second) = together
    np.testing.assert_array_equal(first["sparse-weights"], second["sparse-weights"])
    assert int(first["sparse-steps"]) == int(second["sparse-steps"]) == 40
    event = ProjectedGaussian(layers=[(5, 5)], noise_multiplier=1.0, sample_rate=0.05)
    wanted = PldAccountant().compose(event, 40).epsilon(process_runs.DELTA).epsilon
    assert float(first["sparse-epsilon"]) == float(second["sparse-epsilon"]) == wanted
    assert len((folder / "ledger-0.jsonl").read_text().splitlines()) == 41
    assert not (folder / "ledger-1.jsonl").exists()


def test_what_does_not_fit_is_refused_by_name(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    for found in together[1]:
        assert "ProcessError" in str(found["unsaid"])
        assert "distributed=True to train one model together" in str(found["unsaid"])
        assert "Process 1 has what it trains" in str(found["clip"])
        assert "UnsupportedTrainingError" in str(found["seeds"])
        assert "Process 1 has the optimizer = " in str(found["rate"])
        assert "Process 1 has the records = " in str(found["order"])
        assert "Process 1 has the model's tensors" in str(found["model"])
        assert "TrainingOrderError: A batch was left under way" in str(found["left"])
    assert [int(found["own"]) for found in together[1]] == [21, 20]


def test_dp_flora_sends_compressed_sums_only(
    together: tuple[Path, list[dict[str, Any]]],
) -> None:
    found = together[1][0]
    assert int(found["dp-lora-None-sent"]) == int(found["dp-lora-None-trained"])
    assert int(found["dp-flora-None-sent"]) == 2 * 5


def test_a_death_ends_the_others_and_leaves_no_step_uncounted(tmp_path: Path) -> None:
    (first, _) = run(tmp_path, "death")
    assert "lost the others" in str(first["message"])
    assert "Start all of them again" in str(first["message"])
    assert not first["moved"]
    # Two steps were taken; the third, to which the dead process sent nothing, was not released.
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 1 + 2
