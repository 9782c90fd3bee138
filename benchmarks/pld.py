"""ε of a ledger of 200 noise multipliers, 10 steps each: both certified ends, against peers.

dp-accounting needs two passes for two ends (pessimistic and optimistic), on a grid that the user
picks; Opacus' PRV accountant returns both, of an error that the user picks; here one call returns
both within 1 % of ε. A round times all in random order, CPU seconds. The peers' widths stand
beside ours, since only at an equal or better width the comparison is fair.
Run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as peer
from opacus.accountants import PRVAccountant

from _measure import measure, median, ratio
from _results import Results
from lora_privacy.dp import PldAccountant, SampledGaussian

RATE, STEPS, DELTA, RUNS = 0.01, 10, 1e-5, 200
PRV_ERROR = 0.01  # in nats; the default of Opacus
SEED = 20240917


def ours(noises: np.ndarray) -> tuple[float, float]:
    accountant = PldAccountant()
    for z in noises:
        accountant = accountant.compose(SampledGaussian(float(z), RATE), STEPS)
    return accountant.epsilon_interval(DELTA)


def one_end(noises: np.ndarray, grid: float, *, pessimistic: bool) -> float:
    total = None
    for z in noises:
        one = peer.from_gaussian_mechanism(
            float(z),
            sampling_prob=RATE,
            value_discretization_interval=grid,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        ).self_compose(STEPS)
        total = one if total is None else total.compose(one)
    if total is None:
        raise ValueError("noises must not be empty")
    return total.get_epsilon_for_delta(DELTA)


def dp_accounting(noises: np.ndarray, grid: float) -> tuple[float, float]:
    return one_end(noises, grid, pessimistic=False), one_end(noises, grid, pessimistic=True)


def prv(noises: np.ndarray) -> tuple[float, float]:
    accountant = PRVAccountant()
    accountant.history = [(float(z), RATE, STEPS) for z in noises]
    error = DELTA / 1000  # as ``get_epsilon``, which returns the upper end alone
    found = accountant._get_dprv(eps_error=PRV_ERROR, delta_error=error)
    low, _, high = found.compute_epsilon(DELTA, error, PRV_ERROR)
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="a round takes minutes")
    parser.add_argument("--runs", type=int, default=RUNS, help="distinct noise multipliers")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    noises = np.random.default_rng(SEED).uniform(0.5, 5.0, options.runs)
    works: dict[str, Callable[[np.ndarray], tuple[float, float]]] = {
        "ours": ours,
        "dp-accounting, grid 1e-3": functools.partial(dp_accounting, grid=1e-3),
        "dp-accounting, grid 1e-4": functools.partial(dp_accounting, grid=1e-4),
        "Opacus PRV": prv,
    }
    ends: dict[str, tuple[float, float]] = {}

    def run(name: str) -> None:
        ends[name] = works[name](noises)

    seconds = measure({name: functools.partial(run, name) for name in works}, options.rounds,
        warmup=0)  # fmt: skip
    results = Results("pld")
    part = (
        f"ε of {options.runs} noise multipliers × {STEPS} steps by loss distributions, both "
        "certified ends"
    )
    own_low, own_high = ends["ours"]
    for name, (low, high) in ends.items():
        if low > own_high or high < own_low:
            raise SystemExit(f"{name} certifies [{low}, {high}], ours [{own_low}, {own_high}].")
        results.add(part, name, median(seconds[name]), unit="s")
        width = np.array([100 * (high - low) / high])
        results.add(part, f"{name}, width of the certified interval", median(width), unit="% of ε")
    for name in list(works)[1:]:
        results.add(
            part, "ours", ratio(seconds[name], seconds["ours"]), peer=name, unit="faster",
            smaller_is_better=False,
        )  # fmt: skip
    results.save()


if __name__ == "__main__":
    main()
