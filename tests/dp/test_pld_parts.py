"""The parts of the loss accountant, each against a definition that shares no code with it."""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pld_oracle import DELTAS, addition_delta, cdf, measure_delta, removal_delta

from lora_privacy.dp import _fourier, _gaussian, _grid, _solve
from lora_privacy.dp._profiles import DIRECTIONS, Direction, SampledPair
from lora_privacy.errors import ConvergenceError

PAIRS = [(1e-3, 0.3), (0.1, 1e-3), (0.7, 1.0), (1.0, 1e-7), (3.0, 0.02), (3.0, 0.9), (100.0, 0.01)]


def profiles_of(pair: SampledPair) -> tuple[Callable, Callable]:
    return _solve.sampled_source(pair, pair).profiles


def losses_of(measure: _grid.Measure) -> np.ndarray:
    indices = np.arange(measure.first, measure.last + 1)
    return measure.step * indices + measure.offset


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("mu", "p"), PAIRS)
def test_profile_is_the_exact_one_rounded_up(mu: float, p: float, direction: Direction) -> None:
    """Oracle: the best test at 60 digits; never below, and 1e-7 above at most."""
    end = -math.log1p(-p) if p < 1 else 1.0
    epsilons = np.sort([0.0, *np.geomspace(1e-8, 60, 14), end * (1 - 1e-6), end * 1.001])
    found = SampledPair(mu, p).upper(direction, epsilons)
    for epsilon, value in zip(epsilons, found, strict=True):
        true = DELTAS[direction](mu, p, epsilon)
        assert value >= true
        assert value <= true * (1 + 1e-7) + 1e-200


STEPS = [
    (1e-3, 0.3, 2e-5),
    (0.1, 1e-3, 1e-5),
    (0.7, 1.0, 0.01),
    (1.0, 1e-7, 2e-8),
    (1.0, 0.01, 1.0),
    (3.0, 0.02, 0.01),
    (3.0, 0.9, 0.3),
    (100.0, 0.01, 20.0),
]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("mu", "p", "step"), STEPS)
def test_measures_enclose_the_profile_everywhere(
    mu: float, p: float, step: float, direction: Direction
) -> None:
    """Oracle: 60 digits, on and between grid points, at ε of both signs; both ends within reason.

    Wrong alternatives: all losses of the measure above rounded down by one step, and those of the
    measure below rounded up, must be found out.
    """
    pair, step = SampledPair(mu, p), _solve._short(step)
    half = math.ceil(_grid.reach(profiles_of(pair), 1e-20, 1e-9) / step) + 2
    main = DIRECTIONS.index(direction)
    above = _grid.above(profiles_of(pair), step, half)[main]
    below = _grid.below(pair, direction, step, half, 1.0)
    rng = np.random.default_rng(20240917)
    places = np.concatenate([rng.uniform(-3, 3, 30), rng.uniform(-half, half, 20), [0, 1, -1]])
    caught = {"above": False, "below": False}
    for epsilon in step * places:
        if abs(epsilon) > 600:
            continue
        if epsilon >= 0:
            true = float(DELTAS[direction](mu, p, epsilon))
        elif direction == "remove":
            true = float(removal_delta(mu, p, epsilon))
        else:  # the other direction, turned around
            true = float(
                1 - math.exp(epsilon) + math.exp(epsilon) * removal_delta(mu, p, -epsilon)
            )
        tolerance = 1e-14 * (1 if epsilon < 0 else true) + 1e-290
        high = measure_delta(above.masses, losses_of(above), above.infinite, epsilon)
        low = measure_delta(below.masses, losses_of(below), below.infinite, epsilon)
        assert low <= true + tolerance
        assert high >= true - tolerance
        lowered = losses_of(above) - step
        raised = losses_of(below) + step
        wrong = measure_delta(above.masses, lowered, above.infinite, epsilon)
        caught["above"] |= wrong < true - tolerance
        caught["below"] |= measure_delta(below.masses, raised, 0.0, epsilon) > true + tolerance
    assert all(caught.values())


def test_measures_converge() -> None:
    """Halving the step divides both errors at ε = 0.1 by nearly four: second order."""
    pair = SampledPair(1.0, 0.2)
    true = float(removal_delta(1.0, 0.2, 0.1))
    errors = []
    for step in (2**-6, 2**-7):
        half = int(3 / step)
        above = _grid.above(profiles_of(pair), step, half)[0]
        below = _grid.below(pair, "remove", step, half, 1.0)
        ends = [
            measure_delta(m.masses, losses_of(m), m.infinite, 0.1 + step / 3)
            for m in (above, below)
        ]
        at = float(removal_delta(1.0, 0.2, 0.1 + step / 3))
        errors.append((ends[0] - at, at - ends[1]))
    assert true > 0
    assert errors[0][0] > 3 * errors[1][0] > 0
    assert errors[0][1] > 3 * errors[1][1] > 0


def convolved(parts: list[tuple[_grid.Measure, int]]) -> tuple[np.ndarray, int, float]:
    """Masses, first index and infinite mass of the sum of all losses, by direct convolution."""
    masses, first, finite, infinite = np.ones(1), 0, 1.0, 0.0
    for part, count in parts:
        for _ in range(count):
            masses = np.convolve(masses, part.masses)
            first += part.first
            infinite = infinite * (part.masses.sum() + part.infinite) + finite * part.infinite
            finite *= part.masses.sum()
    return masses, first, infinite


