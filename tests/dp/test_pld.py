"""The loss accountant: oracles are mpmath, the exact Gaussian, dp-accounting and Opacus."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from accountant_contract import AccountantContract
from dp_accounting.pld import privacy_loss_distribution as peer
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from pld_oracle import removal_delta
from scipy import stats

from lora_privacy.dp import (
    GaussianEvent,
    PldAccountant,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    _solve,
    pld,
)
from lora_privacy.dp._profiles import Direction, SampledPair
from lora_privacy.errors import ConvergenceError, UnsupportedEventError

Ledger = tuple[tuple[float, float, int], ...]


class TestPld(AccountantContract):
    accountant = PldAccountant()


class TestPldReplace(AccountantContract):
    accountant = PldAccountant("replace")


@dataclass(frozen=True)
class Profiled:
    """A sampled Gaussian that brings its own profiles, possibly turned around or made worse."""

    noise_multiplier: float
    sample_rate: float
    turned: bool = False
    floor: float = 0.0
    assumptions: tuple[str, ...] = ("it is what it says",)
    references: tuple[str, ...] = ("balle-wang-2018",)

    def profile(self, direction: Direction) -> Callable[[np.ndarray], np.ndarray]:
        pair = SampledPair(1 / self.noise_multiplier, self.sample_rate)
        if self.turned:
            direction = "add" if direction == "remove" else "remove"
        return lambda epsilons: np.minimum(1.0, pair.upper(direction, epsilons) + self.floor)


def accountant_of(ledger: Ledger) -> PldAccountant:
    accountant = PldAccountant()
    for z, p, count in ledger:
        accountant = accountant.compose(SampledGaussian(z, p), count)
    return accountant


def dp_accounting_epsilon(ledger: Ledger, delta: float, *, pessimistic: bool) -> float:
    total = None
    for z, p, count in ledger:
        one = peer.from_gaussian_mechanism(
            z,
            sampling_prob=p,
            value_discretization_interval=1e-4,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        ).self_compose(count)
        total = one if total is None else total.compose(one)
    return total.get_epsilon_for_delta(delta)


HISTORIES = [
    (((1.0, 0.01, 1000),), 1e-5),
    (((0.7, 0.02, 300), (1.5, 0.1, 50), (5.0, 1.0, 3)), 1e-6),
    (((2.0, 0.2, 100),), 1e-8),
    (((4.0, 1.0, 20),), 1e-5),
]


@pytest.mark.parametrize(("ledger", "delta"), HISTORIES)
def test_interval_meets_dp_accounting(ledger: Ledger, delta: float) -> None:
    """Its optimistic and pessimistic ends contain the truth, as ours do; ours are within 1 %."""
    accountant = accountant_of(ledger)
    low, high = accountant.epsilon_interval(delta)
    assert low <= dp_accounting_epsilon(ledger, delta, pessimistic=True)
    assert high >= dp_accounting_epsilon(ledger, delta, pessimistic=False)
    assert 0 < low <= high <= low * 1.0101
    assert accountant.epsilon(delta).epsilon == high
    assert accountant.epsilon(delta).method == ("gdp" if ledger[0][1] == 1 else "pld")


@pytest.mark.parametrize(("ledger", "delta"), HISTORIES[:1] + HISTORIES[3:])
def test_interval_meets_opacus(ledger: Ledger, delta: float) -> None:
    """Opacus' PRV value is the truth within its eps_error of 0.01."""
    opacus = PRVAccountant()
    opacus.history = list(ledger)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = opacus.get_epsilon(delta)  # upper end
    low, high = accountant_of(ledger).epsilon_interval(delta)
    assert low <= theirs
    assert high >= theirs - 0.021


