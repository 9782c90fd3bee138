"""ε of a ledger of 200 noise multipliers, 10 steps each: both certified ends, against a peer.

dp-accounting needs two passes for two ends (pessimistic and optimistic), on a grid that the user
picks; here one call returns both. A round times all in random order, CPU seconds; the peer's width
at each grid is printed beside ours, so the comparison is at equal or better width.
Run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as peer

from _measure import measure, ratio
from lora_privacy.dp import PldAccountant, SampledGaussian

RATE, STEPS, DELTA, RUNS = 0.01, 10, 1e-5, 200
SEED = 20240917


def ours(noises: np.ndarray) -> tuple[float, float]:
    accountant = PldAccountant()
    for z in noises:
        accountant = accountant.compose(SampledGaussian(float(z), RATE), STEPS)
    return accountant.epsilon_interval(DELTA)


def theirs(noises: np.ndarray, grid: float, *, pessimistic: bool) -> float:
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


def both_ends(noises: np.ndarray, grid: float) -> tuple[float, float]:
    return theirs(noises, grid, pessimistic=False), theirs(noises, grid, pessimistic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--runs", type=int, default=RUNS, help="distinct noise multipliers")
    parser.add_argument("--grid", type=float, default=1e-4, help="of the peer")
    options = parser.parse_args()
    noises = np.random.default_rng(SEED).uniform(0.5, 5.0, options.runs)

    for name, (low, high) in {
        "ours": ours(noises),
        f"dp-accounting, grid {options.grid:g}": both_ends(noises, options.grid),
    }.items():
        print(f"{name}: [{low:.5f}, {high:.5f}], width {100 * (high - low) / high:.3f} % of ε")
    seconds = measure(
        {
            "ours": lambda: ours(noises),
            "peer": lambda: both_ends(noises, options.grid),
        },
        pairs=options.rounds,
        warmup=0,
    )
    for name, spent in seconds.items():
        print(f"{name}: {np.median(spent):.2f} s of CPU for both ends")
    print(f"dp-accounting over ours: {ratio(seconds['peer'], seconds['ours'])}")


if __name__ == "__main__":
    main()
