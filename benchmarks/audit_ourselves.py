"""The tables of docs/theory/auditing-ourselves.md: what audits of our own mechanisms show.

They play the games of tests/audit/test_ourselves_*.py, with their fixed seeds: a minute.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from lora_privacy.dp import PldAccountant

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "audit"))

import test_ourselves_dp as mechanisms  # pyright: ignore[reportMissingImports]
import test_ourselves_training as training  # pyright: ignore[reportMissingImports]


def table(*head: str) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))


def line(*cells: object) -> None:
    texts = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(texts) + " |", flush=True)


def described(options: dict[str, object]) -> str:
    """Settings of a step, the defaults too."""
    shown = {"z": 1.0, "rate": 1.0, "adjacency": "add-remove", **options}
    extra = [f"{options['law']} A"] if "law" in options else []
    extra += [f"{options['rule']} clip"] if "rule" in options else []
    return ", ".join(
        [f"z = {shown['z']}", f"q = {shown['rate']}", str(shown["adjacency"]), *extra]
    )


def root(excess: Callable[[float], float]) -> float:
    return float(optimize.brentq(excess, 0.0, 30.0))  # pyright: ignore[reportArgumentType]


def revealed(game: mechanisms.Game, draws: int = 200_000) -> float:
    """ε of a NoisedProjection pair whose A is public, by averaging δ over A."""
    pair, rng = game.mechanism, np.random.default_rng(1)
    difference = (pair.v_prime - pair.v)[:, pair._column]
    a = rng.standard_normal((draws, pair.rank, len(difference))) / math.sqrt(pair.rank)
    shift = np.linalg.norm((a.mT @ (a @ difference)[..., None])[..., 0], axis=1) / pair.noise_std

    def excess(epsilon: float) -> float:
        high = stats.norm.cdf(shift / 2 - epsilon / shift)
        low = stats.norm.cdf(-shift / 2 - epsilon / shift)
        return float(np.mean(high - math.exp(epsilon) * low)) - game.delta

    return root(excess)


def sketched(game: mechanisms.Game, draws: int = 400_000) -> float:
    """ε of a SketchRelease pair: δ(ε) = E max(0, 1 - e^(ε - L)), the larger direction."""
    pair, rng = game.mechanism, np.random.default_rng(1)
    gradients = pair.gradient, pair.gradient_prime
    s, other = (g @ g.T / pair.rank for g in gradients)
    middle = np.linalg.inv(other) - np.linalg.inv(s)
    shift = pair.rank / 2 * (np.linalg.slogdet(other)[1] - np.linalg.slogdet(s)[1])
    found = []
    for gradient, sign in zip(gradients, (1.0, -1.0), strict=True):
        y = gradient @ rng.standard_normal((draws, gradient.shape[1], pair.rank))
        y /= math.sqrt(pair.rank)
        loss = sign * (np.einsum("kir,ij,kjr->k", y, middle, y) / 2 + shift)
        found.append(
            root(lambda e, x=loss: float(np.mean(np.maximum(0.0, -np.expm1(e - x)))) - game.delta)
        )
    return max(found)


def main() -> None:
    table("mechanism", "δ", "claimed ε", "audited ε ≥", "share")
    for game in mechanisms.GAMES:
        claimed, found = min(game.claims().values()), game.found()
        line(game.name, game.delta, claimed, found, f"{found / claimed:.0%}")

    print("\nε of two pairs by Monte Carlo, where the claim is an upper bound of it:")
    print(f"NoisedProjection, A revealed: {revealed(mechanisms.PAIRS[2]):.3f}")
    print(f"SketchRelease: {sketched(mechanisms.PAIRS[4]):.3f}")

    print("\nShares of the claim at δ = 1e-5, from the same draws:")
    for game in (mechanisms.PLAIN[0], mechanisms.PLAIN[2]):
        claimed = PldAccountant().compose(game.mechanism).epsilon(1e-5).epsilon
        found = mechanisms.audited(game.scores(), 1e-5).epsilon
        print(f"{game.name}: {found:.3f} of {claimed:.3f}, {found / claimed:.0%}")

    table("sabotaged mechanism", "sabotage", "claimed ε", "audited ε ≥", "factor")
    for game in [*mechanisms.PLAIN, *mechanisms.PROJECTED]:
        claimed = game.claims()["pld"]
        kinds = {"half the noise": {"noise": 0.5}}
        if game.name.startswith("sampled"):
            kinds["no coins"] = {"sampled": False}
        if game in mechanisms.PROJECTED and game.options is mechanisms.ONE:
            kinds["A used again"] = {"fresh": False}
        for name, sabotage in kinds.items():
            found = game.found(**sabotage)
            line(game.name, name, claimed, found, f"{found / claimed:.1f}")

    table("method", "step", "games", "claimed ε", "audited ε ≥", "share")
    for method, options, _ in training.HONEST:
        played = training.play(method, **options)
        found = training.audited(played).epsilon
        share = f"{found / played.claimed:.0%}"
        line(method, described(options), len(played.scores), played.claimed, found, share)
    played, plain, gaussian = training.one_run()
    proved = played.accountant.epsilon(plain.delta).epsilon
    share = f"{plain.epsilon / proved:.0%}"
    step = f"one run, δ = {plain.delta:g}"
    line("dp-sgd", step, len(played.scores), proved, plain.epsilon, share)
    line("dp-sgd", "one run, μ", len(played.scores), 1.0, gaussian.mu, f"{gaussian.mu:.0%}")

    table("sabotaged method", "sabotage", "step", "games", "claimed ε", "audited ε ≥", "factor")
    for sabotage, method, options, _ in training.SABOTAGED:
        with sabotage():
            played = training.play(method, **options)
        found = training.audited(played).epsilon
        name = "A used again" if "known" in options else sabotage.__name__.replace("_", " ")
        factor = f"{found / played.claimed:.1f}"
        line(
            method, name, described(options), len(played.scores), played.claimed, found, factor
        )  # fmt: skip
    with training.the_realised_size_divides():
        played = training.size_games()
    found = training.audited(played).epsilon
    line(
        "dp-sgd", "realised size divides", "z = 4.0, q = 0.5, add-remove", len(played.scores),
        played.claimed, found, f"{found / played.claimed:.1f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
