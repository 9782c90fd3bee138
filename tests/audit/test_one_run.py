"""One-run bounds: the published numbers, slow oracles, exact worst cases, and coverage."""

import itertools
import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from audit_coverage import RUNS, gaussian_epsilon, most, worst_law
from scipy import optimize, stats

from lora_privacy.audit import (
    epsilon_one_run,
    epsilon_one_run_fdp,
    epsilon_one_run_scores,
    guess,
    one_run_p_value,
)
from lora_privacy.audit.one_run_gaussian import gdp_epsilon

CASES = [
    (10, 10, 8, 0.5, 1e-3),
    (40, 10, 9, 1.0, 1e-3),
    (100, 30, 25, 0.7, 1e-4),
    (100, 30, 20, 0.3, 1e-2),
    (5, 5, 5, 0.0, 0.05),
    (60, 60, 45, 0.9, 1e-4),
]
TERMS = ("published", "tight")


def direct(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The published p-value, term by term."""
    q = 1 / (1 + math.exp(-epsilon))
    beta = stats.binom.sf(correct - 1, guesses, q)
    most_per_step = total = 0.0
    for i in range(1, correct + 1):
        total += stats.binom.pmf(correct - i, guesses, q)
        most_per_step = max(most_per_step, total / i)
    return min(1.0, beta + 2 * canaries * delta * most_per_step)


def p_value(case: tuple[int, int, int, float, float], delta_term: str = "published") -> float:
    """The code under test, on a tuple."""
    names = ("canaries", "guesses", "correct", "epsilon", "delta")
    return one_run_p_value(**dict(zip(names, case, strict=True)), delta_term=delta_term)


def bound(canaries: int, guesses: int, correct: int, delta: float, **more: Any) -> float:
    """ε of the code under test at significance .05."""
    return epsilon_one_run(
        canaries=canaries,
        guesses=guesses,
        correct=correct,
        delta=delta,
        **{"significance": 0.05, **more},
    ).epsilon


@pytest.mark.parametrize(
    ("case", "published"), [((1000, 100, 75, 1e-4), 0.67298), ((10**5, 1510, 1439, 1e-5), 2.67585)]
)
def test_published_numbers(case: tuple[int, int, int, float], published: float) -> None:
    """Pins of the reference code at significance .05; the tight δ term gives more."""
    assert bound(*case) == pytest.approx(published, abs=1e-3)
    assert published + 0.02 < bound(*case, delta_term="tight") < published + 0.2


@pytest.mark.parametrize("case", CASES)
def test_p_value_matches_the_direct_sum(case: tuple[int, int, int, float, float]) -> None:
    """1e-12 relative before the declared slack of 1e-8, and never below."""
    assert p_value(case) == pytest.approx(direct(*case) * (1 + 1e-8), rel=1e-12, abs=0)


@pytest.mark.parametrize("delta_term", TERMS)
@pytest.mark.parametrize(
    ("guesses", "correct", "epsilon"),
    [(1510, 1439, 2.7), (10**5, 73_500, 1.0), (10**5, 74_000, 1.0), (10**5, 49_000, 0.0)],
)
def test_large_runs_match_mpmath(
    guesses: int, correct: int, epsilon: float, delta_term: str
) -> None:
    """10⁵ canaries, δ = 1e-12, 30 digits; tails to 1e-10. Above the oracle, by 2e-8 at most."""
    canaries, delta = 10**5, mp.mpf("1e-12")
    with mp.workdps(30):
        odds = mp.exp(mp.mpf(epsilon))

        def ratio(k: int) -> mp.mpf:
            return (guesses - k) * odds / (k + 1)

        mass = mp.binomial(guesses, correct) * odds**correct / (1 + odds) ** guesses
        tail, term, k = mp.mpf(0), mass, correct
        while k <= guesses and (term > mp.mpf("1e-40") * tail or ratio(k) > 1):
            tail, term, k = tail + term, term * ratio(k), k + 1
        if delta_term == "tight":
            extra = (1 - tail) * canaries * delta * tail / (correct * mass)
        else:
            below, total, extra = mass, mp.mpf(0), mp.mpf(0)
            for i in range(1, min(correct, 4000) + 1):
                below /= ratio(correct - i)
                total += below
                extra = max(extra, 2 * canaries * delta * total / i)
        exact = float(min(mp.mpf(1), tail + extra))
    found = p_value((canaries, guesses, correct, epsilon, 1e-12), delta_term)
    assert exact * (1 - 1e-15) <= found <= min(1.0, exact * (1 + 2e-8))


def linear_program(
    canaries: int,
    guesses: int,
    correct: int,
    profile: list[tuple[float, float]],
) -> float:
    """Largest P[W >= v] over all laws of W that pass every (ε, δ) of ``profile``, by simplex.

    For neighbouring coins the event "guess i is right and k are", against "guess i is wrong and
    k - 1 are right", averaged over i and the coins, gives sum_k (k p_k - e^ε (g - k + 1)
    p_{k-1})₊ <= c δ, and the same the other way round. A mechanism attains every such law.
    """
    g, n = guesses, guesses + 1
    size = n + 2 * g * len(profile)
    rows, limits = [], []
    for j, (epsilon, delta) in enumerate(profile):
        start = n + 2 * g * j
        for k in range(1, n):
            for offset, (gain, loss) in enumerate(((k, k - 1), (k - 1, k))):
                row = np.zeros(size)
                weight = {k: k, k - 1: g - k + 1}
                row[gain] += weight[gain]
                row[loss] -= math.exp(epsilon) * weight[loss]
                row[start + 2 * (k - 1) + offset] = -1
                rows.append(row)
                limits.append(0.0)
        row = np.zeros(size)
        row[start : start + 2 * g] = 1
        rows.append(row)
        limits.append(canaries * delta)
    cost = np.zeros(size)
    cost[correct:n] = -1
    one = np.zeros((1, size))
    one[0, :n] = 1
    done = optimize.linprog(cost, np.array(rows), limits, one, [1.0], method="highs")
    assert done.status == 0
    return -done.fun


@pytest.mark.parametrize("case", CASES)
def test_tight_value_is_the_exact_worst_case(case: tuple[int, int, int, float, float]) -> None:
    """Oracle: a linear program over all laws that (ε, δ) allows, 1e-7 relative."""
    exact = linear_program(*case[:3], [case[3:]])
    assert p_value(case, "tight") == pytest.approx(exact, rel=1e-7, abs=0)
    assert p_value(case) >= exact


def test_the_worst_case_is_a_mechanism() -> None:
    """By enumeration of 2⁴ coins and all outputs: exactly (ε, δ)-private, and it reaches the p.

    Four canaries, three guesses on a random subset; both directions of every neighbouring pair.
    """
    canaries, guesses, at, epsilon, delta = 4, 3, 2, 0.7, 0.01
    law = worst_law(canaries, guesses, at, epsilon, delta)
    per_output = law / np.array(
        [math.comb(canaries, guesses) * math.comb(guesses, k) for k in range(guesses + 1)]
    )
    outputs = [
        t for t in itertools.product((-1, 0, 1), repeat=canaries) if np.count_nonzero(t) == guesses
    ]
    coins = list(itertools.product((-1, 1), repeat=canaries))
    given = {
        s: np.array([per_output[sum(a == b for a, b in zip(s, t, strict=True))] for t in outputs])
        for s in coins
    }
    worst = 0.0
    for s in coins:
        assert given[s].sum() == pytest.approx(1, abs=1e-12)
        for i in range(canaries):
            other = given[(*s[:i], -s[i], *s[i + 1 :])]
            excess = np.maximum(given[s] - math.exp(epsilon) * other, 0).sum()
            worst = max(worst, float(excess))
    assert worst == pytest.approx(delta, rel=1e-9, abs=0)
    case = (canaries, guesses, at, epsilon, delta)
    assert law[at:].sum() * (1 + 1e-8) == pytest.approx(p_value(case, "tight"), rel=1e-12, abs=0)


def test_published_term_is_sound_where_claims_are_made_and_capped_where_not() -> None:
    """Below p = 1/2 the published formula exceeds the tight one; near 1 it can fall below."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        guesses = int(10 ** rng.uniform(0.7, 2.5))
        epsilon = float(rng.exponential(1.5))
        correct = int(
            stats.binom.isf(10 ** -rng.uniform(0.31, 10), guesses, 1 / (1 + math.exp(-epsilon)))
        )
        case = (guesses * 3, guesses, min(guesses, correct + 1), epsilon, 1e-4 / guesses)
        assert direct(*case) >= p_value(case, "tight") / (1 + 1e-8)
    unsound = (8, 2, 1, 2.5, 1e-3)
    exact = linear_program(*unsound[:3], [unsound[3:]])
    assert direct(*unsound) < exact - 1e-4
    assert p_value(unsound) >= exact


