"""How a profile becomes masses on a grid: each part against a definition that is written out.

The convex minorant is that of a hull of points, lines are those of tests at 40 digits, and the
margins for rounding are put together again with a unit of 1e-4, at which each of them is seen.
"""

import itertools
import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
from pld_oracle import cdf, exchange_delta

from lora_privacy.dp import _grid
from lora_privacy.dp._grid import Measure
from lora_privacy.dp._profiles import SampledPair
from lora_privacy.dp._replaced import ReplacedPair

STEP = 0.25
UNIT = 1e-4


def profile(masses: list[float], first: int, infinite: float, k: float) -> float:
    """Σ mass (1 - e^{ε - loss})₊ + infinite at ε = k·step."""
    gains = (m * -math.expm1(min(0.0, (k - i) * STEP)) for i, m in enumerate(masses, first))
    return math.fsum(gains) + infinite


def others(masses: list[float], first: int, infinite: float, k: int) -> float:
    """The other direction at ε = k·step >= 0: 1 - e^ε + e^ε H(e^-ε)."""
    growth = math.exp(k * STEP)
    return 1 - growth + growth * profile(masses, first, infinite, -k)


# --- where a grid may end


@pytest.mark.parametrize("tail", [1e-3, 1e-9, 1e-30])
@pytest.mark.parametrize("start", [1e-6, 0.1, 3.0])
def test_a_grid_reaches_to_the_tail_and_hardly_further(tail: float, start: float) -> None:
    """e^{-ε} and a faster fall: within a 32nd of a factor √2 of where the slower one is small."""
    asked = []

    def slow(epsilons: np.ndarray) -> np.ndarray:
        asked.append(len(epsilons))
        return np.exp(-epsilons)

    def fast(epsilons: np.ndarray) -> np.ndarray:
        return np.exp(-2 * epsilons)

    true = -math.log(tail)
    for pair in ((slow, fast), (fast, slow), (slow, slow)):
        asked.clear()
        found = _grid.reach(pair, tail, start)
        assert true <= found <= true * (1 + (math.sqrt(2) - 1) / 32 + 1e-12)
        assert asked == [168, 33], "a profile that serves both directions is asked once"


def test_a_tail_that_does_not_fall_any_more_is_not_followed() -> None:
    """To a thousandth above its last value; nor beyond ε = 1e9, nor below a sixteenth."""

    def level(epsilons: np.ndarray) -> np.ndarray:
        return np.maximum(np.exp(-epsilons), 1e-3)

    true = -math.log(1.001e-3)
    assert true <= _grid.reach((level, level), 1e-9, 0.5) <= true * 1.014
    assert _grid.reach((lambda e: 0 * e,) * 2, 1e-9, 0.5) == 0.5 / 16
    assert _grid.reach((lambda e: 1.0 * (e < 0.5 / 16 * 1.01),) * 2, 0.5, 0.5) < 0.04
    slow = _grid.reach((lambda e: np.exp(-e / 1e10),) * 2, 1e-9, 1.0)
    assert slow <= 1e9
    assert slow >= 1e9 * (1 - 0.0101)  # e^{-.1} to a thousandth
    assert _grid.reach((lambda e: 1.0 * (e < 1e9),) * 2, 1e-9, 1.0) == 1e9


def test_a_profile_that_depends_on_what_else_is_asked_still_ends() -> None:
    """Interpolated ones do: the end of the coarse cell is taken."""

    def jumpy(epsilons: np.ndarray) -> np.ndarray:
        return np.exp(-epsilons) * (1.0 if len(epsilons) > 33 else 2.0)

    found = _grid.reach((jumpy, jumpy), math.exp(-8.0), 1.0)
    assert found == 8.0


# --- masses, given dots

NEAR = [0.05, 0.1, 0.05, 0.1, 0.15, 0.1, 0.1, 0.1, 0.1, 0.1, 0.04]  # losses -5 … 5
GAPS = [0.0, 0.2, 0.0, 0.0, 0.1, 0.2, 0.0, 0.3, 0.0, 0.1, 0.0]


