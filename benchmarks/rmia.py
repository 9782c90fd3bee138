"""RMIA by sorting, against the full matrix of comparisons; CPU time and memory in one run.

    OMP_NUM_THREADS=1 python benchmarks/rmia.py [--pairs 100]

10,000 samples, 10,000 population points, 16 references, offline and online. The peer computes the
same ratios and then compares all N·Z pairs, at once or in blocks of rows. Memory is the peak that
numpy allocates beside the arguments (tracemalloc) and, in a fresh process, the whole of it
(ru_maxrss). Targets: at most 5 s and 500 MB; ``growth.py`` shows how both grow.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from _measure import MIN_PAIRS, measure, median, ratio
from _results import Results
from lora_privacy.audit.membership import rmia

SIZE, REFERENCES, BLOCK = 10_000, 16, 100
SEED = 20240917
BUDGET = 30.0  # CPU seconds of one mode
CHILD = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
from rmia import arguments, rmia
imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rmia(**arguments(), mode="offline", a=0.3)
unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
print(json.dumps([n / unit for n in
    (imports, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)]))
"""


def arguments(size: int = SIZE) -> dict[str, Any]:
    """Log-probabilities whose logits have noise 1 about common centres, and 1 more where IN."""
    rng = np.random.default_rng(SEED)
    half = np.tile(np.arange(REFERENCES)[:, None] < REFERENCES // 2, size)
    members = np.vstack([rng.random(size) < 0.5, rng.permuted(half, axis=0)])

    def log_probs(shift: np.ndarray | float) -> np.ndarray:
        phi = rng.normal(0, 2, size) + rng.standard_normal((REFERENCES + 1, size)) + shift
        return -np.logaddexp(0.0, -phi)

    x, z = log_probs(members), log_probs(0.0)
    return {
        "log_probs": x[0],
        "reference_log_probs": x[1:],
        "reference_members": members[1:],
        "population_log_probs": z[0],
        "population_reference_log_probs": z[1:],
    }


def log_ratios(given: dict[str, Any], a: float | None) -> tuple[np.ndarray, np.ndarray]:
    """ln(p / Pr) of the samples and of the population."""

    def log_mean(log_probs: np.ndarray, counted: np.ndarray) -> np.ndarray:
        total = np.logaddexp.reduce(log_probs, axis=0, where=counted, initial=-np.inf)
        return total - np.log(counted.sum(axis=0))

    members = given["reference_members"]
    x = log_mean(given["reference_log_probs"], ~members)
    z = log_mean(given["population_reference_log_probs"], np.ones_like(members))
    if a is None:
        inside = log_mean(given["reference_log_probs"], members)
        x = np.logaddexp(x, inside) - math.log(2)
    else:
        constant = math.log((1 - a) / 2)
        x, z = (np.logaddexp(v + math.log((1 + a) / 2), constant) for v in (x, z))
    return given["log_probs"] - x, given["population_log_probs"] - z


def full_matrix(given: dict[str, Any], a: float | None) -> np.ndarray:
    x, z = log_ratios(given, a)
    return np.mean(x[:, None] - z >= 0, axis=1)


def in_blocks(given: dict[str, Any], a: float | None) -> np.ndarray:
    x, z = log_ratios(given, a)
    rows = (x[i : i + BLOCK, None] for i in range(0, len(x), BLOCK))
    return np.concatenate([np.mean(row - z >= 0, axis=1) for row in rows])


def sorting(given: dict[str, Any], a: float | None) -> np.ndarray:
    return rmia(**given, mode="online" if a is None else "offline", a=a)


def peak(work: Callable[[], object]) -> float:
    """MB that numpy and Python allocate at once during ``work``."""
    tracemalloc.start()
    work()
    found = tracemalloc.get_traced_memory()[1] / (1 << 20)
    tracemalloc.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS)
    pairs = parser.parse_args().pairs
    # First of all: on Linux a child starts from the peak of its parent.
    out = subprocess.run(
        [sys.executable, "-c", CHILD, sys.path[0]], check=True, capture_output=True, text=True
    )
    imports, whole = json.loads(out.stdout)
    results = Results("rmia")
    part = f"RMIA, {SIZE:,} members × {SIZE:,} population points, {REFERENCES} references"
    given = arguments()
    for mode, a in (("offline", 0.3), ("online", None)):
        works: dict[str, Callable[[], np.ndarray]] = {
            "by sorting": functools.partial(sorting, given, a),
            "full matrix": functools.partial(full_matrix, given, a),
            "full matrix by blocks of rows": functools.partial(in_blocks, given, a),
        }
        expected = works["full matrix"]()
        for work in works.values():
            if not np.array_equal(work(), expected):
                raise SystemExit(f"{mode}: the scores differ from the full matrix")
        title = f"{part}, {mode}"
        for name, work in works.items():
            own = median(np.array([peak(work)]))
            results.add(title, f"{name}, peak beside the arguments", own, unit="MB")
        seconds = measure(works, pairs, warmup=1, budget=BUDGET)
        for name, values in seconds.items():
            results.add(title, name, median(values), unit="s")
        for name in list(works)[1:]:
            results.add(
                title, "by sorting", ratio(seconds[name], seconds["by sorting"]), peer=name,
                unit="faster", smaller_is_better=False,
            )  # fmt: skip
    title = f"{part}, offline"
    for name, size in {"imports": imports, "the whole process": whole}.items():
        results.add(title, f"memory of {name}", median(np.array([size])), unit="MB")
    results.save()


if __name__ == "__main__":
    main()
