"""P2 (arXiv:2601.21719), Figure 2: ε of one projected vector pair against the rank.

    python examples/reproduce/p2_vector_projection.py

Writes docs/reproduction/p2-vector-projection.json and docs/figures/p2_vector_projection.*, about
a minute and a half of one core; docs/reproduction/p2-vector-projection.md tells what they say.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from _common import STYLES, Runs, parser, save_figure, save_json
from scipy import optimize, stats

from lora_privacy.dp import VectorFamily, VectorProjection, vector_projection_bound

Array = npt.NDArray[np.float64]

LENGTH, DELTA = 400, 0.01
RANKS, COSINES = (50, 100, 200, 400), (0.5, 0.9)
CURVE = (40, 50, 60, 70, 85, 100, 120, 140, 170, 200, 240, 280, 320, 360, 400)
RATIOS = (1.0, 1.1)
SEED = 20260129
# Read off the published figure, to about a line's width.
PUBLISHED = {0.5: (560, 427, 448, 608), 0.9: (28, 32, 45, 72)}
PUBLISHED_BOUND = {(0.5, 200): 660, (0.9, 200): 77}
_BATCH = 250
_GRID = 40_000


def tails(m: int, r: int, rho: float, epsilon: float) -> tuple[float, float]:
    """δ(ε) and P[L > ε] of a pair of equal norms, by its own sum: no code of the library.

    R = ρ + √((1−ρ²)/r) T, T ~ t_r, Q ~ χ²_k independent, L = c ln R + (Q/2)(1/R − 1), c =
    (m+1−r)/2. A difference of χ² tails over a grid of T in even steps of tan⁻¹(T/√r).
    """
    k, c = m + r - 1, (m + 1 - r) / 2
    angle = (np.arange(_GRID) + 0.5) / _GRID * math.pi - math.pi / 2
    weight = np.cos(angle) ** (r - 1)
    weight /= weight.sum()
    ratio = rho + math.sqrt(1 - rho**2) * np.tan(angle)
    told = float(weight[ratio <= 0].sum())
    keep = (ratio > 0) & (weight > 1e-18)
    weight, ratio = weight[keep], ratio[keep]
    x = np.maximum(0.0, 2 * (epsilon - c * np.log(ratio)) / (1 / ratio - 1))
    log_tail, log_other = np.empty_like(x), np.empty_like(x)
    for part, tail in ((ratio < 1, stats.chi2.logsf), (ratio >= 1, stats.chi2.logcdf)):
        log_tail[part], log_other[part] = tail(x[part], k), tail(x[part] / ratio[part], k)
    tilted = np.exp(epsilon + (r - 1) * np.log(ratio) + log_other)
    over = weight * np.exp(log_tail)
    return told + float((over - weight * tilted).sum()), told + float(over.sum())


def loss_quantile(m: int, r: int, rho: float, delta: float) -> float:
    """ε with P[L > ε] = δ: larger than the exact one, and what a simulation of L reads off."""
    top = vector_projection_bound(m, r, rho, delta).epsilon
    return float(optimize.brentq(lambda e: tails(m, r, rho, e)[1] - delta, 0.0, top, xtol=1e-6))


def printed_bound(m: int, r: int, rho: float, delta: float) -> float:
    """Theorem 1 with the constant (m+r−1)/2 that the authors' note prints; it is no bound."""
    t, x = stats.t.isf(delta / 3, r), stats.chi2.isf(delta / 3, m + r - 1)
    reach = t * math.sqrt((1 - rho**2) / r)
    return float(
        (m + r - 1) / 2 * math.log(rho + reach) + (1 - rho + reach) * x / (2 * (rho - reach))
    )


