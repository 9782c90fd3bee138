"""Canaries: how far a planted secret stands out (exposure), and gradients made to be noticed.

Scores of text canaries come from log-probabilities: ``logit_confidence`` for a wrong label,
``mean_log_prob`` and ``reference_calibrated`` for random tokens. Who plants which secret, and the
coin flips, is in ``lora_privacy.data.plant_secrets``.
"""

# scipy's distributions are not typed.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from lora_privacy import _notebook, _validate
from lora_privacy.audit._arrays import Array, finite
from lora_privacy.references import cite

__all__ = [
    "CanaryKind",
    "Exposure",
    "ExposureMethod",
    "GoodnessOfFit",
    "exposure",
    "exposure_p_value",
    "gradient_canaries",
]

ExposureMethod = Literal["rank", "skew-normal"]
CanaryKind = Literal["random", "basis", "aligned"]

# One score in so many tests the fit; a smaller share would test less, a larger one fit worse.
_TESTED = 5
_LEAST_ALTERNATIVES = 250  # 50 scores that test
_REFERENCES = ("carlini-secrets-2019",)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodnessOfFit:
    """Kolmogorov–Smirnov test of a fitted law on scores it was not fitted to.

    Attributes:
        statistic: Largest distance of the two distribution functions, in [0, 1].
        p_value: Of that distance if the law is right. It looks at the bulk of the scores: a large
            one does not support the tail, where the secret lies.
    """

    statistic: float
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """How far a planted secret stands out among what could have been planted instead.

    Attributes:
        bits: Exposure, in bits, >= 0.
        method: ``"exact"``, all of the space was ranked; ``"sampled"``, a sample of it, which caps
            the exposure at log2(sample + 1); ``"skew-normal"``, a heuristic extrapolation.
        rank: Alternatives that score at least as high, plus 1.
        alternatives: Number of alternatives that were scored.
        space: Number of secrets that were equally likely, |R|.
        fit: Test of the extrapolated law; None for the other methods.
    """

    bits: float
    method: Literal["exact", "sampled", "skew-normal"]
    rank: int
    alternatives: int
    space: int
    fit: GoodnessOfFit | None = None

    @property
    def p_value(self) -> float:
        """rank/(alternatives + 1): valid whether the exposure is extrapolated or not."""
        return self.rank / (self.alternatives + 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields."""
        return {
            "kind": "canary exposure",
            **asdict(self),
            "p_value": self.p_value,
            "references": list(_REFERENCES),
        }

    def __str__(self) -> str:
        """One sentence to paste."""
        if self.fit is None:
            how = "all" if self.method == "exact" else "a sample"
            how = f"by rank among {how} of {self.space} equally likely secrets"
        else:
            how = (
                "extrapolated by a skew-normal law, a heuristic (Kolmogorov–Smirnov "
                f"{self.fit.statistic:.3g}, p = {self.fit.p_value:.3g})"
            )
        return (
            f"Exposure {self.bits:.4g} of {math.log2(self.space):.4g} bits, {how}; rank "
            f"{self.rank} of {self.alternatives + 1}, p = {self.p_value:.3g} "
            f"[{cite(*_REFERENCES)}]."
        )

    def _repr_html_(self) -> str:
        kind = "Evidence, not a guarantee"
        return _notebook.box(
            kind if self.fit is None else f"Heuristic {kind.lower()}", [str(self)]
        )


def exposure(
    score: float,
    alternatives: npt.ArrayLike,
    *,
    space: int,
    method: ExposureMethod = "rank",
) -> Exposure:
    """Exposure of one secret: ``log2(k + 1) - log2(rank)`` among k alternatives.

    With all ``space - 1`` alternatives this is log2 |R| - log2 rank. With a uniform sample of them
    it is linear interpolation of the rank, and at most log2(k + 1) bits. ``"skew-normal"`` goes
    beyond: -log2 of the upper tail of a skew-normal law fitted to the alternatives, at most
    log2 |R|. Nothing proves that scores have such a tail, so it is a heuristic.

    A tie counts against the secret. So a model that scores all alike has exposure 0, and
    P[exposure >= t] <= 2^-t holds for every model that has not seen the secret, ties or not.

    Args:
        score: Of the secret; higher means more likely to have been trained on, as log-probability.
        alternatives: Scores of other secrets of the space, shape (k,), in the order in which they
            were drawn, uniformly and without repetition. The secret itself is not among them.
        space: |R|, the number of secrets that were equally likely, at least k + 1.
        method: How to get from scores to bits.

    Raises:
        ValueError: A score is NaN or infinite, a size is out of range, or a skew-normal law is
            asked for and there are fewer than 250 alternatives or all score alike.
        TypeError: ``space`` is no integer.

    References:
        Carlini et al., "The Secret Sharer", USENIX Security 2019, sections 4.2–4.3; the law
        without memorisation and the split for the test of fit are in docs/theory/exposure.md.

    >>> exposure(3.0, [0.0, 1.0, 2.0, 3.0], space=5).bits  # one tie: rank 2 of 5
    1.3219280948873624
    """
    _validate.choice("method", method, get_args(ExposureMethod))
    others = finite("alternatives", alternatives, (None,))
    own = float(finite("score", score, ()))
    count = others.size
    space = _validate.integer("space", space, 2)
    _validate.between("space", space, count + 1, math.inf, "The secret is in it too.")
    rank = 1 + int(np.count_nonzero(others >= own))
    if method == "rank":
        bits = math.log2((count + 1) / rank)
        how = "exact" if count + 1 == space else "sampled"
        return Exposure(bits=bits, method=how, rank=rank, alternatives=count, space=space)
    tail, fit = _skew_normal_tail(own, others)
    bits = min(math.log2(space), max(0.0, -tail / math.log(2.0)))
    return Exposure(
        bits=bits, method="skew-normal", rank=rank, alternatives=count, space=space, fit=fit
    )


def exposure_p_value(bits: npt.ArrayLike) -> float:
    """P-value of exposures of several secrets together, if none has been memorised.

    Without memorisation a rank is uniform, so ``bits · ln 2`` of each is at most an Exp(1)
    variable in distribution, and the sum over k independent secrets at most a Gamma(k) variable.
    For one secret the value is 2^-bits.

    Args:
        bits: Exposures by rank, shape (k,) or one number, in bits. The secrets are drawn
            independently of each other, and so are the alternatives of each. All planted secrets
            must be in, not the best of them. Extrapolated exposures have no such law.

    Raises:
        ValueError: An exposure is negative, NaN or infinite, or there is none.

    References:
        Fisher's combination of p-values; docs/theory/exposure.md, section 2.

    >>> round(exposure_p_value([3.0]), 12)
    0.125
    """
    values = finite("bits", np.atleast_1d(np.asarray(bits, np.float64)), (None,))
    if values.min() < 0:
        raise ValueError(f"bits must be at least 0, got {values.min()!r}. Exposure is no score.")
    return float(special.gammaincc(values.size, np.sum(values) * math.log(2.0)))


def gradient_canaries(
    kind: CanaryKind,
    *,
    shape: tuple[int, int],
    norm: float,
    count: int,
    random_state: np.random.Generator,
    a: npt.ArrayLike | None = None,
) -> Array:
    """Gradients of Frobenius norm ``norm`` to insert into a private step and look for afterwards.

    - ``"random"``: a uniform direction. It keeps a share of about rank/m of its squared norm
      behind a projection, with little spread.
    - ``"basis"``: one entry, all canaries at different places, signs at random. Of rank one, and
      orthogonal to each other exactly.
    - ``"aligned"``: of rank one with its row in the row space of A. It passes that A in full and
      a fresh one like any other canary of rank one, so it finds an A that is used again.

    Args:
        kind: Which of them.
        shape: ``(n, m)`` of the layer's gradient.
        norm: Clip norm of the step, > 0, in units of the gradient.
        count: Number of canaries, at least 1, at most n·m for ``"basis"``.
        random_state: Source of all randomness; keep it from whoever trains.
        a: A of another step, shape (r, m), for ``"aligned"`` and for it only.

    Returns:
        Shape (count, n, m).

    Raises:
        ValueError: An argument is out of range, missing, or of no use for this kind.
        TypeError: A size is no integer, or ``random_state`` no generator.

    References:
        Nasr et al., "Tight Auditing of Differentially Private Machine Learning", 2023, for Dirac
        and random canaries; docs/theory/projected-gaussian.md for what a projection keeps.
    """
    _validate.choice("kind", kind, get_args(CanaryKind))
    n, m = (_validate.integer("shape", side, 1) for side in shape)
    _validate.positive("norm", norm)
    count = _validate.integer("count", count, 1)
    if not isinstance(random_state, np.random.Generator):  # pyright: ignore[reportUnnecessaryIsInstance]
        name = type(random_state).__name__
        raise TypeError(f"random_state must be a numpy.random.Generator, got {name}.")
    if (a is None) == (kind == "aligned"):
        raise ValueError("a must be given for kind='aligned', and for no other kind.")
    if kind == "basis":
        _validate.between("count", count, 1, n * m, "Each canary has an entry of its own.")
        places = random_state.choice(n * m, count, replace=False)
        canaries = np.zeros((count, n * m))
        canaries[np.arange(count), places] = norm * random_state.choice([-1.0, 1.0], count)
        return canaries.reshape(count, n, m)
    if a is None:
        canaries = random_state.standard_normal((count, n, m))
    else:
        matrix = finite("a", a, (None, m))
        # A uniform direction of the row space, however A's rows are scaled.
        values, basis = np.linalg.svd(matrix, full_matrices=False)[1:]
        basis = basis[values > max(matrix.shape) * np.finfo(np.float64).eps * values[0]]
        if not len(basis):
            raise ValueError("a must not be all zero: it has no row space to align with.")
        rows = random_state.standard_normal((count, len(basis))) @ basis
        canaries = np.einsum("kn,km->knm", random_state.standard_normal((count, n)), rows)
    return canaries * (norm / np.linalg.norm(canaries, axis=(1, 2), keepdims=True))


def _skew_normal_tail(score: float, others: Array) -> tuple[float, GoodnessOfFit]:
    """Log of the upper tail of a fit to four scores of five, tested on the fifth.

    On the scores of the fit itself the test would pass too often (Lilliefors). On others it
    rejects a little too often, because the fit has an error of its own; that is the safe side.
    """
    if others.size < _LEAST_ALTERNATIVES:
        raise ValueError(
            f"alternatives must number at least {_LEAST_ALTERNATIVES} for a fit, got "
            f"{others.size}. Score more of them, or use method='rank'."
        )
    held_out = np.arange(others.size) % _TESTED == 0
    fitted, tested = others[~held_out], others[held_out]
    centre, scale = float(np.mean(fitted)), float(np.std(fitted))
    if not scale > 0:
        raise ValueError("alternatives must differ for a fit, but all score alike.")
    law = stats.skewnorm(*stats.skewnorm.fit((fitted - centre) / scale))
    test = stats.kstest((tested - centre) / scale, law.cdf)
    tail = float(law.logsf((score - centre) / scale))
    fit = GoodnessOfFit(statistic=float(test.statistic), p_value=float(test.pvalue))
    return tail, fit
