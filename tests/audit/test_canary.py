"""Exposure and its law without memorisation; canaries and what a projection keeps of them."""

import json
import math

import mpmath as mp
import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from lora_privacy.audit.canary import (
    Exposure,
    _skew_normal_tail,
    exposure,
    exposure_p_value,
    gradient_canaries,
)
from lora_privacy.data import plant_secrets, tickets

Array = npt.NDArray[np.float64]

# Exposure by rank.


def test_exact_exposure_is_that_of_the_sorted_list() -> None:
    """Oracle: the place in a list of all secrets, sorted by a plain loop; 1e-12."""
    rng = np.random.default_rng(1)
    scores = rng.standard_normal(200)
    for secret in range(0, 200, 17):
        order = sorted(range(200), key=lambda i: -scores[i])
        found = exposure(scores[secret], np.delete(scores, secret), space=200)
        assert found.method == "exact"
        assert found.rank == order.index(secret) + 1
        assert found.bits == pytest.approx(
            math.log2(200) - math.log2(order.index(secret) + 1), abs=1e-12
        )


def test_a_sample_caps_the_exposure() -> None:
    """The first of 1,024 among 10⁸ has 10 bits, not log2(10⁸)."""
    found = exposure(9.0, np.zeros(1023), space=10**8)
    assert (found.method, found.bits, found.p_value) == ("sampled", 10.0, 1 / 1024)


def test_ties_count_against_the_secret() -> None:
    """A model that scores all alike memorised nothing; the other reading would give all bits."""
    assert exposure(0.0, np.zeros(1023), space=1024).bits == 0.0
    assert exposure(0.0, [0.0, -1.0, 1.0], space=4).rank == 3


@pytest.mark.parametrize("levels", [None, 3])
def test_without_memorisation_exposure_has_its_law(levels: int | None) -> None:
    """P[exposure >= t] <= 2^-t, at level 1e-4 each, 10,000 draws, also with 3 score levels (ties).

    Without ties it is attained at whole t. A model that lifts the secret's score by one
    standard deviation must be caught by the same check.
    """
    rng = np.random.default_rng(2)

    def caught(lift: float) -> bool:
        above = np.zeros(6)
        for _ in range(10_000):
            scores = rng.standard_normal(64)
            scores[0] += lift
            if levels is not None:
                scores = np.digitize(scores, [-0.5, 0.5]).astype(float)
            bits = exposure(scores[0], scores[1:], space=64).bits
            above += bits >= np.arange(1, 7) - 1e-9
        tails = stats.binom.sf(above - 1, 10_000, 0.5 ** np.arange(1, 7))
        if levels is None and not lift:
            assert above == pytest.approx(10_000 * 0.5 ** np.arange(1, 7), abs=4 * 50)
        return bool(np.any(tails < 1e-4))

    assert not caught(0.0)
    assert caught(1.0)


def test_p_value_of_several_secrets() -> None:
    """One secret: 2^-t, 1e-12. Eight: uniform by simulation (KS, 1e-3), small when memorised.

    Oracle of the sum: Erlang's tail as a Poisson sum, 1e-12 relative.
    """
    for t in (0.0, 1.0, 3.7, 40.0):
        assert exposure_p_value(t) == pytest.approx(2.0**-t, rel=1e-12, abs=0)
    bits = np.array([0.3, 5.0, 2.2])
    x = mp.mpf(float(bits.sum())) * mp.log(2)
    erlang = mp.exp(-x) * sum(x**i / mp.factorial(i) for i in range(3))
    assert exposure_p_value(bits) == pytest.approx(float(erlang), rel=1e-12, abs=0)
    rng = np.random.default_rng(3)
    ranks = rng.integers(1, 1_000_001, (2_000, 8))
    values = [exposure_p_value(np.log2(1e6 / row)) for row in ranks]
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    lifted = [exposure_p_value(np.log2(1e6 / np.ceil(row / 2))) for row in ranks]
    assert stats.kstest(lifted, "uniform").pvalue < 1e-3
    # Few ranks: the p-value may only be too large.
    coarse = [exposure_p_value(np.log2(4 / row)) for row in rng.integers(1, 5, (2_000, 8))]
    for level in (0.3, 0.1, 0.01):
        assert np.mean(np.array(coarse) <= level) <= level + 4 * math.sqrt(level / 2_000)


def test_a_memorised_ticket_stands_out() -> None:
    """A pair-count model of characters, trained on planted secrets: included ones are exposed."""
    train, secrets = plant_secrets(tickets(50, seed=1), 20, seed=2)
    counts: dict[str, float] = {}
    for text in train.texts:
        for i in range(len(text) - 5):
            counts[text[i : i + 6]] = counts.get(text[i : i + 6], 0) + 1

    def score(text: str) -> float:
        return sum(math.log(counts.get(text[i : i + 6], 0.01)) for i in range(len(text) - 5))

    bits: dict[bool, list[float]] = {True: [], False: []}
    for k, secret in enumerate(secrets):
        others = [score(text) for text in secret.alternatives(255, seed=k)]
        found = exposure(score(secret.text), others, space=secret.space)
        bits[secret.included].append(found.bits)
    assert exposure_p_value(bits[True]) < 1e-6
    assert exposure_p_value(bits[False]) > 1e-3


