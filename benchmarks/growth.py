"""How the cost grows with tokens, rank, layers, steps, distinct events and canaries.

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--parts tokens rank] [--rounds 10]

Each round runs all sizes of a part in random order. An exponent is the slope of least squares of
log time on log size within a round: the median over rounds with its bootstrap interval, once over
all sizes and once between the two largest, where what is fixed weighs least.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from opacus.grad_sample.linear import compute_linear_norm_sample
from torch import nn

from _measure import exponent, measure
from _results import Curve, Results
from _tasks import gpt2, opacus, ours, plain, with_flora, with_lora
from lora_privacy.audit import epsilon_one_run, exposure
from lora_privacy.core import RandomProjection
from lora_privacy.dp import (
    PldAccountant,
    RdpAccountant,
    SampledGaussian,
    sampled_gaussian_bounds,
)
from lora_privacy.training.samples import matrix_samples
from rmia import arguments, peak, sorting

Run = Callable[[], object]
Plan = Mapping[str, tuple[str, str, Mapping[int, Run]]]
"""Name of a work -> expected exponent, why, and the work at each size."""

ROUNDS = 10
DELTA = 1e-5
_SHORTEST = 2e-3  # CPU seconds that one measurement should last


def several(work: Run) -> tuple[Run, int]:
    """The work as often as one measurement needs, and how often that is."""
    work()
    start = time.process_time()
    work()
    times = max(1, math.ceil(_SHORTEST / max(time.process_time() - start, 1e-6)))

    def run() -> None:
        for _ in range(times):
            work()

    return run, times


def grow(results: Results, panel: str, size: str, plan: Plan, rounds: int) -> None:
    """Time every work of ``plan`` at every size; keep the curves and their exponents."""
    works: dict[str, Run] = {}
    times: dict[str, int] = {}
    for name, (_, _, sizes) in plan.items():
        for n, work in sizes.items():
            works[f"{name} {n}"], times[f"{name} {n}"] = several(work)
    seconds = measure(works, rounds, warmup=0)
    for name, (expected, comment, sizes) in plan.items():
        table = np.array([seconds[f"{name} {n}"] / times[f"{name} {n}"] for n in sizes])
        keep(results, panel, size, name, list(sizes), table, expected, comment, "s")


def keep(
    results: Results,
    panel: str,
    size: str,
    name: str,
    sizes: list[int],
    table: np.ndarray,
    expected: str,
    comment: str,
    unit: str,
) -> None:
    """A curve of ``table`` (sizes, rounds) and the rows of its exponents."""
    results.curves.append(
        Curve(
            part=panel, name=name, size=size, sizes=sizes, unit=unit,
            medians=[float(value) for value in np.median(table, axis=1)],
            expected=expected, comment=comment,
        )
    )  # fmt: skip
    for what, x, y in (
        (name, sizes, table),
        (f"{name}, between the two largest", sizes[-2:], table[-2:]),
    ):
        results.add("exponents", what, exponent(x, y), unit="exponent")


def part_tokens(results: Results, rounds: int) -> None:
    lengths = (32, 64, 128, 256, 512, 1024)
    torch.manual_seed(0)
    layer = nn.Linear(768, 16, bias=False)
    steps: dict[str, dict[int, Run]] = {"plain": {}, "dp-lora": {}, "ghost": {}}
    norms: dict[str, dict[int, Run]] = {"ours": {}, "ghost": {}}
    for length in lengths:
        task = with_lora(gpt2(length, 4, width=256), 16, ("c_attn",), head=False)
        steps["plain"][length] = plain(task).step
        steps["dp-lora"][length] = ours(task, "dp-lora", 1.0).step
        steps["ghost"][length] = opacus(task, "ghost", 1.0, False, 1.0).step
        x, g = torch.randn(4, length, 768), torch.randn(4, length, 16)
        norms["ours"][length] = lambda x=x, g=g: matrix_samples(x, g).square_norms()
        norms["ghost"][length] = lambda x=x, g=g: compute_linear_norm_sample(layer, [x], g)
    both = "linear maps give 1, attention 2"
    plan: Plan = {
        "plain LoRA step": ("1 to 2", both, steps["plain"]),
        "dp-lora step": ("1 to 2", "as the plain step: per-sample sums are linear maps too",
            steps["dp-lora"]),
        "Opacus ghost step": ("1 to 2", "Gram matrices add a T² of their own", steps["ghost"]),
        "per-sample norm of A": ("1", "one product T × 16 × 768 a sample", norms["ours"]),
        "per-sample norm of A, Opacus ghost": ("2", "T × T Gram matrices", norms["ghost"]),
    }  # fmt: skip
    grow(results, "tokens T", "T", plan, rounds)


def part_rank(results: Results, rounds: int) -> None:
    ranks = (4, 8, 16, 32, 64, 128)
    torch.manual_seed(0)
    x = torch.randn(4, 128, 768)
    works: dict[str, dict[int, Run]] = {"lora": {}, "flora": {}, "norm": {}, "draw": {}}
    for rank in ranks:
        task = with_lora(gpt2(128, 4, width=256), rank, ("c_attn",), head=False)
        works["lora"][rank] = ours(task, "dp-lora", 1.0).step
        task = with_flora(gpt2(128, 4, width=256), rank, ("c_attn",))
        works["flora"][rank] = ours(task, "dp-flora", 1.0).step
        g = torch.randn(4, 128, rank)
        works["norm"][rank] = lambda g=g: matrix_samples(x, g).square_norms()
        projection = RandomProjection(rank, 768, law="orthonormal", seed=0)
        works["draw"][rank] = functools.partial(projection.matrix, 1)
    plan: Plan = {
        "dp-lora step": ("0 to 1", "the frozen model hides what is linear in r", works["lora"]),
        "dp-flora step": ("0 to 1", "the same, and the draw of A", works["flora"]),
        "per-sample norm of A": ("1", "one product 128 × r × 768 a sample", works["norm"]),
        "an orthonormal A, 768 wide": ("1 to 2", "numbers are r · 768, their QR r² · 768",
            works["draw"]),
    }  # fmt: skip
    grow(results, "rank r", "r", plan, rounds)


def part_layers(results: Results, rounds: int) -> None:
    blocks = (1, 2, 4, 8, 16)
    works: dict[str, dict[int, Run]] = {"plain": {}, "lora": {}, "flora": {}}
    for count in blocks:
        task = with_lora(gpt2(64, 4, count, 128), 8, ("c_attn", "c_fc"), head=False)
        works["plain"][count] = plain(task).step
        works["lora"][count] = ours(task, "dp-lora", 1.0).step
        task = with_flora(gpt2(64, 4, count, 128), 8, ("c_attn", "c_fc"))
        works["flora"][count] = ours(task, "dp-flora", 1.0).step
    why = "embeddings and the head are fixed"
    plan: Plan = {
        "plain LoRA step": ("1", why, works["plain"]),
        "dp-lora step": ("1", why, works["lora"]),
        "dp-flora step": ("1", why, works["flora"]),
    }
    grow(results, "blocks of GPT-2, two layers each", "blocks", plan, rounds)


def part_steps(results: Results, rounds: int) -> None:
    steps = tuple(10**k for k in range(7))
    event = SampledGaussian(1.0, 1e-3)

    def epsilon_of(
        empty: RdpAccountant | PldAccountant,
    ) -> dict[int, Run]:
        return {n: lambda n=n: empty.compose(event, n).epsilon(DELTA) for n in steps}

    plan: Plan = {
        "ε by Rényi divergences": ("0", "a count multiplies", epsilon_of(RdpAccountant())),
        "ε by loss distributions": ("0 to 1/2",
            "a power of the transform, on a window that widens with √steps; one needs no grid",
            epsilon_of(PldAccountant())),
    }  # fmt: skip
    grow(results, "steps, all alike", "steps", plan, rounds)


def part_events(results: Results, rounds: int) -> None:
    counts = (1, 4, 16, 64, 256, 1024)
    noises = np.random.default_rng(0).uniform(0.5, 5.0, max(counts))
    events = [SampledGaussian(float(z), 0.01) for z in noises]

    def one_by_one(n: int) -> RdpAccountant:
        accountant = RdpAccountant()
        for event in events[:n]:
            accountant = accountant.compose(event)
        return accountant

    def ledger(n: int) -> tuple[tuple[SampledGaussian, int], ...]:
        return tuple((event, 10) for event in events[:n])

    rdp = {n: RdpAccountant(events=ledger(n)) for n in counts}
    pld = {n: PldAccountant(events=ledger(n)) for n in counts[:-1]}
    plan: Plan = {
        "ε by Rényi divergences": ("0 to 1", "a divergence an event, but one call for all",
            {n: lambda n=n: rdp[n].epsilon(DELTA) for n in counts}),
        "ε by loss distributions": ("1 to 2", "a transform an event, on a window that widens",
            {n: lambda n=n: pld[n].epsilon(DELTA) for n in pld}),
        "ε of so many runs in one call": ("0 to 1", "numpy's cost a call is shared",
            {n: lambda n=n: sampled_gaussian_bounds(noises[:n], 0.01, steps=1000, delta=DELTA)
                for n in counts}),
        "a ledger by one compose an event": ("2", "each value copies the ledger before it",
            {n: lambda n=n: one_by_one(n) for n in counts}),
    }  # fmt: skip
    grow(results, "distinct events", "events", plan, rounds)


def part_canaries(results: Results, rounds: int) -> None:
    counts = tuple(10**k for k in range(2, 6))
    rng = np.random.default_rng(0)
    scores = rng.standard_normal(max(counts))
    given = {n: arguments(n) for n in counts}

    def one_run(n: int) -> object:
        return epsilon_one_run(
            canaries=n, guesses=n // 2, correct=int(0.4 * n), delta=DELTA, significance=0.05
        )

    plan: Plan = {
        "one-run audit": ("1", "the δ term sums over right guesses",
            {n: functools.partial(one_run, n) for n in counts}),
        "exposure by rank": ("1", "one comparison an alternative",
            {n: lambda n=n: exposure(3.0, scores[:n], space=10**6) for n in counts}),
        "exposure by a skew-normal law": ("0 to 1", "a fit, whose number of rounds varies",
            {n: lambda n=n: exposure(3.0, scores[:n], space=10**6, method="skew-normal")
                for n in counts[1:]}),
        "RMIA, time": ("1", "a sort: N log N",
            {n: functools.partial(sorting, given[n], 0.3) for n in counts}),
    }  # fmt: skip
    grow(results, "canaries, alternatives or members", "number", plan, rounds)
    table = np.array([[peak(functools.partial(sorting, given[n], 0.3))] for n in counts])
    keep(
        results, "canaries, alternatives or members", "number", "RMIA, memory", list(counts),
        table, "1", "sorted ratios; no N × Z matrix", "MB",
    )  # fmt: skip


PARTS: dict[str, Callable[[Results, int], None]] = {
    "tokens": part_tokens,
    "rank": part_rank,
    "layers": part_layers,
    "steps": part_steps,
    "events": part_events,
    "canaries": part_canaries,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="How costs grow.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.parts or PARTS:
        results = Results(f"growth-{name}")
        PARTS[name](results, options.rounds)
        results.save()


if __name__ == "__main__":
    main()
