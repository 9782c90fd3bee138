"""No accountant may print less than the certified lower end: 10⁴ random settings (make soundness).

Each setting is a ledger of one to three events and a δ. The Rényi bound, and the upper end of the
loss accountant, must be at or above its lower end; the first violation ends the run with an error.
"""

from __future__ import annotations

import argparse
import math
import sys

import numpy as np

from lora_privacy.dp import PldAccountant, RdpAccountant, SampledGaussian

SEED = 20240917


def setting(rng: np.random.Generator) -> tuple[list[tuple[SampledGaussian, int]], float]:
    """A ledger and a δ, spread evenly in logarithms."""
    ledger: list[tuple[SampledGaussian, int]] = []
    for _ in range(int(rng.integers(1, 4))):
        z = math.exp(rng.uniform(math.log(0.3), math.log(30)))
        p = min(1.0, math.exp(rng.uniform(math.log(1e-5), 0.5)))
        ledger.append((SampledGaussian(z, p), int(math.exp(rng.uniform(0, math.log(1e4))))))
    return ledger, math.exp(rng.uniform(math.log(1e-12), math.log(1e-2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    wide, closest = 0, math.inf
    for i in range(options.settings):
        ledger, delta = setting(rng)
        exact, renyi = PldAccountant(), RdpAccountant()
        for event, count in ledger:
            exact, renyi = exact.compose(event, count), renyi.compose(event, count)
        low, high = exact.epsilon_interval(delta)
        bound = renyi.epsilon(delta).epsilon
        if not low <= min(bound, high):
            sys.exit(f"unsound: {ledger}, δ = {delta!r}: lower {low!r}, upper {high!r}, {bound!r}")
        wide += high - low > 0.01 * high
        closest = min(closest, bound / low if low > 0 else math.inf)
        if (i + 1) % 500 == 0:
            print(f"{i + 1} settings, {wide} wider than 1 %, least RDP/lower {closest:.5f}")
    print(f"sound: {options.settings} settings, {wide} wider than 1 % of ε")


if __name__ == "__main__":
    main()
