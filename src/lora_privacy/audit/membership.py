"""Membership inference: arrays of losses or log-probabilities in, one score a sample out.

A higher score means member, for every attack here. A score is no probability and no bound; a
threshold belongs on other models than those it is reported on. What each attack assumes, and what
its formula means for sequences, is in docs/theory/membership.md.

Shapes: N samples under attack, R reference models, Z samples of a population that no model was
trained on. "IN" are the reference models trained on a sample, "OUT" the others.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.audit._arrays import (
    Array,
    Mask,
    boolean,
    finite,
    log_probabilities,
    refuse,
)
from lora_privacy.audit.roc import auc

__all__ = [
    "Mode",
    "Variance",
    "attack_p",
    "attack_r",
    "lira",
    "logit_confidence",
    "rmia",
    "tune_offline_a",
]

Mode: TypeAlias = Literal["online", "offline"]
Variance: TypeAlias = Literal["pooled", "each"]

# A probability that rounds to 1 has an infinite logit. 2⁻⁵³ is the least distance from 1 that
# float64 tells apart; it caps the logit at 36.7.
_LEAST_DOUBT = 2.0**-53
_DEFAULT_GRID = tuple(i / 10 for i in range(11))


def attack_p(*, losses: npt.ArrayLike, population_losses: npt.ArrayLike) -> Array:
    """Attack-P: the share of the population whose loss is strictly larger than the sample's.

    One threshold for all samples; the score is 1 - p, with p the rank of the loss in the
    population. Cost O((N + Z) log Z).

    Args:
        losses: Under the target model, (N,), finite.
        population_losses: Of samples outside its training set, under the same model, (Z,).

    Returns:
        (N,), in [0, 1].

    Raises:
        ValueError: A shape disagrees, or a value is NaN or infinite.

    References:
        Ye, Maddi, Murakonda, Bindschaedler & Shokri, "Enhanced Membership Inference Attacks
        against Machine Learning Models", CCS 2022, arXiv:2111.09679.

    >>> attack_p(losses=[0.1, 2.5, 9.0], population_losses=[1.0, 2.0, 3.0, 4.0])
    array([1. , 0.5, 0. ])
    """
    found = finite("losses", losses, (None,))
    population = np.sort(finite("population_losses", population_losses, (None,)))
    above = len(population) - np.searchsorted(population, found, side="right")
    return above / len(population)


def attack_r(
    *,
    losses: npt.ArrayLike,
    reference_losses: npt.ArrayLike,
    reference_members: npt.ArrayLike | None = None,
) -> Array:
    """Attack-R: the share of OUT reference models under which the sample's loss is larger.

    Args:
        losses: Under the target model, (N,), finite.
        reference_losses: Under the reference models, (R, N), finite.
        reference_members: Which reference was trained on which sample, bool (R, N); None means
            none on any.

    Returns:
        (N,), in [0, 1], in steps of one over the number of OUT references of the sample.

    Raises:
        ValueError: A shape disagrees, a value is NaN or infinite, or a sample lacks an OUT
            reference.
        TypeError: ``reference_members`` is not boolean.

    References:
        Ye et al., CCS 2022, arXiv:2111.09679.

    >>> attack_r(losses=[0.5, 2.0], reference_losses=[[1.0, 1.0], [0.2, 1.5], [0.7, 3.0]])
    array([0.66666667, 0.33333333])
    """
    found = finite("losses", losses, (None,))
    references = finite("reference_losses", reference_losses, (None, len(found)))
    out = ~_members(reference_members, references.shape)
    _require(out, 1, "OUT")
    return np.sum(out & (references > found), axis=0) / np.sum(out, axis=0)


def logit_confidence(log_probs: npt.ArrayLike) -> Array:
    """``ln p - ln(1 - p)`` from ``ln p``, to full relative accuracy at both ends.

    Args:
        log_probs: ln p <= 0, finite, any shape. Above -2⁻⁵³ it is taken as -2⁻⁵³, so the result
            is at most 36.7: a probability of exactly 1 is one that was rounded.

    Raises:
        ValueError: A value is NaN, infinite or positive.

    >>> logit_confidence([-1e-3, -3000.0]).round(3)
    array([    6.907, -3000.   ])
    """
    return _logit(log_probabilities("log_probs", log_probs, None))


def lira(
    *,
    log_probs: npt.ArrayLike,
    reference_log_probs: npt.ArrayLike,
    mode: Mode,
    reference_members: npt.ArrayLike | None = None,
    variance: Variance = "pooled",
) -> Array:
    """LiRA: a Gaussian likelihood ratio of the logit-scaled confidence φ = ln(p / (1 - p)).

    ``online``: ``ln N(φ; μ_in, σ_in²) - ln N(φ; μ_out, σ_out²)``, in nats. ``offline``:
    ``(φ - μ_out) / σ_out``, dimensionless; the published score is Φ of it, which orders samples
    the same way but rounds to 1 for the most exposed ones. μ are means over the references of one
    sample, and variances divide by the degrees of freedom.

    Args:
        log_probs: ln p of the true label or sequence under the target model, (N,), <= 0. For
            sequences pass the mean over tokens (``sequences.mean_log_prob``).
        reference_log_probs: The same under the reference models, (R, N).
        mode: "online" needs IN and OUT references of each sample, "offline" OUT ones only.
        reference_members: Which reference was trained on which sample, bool (R, N). Required
            online; None offline means none on any.
        variance: "pooled" fits one σ_in and one σ_out to the deviations of all samples from their
            own means, which is what few references can carry. "each" fits them to each sample.

    Raises:
        ValueError: A shape disagrees, a value is NaN, infinite or positive, a sample lacks
            references, or a variance is zero.
        TypeError: ``reference_members`` is not boolean.

    References:
        Carlini, Chien, Nasr, Song, Terzis & Tramèr, "Membership Inference Attacks From First
        Principles", IEEE S&P 2022, arXiv:2112.03570, Algorithm 1 and Section VI-C.

    >>> out = np.log([[0.2], [0.3], [0.25]])
    >>> bool(lira(log_probs=np.log([0.9]), reference_log_probs=out, mode="offline")[0] > 10)
    True
    """
    _validate.choice("mode", mode, ("online", "offline"))
    _validate.choice("variance", variance, ("pooled", "each"))
    target = log_probabilities("log_probs", log_probs, (None,))
    references = log_probabilities("reference_log_probs", reference_log_probs, (None, len(target)))
    members = _members(reference_members, references.shape, required=mode == "online")
    phi, reference_phi = _logit(target), _logit(references)
    mean, deviation = _gaussian(reference_phi, ~members, "OUT", variance)
    score = (phi - mean) / deviation
    if mode == "offline":
        return score
    mean_in, deviation_in = _gaussian(reference_phi, members, "IN", variance)
    score_in = (phi - mean_in) / deviation_in
    return (score - score_in) * (score + score_in) / 2 + np.log(deviation / deviation_in)


def rmia(
    *,
    log_probs: npt.ArrayLike,
    reference_log_probs: npt.ArrayLike,
    population_log_probs: npt.ArrayLike,
    population_reference_log_probs: npt.ArrayLike,
    mode: Mode,
    reference_members: npt.ArrayLike | None = None,
    gamma: float = 1.0,
    a: float | None = None,
) -> Array:
    """RMIA: the share of the population z with ``(p_x / Pr(x)) / (p_z / Pr(z)) >= gamma``.

    p is the target model's probability. ``online``: Pr(x) is the average of the mean over IN and
    the mean over OUT references, and Pr(z) the mean over all, since the population is OUT of all.
    ``offline``: ``Pr = (1 + a)/2 · mean_OUT + (1 - a)/2`` for x and z, which takes the mean over
    IN as ``a · mean_OUT + (1 - a)``. All of it in log space, and compared there.

    Takes O((N + Z) (R + log Z)) time and, for a fixed R, O(N + Z) memory, and returns what the
    full (N, Z) matrix of comparisons gives, bit by bit.

    Args:
        log_probs: ln p_x under the target model, (N,), <= 0. For sequences pass the mean over
            tokens (``sequences.mean_log_prob``): offline, the constant (1 - a)/2 swamps a
            probability such as e⁻³⁰⁰⁰ for every a < 1, and the references then count for nothing.
        reference_log_probs: The same under the reference models, (R, N).
        population_log_probs: ln p_z under the target model, (Z,), of samples that neither it nor
            a reference was trained on.
        population_reference_log_probs: The same under the reference models, (R, Z).
        mode: "online" needs IN and OUT references of each sample, "offline" OUT ones only.
        reference_members: Which reference was trained on which sample, bool (R, N). Required
            online; None offline means none on any.
        gamma: γ >= 1, dimensionless.
        a: Offline only, and required there: in [0, 1]. ``tune_offline_a`` picks it.

    Returns:
        (N,), in [0, 1], in steps of 1/Z.

    Raises:
        ValueError: A shape disagrees, a value is NaN, infinite or positive, a sample lacks
            references, or γ or a is out of range.
        TypeError: ``reference_members`` is not boolean.

    References:
        Zarifzadeh, Liu & Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024,
        arXiv:2312.03262.

    >>> rmia(log_probs=np.log([0.9, 0.4]), reference_log_probs=np.log([[0.3, 0.8]]),
    ...      population_log_probs=np.log([0.5, 0.1]),
    ...      population_reference_log_probs=np.log([[0.5, 0.4]]), mode="offline", a=1.0)
    array([1. , 0.5])
    """
    _validate.choice("mode", mode, ("online", "offline"))
    _validate.at_least("gamma", gamma, 1)
    target = log_probabilities("log_probs", log_probs, (None,))
    references = log_probabilities("reference_log_probs", reference_log_probs, (None, len(target)))
    population = log_probabilities("population_log_probs", population_log_probs, (None,))
    population_references = log_probabilities(
        "population_reference_log_probs",
        population_reference_log_probs,
        (len(references), len(population)),
    )
    members = _members(reference_members, references.shape, required=mode == "online")
    _require(~members, 1, "OUT")
    out = _log_mean(references, ~members)
    population_out = _log_mean(population_references)
    if mode == "online":
        if a is not None:
            raise ValueError(f"a is a parameter of offline RMIA, got {a!r} online; leave it out.")
        _require(members, 1, "IN")
        marginal = np.logaddexp(out, _log_mean(references, members)) - math.log(2.0)
        population_marginal = population_out
    else:
        if a is None:
            raise ValueError("offline RMIA needs a in [0, 1], got None; see tune_offline_a.")
        marginal = _offline_marginal(out, a)
        population_marginal = _offline_marginal(population_out, a)
    return _share(target - marginal, population - population_marginal, gamma)


def tune_offline_a(
    *,
    reference_log_probs: npt.ArrayLike,
    reference_members: npt.ArrayLike,
    population_reference_log_probs: npt.ArrayLike,
    gamma: float = 1.0,
    grid: tuple[float, ...] = _DEFAULT_GRID,
) -> float:
    """Pick a of offline RMIA on reference models alone: each in turn plays the target.

    The value of the grid with the largest AUC, averaged over the references; the first of equal
    ones. The target model is no argument, so its scores stay untouched by the choice. A sample
    without an OUT model among the other references is left out of that reference's turn.

    Args:
        reference_log_probs: As in ``rmia``, (R, N), R >= 2.
        reference_members: Which reference was trained on which sample, bool (R, N).
        population_reference_log_probs: As in ``rmia``, (R, Z).
        gamma: γ >= 1 of the attack to be tuned.
        grid: Candidates in [0, 1], at least one.

    Raises:
        ValueError: As in ``rmia``; or a reference has no member or no non-member that the other
            references can calibrate.
        TypeError: ``reference_members`` is not boolean.

    References:
        Zarifzadeh, Liu & Shokri, ICML 2024, arXiv:2312.03262, on approximating Pr(x) offline.
    """
    _validate.at_least("gamma", gamma, 1)
    if not grid:
        raise ValueError("grid must hold at least one candidate for a, got none.")
    for candidate in grid:
        _check_a(candidate)
    references = log_probabilities("reference_log_probs", reference_log_probs, (None, None))
    members = _members(reference_members, references.shape, required=True)
    population = log_probabilities(
        "population_reference_log_probs",
        population_reference_log_probs,
        (len(references), None),
    )
    if len(references) < 2:
        raise ValueError("tuning a needs at least 2 references, one of which plays the target.")
    total = np.zeros(len(grid))
    for turn in range(len(references)):
        others = np.arange(len(references)) != turn
        usable = ~np.all(members[others], axis=0)
        truth = members[turn, usable]
        if truth.all() or not truth.any():
            raise ValueError(
                f"reference {turn} has no member or no non-member that is OUT of another "
                "reference; train more references, each on a random half of the samples."
            )
        out = _log_mean(references[others][:, usable], ~members[others][:, usable])
        population_out = _log_mean(population[others])
        for j, a in enumerate(grid):
            scores = _share(
                references[turn, usable] - _offline_marginal(out, a),
                population[turn] - _offline_marginal(population_out, a),
                gamma,
            )
            total[j] += auc(scores, truth).value
    return float(grid[int(np.argmax(total))])


def _logit(log_probs: Array) -> Array:
    log_probs = np.minimum(log_probs, -_LEAST_DOUBT)
    return log_probs - np.log(-np.expm1(log_probs))


def _gaussian(
    phi: Array, counted: Mask, kind: str, variance: Variance
) -> tuple[Array, Array | np.float64]:
    """Mean of each sample, (N,), and standard deviation: (N,), or one for all when pooled."""
    _require(counted, 1 if variance == "pooled" else 2, kind)
    number = np.sum(counted, axis=0)
    mean = np.sum(np.where(counted, phi, 0.0), axis=0) / number
    squares = np.sum(np.where(counted, phi - mean, 0.0) ** 2, axis=0)
    if variance == "each":
        spread = np.sqrt(squares / (number - 1))
        refuse(
            f"the variance of {kind} references",
            spread == 0,
            'is zero; use variance="pooled" or references that differ',
        )
        return mean, spread
    freedom = np.sum(number - 1)
    pooled = np.sqrt(np.sum(squares) / freedom) if freedom else np.float64(0.0)
    if pooled == 0:
        raise ValueError(
            f"the variance of {kind} references is zero or unknown: no sample has two that "
            "differ; train more references."
        )
    return mean, pooled


def _log_mean(log_probs: Array, counted: Mask | None = None) -> Array:
    """The ln of the mean probability over the counted references, or over all of them."""
    total = np.full(log_probs.shape[1], -np.inf)
    for i, row in enumerate(log_probs):  # a row at a time: no second array of this size
        np.logaddexp(total, row, out=total, where=True if counted is None else counted[i])
    return total - np.log(len(log_probs) if counted is None else np.sum(counted, axis=0))


def _offline_marginal(log_mean_out: Array, a: float) -> Array:
    """ln((1 + a)/2 · mean_OUT + (1 - a)/2)."""
    _check_a(a)
    constant = math.log((1.0 - a) / 2.0) if a < 1.0 else -math.inf
    return np.logaddexp(log_mean_out + math.log((1.0 + a) / 2.0), constant)


def _share(log_ratio: Array, population_log_ratio: Array, gamma: float) -> Array:
    """Share of the population with ``log_ratio - population_log_ratio >= ln(gamma)``.

    Rounded subtraction is monotone, so over the sorted population the comparison is true up to a
    point and false after it. Bisecting on the comparison itself, and not on a threshold moved
    across, keeps ties as the full matrix has them.
    """
    ordered = np.sort(population_log_ratio)
    log_gamma = math.log(gamma)
    low = np.zeros(len(log_ratio), dtype=np.intp)
    high = np.full(len(log_ratio), len(ordered), dtype=np.intp)
    for _ in range(len(ordered).bit_length()):
        middle = (low + high) // 2
        unsettled = low < high
        value = ordered[np.minimum(middle, len(ordered) - 1)]
        passes = unsettled & (log_ratio - value >= log_gamma)
        low = np.where(passes, middle + 1, low)
        high = np.where(unsettled & ~passes, middle, high)
    return low / len(ordered)


def _check_a(a: float) -> None:
    _validate.between("a", a, 0.0, 1.0, "It is the slope of mean_IN over mean_OUT.")


def _members(
    values: npt.ArrayLike | None, shape: tuple[int, ...], *, required: bool = False
) -> Mask:
    if values is None:
        if required:
            raise ValueError(
                "reference_members is needed here: which reference was trained on which sample, "
                f"bool {shape}."
            )
        return np.zeros(shape, dtype=np.bool_)
    return boolean("reference_members", values, shape)


def _require(counted: Mask, least: int, kind: str) -> None:
    number = np.sum(counted, axis=0)
    if np.any(number < least):
        sample = int(np.argmax(number < least))
        raise ValueError(
            f"sample {sample} has {number[sample]} {kind} reference(s), and needs {least} at "
            "least; leave such samples out or train more references."
        )