@pytest.mark.parametrize(
    ("mu", "count", "delta"),
    [(0.01, 1, 1e-3), (0.01, 10_000, 1e-9), (1.0, 1, 1e-5), (0.3, 40, 1e-15), (20.0, 3, 1e-2)],
)
def test_grid_encloses_the_exact_gaussian(mu: float, count: int, delta: float) -> None:
    """Oracle: N(μ√count, 1) at 60 digits, which the accountant itself would use: bypassed here."""
    pair = SampledPair(mu, 1.0)
    sources = [(_solve.sampled_source(pair, pair), count)]
    low, high = _solve.epsilon_interval(sources, delta)
    total = mu * math.sqrt(count)
    assert removal_delta(total, 1.0, high) <= delta <= removal_delta(total, 1.0, low)
    assert high - low <= 0.01 * high
    epsilon = (low + high) / 2
    floor, top = _solve.delta_interval(sources, epsilon)
    assert floor <= removal_delta(total, 1.0, epsilon) <= top <= 1.051 * floor


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.05, 1.0, 3.0])
@pytest.mark.parametrize(("z", "p"), [(1.0, 0.01), (0.5, 0.2), (3.0, 0.7), (1.0, 1e-6)])
def test_one_sampled_step_encloses_mpmath(z: float, p: float, epsilon: float) -> None:
    """Oracle: the best test at 60 digits; the larger direction is "remove"."""
    true = removal_delta(1 / z, p, epsilon)
    low, high = PldAccountant().compose(SampledGaussian(z, p)).delta_interval(epsilon)
    assert low <= true <= high
    if true > 1e-280:
        assert high <= 1.06 * true


@pytest.mark.parametrize(("z", "p", "count"), [(1.0, 0.1, 30), (0.4, 0.01, 100)])
def test_both_directions_are_taken(z: float, p: float, count: int) -> None:
    """Turning an event around changes nothing; "add" alone, the wrong alternative, would."""
    plain, turned = (
        PldAccountant().compose(Profiled(z, p, turned=turned), count).epsilon(1e-5).epsilon
        for turned in (False, True)
    )
    assert turned == pytest.approx(plain, rel=1e-9, abs=0)
    sources = [(_solve.sampled_source(SampledPair(1 / z, p), SampledPair(1 / z, p)), count)]
    step, half = 2**-7, 2_000
    add = _solve._grid.above(sources[0][0].profiles, step, half)[1]
    only_add = _solve._fourier.compose([(add, count)], 4.0, upper=True).epsilon(1e-5)
    low, _ = _solve.epsilon_interval(sources, 1e-5)
    assert only_add < 0.9 * low


