"""Parts of the laws and distances alone, each held to what its comment promises.

In the whole a part hides behind the others: an expansion behind the branch next to it, a margin
behind the next margin, a start behind the iteration. Here each is called by itself.
"""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath as mp
import numpy as np
import pytest

from lora_privacy.errors import ConvergenceError
from lora_privacy.noise import (
    EmpiricalNoise,
    EntryNoise,
    RowNoise,
    _crossings,
    _density,
    _stirling,
    entry,
    gaussianity,
    kl_to_gaussian,
    kolmogorov_to_gaussian,
    laws_table,
    lyapunov_ratio,
    maximal_coupling,
    model_shapes,
    shapes,
    tv_of_entries,
    tv_to_gaussian,
    wishart_moments,
)
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
    assert size / _density._DEBYE_ORDER ** (len(rows) - 1) == pytest.approx(
        2.0e-16, rel=0.05, abs=0
    )


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


def test_the_grid_of_crossings() -> None:
    """Eight points a standard deviation, as far out on both sides as the mass is 4e-33."""
    grid = _crossings._GRID
    assert np.diff(grid).tolist() == [0.125] * (grid.size - 1)
    assert grid[0] == -grid[-1]
    assert math.erfc(grid[-1] / math.sqrt(2)) == pytest.approx(4e-33, rel=0.2, abs=0)


def test_the_grid_crowds_at_the_spike() -> None:
    """Half a decade apart on both sides of it, from one standard deviation to 3e-14 of one."""
    near = np.sort(_crossings._NEAR)
    assert (-near[::-1]).tolist() == near.tolist()
    right = near[near > 0]
    assert right[1:] / right[:-1] == pytest.approx(math.sqrt(10), rel=1e-12)
    assert right[-1] == 1.0
    assert right[0] == pytest.approx(math.sqrt(10) * 1e-14, rel=1e-12, abs=0)


Array = np.ndarray
ONE = np.array([1.0])
ROOTS = (-3.30, -1.17, 0.71, 2.93, 4.44)


def replace_ratio(
    monkeypatch: pytest.MonkeyPatch, h: Callable[[Array, Array], Array]
) -> list[Array]:
    """Put h(x, ρ) in place of the log ratio; where it was evaluated, call by call."""
    seen = list[Array]()

    def ratio(_rank: int, rho: Array, _std: Array, x: Array) -> Array:
        seen.append(x)
        return h(x, rho)

    monkeypatch.setattr(_crossings, "log_ratio", ratio)
    return seen


def through(roots: tuple[float, ...], x: Array) -> Array:
    """A polynomial with these roots: no positive minimum, and no negative maximum."""
    return np.prod([x - root for root in roots], axis=0) if roots else np.ones(x.shape)