def simulate(m: int, r: int, draws: int, seed: int) -> dict[float, Array]:
    """Losses of y = AᵀA v, A drawn whole, for v' at each cosine; L from the law of y."""
    rng = np.random.default_rng((seed, r))
    losses: dict[float, list[Array]] = {rho: [] for rho in COSINES}
    for start in range(0, draws, _BATCH):
        a = rng.standard_normal((min(_BATCH, draws - start), r, m), dtype=np.float32)
        y = (a[:, None, :, 0] @ a)[:, 0].astype(float) / r  # v is the first axis
        squared = np.square(y).sum(1)
        for rho in COSINES:
            along, other = y[:, 0], rho * y[:, 0] + math.sqrt(1 - rho**2) * y[:, 1]
            with np.errstate(invalid="ignore", divide="ignore"):
                loss = (m + 1 - r) / 2 * np.log(other / along)
                loss += r * squared / 2 * (1 / other - 1 / along)
            losses[rho].append(np.where(other > 0, loss, math.inf))
    return {rho: np.concatenate(parts) for rho, parts in losses.items()}


def simulated(losses: Array, epsilon: float, delta: float) -> dict[str, float]:
    """Mean of (1 − e^{ε−L})₊ with its standard error, and the ε at which it is δ ± 2 errors."""

    def excess(at: float, errors: float) -> float:
        terms = -np.expm1(np.minimum(0.0, at - losses))
        return float(terms.mean() + errors * terms.std() / math.sqrt(len(terms))) - delta

    top = float(np.max(losses[np.isfinite(losses)]))
    low, high = (
        float(optimize.brentq(excess, 0.0, top, args=(errors,), xtol=1e-4)) for errors in (-2, 2)
    )
    terms = -np.expm1(np.minimum(0.0, epsilon - losses))
    return {
        "delta": float(terms.mean()),
        "standard_error": float(terms.std() / math.sqrt(len(terms))),
        "epsilon_low": low,
        "epsilon_high": high,
    }


def point(r: int, rho: float, seen: dict[str, float]) -> dict[str, Any]:
    """Everything about one pair of the figure; ``seen`` is what was simulated of it."""
    pair = VectorProjection(LENGTH, r, rho)
    exact = pair.epsilon(DELTA)
    printed = printed_bound(LENGTH, r, rho, DELTA)
    published_shape = vector_projection_bound(LENGTH, r, rho, DELTA, shape="published")
    outsider = VectorFamily(LENGTH, r, rho, (1.0, 1.0), adjacency="add-remove").epsilon(DELTA)
    families = [VectorFamily(LENGTH, r, rho, (1.0, top)).epsilon(DELTA) for top in RATIOS]
    return {
        "cosine": rho,
        "rank": r,
        "published_exact": PUBLISHED[rho][RANKS.index(r)],
        "published_bound": PUBLISHED_BOUND.get((rho, r)),
        "exact": exact.epsilon,
        "backward": exact.backward,
        "delta_by_own_sum": tails(LENGTH, r, rho, exact.epsilon)[0],
        "loss_quantile": loss_quantile(LENGTH, r, rho, DELTA),
        "delta_at_published": pair.delta(float(PUBLISHED[rho][RANKS.index(r)])),
        "simulated": seen,
        "bound_sharper": vector_projection_bound(LENGTH, r, rho, DELTA).epsilon,
        "bound_published_shape": published_shape.epsilon,
        "printed_constant": printed,
        "delta_at_printed_constant": pair.delta(printed),
        "floor": pair.floor,
        "families": [family.epsilon for family in families],
        "add_remove": "inf" if math.isinf(outsider.epsilon) else outsider.epsilon,
        "why_add_remove": outsider.reason,
    }


def curves() -> list[dict[str, float]]:
    """Lines of the figure."""
    return [
        {
            "cosine": rho,
            "rank": r,
            "exact": VectorProjection(LENGTH, r, rho).epsilon(DELTA).epsilon,
            "bound_sharper": vector_projection_bound(LENGTH, r, rho, DELTA).epsilon,
            "bound_published_shape": vector_projection_bound(
                LENGTH, r, rho, DELTA, shape="published"
            ).epsilon,
            "printed_constant": printed_bound(LENGTH, r, rho, DELTA),
        }
        for rho in COSINES
        for r in CURVE
    ]


