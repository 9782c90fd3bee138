"""Scores of token sequences: each against a direct loop, on padded batches."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from lora_privacy.audit.sequences import (
    mean_log_prob,
    min_k,
    min_k_plus_plus,
    reference_calibrated,
)

N, T, VOCABULARY = 30, 23, 11
RNG = np.random.default_rng(20240917)


def next_token_laws(rng: np.random.Generator, n: int, t: int) -> npt.NDArray[np.float64]:
    """Log-probabilities of the next token, (n, t, VOCABULARY)."""
    logits = rng.normal(0, 2, (n, t, VOCABULARY))
    return logits - np.log(np.sum(np.exp(logits), axis=2, keepdims=True))


LAWS = next_token_laws(RNG, N, T)
TOKENS = RNG.integers(0, VOCABULARY, (N, T))
LENGTHS = np.concatenate([[1, 2, T], RNG.integers(1, T + 1, N - 3)])
MASK = np.arange(T) < LENGTHS[:, None]
# What stands at padding must never be read.
PADDED = np.where(MASK, np.take_along_axis(LAWS, TOKENS[..., None], axis=2)[..., 0], np.nan)
REFERENCE = np.where(MASK, np.roll(PADDED[:, :1], 1, axis=0) - RNG.random((N, T)), 7.0)
MEANS = np.where(MASK, np.sum(np.exp(LAWS) * LAWS, axis=2), np.inf)
VARIANCES = np.sum(np.exp(LAWS) * (LAWS - MEANS[..., None]) ** 2, axis=2, where=MASK[..., None])
STDS = np.where(MASK, np.sqrt(VARIANCES), -1.0)


def rows() -> list[list[int]]:
    return [[t for t in range(T) if MASK[i, t]] for i in range(N)]


def test_mean_log_prob() -> None:
    """Oracle: a loop; 1e-12 relative."""
    expected = [math.fsum(PADDED[i, t] for t in row) / len(row) for i, row in enumerate(rows())]
    assert mean_log_prob(token_log_probs=PADDED, mask=MASK) == pytest.approx(
        expected, rel=1e-12, abs=0
    )


def test_reference_calibrated() -> None:
    """Oracle: a loop; 1e-12 relative or absolute."""
    expected = [
        math.fsum(PADDED[i, t] - REFERENCE[i, t] for t in row) / len(row)
        for i, row in enumerate(rows())
    ]
    found = reference_calibrated(
        token_log_probs=PADDED, reference_token_log_probs=REFERENCE, mask=MASK
    )
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def least(values: list[float], k: float) -> float:
    kept = max(1, int(len(values) * k))
    return math.fsum(sorted(values)[:kept]) / kept


@pytest.mark.parametrize("k", [0.01, 0.2, 0.5, 0.7, 1.0])
def test_min_k(k: float) -> None:
    """Oracle: sort a list, as the published code does but for texts too short for k; 1e-12."""
    expected = [least([float(PADDED[i, t]) for t in row], k) for i, row in enumerate(rows())]
    found = min_k(token_log_probs=PADDED, mask=MASK, k=k)
    assert found == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("k", [0.2, 1.0])
def test_min_k_plus_plus(k: float) -> None:
    """Oracle: μ and σ by loops over the vocabulary, then a sorted list; 1e-11 (σ cancels a digit).

    Rejected: standardising by the variance, and μ under a uniform draw of tokens.
    """
    expected, by_variance, uniform = [], [], []
    for i, row in enumerate(rows()):
        scores: dict[str, list[float]] = {"right": [], "variance": [], "uniform": []}
        for t in row:
            law = [float(x) for x in LAWS[i, t]]
            mean = math.fsum(math.exp(x) * x for x in law)
            variance = math.fsum(math.exp(x) * (x - mean) ** 2 for x in law)
            log_p = law[TOKENS[i, t]]
            scores["right"].append((log_p - mean) / math.sqrt(variance))
            scores["variance"].append((log_p - mean) / variance)
            scores["uniform"].append((log_p - math.fsum(law) / len(law)) / math.sqrt(variance))
        expected.append(least(scores["right"], k))
        by_variance.append(least(scores["variance"], k))
        uniform.append(least(scores["uniform"], k))
    found = min_k_plus_plus(token_log_probs=PADDED, means=MEANS, stds=STDS, mask=MASK, k=k)
    assert found == pytest.approx(expected, rel=1e-11, abs=1e-11)
    assert found != pytest.approx(by_variance, rel=1e-3)
    assert found != pytest.approx(uniform, rel=1e-3)


def test_certain_predictions_count_as_zero() -> None:
    """σ = 0 and ln p = μ: the token could not have been another, so it says nothing."""
    found = min_k_plus_plus(
        token_log_probs=[[0.0, -2.0]],
        means=[[0.0, -1.0]],
        stds=[[0.0, 0.5]],
        mask=[[True] * 2],
        k=1,
    )
    assert found.tolist() == [-1.0]


def test_higher_means_member() -> None:
    """Members put more mass on their tokens; level 1e-4 a side, 3.7 standard errors of ½."""
    rng = np.random.default_rng(1)
    n = 4000
    truth = rng.random(n) < 0.5
    laws = next_token_laws(rng, n, T)
    tokens = np.argmax(laws + rng.gumbel(size=laws.shape), axis=2)
    before = np.take_along_axis(laws, tokens[..., None], axis=2)[..., 0]
    boosted = laws.copy()
    np.put_along_axis(boosted, tokens[..., None], (before + 0.5 * truth[:, None])[..., None], 2)
    boosted -= np.log(np.sum(np.exp(boosted), axis=2, keepdims=True))
    after = np.minimum(np.take_along_axis(boosted, tokens[..., None], axis=2)[..., 0], 0.0)
    means = np.sum(np.exp(boosted) * boosted, axis=2)
    stds = np.sqrt(np.sum(np.exp(boosted) * (boosted - means[..., None]) ** 2, axis=2))
    tokens_and_mask: dict[str, Any] = {"token_log_probs": after, "mask": np.ones((n, T), bool)}
    margin = 3.7 * 0.5 / math.sqrt(min(truth.sum(), n - truth.sum()))
    for scores in (
        mean_log_prob(**tokens_and_mask),
        reference_calibrated(**tokens_and_mask, reference_token_log_probs=before),
        min_k(**tokens_and_mask),
        min_k_plus_plus(**tokens_and_mask, means=means, stds=stds),
    ):
        assert roc_auc_score(truth, scores) > 0.5 + margin
        assert roc_auc_score(truth, -scores) < 0.5 - margin


BASE: dict[str, Any] = {"token_log_probs": PADDED, "mask": MASK}
ARGUMENTS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (mean_log_prob, BASE),
    (reference_calibrated, {**BASE, "reference_token_log_probs": REFERENCE}),
    (min_k, BASE),
    (min_k_plus_plus, {**BASE, "means": MEANS, "stds": STDS}),
]


@pytest.mark.parametrize(("score", "arguments"), ARGUMENTS)
def test_bad_arrays_are_refused(score: Callable[..., Any], arguments: dict[str, Any]) -> None:
    score(**arguments)
    for name in arguments:
        if name == "mask":
            continue
        for value, match in ((math.nan, "is NaN or infinite"), (0.5, "is positive")):
            wrong = arguments[name].copy()
            wrong[2, 5] = value
            if name == "stds" and value == 0.5:
                continue
            with pytest.raises(ValueError, match=rf"^{name}\[2, 5\] {match}"):
                score(**{**arguments, name: wrong})
        with pytest.raises(ValueError, match="must have shape"):
            score(**{**arguments, name: arguments[name][:, :-1]})
        with pytest.raises(ValueError, match=rf"{name} must have shape"):
            score(**{**arguments, name: arguments[name][0]})
    with pytest.raises(TypeError, match="mask must be boolean"):
        score(**{**arguments, "mask": MASK.astype(int)})
    empty = MASK.copy()
    empty[4] = False
    with pytest.raises(ValueError, match=r"mask\[4\] counts no token"):
        score(**{**arguments, "mask": empty})


@pytest.mark.parametrize("k", [0.0, -0.1, 1.01, math.nan, 20])
def test_share_must_be_one(k: float) -> None:
    for score, arguments in ARGUMENTS[2:]:
        with pytest.raises(ValueError, match=r"k must lie in \(0, 1\]"):
            score(**arguments, k=k)


@pytest.mark.parametrize(("std", "match"), [(0.0, "is 0 where"), (-1e-3, "is negative")])
def test_impossible_standard_deviations_are_refused(std: float, match: str) -> None:
    stds = STDS.copy()
    stds[2, 5] = std
    with pytest.raises(ValueError, match=rf"stds\[2, 5\] {match}"):
        min_k_plus_plus(**BASE, means=MEANS, stds=stds)