@pytest.mark.parametrize("first", [1.0, -1.0])
@pytest.mark.parametrize("count", range(6))
@pytest.mark.parametrize("matched", [True, False])
def test_which_numbers_of_crossings_are_accepted(
    first: float, count: int, matched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Section 1.2: four, or also two of unequal variances, where both ends are positive.

    Where the grid ends before the last ones, one to three are left on it.
    """
    roots = ROOTS[:count]
    closed = first > 0 and count % 2 == 0
    allowed = ({4} if matched else {2, 4}) if closed else {1, 2, 3}
    replace_ratio(monkeypatch, lambda x, _: first * through(roots, x))
    if count not in allowed:
        with pytest.raises(ConvergenceError, match=f"at rank=8, ρ=0 .*, found {count};"):
            _crossings.signed_crossings(8, 0 * ONE, ONE, matched=matched)
        return
    cuts = _crossings.signed_crossings(8, 0 * ONE, ONE, matched=matched)
    wanted = [*roots, *[roots[-1]] * (4 - count)]
    assert cuts[0] == pytest.approx(wanted, rel=0, abs=2**-30)


def test_crossings_of_two_laws_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with four and with two, each in its own scale, by 26 halvings of cells of 1/8."""
    seen = replace_ratio(
        monkeypatch,
        lambda x, rho: np.where(rho == 0.1, through(ROOTS[:4], x), through((-2.1, 6.2), x)),
    )
    rho, std = np.array([0.1, 0.2]), np.array([1.0, 2.0])
    cuts = _crossings.signed_crossings(8, rho, std, matched=False)
    assert cuts[0] == pytest.approx(ROOTS[:4], rel=0, abs=2**-30)
    assert cuts[1] == pytest.approx([-2.1, 6.2, 6.2, 6.2], rel=0, abs=2**-29)
    assert [x.size for x in seen] == [2 * 193, *[6] * 26]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_only_low_ranks_have_a_spike(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has a pole and rank 2 a kink at x = -ρ; there the grid has 56 points more."""
    seen = replace_ratio(monkeypatch, lambda x, _: through(ROOTS[:4], x))
    _crossings.signed_crossings(rank, 0.5 * ONE, ONE, matched=True)
    grid = seen[0][0]
    assert np.all(np.diff(grid) >= 0)
    near = grid[np.abs(grid + 0.5) < 0.1]
    assert (near.size, grid.size) == ((53, 249) if rank <= 2 else (1, 193))


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_extrema_are_found_where_they_are(side: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 golden sections of an interval of 2 the last point is within 5.4e-7 of the extremum.

    Only positive minima and negative maxima move, and only they; twice 30 values and one.
    """
    seen = replace_ratio(monkeypatch, lambda x, _: side * (1e-3 + np.abs(x - places)))
    places = np.random.default_rng(1).uniform(-0.95, 0.95, 40)
    x = np.tile([-1.0, 0.0, 1.0], (40, 1))
    h = side * np.tile([2.0, 0.5, 2.0], (40, 1))
    moved, height = _crossings._sharpen(8, np.zeros((40, 1)), np.ones((40, 1)), x, h)
    miss = np.abs(moved[:, 1] - places)
    assert miss.max() <= ((math.sqrt(5) - 1) / 2) ** 30
    assert miss.max() > 0.5 * ((math.sqrt(5) - 1) / 2) ** 30
    assert height[:, 1] == pytest.approx(side * (1e-3 + miss), rel=1e-9)
    assert len(seen) == 61
    assert np.array_equal(moved[:, [0, 2]], x[:, [0, 2]])
    assert np.array_equal(height[:, [0, 2]], h[:, [0, 2]])
    assert x[0].tolist() == [-1.0, 0.0, 1.0]  # the arguments are left alone


@pytest.mark.parametrize(
    "h",
    [
        [2.0, 3.0, 2.0],  # a positive maximum
        [-2.0, -3.0, -2.0],  # a negative minimum
        [2.0, -0.5, 2.0],  # a minimum that is negative already
        [-2.0, 0.5, -2.0],
        [1.0, 2.0, 3.0],
        [3.0, 2.0, 1.0],
        [-1.0, -2.0, -3.0],
        [-3.0, -2.0, -1.0],
        [-math.inf, -math.inf, -math.inf],  # outside the support
    ],
)
def test_nothing_else_is_sharpened(h: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = replace_ratio(monkeypatch, lambda x, _: np.abs(x))
    x = np.array([[-1.0, 0.0, 1.0]])
    moved, height = _crossings._sharpen(8, 0 * ONE, ONE, x, np.array([h]))
    assert (moved.tolist(), height.tolist()) == (x.tolist(), [h])
    assert not seen


@pytest.mark.parametrize(
    "h", [[0.5, 0.5, 2.0], [2.0, 0.5, 0.5], [-0.5, -0.5, -2.0], [-2, -0.5, -0.5]]
)
def test_a_tie_is_an_extremum(h: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """An extremum between two grid points of one height belongs to both."""
    replace_ratio(monkeypatch, lambda x, _: math.copysign(1.0, h[0]) * (x - 0.1) ** 2)
    x = np.array([[-1.0, 0.0, 1.0]])
    moved, _ = _crossings._sharpen(8, 0 * ONE[:, None], ONE[:, None], x, np.array([h]))
    assert moved[0, 1] == pytest.approx(0.1, abs=1e-6)


def test_a_close_pair_of_crossings_does_not_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them 1e-3 apart, in one cell of the grid."""
    replace_ratio(monkeypatch, lambda x, _: through((0.51, 0.511), x))
    cuts = _crossings.signed_crossings(8, 0 * ONE, ONE, matched=False)
    assert cuts[0] == pytest.approx([0.51, 0.511, 0.511, 0.511], rel=0, abs=1e-9)


def test_the_log_ratio_is_that_of_two_densities() -> None:
    """Both inside and at ρ = 1, where the entry is a scaled χ²: 1e-13."""
    for rho, law in ((0.3, EntryNoise(5, 1.0, 0.3)), (1.0, EntryNoise(5, 1.0, 1.0))):
        x, std = np.array([-0.7, 0.2, 1.9]), 0.6
        normal = -0.5 * (x / std) ** 2 - math.log(std) - math.log(2 * math.pi) / 2
        ratio = _crossings.log_ratio(5, np.array(rho), np.array(std), x)
        assert ratio == pytest.approx(law.logpdf(x) - normal, rel=1e-13, abs=1e-13)
    both = _crossings.log_density(5, np.array([[1.0], [0.3]]), x)
    assert np.array_equal(both[0], EntryNoise(5, 1.0, 1.0).logpdf(x))
    assert np.array_equal(both[1], EntryNoise(5, 1.0, 0.3).logpdf(x))


def test_gaps_of_distribution_functions() -> None:
    """Rows with ρ = 1 and below it at once; no mass below the support, nor Gaussian mass lost."""
    x = np.array([[-1.5, -0.4], [-1.5, 0.8]])
    gaps = _crossings.cdf_gaps(4, np.array([1.0, 0.2]), np.array([0.7, 0.5]), x)
    for row, (rho, std) in enumerate(((1.0, 0.7), (0.2, 0.5))):
        normal = [0.5 * math.erfc(-v / std / math.sqrt(2)) for v in x[row]]
        expected = EntryNoise(4, 1.0, rho).cdf(x[row]) - normal
        assert gaps[row] == pytest.approx(expected, rel=0, abs=1e-15)
    assert gaps[0, 0] == pytest.approx(-0.5 * math.erfc(1.5 / 0.7 / math.sqrt(2)), rel=1e-13)


def test_the_error_of_a_distance_covers_ten_distribution_functions() -> None:
    """Each is accurate to 1e-14."""
    for distance in (tv_to_gaussian, kolmogorov_to_gaussian):
        assert distance(EntryNoise(8)).error == pytest.approx(10 * 1e-14, rel=1e-12, abs=0)
    assert kl_to_gaussian(EntryNoise(8, 1.0, 1.0)).error == 1e-14


@pytest.mark.parametrize(("value", "miss"), [(1e-3, 0.0), (1e-22, 0.0), (0.3, 1e-9), (0.3, -1e-9)])
def test_the_error_of_an_entropy(
    value: float, miss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times what the rules differ by, and what 1e-14 of h does to h²/2, and 1e-12 of it."""
    rules = {20: value, 14: value - miss}
    monkeypatch.setattr(gaussianity, "_kl_sum", lambda _edges, nodes, *_: rules[nodes])
    distance = kl_to_gaussian(EntryNoise(8))
    ratio = math.sqrt(2 * value)  # of a size that gives value = h²/2
    expected = 4e-9 * (miss != 0) + 1e-14 * ratio + 1e-12 * value
    assert distance.value == value
    assert distance.error == pytest.approx(expected, rel=1e-6, abs=0)


def test_an_entropy_that_its_rules_differ_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By more than 1e-7 of it there is none; next to 0 the difference may be 1e-20."""
    for value, miss, fails in (
        (0.5, 0.49e-7, False),
        (0.5, 0.51e-7, True),
        (1e-30, 0.9e-20, False),
        (1e-30, 1.1e-20, True),
    ):
        rules = {20: value, 14: value + miss}
        monkeypatch.setattr(gaussianity, "_kl_sum", lambda _e, nodes, *_, r=rules: r[nodes])
        if fails:
            with pytest.raises(ConvergenceError, match="must be accurate to 1e-07 relative"):
                kl_to_gaussian(EntryNoise(8))
        else:
            assert kl_to_gaussian(EntryNoise(8)).value == value


@pytest.mark.parametrize(("rank", "rho"), [(1, 0.0), (1, 1 - 1e-9), (8, 0.3), (10**6, 0.5)])
def test_panels_of_an_entropy(rank: int, rho: float) -> None:
    """Half σ wide in the bulk of 14 σ, a tenth of x beyond, halved towards the spike.

    They end 50 decay lengths of the slower tail, (1 + ρ)/r each, after the bulk.
    """
    std = math.sqrt((1 + rho**2) / rank)
    edges = gaussianity._kl_panels(rho, std, rank)
    assert edges[-1] == -edges[0] == pytest.approx(14 * std + 50 * (1 + rho) / rank, rel=1e-14)
    width, inner = np.diff(edges), np.minimum(np.abs(edges[1:]), np.abs(edges[:-1]))
    assert width.min() > 0
    assert np.all(width <= np.maximum(0.5 * std, 0.1 * inner) * (1 + 1e-12))
    assert np.isin(np.arange(-28, 29) * 0.5 * std, edges).all()
    if rho < edges[-1]:
        near = np.sort(np.abs(edges + rho))
        assert near[0] == 0.0
        assert np.isin(-rho + std * 2.0 ** -np.arange(49), edges).all()
        assert np.isin(-rho - std * 2.0 ** -np.arange(49), edges).all()


def test_the_entropy_of_two_gaussians(monkeypatch: pytest.MonkeyPatch) -> None:
    """∫p ln(p/φ) = ln(σ/s) + (s²/σ² − 1)/2 for N(0, s²) against N(0, σ²), also far apart; 1e-12.

    Where p is infinite at a node, that node counts for nothing.
    """
    edges = np.arange(-40.0, 41.0, 2.0)
    for s in (1.0 + 1e-6, 0.999, 0.5, 2.0, 3.0):

        def log_p(_rank: int, _rho: Array, x: Array, s: float = s) -> Array:
            return -0.5 * (x / s) ** 2 - math.log(s) - math.log(2 * math.pi) / 2

        monkeypatch.setattr(gaussianity, "log_density", log_p)
        expected = -math.log(s) + (s * s - 1) / 2
        value = gaussianity._kl_sum(edges, 20, 8, 0.0, 1.0)
        assert value == pytest.approx(expected, rel=1e-12, abs=1e-14)

    monkeypatch.setattr(gaussianity, "log_density", lambda _r, _p, x: np.full(x.shape, math.inf))
    assert gaussianity._kl_sum(edges, 20, 8, 0.0, 1.0) == pytest.approx(1.0, rel=1e-13)
    monkeypatch.setattr(gaussianity, "log_density", lambda _r, _p, x: np.full(x.shape, -math.inf))
    assert gaussianity._kl_sum(edges, 20, 8, 0.0, 1.0) == pytest.approx(1.0, rel=1e-13)


@pytest.mark.parametrize(("size", "computed"), [(64, 64), (65, 17)])
def test_a_short_row_is_computed_one_by_one(
    size: int, computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to four times the degree of the series; from then on by its 17 nodes."""
    inner, seen = gaussianity._tv, list[int]()

    def count(rho: Array, *rest: object) -> Array:
        seen.append(rho.size)
        return inner(rho, *rest)

    monkeypatch.setattr(gaussianity, "_tv", count)
    row = 1.0 + np.arange(size) * 1e-4
    tv_of_entries(row, 8)
    assert seen == [computed]


def spread_row(size: int) -> tuple[Array, Array]:
    """A row whose ratios to its norm are evenly spread, and the ratios."""
    row = np.linspace(1.0, 3.0, size)
    return row, row / np.linalg.norm(row)


@pytest.mark.parametrize("variance", ["exact", "published"])
def test_a_row_is_interpolated_at_chebyshevs_nodes(
    variance: gaussianity.Variance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roots of T₁₇ on the range of the ratios; a smooth function comes out to 1e-9."""
    seen = list[Array]()

    def smooth(rho: Array, rank: int, given: str) -> Array:
        assert (rank, given) == (8, variance)
        seen.append(rho)
        return 0.3 * np.exp(20 * rho**2)

    monkeypatch.setattr(gaussianity, "_tv", smooth)
    row, ratio = spread_row(200)
    found = tv_of_entries(row[::-1], 8, variance)
    assert found[::-1] == pytest.approx(0.3 * np.exp(20 * ratio**2), rel=1e-9)
    middle, half = (ratio[-1] + ratio[0]) / 2, (ratio[-1] - ratio[0]) / 2
    assert len(seen) == 1
    assert np.cos(17 * np.arccos((seen[0] - middle) / half)) == pytest.approx(
        np.zeros(17), abs=1e-9
    )


def test_a_kink_is_closed_in_upon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels are halved at it until one holds 16 entries or fewer, which are computed themselves.

    All the others come out to 1e-9 of the least value, and a panel costs 17 values.
    """
    row, ratio = spread_row(1000)
    place, sizes = float(ratio[313] + ratio[314]) / 2, list[int]()

    def kinked(rho: Array, *_: object) -> Array:
        sizes.append(rho.size)
        return 0.1 + np.abs(rho - place)

    monkeypatch.setattr(gaussianity, "_tv", kinked)
    assert tv_of_entries(row, 8) == pytest.approx(0.1 + np.abs(ratio - place), rel=1e-9)
    # 1000 entries are 16 or fewer after six halvings, two panels each time.
    assert sizes[:6] == [17, *[34] * 5]
    assert len(sizes) == 7
    assert 17 < sizes[6] <= 17 + 16


def test_entries_of_small_panels_are_computed_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no tolerance at all each value is one of the function itself, but for rounding of ρ."""
    monkeypatch.setattr(gaussianity, "_INTERPOLATION_RTOL", 0.0)
    monkeypatch.setattr(gaussianity, "_CDF_ERROR", 0.0)
    monkeypatch.setattr(gaussianity, "_tv", lambda rho, *_: np.cos(1e5 * rho))
    row, ratio = spread_row(300)
    assert tv_of_entries(row, 8) == pytest.approx(np.cos(1e5 * ratio), rel=0, abs=1e-10)


def test_ratios_above_the_limit_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those above .15 of the norm, at most 44 of any row; the others of a long row by series."""
    alone, series = list[Array](), list[Array]()
    monkeypatch.setattr(gaussianity, "_tv", lambda rho, *_: alone.append(rho) or rho)
    monkeypatch.setattr(gaussianity, "_interpolate", lambda rho, *_: series.append(rho) or rho)
    row = np.concatenate([np.arange(1.0, 200.0), [1500.0, 1400.0, 360.0, 330.0]])
    ratio = np.abs(row) / np.linalg.norm(row)
    assert tv_of_entries(-row, 8) == pytest.approx(ratio, rel=1e-14)
    assert np.sort(np.concatenate(alone)) == pytest.approx(np.sort(ratio[ratio > 0.15]))
    assert series[0].size == np.count_nonzero(ratio <= 0.15) > 199
    assert alone[0].size in (2, 3)


def test_draws_of_a_coupling_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at a time as leave those that are wanted in the mean, and 2¹⁸ at most."""

    class Counting(np.random.Generator):
        def __init__(self) -> None:
            super().__init__(np.random.PCG64(1))
            self.sizes = list[int]()

        def standard_normal(self, size: int) -> Array:  # type: ignore[override]
            self.sizes.append(size)
            return super().standard_normal(size)

    rng = Counting()
    law, size = EntryNoise(8, 2.0, -0.4), 4000
    x, y = maximal_coupling(law, rng, size)
    apart = int(np.count_nonzero(x != y))
    distance = tv_to_gaussian(law).value
    assert rng.sizes[0] == int(apart / distance)
    assert sum(rng.sizes) < 1.5 * apart / distance
    rng.sizes.clear()
    monkeypatch.setattr(gaussianity, "_COUPLING_BATCH", 100)
    maximal_coupling(law, rng, size)
    assert max(rng.sizes) == 100


@pytest.mark.parametrize(
    ("p", "down", "up"),
    [(0.5, 4, 4), (0.9, 6, 6), (0.1, 5, 6), (1e-3, 5, 6), (1e-30, 4, 3), (1e-200, 4, 4)],
)
def test_the_way_to_a_quantile(
    p: float, down: int, up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each end of the bracket is doubled from σ until the root lies inside; then from 0 by Newton.

    On the log of a tail its steps are few, however far out the root is.
    """
    law, std = EntryNoise(8, 3.0, 0.6), EntryNoise(8, 3.0, 0.6).std()
    ends = std * 2.0 ** np.arange(12)
    inner, seen = entry.entry_tails, list[float]()

    def tails(rank: int, rho: float, x: Array) -> tuple[Array, Array]:
        seen.extend(x.tolist())
        return inner(rank, rho, x)

    for method, steps, inside in (
        (law.ppf, down, (law.cdf(-ends) <= p, law.cdf(ends) >= p)),
        (law.isf, up, (law.sf(-ends) >= p, law.sf(ends) <= p)),
    ):
        low, high = (int(np.argmax(side)) + 1 for side in inside)
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(entry, "entry_tails", tails)
            x = float(method(p))
        start = [*-ends[:low], *ends[:high], 0.0]
        assert np.array(seen[: len(start)]) * 3.0 == pytest.approx(start, rel=1e-14)
        assert len(seen) - len(start) <= steps
        found = law.cdf(x) if method == law.ppf else law.sf(x)
        assert found == pytest.approx(p, rel=1e-13, abs=0)


def test_a_quantile_between_two_doubles() -> None:
    """Where the law is as narrow as rounding no x has the probability; the nearest one is it."""
    law = EntryNoise(1000, 1.0, -1.0 + 1e-15)
    for p in (1e-5, 0.3):
        x = float(law.isf(p))
        step = 4 * math.ulp(x)
        assert law.sf(x + step) < p < law.sf(x - step)


def examples() -> list[Any]:
    """One of each type, made within the test."""
    generator = np.random.default_rng(0)
    layers = model_shapes({"model_type": "gpt2", "n_embd": 6, "n_layer": 1})
    return [
        EntryNoise(8, 2.0, 0.5),
        RowNoise(8, np.ones(3)),
        EmpiricalNoise("gaussian", 2, np.ones(3), 0, 5, generator),
        layers[0],
        wishart_moments(2, "gaussian", 3),
        tv_to_gaussian(EntryNoise(8)),
        laws_table(layers, 2)[0],
    ]


def test_a_law_or_a_result_cannot_be_changed() -> None:
    """Neither a field nor a new attribute is set."""
    for law in examples():
        for name in (dataclasses.fields(law)[0].name, "remark"):
            with pytest.raises((AttributeError, TypeError)):
                setattr(law, name, 1.0)
        assert not hasattr(law, "__dict__")


def test_numbers_of_a_result_are_given_by_name() -> None:
    """None can be taken for another one."""
    for result in examples()[4:]:
        values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        with pytest.raises(TypeError, match="positional argument"):
            type(result)(*values.values())
        assert type(result)(**values) == result
        if hasattr(result, "to_dict"):
            assert result.to_dict().keys() == values.keys()


def test_laws_that_hold_arrays_are_compared_by_identity() -> None:
    """Arrays have no truth value; such laws can be keys. What is long is not printed."""
    for law, twin in zip(examples()[1:3], examples()[1:3], strict=True):
        assert len({law, twin}) == 2
        assert law != twin
    text = repr(examples()[2])
    assert "samples" not in text
    assert "variance" not in text
    assert "draws=5" in text


def test_flags_are_given_by_name() -> None:
    """A bare True or an index without its name is refused: it would not say what it is."""
    sizes = shapes._Sizes({"hidden_size": 6, "num_attention_heads": 2})
    law, p, row = EntryNoise(8), np.array([0.3]), [1.0, 2.0]
    for call, flag in (
        (lambda *a, **k: _crossings.signed_crossings(8, 0 * ONE, ONE, *a, **k), "matched"),
        (lambda *a, **k: law._quantile(p, *a, **k), "lower"),
        (lambda *a, **k: law._root(p, *a, **k), "lower"),
        (lambda *a, **k: shapes._attention(sizes, *a, **k), "stated"),
        (lambda *a, **k: lyapunov_ratio(row, 8, "products", *a, **k), "index"),
    ):
        if flag != "stated":
            call(**{flag: 1})
        else:
            assert call(stated=False) == (6, 6, 6)
        with pytest.raises(TypeError, match="positional argument"):
            call(1)
