"""Bounds from error rates: exact limits, honest thresholds, coverage, and the best of several."""

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from audit_coverage import RUNS, gaussian_epsilon, most
from scipy import stats

from lora_privacy.audit import (
    LeakageEstimate,
    epsilon_clopper_pearson,
    epsilon_from_counts,
    strongest,
)
from lora_privacy.audit._binomial import upper_limit

EACH = 120  # trials of each class in the simulations
MEMBERS = np.arange(2 * EACH) < EACH


@pytest.mark.parametrize(
    ("count", "trials"), [(0, 1), (0, 10**5), (3, 20), (700, 1000), (99_999, 10**5), (40, 10**5)]
)
@pytest.mark.parametrize("level", [0.025, 1e-9])
def test_limits_match_mpmath(count: int, trials: int, level: float) -> None:
    """P[count or fewer] at the limit is the level: 30 digits, 1e-9 of the limit, rounded up."""
    limit = float(upper_limit(count, trials, level))
    with mp.workdps(30):

        def at_most(rate: float) -> mp.mpf:
            rate = mp.mpf(rate)
            few, upper = (count, False) if count < trials / 2 else (trials - 1, True)
            terms = range(count + 1) if not upper else range(count + 1, few + 2)
            total = mp.fsum(
                mp.binomial(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in terms
            )
            return 1 - total if upper else total

        assert at_most(limit) <= level
        assert at_most(limit * (1 - 3e-9)) > level


def test_a_limit_of_all_trials_is_one() -> None:
    """And limits grow with the count."""
    limits = upper_limit(np.arange(31), 30, 0.025)
    assert limits[-1] == 1
    assert np.all(np.diff(limits) > 0)


def slow(members: int, hits: int, others: int, alarms: int, delta: float) -> float:
    """The bound from scipy's exact binomial interval, direction by direction."""
    miss = stats.binomtest(members - hits, members).proportion_ci(0.95, "exact").high
    alarm = stats.binomtest(alarms, others).proportion_ci(0.95, "exact").high
    best = 0.0
    for kept, rate in ((1 - delta - miss, alarm), (1 - delta - alarm, miss)):
        if kept > 0:
            best = max(best, math.log(kept / rate))
    return best


@pytest.mark.parametrize(
    "case",
    [(50, 45, 60, 3, 0.0), (500, 250, 500, 0, 1e-5), (80, 80, 90, 55, 0.01), (9, 4, 9, 5, 0)],
)
def test_counts_match_scipy(case: tuple[int, int, int, int, float]) -> None:
    """Below the oracle, by at most 1e-8; each half of a 95 % interval is a limit at .025."""
    members, hits, others, alarms, delta = case
    found = from_counts(members, hits, others, alarms, delta).epsilon
    expected = slow(*case)
    assert expected - 1e-8 <= found <= expected


def from_counts(
    members: int, hits: int, others: int, alarms: int, delta: float, **more: Any
) -> LeakageEstimate:
    """The code under test at significance .05."""
    return epsilon_from_counts(
        members=members,
        true_positives=hits,
        non_members=others,
        false_positives=alarms,
        delta=delta,
        **{"significance": 0.05, **more},
    )


def simulate(name: str, rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Scores of RUNS audits, the mechanism's exact ε, and its δ."""
    shape = (RUNS, 2 * EACH)
    if name == "laplace":  # sensitivity 1, scale 1: every threshold outside [0, 1] shows ε = 1
        return rng.laplace(size=shape) + MEMBERS, 1.0, 0.0
    if name == "response":
        keep = rng.random(shape) < math.e / (1 + math.e)
        return np.where(keep, MEMBERS, ~MEMBERS).astype(float), 1.0, 0.0
    return rng.standard_normal(shape) + 1.5 * MEMBERS, gaussian_epsilon(1.5, 0.01), 0.01


def claims(scores: np.ndarray, **more: Any) -> np.ndarray:
    """ε claimed in each run."""
    more = {"seed": 0, **more}
    return np.array([epsilon_clopper_pearson(run, MEMBERS, **more).epsilon for run in scores])


@pytest.mark.parametrize("selection", ["split", "bonferroni"])
@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("laplace", {"split": 0.09, "bonferroni": 0.25}),
        ("response", {"split": 0.4, "bonferroni": 0.2}),
        ("gaussian", {"split": 0.09, "bonferroni": 0.25}),
    ],
)
def test_coverage(name: str, selection: str, power: dict[str, float]) -> None:
    """2,000 audits of 120 + 120 trials at 95 %: few false claims, and on average not vacuous."""
    scores, true, delta = simulate(name, np.random.default_rng(21))
    found = claims(scores, delta=delta, significance=0.05, selection=selection)
    assert np.sum(found > true) <= most(0.05)
    assert np.mean(found) >= power[selection] * true


