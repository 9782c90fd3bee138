"""ε of one projected pair, against two-dimensional quadrature of its definition; CPU time.

``VectorProjection.epsilon`` solves for ε in both directions. The peer evaluates one δ(ε), by
nested adaptive quadrature over T and Q, which a search for ε would call ten times. Rounds are
interleaved, each in random order. Run with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import functools
import math

import numpy as np
from scipy import integrate, stats

from _measure import MIN_PAIRS, measure, median, ratio
from _results import Results
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
FAMILIES = {
    "768 inputs, rank 8, cosine from 0.999, norms to 1 : 1.05": (
        VectorFamily(768, 8, 0.999, (1.0, 1.05)), 1e-5,
    ),
    "400 inputs, rank 400, cosine from 0.9, norms 1 : 0.9 to 1 : 1.1": (
        VectorFamily(400, 400, 0.9, (0.9, 1.1)), 1e-2,
    ),
}  # fmt: skip


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
    results = Results("pairwise")
    works = {
        f"{m:,} inputs, rank {r:,}, cosine {rho:g}, "
        + ("equal norms" if nu == 1 else f"norms 1 : {nu:g}"): functools.partial(
            VectorProjection(m, r, rho, nu).epsilon, delta
        )
        for m, r, rho, nu, delta in SHAPES
    }
    part = "VectorProjection.epsilon, both directions"
    for name, values in measure(works, pairs).items():
        results.add(part, name, median(1e3 * values), unit="ms")
    law, few = VectorProjection(768, 8, 0.999), max(pairs // 20, 3)
    both = measure(
        {
            "ours": functools.partial(law.epsilon, 1e-5),
            "peer": functools.partial(peer, 768, 8, 0.999, 1.0),
        },
        few,
        warmup=1,
    )
    part = "ε of one pair over one δ(ε) by two-dimensional quadrature, 768 inputs, rank 8"
    error = abs(law.delta(1.0) / peer(768, 8, 0.999, 1.0) - 1)
    results.add(part, "quadrature", median(1e3 * both["peer"]), unit="ms")
    results.add(part, "ours", ratio(both["ours"], both["peer"]), peer="quadrature")
    results.add(part, "relative difference of δ(1)", median(np.array([error])), unit="–")
    part = "VectorFamily.epsilon, a certified maximum"
    works = {
        name: functools.partial(family.epsilon, delta)
        for name, (family, delta) in FAMILIES.items()
    }
    for name, values in measure(works, few, warmup=1).items():
        results.add(part, name, median(values), unit="s")
    results.save()


if __name__ == "__main__":
    main()
