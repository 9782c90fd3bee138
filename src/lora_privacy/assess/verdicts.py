"""The answer in plain words: what is proved of each method, what attacks got, what a bound costs.

Each sentence is of one kind and says which. A contradiction of two kinds comes before all else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_privacy.assess.cells import at_least, at_most, interval, median, number, target_of
from lora_privacy.assess.methods import recipe_of
from lora_privacy.audit.result import confidence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_privacy.assess.config import AssessConfig
    from lora_privacy.assess.membership import Membership
    from lora_privacy.assess.result import Assessment, MethodResult
    from lora_privacy.assess.secrets import SecretsResult
    from lora_privacy.assess.updates import UpdateAttack
    from lora_privacy.dp import ImpliedPrivacy

__all__ = ["Statement", "cautions", "contradictions", "headline", "readings", "statements"]

Kind = Literal["Guarantee", "No guarantee", "Evidence", "Price", "Reading, not a guarantee"]

_FPR = 0.01
_MANY_NATS = 20.0  # e²⁰ is half a billion
_CHECK = 1e-3  # a check that fails by chance less often than this is worth a warning
_LITTLE = "These attacks found little; that is not to say that there is little to find."


@dataclass(frozen=True, slots=True)
class Statement:
    """One or two sentences of one kind."""

    kind: Kind
    text: str


def headline(result: Assessment) -> str:
    """The answer to "is this private?", in two sentences at most."""
    if not result.methods:
        return "No method finished, so nothing is said here."
    if contradictions(result):
        return "Do not rely on this page: below, a proof and an attack contradict each other."
    proved = [
        f"{m.method} ε ≤ {at_most(m.proved.epsilon)}"
        for m in result.methods
        if m.proved.reason is None
    ]
    open_ = [m.method for m in result.methods if m.proved.reason is not None]
    delta = result.config.delta
    if not proved:
        return (
            "No. None of these runs protects its training data by a proved (ε, δ) bound at "
            f"δ = {delta!r}."
        )
    yes = f"Proved at δ = {delta!r}: {', '.join(proved)}."
    return f"{yes} Nothing is proved of {_and(open_)}." if open_ else yes


def contradictions(result: Assessment) -> tuple[str, ...]:
    """Where an attack got more than a proof allows: but for chance, one of both is wrong."""
    return tuple(text for method in result.methods for text in _contradictions(method))


def cautions(result: Assessment) -> tuple[str, ...]:
    """What a reader must know before quoting a number: scope, composition, failed checks."""
    found = [*_size(result), *_scope(result), *_composition(result)]
    for method in result.methods:
        value = None if method.secrets is None else method.secrets.p_value_out
        if value is not None and value < _CHECK:
            found.append(
                f"{method.method}: a check fails. Secrets that were left out of its training "
                f"stand out all the same (p ≤ {at_most(value, 2)}), so its exposures show "
                "something else than memory."
            )
    return tuple(found)


def statements(method: MethodResult, config: AssessConfig) -> tuple[Statement, ...]:
    """What is proved of one method, what attacks got from it, and what the target would cost."""
    evidence = " ".join(_evidence(method, config))
    found = [_guarantee(method), Statement("Evidence", evidence), _price(method, config)]
    return tuple(found)


def readings(result: Assessment) -> tuple[Statement, ...]:
    """The implied ε, a sentence for all methods that share it."""
    groups: dict[tuple[ImpliedPrivacy, ImpliedPrivacy], list[str]] = {}
    for method in result.methods:
        if method.implied is not None and method.flattering is not None:
            groups.setdefault((method.implied, method.flattering), []).append(method.method)
    return tuple(
        Statement(
            "Reading, not a guarantee",
            f"{_and(names)}: if the noise that the projection injects were Gaussian, fresh and "
            "independent, which it is not, an accountant would print "
            f"ε = {number(implied.epsilon)}, or {number(flattering.epsilon)} at its most "
            f"flattering, at δ = {implied.delta!r}.",
        )
        for (implied, flattering), names in groups.items()
    )


def _guarantee(method: MethodResult) -> Statement:
    bound, plan = method.proved, method.noise
    if bound.reason is not None:
        return Statement("No guarantee", f"Nothing is proved, because {bound.reason}")
    text = (
        f"ε ≤ {at_most(bound.epsilon)} at δ = {bound.delta!r} is proved, for {bound.unit} "
        f"{_NEIGHBOURS[bound.adjacency]}."
    )
    if plan is not None:
        rate = float(plan.accountant().tpr_bound(_FPR))
        text += (
            f" So no attack notices a record that was in more often than in "
            f"{at_most(100 * rate)} % of cases, at {100 * _FPR:g} % false alarms."
        )
    return Statement("Guarantee", text)


_NEIGHBOURS = {"add-remove": "added or removed", "replace": "replaced by another"}


def _evidence(method: MethodResult, config: AssessConfig) -> Iterator[str]:
    if method.membership is not None:
        yield from _membership(method.membership)
    elif config.references:
        yield "Membership attacks: not finished."
    else:
        yield "Membership attacks: not run."
    if method.update is not None:
        yield _update(method.update)
    elif recipe_of(method.method).scaling:
        yield "The attack on one update: not run; it does not model row scaling."
    elif config.update_games:
        yield "The attack on one update: not finished."
    if method.secrets is not None:
        yield from _secrets(method.secrets)


def _membership(found: Membership) -> Iterator[str]:
    # Intervals of all attacks hold together, so the best of them may be quoted.
    name, (area, tpr) = max(found.report.rates.items(), key=lambda item: item[1][0].low)
    level = confidence(found.report.significance)
    rates = f"AUC {interval(area.value, area.low, area.high)}"
    if not isinstance(tpr, str):
        shown = interval(tpr.value, tpr.low, tpr.high)
        rates += f" and TPR {shown} at FPR {found.report.fpr:g}"
    epsilon = found.report.epsilon
    if isinstance(epsilon, str):
        shows = "no lower bound on ε can be had"
    else:
        shows = f"together the attacks show ε ≥ {at_least(epsilon.epsilon)}"
    yield (
        f"The best membership attack, {name}, gets {rates}; {shows} (confidence {level}; a target "
        f"trained likewise on {found.members:,} of {found.records:,} records)."
    )
    if area.low <= 0.5 and (isinstance(epsilon, str) or epsilon.epsilon == 0):
        yield _LITTLE


def _update(found: UpdateAttack) -> str:
    text = (
        "From one update, knowing the rest of its batch, a candidate is told with AUC "
        f"{interval(found.auc.value, found.auc.low, found.auc.high)}"
    )
    if found.best_auc is None:
        return f"{text}."
    return f"{text}; more than {at_most(found.best_auc)} is proved to be impossible."


def _secrets(found: SecretsResult) -> Iterator[str]:
    inside = [score.bits for score in found.scores if score.included]
    if not inside or found.p_value_in is None:
        yield "No planted secret was in the training set."
        return
    most = max(score.most_bits for score in found.scores)
    yield (
        f"{len(inside)} planted secrets are exposed by {median(inside):.2f} of {most:.2f} bits in "
        f"the median (p ≤ {at_most(found.p_value_in, 2)}); without memory 1 bit is usual."
    )


def _price(method: MethodResult, config: AssessConfig) -> Statement:
    target = target_of(config.epsilon)
    plan = method.price
    if plan is None:
        return Statement("Price", f"No noise within reach would buy {target}.")
    twin = method.method if method.noise is not None else _TWINS[recipe_of(method.method).base]
    return Statement(
        "Price",
        f"{target} is proved with a noise multiplier of {at_most(plan.noise_multiplier, 5)} "
        f"({twin}, "
        f"{plan.steps:,} steps at sampling rate {number(plan.sample_rate)}).",
    )


_TWINS = {"full": "dp-sgd", "lora": "dp-lora", "lora-fa": "dp-lora-fa", "flora": "dp-flora"}


def _contradictions(method: MethodResult) -> Iterator[str]:
    bound = method.proved
    found = None if method.membership is None else method.membership.report.epsilon
    # A bound at δ holds at every larger δ.
    if (
        found is not None
        and not isinstance(found, str)
        and found.delta >= bound.delta
        and found.epsilon > bound.epsilon
    ):
        yield (
            f"{method.method}: membership attacks show ε ≥ {at_least(found.epsilon)} at "
            f"confidence {confidence(found.significance)}, and ε ≤ {at_most(bound.epsilon)} is "
            "proved. Chance does that to a right proof with the remaining probability; else the "
            "run did not do what the proof assumes, or the attack's assumptions fail, or the "
            "proof has a mistake."
        )
    update = method.update
    if update is not None and update.contradicts and update.best_auc is not None:
        yield (
            f"{method.method}: the attack on one update has AUC ≥ {at_least(update.auc.low)} at "
            f"confidence {confidence(update.auc.significance)}, and at most "
            f"{at_most(update.best_auc)} is proved. But for chance, one of both is wrong."
        )


def _size(result: Assessment) -> Iterator[str]:
    """What the numbers ε and δ allow, where that is much."""
    private = [method.proved for method in result.methods if method.proved.reason is None]
    if not private:
        return
    largest = max(bound.epsilon for bound in private)
    if largest <= _MANY_NATS:
        factor = at_most(math.exp(largest))
        yield (
            f"ε ≤ {at_most(largest)} means: but for δ, what is published is at most {factor} "
            "times likelier with a record than without it."
        )
    else:
        yield f"ε ≤ {at_most(largest)} is proved, and hides next to nothing."
    if result.config.delta >= 1 / result.train.examples:
        yield (
            f"δ = {result.config.delta!r} is not below 1/N = 1/{result.train.examples:,}: such a "
            "bound also holds for a method that publishes a record in full."
        )


def _scope(result: Assessment) -> Iterator[str]:
    secrets = max(
        (
            sum(score.included for score in method.secrets.scores)
            for method in result.methods
            if method.secrets is not None
        ),
        default=0,
    )
    if secrets:
        yield (
            f"The {result.train.examples:,} records trained on include {secrets} planted secrets; "
            "a proved ε holds for each of them as for any other record. The number of records is "
            "taken to be public."
        )
    games = [m.membership for m in result.methods if m.membership is not None]
    if games:
        yield (
            "Membership attacks are not about the assessed model itself, but about a target "
            f"trained likewise, with the same noise, on a random half of {games[0].records:,} "
            f"records, beside {games[0].references} reference models. A target with fewer records "
            "may learn each of them better by heart."
        )


def _composition(result: Assessment) -> Iterator[str]:
    private = [method.proved for method in result.methods if method.proved.reason is None]
    yield (
        "All models of this assessment, shadow models too, saw the same records. Each ε is that "
        "of one model, released alone."
    )
    if len(private) > 1:
        # math.fsum is exact to half a unit; the last digit shown is rounded up.
        total = math.nextafter(math.fsum(b.epsilon for b in private), math.inf)
        delta = math.nextafter(math.fsum(b.delta for b in private), math.inf)
        yield (
            f"Whoever gets the {len(private)} private models of this page has, by simple "
            f"composition, ε ≤ {at_most(total)} at δ ≤ {at_most(delta)}; with one model without "
            "noise beside them, nothing is proved."
        )


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
