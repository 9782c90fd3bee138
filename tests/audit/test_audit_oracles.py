"""Second oracles of the numbers of ``audit``: enumeration, and peers of other people.

``docs/oracles.md`` lists both of each number.
"""

import itertools
import math
from typing import Any

import dp_accounting
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import linalg, special, stats
from sklearn import metrics

from lora_privacy.audit import (
    asymmetry,
    attack_p,
    attack_r,
    auc,
    epsilon_clopper_pearson,
    epsilon_from_counts,
    epsilon_one_run_fdp,
    guess,
    logit_confidence,
    mean_log_prob,
    min_k,
    min_k_plus_plus,
    one_run_p_value,
    projection_attack,
    reference_calibrated,
    roc_curve,
    strongest,
    tpr_at_fpr,
)

Floats = npt.NDArray[np.float64]


def tied_scores(seed: int, members: int, others: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Whole numbers, so that most are shared, in an order without meaning."""
    rng = np.random.default_rng(seed)
    mask = rng.permutation(np.arange(members + others) < members)
    return np.round(1.5 * rng.standard_normal(mask.size) + 2 * mask), mask


# Rates.


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    """Oracles: all pairs, and scipy's Mann–Whitney U. A tie that counts whole is rejected."""
    scores, mask = tied_scores(1, 23, 31)
    pairs = list(itertools.product(scores[mask], scores[~mask]))
    wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
    found = auc(scores, mask).value
    assert ties > 50
    assert found == pytest.approx((wins + ties / 2) / len(pairs), rel=1e-15, abs=0)
    assert found != pytest.approx((wins + ties) / len(pairs), rel=1e-3)
    u = stats.mannwhitneyu(scores[mask], scores[~mask]).statistic
    assert found == pytest.approx(u / len(pairs), rel=1e-15, abs=0)


def test_the_curve_counts_both_classes_at_every_threshold() -> None:
    """Oracle: two counts a threshold, by loops; exact."""
    scores, mask = tied_scores(2, 20, 15)
    curve = roc_curve(scores, mask)
    cuts = [math.inf, *sorted(set(scores.tolist()), reverse=True)]
    assert curve.thresholds.tolist() == cuts
    for cut, fpr, tpr in zip(cuts, curve.fpr, curve.tpr, strict=True):
        assert tpr == sum(s >= cut for s in scores[mask]) / 20
        assert fpr == sum(s >= cut for s in scores[~mask]) / 15


@pytest.mark.parametrize("seed", range(5))
def test_the_rate_is_the_best_of_all_thresholds(seed: int) -> None:
    """Oracles: every threshold by a loop, and scikit-learn's curve; an FPR of < is rejected."""
    scores, mask = tied_scores(seed, 150, 100)
    found = tpr_at_fpr(scores, mask, fpr=0.1, significance=0.5).value
    outside, inside = scores[~mask], scores[mask]
    allowed = [c for c in [*scores, math.inf] if sum(outside >= c) <= 10]
    assert found == max(sum(inside >= c) for c in allowed) / 150
    fpr, tpr, _ = metrics.roc_curve(mask, scores, drop_intermediate=False)
    assert found == pytest.approx(max(tpr[fpr <= 0.1]), rel=1e-12, abs=0)


@pytest.mark.parametrize(("seed", "fpr"), [(0, 0.05), (1, 0.1), (2, 0.3)])
def test_the_ends_of_the_rate_are_exact_binomial_limits(seed: int, fpr: float) -> None:
    """Section 2 of the page by counting binomials, where the library asks the beta law; 1e-8.

    P[Beta(j, n-j+1) > x] is P[Binomial(n, x) < j]. A rank that is off by one is rejected.
    """
    rng = np.random.default_rng(seed)
    mask = np.arange(420) < 120
    scores = rng.standard_normal(420) + 1.5 * mask
    inside, outside = scores[mask], np.sort(scores[~mask])[::-1]
    n, level = 300, 0.05 / 4
    fewer = stats.binom.cdf(np.arange(n), n, fpr)  # than rank 1, 2, …
    low_rank = int(np.flatnonzero(fewer <= level)[-1]) + 1
    high_rank = int(np.flatnonzero(1 - fewer <= level)[0]) + 1

    def limits(rank: int) -> tuple[float, float]:
        above = int(sum(inside > outside[rank - 1]))
        exact = stats.binomtest(above, 120).proportion_ci(1 - 2 * level, "exact")
        return exact.low, exact.high

    found = tpr_at_fpr(scores, mask, fpr=fpr)
    assert found.low == pytest.approx(limits(low_rank)[0], abs=1e-8)
    assert found.high == pytest.approx(limits(high_rank)[1], abs=1e-8)
    ends = [limits(rank) for rank in (low_rank + 3, high_rank - 3)]
    assert found.low < ends[0][0]
    assert found.high > ends[1][1]


# Bounds on ε.


def limits_of(hits: int, members: int, alarms: int, others: int, level: float) -> float:
    """The larger of both directions, from scipy's exact intervals."""
    missed = stats.binomtest(members - hits, members).proportion_ci(1 - level, "exact").high
    false = stats.binomtest(alarms, others).proportion_ci(1 - level, "exact").high
    return math.log(max((0.99 - missed) / false, (0.99 - false) / missed, 1.0))


@pytest.mark.parametrize("seed", range(6))
def test_a_split_reports_what_its_other_half_counts(seed: int) -> None:
    """Answers are yes or no, so whatever the halves, one threshold has any power; 1e-7.

    The counts are read off the text; they add up with what the half of the choice has.
    """
    rng = np.random.default_rng(seed)
    mask = np.arange(300) < 140
    scores = np.where(rng.random(300) < 0.85, mask, ~mask).astype(float)
    found = epsilon_clopper_pearson(scores, mask, delta=0.01, significance=0.05, seed=seed)
    hits, members, alarms, others = [int(x) for x in found.observed.split() if x.isdigit()]
    assert (members, others) == (70, 80)
    yes_in, yes_out = scores[mask].sum(), scores[~mask].sum()
    assert 0 <= yes_in - hits <= 70
    assert 0 <= yes_out - alarms <= 80
    expected = limits_of(hits, members, alarms, others, 0.05)
    assert found.epsilon == pytest.approx(expected, abs=1e-7)
    assert found.epsilon <= expected
    assert found.epsilon != pytest.approx(limits_of(hits, 140, alarms, 160, 0.05), rel=1e-2)


def test_the_best_of_two_is_the_best_at_half_the_level() -> None:
    """Oracle: scipy's exact intervals of both, at half of the significance each; 1e-7."""
    counts = {"a": (40, 3), "b": (47, 9)}

    def attack(hits: int, alarms: int) -> Any:
        return lambda share: epsilon_from_counts(
            members=50,
            true_positives=hits,
            non_members=60,
            false_positives=alarms,
            delta=0.01,
            significance=share,
        )

    found = strongest({k: attack(*v) for k, v in counts.items()}, significance=0.1).epsilon
    expected = {k: limits_of(h, 50, f, 60, 0.05) for k, (h, f) in counts.items()}
    assert found == pytest.approx(max(expected.values()), abs=1e-7)
    assert min(expected.values()) < found - 0.05


@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.05])
@pytest.mark.parametrize("correct", [48, 55, 60])
def test_epsilon_of_a_gaussian_curve_is_that_of_a_peer(correct: int, delta: float) -> None:
    """Oracle: dp-accounting at σ = 1/μ; 1e-6, and δ ten times as large is rejected."""
    found = epsilon_one_run_fdp(
        canaries=100, guesses=60, correct=correct, delta=delta, significance=0.05
    )
    assert found.mu is not None
    expected = dp_accounting.get_epsilon_gaussian(1 / found.mu, delta)
    assert found.epsilon == pytest.approx(expected, rel=1e-6, abs=1e-9)
    other = dp_accounting.get_epsilon_gaussian(1 / found.mu, 10 * delta)
    assert found.epsilon != pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize(("guesses", "correct", "epsilon"), [(9, 7, 0.6), (6, 6, 1.3)])