def test_a_wrong_guess_of_the_worse_direction_costs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The direction that looks worse by its moments is solved first, but the other one counts."""
    pair = SampledPair(1.0, 0.1)
    sources = [(_solve.sampled_source(pair, pair), 30)]
    low, high = _solve.epsilon_interval(sources, 1e-5)
    honest, calls = _solve._least_epsilon, itertools.count()

    def misled(parts: list, delta: float) -> tuple[float, float]:
        proved, tilt = honest(parts, delta)
        return (1e9 if next(calls) % 2 else proved), tilt

    monkeypatch.setattr(_solve, "_least_epsilon", misled)
    assert low <= _solve.epsilon_interval(sources, 1e-5)[1] <= 1.01 * high


def test_an_event_with_profiles_costs_what_it_is() -> None:
    """The same profiles through the hook: the upper end differs by the width only."""
    event, delta = SampledGaussian(1.0, 0.05), 1e-6
    low, high = PldAccountant().compose(event, 200).epsilon_interval(delta)
    accountant = PldAccountant().compose(Profiled(1.0, 0.05), 200)
    bound = accountant.epsilon(delta)
    assert low <= bound.epsilon <= 1.01 * high
    assert accountant.epsilon_interval(delta)[0] == 0, "no lower end is known"
    assert "it is what it says" in bound.assumptions
    assert "balle-wang-2018" in bound.references
    mixed = accountant.compose(event, 3).compose(GaussianEvent(20.0))
    assert mixed.epsilon(delta).epsilon > bound.epsilon


def test_infinite_loss_is_kept_apart() -> None:
    """A floor of 1e-7 in δ adds up over 50 steps: below it no ε is finite, with a reason."""
    accountant = PldAccountant().compose(Profiled(1.0, 0.05, floor=1e-7), 50)
    assert accountant.epsilon(1e-5).epsilon < 10
    bound = accountant.epsilon(4.9e-6)
    assert math.isinf(bound.epsilon)
    assert "no finite ε" in str(bound.reason)
    assert accountant.delta(50.0).delta == pytest.approx(50e-7, rel=1e-3, abs=0)


def test_projected_gaussian_composes() -> None:
    """Pins of 100 fresh steps at δ = 1e-5: between 4.511, exact at rank one, and 4.882 by RDP.

    The plain Gaussian would be 91.8.
    """
    event = ProjectedGaussian(layers=[(768, 8)], noise_multiplier=1.0)
    bound = PldAccountant().compose(event, 100).epsilon(1e-5)
    assert 4.511 <= bound.epsilon <= 4.882
    assert bound.method == "pld"
    mixed = PldAccountant().compose(event, 100).compose(SampledGaussian(1.0, 0.01), 100)
    assert bound.epsilon < mixed.epsilon(1e-5).epsilon < 6


@given(
    z=st.floats(0.3, 20),
    p=st.floats(1e-5, 1.0),
    count=st.integers(1, 3000),
    log_delta=st.floats(-35, -2),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ends_are_in_order_and_narrow(z: float, p: float, count: int, log_delta: float) -> None:
    """Lower <= upper, width at most 1 % of ε, and δ at both ends of ε straddles the target."""
    accountant, delta = PldAccountant().compose(SampledGaussian(z, p), count), math.exp(log_delta)
    low, high = accountant.epsilon_interval(delta)
    assert 0 <= low <= high < math.inf
    assert high - low <= 0.01 * high + 1e-3 * min(1 / z, p / z * 3) * math.sqrt(count)
    floor, top = accountant.delta_interval(high)
    assert floor <= delta
    assert floor <= top
    if low > 0:
        assert accountant.delta_interval(low)[1] >= delta


@given(
    z=st.floats(0.4, 10),
    p=st.floats(1e-4, 0.9),
    count=st.integers(1, 300),
    log_delta=st.floats(-30, -4),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_epsilon_is_monotone(z: float, p: float, count: int, log_delta: float) -> None:
    """Less noise, more sampling, more steps, smaller δ: the upper end is above the old lower."""

    def ends(z: float, p: float, count: int, log_delta: float) -> tuple[float, float]:
        accountant = PldAccountant().compose(SampledGaussian(z, p), count)
        return accountant.epsilon_interval(math.exp(log_delta))

    low = ends(z, p, count, log_delta)[0]
    assert ends(z / 1.2, p, count, log_delta)[1] >= low
    assert ends(z, min(1.0, 1.1 * p), count, log_delta)[1] >= low
    assert ends(z, p, count + 1 + count // 10, log_delta)[1] >= low
    assert ends(z, p, count, log_delta - 1)[1] >= low


@given(st.permutations([(0.8, 0.01, 50), (3.0, 0.2, 4), (1.5, 1.0, 1), (0.8, 0.01, 7)]))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_composition_commutes(ledger: list[tuple[float, float, int]]) -> None:
    """Any order of the same events, equal ones merged: 1e-9 relative."""
    expected = accountant_of(((0.8, 0.01, 57), (1.5, 1.0, 1), (3.0, 0.2, 4)))
    found = accountant_of(tuple(ledger)).epsilon(1e-6).epsilon
    assert found == pytest.approx(expected.epsilon(1e-6).epsilon, rel=1e-9, abs=0)


def test_full_sampling_is_no_sampling() -> None:
    """At p = 1 it is the plain event, and p just below it costs the same within the width."""
    plain = PldAccountant().compose(GaussianEvent(2.0), 5).epsilon_interval(1e-5)
    assert PldAccountant().compose(SampledGaussian(2.0, 1.0), 5).epsilon_interval(1e-5) == plain
    low, high = PldAccountant().compose(SampledGaussian(2.0, 1 - 1e-9), 5).epsilon_interval(1e-5)
    assert low <= plain[1] * (1 + 1e-6)
    assert plain[0] * (1 - 1e-6) <= high <= 1.01 * plain[1]


def test_delta_falls_and_is_convex() -> None:
    """On the points of one upper curve, in e^ε: slopes are negative and do not fall."""
    pair = SampledPair(1.0, 0.1)
    sources = [(_solve.sampled_source(pair, pair), 30)]
    for epsilons, deltas in _solve.upper_points(sources, 1e-4):
        inside = (deltas > 1e-7) & (deltas < 0.5)
        slopes = np.diff(deltas[inside]) / np.diff(np.exp(epsilons[inside]))
        assert np.all(slopes < 0)
        assert np.all(np.diff(slopes) >= -1e-9 * np.abs(slopes[1:]))
    accountant = PldAccountant().compose(SampledGaussian(1.0, 0.1), 30)
    values = [accountant.delta(epsilon).delta for epsilon in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)]
    assert all(left > right for left, right in itertools.pairwise(values))


def test_renyi_bound_is_never_below_the_lower_end() -> None:
    """200 random settings; half the Rényi ε, the wrong alternative, is below it somewhere."""
    rng = np.random.default_rng(20240917)
    caught = 0
    for _ in range(200):
        z, p = math.exp(rng.uniform(-1, 3)), min(1.0, math.exp(rng.uniform(-9, 0.3)))
        count, delta = int(math.exp(rng.uniform(0, 7))), math.exp(rng.uniform(-25, -3))
        event = SampledGaussian(z, p)
        low, _ = PldAccountant().compose(event, count).epsilon_interval(delta)
        renyi = RdpAccountant().compose(event, count).epsilon(delta).epsilon
        assert renyi >= low
        caught += renyi / 2 < low
    assert caught > 10


@pytest.mark.slow
def test_extremes() -> None:
    """Never NaN, negative or a warning; infinite only with a reason; not above the Rényi bound."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for z, p, count, delta in itertools.product(
            (1e-2, 0.3, 1e3), (1e-7, 1e-3, 0.9999), (1, 10**6), (1e-2, 1e-15)
        ):
            accountant = PldAccountant().compose(SampledGaussian(z, p), count)
            low, high = accountant.epsilon_interval(delta)
            bound = accountant.epsilon(delta)
            assert 0 <= low <= bound.epsilon <= high
            assert (bound.reason is not None) == math.isinf(bound.epsilon)
            renyi = RdpAccountant().compose(SampledGaussian(z, p), count).epsilon(delta).epsilon
            assert low <= renyi
            assert bound.epsilon <= 1.01 * renyi
            if delta == 1e-2:
                assert 0 < accountant.delta(1.0).delta <= 1