@pytest.mark.parametrize(("masses", "infinite"), [(NEAR, 0.01), (GAPS, 0.1), (GAPS, 0.0)])
def test_the_profile_of_a_measure_gives_it_back(masses: list[float], infinite: float) -> None:
    """Dots in both directions at ε >= 0 are all that is needed; mirrored for the other one."""
    ours = np.array([profile(masses, -5, infinite, k) for k in range(6)])
    theirs = np.array([others(masses, -5, infinite, k) for k in range(6)])
    lack = 1 - sum(masses) - infinite  # what of the whole mass is nowhere lies at loss -5
    full = [masses[0] + lack, *masses[1:]]
    found = _grid._joined(ours, theirs, STEP, upper=True)
    start = found.first + 5
    assert found.masses == pytest.approx(full[start : start + len(found.masses)], rel=1e-9)
    assert math.fsum(full[:start]) + math.fsum(full[start + len(found.masses) :]) < 1e-15
    assert found.infinite == pytest.approx(infinite, rel=1e-9, abs=1e-14)
    assert (found.step, found.offset, found.last) == (STEP, 0.0, start + len(found.masses) - 6)
    below = _grid._joined(ours - infinite, theirs, STEP, upper=False)
    assert below.infinite == 0.0
    full[5] += infinite  # without it right of 0 only, its mass lies at loss 0
    expected = full[below.first + 5 : below.last + 6]
    assert below.masses == pytest.approx(expected, rel=1e-9, abs=1e-13)


def hull_masses(x: list[float], y: list[float]) -> list[float]:
    """Masses x_k (slope after - slope before) of the lower hull, constant beyond its end."""
    hull: list[tuple[float, float]] = []
    for point in zip(x, y, strict=True):
        while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (point[1] - hull[-2][1]) <= (
            point[0] - hull[-2][0]
        ) * (hull[-1][1] - hull[-2][1]):
            hull.pop()
        hull.append(point)
    slopes = [min(0.0, (d - b) / (c - a)) for (a, b), (c, d) in itertools.pairwise(hull)]
    jumps = {
        at: at * (right - left)
        for (at, _), left, right in zip(hull[1:], slopes, [*slopes[1:], 0.0], strict=True)
    }
    return [jumps.get(at, 0.0) for at in x]


BUMPY = [
    [0.9, 0.5, 0.48, 0.3, 0.28, 0.1, 0.02, 0.01],
    [0.9, 0.7, 0.69, 0.6, 0.1, 0.09, 0.08, 0.079],
    [0.5, 0.5, 0.5, 0.2, 0.2, 0.2, 0.2, 0.2],
    [0.9, 0.5, 0.48, 0.3, 0.28, 0.1, 0.02, 0.05],
    [0.9, 0.6, 0.4, 0.25, 0.15, 0.08, 0.03, 0.0],
]


@pytest.mark.parametrize("dots", BUMPY)
def test_masses_are_those_of_the_lower_hull(dots: list[float]) -> None:
    """Losses 1 … 7; convex dots as they are."""
    expected = hull_masses([math.exp(k * STEP) for k in range(8)], dots)[1:]
    assert _grid._masses(np.array(dots), STEP) == pytest.approx(expected, rel=1e-9, abs=1e-13)


