"""ε of one projected pair, against two-dimensional quadrature of its definition; CPU time.

``VectorProjection.epsilon`` solves for ε in both directions. The peer evaluates one δ(ε), by
nested adaptive quadrature over T and Q, which a search for ε would call ten times. Rounds are
interleaved, each in random order. Run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import functools
import math
import time

import numpy as np
from scipy import integrate, stats

from _measure import MIN_PAIRS, measure, ratio
from lora_privacy.dp import VectorFamily, VectorProjection

# m, r, ρ, ν, δ: small and large models, a common rank and a huge one, equal norms and not.
SHAPES = [
    (5, 3, 0.95, 1.0, 1e-2),
    (20, 10, 0.99, 1.05, 1e-5),
    (768, 8, 0.999, 1.0, 1e-5),
    (768, 64, 0.99, 1.1, 1e-5),
    (400, 400, 0.9, 1.0, 1e-2),
    (53_248, 4096, 0.9999, 1.0, 1e-5),
    (768, 8, 0.999, 1.1, 1e-5),
]
TARGET = 0.010  # seconds


def peer(m: int, r: int, rho: float, epsilon: float) -> float:
    """δ(ε) at equal norms, by nested quadrature."""
    k, c = m + r - 1, (m + 1 - r) / 2
    log_chi = -0.5 * k * math.log(2) - math.lgamma(k / 2)
    log_t = math.lgamma((r + 1) / 2) - math.lgamma(r / 2) - 0.5 * math.log(r * math.pi)
    low, high = stats.chi2.ppf(1e-14, k), stats.chi2.isf(1e-14, k)

    def inner(t: float) -> float:
        weight = math.exp(log_t - (r + 1) / 2 * math.log1p(t * t / r))
        ratio_ = rho + math.sqrt((1 - rho * rho) / r) * t
        if ratio_ <= 0:
            return weight

        def gain(q: float) -> float:
            loss = c * math.log(ratio_) + q / 2 * (1 / ratio_ - 1)
            density = math.exp(log_chi + (k / 2 - 1) * math.log(q) - q / 2)
            return -math.expm1(min(epsilon - loss, 0.0)) * density

        return integrate.quad(gain, low, high)[0] * weight

    return integrate.quad(inner, -80, 80, limit=200, points=[-8, 0, 8])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS)
    pairs = parser.parse_args().pairs
    works = {
        f"m={m} r={r} ρ={rho} ν={nu} δ={delta}": functools.partial(
            VectorProjection(m, r, rho, nu).epsilon, delta
        )
        for m, r, rho, nu, delta in SHAPES
    }
    seconds = measure(works, pairs)
    rng = np.random.default_rng(0)
    for name, values in seconds.items():
        medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
        low, high = np.quantile(medians, [0.025, 0.975])
        verdict = "met" if high <= 1.05 * TARGET else "missed"
        print(
            f"{name}: {1e3 * np.median(values):.2f} ms [{1e3 * low:.2f}, {1e3 * high:.2f}], "
            f"target {1e3 * TARGET:.0f} ms {verdict}"
        )
    law = VectorProjection(768, 8, 0.999)
    both = measure(
        {
            "ours": functools.partial(law.epsilon, 1e-5),
            "peer": functools.partial(peer, 768, 8, 0.999, 1.0),
        },
        max(pairs // 20, 5),
        warmup=1,
    )
    print(f"peer, one δ(ε): {1e3 * np.median(both['peer']):.0f} ms")
    print(f"our ε over one δ of the peer: {ratio(both['ours'], both['peer'])}")
    print(f"δ(1): ours {law.delta(1.0):.10g}, peer {peer(768, 8, 0.999, 1.0):.10g}")
    for family, delta in (
        (VectorFamily(768, 8, 0.999, (1.0, 1.05)), 1e-5),
        (VectorFamily(400, 400, 0.9, (0.9, 1.1)), 1e-2),
    ):
        started = time.process_time()
        bound = family.epsilon(delta)
        print(f"{family}: ε = {bound.epsilon:.4g}, {time.process_time() - started:.2f} s")


if __name__ == "__main__":
    main()