@pytest.mark.parametrize("z", [1e-200, 1e-120, 1e120, 1e300])
@pytest.mark.parametrize("p", [1e-7, 1.0])
def test_beyond_double_precision(z: float, p: float) -> None:
    """Huge, or infinite with a reason; or a tiny positive number."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accountant = PldAccountant().compose(SampledGaussian(z, p), 3)
        bound, vacuous = accountant.epsilon(1e-8), accountant.delta(1.0)
    assert not math.isnan(bound.epsilon)
    if z < 1:
        assert bound.epsilon > 1e200
        assert (bound.reason is not None) == math.isinf(bound.epsilon)
        assert vacuous.delta == 1
    else:
        assert bound.epsilon < 1e-3
        assert vacuous.delta < 1e-50


def test_trade_off_bounds_the_best_attack() -> None:
    """One step at z = 1, p = 0.3, whose best tests are known.

    In both roles of the neighbours the likelihood-ratio tests are within the bound, and it is at
    most 2 % above the better of the two. The bound of half the sampling rate is broken.
    """
    accountant = PldAccountant().compose(SampledGaussian(1.0, 0.3))
    cuts = np.linspace(-6, 8, 4001)
    base, shifted = stats.norm.sf(cuts), stats.norm.sf(cuts - 1)
    mixed = 0.7 * base + 0.3 * shifted
    rates = np.array([1e-4, 0.01, 0.1, 0.4, 0.9])
    removal = np.interp(rates, base[::-1], mixed[::-1])
    addition = np.interp(rates, (1 - mixed), (1 - base))
    best = np.maximum(removal, addition)
    bound = accountant.tpr_bound(rates)
    assert np.all(best <= bound * (1 + 1e-5)), "interpolation costs 1e-5"
    assert np.all(bound <= 1.02 * best)
    assert np.any(best > PldAccountant().compose(SampledGaussian(1.0, 0.15)).tpr_bound(rates))
    assert accountant.trade_off(0.0) == pytest.approx(1.0, rel=0, abs=1e-9)
    assert accountant.trade_off([[0.1], [1.0]]).shape == (2, 1)
    assert accountant.trade_off(1.0) == 0


def test_advantage_is_the_total_variation() -> None:
    """One step: p (2Φ(1/(2z)) - 1); plain steps: closed form; nothing: 0. Never below."""
    true = 0.3 * (2 * stats.norm.cdf(0.5) - 1)
    found = PldAccountant().compose(SampledGaussian(1.0, 0.3)).advantage()
    assert true * (1 - 1e-12) <= found <= 1.05 * true
    plain = PldAccountant().compose(GaussianEvent(2.0), 4)
    assert plain.advantage() == pytest.approx(2 * stats.norm.cdf(0.5) - 1, rel=1e-9, abs=0)
    assert plain.trade_off(0.1) == pytest.approx(
        stats.norm.cdf(stats.norm.isf(0.1) - 1), rel=1e-9, abs=0
    )
    assert PldAccountant().advantage() == 0
    assert PldAccountant().trade_off(0.25) == 0.75


def test_replace_moves_twice_as_far() -> None:
    """Exchanging a record is adding one at half the noise; unknown profiles are for adding one."""
    replaced = PldAccountant("replace").compose(GaussianEvent(3.0), 7).epsilon(1e-6).epsilon
    added = PldAccountant().compose(GaussianEvent(1.5), 7).epsilon(1e-6).epsilon
    assert replaced == pytest.approx(added, rel=1e-12, abs=0)
    with pytest.raises(UnsupportedEventError, match="adjacency='replace'"):
        PldAccountant("replace").compose(Profiled(1.0, 0.1))


def test_subclasses_of_events_are_refused() -> None:
    """What a subclass means is not known here."""

    class Reused(GaussianEvent):
        """The same noise twice, say."""

    with pytest.raises(UnsupportedEventError, match="no proof for Reused"):
        PldAccountant().compose(Reused(1.0))


@pytest.mark.parametrize("floor", [math.nan, -1.0])
def test_a_profile_that_breaks_its_contract_is_refused(floor: float) -> None:
    """NaN or a negative δ must not become an ε."""
    with pytest.raises(ConvergenceError, match="must return δ in"):
        PldAccountant().compose(Profiled(1.0, 0.1, floor=floor), 3).epsilon(1e-5)


@pytest.mark.parametrize("fpr", [-0.1, 1.1, math.nan])
def test_bad_rates_are_refused(fpr: float) -> None:
    """Also NaN."""
    with pytest.raises(ValueError, match="fpr must lie"):
        PldAccountant().trade_off([0.5, fpr])


def test_what_leaves_double_precision_is_no_ledger() -> None:
    """Distances from 1e-100 to 1e100; smaller ones count as 1e-100, larger ones prove nothing."""
    for adjacency, moved in (("add-remove", 1.0), ("replace", 2.0)):
        empty = PldAccountant(adjacency)
        mu, sources = empty.compose(GaussianEvent(0.5e100), 4)._sources()
        assert (mu, sources) == (pytest.approx(4e-100 * moved, rel=1e-12, abs=0), [])
        mu, _ = empty.compose(GaussianEvent(3e100), 4)._sources()
        assert mu == pytest.approx(max(1e-100, moved / 3e100) * 2, rel=1e-12, abs=0)
        assert empty.compose(GaussianEvent(1.01e-100 * moved))._sources()[0] < math.inf
        assert empty.compose(GaussianEvent(0.99e-100 * moved))._sources() == (math.inf, [])
        assert empty.compose(GaussianEvent(1e-200))._sources() == (math.inf, [])
        assert empty.compose(SampledGaussian(1.01e-100, 0.5))._sources()[0] == 0.0
        assert empty.compose(SampledGaussian(0.99e-100, 0.5))._sources() == (math.inf, [])
        (source, _), *_ = empty.compose(SampledGaussian(3e100, 0.5))._sources()[1]
        assert source.pair.mu == pytest.approx(1e-100, rel=1e-12, abs=0)


def test_distances_are_known_to_a_hundred_units() -> None:
    """μ moved by 1e-14 either way, for each pair and for all plain releases as one."""
    ledger = PldAccountant().compose(GaussianEvent(2.0), 9).compose(SampledGaussian(0.5, 0.1), 7)
    mu, sources = ledger.compose(SampledGaussian(0.25, 1.0))._sources()
    assert mu == pytest.approx(math.sqrt(9 / 4 + 16), rel=1e-15)
    assert [count for _, count in sources] == [7, 1]
    for (source, _), (true, rate) in zip(sources, ((2.0, 0.1), (mu, 1.0)), strict=True):
        epsilons = np.array([0.3])
        wider = SampledPair(true * (1 + 1e-14), rate).upper("remove", epsilons)
        assert source.profiles[0](epsilons).tolist() == wider.tolist()
        added = SampledPair(true * (1 + 1e-14), rate).upper("add", epsilons)
        assert source.profiles[1](epsilons).tolist() == added.tolist()
        assert source.pair.mu / true - 1 == pytest.approx(-1e-14, rel=0.03)
    assert PldAccountant().compose(SampledGaussian(0.5, 0.1))._sources()[0] == 0.0


@pytest.mark.parametrize(
    ("ends", "other", "found"),
    [
        ((1.0, 1.005), 0.5, (1.005, "pld")),  # narrow enough: nothing else is asked
        ((0.98, 1.0), 0.99, (0.99, "rdp")),
        ((0.98, 1.0), 1.0, (1.0, "pld")),
        ((0.98, 1.0), 1.1, (1.0, "pld")),
        ((99.0, 100.0), 0.9, (100.0, "pld")),  # exactly 1 % is narrow
        ((0.0, math.inf), 7.0, (7.0, "rdp")),
    ],
)
def test_an_epsilon_that_stays_wide_is_held_against_renyi(
    ends: tuple[float, float],
    other: float,
    found: tuple[float, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = PldAccountant().compose(SampledGaussian(1.0, 0.5))
    bound = RdpAccountant().compose(SampledGaussian(1.0, 0.5)).epsilon(1e-3)
    bound = dataclasses.replace(bound, epsilon=other)
    monkeypatch.setattr(PldAccountant, "epsilon_interval", lambda *_: ends)
    monkeypatch.setattr(RdpAccountant, "epsilon", lambda *_: bound)
    result = ledger.epsilon(1e-3)
    assert (result.epsilon, result.method) == found
    plain = PldAccountant().compose(GaussianEvent(1.0)).epsilon(1e-3)
    assert (plain.epsilon, plain.method) == (ends[1], "gdp")


@pytest.mark.parametrize(
    ("ends", "other", "found"),
    [
        ((1e-3, 2e-3), 1e-4, (2e-3, "pld")),
        ((1e-3, 2.1e-3), 2e-3, (2e-3, "rdp")),
        ((1e-3, 2.1e-3), 2.2e-3, (2.1e-3, "pld")),
        ((0.0, 1.0), 1.0, (1.0, "pld")),
        ((0.0, 0.0), 0.5, (5e-324, "pld")),
    ],
)
def test_a_delta_within_a_factor_of_two_is_not(
    ends: tuple[float, float],
    other: float,
    found: tuple[float, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounded up to the next double, so never 0, and at most 1, which says why."""
    ledger = PldAccountant().compose(SampledGaussian(1.0, 0.5))
    bound = RdpAccountant().compose(SampledGaussian(1.0, 0.5)).delta(1.0)
    bound = dataclasses.replace(bound, delta=other, reason="none")
    monkeypatch.setattr(PldAccountant, "delta_interval", lambda *_: ends)
    monkeypatch.setattr(RdpAccountant, "delta", lambda *_: bound)
    result = ledger.delta(1.0)
    assert (result.delta, result.method) == (pytest.approx(found[0], rel=1e-15), found[1])
    assert result.delta >= found[0]
    assert (result.reason is not None) == (result.delta == 1 or result.method == "rdp")