def test_the_p_value_of_pure_privacy_counts_all_answers(
    guesses: int, correct: int, epsilon: float
) -> None:
    """Oracle: all 2^g patterns of right and wrong under randomised response; 1e-7."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    expected = math.fsum(
        q ** sum(pattern) * (1 - q) ** (guesses - sum(pattern))
        for pattern in itertools.product((0, 1), repeat=guesses)
        if sum(pattern) >= correct
    )
    found = one_run_p_value(
        canaries=20, guesses=guesses, correct=correct, epsilon=epsilon, delta=0.0
    )
    assert found == pytest.approx(expected, rel=1e-7, abs=0)


@pytest.mark.parametrize("seed", range(4))
def test_guesses_are_those_of_the_worst_order_of_ties(seed: int) -> None:
    """Oracle: all orders of seven scores of three values, the fewest right among them."""
    rng = np.random.default_rng(seed)
    coins = rng.permutation(np.arange(7) < 4)
    scores = rng.integers(0, 3, 7).astype(float)
    orders = [
        order
        for order in itertools.permutations(range(7))
        if all(scores[a] <= scores[b] for a, b in itertools.pairwise(order))
    ]
    for count in range(1, 8):
        least_in = min(sum(coins[i] for i in order[7 - count :]) for order in orders)
        least_out = min(sum(not coins[i] for i in order[:count]) for order in orders)
        assert guess(scores, coins, top=count, bottom=0).correct == least_in
        assert guess(scores, coins, top=0, bottom=count).correct == least_out


# Scores of membership.


def test_attack_p_is_a_percentile() -> None:
    """Oracle: scipy's weak percentile of the population; a strict one is rejected."""
    rng = np.random.default_rng(3)
    losses, population = rng.integers(0, 6, 30) / 2, rng.integers(0, 6, 50) / 2
    found = attack_p(losses=losses, population_losses=population)
    weak, strict = (
        1 - np.array([stats.percentileofscore(population, x, kind) for x in losses]) / 100
        for kind in ("weak", "strict")
    )
    assert found == pytest.approx(weak, abs=1e-12)
    assert found != pytest.approx(strict, abs=1e-3)


