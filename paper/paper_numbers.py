"""Every number that the paper prints, and ``paper.md``, made of them and of ``paper.in.md``.

Measured numbers come from the raw results in docs/reproduction, exact ones from the library.
Upper bounds are rounded up, everything else to the nearest digit shown.

Run ``python paper/paper_numbers.py`` after a result or the text has changed; with ``--check`` it
writes nothing and fails if ``paper.md`` is not what it would write. To quote another result, add
it to the function of its page (or a function to ``SOURCES``) and write ``{{its name}}``.
"""

# Not named numbers.py: a script's folder comes first on the path, and numpy imports `numbers`.

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_privacy.dp import GaussianEvent, PldAccountant, ProjectedGaussian
from lora_privacy.noise import EntryNoise, joint_tv_to_gaussian, tv_to_gaussian

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "reproduction"
PLACE = re.compile(r"\{\{([a-z0-9 ]+)\}\}")

# The settings of the exact statements: one layer, one clip, one δ.
RANK, INPUTS, NOISE, DELTA, STEPS = 8, 768, 1.0, 1e-5, 100
WIDE = 4_096
CONFIDENCE = 95  # per cent, of the intervals of audit.auc
LARGEST_MODEL = 135  # million parameters, SmolLM2-135M
# What the table of other packages was read from.
COMPARED = {
    "opacus": "1.6.0",
    "dp accounting": "0.6.0",
    "jax privacy": "2.3.0.dev0",
    "peft": "0.21.2",
}


def up(value: float, digits: int = 4) -> str:
    """An upper bound with ``digits`` significant digits, rounded up."""
    decimals = digits - 1 - math.floor(math.log10(value))
    return f"{math.ceil(value * 10**decimals * (1 - 1e-12)) / 10**decimals:.{max(decimals, 0)}f}"


def mean(values: list[float]) -> str:
    """A mean of percentages ± its standard error, to one decimal."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f}"


def points(value: float) -> str:
    """A difference in points, with its sign, to one decimal, as LaTeX."""
    return f"${value:+.1f}$"


def settings() -> dict[str, str]:
    """What the exact statements are computed for."""
    versions = {f"{name} version": version for name, version in COMPARED.items()}
    return versions | {
        "rank": f"{RANK}",
        "inputs": f"{INPUTS}",
        "noise": f"{NOISE:g}",
        "delta": f"10^{round(math.log10(DELTA))}^",
        "steps": f"{STEPS}",
        "wide": f"{WIDE:,}",
        "confidence": f"{CONFIDENCE}",
        "largest model": f"{LARGEST_MODEL}",
    }


def laws() -> dict[str, str]:
    """Total variation of one entry, and of one row, to their Gaussians."""
    joint = joint_tv_to_gaussian(rank=RANK, in_features=INPUTS)
    return {
        "entry distance": f"{tv_to_gaussian(EntryNoise(RANK)).value:.3f}",
        "row distance": f"{joint.value:.3f}",
    }


def guarantees() -> dict[str, str]:
    """ε of added noise, with and without a fresh projection at each step."""
    events = {"plain": GaussianEvent(NOISE), "fresh": ProjectedGaussian([(INPUTS, RANK)], NOISE)}
    return {
        f"{name} epsilon": up(PldAccountant().compose(event, STEPS).epsilon(DELTA).epsilon)
        for name, event in events.items()
    }


def noise_study() -> dict[str, str]:
    """P1's noise: the published ratio, gradients of MiniLM, and the implied ε."""
    raw = _json("p1-noise")
    [wide] = [row for row in raw["distances"] if row["rank"] == RANK and row["inputs"] == WIDE]
    entries = [
        layer[which] for rank in raw["ranks"] for layer in rank["layers"] for which in _ENTRIES
    ]
    readings = [
        math.inf if read["epsilon"] == "inf" else read["epsilon"]
        for row in raw["readings"]
        for read in (row["flattering"], row["honest"], row["coherent"])
    ]
    seen = wide["simulated"]
    return {
        "published ratio": f"{wide['published_ratio']:.3f}",
        "simulated distance": f"{seen['tv']:.3f} ± {2 * seen['standard_error']:.3f}",
        "entries": f"{len(entries)}",
        "exact rejected": f"{sum(entry['ks_exact'] > raw['band'] for entry in entries)}",
        "gaussian rejected": f"{sum(entry['ks_published'] > raw['band'] for entry in entries)}",
        "least reading": up(min(readings), 3),
        "largest reading": r"$\infty$" if max(readings) == math.inf else up(max(readings), 3),
    }


def projected_vectors() -> dict[str, str]:
    """P2's vector query, at the point where the printed constant fails most."""
    raw = _json("p2-vector-projection")
    point = max(raw["points"], key=lambda point: point["delta_at_printed_constant"])
    return {
        "vector delta": f"{raw['delta']:g}",
        "printed epsilon": f"{point['printed_constant']:.1f}",
        "printed delta": f"{point['delta_at_printed_constant']:.4f}",
    }


