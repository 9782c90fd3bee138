"""Lower bounds on ε from one training run with many canaries, each put in by a fair coin.

Proofs: ``docs/theory/auditing.md``, sections 4 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy import _validate
from lora_privacy.audit._arrays import Array, part
from lora_privacy.audit._binomial import log_below, log_mass, log_tail_ratio
from lora_privacy.audit.result import NOT_STATED, Adjacency, LeakageEstimate

__all__ = [
    "ASSUMPTIONS",
    "SLACK",
    "DeltaTerm",
    "Guesses",
    "check_counts",
    "epsilon_one_run",
    "epsilon_one_run_scores",
    "guess",
    "largest_rejected",
    "one_run_p_value",
    "perfect_score",
]

DeltaTerm = Literal["published", "tight"]

DELTA_TERMS: tuple[str, ...] = get_args(DeltaTerm)

SLACK = 1.0 + 1e-8  # rounding of a tail: 1e-10 at 10⁵ guesses
_WIDTH = 1e-12  # of ε or μ, where a search stops
_LARGEST = 700.0  # e^ε stays a double
_UNFAIR = 1e-9  # level below which a count of members is no toss of fair coins

ASSUMPTIONS = (
    "a fair coin of its own, independent of all else, put each canary in or left it out",
    "the guesses depend on the coins through the mechanism's output only, and their number was "
    "fixed beforehand",
    "putting in one canary is one step between neighbours",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """What an attacker said of the coins of one run.

    Attributes:
        canaries: Coins tossed.
        guesses: Canaries on which a guess was made, in or out.
        correct: Guesses that were right.
    """

    canaries: int
    guesses: int
    correct: int


def epsilon_one_run(
    *,
    canaries: int,
    guesses: int,
    correct: int,
    delta: float,
    significance: float,
    threat_model: str = NOT_STATED,
    adjacency: Adjacency = "add-remove",
    delta_term: DeltaTerm = "published",
) -> LeakageEstimate:
    """Lower bound on ε from guesses on the coins of a single run, at confidence 1 - significance.

    If the mechanism is (ε, δ)-private, ``correct`` or more right guesses have probability at most
    :func:`one_run_p_value`; the bound is the largest ε at which that is <= ``significance``.

    Args:
        canaries: Coins tossed, c. All count, also those without a guess.
        guesses: Guesses made, g <= c, fixed beforehand.
        correct: Right ones among them.
        delta: δ in [0, 1).
        significance: Probability of a false claim, in (0, 1).
        threat_model: What the attacker sees and chooses; printed.
        adjacency: Whether a canary that is out is absent or replaced by another record.
        delta_term: ``"published"`` is the formula of the paper and reproduces its numbers;
            ``"tight"`` is the exact worst case, proved in the docs, and never gives less.
            Choose before looking.

    Raises:
        ValueError: A count or a probability is out of range, or so few guesses (or so large a
            c δ) that not even a flawless attack shows anything; the message says how many do.

    References:
        Steinke, Nasr & Jagielski 2023, Theorem 5.2; ``docs/theory/auditing.md``, section 4.

    >>> estimate = epsilon_one_run(
    ...     canaries=1000, guesses=100, correct=75, delta=1e-4, significance=0.05
    ... )
    >>> round(estimate.epsilon, 5)
    0.67298
    """
    canaries, guesses, correct, delta, significance = check_counts(
        canaries, guesses, correct, delta, significance
    )
    _validate.choice("delta_term", delta_term, DELTA_TERMS)

    def largest(right: int, of: int) -> float:
        return largest_rejected(
            lambda epsilon: (
                one_run_p_value(
                    canaries=canaries,
                    guesses=of,
                    correct=right,
                    epsilon=epsilon,
                    delta=delta,
                    delta_term=delta_term,
                )
                <= significance
            )
        )

    ceiling = perfect_score(lambda g: largest(g, g), canaries, guesses, delta, significance)
    return LeakageEstimate(
        epsilon=largest(correct, guesses),
        delta=delta,
        significance=significance,
        canaries=canaries,
        ceiling=ceiling,
        method=f"one-run audit, {delta_term} δ term",
        observed=f"{correct} of {guesses} guesses right",
        assumptions=ASSUMPTIONS,
        references=("steinke-one-run-2023",),
        threat_model=threat_model,
        adjacency=adjacency,
    )


def one_run_p_value(
    *,
    canaries: int,
    guesses: int,
    correct: int,
    epsilon: float,
    delta: float,
    delta_term: DeltaTerm = "published",
) -> float:
    """Upper bound on P[``correct`` or more right guesses] for every (ε, δ)-private mechanism.

    With W binomial(g, 1/(1 + e^-ε)), β = P[W >= v] and b = P[W = v], the tight value is
    ``β + (1 - β) min(1, c δ β / (v b))``: the largest probability that any such mechanism
    reaches. The published one is ``β + 2 c δ max_i P[v - i <= W < v] / i``, and the tight value
    where that is larger: beyond β = 1/2 the published formula falls below what some mechanisms
    do. Rounded up.

    Args:
        canaries: c.
        guesses: g.
        correct: v.
        epsilon: ε >= 0, finite.
        delta: δ in [0, 1).
        delta_term: See :func:`epsilon_one_run`.

    Raises:
        ValueError: An argument is out of range.
    """
    canaries, guesses, correct, delta, _ = check_counts(canaries, guesses, correct, delta, 0.5)
    _validate.between("epsilon", epsilon, 0, _LARGEST)
    if correct == 0:
        return 1.0
    mass = log_mass(correct, guesses, epsilon)
    ratio = log_tail_ratio(correct, guesses, epsilon)
    beta = min(1.0, math.exp(mass + ratio))
    if delta == 0:
        return min(1.0, beta * SLACK)
    weight = math.log(canaries) + math.log(delta)
    value = beta + (1.0 - beta) * math.exp(min(0.0, weight + ratio - math.log(correct)))
    if delta_term == "published":
        steps = np.arange(1, correct + 1, dtype=np.float64)
        sums = np.logaddexp.accumulate(log_below(correct, guesses, epsilon))
        most = mass + float(np.max(sums - np.log(steps)))
        value = max(value, beta + math.exp(min(0.0, math.log(2.0) + weight + most)))
    return min(1.0, value * SLACK)


def guess(scores: npt.ArrayLike, members: npt.ArrayLike, *, top: int, bottom: int) -> Guesses:
    """Guess the ``top`` highest scores in and the ``bottom`` lowest out, and count what is right.

    Both numbers must be fixed before looking. Among equal scores at a boundary the wrong guesses
    are counted first, so that the order of the arrays cannot leak the coins; no rule that breaks
    ties without seeing the coins has fewer right.

    Args:
        scores: One a canary, shape (c,), higher means in.
        members: The coins, boolean, shape (c,).
        top: Guesses "in", >= 0.
        bottom: Guesses "out", >= 0; together at least 1 and at most c.

    Raises:
        TypeError: ``members`` is not boolean.
        ValueError: A score is NaN, a shape or a number is wrong, or the share of members is no
            toss of fair coins.
    """
    inside, outside = part(scores, members)
    top = _validate.integer("top", top, 0)
    bottom = _validate.integer("bottom", bottom, 0)
    canaries = inside.size + outside.size
    if not 1 <= top + bottom <= canaries:
        raise ValueError(
            f"top + bottom must lie in [1, {canaries}], at most the canaries there are, got "
            f"{top + bottom}."
        )
    chance = 2.0 * special.bdtr(min(inside.size, outside.size), canaries, 0.5)
    if chance < _UNFAIR:
        raise ValueError(
            f"{inside.size} members of {canaries} are no toss of fair coins (probability "
            f"{chance:.1e}): the theorem of the one-run audit does not apply. Use "
            "epsilon_clopper_pearson on independent runs."
        )
    right = _least_right(inside, outside, top) + _least_right(
        -outside[::-1], -inside[::-1], bottom
    )
    return Guesses(canaries=canaries, guesses=top + bottom, correct=right)


def epsilon_one_run_scores(
    scores: npt.ArrayLike,
    members: npt.ArrayLike,
    *,
    guesses: int | Sequence[int],
    delta: float,
    significance: float,
    threat_model: str = NOT_STATED,
    adjacency: Adjacency = "add-remove",
    delta_term: DeltaTerm = "published",
) -> LeakageEstimate:
    """:func:`epsilon_one_run` from scores; half the guesses are "in", half "out".

    Args:
        scores: One a canary, shape (c,), higher means in.
        members: The coins, boolean, shape (c,).
        guesses: Their number, or several numbers, of which the best counts: then each is computed
            at ``significance`` divided by how many there are. Fixed before looking; of an odd
            number, "in" gets the one more.
        delta: δ in [0, 1).
        significance: Probability of a false claim, of the best of them.
        threat_model: What the attacker sees and chooses; printed.
        adjacency: See :func:`epsilon_one_run`.
        delta_term: See :func:`epsilon_one_run`.

    Raises:
        TypeError: ``members`` is not boolean.
        ValueError: As :func:`guess` and :func:`epsilon_one_run`, or no number is given.
    """
    numbers = tuple(guesses) if isinstance(guesses, Sequence) else (guesses,)
    if not numbers:
        raise ValueError("guesses must name at least one number, got none.")
    estimates: list[LeakageEstimate] = []
    for number in numbers:
        made = guess(scores, members, top=number - number // 2, bottom=number // 2)
        estimates.append(
            epsilon_one_run(
                canaries=made.canaries,
                guesses=made.guesses,
                correct=made.correct,
                delta=delta,
                significance=significance / len(numbers),
                threat_model=threat_model,
                adjacency=adjacency,
                delta_term=delta_term,
            )
        )
    best = max(estimates, key=lambda estimate: estimate.epsilon)
    return replace(
        best,
        significance=significance,
        attempts=len(numbers),
        ceiling=max(estimate.ceiling for estimate in estimates),
    )


def _least_right(inside: Array, outside: Array, top: int) -> int:
    """Members among the ``top`` highest, where equals at the boundary count as wrong first."""
    if top == 0:
        return 0
    both = np.concatenate([inside, outside])
    boundary = np.partition(both, both.size - top)[both.size - top]
    above = int(np.sum(inside > boundary))
    left = top - int(np.sum(both > boundary))
    return above + max(0, left - int(np.sum(outside == boundary)))


def largest_rejected(rejected: Callable[[float], bool]) -> float:
    """An end of the rejected parameters: one that is ``rejected``, just below one that is not."""
    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):
        low, high = high, min(2.0 * high, _LARGEST)
        if low == high:
            return low
    while high - low > _WIDTH * high:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def perfect_score(
    largest: Callable[[int], float],
    canaries: int,
    guesses: int,
    delta: float,
    significance: float,
) -> float:
    """What ``guesses`` flawless guesses show; ValueError with the number needed if nothing."""
    ceiling = largest(guesses)
    if ceiling > 0:
        return ceiling
    # At ε = 0 and v = g the p-value is at least 2^-g + (1 - 2^-g) c δ / g.
    needed = max(1, math.floor(-math.log2(significance)), guesses)
    while needed <= canaries and largest(needed) == 0:
        needed += max(1, needed // 50)
    remedy = (
        f"about {needed} guesses are needed."
        if needed <= canaries
        else f"not even {canaries} guesses would do: use more canaries or a smaller δ "
        f"(c δ = {canaries * delta:g})."
    )
    raise ValueError(
        f"{guesses} guesses, all right, would show nothing at significance {significance:g} and "
        f"δ = {delta:g}; {remedy}"
    )


def check_counts(
    canaries: int, guesses: int, correct: int, delta: float, significance: float
) -> tuple[int, int, int, float, float]:
    """All five as Python's numbers, for numpy's small integers wrap around.

    Raises:
        TypeError, ValueError: They cannot belong to one run and one claim.
    """
    canaries = _validate.integer("canaries", canaries, 1)
    guesses = _validate.integer("guesses", guesses, 1)
    correct = _validate.integer("correct", correct, 0)
    if not correct <= guesses <= canaries:
        raise ValueError(
            "correct <= guesses <= canaries must hold, got "
            f"{correct}, {guesses} and {canaries} of them."
        )
    _validate.half_open("delta", delta, 0, 1)
    _validate.inside("significance", significance, 0, 1)
    return canaries, guesses, correct, float(delta), float(significance)