def up(bound: float) -> str:
    """An upper bound to one decimal, upwards."""
    return f"{math.ceil(10 * bound) / 10:.1f}"


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, as markdown."""
    points = results["points"]
    exact = ["| ρ | r | exact, published (read off) | exact, ours | δ of the published ε |"]
    exact[0] += " quantile of the loss | simulated, ±2 errors |"
    bound = ["| ρ | r | Theorem 1, published | with its shape, corrected | sharper, ours |"]
    bound[0] += " with the printed constant | true δ there |"
    family = ["| ρ | r | this pair | least cosine ρ, equal norms |"]
    family[0] += " the same, norms within 10 % | add or remove a record |"
    lines = [exact, bound, family]
    for rows in lines:
        rows.append("|---" * (rows[0].count("|") - 1) + "|")
    for p in points:
        name, seen = f"| {p['cosine']} | {p['rank']} |", p["simulated"]
        digits = 1 if p["cosine"] == COSINES[0] else 2
        show = [f"{p[key]:.{digits}f}" for key in ("exact", "loss_quantile")]
        span = f"{seen['epsilon_low']:.{digits}f} to {seen['epsilon_high']:.{digits}f}"
        exact.append(
            f"{name} {p['published_exact']} | {show[0]} | {p['delta_at_published']:.4f} |"
            f" {show[1]} | {span} |"
        )
        bound.append(
            f"{name} {p['published_bound'] or '–'} | {up(p['bound_published_shape'])} |"
            f" {up(p['bound_sharper'])} | {p['printed_constant']:.1f} |"
            f" {p['delta_at_printed_constant']:.3g} |"
        )
        family.append(
            f"{name} {show[0]} | {up(p['families'][0])} | {up(p['families'][1])} |"
            f" {'∞' if p['add_remove'] == 'inf' else p['add_remove']} |"
        )
    return {
        name: "\n".join(rows)
        for name, rows in zip(("exact", "bound", "family"), lines, strict=True)
    }


def prose(results: dict[str, Any]) -> dict[str, str]:
    """Numbers that the page's sentences quote."""
    points = results["points"]
    sums = [abs(p["delta_by_own_sum"] / DELTA - 1) for p in points]
    off = [abs(p["simulated"]["delta"] - DELTA) / p["simulated"]["standard_error"] for p in points]
    inside = sum(
        p["simulated"]["epsilon_low"] <= p["published_exact"] <= p["simulated"]["epsilon_high"]
        for p in points
    )
    wrong = max(points, key=lambda p: p["delta_at_printed_constant"])
    fails = {
        rho: min(
            row["rank"]
            for row in results["curves"]
            if row["cosine"] == rho and row["printed_constant"] < row["exact"]
        )
        for rho in COSINES
    }
    spread = max(p["simulated"]["epsilon_high"] - p["simulated"]["epsilon_low"] for p in points)
    return {
        "widest": f"{spread:.0f} nats",
        "own sum": f"{max(sums):.0e}",
        "draws": f"{results['draws']:,} draws",
        "worst simulation": f"{max(off):.1f} standard errors",
        "published inside": f"{inside} of the {len(points)}",
        "printed fails": " and ".join(f"r = {fails[rho]} at ρ = {rho}" for rho in COSINES),
        "printed": f"δ = {wrong['delta_at_printed_constant']:.4f}",
        "seconds": f"about {max(1, round(results['cpu_seconds'] / 10)) * 10} s",
    }