@pytest.mark.parametrize(("limit", "count"), [(1.1, 4), (0.75, 3), (0.01, 1), (600.0, 7)])
def test_masses_beyond_the_hull_are_left_as_they_are(
    limit: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where e^ε is no double: the first cells are made convex, at least one, others cut at 0."""
    monkeypatch.setattr(_grid, "_MAX_HULL", limit)
    for dots in BUMPY[:2]:
        x = [math.exp(k * STEP) for k in range(8)]
        slopes = [(dots[k + 1] - dots[k]) / (x[k + 1] - x[k]) for k in range(7)] + [0.0]
        fitted = hull_slopes(x[: count + 1], dots[: count + 1])
        slopes[:count] = fitted
        expected = [max(0.0, x[k] * (slopes[k] - slopes[k - 1])) for k in range(1, 8)]
        assert _grid._masses(np.array(dots), STEP) == pytest.approx(expected, rel=1e-9, abs=1e-13)


def hull_slopes(x: list[float], y: list[float]) -> list[float]:
    """Slope of the lower hull in each cell."""
    slopes, k = [], 0
    while k < len(x) - 1:
        steepest = min(range(k + 1, len(x)), key=lambda j: ((y[j] - y[k]) / (x[j] - x[k]), -j))
        slopes += [min(0.0, (y[steepest] - y[k]) / (x[steepest] - x[k]))] * (steepest - k)
        k = steepest
    return slopes


def test_both_sides_are_joined_by_a_hull(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falls of 0.1 and .04 where e^step - 1 = .28 of the mass could lie: more than there is.

    The hull starts at the dot 1 for x = 0. Without one, mass at loss 0 is cut at 0.
    """
    ours, theirs = (np.array(side) for side in ([0.9, 0.6, 0.3, 0.1], [0.9, 0.7, 0.5, 0.2]))
    x = [math.exp(k * STEP) for k in range(-3, 4)]
    left = [1 - x[3 - k] + x[3 - k] * theirs[k] for k in (3, 2, 1)]
    expected = hull_masses([0.0, *x], [1.0, *left, *ours])[1:]
    found = _grid._jointly_convex(ours, theirs, STEP)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-13)
    joined = _grid._joined(ours, theirs, STEP, upper=True)
    assert joined.masses == pytest.approx(expected[joined.first + 3 : joined.last + 4], rel=1e-3)
    monkeypatch.setattr(_grid, "_MAX_HULL", 3 * STEP)
    again = _grid._joined(ours, theirs, STEP, upper=True)
    assert again.masses.tolist() == joined.masses.tolist()
    monkeypatch.setattr(_grid, "_MAX_HULL", 3 * STEP - 0.01)
    cut = _grid._joined(ours, theirs, STEP, upper=True)
    sides = _grid._masses(ours, STEP), _grid._masses(theirs, STEP)[::-1] * np.array(x[:3])
    parts = np.concatenate([sides[1], [0.0], sides[0]])
    share = cut.masses / parts[cut.first + 3 : cut.last + 4].clip(1e-300)
    assert np.ptp(share[parts[cut.first + 3 : cut.last + 4] > 0]) < 1e-12, "one factor for all"


def test_a_profile_is_summed_at_all_points() -> None:
    expected = [profile(NEAR, -5, 0.01, k) for k in range(-5, 6)]
    found = _grid.profile_at_nodes(np.array(NEAR), 0.01, STEP)
    assert found == pytest.approx(expected, rel=1e-13, abs=0)


# --- certification