def parts_of(step: float, *, upper: bool) -> list[tuple[_grid.Measure, int]]:
    parts = []
    for mu, p, count in [(1.0, 0.3, 3), (0.5, 0.7, 2), (0.6, 1.0, 1)]:
        pair = SampledPair(mu, p)
        half = math.ceil(_grid.reach(profiles_of(pair), 1e-12, 0.1) / step) + 1
        measure = (
            _grid.above(profiles_of(pair), step, half)[0]
            if upper
            else _grid.below(pair, "remove", step, half, 2.0)
        )
        parts.append((measure, count))
    return parts


@pytest.mark.parametrize("tilt", [0.0, 1.0, 6.0, 20.0])
@pytest.mark.parametrize("upper", [True, False])
def test_transform_agrees_with_direct_convolution(tilt: float, upper: bool) -> None:
    """Near the tilted mean, 3e-6 relative at every grid point; never on the wrong side.

    A direct sum of positive terms is exact to 1e-12, and δ goes down to 1e-30 here, which an
    untilted transform cannot see.
    """
    step = 2**-6
    parts = parts_of(step, upper=upper)
    masses, first, infinite = convolved(parts)
    shift = sum(count * part.offset for part, count in parts)
    losses = step * (first + np.arange(len(masses))) + shift
    curve = _fourier.compose(parts, tilt, upper=upper)
    epsilons, deltas = curve.points()
    growth = masses * np.exp(tilt * (losses - losses[-1]))
    centre = float(growth @ losses / growth.sum())
    near = 0
    for epsilon, delta in list(zip(epsilons, deltas, strict=True))[::7]:
        true = measure_delta(masses, losses, infinite if upper else 0.0, epsilon)
        if upper:
            assert delta >= min(1.0, true * (1 - 1e-12))
        else:
            assert delta <= true * (1 + 1e-12)
        if abs(epsilon - max(centre, 0.2)) < 0.2:
            near += 1
            assert delta == pytest.approx(true, rel=3e-6, abs=0)
    assert near