def test_attack_r_is_a_percentile_of_the_models_without_the_sample() -> None:
    """Oracle: scipy's weak percentile, sample by sample."""
    rng = np.random.default_rng(4)
    losses, references = rng.integers(0, 6, 12) / 2, rng.integers(0, 6, (9, 12)) / 2
    members = rng.permuted(np.tile(np.arange(9)[:, None] < 4, 12), axis=0)
    found = attack_r(losses=losses, reference_losses=references, reference_members=members)
    for i in range(12):
        out = references[~members[:, i], i]
        expected = 1 - stats.percentileofscore(out, losses[i], "weak") / 100
        assert found[i] == pytest.approx(expected, abs=1e-12)


def test_the_logit_is_that_of_the_probability() -> None:
    """Oracle: ``scipy.special.logit``, where p itself keeps its digits; 1e-12."""
    p = np.random.default_rng(5).uniform(0.01, 0.99, 50)
    assert logit_confidence(np.log(p)) == pytest.approx(special.logit(p), rel=1e-12, abs=1e-12)


# Scores of sequences, by torch.


@pytest.fixture(scope="module")
def texts() -> tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.bool_]]:
    """Logits (6, 11, 13), tokens and a mask of texts of several lengths."""
    generator = torch.Generator().manual_seed(6)
    logits = 2 * torch.randn(6, 11, 13, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 13, (6, 11), generator=generator)
    lengths = np.array([11, 3, 7, 1, 10, 5])
    return logits, tokens, np.arange(11) < lengths[:, None]


def log_probs_of(logits: torch.Tensor, tokens: torch.Tensor) -> Floats:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].numpy()


def test_the_mean_log_probability_is_minus_torchs_cross_entropy(texts: Any) -> None:
    """Oracle: torch's loss with ignored padding, text by text; 1e-12."""
    logits, tokens, mask = texts
    found = mean_log_prob(token_log_probs=log_probs_of(logits, tokens), mask=mask)
    labels = tokens.masked_fill(~torch.from_numpy(mask), -100)
    for i in range(6):
        loss = torch.nn.functional.cross_entropy(logits[i], labels[i])
        assert found[i] == pytest.approx(-float(loss), rel=1e-12, abs=0)


