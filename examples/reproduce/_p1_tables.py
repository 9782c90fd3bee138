"""Tables and quoted numbers of docs/reproduction/p1-noise.md, from its raw results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["prose", "tables"]


def rounded_up(value: float | str) -> str:
    """Three significant digits, upwards; ∞ where there is no number."""
    if value == "inf":
        return "∞"
    number = float(value)
    unit = 10.0 ** (math.floor(math.log10(number)) - 2)
    number = math.ceil(number / unit * (1 - 1e-12)) * unit
    if number >= 1e7:
        return f"{number:.2e}".replace("e+", "e")
    digits = max(0, 2 - math.floor(math.log10(number)))
    return f"{number:,.{digits}f}"


def short(layer: str) -> str:
    """``encoder.layer.3.attention.self.query`` -> ``3 query``."""
    parts = layer.split(".")
    block = next((part for part in parts if part.isdigit()), "")
    return f"{block} {parts[-1]}".strip()


def table(head: str, rows: list[str]) -> str:
    columns = head.count("|") - 1
    return "\n".join([head, "|---" * columns + "|", *rows])


def tables(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the page, as markdown."""
    return {
        "inputs": _tv(results, "inputs"),
        "rank": _tv(results, "rank"),
        "variance": _variance(results),
        "law": _law(results),
        "layers": _layers(results),
        "readings": _readings(results),
        "coherent": _coherent(results),
    }


def _tv(results: dict[str, Any], along: str) -> str:
    held = {"inputs": ("rank", 8), "rank": ("inputs", 768)}[along]
    name = {"inputs": "m", "rank": "r"}[along]
    rows = []
    for row in sorted(results["distances"], key=lambda row: row[along]):
        if row[held[0]] != held[1] or ("simulated" not in row and row["inputs"] != 53_248):
            continue
        seen = row.get("simulated")
        shown = f"{seen['tv']:.4f} ± {2 * seen['standard_error']:.4f}" if seen else "–"
        bound = math.ceil(1e4 * row["bound"]) / 1e4
        rows.append(
            f"| {row[along]:,} | {row['published_ratio']:.4f} | {bound:.4f} |"
            f" {row['exact']:.4f} | {shown} |"
        )
    head = f"| {name} | published ratio L₃ | proved bound | exact | simulated, ±2 errors |"
    return table(head, rows)


def _variance(results: dict[str, Any]) -> str:
    rows = []
    for run in results["ranks"]:
        layers = run["layers"]
        energy = [layer["energy_ratio"] for layer in layers]
        worst = max(abs(layer["energy_ratio"] - 1) / layer["energy_error"] for layer in layers)
        peaks = [layer["peak"] for layer in layers]
        exact = [peak["variance"] / peak["predicted"] for peak in peaks]
        off = [peak["variance"] * run["rank"] for peak in peaks]
        away = sum(abs(peak["variance"] - 1 / run["rank"]) > 4 * peak["error"] for peak in peaks)
        rows.append(
            f"| {run['rank']} | {min(energy):.4f} to {max(energy):.4f} | {worst:.1f} |"
            f" {min(exact):.3f} to {max(exact):.3f} | {min(off):.3f} to {max(off):.3f} |"
            f" {away} of {len(layers)} |"
        )
    return table(
        "| r | energy of a row, measured / predicted | worst, in standard errors | peak entry,"
        " variance measured / (‖q‖² + q_i²)/r | the same / published ‖q‖²/r | published variance"
        " off by over 4 errors |",
        rows,
    )


def _law(results: dict[str, Any]) -> str:
    band, rows = results["band"], []
    for run in results["ranks"]:
        layers = run["layers"]
        cells = []
        for kind in ("peak", "median"):
            entries = [layer[kind] for layer in layers]
            exact = [entry["ks_exact"] for entry in entries]
            published = [entry["ks_published"] for entry in entries]
            cells.append(
                f" {sum(value > band for value in exact)} of {len(exact)} ({max(exact):.4f}) |"
                f" {sum(value > band for value in published)} of {len(published)}"
                f" ({min(published):.4f} to {max(published):.4f}) |"
            )
        true = [layer["median"]["true_published"] for layer in layers]
        rows.append(f"| {run['rank']} |{cells[0]}{cells[1]} {min(true):.4f} to {max(true):.4f} |")
    return table(
        "| r | peak entries: exact law rejected (largest distance) | peak: published Gaussian"
        " rejected (distances) | median entries: exact law rejected | median: published Gaussian"
        " rejected | median: its true distance |",
        rows,
    )