@pytest.mark.parametrize("upper", [True, False])
def test_what_wraps_around_is_paid_for(upper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that loses 1e-2 of the mass is still on the right side.

    Without the payment, which is the wrong alternative, it is not.
    """
    step = 2**-6
    parts = parts_of(step, upper=upper)
    masses, first, infinite = convolved(parts)
    shift = sum(count * part.offset for part, count in parts)
    losses = step * (first + np.arange(len(masses))) + shift
    monkeypatch.setattr(_fourier, "_TAIL", 0.2)

    def misses(curve: _fourier.Curve) -> int:
        count = 0
        for epsilon, delta in list(zip(*curve.points(), strict=True))[::3]:
            true = measure_delta(masses, losses, infinite if upper else 0.0, epsilon)
            count += delta < true * (1 - 1e-9) if upper else delta > true * (1 + 1e-9)
        return count

    assert misses(_fourier.compose(parts, 1.0, upper=upper)) == 0
    window = _fourier._window(parts, 1.0)
    free = (window[0], window[1], -700.0, -700.0)
    monkeypatch.setattr(_fourier, "_window", lambda parts, tilt: free)
    assert misses(_fourier.compose(parts, 1.0, upper=upper)) > 0


def test_rounding_of_the_transform_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untilted, δ below 1e-14 is noise: the ends enclose it, widely, instead of guessing.

    Taking the transform as exact, the wrong alternative, puts a lower end above the truth.
    """
    monkeypatch.setattr(_fourier, "_TAIL", 1e-40)  # a window that reaches far into the noise

    def misses(*, upper: bool) -> int:
        parts = [
            (dataclasses.replace(m, infinite=0.0), n) for m, n in parts_of(2**-6, upper=upper)
        ]
        masses, first, _ = convolved(parts)
        shift = sum(count * part.offset for part, count in parts)
        losses = 2**-6 * (first + np.arange(len(masses))) + shift
        count = 0
        curve = _fourier.compose(parts, 0.0, upper=upper)
        for epsilon, delta in list(zip(*curve.points(), strict=True))[::5]:
            true = measure_delta(masses, losses, 0.0, epsilon)
            count += delta < true * (1 - 1e-9) if upper else delta > true * (1 + 1e-9)
        return count

    assert misses(upper=True) == misses(upper=False) == 0
    monkeypatch.setattr(_fourier, "_STAGE", 0.0)
    monkeypatch.setattr(_fourier, "_EPS", 0.0)
    assert misses(upper=False) > 0


def test_a_curve_at_the_ends_of_its_window() -> None:
    """Beyond its last point an upper curve proves nothing, and a lower one that ε is larger."""
    deltas = np.array([0.5, 0.3, 0.1])
    upper, lower = (_fourier.Curve(0.25, 4, deltas, side, 0.5) for side in (True, False))
    assert upper.epsilon(0.05) == math.inf
    assert lower.epsilon(0.05) == pytest.approx(2.0, rel=1e-12)
    assert lower.epsilon(0.05) <= 2.0
    assert upper.epsilon(0.6) == pytest.approx(1.5, rel=1e-12)
    assert lower.epsilon(0.6) == 0.0
    for delta, left, right in ((0.4, 1.5, 1.75), (0.2, 1.75, 2.0)):
        between = math.log((math.exp(left) + math.exp(right)) / 2)  # lines in e^ε
        assert lower.epsilon(delta) <= between <= upper.epsilon(delta)
        assert lower.epsilon(delta) == pytest.approx(upper.epsilon(delta), rel=1e-12)
    assert upper.delta(0.0) == 1.0
    assert lower.delta(0.0) == 0.5
    assert upper.delta(9.0) == 0.1
    assert lower.delta(9.0) == 0.0


def test_equal_events_are_raised_to_a_power() -> None:
    """Ten of one kind equal ten kinds of one; 1e-9 relative at one ε, and another count is not."""
    part = parts_of(2**-6, upper=True)[0][0]
    power = _fourier.compose([(part, 10)], 1.0, upper=True).delta(1.0)
    product = _fourier.compose([(part, 1)] * 10, 1.0, upper=True).delta(1.0)
    assert power == pytest.approx(product, rel=1e-9, abs=0)
    assert _fourier.compose([(part, 9)], 1.0, upper=True).delta(1.0) < 0.99 * power


def test_a_bumpy_profile_becomes_convex_and_stays_above() -> None:
    """An upper profile with bumps of 10 %, as a maximum over layers or a search may give."""
    pair = SampledPair(1.0, 0.1)

    def bumpy(direction: Direction) -> Callable:
        return lambda e: np.minimum(1, pair.upper(direction, e) * (1.1 + 0.1 * np.sin(40 * e)))

    step, half = 2**-6, 400
    rough = (bumpy("remove"), bumpy("add"))
    for direction, profile, measure in zip(
        DIRECTIONS, rough, _grid.above(rough, step, half), strict=True
    ):
        assert measure.masses.min() >= 0
        epsilons = step * np.arange(0, half, 3)
        found = [
            measure_delta(measure.masses, losses_of(measure), measure.infinite, epsilon)
            for epsilon in epsilons
        ]
        given_values = profile(epsilons)
        assert np.all(found <= given_values * (1 + 1e-9) + 1e-15)
        # The losses under add end before the first bump does.
        assert direction == "add" or np.any(found < 0.95 * given_values)
        for epsilon, value in zip(epsilons, found, strict=True):
            assert value >= DELTAS[direction](1.0, 0.1, epsilon) * (1 - 1e-12)


@given(mu=st.floats(1e-3, 60), log_delta=st.floats(-40, -0.1))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_closed_form_encloses_mpmath(mu: float, log_delta: float) -> None:
    """δ at 60 digits: at the upper end at most the target, at the lower end at least."""
    delta = math.exp(log_delta)
    low, high = _gaussian.epsilon_interval(mu, mu, delta)
    assert removal_delta(mu, 1.0, high) <= delta
    assert low == 0 or removal_delta(mu, 1.0, low) >= delta
    assert high - low <= 1e-9 * high + 1e-12


@pytest.mark.parametrize("mu", [0.01, 1.0, 5.0])
def test_closed_trade_off(mu: float) -> None:
    """Oracle: the likelihood-ratio test at 30 digits; 1e-10 relative, rounded down."""
    fpr = np.array([1e-12, 1e-4, 0.1, 0.5, 0.99])
    found = _gaussian.trade_off(mu, fpr)
    with mp.workdps(30):
        for rate, value in zip(fpr, found, strict=True):
            quantile = -mp.sqrt(2) * mp.erfinv(2 * mp.mpf(rate) - 1)
            true = cdf(quantile - mu)
            assert value <= true
            assert value >= true * (1 - mp.mpf("1e-10"))
    assert _gaussian.trade_off(mu, np.array([0.0, 1.0])).tolist() == [1.0, 0.0]


def test_addition_is_the_reflection_of_removal() -> None:
    """The oracles agree with δ_PQ(-ε) = 1 - e^-ε (1 - δ_QP(ε)), which the grid uses."""
    for epsilon in (0.01, 0.05, 0.2):
        left = removal_delta(1.0, 0.3, -epsilon)
        right = 1 - math.exp(-epsilon) * (1 - addition_delta(1.0, 0.3, epsilon))
        assert float(left) == pytest.approx(float(right), rel=1e-14, abs=0)


# --- the choice of grid, tilt and direction, on answers that are put in


class Desk:
    """A plan that answers from lists, and keeps what it was asked."""

    def __init__(
        self,
        *,
        rounds: int = 1,
        wide: tuple[bool, ...] = (),
        coarse: tuple[bool, ...] = (),
        lower: tuple[bool, ...] = (),
        below: str | None = "below",
    ) -> None:
        self.rounds, self.lists = rounds, {"wide": [*wide], "coarse": [*coarse], "lower": [*lower]}
        self.has, self.asked = below, list[tuple]()

    def build(self) -> SimpleNamespace | None:
        self.rounds -= 1
        return SimpleNamespace(above=("remove", "add")) if self.rounds >= 0 else None

    def answer(self, name: str, *asked: float) -> bool:
        self.asked.append((name, *asked))
        return self.lists[name].pop(0) if self.lists[name] else False

    def too_wide(self, width: float, goal: float) -> bool:
        return self.answer("wide", width, goal)

    def coarsen(self) -> bool:
        return self.answer("coarse")

    def lower_tail(self, tail: float) -> bool:
        return self.answer("lower", tail)

    def below(self, _grid: object, main: int, tilt: float) -> str | None:
        self.asked.append(("below", main, tilt))
        return self.has


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Desk]:
    """Put in what moments prove, as (bound, tilt) a direction, and what transforms give."""

    def build(
        *,
        proved: dict[str, tuple[float, float]],
        curves: dict[str, list[float | None]],
        deviation: float = 1.0,
        gap: float = 0.05,
        variation: float = 1.0,
        **plan: object,
    ) -> Desk:
        desk = Desk(**plan)

        def compose(parts: str, tilt: float, *, upper: bool) -> SimpleNamespace | None:
            assert upper == (parts != "below")
            desk.asked.append(("compose", parts, tilt))
            found = curves[parts].pop(0)
            if found is None:
                return None
            both = (np.array([found]), np.array([parts == "add"]))
            return SimpleNamespace(
                epsilon=lambda _: found, delta=lambda _: found, points=lambda: both
            )

        def deviation_of(parts: str) -> float:
            return deviation * (1 if parts == "remove" else 3)

        def gap_of(above: str, below: str | None, tilt: float) -> float:
            desk.asked.append(("gap", above, below, tilt))
            return gap

        fourier = SimpleNamespace(
            compose=compose,
            deviation=deviation_of,
            best_tilt=lambda parts, _: proved[parts][1],
        )
        monkeypatch.setattr(_solve, "_Plan", lambda _, tail: desk.asked.append(tail) or desk)
        monkeypatch.setattr(_solve, "_fourier", fourier)
        monkeypatch.setattr(_solve, "_gap", gap_of)
        monkeypatch.setattr(_solve, "_variation", lambda _: variation)
        monkeypatch.setattr(_solve, "_least_epsilon", lambda parts, _: proved[parts])
        monkeypatch.setattr(_solve, "_proved_delta", lambda parts, _t, _e: proved[parts][0])
        return desk

    return build