def test_a_reference_subtracts_its_cross_entropy(texts: Any) -> None:
    """Oracle: the difference of two losses of torch; 1e-12."""
    logits, tokens, mask = texts
    other = logits.flip(0)
    found = reference_calibrated(
        token_log_probs=log_probs_of(logits, tokens),
        reference_token_log_probs=log_probs_of(other, tokens),
        mask=mask,
    )
    labels = tokens.masked_fill(~torch.from_numpy(mask), -100)
    for i in range(6):
        ours, theirs = (
            float(torch.nn.functional.cross_entropy(one[i], labels[i])) for one in (logits, other)
        )
        assert found[i] == pytest.approx(theirs - ours, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("k", [0.2, 0.5, 1.0])
def test_the_least_likely_tokens_are_those_of_topk(texts: Any, k: float) -> None:
    """Oracle: ``torch.topk``; 1e-12. Of min-k++: μ and σ of 100,000 tokens drawn a position.

    Within .03, about 5 standard errors of a token's score; σ² for σ is rejected.
    """
    logits, tokens, mask = texts
    laws, own = logits.log_softmax(-1), log_probs_of(logits, tokens)
    means = (laws.exp() * laws).sum(-1)
    stds = (laws.exp() * (laws - means[..., None]).square()).sum(-1).sqrt()
    plain = min_k(token_log_probs=own, mask=mask, k=k)
    standard = min_k_plus_plus(
        token_log_probs=own, means=means.numpy(), stds=stds.numpy(), mask=mask, k=k
    )
    rng = np.random.default_rng(7)
    for i in range(6):
        row = torch.from_numpy(own[i][mask[i]])
        count = max(1, int(k * len(row)))
        least = row.topk(count, largest=False).values.mean()
        assert plain[i] == pytest.approx(float(least), rel=1e-12, abs=0)
    i, drawn, squared = 2, [], []
    for t in range(7):
        law = laws[i, t].numpy()
        seen = rng.choice(law, 100_000, p=np.exp(law) / np.exp(law).sum())
        gap = own[i, t] - seen.mean()
        drawn.append(gap / seen.std())
        squared.append(gap / seen.var())
    count = max(1, int(k * 7))
    assert standard[i] == pytest.approx(np.sort(drawn)[:count].mean(), abs=0.03)
    assert standard[i] != pytest.approx(np.sort(squared)[:count].mean(), abs=0.1)


# The attack on updates.


def nearest_symmetric(product: Floats) -> float:
    """Distance of a matrix to the nearest symmetric one, relative, by least squares."""
    n = len(product)
    columns = []
    for i, j in itertools.combinations_with_replacement(range(n), 2):
        basis = np.zeros((n, n))
        basis[i, j] = basis[j, i] = 1
        columns.append(basis.ravel())
    design = np.array(columns).T
    best = linalg.lstsq(design, product.ravel())[0]
    return float(np.linalg.norm(product.ravel() - design @ best) / np.linalg.norm(product))


def test_asymmetry_is_the_distance_to_the_symmetric_matrices() -> None:
    """And the score is the logarithm of a ratio of two; 1e-10. log₂ would be rejected."""
    rng = np.random.default_rng(8)
    update, rest = rng.standard_normal((4, 7)), rng.standard_normal((4, 7))
    candidates = rng.standard_normal((3, 4, 7))
    found = asymmetry(update, candidates)
    score = projection_attack(update, candidates, known=rest)
    without = nearest_symmetric(rest @ update.T)
    for one, value, scored in zip(candidates, found, score, strict=True):
        assert value == pytest.approx(nearest_symmetric(one @ update.T), rel=1e-10, abs=0)
        with_it = nearest_symmetric((rest + one) @ update.T)
        assert scored == pytest.approx(math.log(without / with_it), rel=1e-9, abs=1e-12)
