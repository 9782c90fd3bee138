"""A lower bound on μ of a Gaussian mechanism from one training run, and the ε that it means.

Proofs: ``docs/theory/auditing.md``, section 5.
"""

from __future__ import annotations

import math

from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from lora_privacy import _validate
from lora_privacy.audit.one_run import (
    ASSUMPTIONS,
    SLACK,
    check_counts,
    largest_rejected,
    perfect_score,
)
from lora_privacy.audit.result import NOT_STATED, Adjacency, LeakageEstimate

__all__ = ["epsilon_one_run_fdp", "gdp_epsilon"]


def epsilon_one_run_fdp(
    *,
    canaries: int,
    guesses: int,
    correct: int,
    delta: float,
    significance: float,
    threat_model: str = NOT_STATED,
    adjacency: Adjacency = "add-remove",
) -> LeakageEstimate:
    """Lower bound on μ of a Gaussian mechanism from one run, and the ε at δ that it means.

    It assumes a shape: that the mechanism's trade-off curve is Gaussian, of an unknown μ, as for
    noise added once or a long composition. Then it gives far more than :func:`epsilon_one_run`
    at small δ. Without that, it refutes the claim "μ-GDP" for every μ below ``mu``, and
    ``epsilon`` is no lower bound.

    Args:
        canaries: Coins tossed, c.
        guesses: Guesses made, g <= c, fixed beforehand.
        correct: Right ones among them.
        delta: δ in (0, 1).
        significance: Probability of a false claim, in (0, 1).
        threat_model: What the attacker sees and chooses; printed.
        adjacency: See :func:`epsilon_one_run`.

    Raises:
        ValueError: As :func:`epsilon_one_run`, or ``delta`` is 0: no Gaussian has a finite ε.

    References:
        Mahloujifar, Melis & Chaudhuri 2024; the recursion is proved in
        ``docs/theory/auditing.md``, section 5. Dong, Roth & Su 2022, Cor. 2.13.
    """
    canaries, guesses, correct, delta, significance = check_counts(
        canaries, guesses, correct, delta, significance
    )
    _validate.inside("delta", delta, 0, 1, "Gaussian noise gives no finite ε at δ = 0.")

    def largest(right: int, of: int) -> float:
        return largest_rejected(lambda mu: _refuted(canaries, of, right, mu, significance))

    top = perfect_score(lambda g: largest(g, g), canaries, guesses, 0.0, significance)
    mu = largest(correct, guesses)
    return LeakageEstimate(
        epsilon=gdp_epsilon(mu, delta),
        delta=delta,
        significance=significance,
        canaries=canaries,
        ceiling=gdp_epsilon(top, delta),
        method="one-run audit of a Gaussian trade-off curve",
        observed=f"{correct} of {guesses} guesses right",
        assumptions=("the mechanism's trade-off curve is Gaussian", *ASSUMPTIONS),
        references=("mahloujifar-fdp-2024", "dong-gaussian-2022"),
        threat_model=threat_model,
        adjacency=adjacency,
        mu=mu,
    )


def gdp_epsilon(mu: float, delta: float) -> float:
    """Smallest ε at which a Gaussian trade-off curve of this μ is (ε, δ), rounded down.

    δ(ε) = Φ(μ/2 - ε/μ) - e^ε Φ(-μ/2 - ε/μ).
    """
    if mu == 0:
        return 0.0

    def above(epsilon: float) -> bool:
        first = float(special.log_ndtr(mu / 2 - epsilon / mu))
        second = epsilon + float(special.log_ndtr(-mu / 2 - epsilon / mu))
        if second >= first:  # by rounding only
            return False
        value = first + math.log(-math.expm1(second - first))
        # Rounding of the two logarithms, of size x²/2 for x = ε/μ, over their difference, about
        # μ/(1 + x).
        slack = 1e-9 + 1e-15 * (1.0 + (epsilon / mu) ** 3) / mu
        return value > math.log(delta) + slack

    return largest_rejected(above)


def _refuted(canaries: int, guesses: int, correct: int, mu: float, significance: float) -> bool:
    """Whether under μ-GDP ``correct`` or more right guesses are rarer than ``significance``.

    ``wrong`` and ``right`` are lower ends of E[wrong guesses; W >= i] and E[right guesses; W >= i]
    if P[W >= correct] were ``significance``. Together they are g P[W >= i], which must not exceed
    g. Section 5 of the docs.
    """
    if correct == 0:
        return False
    wrong = significance * (guesses - correct)
    right = significance * correct
    limit = guesses * SLACK
    for i in range(correct - 1, -1, -1):
        share = right / canaries
        if share >= 1:
            return True
        least = canaries * float(special.ndtr(special.ndtri(share) - mu))
        if least <= wrong:  # and then it stays so: neither moves any more
            return wrong + right > limit
        right += (least - wrong) * i / (guesses - i)
        wrong = least
        if wrong + right > limit:
            return True
    return False