NONE: list = []  # what is asked of a source is put in, so that none is needed


def test_the_ends_of_epsilon_by_the_worse_direction(stage: Callable[..., Desk]) -> None:
    """1e-4 of δ for the tails; a width predicted within .6 of 1 % of ε, and then the width.

    The other direction needs no transform while its moments prove less.
    """
    desk = stage(
        proved={"remove": (2.0, 4.0), "add": (1.0, 8.0)},
        curves={"remove": [1.5], "below": [1.4]},
    )
    assert _solve.epsilon_interval(NONE, 1e-3) == (1.4, 1.5)
    assert desk.asked == [
        pytest.approx(1e-7),
        ("below", 0, 4.0),
        ("gap", "remove", "below", 4.0),
        ("wide", 0.05 / 4.0, pytest.approx(0.6 * 0.02)),
        ("compose", "remove", 4.0),
        ("compose", "below", 4.0),
        ("wide", pytest.approx(0.1), pytest.approx(0.015)),
    ]
    # A thousandth of the deviation is enough where ε is small against it.
    desk = stage(
        proved={"remove": (2.0, 4.0), "add": (2.5, 8.0)},
        curves={"add": [1.5], "remove": [1.2], "below": [None]},
        deviation=100.0,
    )
    assert _solve.epsilon_interval(NONE, 1e-3) == (0.0, 1.5)
    assert desk.asked[1:4] == [
        ("below", 1, 8.0),
        ("gap", "add", "below", 8.0),
        ("wide", 0.05 / 8.0, pytest.approx(0.6 * 0.3)),
    ]
    assert desk.asked[-1] == ("wide", 1.5, pytest.approx(0.3))


@pytest.mark.parametrize(
    ("remove", "add", "curves", "high"),
    [
        (2.0, 1.5, {"remove": [1.5], "add": [1.3]}, 1.5),  # the other one is looked at, and less
        (2.0, 1.8, {"remove": [1.5], "add": [1.6]}, 1.6),
        (2.0, 1.8, {"remove": [1.5], "add": [1.9]}, 1.8),  # its moments prove more
        (2.0, 1.8, {"remove": [1.5], "add": [None]}, 1.8),
        (2.0, 1.8, {"remove": [2.5]}, 2.0),
        (2.0, 2.0, {"remove": [1.9], "add": [1.7]}, 1.9),
        (-1.0, -2.0, {"remove": [0.0]}, 0.0),
        (-1.0, -2.0, {"remove": [0.5]}, 0.0),
    ],
)
def test_the_upper_end_of_epsilon_is_that_of_both_directions(
    remove: float, add: float, curves: dict, high: float, stage: Callable[..., Desk]
) -> None:
    """Without a measure below the lower end is 0, and there is no second round."""
    proved = {"remove": (remove, 4.0), "add": (add, 8.0)}
    stage(proved=proved, curves={**curves, "below": []}, below=None, rounds=2)
    assert _solve.epsilon_interval(NONE, 1e-3) == (0.0, high)
    assert not any(curves.values())