def claims(
    right: np.ndarray, canaries: int, guesses: int, delta: float, **more: Any
) -> np.ndarray:
    """ε claimed for each number of right guesses, same shape."""
    values, where = np.unique(right, return_inverse=True)
    return np.array([bound(canaries, guesses, int(v), delta, **more) for v in values])[where]


@pytest.mark.parametrize("delta_term", TERMS)
def test_coverage_on_randomised_response(delta_term: str) -> None:
    """ε = 1 exactly, 2,000 runs; a p-value read at twice the level is rejected."""
    rng = np.random.default_rng(11)
    coins = rng.integers(0, 2, (RUNS, 200))
    answers = np.where(rng.random(coins.shape) < math.e / (1 + math.e), coins, 1 - coins)
    right = np.sum(answers == coins, axis=1)
    found = claims(right, 200, 200, 0.0, delta_term=delta_term)
    assert np.sum(found > 1.0) <= most(0.05)
    assert np.mean(found) > 0.6  # not vacuous
    wrong = claims(right, 200, 200, 0.0, delta_term=delta_term, significance=0.1)
    assert np.sum(wrong > 1.0) > most(0.05)


@pytest.mark.parametrize("delta_term", TERMS)
def test_coverage_on_the_worst_mechanism(delta_term: str) -> None:
    """ε = 1 at δ about .02, one run over 100 canaries; a bound without its δ term is rejected."""
    canaries, epsilon, delta = 100, 1.0, 0.02 if delta_term == "tight" else 0.015
    rng = np.random.default_rng(12)
    for at in (84, 81):
        law = worst_law(canaries, canaries, at, epsilon, delta)
        right = rng.choice(canaries + 1, size=RUNS, p=law)
        found = claims(right, canaries, canaries, delta, delta_term=delta_term)
        assert np.sum(found > epsilon) <= most(0.05)
    assert np.sum(claims(right, canaries, canaries, 0.0) > epsilon) > most(0.05)


