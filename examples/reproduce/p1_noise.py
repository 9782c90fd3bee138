"""P1 (arXiv:2409.17538, versions 2-3): variance, distance to a Gaussian, and the implied ε.

    python examples/reproduce/p1_noise.py

Writes docs/reproduction/p1-noise.json and the figures docs/figures/p1_tv.* and p1_gradients.*;
docs/reproduction/p1-noise.md tells what they say. Real gradients are MiniLM's on SST-2 sentences
of the data folder, or on the embedded tickets where there is none.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from _common import Runs, parser, save_figure, save_json
from _p1_figures import draw_gradients, draw_tv
from _p1_tables import prose, tables
from scipy import interpolate, stats

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.models import load_model
from lora_privacy.assess.training import loss_of
from lora_privacy.core import GradientProbe, adapt
from lora_privacy.data import load, tickets
from lora_privacy.dp import implied_privacy, matrix_projection
from lora_privacy.noise import (
    EntryNoise,
    expected_noise_energy,
    jl_distortion,
    kolmogorov_to_gaussian,
    lyapunov_ratio,
    noise_energy_variance,
    noise_variance,
    tv_bound,
    tv_of_entries,
    tv_to_gaussian,
)

Array = npt.NDArray[np.float64]

SEED = 20240926
RANK, INPUTS = 8, 768
LINE_INPUTS = (2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096, 8192, 53_248)
LINE_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SEEN_INPUTS, SEEN_RANKS = (4, 16, 64, 768, 4096), (1, 2, 4, 16, 32)
LAYER_RANKS = (4, 8, 16, 64)
BATCH, MAX_LENGTH = 32, 40
LEVEL = 0.01  # of all bands together
RECORDS, EPOCHS, READING_DELTA, FAILURE = 60_000, 3, 1e-5, 0.05
ROWS, READING_RANKS, BATCHES = (384, 768, 4096, 8192), (4, 8, 16, 64), (16, 64, 256)
_NODES = 1_500


def centred_row(inputs: int) -> Array:
    """Equal entries but a zero at the entry that is looked at, so that ρ = 0 at every m."""
    row = np.ones(inputs)
    row[0] = 0.0
    return row / math.sqrt(inputs - 1)


def seen_tv(rank: int, inputs: int, draws: int) -> dict[str, float]:
    """P(B) − Φ(B) on draws of q(AᵀA − I) itself, B = {p > φ}, and its standard error.

    For this B the difference is the total variation; a wrong law p could only lower it.
    """
    law, row = EntryNoise(rank), centred_row(inputs).astype(np.float32)
    std, rng = law.std(), np.random.default_rng((SEED, rank, inputs))
    grid = np.linspace(-8 * std, 8 * std, 100_001)
    over = law.pdf(grid) > stats.norm.pdf(grid, scale=std)
    ends = grid[np.flatnonzero(np.diff(over.astype(int)))]  # crossings, p > φ outside the last
    share = float(np.diff(stats.norm.cdf(ends, scale=std), prepend=0.0, append=1.0)[::2].sum())
    if not over[0]:
        share = 1.0 - share
    inside, size = 0, max(1, 4_000_000 // (rank * inputs))
    for start in range(0, draws, size):
        a = rng.standard_normal((min(size, draws - start), rank, inputs), dtype=np.float32)
        noise = np.einsum("sr,sr->s", a @ row, a[:, :, 0]) / rank
        odd = np.searchsorted(ends, noise) % 2 == 1
        inside += int(np.count_nonzero(odd != bool(over[0])))
    found = inside / draws
    return {"tv": found - share, "standard_error": math.sqrt(found * (1 - found) / draws)}


def distances(args: argparse.Namespace, runs: Runs) -> list[dict[str, Any]]:
    """Published ratio, proved bound, exact and simulated distance along m and along r."""
    wanted = [(RANK, m, m in SEEN_INPUTS) for m in LINE_INPUTS]
    wanted += [(r, INPUTS, r in SEEN_RANKS) for r in LINE_RANKS if r != RANK]
    rows = []
    for rank, inputs, simulate in wanted:
        law = EntryNoise(rank)
        row: dict[str, Any] = {
            "rank": rank,
            "inputs": inputs,
            "published_ratio": lyapunov_ratio(centred_row(inputs), rank, index=0),
            "bound": tv_bound(law).value,
            "exact": tv_to_gaussian(law).value,
        }
        if simulate:
            key = {"tv": [rank, inputs], "draws": args.draws, "seed": SEED}
            done = runs.get(key, lambda r=rank, m=inputs: timed(lambda: seen_tv(r, m, args.draws)))
            row["simulated"] = {name: done[name] for name in ("tv", "standard_error")}
            row["cpu_seconds"] = done["cpu_seconds"]
        rows.append(row)
    return rows


def timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` returns, and the processor time it took."""
    began = time.process_time()
    return {**run(), "cpu_seconds": time.process_time() - began}


