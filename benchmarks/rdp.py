"""ε of 200 noise multipliers: this library against Opacus and dp-accounting, on the same orders.

One process, interleaved, CPU time: each round draws 200 distinct noise multipliers, solves them
here in one call, and times the peers on a few of them, in random order; a ratio is per multiplier.
Run with OMP_NUM_THREADS=1 (``make bench``).
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant as peer
from opacus.accountants import RDPAccountant as OpacusAccountant

from _measure import median
from _results import Results
from lora_privacy.dp import RdpAccountant, SampledGaussian, sampled_gaussian_bounds

ORDERS = tuple(float(order) for order in OpacusAccountant.DEFAULT_ALPHAS)
RATE, STEPS, DELTA = 0.01, 1000, 1e-5
RUNS = 200


def ours(noises: np.ndarray) -> list[float]:
    bounds = sampled_gaussian_bounds(noises, RATE, steps=STEPS, delta=DELTA, orders=ORDERS)
    return [bound.epsilon for bound in bounds]


def ours_any_order(noises: np.ndarray) -> list[float]:
    bounds = sampled_gaussian_bounds(noises, RATE, steps=STEPS, delta=DELTA)
    return [bound.epsilon for bound in bounds]


def ours_one_by_one(noises: np.ndarray) -> list[float]:
    empty = RdpAccountant(orders=ORDERS)
    return [
        empty.compose(SampledGaussian(float(z), RATE), STEPS).epsilon(DELTA).epsilon
        for z in noises
    ]


def our_ledger(noises: np.ndarray) -> list[float]:
    events = tuple((SampledGaussian(float(z), RATE), STEPS) for z in noises)
    return [RdpAccountant(orders=ORDERS, events=events).epsilon(DELTA).epsilon]


def opacus_ledger(noises: np.ndarray) -> list[float]:
    accountant = OpacusAccountant()
    accountant.history = [(float(z), RATE, STEPS) for z in noises]
    return [accountant.get_epsilon(DELTA)]


def opacus(noises: np.ndarray) -> list[float]:
    found = []
    for z in noises:
        accountant = OpacusAccountant()
        accountant.history = [(float(z), RATE, STEPS)]
        found.append(accountant.get_epsilon(DELTA))
    return found


def dp_accounting(noises: np.ndarray) -> list[float]:
    found = []
    for z in noises:
        cost = STEPS * peer._compute_rdp_poisson_subsampled_gaussian(RATE, float(z), ORDERS)
        found.append(peer.compute_epsilon(ORDERS, cost, DELTA)[0])
    return found


def timed(solve: Callable[[np.ndarray], list[float]], noises: np.ndarray) -> float:
    """CPU seconds a multiplier."""
    started = time.process_time()
    solve(noises)
    return (time.process_time() - started) / len(noises)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--peer-runs", type=int, default=4, help="multipliers a peer gets a round")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(20240917)
    results = Results("rdp")
    part = "ε of 200 noise multipliers by Rényi divergences, the same orders"

    # dp-accounting's series at fractional orders drops signs: no oracle to 1e-9.
    noises = rng.uniform(0.5, 5.0, RUNS)
    above = np.array(ours(noises)) - np.array(opacus(noises))
    for name, gap in {"below": max(0.0, -above.min()), "above": max(0.0, above.max())}.items():
        results.add(part, f"nats {name} Opacus, at most", median(np.array([gap])), unit="–")

    jobs = {
        "one call": (ours, RUNS),
        "one call, any order": (ours_any_order, RUNS),
        "one by one": (ours_one_by_one, options.peer_runs),
        "one ledger of all": (our_ledger, RUNS),
        "Opacus": (opacus, options.peer_runs),
        "Opacus, a ledger": (opacus_ledger, options.peer_runs),
        "dp-accounting": (dp_accounting, options.peer_runs),
    }
    spent = {name: np.empty(options.rounds) for name in jobs}
    for i in range(options.rounds):
        noises = rng.uniform(0.5, 5.0, RUNS)
        for name in rng.permutation(list(jobs)):
            solve, runs = jobs[name]
            spent[name][i] = timed(solve, noises[:runs])
    for name, seconds in spent.items():
        results.add(part, name, median(1e3 * seconds), unit="ms a multiplier")
    for name in ("one call", "one call, any order", "one by one"):
        for other in ("Opacus", "dp-accounting"):
            results.add(
                part, name, median(spent[other] / spent[name]), peer=other, unit="faster",
                smaller_is_better=False,
            )  # fmt: skip
    results.add(
        part, "one ledger of all", median(spent["Opacus, a ledger"] / spent["one ledger of all"]),
        peer="Opacus, a ledger", unit="faster", smaller_is_better=False,
    )  # fmt: skip
    results.save()


if __name__ == "__main__":
    main()