def test_rounds_of_epsilon_keep_the_best_ends(stage: Callable[..., Desk]) -> None:
    """A grid that is predicted too wide is not transformed; later ends are not worse."""
    proved = {"remove": (2.0, 4.0), "add": (1.0, 8.0)}
    stage(
        proved=proved,
        curves={"remove": [1.7, 1.6, 1.65], "below": [1.2, 1.4, 1.3]},
        rounds=4,
        wide=(True, False, True, False, True, False, False),
    )
    assert _solve.epsilon_interval(NONE, 1e-3) == (1.4, 1.6)
    desk = stage(
        proved=proved,
        curves={"remove": [None, 1.6], "below": [1.5]},
        rounds=5,
        coarse=(True,),
    )
    assert _solve.epsilon_interval(NONE, 1e-3) == (1.5, 1.6)
    assert desk.rounds == 3
    stage(proved=proved, curves={"remove": [None], "below": []}, rounds=5)
    assert _solve.epsilon_interval(NONE, 1e-3) == (0.0, 2.0), "as large as moments prove"
    proved = {"remove": (-2.0, 4.0), "add": (-3.0, 8.0)}
    stage(proved=proved, curves={"remove": [None], "below": []}, rounds=5)
    assert _solve.epsilon_interval(NONE, 1e-3) == (0.0, 0.0)
    desk = stage(proved=proved, curves={}, variation=1e-3)
    assert _solve.epsilon_interval(NONE, 1e-3) == (0.0, 0.0)
    assert desk.asked == []


def test_the_ends_of_delta(stage: Callable[..., Desk]) -> None:
    """Both directions; the tails follow 5e-6 of what is proved; a ratio of 1.05 is the aim."""
    desk = stage(
        proved={"remove": (2e-3, 4.0), "add": (1e-3, 8.0)},
        curves={"remove": [1.5e-3], "add": [1.6e-3], "below": [9e-4]},
        lower=(True, False),
        rounds=2,
    )
    assert _solve.delta_interval(NONE, 1.0) == (9e-4, 1.5e-3)
    goal = math.log(1.05)
    assert desk.asked == [
        1e-12,
        ("lower", pytest.approx(0.05 * 1e-4 * 2e-3)),
        ("lower", pytest.approx(0.05 * 1e-4 * 2e-3)),
        ("below", 0, 4.0),
        ("gap", "remove", "below", 4.0),
        ("wide", 0.05, pytest.approx(0.6 * goal)),
        ("compose", "remove", 4.0),
        ("compose", "add", 8.0),
        ("compose", "below", 4.0),
        ("wide", pytest.approx(math.log(1.5e-3 / 9e-4)), pytest.approx(goal)),
    ]
    desk = stage(
        proved={"remove": (1e-3, 4.0), "add": (2e-3, 8.0)},
        curves={"remove": [None], "add": [1.6e-3], "below": [None]},
    )
    assert _solve.delta_interval(NONE, 1.0) == (0.0, 1.6e-3)
    assert desk.asked[2:4] == [("below", 1, 8.0), ("gap", "add", "below", 8.0)]
    assert desk.asked[-1] == ("wide", math.inf, pytest.approx(goal))


def test_rounds_of_delta_keep_the_best_ends(stage: Callable[..., Desk]) -> None:
    proved = {"remove": (2e-3, 4.0), "add": (2e-3, 8.0)}
    stage(
        proved=proved,
        curves={"remove": [1.7e-3, 1.6e-3], "add": [1e-3, 1.65e-3], "below": [1e-3, 9e-4]},
        rounds=3,
        wide=(True, False, True, False, False),
    )
    assert _solve.delta_interval(NONE, 1.0) == (1e-3, 1.65e-3)
    desk = stage(
        proved=proved,
        curves={"remove": [None, 1e-3], "add": [1e-3, 1e-3], "below": [9e-4]},
        rounds=5,
        coarse=(True,),
    )
    assert _solve.delta_interval(NONE, 1.0) == (9e-4, 1e-3)
    assert desk.rounds == 3
    stage(proved=proved, curves={"remove": [None], "add": [1e-3], "below": []}, below=None)
    assert _solve.delta_interval(NONE, 1.0) == (0.0, 2e-3)
    stage(proved=proved, curves={"remove": [3e-3], "add": [1e-3], "below": []}, below=None)
    assert _solve.delta_interval(NONE, 1.0) == (0.0, 2e-3)
    stage(proved=proved, curves={"remove": [1.0], "add": [1.0]}, rounds=0, variation=0.3)
    assert _solve.delta_interval(NONE, 1.0) == (0.0, 0.3)
    stage(proved=proved, curves={"remove": [1.0], "add": [1.0]}, rounds=0, variation=3.0)
    assert _solve.delta_interval(NONE, 1.0) == (0.0, 1.0)
    # A δ of 1e-290 is not refined any more, and its tails are those of 1e-299.
    least = {"remove": (1e-295, 4.0), "add": (1e-296, 8.0)}
    desk = stage(
        proved=least,
        curves={"remove": [1e-295], "add": [1e-296], "below": [0.0]},
        rounds=5,
        wide=(False, True),
    )
    assert _solve.delta_interval(NONE, 1.0) == (0.0, 1e-295)
    assert desk.asked[1] == ("lower", 1e-299)
    assert desk.rounds == 4