def attacks() -> dict[str, str]:
    """The projection attack on one update of LoRA-FA, without and with noise."""
    games = _json("attack_projection")["games"]
    blind = [game for game in games if game["knows"] == "rest"]
    [noised] = [game for game in games if game["knows"] == "rest, A public" and game["z"] == NOISE]
    ranks = sorted(game["rank"] for game in blind)
    return {
        "attack ranks": ", ".join(map(str, ranks[:-1])) + f" and {ranks[-1]}",
        "attack auc": f"{min(game['auc'] for game in blind):.2f}",
        "attack low": f"{math.floor(1e2 * min(game['low'] for game in blind)) / 1e2:.2f}",
        "noised auc": f"{noised['auc']:.2f}",
        "noised limit": up(noised["best_auc"], 2),
        "noised epsilon": up(noised["epsilon"], 3),
    }


def private_training() -> dict[str, str]:
    """DP-LoRA of MiniLM on SST-2."""
    wanted = {"task": "sst2", "method": "dp-lora", "delta": DELTA}
    runs = [run for run in _lines("private_text") if wanted.items() <= run.items()]
    return {
        "text epsilon": up(max(run["epsilon"] for run in runs), 2),
        "text runs": f"{len(runs)}",
        "text accuracy": mean([run["accuracy"] for run in runs]),
    }


def equal_epsilon() -> dict[str, str]:
    """P2's comparison: DP-FLoRA over a frozen A, and over DP-SGD, in points of accuracy."""
    raw = _json("p2-accuracy")
    rows = [row for task in raw["tasks"].values() for row in task["differences"]]
    frozen, plain = ([row[method] for row in rows] for method in ("dp-lora-fa", "dp-sgd"))
    return {
        "frozen least": points(min(frozen)),
        "frozen most": points(max(frozen)),
        "plain least": points(min(plain)),
        "plain most": points(max(plain)),
        "head settings": f"{len(rows)}",
        "head runs": f"{len(raw['plan']['seeds'])}",
    }


def leakage() -> dict[str, str]:
    """RMIA's AUC after the last epoch, of LoRA and of a projection that is not random."""
    raw = _json("p1-leakage")
    auc = {
        (row["method"], row["rank"]): row["last"]["RMIA"]["mean"] for row in raw["members"]["rows"]
    }
    small, large = min(raw["ranks"]), max(raw["ranks"])
    return {
        "small rank": f"{small}",
        "large rank": f"{large}",
        "small rank auc": f"{auc['lora', small]:.3f}",
        "large rank auc": f"{auc['lora', large]:.3f}",
        "small control auc": f"{auc['fixed', small]:.3f}",
        "large control auc": f"{auc['fixed', large]:.3f}",
    }


def denoising() -> dict[str, str]:
    """P3: the cosine that gains most at one step, and what that gives in training."""
    found = _json("p3-denoising")["summary"]
    best = max(found["cosines"], key=lambda row: row["gains"]["frobenius"]["mean"])["found"]
    gains, again = (
        _gains(_json(name)["summary"]["arms"]) for name in ("p3-denoising", "p3-denoising-again")
    )
    outside = sum(low * high > 0 for low, high in again)
    return {
        "noised cosine": f"{best['none']:.3f}",
        "restored cosine": f"{best['frobenius']:.3f}",
        "arm intervals": f"{len(gains)}",
        "arm losses": f"{sum(high < 0 for _, high in gains)}",
        "arm gains": f"{sum(low > 0 for low, _ in gains)}",
        "rerun outside": f"{outside or 'none'}",
    }


def _gains(arms: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Each interval of a difference as a gain: fewer steps are one, and more accuracy."""
    return [
        (-gap["high"], -gap["low"]) if measure.startswith("steps") else (gap["low"], gap["high"])
        for arm in arms
        for measure, gap in arm["differences"].items()
    ]


SOURCES: tuple[Callable[[], dict[str, str]], ...] = (
    settings,
    laws,
    guarantees,
    noise_study,
    projected_vectors,
    attacks,
    private_training,
    equal_epsilon,
    leakage,
    denoising,
)
_ENTRIES = ("peak", "median")


def numbers() -> dict[str, str]:
    """All numbers by name, as the paper prints them; ValueError where two share a name."""
    found: dict[str, str] = {}
    for source in SOURCES:
        new = source()
        if twice := found.keys() & new.keys():
            raise ValueError(f"names must be given once, got {sorted(twice)} twice; rename one.")
        found |= new
    return found


def render(template: str, values: dict[str, str]) -> str:
    """``template`` with each ``{{name}}`` replaced; KeyError where a name has no number."""
    return PLACE.sub(lambda place: values[place[1]], template)


def words(page: str) -> int:
    """Words of the text, its table and captions; without the header, citations and rules."""
    text = page.split("---\n", 2)[2]
    text = re.sub(r"\[@[^\]]*\]|\]\([^)]*\)|https?://\S+", " ", text)
    return sum(any(map(str.isalnum, word)) for word in text.split())


def _json(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def _lines(name: str) -> list[dict[str, Any]]:
    text = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def main() -> int:
    """Write or check ``paper.md``, and list the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check = parser.parse_args().check
    values, paper = numbers(), HERE / "paper.md"
    page = render((HERE / "paper.in.md").read_text(encoding="utf-8"), values)
    for name, value in values.items():
        sys.stdout.write(f"{name:24}{value}\n")
    sys.stdout.write(f"{words(page)} words\n")
    if check:
        return int(paper.read_text(encoding="utf-8") != page)
    paper.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
