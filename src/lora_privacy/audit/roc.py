"""ROC curve of an attack, its area, and its true positive rate at a false positive rate.

Intervals hold at every sample size: none rests on a normal approximation, and no threshold is
judged on the scores that it was chosen on without paying for it. Proofs:
``docs/theory/auditing.md``, section 2.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownArgumentType=false
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

from lora_privacy import _validate
from lora_privacy.audit._arrays import Array, part
from lora_privacy.audit._binomial import upper_limit
from lora_privacy.audit.result import NOT_STATED, RateEstimate

__all__ = ["RocCurve", "auc", "roc_curve", "tpr_at_fpr"]

_INDEPENDENT = (
    "the members' scores are independent draws of one law",
    "the non-members' scores are independent draws of one law",
)
_ROUNDS = 200  # halvings, more than a double has bits


@dataclass(frozen=True, slots=True, kw_only=True)
class RocCurve:
    """Error rates of "score >= threshold means member", for each threshold that matters.

    Attributes:
        fpr: False positive rates, shape (k,), increasing from 0 to 1.
        tpr: True positive rates, shape (k,), increasing from 0 to 1.
        thresholds: Shape (k,), decreasing; the first is infinite. Equal scores pass together.
    """

    fpr: Array
    tpr: Array
    thresholds: Array


def roc_curve(scores: npt.ArrayLike, members: npt.ArrayLike) -> RocCurve:
    """ROC curve of the scores at hand; a description of this sample, without an interval.

    Args:
        scores: Shape (n,), higher means member.
        members: Boolean, shape (n,).

    Raises:
        TypeError: ``members`` is not boolean.
        ValueError: A score is NaN, a shape is wrong, or a class is empty.
    """
    inside, outside = part(scores, members)
    cuts = np.unique(np.concatenate([inside, outside]))[::-1]
    false = outside.size - np.searchsorted(outside, cuts, side="left")
    true = inside.size - np.searchsorted(inside, cuts, side="left")
    return RocCurve(
        fpr=np.concatenate([np.zeros(1), false / outside.size]),
        tpr=np.concatenate([np.zeros(1), true / inside.size]),
        thresholds=np.concatenate([np.array([math.inf]), cuts]),
    )


def auc(
    scores: npt.ArrayLike,
    members: npt.ArrayLike,
    *,
    significance: float = 0.05,
    threat_model: str = NOT_STATED,
) -> RateEstimate:
    """P[member's score > non-member's] + ½ P[equal], with an interval for every sample size.

    The interval is {θ : m KL(AUC ‖ θ) <= ln(2/significance)}, m the size of the smaller class:
    Chernoff's bound, which a two-sample U-statistic obeys. It is conservative; a normal
    approximation (DeLong) is narrower, but has width 0 at an AUC of 1.

    Args:
        scores: Shape (n,), higher means member.
        members: Boolean, shape (n,).
        significance: Probability that the interval misses, in (0, 1).
        threat_model: What the attacker sees and chooses; printed.

    Raises:
        TypeError: ``members`` is not boolean.
        ValueError: A score is NaN, a shape is wrong, or a class is empty.

    References:
        Hoeffding 1963, Sec. 5b; ``docs/theory/auditing.md``, section 2.

    >>> estimate = auc([0.9, 0.8, 0.3, 0.1], np.array([True, True, False, False]))
    >>> estimate.value, estimate.high
    (1.0, 1.0)
    """
    _validate.inside("significance", significance, 0, 1)
    inside, outside = part(scores, members)
    below = np.searchsorted(outside, inside, side="left")
    equal = np.searchsorted(outside, inside, side="right") - below
    # Counts are integers, and doubles add them exactly; the sum of halves too.
    value = float(np.sum(below) + 0.5 * np.sum(equal)) / (inside.size * outside.size)
    reach = math.log(2.0 / significance) / min(inside.size, outside.size)
    return RateEstimate(
        quantity="AUC",
        value=value,
        low=_kl_end(value, reach, 0.0),
        high=_kl_end(value, reach, 1.0),
        significance=significance,
        canaries=inside.size + outside.size,
        method="Mann–Whitney statistic, Chernoff interval for U-statistics",
        assumptions=_INDEPENDENT,
        references=("hoeffding-1963",),
        threat_model=threat_model,
    )


def tpr_at_fpr(
    scores: npt.ArrayLike,
    members: npt.ArrayLike,
    *,
    fpr: float,
    significance: float = 0.05,
    threat_model: str = NOT_STATED,
) -> RateEstimate:
    """Largest TPR of a threshold whose *true* FPR is at most ``fpr``, with an exact interval.

    The thresholds behind the two ends are order statistics of the non-members whose ranks depend
    on nothing but the sizes, so that neither is chosen by looking; the members' share above each
    has a Clopper–Pearson limit. Four statements at a quarter of the significance each.

    Args:
        scores: Shape (n,), higher means member.
        members: Boolean, shape (n,).
        fpr: False positive rate, in (0, 1).
        significance: Probability that the interval misses, in (0, 1).
        threat_model: What the attacker sees and chooses; printed.

    Returns:
        ``value`` is the largest TPR whose FPR *on these scores* is at most ``fpr``.

    Raises:
        TypeError: ``members`` is not boolean.
        ValueError: A score is NaN, a shape is wrong, a class is empty, or there are too few
            non-members to tell any threshold's FPR from ``fpr``; the message says how many do.

    References:
        Clopper & Pearson 1934; ``docs/theory/auditing.md``, section 2.
    """
    _validate.inside("fpr", fpr, 0, 1)
    _validate.inside("significance", significance, 0, 1)
    inside, outside = part(scores, members)
    quarter = significance / 4 * (1 - 1e-9)  # rounding of the beta law
    ranks = np.arange(1, outside.size + 1)
    # The share above the j-th largest of n has the law Beta(j, n - j + 1), or less with ties.
    low_rank = int(np.sum(special.betaincc(ranks, outside.size - ranks + 1, fpr) <= quarter))
    if low_rank == 0:
        needed = math.ceil(math.log(quarter) / math.log1p(-fpr))
        raise ValueError(
            f"{outside.size} non-members cannot show a false positive rate of {fpr:g} at "
            f"significance {significance:g}; at least {needed} are needed."
        )
    descending = outside[::-1]
    above = inside.size - int(np.searchsorted(inside, descending[low_rank - 1], side="right"))
    missed = upper_limit(inside.size - above, inside.size, quarter)
    # The share at or above it has that law, or more; a threshold with a smaller share lies above.
    enough = np.flatnonzero(special.betainc(ranks, outside.size - ranks + 1, fpr) <= quarter)
    high = 1.0
    if enough.size:
        reached = inside.size - int(
            np.searchsorted(inside, descending[int(enough[0])], side="right")
        )
        high = float(upper_limit(reached, inside.size, quarter))
    allowed = math.floor(fpr * outside.size * (1 + 1e-12))
    curve = roc_curve(scores, members)
    passed = curve.tpr[np.rint(curve.fpr * outside.size) <= allowed]
    return RateEstimate(
        quantity=f"TPR at FPR {fpr:g}",
        value=float(passed[-1]),
        low=max(0.0, float(1.0 - missed)),
        high=high,
        significance=significance,
        canaries=inside.size + outside.size,
        method="thresholds at fixed ranks of the non-members, Clopper–Pearson limits",
        assumptions=_INDEPENDENT,
        references=("clopper-pearson-1934",),
        threat_model=threat_model,
    )


def _kl_end(value: float, reach: float, end: float) -> float:
    """The point between ``value`` and ``end`` where KL(value ‖ point) = reach, or just beyond."""
    near, far = value, end
    for _ in range(_ROUNDS):
        middle = 0.5 * (near + far)
        if middle in (near, far):
            break
        near, far = (middle, far) if _kl(value, middle) <= reach else (near, middle)
    return far


def _kl(p: float, q: float) -> float:
    """KL divergence of Bernoulli(p) from Bernoulli(q), 0 < q < 1."""
    first = p * math.log(p / q) if p > 0 else 0.0
    return first + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0)