def test_points_of_curves_in_both_directions(stage: Callable[..., Desk]) -> None:
    """Within 1 % of ε or of a tenth of the deviation; where none fits, that δ(0) is at most 1."""
    desk = stage(
        proved={"remove": (2.0, 4.0), "add": (1.0, 8.0)},
        curves={"remove": [0.1, 0.3], "add": [0.2, 0.4]},
        rounds=3,
        wide=(True, False),
    )
    (one, _), (two, second) = _solve.upper_points(NONE, 1e-3)
    assert (one.tolist(), two.tolist(), second.tolist()) == ([0.1], [0.2], [True])
    assert desk.asked[0] == pytest.approx(1e-7)
    assert desk.asked[3] == ("wide", 0.05 / 4.0, pytest.approx(0.6 * 0.02))
    assert desk.asked[-2:] == [("compose", "remove", 4.0), ("compose", "add", 8.0)]
    desk = stage(
        proved={"remove": (2.0, 4.0), "add": (2.5, 8.0)},
        curves={"remove": [None, None], "add": [0.2, 0.4]},
        deviation=100.0,
        rounds=3,
        coarse=(True, False),
    )
    (one, first), (two, _) = _solve.upper_points(NONE, 1e-3)
    assert (one.tolist(), first.tolist(), two.tolist()) == ([0.0], [1.0], [0.4])
    assert desk.asked[1] == ("below", 1, 8.0)
    assert desk.asked[3] == ("wide", 0.05 / 8.0, pytest.approx(0.6 * 0.01 * 30))
    stage(proved={}, curves={}, rounds=0)
    for epsilons, deltas in _solve.upper_points(NONE, 1e-3):
        assert (epsilons.tolist(), deltas.tolist()) == ([0.0], [1.0])


# --- bounds around them


def level(*values: float) -> _solve.Source:
    """Profiles of both directions that are constant."""
    remove, add = (lambda e, v=v: np.full(e.shape, v) for v in (values[0], values[-1]))
    return _solve.Source((remove, add), None)


def test_one_release_needs_no_grid() -> None:
    """The larger direction at each end, at most 1; more than one release is on the grid."""
    assert _solve._is_single([(level(0.1), 1)])
    assert not _solve._is_single([(level(0.1), 2)])
    assert not _solve._is_single([(level(0.1), 1), (level(0.2), 1)])
    assert _solve._single_delta([(level(0.2, 0.3), 1)], 1.0) == (0.0, 0.3)
    assert _solve._single_delta([(level(0.3, 0.2), 1)], 1.0) == (0.0, 0.3)
    assert _solve._single_delta([(level(1.5), 1)], 1.0) == (0.0, 1.0)
    pair = SampledPair(1.0, 0.3)
    source = _solve.sampled_source(SampledPair(0.9, 0.3), pair)
    low, high = _solve._single_delta([(source, 1)], 0.1)
    true = [float(DELTAS["remove"](mu, 0.3, 0.1)) for mu in (0.9, 1.0)]
    assert (low, high) == pytest.approx(true, rel=1e-9)
    assert _solve.delta_interval([(source, 1)], 0.1) == (low, high)
    ends = _solve.epsilon_interval([(source, 1)], 1e-3)
    for mu, end in zip((0.9, 1.0), ends, strict=True):
        assert float(DELTAS["remove"](mu, 0.3, end)) == pytest.approx(1e-3, rel=1e-7)


def test_total_variations_add_up() -> None:
    found = _solve._variation([(level(0.2, 0.5), 3), (level(0.05), 1)])
    assert found == pytest.approx(0.65 * (1 + 1e-12), rel=1e-15, abs=0)
    assert _solve.epsilon_interval([(level(0.2), 3)], 0.6 * (1 + 2e-12)) == (0.0, 0.0)


PART = (_grid.Measure(0.25, -4, np.array([0.2, 0.1, 0.0, 0.1, 0.3, 0.2, 0.1]), 1e-4, 0.5), 3)
OTHER = (_grid.Measure(0.25, -2, np.array([0.5, 0.1, 0.4]), 0.0, 0.25), 2)