@pytest.mark.parametrize("selection", ["split", "bonferroni"])
def test_power_with_many_trials(selection: str) -> None:
    """20,000 + 20,000 Laplace trials reach 85 % of the true ε = 1."""
    rng = np.random.default_rng(22)
    members = np.arange(40_000) < 20_000
    estimate = epsilon_clopper_pearson(
        rng.laplace(size=40_000) + members,
        members,
        delta=0.0,
        significance=0.05,
        selection=selection,
        seed=0,
    )
    assert 0.85 < estimate.epsilon <= 1.0


def test_a_threshold_picked_on_the_same_data_fails_the_coverage_test() -> None:
    """Laplace, 90 %: the best of all thresholds, each at the full level, lies too often."""
    each = 500
    members = np.arange(2 * each) < each
    scores = np.random.default_rng(23).laplace(size=(RUNS, 2 * each)) + members
    limits = upper_limit(np.arange(each + 1), each, 0.05)
    member = members[np.argsort(-scores, axis=1)]
    missed = limits[each - np.cumsum(member, axis=1)]
    alarms = limits[np.cumsum(~member, axis=1)]
    with np.errstate(invalid="ignore", divide="ignore"):
        greedy = np.fmax(np.log((1 - missed) / alarms), np.log((1 - alarms) / missed))
    assert np.sum(np.nanmax(greedy, axis=1) > 1.0) > most(0.1)


def test_leaving_out_delta_fails_the_coverage_test() -> None:
    """A mechanism that shows everything with probability δ = .2, and else nothing: ε = 0."""
    rng = np.random.default_rng(24)
    shown = rng.random((RUNS, 2 * EACH)) < 0.2
    scores = np.where(shown, np.where(MEMBERS, 2.0, -1.0), rng.random(shown.shape))
    assert np.sum(claims(scores, delta=0.2, significance=0.05) > 0) <= most(0.05)
    assert np.sum(claims(scores, delta=0.0, significance=0.05) > 0) > most(0.05)


@pytest.mark.parametrize("digits", [9, 0])
def test_fixed_ranks_match_a_plain_loop(digits: int) -> None:
    """Oracle: beta quantiles rank by rank; with ties the count stays j - 1. 40 shapes, 1e-7."""
    rng = np.random.default_rng(28)
    ranks = sorted({round(EACH ** (i / 3)) for i in range(4)})
    level = 0.05 / (2 * 2 * len(ranks))
    winners = set()
    for _ in range(40):
        spread = np.where(MEMBERS, *rng.uniform(0.3, 3, 2))
        scores = np.round(rng.standard_t(2, 2 * EACH) * spread + 3 * MEMBERS, digits)
        inside, outside = scores[MEMBERS], scores[~MEMBERS]
        best = (0.0, "none")
        for j in ranks:
            edge = stats.beta.isf(level, j, EACH - j + 1)
            high, low = sorted(outside)[-j], sorted(inside)[j - 1]
            for side, wrong in (("out", sum(inside <= high)), ("in", sum(outside >= low))):
                other = stats.beta.isf(level, wrong + 1, EACH - wrong) if wrong < EACH else 1.0
                for kept, rate in ((0.99 - other, edge), (0.99 - edge, other)):
                    best = max(best, (math.log(kept / rate) if kept > 0 else 0.0, f"{side}{j}"))
        winners.add(best[1])
        found = epsilon_clopper_pearson(
            scores, MEMBERS, delta=0.01, significance=0.05, selection="bonferroni", candidates=8
        )
        assert found.attempts == 2 * len(ranks)
        assert best[0] - 1e-7 <= found.epsilon <= best[0]
    assert {"in5", "out5"} <= winners


