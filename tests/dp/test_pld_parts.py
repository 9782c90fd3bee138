"""The parts of the loss accountant, each against a definition that shares no code with it."""

import dataclasses
import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pld_oracle import DELTAS, addition_delta, cdf, measure_delta, removal_delta

from lora_privacy.dp import _fourier, _gaussian, _grid, _solve
from lora_privacy.dp._profiles import DIRECTIONS, Direction, SampledPair

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
