"""Parts of the laws and distances alone, each held to what its comment promises.

In the whole a part hides behind the others: an expansion behind the branch next to it, a margin
behind the next margin, a start behind the iteration. Here each is called by itself.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import mpmath as mp
import numpy as np
import pytest

from lora_privacy.noise import _density, _stirling
from lora_privacy.noise._density import chi_square_logpdf


def log_bessel_k(nu: float, z: mp.mpf) -> mp.mpf:
    """The log of K_ν(z), from K = ½∫exp(νt − z cosh t)dt (DLMF 10.32.9), in equal steps."""
    order = mp.mpf(nu)
    saddle, step = mp.asinh(order / z), 1 / (2 * mp.sqrt(mp.hypot(order, z)))
    top = order * saddle - z * mp.cosh(saddle)
    nodes = [saddle + step * i for i in range(-24, 25)]
    return top + mp.log(
        mp.fsum(mp.exp(order * t - z * mp.cosh(t) - top) for t in nodes) * step / 2
    )


def log_density(nu: float, rho: float, t: float, log_k: Callable = log_bessel_k) -> mp.mpf:
    """Gaunt's density of t, as noise-laws.md, section 2, has it."""
    n, p, at = mp.mpf(nu), mp.mpf(rho), mp.mpf(t)
    spread = 1 - p * p
    constant = mp.log(mp.pi * spread) / 2 + mp.loggamma(n + mp.mpf("0.5"))
    return n * mp.log(abs(at) / 2) + p * at / spread + log_k(nu, abs(at) / spread) - constant


def found(formula: Callable, nu: float, rho: float, t: float) -> mp.mpf:
    return mp.mpf(float(formula(np.array([nu]), np.array([rho]), np.array([t]))[0]))


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.95])
def test_the_uniform_expansion_from_where_it_is_used(rho: float) -> None:
    """Orders 30 to 50, both sides of 0 and of the mean, 0 nearly: 4e-15 of 1 + |ln f|."""
    with mp.workdps(25):
        for nu, t in ((30.0, -20.5), (30.0, -0.5), (30.0, 1e-8), (30.5, 0.7), (31.0, 70.0)):
            expected = log_density(nu, rho, t)
            error = found(_density._uniform, nu, rho, t) - expected
            assert abs(error) < 4e-15 * (1 + abs(expected))


@pytest.mark.parametrize("nu", [2_000.0, 1e6, 1e10])
def test_no_digit_is_lost_to_a_large_order(nu: float) -> None:
    """At ρ = 0, where no rounding of ρ + x enters, to 2e-15 of 1 + |ln f| at any order."""
    with mp.workdps(40):
        for z in (-3.3, 2.9, 5.6):
            t = math.floor(z * math.sqrt(2 * nu))
            expected = log_density(nu, 0.0, t)
            error = found(_density._uniform, nu, 0.0, t) - expected
            assert abs(error) < 2e-15 * (1 + abs(expected))


@pytest.mark.parametrize(("rho", "t"), [(1 - 5e-13, 0.5), (1 - 1e-9, 1e-3), (1 - 1e-9, 70.0)])
def test_what_two_numbers_next_to_one_lack(rho: float, t: float) -> None:
    """τ and ρ are both near 1, and 1 - τ may be many times 1 - ρ: 1e-14 of 1 + |ln f|."""
    with mp.workdps(40):
        expected = log_density(30.0, rho, t)
        error = found(_density._uniform, 30.0, rho, t) - expected
        assert abs(error) < 1e-14 * (1 + abs(expected))


def test_the_first_term_that_is_left_out_of_debye() -> None:
    """Its largest value over p in [0, 1] at the switch, U by DLMF 10.41.9 in fractions: 2e-16."""
    rows = [[Fraction(1)]]
    for _ in range(len(_density._debye_polynomials())):
        last = rows[-1]
        new = [Fraction(0)] * (len(last) + 3)
        for i, c in enumerate(last):  # ½p²(1 − p²)U' + ⅛∫(1 − 5p²)U
            new[i + 1] += i * c / 2 + c / (8 * (i + 1))
            new[i + 3] -= i * c / 2 + 5 * c / (8 * (i + 3))
        rows.append(new)
    for row, polynomial in zip(rows, _density._debye_polynomials(), strict=False):
        dense = [float(c) for c in row[: polynomial.size]]
        assert polynomial == pytest.approx(dense, rel=1e-13, abs=0)
    p = np.linspace(0.0, 1.0, 101)
    size = np.abs(np.polynomial.polynomial.polyval(p, [float(c) for c in rows[-1]])).max()
    assert size / _density._DEBYE_ORDER ** (len(rows) - 1) == pytest.approx(2.0e-16, rel=0.05)