def test_tight_term_leaves_no_room_on_the_worst_mechanism() -> None:
    """At the v where p is just below 5 % the mechanism gets there with just that probability."""
    law = worst_law(100, 100, 85, 1.0, 0.02)
    p = p_value((100, 100, 85, 1.0, 0.02), "tight")
    assert 0.02 < p <= 0.05
    assert law[85:].sum() == pytest.approx(p, rel=1e-7)


def test_coverage_on_a_gaussian_mechanism() -> None:
    """μ = 1.5, scores of 400 canaries, 60 guesses: all three bounds; a naive one is rejected.

    The naive bound takes guesses for independent with P[right] = Φ(μ/2), though the attacker
    chose which to make.
    """
    mu, delta, canaries, guesses = 1.5, 1e-4, 400, 60
    rng = np.random.default_rng(13)
    coins = rng.random((RUNS, canaries)) < 0.5
    scores = mu * coins + rng.standard_normal(coins.shape)
    right = np.array(
        [guess(x, s, top=30, bottom=30).correct for x, s in zip(scores, coins, strict=True)]
    )
    true = gaussian_epsilon(mu, delta)
    plain = claims(right, canaries, guesses, delta)
    assert np.sum(plain > true) <= most(0.05)
    assert np.mean(plain) > 0.25 * true
    gaussian = [
        epsilon_one_run_fdp(
            canaries=canaries, guesses=guesses, correct=v, delta=delta, significance=0.05
        )
        for v in range(guesses + 1)
    ]
    mus = np.array([estimate.mu for estimate in gaussian])[right]
    epsilons = np.array([estimate.epsilon for estimate in gaussian])[right]
    assert np.sum(mus > mu) <= most(0.05)
    assert np.sum(epsilons > true) <= most(0.05)
    assert np.mean(mus) > 0.4 * mu
    assert np.mean(epsilons) > 1.2 * np.mean(plain)
    low = stats.beta.ppf(0.05, right, guesses - right + 1)
    assert np.sum(2 * stats.norm.ppf(np.nan_to_num(low)) > mu) > most(0.05)