def test_a_trade_off_is_the_best_of_its_points() -> None:
    """1 - δ - e^ε FPR, and e^-ε (1 - δ - FPR) the other way; at most 1 - FPR, at least 0."""
    ours = (np.array([0.0, 0.5, 2.0]), np.array([0.4, 0.2, 0.01]))
    theirs = (np.array([0.0, 1.0, 800.0]), np.array([0.3, 0.1, 0.0]))
    fpr = np.array([0.0, 1e-3, 0.05, 0.3, 0.6, 0.95, 1.0])
    found = pld._read(ours, theirs, fpr)
    for rate, value in zip(fpr.tolist(), found, strict=True):
        first = max(
            1 - d - math.exp(e) * rate for e, d in zip(*(x.tolist() for x in ours), strict=True)
        )
        second = max(
            math.exp(-e) * (1 - d - rate)
            for e, d in zip(*(x.tolist() for x in theirs), strict=True)
        )
        expected = max(0.0, min(1 - rate, max(first, second)))
        assert value <= expected
        assert value == pytest.approx(expected, rel=1e-13, abs=2e-15)
    lowered = pld._read((np.zeros(1), np.zeros(1)), (np.zeros(1), np.ones(1)), np.array([0.0]))
    assert 1 - lowered[0] == pytest.approx(1e-15, rel=0.12)
    beyond = pld._read((np.array([800.0]), np.zeros(1)), (np.zeros(1), np.ones(1)), np.zeros(1))
    assert beyond[0] == pytest.approx(1.0, abs=2e-15), "at rate 0 an infinite factor costs nothing"
    other = pld._read((np.zeros(1), np.ones(1)), (np.zeros(1), np.zeros(1)), np.array([0.0]))
    assert 1 - other[0] == pytest.approx(2e-15, rel=0.12)