@pytest.mark.parametrize("selection", ["split", "bonferroni"])
def test_ties_cannot_leak_the_order_of_the_arrays(selection: str) -> None:
    """Equal scores, members first: nothing is shown. Fixed ranks do not see the order at all."""
    rng = np.random.default_rng(25)
    more: dict[str, Any] = {"delta": 0.0, "significance": 0.05, "selection": selection}
    assert epsilon_clopper_pearson(np.zeros(2 * EACH), MEMBERS, **more).epsilon == 0
    if selection == "split":
        return
    scores = np.round(rng.standard_normal(2 * EACH) + 2 * MEMBERS)
    shuffled = rng.permutation(2 * EACH)
    assert epsilon_clopper_pearson(scores, MEMBERS, **more) == epsilon_clopper_pearson(
        scores[shuffled], MEMBERS[shuffled], **more
    )


def test_halves_are_of_the_trials_and_not_of_the_ranks() -> None:
    """Randomised response, 72 + 72 trials: sorted ones, halved by a fixed seed, claim too much.

    Seeds of the system, and a fixed one in the order of the trials, do not.
    """
    rng, p, each, runs = np.random.default_rng(27), 0.85, 72, 600
    members = np.arange(2 * each) < each
    scores = np.where(rng.random((runs, 2 * each)) < p, members, ~members).astype(float)
    true, level = math.log(p / (1 - p)), {"delta": 0.0, "significance": 0.05}

    def false_claims(trials: np.ndarray, **more: Any) -> int:
        found = [epsilon_clopper_pearson(run, members, **level, **more).epsilon for run in trials]
        return int(np.sum(np.array(found) > true))

    allowed = int(stats.binom.isf(1e-6, runs, 0.05))
    assert false_claims(scores) <= allowed
    assert false_claims(scores, seed=0) <= allowed
    in_order = np.concatenate([np.sort(scores[:, members]), np.sort(scores[:, ~members])], axis=1)
    assert false_claims(in_order, seed=0) > allowed


def test_coverage_with_ties() -> None:
    """Laplace scores cut to multiples of ½, fixed ranks: a tie must count as the worse case."""
    scores, true, _ = simulate("laplace", np.random.default_rng(26))
    found = claims(
        np.round(2 * scores), delta=0.0, significance=0.3, selection="bonferroni", candidates=2
    )
    assert np.sum(found > true) <= most(0.3)


def test_single_precision_forgets_no_delta() -> None:
    """1 - 2e-8 is 1 in float32: with as many trials ε came out as 0.50 in place of 0.11."""
    counts = {"members": 10**8, "true_positives": 12, "non_members": 10**8, "false_positives": 0}
    delta, level = np.float32(2e-8), np.float32(0.05)
    found = epsilon_from_counts(**counts, delta=delta, significance=level)
    assert found == epsilon_from_counts(**counts, delta=float(delta), significance=float(level))
    assert 0.1 < found.epsilon < 0.11


def test_a_flawless_attack_reaches_the_ceiling() -> None:
    """200 + 200 trials: all of them by Bonferroni's 16, half of them by the split."""
    scores = np.concatenate([np.ones(200), np.zeros(200)])
    members = scores > 0
    level = {"split": (100, 0.025), "bonferroni": (200, 0.025 / 16)}
    for selection, (trials, tail) in level.items():
        estimate = epsilon_clopper_pearson(
            scores, members, delta=0.01, significance=0.05, selection=selection
        )
        rate = 1 - tail ** (1 / trials)
        assert estimate.ceiling == pytest.approx(math.log((0.99 - rate) / rate), rel=1e-7)
        assert estimate.canaries == 400
    split = epsilon_clopper_pearson(scores, members, delta=0.01, significance=0.05)
    assert split.epsilon == split.ceiling
    assert (split.attempts, estimate.attempts) == (1, 16)