@pytest.mark.parametrize(
    ("mu", "case"), [(1.0, (20, 12, 10)), (0.6, (12, 12, 10)), (2.0, (40, 10, 9))]
)
def test_gaussian_recursion_is_never_below_the_worst_case(
    mu: float, case: tuple[int, int, int]
) -> None:
    """The p-value of the recursion against a linear program with 30 points of the profile.

    The program allows more than μ-GDP does, up to its 30 points, and still stays below; the
    recursion's own slack is a factor of 3 at most here.
    """
    epsilons = np.linspace(0, mu * mu / 2 + 3 * mu, 30)
    profile = [
        (
            float(e),
            float(
                stats.norm.cdf(mu / 2 - e / mu) - math.exp(e) * stats.norm.cdf(-mu / 2 - e / mu)
            ),
        )
        for e in epsilons
    ]
    worst = linear_program(*case, profile)
    own = recursion_p_value(mu, *case)
    assert worst <= own * 1.001
    assert own <= 3 * worst


def recursion_p_value(mu: float, canaries: int, guesses: int, correct: int) -> float:
    """Smallest significance at which the code under test refutes μ."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        estimate = (
            epsilon_one_run_fdp(
                canaries=canaries,
                guesses=guesses,
                correct=correct,
                delta=1e-5,
                significance=middle,
            )
            if middle > 0.5**guesses * 4
            else None
        )
        low, high = (low, middle) if estimate and estimate.mu > mu else (middle, high)
    return high


@pytest.mark.parametrize(
    ("mu", "case"), [(1.0, (20, 12, 10)), (0.6, (12, 12, 10)), (2.0, (40, 10, 9))]
)
def test_gaussian_recursion_solves_its_own_program(mu: float, case: tuple[int, int, int]) -> None:
    """Oracle: the constraints of the recursion as tangents of the curve, by simplex; 1e-3.

    With p_k = P[k right]: sum_{k>i} k p_k / c <= Φ(Φ⁻¹(sum_{k>=i} (g - k) p_k / c) + μ).
    """
    canaries, guesses, correct = case
    k = np.arange(guesses + 1)
    rows, limits = [], []
    for x in stats.norm.cdf(np.linspace(-4, 3, 300)):
        z = stats.norm.ppf(x) + mu
        slope = math.exp((stats.norm.ppf(x) ** 2 - z**2) / 2)
        for i in range(guesses):
            right, wrong = np.where(k > i, k, 0), np.where(k >= i, guesses - k, 0)
            rows.append((right - slope * wrong) / canaries)
            limits.append(stats.norm.cdf(z) - slope * x)
    done = optimize.linprog(
        -(k >= correct).astype(float),
        np.array(rows),
        limits,
        np.ones((1, guesses + 1)),
        [1.0],
        method="highs",
    )
    assert recursion_p_value(mu, *case) == pytest.approx(-done.fun, rel=1e-3, abs=0)


@pytest.mark.parametrize("delta", [1e-12, 1e-5, 0.1])
@pytest.mark.parametrize("mu", [1e-3, 0.3, 1.0, 8.0])
def test_epsilon_of_a_gaussian_curve(mu: float, delta: float) -> None:
    """Oracle: mpmath's δ at 40 digits. It exceeds the target at the ε returned, and is near."""
    epsilon = gdp_epsilon(mu, delta)
    with mp.workdps(40):
        m = mp.mpf(mu)

        def profile(e: float) -> mp.mpf:
            e = mp.mpf(e)
            return mp.ncdf(m / 2 - e / m) - mp.exp(e) * mp.ncdf(-m / 2 - e / m)

        if epsilon == 0:
            assert profile(0) <= delta * (1 + 1e-6)
        else:
            assert profile(epsilon) > delta
            assert profile(epsilon * (1 + 1e-6) + 1e-12) < delta