# Extrapolation.


@pytest.mark.parametrize("shape", [-3.0, 0.5, 4.0])
def test_extrapolation_of_a_law_that_is_skew_normal(shape: float) -> None:
    """True exposures of 12 to 20 bits from 20,000 scores, which alone reach 14.3: within 1 bit."""
    law = stats.skewnorm(shape, loc=-30, scale=4)
    scores = law.rvs(20_000, random_state=np.random.default_rng(4))
    for bits in (12.0, 16.0, 20.0):
        found = exposure(law.isf(2.0**-bits), scores, space=10**8, method="skew-normal")
        assert found.bits == pytest.approx(bits, abs=1.0)
        assert found.fit is not None
        assert found.fit.p_value > 1e-3
    far = exposure(1e3, scores, space=10**8, method="skew-normal")
    assert far.bits == math.log2(10**8)
    assert exposure(-1e3, scores, space=10**8, method="skew-normal").bits == 0.0


def test_a_wrong_law_is_reported() -> None:
    """Two clusters of scores are no skew-normal law: KS below 1e-6, and the text shows it."""
    rng = np.random.default_rng(5)
    scores = rng.standard_normal(4_000) + np.where(rng.random(4_000) < 0.5, 0.0, 8.0)
    found = exposure(20.0, scores, space=10**8, method="skew-normal")
    assert found.fit is not None
    assert found.fit.p_value < 1e-6
    assert "heuristic" in str(found)
    assert found.p_value == 1 / 4_001  # of the rank, whatever was extrapolated


def test_the_test_of_fit_has_about_its_level() -> None:
    """Of 100 right fits, up to 10 % + 4 errors fail at 5 %: more than 5 %, on the safe side.

    On the scores of the fit itself hardly any would: their mean p-value is far above 1/2.
    """
    rng = np.random.default_rng(6)
    draws = rng.standard_normal((100, 300))
    values = np.array([_skew_normal_tail(0.0, scores)[1].p_value for scores in draws])
    assert np.mean(values < 0.05) <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / 100)
    assert np.mean(values) < 0.6
    own = [stats.kstest(x, stats.skewnorm(*stats.skewnorm.fit(x)).cdf).pvalue for x in draws[:30]]
    assert np.mean(own) > 0.7


def test_tail_of_the_fitted_law() -> None:
    """Oracle: mpmath integral of 2φ(x)Φ(ax) over the fitted tail; 1e-6 of the logarithm."""
    scores = stats.skewnorm(-2.0).rvs(3_000, random_state=np.random.default_rng(7))
    fitted = scores[np.arange(3_000) % 5 > 0]
    a, loc, scale = stats.skewnorm.fit((fitted - fitted.mean()) / fitted.std())
    for score in (0.5, 1.5, 2.5):
        z = (mp.mpf(score) - fitted.mean()) / fitted.std()
        start = (z - loc) / scale
        with mp.workdps(30):
            tail = mp.quad(lambda x: 2 * mp.npdf(x) * mp.ncdf(a * x), [start, start + 2, mp.inf])
        assert _skew_normal_tail(score, scores)[0] == pytest.approx(float(mp.log(tail)), rel=1e-6)