def test_the_order_decides_which_formula_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The uniform one from order 30 on, which is rank 61, the other below."""
    seen: dict[str, list[float]] = {}

    def record(name: str) -> Callable:
        def outer(nu: np.ndarray, _rho: np.ndarray, _t: np.ndarray) -> np.ndarray:
            seen[name] = (2 * nu + 1).tolist()
            return np.zeros(nu.size)

        return outer

    for name in ("_uniform", "_bessel"):
        monkeypatch.setattr(_density, name, record(name))
    ranks = [1, 2, 59, 60, 61, 62, 500]
    assert _density.entry_logpdf(ranks, 0.1, 0.2) == pytest.approx(np.log(ranks), rel=1e-15)
    assert seen == {"_bessel": [1.0, 2.0, 59.0, 60.0], "_uniform": [61.0, 62.0, 500.0]}


@pytest.mark.parametrize("u", [-0.9999, -0.6, -0.49, -0.0101, -0.00999, -1e-5, 9.9e-3, 0.3, 7.0])
def test_the_excess_over_a_logarithm(u: float) -> None:
    """Value of u - ln(1+u) at 40 digits: 5e-15 relative, and 1e-14 where two terms cancel."""
    with mp.workdps(40):
        expected = mp.mpf(u) - mp.log(1 + mp.mpf(u))
        value = float(_density._log_excess(np.array([u]), np.array([1.0 + u]))[0])
    assert value == pytest.approx(float(expected), rel=5e-15 if abs(u) < 1e-2 else 3e-14, abs=0)


def test_the_excess_takes_the_given_ratio_near_minus_one() -> None:
    """There 1 + u has lost its digits: u = -1 + 1e-20 is -1 in doubles."""
    value = float(_density._log_excess(np.array([-1.0]), np.array([1e-20]))[0])
    assert value == pytest.approx(-1 + 20 * math.log(10), rel=1e-15)


@pytest.mark.parametrize("nu", [0.0, 0.5, 7.0, 29.5])
@pytest.mark.parametrize("spread", [1e-9, 3e-12])
def test_two_terms_beyond_large_arguments(nu: float, spread: float) -> None:
    """K_ν(z) at z of 1e8 to 1e12, where AMOS gives up: 1e-15 of the sizes that are added."""
    rho = 1.0 - spread / 2
    for t in (0.31, 3.0, 70.0):
        with mp.workdps(40):
            value = log_density(nu, rho, t, lambda n, z: mp.log(mp.besselk(n, z)))
            error = found(_density._bessel, nu, rho, t) - value
            size = 40 + nu * abs(math.log(t / 2)) + t
        assert abs(error) < 1e-15 * size


@pytest.mark.parametrize(("nu", "t"), [(0.5, 0.0), (29.5, 0.0), (29.5, 1e-12), (29.0, -1e-200)])
def test_where_bessel_overflows_its_limit_is_taken(nu: float, t: float) -> None:
    """|t/2|^ν K_ν(|t|/(1-ρ²)) → (1-ρ²)^ν Γ(ν)/2 as t → 0, DLMF 10.30.2; 1e-14."""
    rho = 0.6
    with mp.workdps(40):
        n, spread = mp.mpf(nu), 1 - mp.mpf(rho) ** 2
        limit = n * mp.log(spread) + mp.loggamma(n) - mp.log(2)
        expected = limit - mp.loggamma(n + mp.mpf("0.5")) - mp.log(mp.pi * spread) / 2
    assert float(found(_density._bessel, nu, rho, t)) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_bessel_below_the_switch(rho: float) -> None:
    """Oracle: K of mpmath at 30 digits, on both sides of 0; 1e-14 of the sizes."""
    with mp.workdps(30):
        for nu, t in ((0.0, 0.3), (0.0, -2.0), (0.5, 0.4), (1.0, -3.0), (29.5, 11.0)):
            value = log_density(nu, rho, t, lambda n, z: mp.log(mp.besselk(n, z)))
            size = 5 + math.lgamma(nu + 0.5) + nu * abs(math.log(abs(t) / 2))
            assert abs(found(_density._bessel, nu, rho, t) - value) < 1e-14 * size


@pytest.mark.parametrize(("rank", "edge"), [(1, math.inf), (2, 0.0), (3, -math.inf)])
def test_the_end_of_the_support_of_a_scale(rank: int, edge: float) -> None:
    """At S = 0 the density of χ²_r/r is infinite, 1 and 0 at r = 1, 2, 3; and 0 below."""
    assert chi_square_logpdf(rank, [-1.0, -1.5, -2.0, -math.inf]).tolist() == [
        edge,
        *[-math.inf] * 3,
    ]
    assert np.isfinite(chi_square_logpdf(rank, math.nextafter(-1.0, 0.0)))


def test_stirlings_coefficients_are_bernoullis() -> None:
    """B₂ⱼ/(2j(2j − 1)) and B₂ⱼ/(2j), DLMF 5.11.1 and 5.11.2; to the last place."""
    even = [2, 4, 6, 8, 10]
    gamma = [float(mp.bernoulli(n) / (n * (n - 1))) for n in even]
    digamma = [float(mp.bernoulli(n) / n) for n in even]
    np.testing.assert_allclose(_stirling._LOG_GAMMA, gamma, rtol=3e-16)
    np.testing.assert_allclose(_stirling._DIGAMMA, digamma, rtol=3e-16)


@pytest.mark.parametrize("k", [16.0, 16.25, 16.5, 16.875, 17.5, 300.0])
def test_stirlings_series_from_where_it_is_used(k: float) -> None:
    """Relative 3e-13, which a difference of its parts does not reach. Oracle: mpmath."""
    with mp.workdps(40):
        x = mp.mpf(k)
        gamma = mp.loggamma(x) - ((x - 0.5) * mp.log(x) - x + mp.log(2 * mp.pi) / 2)
        digamma = mp.log(x) - 1 / (2 * x) - mp.digamma(x)
    for value, true in (
        (_stirling.log_gamma_remainder(k), gamma),
        (_stirling.digamma_remainder(k), digamma),
    ):
        assert value == pytest.approx(float(true), rel=3e-13, abs=0)
    by_series = float(_stirling.log_gamma_series(np.float64(k)))
    assert by_series == pytest.approx(float(gamma), rel=3e-14, abs=0)


def test_the_series_starts_as_late_as_it_must() -> None:
    """At 16 the first term that is left out of ψ's, (691/32760)/k¹², is below 3e-13 of ζ."""
    left_out = {k: 691 / 32760 / k**12 / _stirling.digamma_remainder(k) for k in (15.0, 16.0)}
    assert left_out[16.0] < 3e-13 < left_out[15.0]
    assert _stirling._SERIES_FROM in left_out
    assert left_out[_stirling._SERIES_FROM] < 3e-13
