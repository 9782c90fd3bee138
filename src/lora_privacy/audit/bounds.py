"""Lower bounds on ε from the error rates of an attack, and the best of several attacks.

Proofs: ``docs/theory/auditing.md``, sections 1, 3 and 7.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy.audit._arrays import Array, part
from lora_privacy.audit._binomial import upper_limit
from lora_privacy.audit.result import NOT_STATED, Adjacency, LeakageEstimate

__all__ = ["Selection", "epsilon_clopper_pearson", "epsilon_from_counts", "strongest"]

Selection = Literal["split", "bonferroni"]

SELECTIONS: tuple[str, ...] = get_args(Selection)

_INDEPENDENT = (
    "the members' scores are independent draws of one law",
    "the non-members' scores are independent draws of one law",
    "membership of a canary is one step between neighbours",
)
_REFERENCES = ("clopper-pearson-1934", "jagielski-auditing-2020")


def epsilon_from_counts(
    *,
    members: int,
    true_positives: int,
    non_members: int,
    false_positives: int,
    delta: float,
    significance: float,
    threat_model: str = NOT_STATED,
    adjacency: Adjacency = "add-remove",
) -> LeakageEstimate:
    """Lower bound on ε from the error counts of a test that was fixed before looking.

    ``max(ln((1 - δ - FNR⁺)/FPR⁺), ln((1 - δ - FPR⁺)/FNR⁺))`` with Clopper–Pearson upper limits at
    half the significance each. Both directions rest on the same two limits, so trying both costs
    nothing.

    Args:
        members: Trials with the canary in.
        true_positives: Of these, called members.
        non_members: Trials with the canary out.
        false_positives: Of these, called members.
        delta: δ in [0, 1).
        significance: Probability of a false claim, in (0, 1).
        threat_model: What the attacker sees and chooses; printed.
        adjacency: Whether a canary that is out is absent or replaced by another record.

    Raises:
        ValueError: A count or a probability is out of range, or there are so few trials that not
            even a flawless test shows anything; the message says how many do.

    References:
        Jagielski, Ullman & Oprea 2020; ``docs/theory/auditing.md``, section 1.

    >>> estimate = epsilon_from_counts(
    ...     members=500, true_positives=500, non_members=500, false_positives=0,
    ...     delta=0.0, significance=0.05,
    ... )
    >>> round(estimate.epsilon, 3)
    4.906
    """
    delta, significance = float(delta), float(significance)
    members = _validate.integer("members", members, 1)
    non_members = _validate.integer("non_members", non_members, 1)
    for name, count, trials in (
        ("true_positives", true_positives, members),
        ("false_positives", false_positives, non_members),
    ):
        if _validate.integer(name, count, 0) > trials:
            raise ValueError(f"{name} must be at most {trials}, got {count}.")
    ceiling = _ceiling(members, non_members, delta, significance, 1, 1)
    missed = upper_limit(members - true_positives, members, significance / 2)
    alarms = upper_limit(false_positives, non_members, significance / 2)
    return LeakageEstimate(
        epsilon=float(_epsilon(missed, alarms, delta)),
        delta=delta,
        significance=significance,
        canaries=members + non_members,
        ceiling=ceiling,
        method="Clopper–Pearson limits of a test fixed beforehand",
        observed=f"{true_positives} of {members} members and {false_positives} of {non_members} "
        "non-members called members",
        assumptions=_INDEPENDENT,
        references=_REFERENCES,
        threat_model=threat_model,
        adjacency=adjacency,
    )


def epsilon_clopper_pearson(
    scores: npt.ArrayLike,
    members: npt.ArrayLike,
    *,
    delta: float,
    significance: float,
    threat_model: str = NOT_STATED,
    adjacency: Adjacency = "add-remove",
    selection: Selection = "split",
    seed: int | None = None,
    candidates: int = 16,
) -> LeakageEstimate:
    """Lower bound on ε from scores of independent trials, the threshold chosen honestly.

    * ``"split"`` chooses the threshold on one half of each class and reports on the other.
    * ``"bonferroni"`` tries thresholds at ranks that depend on nothing but the sizes, half among
      the non-members and half among the members, each at its share of the significance. It keeps
      all the trials, and is better with few of them.

    Choosing between the two by the outcome, or among seeds, is one more choice: see
    :func:`strongest`.

    Args:
        scores: Shape (n,), higher means member; one a trial. Trials that share a training run
            are not independent: use the one-run bounds for those.
        members: Boolean, shape (n,).
        delta: δ in [0, 1).
        significance: Probability of a false claim, in (0, 1).
        threat_model: What the attacker sees and chooses; printed.
        adjacency: Whether a canary that is out is absent or replaced by another record.
        selection: How the threshold is chosen.
        seed: Of the split; None draws one from the operating system and reports it. A seed of
            one's own picks trials by their place: the order must then be that of the trials, and
            must not depend on the scores.
        candidates: Thresholds that ``"bonferroni"`` may try, at least 2; fixed beforehand.

    Raises:
        TypeError: ``members`` is not boolean.
        ValueError: A score is NaN, a shape is wrong, a class is empty, or so few that not even a
            flawless attack shows anything; the message says how many do.

    References:
        Jagielski, Ullman & Oprea 2020; ``docs/theory/auditing.md``, section 3.
    """
    _validate.choice("selection", selection, SELECTIONS)
    # numpy's single precision would round 1 - δ - rate, and a share of the significance.
    delta, significance = float(delta), float(significance)
    inside, outside = part(scores, members)
    if selection == "split":
        # In the order of the trials: halves of sorted scores, by a fixed seed, would be fixed
        # ranks, which no limit covers.
        values, mask = np.asarray(scores, dtype=np.float64), np.asarray(members)
        return _on_a_held_out_half(
            values[mask], values[~mask], delta, significance, threat_model, adjacency, seed
        )
    candidates = _validate.integer("candidates", candidates, 2)
    return _over_fixed_ranks(
        inside, outside, delta, significance, threat_model, adjacency, candidates
    )


def strongest(
    attacks: Mapping[str, Callable[[float], LeakageEstimate]], *, significance: float
) -> LeakageEstimate:
    """The largest ε among several attacks, at a significance that pays for all of them.

    It takes functions, not estimates: each is called once, with its share of the significance,
    because estimates that were each computed at the full level cannot be combined afterwards.
    List every attack that was tried, not those that did well.

    Args:
        attacks: Name -> a function of a significance, which returns the estimate at it.
        significance: Probability of a false claim among all of them, in (0, 1).

    Raises:
        ValueError: There is no attack, one ignored the significance it was handed, or they
            disagree on δ or on the adjacency.

    References:
        ``docs/theory/auditing.md``, section 7 (Boole's inequality).
    """
    _validate.inside("significance", significance, 0, 1)
    if not attacks:
        raise ValueError("attacks must name at least one, got none.")
    share = significance / len(attacks)
    estimates = {name: attack(share) for name, attack in attacks.items()}
    for name, estimate in estimates.items():
        if estimate.significance > share:
            raise ValueError(
                f"attack {name!r} was handed the significance {share:g} and answered at "
                f"{estimate.significance:g}; pass the argument on to the bound."
            )
    if len({(estimate.delta, estimate.adjacency) for estimate in estimates.values()}) > 1:
        raise ValueError("attacks must share one δ and one adjacency, or their ε do not compare.")
    name, best = max(estimates.items(), key=lambda item: item[1].epsilon)
    return replace(
        best,
        significance=significance,
        observed=f"{name}: {best.observed}",
        ceiling=max(estimate.ceiling for estimate in estimates.values()),
        attempts=sum(estimate.attempts for estimate in estimates.values()),
    )


def _on_a_held_out_half(
    inside: Array,
    outside: Array,
    delta: float,
    significance: float,
    threat_model: str,
    adjacency: Adjacency,
    seed: int | None,
) -> LeakageEstimate:
    seed = secrets.randbits(32) if seed is None else _validate.integer("seed", seed, 0)
    rng = np.random.default_rng(seed)
    inside, outside = rng.permutation(inside), rng.permutation(outside)
    chosen_in, kept_in = np.sort(inside[: inside.size // 2]), inside[inside.size // 2 :]
    chosen_out, kept_out = np.sort(outside[: outside.size // 2]), outside[outside.size // 2 :]
    ceiling = _ceiling(kept_in.size, kept_out.size, delta, significance, 1, 2)
    cuts = np.unique(np.concatenate([chosen_in, chosen_out]))
    missed = np.searchsorted(chosen_in, cuts, side="left")
    alarms = chosen_out.size - np.searchsorted(chosen_out, cuts, side="left")
    promise = _epsilon(
        upper_limit(missed, max(1, chosen_in.size), significance / 2),
        upper_limit(alarms, max(1, chosen_out.size), significance / 2),
        delta,
    )
    threshold = float(cuts[int(np.argmax(promise))])
    report = epsilon_from_counts(
        members=kept_in.size,
        true_positives=int(np.sum(kept_in >= threshold)),
        non_members=kept_out.size,
        false_positives=int(np.sum(kept_out >= threshold)),
        delta=delta,
        significance=significance,
        threat_model=threat_model,
        adjacency=adjacency,
    )
    return replace(
        report,
        canaries=inside.size + outside.size,
        ceiling=ceiling,
        method=f"Clopper–Pearson limits, threshold {threshold:.6g} chosen on the other half "
        f"(seed {seed})",
    )


def _over_fixed_ranks(
    inside: Array,
    outside: Array,
    delta: float,
    significance: float,
    threat_model: str,
    adjacency: Adjacency,
    candidates: int,
) -> LeakageEstimate:
    out_ranks = _ranks(outside.size, candidates // 2)
    in_ranks = _ranks(inside.size, candidates - candidates // 2)
    tried = out_ranks.size + in_ranks.size
    level = significance / (2 * tried)
    ceiling = _ceiling(inside.size, outside.size, delta, significance, tried, 1)
    # "score > the j-th largest non-member": j - 1 alarms, or fewer with ties, which cannot count.
    high_cuts = outside[outside.size - out_ranks]
    high = _epsilon(
        upper_limit(np.searchsorted(inside, high_cuts, side="right"), inside.size, level),
        upper_limit(out_ranks - 1, outside.size, level),
        delta,
    )
    # "score >= the j-th smallest member": j - 1 members missed, or fewer with ties.
    low_cuts = inside[in_ranks - 1]
    alarms = outside.size - np.searchsorted(outside, low_cuts, side="left")
    low = _epsilon(
        upper_limit(in_ranks - 1, inside.size, level),
        upper_limit(alarms, outside.size, level),
        delta,
    )
    cuts, found = np.concatenate([high_cuts, low_cuts]), np.concatenate([high, low])
    best = int(np.argmax(found))
    return LeakageEstimate(
        epsilon=float(found[best]),
        delta=delta,
        significance=significance,
        canaries=inside.size + outside.size,
        ceiling=ceiling,
        method="Clopper–Pearson limits at thresholds of fixed ranks, Bonferroni",
        observed=f"threshold {float(cuts[best]):.6g} on {inside.size} members and "
        f"{outside.size} non-members",
        assumptions=_INDEPENDENT,
        references=_REFERENCES,
        threat_model=threat_model,
        adjacency=adjacency,
        attempts=tried,
    )


def _ranks(size: int, count: int) -> npt.NDArray[np.int64]:
    """At most ``count`` ranks from 1 to ``size``, denser near 1: a function of the sizes alone."""
    return np.unique(np.rint(np.geomspace(1, size, count)).astype(np.int64))


def _epsilon(missed: Array, alarms: Array, delta: float) -> Array:
    """ε from upper limits of FNR and FPR, the larger direction, rounded down; at least 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        forward = np.log((1.0 - delta - missed) / alarms)
        backward = np.log((1.0 - delta - alarms) / missed)
    best = np.fmax(forward, backward)  # NaN where nothing is left of 1 - δ - rate
    return np.where(best > 0, best * (1.0 - 1e-12), 0.0)


def _ceiling(
    members: int, non_members: int, delta: float, significance: float, tried: int, parts: int
) -> float:
    """What a flawless attack shows; ValueError with the number of trials needed if nothing."""
    _validate.half_open("delta", delta, 0, 1)
    _validate.inside("significance", significance, 0, 1)
    level = significance / (2 * tried)
    ceiling = float(
        _epsilon(upper_limit(0, members, level), upper_limit(0, non_members, level), delta)
    )
    if ceiling > 0:
        return ceiling
    # Nothing is shown while the limits 1 - level^(1/n) are (1 - δ)/2 or more.
    needed = parts * (math.floor(math.log(level) / math.log((1.0 + delta) / 2.0)) + 1)
    raise ValueError(
        f"{members} members and {non_members} non-members, told apart without a mistake, would "
        f"show nothing at significance {significance:g} and δ = {delta:g}; {needed} of each are "
        "enough to show something."
    )