def _layers(results: dict[str, Any]) -> str:
    run = next(run for run in results["ranks"] if run["rank"] == 8)
    rows = [
        f"| {short(layer['layer'])} | {abs(peak['cosine']):.3f} | {peak['variance'] * 8:.3f} |"
        f" {peak['predicted'] * 8:.3f} | {peak['ks_exact']:.4f} | {peak['ks_published']:.4f} |"
        f" {layer['median']['ks_exact']:.4f} | {layer['median']['ks_published']:.4f} |"
        f" {layer['tv_largest']:.4f} | {layer['published_ratio']:.3f} |"
        for layer in run["layers"]
        for peak in [layer["peak"]]
    ]
    return table(
        "| block | peak \\|ρ\\| | its variance × r/‖q‖² | exact, 1 + ρ² | KS, peak, exact law |"
        " KS, peak, published | KS, median, exact law | KS, median, published |"
        " largest TV of the row | published ratio L₃ |",
        rows,
    )


def _grid(results: dict[str, Any], cell: Callable[[dict[str, Any]], str], head: str) -> str:
    found: dict[tuple[int, int], list[str]] = {}
    proved: dict[tuple[int, int], str] = {}
    for row in results["readings"]:
        place = (row["rows"], row["rank"])
        found.setdefault(place, []).append(cell(row))
        proved[place] = row["proved"]
    return table(
        head,
        [f"| {n:,} | {r} | {' | '.join(found[n, r])} | {proved[n, r]} |" for n, r in found],
    )


def _readings(results: dict[str, Any]) -> str:
    return _grid(
        results,
        lambda row: (
            f"{row['flattering']['noise_multiplier']:.3g} /"
            f" {rounded_up(row['flattering']['epsilon'])} / {rounded_up(row['honest']['epsilon'])}"
        ),
        "| n | r | implied, b = 16 | implied, b = 64 | implied, b = 256 | proved ε |",
    )


def _coherent(results: dict[str, Any]) -> str:
    return _grid(
        results,
        lambda row: (
            f"{row['coherent']['noise_multiplier']:.3g} / {rounded_up(row['coherent']['epsilon'])}"
        ),
        "| n | r | implied, b = 16 | implied, b = 64 | implied, b = 256 | proved ε |",
    )


def prose(results: dict[str, Any]) -> dict[str, str]:
    """Numbers that the page's sentences quote, as they are written there."""
    layers = [layer for run in results["ranks"] for layer in run["layers"]]
    entries = [layer[kind] for layer in layers for kind in ("peak", "median")]
    flat = [row for row in results["distances"] if row["rank"] == 8]
    seen = [row for row in flat if "simulated" in row]
    longest = max(seen, key=lambda row: row["inputs"])
    gap = longest["simulated"]["tv"] - longest["published_ratio"]
    simulated = [row for row in results["distances"] if "simulated" in row]
    misses = [
        abs(row["simulated"]["tv"] - row["exact"]) / row["simulated"]["standard_error"]
        for row in simulated
    ]
    least = min(flat, key=lambda row: row["inputs"])
    most = max(flat, key=lambda row: row["inputs"])
    peaks = [abs(layer["peak"]["cosine"]) for layer in results["ranks"][0]["layers"]]
    finite = [row for row in results["readings"] if row["honest"]["epsilon"] != "inf"]
    coherent = min(row["coherent"]["epsilon"] for row in results["readings"])
    flattering = min(row["flattering"]["epsilon"] for row in results["readings"])
    return {
        "draws": f"{results['draws']:,} draws",
        "layer draws": f"{results['layer_draws']:,} fresh matrices",
        "band": f"{results['band']:.4f}",
        "tests": f"{len(entries)} entries",
        "exact rejected": (
            f"{sum(e['ks_exact'] > results['band'] for e in entries)} of {len(entries)}"
        ),
        "published rejected": (
            f"{sum(e['ks_published'] > results['band'] for e in entries)} of {len(entries)}"
        ),
        "peaks rejected": (
            f"{sum(layer['peak']['ks_published'] > results['band'] for layer in layers)} of the"
            f" {len(layers)} peak entries"
        ),
        "largest exact distance": f"{max(e['ks_exact'] for e in entries):.4f}",
        "gap": f"{gap / longest['simulated']['standard_error']:.0f} standard errors",
        "simulation": f"{max(misses):.1f} standard errors",
        "constant": (
            f"{least['exact'] / least['published_ratio']:.3f} at m = {least['inputs']} to"
            f" {most['exact'] / most['published_ratio']:.1f} at m = {most['inputs']:,}"
        ),
        "peaks": f"{min(peaks):.2f} to {max(peaks):.2f}",
        "honest": f"{len(finite)} of the {len(results['readings'])}",
        "least honest": rounded_up(min(r["honest"]["epsilon"] for r in finite)) if finite else "∞",
        "least coherent": rounded_up(coherent),
        "least flattering": rounded_up(flattering),
        "seconds": f"about {max(1, round(results['cpu_seconds'] / 10)) * 10} s",
    }