def raised(masses: np.ndarray, infinite: float, wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """By one factor, or by twice what is lacking of the infinite mass where that rules.

    Eight units a term for the sum, eight for what is wanted, and eight for the factor.
    """
    sums = 8 * UNIT * len(masses)
    found = [profile(masses.tolist(), 0, infinite, k) for k in range(len(masses))]
    found = [masses.sum() + infinite, *found]
    factor, more = 0.0, 0.0
    rules = [value <= 100 * max(infinite, 1e-290) for value in found]
    for k, (value, dot) in enumerate(zip(found, wanted.tolist(), strict=True)):
        carries = k in (0, len(masses)) or masses[k - 1] > 0
        if carries and not rules[k]:
            lacking = dot * (1 + 8 * UNIT) - value * (1 - sums)
            factor = max(factor, lacking / value)
    factor = factor / (1 - sums) + 8 * UNIT
    for k, (value, dot) in enumerate(zip(found, wanted.tolist(), strict=True)):
        carries = k in (0, len(masses)) or masses[k - 1] > 0
        if carries and rules[k]:
            lacking = dot * (1 + 8 * UNIT) - value * (1 - sums)
            more = max(more, lacking - factor * value)
    return masses * (1 + factor), (infinite + 2 * more) * (1 + factor)


MASSES = np.array([0.2, 0.0, 0.3, 0.1, 0.0, 0.25, 0.1])
INNER = profile(MASSES.tolist(), 0, 0.0, 3)


@pytest.mark.parametrize("infinite", [0.0, 1e-3, 0.05, INNER / 98.5, INNER / 99.5])
@pytest.mark.parametrize(
    "lift",
    [
        {},
        {0: 1.1},
        {2: 1.2},  # a dot that the hull passed by: no mass there, so it may lie above
        {3: 1.05},
        {4: 1.3},
        {5: 1.3},
        {7: 1.5},
        {3: 0.5, 7: 4.0},
    ],
)
def test_masses_are_raised_to_the_dots(
    infinite: float, lift: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_grid, "_EPS", UNIT)
    wanted = [profile(MASSES.tolist(), 0, infinite, k) for k in range(7)]
    wanted = np.array([MASSES.sum() + infinite, *wanted])
    for k, share in lift.items():
        wanted[k] *= share
    wanted[7] += 1e-3 * (7 in lift)
    masses, rest = raised(MASSES, infinite, wanted)
    found = _grid._certified(Measure(STEP, 0, MASSES, infinite, 0.5), wanted, upper=True)
    assert found.masses == pytest.approx(masses, rel=1e-12, abs=0)
    assert found.infinite == pytest.approx(rest, rel=1e-12, abs=0)
    assert (found.step, found.first, found.offset) == (STEP, 0, 0.5)
    # Masses next to nothing are not divided by.
    tiny = _grid._certified(Measure(STEP, 0, 2e-289 * MASSES), 4e-289 * wanted, upper=True)
    masses, rest = raised(2e-289 * MASSES, 0.0, 4e-289 * wanted)
    assert tiny.masses == pytest.approx(masses, rel=1e-12, abs=0)
    assert tiny.infinite == pytest.approx(rest, rel=1e-12, abs=0)


@pytest.mark.parametrize("lift", [{}, {0: 0.9}, {3: 0.8}, {7: 0.5}, {6: 0.2}, {4: 1.5}, {6: 0.0}])
def test_masses_are_lowered_to_the_dots(
    lift: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No dot is exceeded, the sum's error and what is wanted rounded the other way; then four."""
    monkeypatch.setattr(_grid, "_EPS", UNIT)
    sums = 8 * UNIT * len(MASSES)
    found = [profile(MASSES.tolist(), 0, 0.0, k) for k in range(7)]
    found = np.array([MASSES.sum(), *found])
    wanted = found * [lift.get(k, 1.2) for k in range(8)]
    most = 0.0
    for value, dot in zip(found[:7], wanted[:7], strict=True):
        most = max(most, (value * (1 + sums) - dot * (1 - 8 * UNIT)) / value)
    measure = _grid._certified(Measure(STEP, 0, MASSES, 0.0, 0.5), wanted, upper=False)
    if most >= 1:
        assert measure.masses.tolist() == [0.0]
        return
    expected = MASSES * ((1 - most) * (1 - 4 * UNIT))
    assert measure.masses == pytest.approx(expected, rel=1e-12, abs=0)
    assert (measure.infinite, measure.first, measure.offset) == (0.0, 0, 0.5)


def test_zeros_at_both_ends_are_cut_off() -> None:
    found = _grid._trimmed(Measure(STEP, -4, np.array([0.0, 0.0, 0.5, 0.0, 0.3, 0.0]), 0.1, 0.2))
    assert (found.first, found.last) == (-2, 0)
    assert found.masses.tolist() == [0.5, 0.0, 0.3]
    assert (found.infinite, found.offset) == (0.1, 0.2)


def test_measures_above_start_from_the_smaller_bound_at_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both directions agree at ε = 0; a profile that rises is replaced by its running minimum."""
    seen = []
    monkeypatch.setattr(
        _grid, "_joined", lambda *args, upper: seen.append((*args, upper)) or len(seen)
    )
    for first, second in ((0.5, 0.4), (0.4, 0.5)):
        seen.clear()
        profiles = (
            lambda e, f=first: f * np.exp(-e) * (1 + 0.8 * np.sin(8 * e)),
            lambda e, s=second: s * np.exp(-2 * e),
        )
        assert _grid.above(profiles, STEP, 5) == (1, 2)
        grid = np.array([STEP * k for k in range(6)])
        remove, add = (np.minimum.accumulate(f(grid)) for f in profiles)
        remove[0] = add[0] = 0.4
        for args, (ours, theirs) in zip(seen, ((remove, add), (add, remove)), strict=True):
            assert args[0].tolist() == ours.tolist()
            assert args[1].tolist() == theirs.tolist()
            assert args[2:] == (STEP, True)


# --- lines of tests, for a measure below


def lowest(lines: list[tuple[float, float]]) -> np.ndarray:
    """At each point the lower of the lines that meet; 0 where a line ends below 0."""
    kept = [(a, b) if a >= 0 and b >= 0 else (0.0, 0.0) for a, b in lines]
    inner = [min(kept[k][1], kept[k + 1][0]) for k in range(len(kept) - 1)]
    return np.array([kept[0][0], *inner, kept[-1][1]], dtype=float)


def removal_line(mu: float, p: float, at: mp.mpf, x: mp.mpf) -> mp.mpf:
    """M(E) - x P₀(E) for the E that is best at e^ε = ``at``."""
    t = mp.log((at - 1 + p) / p) / mu + mp.mpf(mu) / 2
    return (1 - p) * cdf(-t) + p * cdf(mu - t) - x * cdf(-t)


def addition_line(mu: float, p: float, low: mp.mpf, at: mp.mpf, x: mp.mpf) -> mp.mpf:
    """P₀(E) - x M(E), M as if its rate were ``low``, a little less than p, in w only."""
    w, w_at = 1 / x - 1 + low, 1 / at - 1 + low
    if w <= 0 or w_at <= 0:
        return mp.mpf(-1)
    t = mp.log(w_at / p) / mu + mp.mpf(mu) / 2
    return x * (w * cdf(t) - p * cdf(t - mu))


def best_lines(
    line: Callable[[mp.mpf, mp.mpf], mp.mpf], points: list[mp.mpf]
) -> list[tuple[float, float]]:
    """The test at the middle of each cell, or where its line ends below 0 at its right end."""
    found = []
    for left, right in itertools.pairwise(points):
        middle = mp.sqrt(left * right)
        ends = line(middle, left), line(middle, right)
        if ends[1] < 0:
            ends = line(right, left), line(right, right)
        found.append((float(ends[0]), float(ends[1])))
    return found


def dots_of(lines: list[tuple[float, float]], scale: np.ndarray | float = 1.0) -> np.ndarray:
    """Eight units for the scale, and the last dot, which would be infinite mass, dropped."""
    dots = lowest(lines) * scale * (1 - 8 * UNIT)
    return np.maximum(dots - dots[-1], 0.0)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list:
    """Arguments that ``_joined`` was called with, at a unit of 1e-4."""
    seen = []
    monkeypatch.setattr(_grid, "_EPS", UNIT)
    monkeypatch.setattr(_grid, "_joined", lambda *args, upper: seen.append((*args, upper)))
    return seen


@pytest.mark.parametrize(
    ("mu", "p", "half"),
    [(1.0, 0.5, 6), (0.4, 0.9, 9), (3.0, 0.8, 4), (1.0, 0.9, 9), (1.0, 0.2, 1)],
)
def test_dots_below_an_addition(mu: float, p: float, half: int, joined: list) -> None:
    """Those of both directions, the smaller at ε = 0; four units of p against a larger loss."""
    _grid.below(SampledPair(mu, p), "add", STEP, half, 1.0)
    ((ours, theirs, step, upper),) = joined
    with mp.workdps(25):
        points = [mp.exp(k * mp.mpf(STEP)) for k in range(half + 1)]
        low = mp.mpf(p) * (1 - 4 * mp.mpf(UNIT))
        add = dots_of(
            best_lines(lambda at, x: addition_line(mu, p, low, at, x), points), 1 - 8 * UNIT
        )
        remove = dots_of(best_lines(lambda at, x: removal_line(mu, p, at, x), points))
    add[0] = remove[0] = min(add[0], remove[0])
    assert ours == pytest.approx(add, rel=1e-9, abs=1e-13)
    assert theirs == pytest.approx(remove, rel=1e-9, abs=1e-13)
    assert (step, upper) == (STEP, False)


@pytest.mark.parametrize(("mu", "p", "half"), [(1.0, 0.9, 9), (3.0, 0.8, 4)])
def test_dots_below_a_removal_whose_grid_starts_at_zero(
    mu: float, p: float, half: int, joined: list
) -> None:
    """Where the least loss, log(1-p), is not on the grid."""
    _grid.below(SampledPair(mu, p), "remove", STEP, half, 1.0)
    ((ours, theirs, step, upper),) = joined
    _grid.below(SampledPair(mu, p), "add", STEP, half, 1.0)
    assert ours.tolist() == joined[1][1].tolist()
    assert theirs.tolist() == joined[1][0].tolist()
    assert (step, upper) == (STEP, False)


def test_dots_below_a_plain_gaussian_and_an_exchange(joined: list) -> None:
    """One profile serves both directions; p = 1, and N(±μ, 1) behind a coin."""
    _grid.below(SampledPair(0.9, 1.0), "remove", STEP, 5, 1.0)
    _grid.below(ReplacedPair(0.6, 0.4), "add", STEP, 5, 1.0)
    with mp.workdps(25):
        points = [mp.exp(k * mp.mpf(STEP)) for k in range(6)]
        plain = dots_of(best_lines(lambda at, x: removal_line(0.9, 1.0, at, x), points))
        exchange = dots_of(best_lines(lambda at, x: exchange_line(0.6, 0.4, at, x), points))
    for (ours, theirs, step, upper), expected in zip(joined, (plain, exchange), strict=True):
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-13)
        assert theirs is ours
        assert (step, upper) == (STEP, False)


def exchange_line(mu: float, p: float, at: mp.mpf, x: mp.mpf) -> mp.mpf:
    """M(E) - x M'(E), E = {y > t}, sinh v = d e^{μ²/2 - ε/2}/2 at t = (ε/2 + v)/μ."""
    mu, p = mp.mpf(mu), mp.mpf(p)
    d = (at - 1) * (1 - p) / p
    t = (mp.log(at) / 2 + mp.asinh(d * mp.exp(mu * mu / 2) / mp.sqrt(at) / 2)) / mu
    ours, theirs = ((1 - p) * cdf(-t) + p * cdf(s * mu - t) for s in (1, -1))
    return ours - x * theirs


def test_the_test_of_an_exchange_is_the_best_one() -> None:
    """The oracle above against bisection."""
    for epsilon in (0.1, 1.0):
        with mp.workdps(30):
            x = mp.exp(mp.mpf(epsilon))
            found = float(exchange_line(0.6, 0.4, x, x))
        assert found == pytest.approx(float(exchange_delta(0.6, 0.4, epsilon)), rel=1e-9, abs=0)


def from_least(dots: np.ndarray) -> np.ndarray:
    """Masses through the dots, the rest on the least loss, lowered below all dots and 1."""
    x = [math.exp(k * STEP) for k in range(len(dots))]
    right = np.array(hull_masses(x, dots.tolist())[1:])
    masses = np.append(max(0.0, 1 - right.sum()), right)
    found = [profile(masses.tolist(), 0, 0.0, k) for k in range(len(masses))]
    found, wanted = [masses.sum(), *found], [1.0, *dots.tolist()]
    most = 0.0
    for value, dot in zip(found, wanted, strict=True):
        if value > 0:
            sums = 8 * UNIT * len(masses)
            most = max(most, (value * (1 + sums) - dot * (1 - 8 * UNIT)) / value)
    return masses * max(0.0, 1 - most) * (1 - 4 * UNIT)


@pytest.mark.parametrize(
    ("mu", "p", "half", "tilt", "kind"),
    [
        (1.0, 0.5, 6, 1.0, "certain"),
        (2.0, 0.6, 12, 3.0, "middle"),
        (0.02, 0.6, 4, 1.0, "nothing"),
        (3.0, 0.3, 12, 0.3, "middle"),
        (8.0, 0.5, 20, 5.0, "middle"),
        (1.0, 0.3, 5, 0.1, "nothing"),
    ],
)
def test_masses_below_a_removal_start_at_its_least_loss(
    mu: float, p: float, half: int, tilt: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the test at the middle of the first cell, the certain event and nothing, the best."""
    monkeypatch.setattr(_grid, "_EPS", UNIT)
    offset = math.log(1 - p)
    count = half + math.ceil(-offset / STEP)
    with mp.workdps(25):
        points = [(1 - mp.mpf(p)) * mp.exp(k * mp.mpf(STEP)) for k in range(count + 1)]
        lines = best_lines(lambda at, x: removal_line(mu, mp.mpf(p), at, x), points)
    choices = {"middle": from_least(dots_of(lines))}
    # M(E) - e^ε P₀(E) = 1 - e^ε for the certain event, that is 1 - d/p times p.
    end = 1 - (1 - p) * (math.exp(STEP) - 1) / p * (1 + 8 * UNIT) - 4 * UNIT
    if end > 0:
        choices["certain"] = from_least(dots_of([(p, p * end), *lines[1:]]))
    moments = {
        name: math.fsum(
            m * math.exp(tilt * (k * STEP + offset)) for k, m in enumerate(masses.tolist())
        )
        for name, masses in choices.items()
    }
    best = max(moments, key=lambda name: moments[name])
    if moments[best] < 1:
        best = "nothing"
    assert best == kind, moments
    found = _grid.below(SampledPair(mu, p), "remove", STEP, half, tilt)
    if best == "nothing":
        assert (found.step, found.first, found.masses.tolist()) == (STEP, 0, [1.0])
        assert (found.infinite, found.offset) == (0.0, 0.0)
        return
    assert found.masses == pytest.approx(
        choices[best][found.first : found.last + 1], rel=1e-7, abs=1e-12
    )
    assert (found.infinite, found.step) == (0.0, STEP)
    assert found.offset == pytest.approx(offset, rel=1e-12, abs=0)


@pytest.mark.parametrize("kind", ["remove", "add"])
@pytest.mark.parametrize("p", [0.3, 0.9, 1e-3])
def test_cells_hold_the_ratios_of_their_lines(kind: str, p: float) -> None:
    """log(d/p) at the middle and the right end, and d there over d at an end, to 1e-12.

    d = x - (1-p) under remove, and p²/w, w = 1/x - (1-p), under add.
    """
    half = 5 if kind == "remove" or p < 0.5 else 9
    step = STEP if p > 0.01 else 2**-14
    starts = (p, 0.0) if kind == "remove" else (p,)
    for start in starts:
        cells = (
            _grid._removal(p, start, step, half)
            if kind == "remove"
            else _grid._addition(p, step, half)
        )
        with mp.workdps(25):
            x = [
                (1 - mp.mpf(p) + start) * mp.exp(k * mp.mpf(step) / 2) for k in range(2 * half + 1)
            ]
            if kind == "remove":
                d = [one - (1 - mp.mpf(p)) for one in x]
            else:
                w = [mp.exp(-k * mp.mpf(step) / 2) - 1 + mp.mpf(p) for k in range(2 * half + 1)]
                d = [mp.mpf(p) ** 2 / one if one > 0 else mp.mpf("nan") for one in w]
            for i in range(half):
                left, middle, right = d[2 * i : 2 * i + 3]
                if mp.isnan(right):
                    assert math.isnan(cells[2][i])
                    assert math.isnan(cells[4][i])
                    continue
                expected = [mp.log(middle / p), left / middle, right / middle]
                expected += [mp.log(right / p), left / right]
                found = [cell[i] for cell in cells]
                assert found == pytest.approx([float(e) for e in expected], rel=1e-11, abs=1e-13)


def test_every_measure_above_is_on_the_grid_it_was_asked_for() -> None:
    pair = SampledPair(1.0, 0.3)
    profiles = (lambda e: pair.upper("remove", e), lambda e: pair.upper("add", e))
    for measure in _grid.above(profiles, STEP, 12):
        assert measure.step == STEP
        assert -12 <= measure.first <= measure.last <= 12
