"""Johnson–Lindenstrauss probabilities against mpmath and draws of A."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest

from lora_privacy.noise import jl, jl_distortion, jl_failure, jl_probability


def exact_failure(rank: int, distortion: float) -> mp.mpf:
    """P[χ²_r/r < (1-τ)² or > (1+τ)²] at 40 digits."""
    half, tau = mp.mpf(rank) / 2, mp.mpf(distortion)
    low = half * max(mp.mpf(0), 1 - tau) ** 2
    below = mp.gammainc(half, 0, low, regularized=True)
    return below + mp.gammainc(half, half * (1 + tau) ** 2, mp.inf, regularized=True)


@pytest.mark.parametrize("rank", [1, 8, 64, 1024])
@pytest.mark.parametrize("distortion", [0.0, 1e-3, 0.5, 0.9, 1.0, 3.0])
def test_failure_matches_mpmath(rank: int, distortion: float) -> None:
    """1e-10 relative down to 1e-300, never below the exact value; 40 digits."""
    with mp.workdps(40):
        expected = exact_failure(rank, distortion)
        value = jl_failure(rank, distortion)
        if expected < mp.mpf(10) ** -300:
            assert value == pytest.approx(0.0, abs=1e-299)
            return
        assert value == pytest.approx(float(expected), rel=1e-10, abs=0)
        assert mp.mpf(value) >= min(expected, 1)
        probability = jl_probability(rank, distortion)
        assert 0.0 <= probability <= 1 - expected
        assert probability == pytest.approx(float(1 - expected), abs=1e-11)


def test_union_bound() -> None:
    """Vectors multiply the failure; at most 1, so the probability is never negative."""
    one = jl_failure(64, 0.5)
    assert jl_failure(64, 0.5, vectors=100) == pytest.approx(100 * one, rel=1e-12, abs=0)
    assert jl_failure(8, 0.5, vectors=10**9) == 1.0
    assert jl_probability(8, 0.5, vectors=10**9) == 0.0
    assert jl_probability(1024, 0.9, vectors=10) < 1.0


def test_probability_matches_its_definition() -> None:
    """20,000 draws of A at 4.5 standard errors (1e-5); τ = 0.35 must be rejected for 0.3."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal(6)
    norms = np.linalg.norm(rng.standard_normal((20_000, 8, 6)) @ x / math.sqrt(8), axis=1)
    inside = np.abs(norms / np.linalg.norm(x) - 1) <= 0.3
    error = 4.5 * math.sqrt(0.25 / 20_000)
    assert abs(inside.mean() - jl_probability(8, 0.3)) < error
    assert abs(inside.mean() - jl_probability(8, 0.35)) > error


@pytest.mark.parametrize(
    ("rank", "failure", "vectors"), [(8, 0.05, 1), (64, 1e-30, 1000), (1, 0.5, 7)]
)
def test_distortion_is_the_least_that_keeps_the_failure(
    rank: int, failure: float, vectors: int
) -> None:
    """It holds at τ and fails 1e-11 below it."""
    tau = jl_distortion(rank, failure, vectors)
    assert jl_failure(rank, tau, vectors) <= failure < jl_failure(rank, tau * (1 - 1e-11), vectors)


@pytest.mark.parametrize(("rank", "failure"), [(64, 0.05), (1, 0.01), (1, 1e-6)])
def test_a_distortion_costs_a_halving_a_bit(
    rank: int, failure: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For τ below 1, up to 2 and above: doubled, then halved until 1e-13 of τ is left."""
    inner, calls = jl.jl_failure, list[float]()

    def count(rank: int, distortion: float, vectors: int) -> float:
        calls.append(distortion)
        return inner(rank, distortion, vectors)

    monkeypatch.setattr(jl, "jl_failure", count)
    tau = jl_distortion(rank, failure)
    doubled = math.ceil(max(math.log2(tau), 0.0))
    halvings = math.ceil(math.log2(2.0 ** max(doubled - 1, 0) / (1e-13 * tau)))
    assert calls[: 1 + doubled] == [2.0**i for i in range(1 + doubled)]
    assert len(calls) == 1 + doubled + halvings


def test_what_cannot_fail_has_probability_one() -> None:
    """At τ = 100 both tails are below the smallest double; at τ = 7 they are not."""
    assert jl_failure(8, 100.0) == 0.0
    assert jl_probability(8, 100.0) == 1.0
    assert 0.0 < jl_failure(8, 7.0) < 1e-40
    assert jl_probability(8, 7.0) == math.nextafter(1.0, 0.0)


def test_no_distortion_below_one_for_a_layer_at_rank_8() -> None:
    """Theory 3.2: 32 samples of 768 rows at rank 8 and total failure .05 leave no τ < 1."""
    assert jl_failure(8, math.nextafter(1.0, 0.0), vectors=24_576) > 0.05
    assert jl_distortion(8, 0.05, vectors=24_576) > 1.0
    assert jl_distortion(64, 0.05, vectors=24_576) < 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jl_failure(0, 0.5), "rank must be at least 1"),
        (lambda: jl_failure(8, -0.1), "distortion must lie in"),
        (lambda: jl_failure(8, math.nan), "distortion must lie in"),
        (lambda: jl_probability(8, 0.5, vectors=0), "vectors must be at least 1"),
        (lambda: jl_distortion(8, 0.0), "failure must lie in"),
        (lambda: jl_distortion(8, 1.0), "failure must lie in"),
        (lambda: jl_distortion(8, math.nan), "failure must lie in"),
    ],
)
def test_bad_arguments_are_refused(call: object, message: str) -> None:
    """Fail closed, with what must hold."""
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
