"""Error bounds of quadratures, with rules so coarse that there are errors to be paid for.

As they are set, the rules are exact to rounding: a bound that is wrong would never show. Each is
therefore made so coarse here that its error is seen, and the upper end must still be one.
"""

import functools
import math

import mpmath as mp
import numpy as np
import pytest
from projected_oracle import log_excess
from rdp_oracle import excess_forward

from lora_privacy.dp import _hyp1f1, _moments

# (z, p, α): whole orders, where the moment is a sum, for either kind of step.
MOMENTS = [
    (0.3, 0.5, 2),
    (0.5, 0.5, 3),
    (0.5, 1e-3, 5),
    (0.7, 0.3, 2),
    (1.0, 0.5, 2),
    (1.0, 0.9, 12),
    (1.5, 0.01, 3),
    (3.0, 0.2, 7),
    (10.0, 0.5, 30),
    (100.0, 0.1, 2),
]
# At fractional orders the integrand is not analytic beyond a strip of width πz.
FRACTIONAL = [(0.5, 0.5, 1.5), (0.7, 0.5, 1.25), (1.0, 0.6, 1.5), (1.5, 0.5, 2.5)]


def exact_moment(z: float, p: float, alpha: int) -> mp.mpf:
    """Log Σ C(α,k) (1-p)^{α-k} p^k e^{k(k-1)/(2z²)} (Mironov, Talwar & Zhang 2019, Sec. 3.3)."""
    with mp.workdps(40):
        q, total = mp.mpf(p), mp.mpf(0)
        for k in range(alpha + 1):
            moment = mp.exp(mp.mpf(k * (k - 1)) / (2 * mp.mpf(z) ** 2))
            total += mp.binomial(alpha, k) * (1 - q) ** (alpha - k) * q**k * moment
        return mp.log(total)


@functools.cache
def fractional_moment(z: float, p: float, alpha: float) -> mp.mpf:
    return mp.log1p(excess_forward(z, p, alpha, 25))


def integrated(z: float, p: float, alpha: float) -> float:
    return float(_moments._integrate(np.array([z]), p, np.array([[float(alpha)]]))[0, 0])


@pytest.mark.parametrize(("z", "p", "alpha"), MOMENTS)
def test_the_integral_meets_the_sum(z: float, p: float, alpha: int) -> None:
    """As it is set: never below, and to 1e-10 above."""
    true = exact_moment(z, p, alpha)
    assert true <= integrated(z, p, alpha) <= true * (1 + mp.mpf("1e-10")) + 1e-12 * p


@pytest.mark.parametrize("log_alias", [2.0, 4.0, 8.0])
def test_aliasing_is_paid_for(log_alias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps so wide that the sum errs by up to 2 e^-alias of the integral, which is added.

    Without it some sums lie below; with more than 5 of it none does.
    """
    monkeypatch.setattr(_moments, "_LOG_ALIAS", log_alias)
    short = 0
    for paid in (2.1 * math.exp(-log_alias), 0.0):
        monkeypatch.setattr(_moments, "_ALIAS", paid)
        for z, p, alpha in MOMENTS:
            true, found = exact_moment(z, p, alpha), integrated(z, p, alpha)
            if paid:
                assert true <= found <= true + 5 * paid * (2 + 2 * alpha * p)
            short += found < true
    assert short > 0


@pytest.mark.parametrize(("z", "p", "alpha"), FRACTIONAL)
def test_aliasing_is_paid_for_where_the_strip_ends(
    z: float, p: float, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the definition at 25 digits; as the rule is set, and with wide steps."""
    true = fractional_moment(z, p, alpha)
    assert true <= integrated(z, p, alpha) <= true * (1 + mp.mpf("1e-10")) + 1e-12 * p
    for log_alias in (8.0, 16.0, 24.0):
        paid = 2.1 * math.exp(-log_alias)
        monkeypatch.setattr(_moments, "_LOG_ALIAS", log_alias)
        monkeypatch.setattr(_moments, "_ALIAS", paid)
        assert true <= integrated(z, p, alpha) <= true + 5 * paid * (2 + 2 * alpha * p) + 1e-12


@pytest.mark.parametrize("reach", [0.5, 1.0, 2.0, 4.0])
def test_what_lies_beyond_the_nodes_is_paid_for(
    reach: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes that end in the midst of the bulk, on both sides."""
    monkeypatch.setattr(_moments, "_REACH", reach)
    for z, p, alpha in MOMENTS:
        assert exact_moment(z, p, alpha) <= integrated(z, p, alpha)


# (features, rank, x), x beyond what is summed as a series.
FUNCTIONS = [
    (2, 1, 301.0),
    (2, 1, 1e6),
    (3, 2, 500.0),
    (9, 2, 400.0),
    (64, 8, 320.0),
    (64, 60, 1e4),
    (768, 8, 384.0),
    (768, 8, 1e5),
    (768, 767, 310.0),
    (4096, 64, 5000.0),
    (53248, 1, 2000.0),
]


@pytest.mark.parametrize("points", [1, 2, 3, 5])
def test_few_points_are_paid_for(points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gauss rules of few points err by less than the bound on the ellipse (ATAP, Thm. 19.3).

    Without it one of the values lies below the exact one.
    """
    roots, weights = np.polynomial.legendre.leggauss(points)
    monkeypatch.setattr(_hyp1f1, "_POINTS", points)
    monkeypatch.setattr(_hyp1f1, "_ROOTS", roots)
    monkeypatch.setattr(_hyp1f1, "_WEIGHTS", weights)
    monkeypatch.setattr(_hyp1f1, "_LOG_WEIGHTS", np.log(weights))
    short = 0
    for paid in (64 / 15 * 4.0 ** (2 - 2 * points) / (1 - 4.0**-2), 0.0):
        monkeypatch.setattr(_hyp1f1, "_GAUSS", paid)
        for features, rank, x in FUNCTIONS:
            true = log_excess(features, rank, x)
            found = float(_hyp1f1._integrate(features, rank, np.array([x]))[0])
            assert true <= found or not paid
            short += found < true
    assert short > 0


@pytest.mark.parametrize("drop", [0.1, 1.0, 4.0])
def test_tails_beyond_the_panels_are_paid_for(
    drop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Panels that end next to the peak: both closed bounds are needed, and are not idle."""
    monkeypatch.setattr(_hyp1f1, "_DROP", drop)
    for features, rank, x in FUNCTIONS:
        true = log_excess(features, rank, x)
        assert true <= float(_hyp1f1._integrate(features, rank, np.array([x]))[0]) <= true + 3.0