def test_a_moment_is_raised_by_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen units a release, four of the tilted loss, and one for each two terms; 1e-12.

    Bounds of ε take it over the tilt, bounds of δ and 1e-12 of the exponents besides; the mass of
    the infinite loss is apart.
    """
    monkeypatch.setattr(_solve, "_EPS", 1e-4)
    parts = [PART, OTHER]
    moved = 1e-4 * 5 * (16 + 4 * 3.0 * 4 * 0.25 + 4) + 1e-12
    assert _solve._rounding(parts, 3.0) == pytest.approx(moved, rel=1e-12, abs=0)
    right = [(dataclasses.replace(PART[0], first=2), 1)]
    moved_right = 1e-4 * (16 + 4 * 3.0 * 8 * 0.25 + 8) + 1e-12
    assert _solve._rounding(right, 3.0) == pytest.approx(moved_right, rel=1e-12, abs=0)
    infinite = _fourier.infinite_mass(parts)
    exponent = float(_fourier.log_deltas(parts, np.array([3.0]), 2.0)[0])
    expected = math.exp(exponent + moved + 1e-12 * 7) + infinite
    assert _solve._proved_delta(parts, 3.0, 2.0) == pytest.approx(expected, rel=1e-13, abs=0)
    assert _solve._proved_delta(parts, 60.0, 0.0) == 1.0
    epsilon, tilt = _solve._least_epsilon(parts, 0.01)
    proved, best = _fourier.chernoff_epsilon(parts, 0.01 - infinite)
    assert tilt == best
    assert epsilon == pytest.approx(proved + _solve._rounding(parts, best) / best, rel=1e-13)
    vacuous = (math.inf, _fourier.chernoff_epsilon(parts, 1e-4)[1])
    assert _solve._least_epsilon(parts, 1e-4) == vacuous
    assert _solve._least_epsilon(parts, infinite)[0] == math.inf
    monkeypatch.setattr(_solve, "_EPS", 0.0)
    assert _solve._rounding(parts, 3.0) == 1e-12
    expected = math.exp(exponent + 1e-12 + 1e-12 * 7) + infinite
    assert _solve._proved_delta(parts, 3.0, 2.0) == pytest.approx(expected, rel=1e-15, abs=0)


def test_the_cost_of_a_grid_is_the_gap_of_moments() -> None:
    """Offsets of the measures below count; without them, what twice the step would cost."""
    above, below = [PART], [OTHER]
    at = np.array([2.0])
    top, floor = (float(_fourier.log_moments(parts, at)[0]) for parts in (above, below))
    expected = top - (floor + 2.0 * 2 * 0.25)
    assert _solve._gap(above, below, 2.0) == pytest.approx(expected, rel=1e-12, abs=0)
    assert _solve._gap(above, None, 2.0) == _fourier.coarser_gain(above, 2.0)
    empty = [(_grid.Measure(0.25, 0, np.zeros(1)), 1)]
    assert _solve._gap(above, empty, 2.0) == math.inf


# --- the next grid


@pytest.fixture
def reaches(monkeypatch: pytest.MonkeyPatch) -> list:
    """Ends of grids that are put in, by δ(0) of a source; what was asked for them is kept."""
    asked = []

    def reach(profiles: tuple, tail: float, start: float) -> float:
        end = 40 * float(profiles[0](np.zeros(1))[0])
        asked.append((tail, start))
        return end

    monkeypatch.setattr(_grid, "reach", reach)
    return asked


def test_the_first_grid_suits_gaussian_losses(reaches: list) -> None:
    """A Gaussian of δ(0) = v has a deviation of 2.5 v/(1-v), or a sixth of its reach.

    .3 of the root mean square, but no more than 2048 points of the widest, and steps up to 500.
    """
    sources = [(level(0.2), 3), (level(0.5), 1)]
    plan = _solve._Plan(sources, 1e-5)
    assert reaches == [(pytest.approx(2.5e-6), 0.2), (pytest.approx(2.5e-6), 0.5)]
    first, second = min(2.5 * 0.2 / 0.8, 8 / 6), min(2.5 * 0.5 / 0.5, 20 / 6)
    fine = 0.3 * math.sqrt((3 * first**2 + second**2) / 4)
    assert plan._step == pytest.approx(fine, rel=1e-12, abs=0)
    plan = _solve._Plan([(level(0.9), 2)], 1e-5)
    assert plan._step == pytest.approx(0.3 * 36 / 6, rel=1e-12, abs=0)
    reaches.clear()
    plan = _solve._Plan([(level(1e-14), 4)], 0.0)
    assert reaches == [(1e-299, 1e-12)]
    plan = _solve._Plan([(level(1e-3), 10**6), (level(0.75), 1)], 1e-5)
    assert plan._step == 30.0 / 2048
    plan = _solve._Plan([(level(1.0), 1)], 1e-5)  # δ(0) = 1: no deviation by that rule
    assert plan._step == pytest.approx(0.3 * 40 / 6, rel=1e-12, abs=0)
    plan = _solve._Plan([(level(300.0), 1)], 1e-5)
    assert plan._step == pytest.approx(500.0)


def test_tails_are_lowered_when_a_hundredth_is_asked_for(reaches: list) -> None:
    plan = _solve._Plan([(level(0.2), 4)], 1e-5)
    reaches.clear()
    assert not plan.lower_tail(1.01e-7)
    assert reaches == []
    assert plan.lower_tail(0.99e-7)
    assert reaches == [(pytest.approx(0.99e-7 / 4), 0.2)]
    assert not plan.lower_tail(0.99e-7)


def test_a_width_falls_with_the_square_of_the_step(reaches: list) -> None:
    """Then .9 of the step that would do; at most halved three times, at least once."""
    plan = _solve._Plan([(level(0.2), 4)], 1e-5)
    for width, factor in ((0.16, 0.9 * 0.25), (0.012, 0.5), (100.0, 0.125), (0.0324, 0.5)):
        step = plan._step
        assert plan.too_wide(width, 0.01)
        assert plan._step == pytest.approx(step * factor, rel=1e-12, abs=0)
    assert not plan.too_wide(0.01, 0.01)
    assert not plan.too_wide(0.001, 0.01)
    assert not plan.too_wide(math.nan, 0.01)
    assert len(reaches) == 1


def test_the_finest_grid_is_that_of_the_page(reaches: list) -> None:
    """2^18 points of a release, 2^26 of all transforms together; then the width stays."""
    assert (_solve._MAX_HALF, _solve._MAX_WORK, _solve._ROUNDS) == (2**18, 2**26, 16)
    for sources, finest in (
        ([(level(0.2), 4)], 8 / 2**18),
        ([(level(0.2), 4)] * 2**9, 8 * 2**9 / 2**26),
    ):
        plan = _solve._Plan(sources, 1e-5)
        while plan.too_wide(1e9, 0.01):
            assert plan._step >= finest
        assert plan._step == pytest.approx(finest, rel=1e-12, abs=0)
        plan._step = 1.02 * finest
        assert plan.too_wide(1e9, 0.01)
    assert reaches


def test_a_sum_that_does_not_fit_gets_a_grid_four_times_as_coarse(reaches: list) -> None:
    plan = _solve._Plan([(level(0.2), 4)], 1e-5)
    step = plan._step
    assert plan.coarsen()
    assert plan._step == 4 * step
    assert not plan.too_wide(1e9, 0.01), "and no finer one after it"
    plan._step = 200.0
    assert plan.coarsen()
    assert plan._step == 500.0
    assert not plan.coarsen()
    assert reaches


def test_grids_hold_the_reach_of_each_release(
    reaches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One point more, at least two; sixteen tries; none where 2^19 points do not hold it."""
    monkeypatch.setattr(_grid, "above", lambda profiles, step, half: (half, (profiles, step)))
    sources = [(level(0.2), 4), (level(1e-3), 7)]
    plan = _solve._Plan(sources, 1e-5)
    plan._step = 0.3
    grid = plan.build()
    step = math.floor(0.3 * 2**21) / 2**21
    assert (grid.step, grid.halves) == (step, [28, 2])
    assert grid.above[0] == [(28, 4), (2, 7)]
    assert grid.above[1] == [
        ((sources[0][0].profiles, step), 4),
        ((sources[1][0].profiles, step), 7),
    ]
    plan._step = 4.0  # 8 / 4 is exact: the end itself is a point
    assert plan.build().halves == [3, 2]
    assert [plan.build() is None for _ in range(15)] == [False] * 14 + [True]
    plan = _solve._Plan(sources, 1e-5)
    plan._step = 8 / 2**19
    assert plan.build() is not None
    plan._step = 8 / 2**19 * (1 - 1e-5)
    assert plan.build() is None
    assert plan.below(grid, 0, 1.0) is None
    assert reaches