def test_exposure_as_text_and_json() -> None:
    """What a paper quotes is in both."""
    found = exposure(3.0, [0.0, 1.0, 2.0, 3.0], space=5)
    assert str(found) == (
        "Exposure 1.322 of 2.322 bits, by rank among all of 5 equally likely secrets; "
        "rank 2 of 5, p = 0.4 [Carlini, Nicholas and Liu, Chang and Erlingsson, Úlfar and Kos, "
        "Jernej and Song, Dawn (2019), USENIX Security 2019, arXiv:1802.08232]."
    )
    record = json.loads(json.dumps(found.to_dict()))
    assert (record["p_value"], record["references"]) == (0.4, ["carlini-secrets-2019"])
    assert isinstance(found, Exposure)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"score": math.nan}, "score.* is NaN"),
        ({"alternatives": [0.0, math.nan]}, r"alternatives\[1\] is NaN"),
        ({"alternatives": []}, r"alternatives must have shape"),
        ({"space": 3}, "space must lie in"),
        ({"method": "normal"}, "method must be one of"),
        ({"method": "skew-normal"}, "at least 250 for a fit"),
        ({"method": "skew-normal", "alternatives": [1.0] * 300}, "all score alike"),
    ],
)
def test_what_exposure_refuses(arguments: dict[str, object], match: str) -> None:
    """Each bad argument is named."""
    usual: dict[str, object] = {"score": 0.0, "alternatives": [1.0, 2.0, 3.0], "space": 1000}
    with pytest.raises(ValueError, match=match):
        exposure(**{**usual, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [[], [-0.1], [math.inf]])
def test_what_the_p_value_refuses(bits: list[float]) -> None:
    """No exposure, a negative one, an infinite one."""
    with pytest.raises(ValueError, match="bits"):
        exposure_p_value(bits)


# Gradient canaries.


def kept(canaries: Array, a: Array) -> Array:
    """Share of the squared norm behind the projection on the rows of A, by least squares."""
    shares = []
    for canary in canaries:
        coefficients = np.linalg.lstsq(a.T, canary.T, rcond=None)[0]
        shares.append(np.sum((a.T @ coefficients) ** 2) / np.sum(canary**2))
    return np.array(shares)


@pytest.mark.parametrize("kind", ["random", "basis", "aligned"])
def test_canaries_have_their_norm(kind: str) -> None:
    """Frobenius norm 1e-12, shape, repeatable; different canaries differ."""
    a = np.random.default_rng(8).standard_normal((3, 20)) if kind == "aligned" else None
    one, two = (
        gradient_canaries(
            kind, shape=(6, 20), norm=2.5, count=9, random_state=np.random.default_rng(9), a=a
        )
        for _ in range(2)
    )
    assert one.shape == (9, 6, 20)
    assert np.array_equal(one, two)
    assert np.linalg.norm(one, axis=(1, 2)) == pytest.approx(np.full(9, 2.5), rel=1e-12)
    assert len(np.unique(one.reshape(9, -1), axis=0)) == 9


def test_basis_canaries_are_orthogonal() -> None:
    """All n·m of them: each entry once, both signs."""
    canaries = gradient_canaries(
        "basis", shape=(4, 5), norm=1.0, count=20, random_state=np.random.default_rng(10)
    ).reshape(20, 20)
    assert np.array_equal(canaries @ canaries.T, np.eye(20))
    assert {-1.0, 1.0} <= set(np.unique(canaries))


def test_aligned_canaries_pass_their_matrix_and_no_other() -> None:
    """Share 1 behind A, scaled rows or not; Beta(r/2, (m-r)/2) behind a fresh one (KS, 1e-3).

    A random canary keeps r/m with little spread, and the same test rejects it.
    """
    rng = np.random.default_rng(11)
    a = rng.standard_normal((3, 20)) * np.array([[1.0], [1e-3], [50.0]])
    aligned = gradient_canaries(
        "aligned", shape=(6, 20), norm=1.0, count=400, random_state=rng, a=a
    )
    random = gradient_canaries("random", shape=(6, 20), norm=1.0, count=400, random_state=rng)
    assert kept(aligned, a) == pytest.approx(np.ones(400), rel=1e-9)
    assert all(np.linalg.matrix_rank(canary) == 1 for canary in aligned)
    inner = aligned @ np.linalg.qr(a.T)[0]  # uniform in the row space, although A's rows are not
    assert np.mean(np.sum(inner**2, axis=1), axis=0) == pytest.approx(np.full(3, 1 / 3), abs=0.08)
    law = stats.beta(1.5, 8.5)
    fresh = [
        np.concatenate([kept(c[None], rng.standard_normal((3, 20))) for c in canaries])
        for canaries in (aligned, random)
    ]
    assert stats.kstest(fresh[0], law.cdf).pvalue > 1e-3
    assert stats.kstest(fresh[1], law.cdf).pvalue < 1e-3
    assert np.mean(fresh[1]) == pytest.approx(3 / 20, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"kind": "sparse"}, ValueError, "kind must be one of"),
        ({"kind": "aligned"}, ValueError, "a must be given for kind='aligned'"),
        ({"a": np.ones((2, 4))}, ValueError, "and for no other kind"),
        ({"kind": "aligned", "a": np.zeros((2, 4))}, ValueError, "no row space"),
        ({"kind": "aligned", "a": np.ones((2, 3))}, ValueError, "a must have shape"),
        ({"kind": "basis", "count": 13}, ValueError, r"count must lie in \[1, 12\]"),
        ({"norm": 0.0}, ValueError, "norm must be positive"),
        ({"shape": (3, 0)}, ValueError, "shape must be at least 1"),
        ({"random_state": 7}, TypeError, "random_state must be a numpy.random.Generator"),
    ],
)
def test_what_canaries_refuse(
    arguments: dict[str, object], error: type[Exception], match: str
) -> None:
    """Each bad argument is named."""
    usual: dict[str, object] = {
        "kind": "random",
        "shape": (3, 4),
        "norm": 1.0,
        "count": 2,
        "random_state": np.random.default_rng(0),
    }
    with pytest.raises(error, match=match):
        gradient_canaries(**{**usual, **arguments})  # type: ignore[arg-type]