def gradients(args: argparse.Namespace) -> tuple[str, list[str], Array]:
    """The data's name, layers' names, and each layer's row of largest norm as a unit vector.

    At the first step B = 0, so that a gradient does not depend on A: every row is fixed before A
    is drawn.
    """
    path = args.data / "sst2_sentences" / "train.tsv"
    if path.exists():
        name = "SST-2, whole sentences"
        data = load(str(path), text_columns=(0,), label_column=1, header=False, limit=BATCH)
    else:
        name, data = "embedded tickets", tickets(BATCH, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, tokenizer = load_model(AssessConfig(max_length=MAX_LENGTH), len(data.classes))
    model.eval()
    adapt(model, RANK, seed=0, layers=args.layers, trainable=("head",))
    tokens = TokenisedDataset(data, tokenizer, MAX_LENGTH, causal=False)
    with GradientProbe(model) as probe:
        loss_of(model, tokens.batch(np.arange(BATCH)), "classification")[0].mean().backward()
        found = {}
        for layer, record in probe.records.items():
            gradient = record.gradient.double().numpy()
            norms = np.linalg.norm(gradient, axis=1)
            found[layer] = gradient[norms.argmax()] / norms.max()
    return name, list(found), np.stack(list(found.values()))


def draw_noise(rows: Array, rank: int, entries: Array, draws: int) -> tuple[Array, Array]:
    """Entries (draws, rows, entries a row) and energies (draws, rows) of q(AᵀA − I), fresh A.

    All rows see the same draws of A: bands over several rows rest on a union bound.
    """
    rng = np.random.default_rng((SEED, rank))
    q, index = rows.astype(np.float32), np.arange(len(rows))[:, None]
    values, energies = np.empty((draws, *entries.shape)), np.empty((draws, len(rows)))
    size = max(1, 8_000_000 // (rank * rows.shape[1]))
    for start in range(0, draws, size):
        part = slice(start, min(start + size, draws))
        a = rng.standard_normal((part.stop - start, rank, rows.shape[1]), dtype=np.float32)
        noise = np.swapaxes(a @ q.T, 1, 2) @ a / rank - q
        values[part] = noise[:, index, entries]
        energies[part] = np.square(noise).sum(2)
    return values, energies


def cdf_of(law: EntryNoise) -> Callable[[Array], Array]:
    """The exact distribution function, by a cubic through its values: 50 μs a value otherwise."""
    nodes = law.std() * np.linspace(-9, 9, _NODES)
    table = interpolate.CubicSpline(nodes, law.cdf(nodes))
    return lambda x: np.clip(table(np.clip(x, nodes[0], nodes[-1])), 0.0, 1.0)


def at_rank(rows: Array, names: list[str], rank: int, draws: int) -> dict[str, Any]:
    """Noise of every row at one rank: energy, two entries' variances and distances to laws."""
    size = np.argsort(np.abs(rows), axis=1)
    entries = size[:, [-1, rows.shape[1] // 2]]
    values, energies = draw_noise(rows, rank, entries, draws)
    layers = []
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        predicted = expected_noise_energy(row, "gaussian", rank)
        spread = math.sqrt(noise_energy_variance(row, "gaussian", rank) / draws)
        tv = tv_of_entries(row, rank)
        layer: dict[str, Any] = {
            "layer": name,
            "energy_ratio": float(energies[:, i].mean() / predicted),
            "energy_error": spread / predicted,
            "tv_median": float(np.median(tv)),
            "tv_largest": float(tv.max()),
            "published_ratio": lyapunov_ratio(row, rank),
        }
        for kind, column, drawn in zip(
            ("peak", "median"), entries[i], values[:, i].T, strict=True
        ):
            coord = float(row[column])
            law = EntryNoise(rank, 1.0, coord)
            squares = np.square(drawn)
            published = stats.norm(scale=1 / math.sqrt(rank))
            layer[kind] = {
                "cosine": coord,
                "variance": float(squares.mean()),
                "error": float(squares.std(ddof=1) / math.sqrt(draws)),
                "predicted": float(noise_variance(row, "gaussian", rank)[column]),
                "ks_exact": float(stats.kstest(drawn, cdf_of(law)).statistic),
                "ks_published": float(stats.kstest(drawn, published.cdf).statistic),
                "true_published": kolmogorov_to_gaussian(law, variance="published").value,
            }
        layers.append(layer)
    return {"rank": rank, "layers": layers}


def readings(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The implied ε of one layer, at no distortion and at an honest one, beside what is proved."""
    rows = []
    for n in sizes:
        for rank in READING_RANKS:
            for batch in BATCHES:
                honest = jl_distortion(rank, FAILURE, vectors=n * batch)
                row: dict[str, Any] = {
                    "rows": n,
                    "rank": rank,
                    "batch": batch,
                    "honest_distortion": honest,
                }
                for name, distortion, aggregation in (
                    ("flattering", 0.0, "independent"),
                    ("honest", honest, "independent"),
                    ("coherent", 0.0, "coherent"),
                ):
                    reading = implied_privacy(
                        layers=[(n, rank)],
                        batch_size=batch,
                        dataset_size=RECORDS,
                        steps=EPOCHS * RECORDS // batch,
                        delta=READING_DELTA,
                        distortion=distortion,
                        aggregation=aggregation,
                    )
                    finite = math.isfinite(reading.epsilon)
                    row[name] = {
                        "noise_multiplier": reading.noise_multiplier,
                        "epsilon": reading.epsilon if finite else "inf",
                    }
                row["proved"] = "none"
                rows.append(row)
    return rows


def proved() -> dict[str, Any]:
    """What is proved of a released AᵀAV: two batches that differ in one sample are told apart."""
    rng = np.random.default_rng(SEED)
    v = rng.standard_normal((16, 4))
    other = v.copy()
    other[:, 0] = rng.standard_normal(16)
    found = matrix_projection(v, other, RANK, READING_DELTA)
    return {"epsilon": "inf" if math.isinf(found.epsilon) else found.epsilon, "why": found.reason}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers; finished parts are read from the work folder."""
    runs = Runs(args.work / "p1_noise.jsonl")
    name, names, rows = gradients(args)
    tv = distances(args, runs)
    ranks = []
    for rank in LAYER_RANKS:
        key = {
            "layers": names,
            "rank": rank,
            "draws": args.layer_draws,
            "seed": SEED,
            "data": name,
        }
        ranks.append(
            runs.get(
                key,
                lambda r=rank: timed(lambda: at_rank(rows, names, r, args.layer_draws)),
            )
        )
    tests = len(LAYER_RANKS) * len(names) * 2
    seconds = sum(row.get("cpu_seconds", 0.0) for row in [*tv, *ranks])
    results = {
        "command": "python examples/reproduce/p1_noise.py",
        "seed": SEED,
        "draws": args.draws,
        "layer_draws": args.layer_draws,
        "data": name,
        "batch": BATCH,
        "inputs": rows.shape[1],
        "band": math.sqrt(math.log(2 * tests / LEVEL) / (2 * args.layer_draws)),
        "band_level": LEVEL,
        "cpu_seconds": round(seconds),
        "distances": [{k: v for k, v in row.items() if k != "cpu_seconds"} for row in tv],
        "ranks": [{"rank": row["rank"], "layers": row["layers"]} for row in ranks],
        "readings": readings(args.rows),
        "reading_settings": {
            "records": RECORDS,
            "epochs": EPOCHS,
            "delta": READING_DELTA,
            "failure": FAILURE,
        },
        "proved": proved(),
    }
    results["prose"] = prose(results)
    return results


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--draws", type=int, help="matrices A a distance: 60,000, or 1,000,000")
    options.add_argument("--layer-draws", type=int, help="fresh A a rank: 100,000, or 1,000,000")
    options.add_argument("--rows", type=int, nargs="+", default=ROWS, help="n of the readings")
    options.add_argument("--layers", type=int, nargs="+", help="blocks of MiniLM; all without")
    args = options.parse_args()
    args.draws = args.draws or (1_000_000 if args.full else 60_000)
    args.layer_draws = args.layer_draws or (1_000_000 if args.full else 100_000)
    results = run(args)
    save_json(args.docs, "p1-noise", results)
    save_figure(args.docs, "p1_tv", draw_tv(results))
    save_figure(args.docs, "p1_gradients", draw_gradients(results))
    for table in tables(results).values():
        print("\n" + table)


if __name__ == "__main__":
    main()