def test_too_few_trials_are_refused_with_the_number_needed() -> None:
    """Six flawless trials of each class show something at 5 %, five do not."""
    with pytest.raises(ValueError, match="6 of each are enough"):
        from_counts(5, 5, 5, 0, 0.0)
    assert from_counts(6, 6, 6, 0, 0.0).epsilon > 0
    scores, members = np.arange(20.0), np.arange(20) >= 10
    with pytest.raises(ValueError, match="12 of each are enough"):
        epsilon_clopper_pearson(scores, members, delta=0.0, significance=0.05)
    members = np.arange(24) >= 12
    scores = members.astype(float)
    assert epsilon_clopper_pearson(scores, members, delta=0.0, significance=0.05).epsilon > 0


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"scores": [0.0, math.nan, 1.0]}, ValueError, r"scores\[1\] is NaN"),
        ({"members": [True, True, True]}, ValueError, "got 3 of 3"),
        ({"members": [False] * 3}, ValueError, "got 0 of 3"),
        ({"members": [True, False]}, ValueError, r"members must have shape \(3\), got \(2,\)"),
        ({"members": [1, 0, 1]}, TypeError, "members must be boolean"),
        (
            {"scores": [[0.0, 1.0, 2.0]]},
            ValueError,
            r"scores must have shape \(at least 1\), got \(1, 3\)",
        ),
        ({"selection": "best"}, ValueError, "selection must be one of"),
        ({"delta": 1.0}, ValueError, "delta must lie in"),
        ({"significance": 1.0}, ValueError, "significance must lie in"),
        ({"selection": "bonferroni", "candidates": 1}, ValueError, "candidates must be at least"),
    ],
)
def test_bad_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each is named."""
    good: dict[str, Any] = {
        "scores": [0.0, 0.5, 1.0],
        "members": [True, False, True],
        "delta": 0.0,
        "significance": 0.05,
    }
    with pytest.raises(error, match=message):
        epsilon_clopper_pearson(**{**good, **wrong})


def test_counts_out_of_range() -> None:
    """More hits than trials."""
    with pytest.raises(ValueError, match="true_positives must be at most 10, got 11"):
        from_counts(10, 11, 10, 0, 0.0)
    with pytest.raises(ValueError, match="false_positives must be at least 0"):
        from_counts(10, 10, 10, -1, 0.0)


def attack(hits: int, delta: float = 0.0, level: float | None = None) -> Any:
    """An attack with a fixed outcome; with a ``level`` of its own it cheats."""
    return lambda share: from_counts(
        100, hits, 100, 2, delta, significance=share if level is None else level
    )


def test_the_best_of_several_attacks_pays_for_all() -> None:
    """Three attacks, each at a third; a claim that passes each at its full level is refused."""
    best = strongest(
        {"weak": attack(20), "good": attack(90), "fair": attack(50)}, significance=0.06
    )
    assert best.epsilon == from_counts(100, 90, 100, 2, 0.0, significance=0.02).epsilon
    assert (best.significance, best.attempts) == (0.06, 3)
    assert best.observed.startswith("good: 90 of 100")
    assert "the best of 3, all paid for" in str(best)
    with pytest.raises(ValueError, match=r"'cheat' was handed the significance 0\.03"):
        strongest({"good": attack(90), "cheat": attack(95, level=0.05)}, significance=0.06)
    with pytest.raises(ValueError, match="share one δ"):
        strongest({"good": attack(90), "other": attack(90, delta=0.01)}, significance=0.06)
    with pytest.raises(ValueError, match="at least one"):
        strongest({}, significance=0.05)


def test_the_best_of_several_is_still_a_bound() -> None:
    """20 useless attacks, 2,000 times: any ε > 0 is false; at the full level each, too many."""
    rng = np.random.default_rng(27)
    table = {
        level: np.array(
            [
                [from_counts(30, h, 30, a, 0.0, significance=level).epsilon > 0 for a in range(31)]
                for h in range(31)
            ]
        )
        for level in (0.2, 0.2 / 20)
    }
    hits, alarms = rng.binomial(30, 0.5, (2, RUNS, 20))
    assert np.sum(np.any(table[0.2 / 20][hits, alarms], axis=1)) <= most(0.2)
    assert np.sum(np.any(table[0.2][hits, alarms], axis=1)) > most(0.2)
