"""ROC curve, AUC and TPR at FPR: scikit-learn, exact limits, and coverage in small samples."""

import math

import numpy as np
import pytest
from audit_coverage import RUNS, most
from scipy import stats
from sklearn import metrics

from lora_privacy.audit import auc, roc_curve, tpr_at_fpr


def draw(seed: int, members: int, others: int, shift: float, runs: int) -> tuple:
    """Normal scores, shifted for members, and the mask."""
    mask = np.arange(members + others) < members
    rng = np.random.default_rng(seed)
    return rng.standard_normal((runs, mask.size)) + shift * mask, mask


@pytest.mark.parametrize("digits", [12, 0])
def test_matches_scikit_learn(digits: int) -> None:
    """Area and curve, without ties and with many; 1e-12."""
    scores, mask = draw(1, 70, 90, 0.8, 30)
    for run in np.round(scores, digits):
        assert auc(run, mask).value == pytest.approx(metrics.roc_auc_score(mask, run), abs=1e-12)
        fpr, tpr, thresholds = metrics.roc_curve(mask, run, drop_intermediate=False)
        curve = roc_curve(run, mask)
        np.testing.assert_allclose(curve.fpr, fpr, atol=1e-12)
        np.testing.assert_allclose(curve.tpr, tpr, atol=1e-12)
        np.testing.assert_array_equal(curve.thresholds, thresholds)


def test_infinite_scores_have_a_rank() -> None:
    """Minus infinity for an example that no model could have seen."""
    assert auc([math.inf, 0.0, -math.inf], np.array([True, False, False])).value == 1


@pytest.mark.parametrize(("value", "size"), [(0.8, 50), (1.0, 20), (0.0, 20), (0.5, 8)])
def test_interval_of_the_area_solves_its_equation(value: float, size: int) -> None:
    """Oracle: scipy's relative entropy at both ends, 1e-9; at AUC 1 the end is in closed form."""
    others = np.arange(10.0 * size)
    below = value * others.size
    members = np.full(size, below - 0.5)
    estimate = auc(np.concatenate([members, others]), np.arange(11 * size) < size)
    assert estimate.value == pytest.approx(value, abs=1e-12)
    for end, edge in ((estimate.low, 0.0), (estimate.high, 1.0)):
        if value == edge:
            assert end == edge
        else:
            found = size * stats.entropy([value, 1 - value], [end, 1 - end])
            assert found == pytest.approx(math.log(40), rel=1e-9)
    if value == 1:
        assert estimate.low == pytest.approx(math.exp(-math.log(40) / size), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_coverage_of_the_area_in_small_samples(shift: float) -> None:
    """12 + 12 scores; DeLong's normal interval misses too often at an area near 1."""
    scores, mask = draw(2, 12, 12, shift, RUNS)
    true = stats.norm.cdf(shift / math.sqrt(2))
    found = [auc(run, mask) for run in scores]
    assert sum(not e.low <= true <= e.high for e in found) <= most(0.05)
    assert np.mean([e.high - e.low for e in found]) < 0.7
    if shift == 2.5:
        wins = scores[:, :12, None] > scores[:, None, 12:]
        variance = wins.mean(2).var(1, ddof=1) / 12 + wins.mean(1).var(1, ddof=1) / 12
        missed = np.abs(wins.mean((1, 2)) - true) > 1.96 * np.sqrt(variance)
        assert np.sum(missed) > most(0.05)


def test_interval_of_the_area_shrinks() -> None:
    """Within .05 on either side at 2,000 + 2,000 scores."""
    scores, mask = draw(3, 2_000, 2_000, 1.0, 1)
    estimate = auc(scores[0], mask)
    assert estimate.value - 0.05 < estimate.low < estimate.high < estimate.value + 0.05


def test_coverage_of_the_rate() -> None:
    """500 + 500 scores, FPR .05. An interval at the threshold picked from the data misses."""
    scores, mask = draw(4, 500, 500, 1.5, RUNS)
    true = stats.norm.sf(stats.norm.isf(0.05) - 1.5)
    found = [tpr_at_fpr(run, mask, fpr=0.05) for run in scores]
    assert sum(not e.low <= true <= e.high for e in found) <= most(0.05)
    assert np.mean([e.high - e.low for e in found]) < 0.3
    count = np.rint([500 * e.value for e in found])
    low = stats.beta.ppf(0.025, count, 501 - count)
    high = stats.beta.ppf(0.975, count + 1, 500 - count)
    assert np.sum((low > true) | (high < true)) > most(0.05)


def test_coverage_of_the_rate_with_ties() -> None:
    """Scores rounded to whole numbers: the population's TPR is that of the best whole cut."""
    scores, mask = draw(5, 300, 500, 1.5, RUNS)
    cuts = np.arange(-5, 8) - 0.5
    allowed = stats.norm.sf(cuts) <= 0.05
    true = float(np.max(stats.norm.sf(cuts - 1.5)[allowed]))
    found = [tpr_at_fpr(run, mask, fpr=0.05) for run in np.round(scores)]
    assert sum(not e.low <= true <= e.high for e in found) <= most(0.05)


def test_rate_on_the_scores_at_hand() -> None:
    """Of thresholds with at most 2 alarms in 100, the one with most hits; equals pass together."""
    others = np.concatenate([[9.0, 5.0, 5.0], np.zeros(97)])
    members = np.array([10.0, 8.0, 5.0, 5.0, 0.0])
    scores = np.concatenate([members, others])
    mask = np.arange(scores.size) < 5
    found = tpr_at_fpr(scores, mask, fpr=0.02, significance=0.999)
    assert found.value == 0.4
    assert found.quantity == "TPR at FPR 0.02"
    assert tpr_at_fpr(scores, mask, fpr=0.03, significance=0.9).value == 0.8


def test_equal_scores_show_no_rate() -> None:
    """No threshold with FPR <= .05 passes any member: the upper end is that of 0 in 200."""
    found = tpr_at_fpr(np.zeros(400), np.arange(400) < 200, fpr=0.05)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(1 - 0.0125 ** (1 / 200), rel=1e-6)


def test_too_few_non_members_are_refused_with_the_number_needed() -> None:
    """(1 - .01)^n <= .05/4 first at n = 437."""
    scores, mask = draw(6, 50, 436, 1.0, 1)
    with pytest.raises(ValueError, match="at least 437 are needed"):
        tpr_at_fpr(scores[0], mask, fpr=0.01)
    scores, mask = draw(6, 50, 437, 9.0, 1)
    assert tpr_at_fpr(scores[0], mask, fpr=0.01).low > 0.85


def test_bad_arguments() -> None:
    """Rates and levels at the ends of their range."""
    scores, mask = draw(7, 50, 50, 1.0, 1)
    for fpr in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="fpr must lie in"):
            tpr_at_fpr(scores[0], mask, fpr=fpr)
    with pytest.raises(ValueError, match="significance must lie in"):
        auc(scores[0], mask, significance=0.0)
    with pytest.raises(ValueError, match="NaN"):
        roc_curve([math.nan, 1.0], np.array([True, False]))