def test_a_trade_off_reads_six_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """At δ from .3 to a hundredth of the smallest rate, at most .001 and from 1e-12 on.

    The smaller rate of the two roles of the neighbours.
    """
    ledger = PldAccountant().compose(SampledGaussian(1.0, 0.5), 2)
    asked: list[float] = []
    one, two = (np.zeros(1), np.array([0.3])), (np.zeros(1), np.array([0.5]))
    monkeypatch.setattr(_solve, "upper_points", lambda _, d: asked.append(d) or [one, two])
    for rates, smallest in (
        ([0.0, 0.2, 1e-5, 0.01], 1e-5),
        ([1e-20, 0.2], 1e-12),
        ([0.0], 1e-3),
        ([0.5], 1e-3),
    ):
        asked.clear()
        found = ledger.trade_off(rates)
        expected = [0.3 * (0.01 * smallest / 0.3) ** (k / 5) for k in range(6)]
        assert asked == pytest.approx(expected, rel=1e-12, abs=0)
        worst = [max(1 - 0.3 - rate, 0.0) for rate in rates]
        assert found == pytest.approx(worst, abs=1e-14)
    assert ledger.tpr_bound(0.2) == pytest.approx(0.5, abs=1e-14)


def test_the_bound_of_an_exchange_cites_its_source() -> None:
    """Sampled or projected at a rate below 1, under replace only."""
    sampled, full = SampledGaussian(1.0, 0.5), SampledGaussian(1.0, 1.0)
    key = "balle-subsampling-2018"
    assert key in PldAccountant("replace").compose(sampled).epsilon(1e-3).references
    assert key not in PldAccountant().compose(sampled).epsilon(1e-3).references
    assert key not in PldAccountant("replace").compose(full).epsilon(1e-3).references
    assert PldAccountant().compose(full).epsilon(1e-3).method == "gdp"
    mixed = PldAccountant().compose(full).compose(sampled)
    assert mixed._method() == "pld"