def test_guess_counts_what_a_plain_sort_counts() -> None:
    """Without ties; 200 random runs."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        n = int(rng.integers(20, 60))
        coins = rng.random(n) < 0.5
        scores = rng.standard_normal(n) + coins
        top, bottom = int(rng.integers(0, n // 2)), int(rng.integers(1, n // 2))
        order = np.argsort(scores)
        right = coins[order[n - top :]].sum() + (~coins[order[:bottom]]).sum()
        assert guess(scores, coins, top=top, bottom=bottom).correct == right


def test_ties_cannot_leak_the_order_of_the_arrays() -> None:
    """Equal scores, members first: as few right guesses as the counts allow."""
    coins = np.arange(100) < 50
    assert guess(np.zeros(100), coins, top=50, bottom=0).correct == 0
    assert guess(np.zeros(100), coins, top=40, bottom=40).correct == 0
    assert guess(np.zeros(100), coins, top=60, bottom=0).correct == 10
    scores = np.where(np.arange(100) < 5, 1.0, 0.0)
    assert guess(scores, coins, top=10, bottom=0).correct == 5


def test_several_numbers_of_guesses_share_the_significance() -> None:
    """The best of three at a third each; the best of three at the full level would claim more."""
    rng = np.random.default_rng(4)
    coins = rng.random(1000) < 0.5
    scores = 2 * coins + rng.standard_normal(1000)
    one = {
        g: epsilon_one_run_scores(scores, coins, guesses=g, delta=1e-5, significance=0.05 / 3)
        for g in (50, 100, 201)
    }
    several = epsilon_one_run_scores(
        scores, coins, guesses=(50, 100, 201), delta=1e-5, significance=0.05
    )
    assert several.epsilon == max(estimate.epsilon for estimate in one.values())
    assert (several.attempts, several.significance) == (3, 0.05)
    assert several.epsilon < max(
        epsilon_one_run_scores(scores, coins, guesses=g, delta=1e-5, significance=0.05).epsilon
        for g in one
    )
    assert several.observed in {estimate.observed for estimate in one.values()}


def test_more_right_guesses_or_less_confidence_never_lower_the_bound() -> None:
    """And a flawless attack reaches the ceiling."""
    steps = claims(np.arange(41), 300, 40, 1e-4)
    assert np.all(np.diff(steps) >= 0)
    assert steps[20] == 0
    estimate = epsilon_one_run(canaries=300, guesses=40, correct=40, delta=1e-4, significance=0.05)
    assert estimate.epsilon == estimate.ceiling == steps[-1]
    assert bound(300, 40, 38, 1e-4, significance=0.01) < steps[38]
    assert bound(300, 40, 38, 1e-6) > steps[38]


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16])
def test_small_integers_of_numpy_do_not_wrap_around(kind: type) -> None:
    """255 + 1 is 0 in eight bits, and the bound was 700: P[W = v] came out as 0."""
    most = min(255, int(np.iinfo(kind).max))
    for right in (most, most - 20):
        for claim in (epsilon_one_run, epsilon_one_run_fdp):
            counts = {"canaries": most, "guesses": most, "correct": right}
            small = {name: kind(count) for name, count in counts.items()}
            found = claim(**small, delta=1e-5, significance=0.05)
            assert found == claim(**counts, delta=1e-5, significance=0.05)
        small = one_run_p_value(**small, epsilon=1.0, delta=1e-5)
        assert small == one_run_p_value(**counts, epsilon=1.0, delta=1e-5)


def test_a_significance_in_single_precision_is_used_in_double() -> None:
    """Else μ moves in its seventh digit, which is more than the slack of the recursion."""
    level, counts = np.float32(0.05), {"canaries": 100_000, "guesses": 20_000, "correct": 15_000}
    for claim in (epsilon_one_run, epsilon_one_run_fdp):
        found = claim(**counts, delta=1e-5, significance=level)
        assert found == claim(**counts, delta=1e-5, significance=float(level))


def test_the_bound_is_just_below_the_edge_of_rejection() -> None:
    """Rounded down: the p-value at the ε returned is at most the level, and just above it not."""
    epsilon = bound(1000, 100, 75, 1e-4)
    assert p_value((1000, 100, 75, epsilon, 1e-4)) <= 0.05
    assert direct(1000, 100, 75, epsilon, 1e-4) < 0.05
    assert direct(1000, 100, 75, epsilon + 1e-6, 1e-4) > 0.05


def test_too_few_guesses_are_refused_with_the_number_needed() -> None:
    """Five of five flawless guesses have probability 1/32 by chance: enough at 5 %, not four."""
    with pytest.raises(ValueError, match="about 5 guesses are needed"):
        bound(1000, 4, 4, 0.0)
    assert bound(1000, 5, 5, 0.0) > 0
    with pytest.raises(ValueError, match=r"4 guesses, all right.*about \d+ guesses are needed"):
        bound(1000, 4, 4, 1e-2)
    with pytest.raises(ValueError, match="not even 1000 guesses would do"):
        bound(1000, 4, 4, 0.2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"correct": 11}, "correct <= guesses <= canaries"),
        ({"guesses": 21}, "correct <= guesses <= canaries"),
        ({"correct": -1}, "correct must be at least 0"),
        ({"delta": 1.0}, r"delta must lie in \[0, 1\)"),
        ({"delta": math.nan}, r"delta must lie in \[0, 1\)"),
        ({"significance": 0.0}, "significance must lie in"),
        ({"significance": math.nan}, "significance must lie in"),
    ],
)
def test_bad_arguments(wrong: dict[str, float], message: str) -> None:
    """Both bounds refuse them by name."""
    good = {"canaries": 20, "guesses": 10, "correct": 9, "delta": 1e-5, "significance": 0.05}
    for function in (epsilon_one_run, epsilon_one_run_fdp):
        with pytest.raises(ValueError, match=message):
            function(**{**good, **wrong})
    with pytest.raises(ValueError, match="no finite ε at δ = 0"):
        epsilon_one_run_fdp(**{**good, "delta": 0})
    with pytest.raises(TypeError, match="correct must be an integer"):
        epsilon_one_run(**{**good, "correct": 9.0})
    with pytest.raises(ValueError, match="delta_term must be one of"):
        epsilon_one_run(**good, delta_term="exact")


def test_a_mask_that_no_fair_coins_tossed_is_refused() -> None:
    """900 members of 1,000."""
    with pytest.raises(ValueError, match="no toss of fair coins"):
        guess(np.arange(1000.0), np.arange(1000) < 900, top=10, bottom=10)
    with pytest.raises(ValueError, match=r"top \+ bottom must lie in \[1, 4\]"):
        guess(np.arange(4.0), np.arange(4) < 2, top=3, bottom=2)
    with pytest.raises(ValueError, match="at least one number"):
        epsilon_one_run_scores(
            np.arange(4.0), np.arange(4) < 2, guesses=(), delta=0.0, significance=0.05
        )