def draw(results: dict[str, Any]) -> plt.Figure:
    """ε against the rank, a panel a cosine."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.5))
    lines = (
        ("bound_published_shape", "Theorem 1, published shape with the right constant", 1),
        ("bound_sharper", "Theorem 1, corrected and sharper", 2),
        ("printed_constant", "with the constant printed in the authors' note: no bound", 3),
        ("exact", "exact", 0),
    )
    for axis, rho in zip(axes, COSINES, strict=True):
        rows = [row for row in results["curves"] if row["cosine"] == rho]
        points = [p for p in results["points"] if p["cosine"] == rho]
        for key, label, style in lines:
            colour, _, dash = STYLES[style]
            axis.plot(
                [row["rank"] for row in rows],
                [row[key] for row in rows],
                color=colour,
                linestyle=dash,
                label=label,
            )
        ranks = [p["rank"] for p in points]
        seen = [p["simulated"] for p in points]
        centre = np.array([(s["epsilon_low"] + s["epsilon_high"]) / 2 for s in seen])
        half = np.array([(s["epsilon_high"] - s["epsilon_low"]) / 2 for s in seen])
        axis.errorbar(
            [r + 8 for r in ranks],
            centre,
            yerr=half,
            fmt="none",
            ecolor=STYLES[0][0],
            capsize=3,
            label="exact, simulated from the definition, ±2 standard errors",
        )
        axis.plot(
            ranks,
            [p["published_exact"] for p in points],
            linestyle="none",
            marker="x",
            ms=7,
            mew=1.6,
            color="black",
            label="exact, read off P2's figure 2",
        )
        known = [p for p in points if p["published_bound"]]
        axis.plot(
            [p["rank"] for p in known],
            [p["published_bound"] for p in known],
            linestyle="none",
            marker="+",
            ms=9,
            mew=1.6,
            color="black",
            label="Theorem 1, read off P2's figure 2",
        )
        axis.set_title(f"cosine ρ = {rho}")
        axis.set_xlabel("rank r")
        axis.set_xlim(30, 420)
        axis.set_ylim(0, 1500 if rho == COSINES[0] else 120)
    axes[0].set_ylabel(f"ε of the pair at δ = {DELTA}, nats")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    return figure


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers; finished ranks are read from the work folder."""
    runs = Runs(args.work / "p2_vector_projection.jsonl")

    def at(r: int) -> dict[str, Any]:
        began = time.process_time()
        losses = simulate(LENGTH, r, args.draws, SEED)
        found = {}
        for rho in COSINES:
            exact = VectorProjection(LENGTH, r, rho).epsilon(DELTA).epsilon
            found[str(rho)] = simulated(losses[rho], exact, DELTA)
        return {"simulated": found, "cpu_seconds": time.process_time() - began}

    seconds, points = 0.0, []
    for r in RANKS:
        key = {"rank": r, "draws": args.draws, "seed": SEED}
        done = runs.get(key, lambda r=r: at(r))
        seconds += done["cpu_seconds"]
        points += [point(r, rho, done["simulated"][str(rho)]) for rho in COSINES]
    points.sort(key=lambda p: (p["cosine"], p["rank"]))
    results = {
        "command": "python examples/reproduce/p2_vector_projection.py",
        "length": LENGTH,
        "delta": DELTA,
        "seed": SEED,
        "draws": args.draws,
        "cpu_seconds": round(seconds),
        "norm_ratios_of_families": list(RATIOS),
        "points": points,
        "curves": curves(),
    }
    results["prose"] = prose(results)
    return results


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--draws", type=int, help="matrices A a rank; 10,000, or 100,000 in full")
    args = options.parse_args()
    args.draws = args.draws or (100_000 if args.full else 10_000)
    if args.draws < 500:
        options.error("--draws must be at least 500: fewer may hold no loss beyond ε.")
    results = run(args)
    save_json(args.docs, "p2-vector-projection", results)
    save_figure(args.docs, "p2_vector_projection", draw(results))
    for table in tables(results).values():
        print("\n" + table)


if __name__ == "__main__":
    main()