def test_measures_below_are_on_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_grid, "below", lambda *args: args)
    pairs = SampledPair(1.0, 0.3), SampledPair(2.0, 0.1)
    sources = [
        (_solve.sampled_source(pair, pair), n) for pair, n in zip(pairs, (2, 5), strict=True)
    ]
    plan = _solve._Plan(sources, 1e-5)
    grid = SimpleNamespace(step=0.5, halves=[7, 9])
    assert plan.below(grid, 1, 3.0) == [
        ((pairs[0], "add", 0.5, 7, 3.0), 2),
        ((pairs[1], "add", 0.5, 9, 3.0), 5),
    ]
    assert plan.below(grid, 0, 3.0)[0][0][1] == "remove"


@pytest.mark.parametrize("step", [0.3, 1e-7, 499.99, 2.0**-30, 1.0])
def test_steps_have_twenty_bits(step: float) -> None:
    """So that multiples are exact; cut, and not rounded up."""
    found = _solve._short(step)
    assert found <= step < found * (1 + 2**-19)
    scaled = found / 2.0 ** (math.floor(math.log2(found)) - 19)
    assert scaled == int(scaled)
    assert 2**19 <= scaled < 2**20


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.5, 0.5], [5e-324, 0.9]])
def test_a_profile_may_return_what_is_a_delta(values: list[float]) -> None:
    """As a list too; one profile for both directions stays one, and is asked once."""
    source = _solve.profiled_source(lambda _: values, lambda _: values[::-1], "Told")
    assert source.profiles[0](np.zeros(2)).tolist() == values
    assert source.profiles[1](np.zeros(2)).tolist() == values[::-1]
    assert source.pair is None

    def same(epsilons: np.ndarray) -> np.ndarray:
        return np.zeros(epsilons.shape)

    both = _solve.profiled_source(same, same, "Told").profiles
    assert both[0] is both[1]


@pytest.mark.parametrize(
    "values", [[0.5, 1 + 2**-52], [-5e-324, 0.5], [math.nan, 0.5], [0.5], [[0.5, 0.5]], [2.0, 0.1]]
)
def test_a_profile_that_returns_something_else_is_refused(values: list) -> None:
    source = _solve.profiled_source(lambda _: values, lambda _: values, "Told")
    with pytest.raises(ConvergenceError, match="A profile of Told must return δ in"):
        source.profiles[0](np.zeros(2))
