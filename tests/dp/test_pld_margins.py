"""Margins of the loss accountant, each apart: the unit roundoff is large enough to be seen.

In double precision one margin covers for the next, so that none could be missed. Here the unit is
set to 1e-3 or so, and what comes out is compared with the bound put together again from its proof
(docs/theory/pld.md), in sums written out: neither a smaller nor a larger margin passes.
"""

import math
from collections.abc import Sequence

import mpmath as mp
import numpy as np
import pytest
from pld_oracle import cdf

from lora_privacy.dp import _fourier, _gaussian, _profiles, _replaced
from lora_privacy.dp._fourier import Curve
from lora_privacy.dp._grid import Measure
from lora_privacy.dp._profiles import SampledPair
from lora_privacy.dp._replaced import ReplacedPair

Parts = Sequence[tuple[Measure, int]]
UNIT = 1e-3

# --- a curve: ε and δ between its points


def between(curve: Curve, k: int, delta: float) -> float:
    """Where the line in e^ε from point k to k + 1 passes ``delta``."""
    left, right = (math.exp((curve.first + i) * curve.step + curve.shift) for i in (k, k + 1))
    share = (curve.deltas[k] - delta) / (curve.deltas[k] - curve.deltas[k + 1])
    return math.log((1 - share) * left + share * right)


@pytest.mark.parametrize(("first", "shift"), [(4, 0.5), (-2, 3.5), (12, -0.5)])
@pytest.mark.parametrize("upper", [True, False])
def test_an_epsilon_is_moved_by_the_rounding_of_its_place(
    first: int, shift: float, upper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four units of the crossing, and eight of the shift and the longest way to a point."""
    monkeypatch.setattr(_fourier, "_EPS", UNIT)
    curve = Curve(0.25, first, np.array([0.5, 0.3, 0.1]), upper, shift)
    sign = 1 if upper else -1
    slack = 8 * UNIT * (abs(shift) + (abs(first) + 3) * 0.25)
    for k, delta in ((0, 0.4), (0, 0.35), (1, 0.2)):
        expected = between(curve, k, delta) * (1 + 4 * sign * UNIT) + sign * slack
        assert curve.epsilon(delta) == pytest.approx(expected, rel=1e-12, abs=0)
    if not upper:  # ε is larger than that of the last point, which is all that is known
        last = (first + 2) * 0.25 + shift
        expected = last * (1 - 4 * UNIT) - slack
        assert curve.epsilon(0.05) == pytest.approx(expected, rel=1e-12, abs=0)


def test_a_curve_is_crossed_at_its_last_run_of_allowed_points() -> None:
    """Rounding may leave a bump: an upper end is to its right, and a point itself is allowed."""
    upper, lower = (Curve(1.0, 0, np.array([0.5, 0.05, 0.3, 0.1, 0.02]), s) for s in (True, False))
    for curve in (upper, lower):
        assert curve.epsilon(0.2) == pytest.approx(between(curve, 2, 0.2), rel=1e-12, abs=0)
        assert curve.epsilon(0.1) == pytest.approx(3.0, rel=1e-12, abs=0)
        assert curve.epsilon(0.02) == pytest.approx(4.0, rel=1e-12, abs=0)
    assert upper.epsilon(0.5) == 0.0
    assert upper.epsilon(0.01) == math.inf
    assert lower.epsilon(0.5) == 0.0
    assert Curve(0.25, -9, np.array([0.5, 0.3]), True).epsilon(0.4) == 0.0
    assert Curve(0.25, -9, np.array([0.5, 0.3]), True).epsilon(0.6) == 0.0
    assert Curve(0.25, -9, np.array([0.5, 0.3]), False).epsilon(0.4) == 0.0


@pytest.mark.parametrize("unit", [0.0, UNIT])
@pytest.mark.parametrize("upper", [True, False])
def test_a_delta_is_moved_by_the_rounding_of_its_place(
    upper: bool, unit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-9 of a cell, and eight units of the shift and of ε; never beyond the ends of the cell."""
    monkeypatch.setattr(_fourier, "_EPS", unit)
    deltas, shift = np.array([0.5, 0.3, 0.1]), -0.5
    curve, sign = Curve(0.25, 4, deltas, upper, shift), 1 if upper else -1
    for k, part in ((0, 0.4), (1, 0.5)):
        epsilon = (4 + k + part) * 0.25 + shift
        share = math.expm1(part * 0.25) / math.expm1(0.25)
        share -= sign * (1e-9 + 8 * unit * (abs(shift) + epsilon) / 0.25)
        expected = (1 - share) * deltas[k] + share * deltas[k + 1]
        assert curve.delta(epsilon) == pytest.approx(expected, rel=1e-12, abs=0)
    low, high = 0.5, 0.999 * 0.25 + 0.5
    if unit:
        assert curve.delta(low if upper else high) == (0.5 if upper else 0.3)
    assert curve.delta(0.49) == (1.0 if upper else 0.5)
    assert curve.delta(0.5 * 3) == (0.1 if upper else 0.0)
    assert curve.delta(1.0) == (0.1 if upper else 0.0)


def test_points_are_those_at_epsilon_from_zero_on() -> None:
    epsilons, deltas = Curve(0.25, -2, np.array([0.9, 0.8, 0.7, 0.6]), True, 0.0).points()
    assert epsilons.tolist() == [0.0, 0.25]
    assert deltas.tolist() == [0.7, 0.6]
    epsilons, deltas = Curve(0.5, -2, np.array([0.9, 0.8, 0.7]), True, 0.25).points()
    assert epsilons.tolist() == [0.25]
    assert deltas.tolist() == [0.7]


# --- sums of losses

STEP = 0.25
PARTS = [
    (Measure(STEP, -2, np.array([0.1, 0.25, 0.3, 0.2, 0.1]), 0.002), 2),
    (Measure(STEP, -3, np.array([0.05, 0.1, 0.3, 0.2, 0.2, 0.1, 0.04]), 0.001, 0.125), 1),
]
NARROW = [(Measure(STEP, 5, np.array([0.7])), 3)]  # a single loss, without spread
LONG = [(Measure(STEP, -3, np.array([0.2, 0.1, 0.3, 0.2, 0.1, 0.05]), 1e-4), 30)]


def log_moment(parts: Parts, tilt: float) -> float:
    """Σ count log Σ mass e^{tilt·loss}, offsets left out."""
    return math.fsum(
        count
        * math.log(
            math.fsum(
                mass * math.exp(tilt * part.step * (part.first + i))
                for i, mass in enumerate(part.masses.tolist())
            )
        )
        for part, count in parts
    )


def log_peak(tilt: float) -> float:
    """Largest of e^{-λy}(1 - e^{-y}), which is at e^{-y} = λ/(1+λ)."""
    with mp.workdps(50):
        lam = mp.mpf(tilt)
        return float(mp.log(lam / (1 + lam)) * lam + mp.log(1 / (1 + lam))) if tilt else 0.0


def tilted(parts: Parts, tilt: float) -> tuple[np.ndarray, int]:
    """Masses of the tilted sum, of total 1, and its first index: direct convolution."""
    total, first = np.ones(1), 0
    for part, count in parts:
        weights = part.masses * np.exp(tilt * part.step * np.arange(part.first, part.last + 1))
        for _ in range(count):
            total, first = np.convolve(total, weights / weights.sum()), first + part.first
    return total, first


@pytest.mark.parametrize("parts", [PARTS, NARROW, LONG])
def test_moments_of_all_parts(parts: Parts) -> None:
    tilts = np.array([-3.0, 0.0, 0.5, 7.0])
    expected = [log_moment(parts, tilt) for tilt in tilts.tolist()]
    assert _fourier.log_moments(parts, tilts) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    beyond = _fourier.log_moments(parts, np.array([1e5]))
    assert beyond.tolist() == [math.inf]
    gap = [(Measure(1.0, -1, np.array([0.5, 0.0, 0.0, 0.5])), 1)]  # 0 times an overflow
    assert _fourier.log_moments(gap, np.array([500.0, 0.0])).tolist() == [math.inf, 0.0]


@pytest.mark.parametrize(
    ("tilts", "block", "calls"),
    [(3, 21, 1), (3, 20, 4), (3, 1, 4), (2, 14, 1), (2, 13, 3), (1, 6, 1)],
)
def test_moments_are_taken_in_blocks_of_memory(
    tilts: int, block: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tilts of seven losses are 21 numbers: they fit, or each tilt is taken alone."""
    asked, inner = [], _fourier.log_moments

    def counted(parts: Parts, some: np.ndarray) -> np.ndarray:
        asked.append(len(some))
        return inner(parts, some)

    monkeypatch.setattr(_fourier, "_BLOCK", block)
    monkeypatch.setattr(_fourier, "log_moments", counted)
    found = _fourier.log_moments(PARTS, np.arange(float(tilts)))
    expected = [log_moment(PARTS, tilt) for tilt in range(tilts)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert len(asked) == calls


def test_limits_of_memory_are_those_of_the_page() -> None:
    """A window of 2^20 points; work arrays of 16 MB."""
    assert _fourier.MAX_WINDOW == 2**20
    assert np.zeros(_fourier._BLOCK).nbytes == 16 * 2**20


def test_the_mass_of_the_infinite_loss() -> None:
    """Σ T ν_∞ Π M^T, M >= 1 the whole masses, and 1e-6 of it for rounding."""
    heavy = [(Measure(STEP, 0, np.array([0.9, 0.3]), 0.01), 3), (*PARTS[1][:1], 4)]
    expected = (3 * 0.01 + 4 * 0.001) * 1.21**3
    assert _fourier.infinite_mass(heavy) == pytest.approx(expected * (1 + 1e-6), rel=1e-12, abs=0)
    light = [(Measure(STEP, 0, np.array([0.5]), 0.01), 7)]
    assert _fourier.infinite_mass(light) == pytest.approx(0.07 * (1 + 1e-6), rel=1e-12, abs=0)
    endless = [(Measure(STEP, 0, np.array([2.0]), 1e-300), 10**4)]
    assert _fourier.infinite_mass(endless) > 1, "beyond double precision it counts as certain"


def test_offsets_and_deviations_add_up() -> None:
    """Offsets by count; variances by count, each of the law that the masses are in proportion."""
    assert _fourier.offsets(PARTS) == 0.125
    assert _fourier.offsets([(PARTS[1][0], 3), (PARTS[1][0], 2)]) == 0.625
    total, first = tilted(PARTS, 0.0)
    losses = STEP * (first + np.arange(len(total)))
    spread = math.sqrt(total @ losses**2 - (total @ losses) ** 2)
    assert _fourier.deviation(PARTS) == pytest.approx(spread, rel=1e-12, abs=0)
    light = Measure(STEP, 1, np.array([1e-5, 1e-5]))
    assert _fourier.deviation([(light, 4)]) == pytest.approx(STEP, rel=1e-12, abs=0)
    gone = Measure(1.0, 1000, np.ones(2))
    assert _fourier._variance(gone, -1.0) == 0.0, "all weights underflow"


@pytest.mark.parametrize("tilt", [0.0, 0.7, 3.0])
def test_the_cost_of_twice_the_step(tilt: float) -> None:
    """An odd loss goes to both neighbours so that Σ mass and Σ mass e^{-loss} stay as they are."""
    x = math.exp(STEP)
    # a + b = 1 and a x + b / x = 1, a to the loss below and b to the loss above.
    a = (1 - 1 / x) / (x - 1 / x)
    total = 0.0
    for part, count in PARTS:
        coarse = dict[int, float]()
        for i, mass in enumerate(part.masses.tolist(), part.first):
            shares = ((i - 1, a), (i + 1, 1 - a)) if i % 2 else ((i, 1.0),)
            for j, share in shares:
                coarse[j] = coarse.get(j, 0.0) + share * mass
        moment = math.fsum(mass * math.exp(tilt * STEP * i) for i, mass in coarse.items())
        total += count * math.log(moment)
    expected = total - log_moment(PARTS, tilt)
    assert _fourier.coarser_gain(PARTS, tilt) == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert _fourier.coarser_gain(PARTS, 1e4) > 0, "beyond double precision it is no NaN"


@pytest.mark.parametrize("parts", [PARTS, LONG])
def test_chernoff_takes_the_best_tilt_of_its_ladder(parts: Parts) -> None:
    """Tilts 2^-15 … 2^30 by factors of √2. Oracle: all of them, one by one."""
    tilts = [2.0 ** (k / 2) for k in range(-30, 61)]
    delta, epsilon = 1e-4, 1.2
    with np.errstate(over="ignore"):
        proved = {}
        for tilt in tilts:
            try:
                proved[tilt] = log_moment(parts, tilt) + log_peak(tilt)
            except OverflowError:
                continue
    best = min((value - math.log(delta)) / tilt for tilt, value in proved.items())
    found, tilt = _fourier.chernoff_epsilon(parts, delta)
    assert found == pytest.approx(best, rel=1e-12, abs=0)
    assert (proved[tilt] - math.log(delta)) / tilt == pytest.approx(best, rel=1e-12, abs=0)
    best = min(value - tilt * epsilon for tilt, value in proved.items())
    tilt = _fourier.best_tilt(parts, epsilon)
    assert proved[tilt] - tilt * epsilon == pytest.approx(best, rel=1e-12, abs=0)
    at = _fourier.log_deltas(parts, np.array([tilt, 0.0]), epsilon)
    assert at == pytest.approx([best, log_moment(parts, 0.0)], rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("best", [-15.0, -14.5, -3.0, 0.0, 0.5, 1.0, 1.5, 2.0, 7.5, 29.5, 30.0])
def test_the_search_of_a_tilt_finds_every_one(best: float) -> None:
    """Sixteen tilts, each sixth, and then at most eleven beside the best of them."""
    asked: list[float] = []

    def objective(tilts: np.ndarray) -> np.ndarray:
        asked.extend(tilts)
        return np.abs(np.log2(tilts) - best) + 3.0

    assert _fourier._least(objective) == (3.0, 2.0**best)
    assert len(asked) <= 16 + 11


def test_the_peak_of_a_chernoff_factor() -> None:
    tilts = [0.0, 1e-8, 0.3, 1.0, 40.0, 1e9]
    expected = [log_peak(tilt) for tilt in tilts]
    found = _fourier._log_peak(np.array(tilts))
    assert found == pytest.approx(expected, rel=1e-12, abs=0)


# --- the window


def window_of(parts: Parts, tilt: float, unit: float, tail: float) -> tuple:
    """Chernoff at twelve tilts λ ± θ; what a moment may be off by is paid for."""
    total, first = tilted(parts, tilt)
    losses = STEP * (first + np.arange(len(total)))
    deviation = math.sqrt(max(0.0, total @ (losses - total @ losses) ** 2))
    steps, longest = sum(n for _, n in parts), max(len(part.masses) for part, _ in parts)
    rounding = 1e-6 + unit * steps * (2 * longest + 2000)
    sides = {}
    for sign in (1, -1):
        for spread in (1, 2, 4, 6, 8, 12):
            theta = sign * spread / max(deviation, STEP)
            sides[theta] = log_moment(parts, tilt + theta) - log_moment(parts, tilt) + rounding
    high = min((gain - math.log(tail)) / theta for theta, gain in sides.items() if theta > 0)
    low = max((gain - math.log(tail)) / theta for theta, gain in sides.items() if theta < 0)
    start = math.floor(low / STEP) - 1
    needed = math.ceil(high / STEP) + 2 - start
    size = min(n for k in range(2, 22) for n in (2**k * 3, 2 ** (k + 2)) if n >= needed)
    end = start + size  # the first point beyond
    log_right = min(gain - theta * end * STEP for theta, gain in sides.items() if theta > 0)
    log_left = min(gain - theta * (start - 1) * STEP for theta, gain in sides.items() if theta < 0)
    return start, size, math.log(math.exp(log_right) + math.exp(log_left)), log_right


@pytest.mark.parametrize("unit", [2**-52, 1e-5])
@pytest.mark.parametrize("tail", [1e-9, 0.2])
@pytest.mark.parametrize("tilt", [0.0, 2.0])
@pytest.mark.parametrize("parts", [PARTS, NARROW, LONG])
def test_the_window_is_that_of_chernoff(
    parts: Parts, tilt: float, tail: float, unit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point more than needed on each side; at most the mass it states lies outside."""
    monkeypatch.setattr(_fourier, "_EPS", unit)
    monkeypatch.setattr(_fourier, "_TAIL", tail)
    expected = window_of(parts, tilt, unit, tail)
    first, size, log_outside, log_right = _fourier._window(parts, tilt)
    assert (first, size) == expected[:2]
    assert (log_outside, log_right) == pytest.approx(expected[2:], rel=1e-9, abs=0)
    total, start = tilted(parts, tilt)
    places = start + np.arange(len(total))
    right, left = total[places >= first + size].sum(), total[places < first].sum()
    assert right <= math.exp(log_right) <= tail
    assert right + left <= math.exp(log_outside) <= 2 * tail


def test_a_window_is_given_up_beyond_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The points that are needed count, not those of the next size of a transform."""
    first, _, _, _ = _fourier._window(PARTS, 0.0)
    needed = next(n for n in range(1000) if _allowed(n, monkeypatch))
    high_end = first + needed - 2
    monkeypatch.setattr(_fourier, "MAX_WINDOW", needed)
    assert _fourier._window(PARTS, 0.0) is not None
    monkeypatch.setattr(_fourier, "MAX_WINDOW", needed - 1)
    assert _fourier._window(PARTS, 0.0) is None
    # Losses end at 2·2 + 3 steps; Chernoff leaves 1e-9 a few steps further at most.
    assert 7 <= high_end <= 21
    assert _fourier._window([(Measure(1.0, 700, np.ones(2)), 1)], 1.5) is None, "overflow"


def _allowed(limit: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(_fourier, "MAX_WINDOW", limit)
    return _fourier._window(PARTS, 0.0) is not None


@pytest.mark.parametrize(("first", "size"), [(-7, 4), (-3, 16), (0, 8), (5, 3)])
def test_masses_are_folded_by_index(first: int, size: int) -> None:
    masses = np.arange(1.0, 12.0)
    expected = np.zeros(size)
    for i, mass in enumerate(masses.tolist(), first):
        expected[i % size] += mass
    assert _fourier._folded(masses, first, size).tolist() == expected.tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 12, 37, 1000])
def test_powers_are_taken_by_squaring(count: int) -> None:
    base = np.array([0.999 + 0.01j, 1.0, 0.5j])
    assert _fourier._power(base, count) == pytest.approx(base**count, rel=1e-11, abs=1e-300)


# --- the transform


def curve_of(
    parts: Parts, tilt: float, window: tuple, unit: float, cap: float, tiny: float, *, upper: bool
) -> np.ndarray:
    """δ at the points of ``window`` from a direct convolution, and all errors of the proof."""
    start, size, log_outside, log_right = window
    steps, kappa = sum(n for _, n in parts), 5 * unit * (math.log2(size) + 2)
    rho = 6 * unit * (steps + len(parts))  # powers by squaring, products
    modulus, most = np.ones(size // 2 + 1), np.ones(size // 2 + 1)
    drift = 0.0
    for part, count in parts:
        exponents = tilt * STEP * np.arange(part.first, part.last + 1)
        peak = max(0.0, exponents[-1] - cap)
        weights = part.masses * np.exp(exponents)
        mass = weights.sum()
        roots = np.exp(
            -2j * math.pi * np.outer(np.arange(size // 2 + 1), np.arange(len(weights))) / size
        )
        one = np.abs(roots @ weights) / mass
        modulus, most = modulus * one**count, most * (one + kappa) ** count
        relative = 8 + len(weights) / size + np.abs(exponents).max() + abs(math.log(mass) - peak)
        drift += count * unit * relative
    # |Π a - Π b| <= Π (|b| + κ) - Π |b|, both sides known to ρ; the inverse adds κ. Frequencies
    # up to half the size stand for their mirror images too.
    lost = most * (1 + rho) - modulus + rho * most + kappa * most
    noise = 2 * lost.sum() / size * (1 + 1e-6)
    total, first = tilted(parts, tilt)
    masses = np.zeros(size)
    for i, mass in enumerate(total.tolist(), first):
        masses[(i - start) % size] += mass
    log_scale, last = log_moment(parts, tilt), start + size - 1
    far = abs(log_scale) + tilt * STEP * max(abs(start), abs(last))
    factor = math.exp(drift + unit * (8 * size + 4 * far + 2 * cap))
    log_weights = [log_scale - tilt * STEP * n for n in range(start, last + 1)]
    sign = 1 if upper else -1
    found = []
    for n in range(size):
        profile = math.fsum(
            max(masses[m] + sign * noise, 0.0)
            * math.exp(min(log_weights[m], cap))
            * (1 - math.exp((n - m) * STEP))
            for m in range(n + 1, size)
        )
        if upper:
            beyond = math.exp(min(0.0, log_scale - tilt * STEP * last + log_right))
            apart = sum(count * part.infinite for part, count in parts) * (1 + 1e-6)
            for part, count in parts:
                apart *= max(1.0, part.masses.sum() + part.infinite) ** count
            value = profile * factor + beyond + apart + tiny if log_weights[n] <= cap else 1.0
        else:
            wrapped = math.exp(min(log_weights[n] + log_peak(tilt) + log_outside, cap))
            value = profile / factor - 1.01 * wrapped
        found.append(min(1.0, max(0.0, value)))
    return np.array(found)


@pytest.mark.parametrize(
    ("tilt", "cap", "window"),
    [
        (0.5, 650.0, (-7, 24, math.log(3e-3), math.log(2e-3))),
        (0.5, 650.0, (-5, 12, math.log(3e-3), math.log(2e-3))),
        (0.0, 650.0, (-6, 16, math.log(2e-2), math.log(1e-2))),
        (2.0, 1.2, (-9, 24, math.log(1e-3), math.log(1e-3))),
        (2.0, 0.4, (-4, 16, math.log(1e-3), math.log(1e-3))),
    ],
)
@pytest.mark.parametrize("upper", [True, False])
def test_each_error_of_the_transform_is_paid_for_once(
    tilt: float, cap: float, window: tuple, upper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that wrap around, a unit of 1e-6, and exponents that are cut off early."""
    unit, tiny = 1e-6, 1e-4
    for name, value in (("_EPS", unit), ("_CAP", cap), ("_TINY", tiny)):
        monkeypatch.setattr(_fourier, name, value)
    monkeypatch.setattr(_fourier, "_window", lambda *_: window)
    heavy = [(PARTS[0][0], 2), (Measure(STEP, -3, 1.3 * PARTS[1][0].masses, 0.001, 0.125), 1)]
    for parts in (PARTS, heavy):
        curve = _fourier.compose(parts, tilt, upper=upper)
        expected = curve_of(parts, tilt, window, unit, cap, tiny, upper=upper)
        assert curve.deltas == pytest.approx(expected, rel=1e-9, abs=1e-15)
        assert np.count_nonzero((expected > 0) & (expected < 1)) >= 3
        assert (curve.step, curve.first, curve.upper, curve.shift) == (
            STEP,
            window[0],
            upper,
            0.125,
        )


def test_an_error_beyond_double_precision_leaves_nothing_proved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Upper ends are 1 where there is any mass, lower ends 0."""
    monkeypatch.setattr(_fourier, "_EPS", 1e-6)
    monkeypatch.setattr(_fourier, "_CAP", 1e9)  # a factor of e^2000
    assert _fourier.compose(PARTS, 0.5, upper=True).deltas[:-1].min() == 1.0
    assert _fourier.compose(PARTS, 0.5, upper=False).deltas.max() == 0.0


# --- profiles of one release


def tails(tau: float, mu: float) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """Φ(-a), e^τ Φ(-b) and φ(a), a = τ/μ - μ/2 and b = a + μ."""
    with mp.workdps(40):
        a = mp.mpf(tau) / mp.mpf(mu) - mp.mpf(mu) / 2
        return cdf(-a), mp.exp(tau) * cdf(-a - mp.mpf(mu)), mp.npdf(a)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("mu", [0.3, 1.0, 4.0])
def test_a_difference_of_tails_is_moved_by_its_rounding(
    mu: float, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice sixteen units and four more for a tail, four of the exponent τ for the second.

    A place off by eight units of |τ|/μ + μ moves tails by the density. Beyond a = -1 it moves
    φ(a), a factor of both, by |a| as much; before, the tails themselves.
    """
    monkeypatch.setattr(_profiles, "_EPS", UNIT)
    monkeypatch.setattr(_profiles, "_TINY", 1e-3)
    ratios = (0.4, 1.0, 1.3)
    tau = mu * np.array([-3.0, -1.6, -0.7, 0.0, 0.3, 1.0, 2.5, 6.0]) + mu * mu / 2
    found = SampledPair(mu, 0.5)._differences(tau, tuple(np.array([r]) for r in ratios), sign)
    for k, at in enumerate(tau.tolist()):
        first, second, density = tails(at, mu)
        a, spread = at / mu - mu / 2, abs(at) / mu + mu
        for ratio, values in zip(ratios, found, strict=True):
            other = ratio * second
            error = (2 * 16 + 4) * (first + other) + 4 * abs(at) * other
            error += 8 * spread * density * (1 + ratio)
            error += 8 * spread * abs(a) * (abs(first - other) if a > -1 else first + other)
            expected = float(first - other + sign * (UNIT * error + mp.mpf(1e-3)))
            assert values[k] == pytest.approx(expected, rel=1e-11, abs=1e-14)


def test_lines_are_rounded_down_and_the_gaussian_both_ways(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Far out, where both tails underflow, 1e-300 is all that is left."""
    monkeypatch.setattr(_profiles, "_EPS", 0.0)
    pair, far = SampledPair(1.0, 1.0), np.array([200.0])
    assert pair.upper("remove", far).tolist() == [1e-300]
    assert pair.lower("remove", far).tolist() == [0.0]
    assert pair.lines(far, (np.ones(1),))[0].tolist() == [-1e-300]


def gaussian(tau: float, mu: float) -> float:
    """δ of N(μ, 1) against N(0, 1)."""
    first, second, _ = tails(tau, mu)
    return float(first - second)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("mu", "p"), [(0.5, 0.3), (2.0, 0.8), (1.0, 0.01)])
def test_a_sampled_profile_is_moved_by_the_rounding_of_its_factors(
    mu: float, p: float, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four units of p under remove. Under add four of p in w, which ends the loss, and eight.

    The Gaussian inside is put in exactly here.
    """
    monkeypatch.setattr(_profiles, "_EPS", UNIT)
    monkeypatch.setattr(_profiles, "_TINY", 1e-6)
    exact = np.vectorize(lambda tau: gaussian(tau, mu))
    monkeypatch.setattr(SampledPair, "_gaussian", lambda _self, tau, _sign: exact(tau))
    pair, last = SampledPair(mu, p), -math.log1p(-p)
    for epsilon in (0.0, 0.003, 0.3, 0.999, 1.0, 1.001, 3.0):
        found = pair._profile("remove", np.array([epsilon]), sign)[0]
        value = p * (1 + 4 * sign * UNIT) * gaussian(math.log1p(math.expm1(epsilon) / p), mu)
        assert found == pytest.approx(value + sign * 1e-6, rel=1e-10, abs=0)
    epsilons = [share * last for share in (0.0, 0.1, 0.4, 0.6, 0.9, 0.999, 1.0, 1.001, 1.01, 3.0)]
    for epsilon in [*epsilons, 39.9, 60.0, 800.0]:
        found = pair._profile("add", np.array([epsilon]), sign)[0]
        w = p * (1 + 4 * sign * UNIT) + math.expm1(-epsilon)
        if w <= 0:
            assert found == 0.0
            continue
        share = math.expm1(-epsilon) / p
        # While 1/2 of w is left its logarithm is that of the exact w; then that of the rounded.
        tau = -math.log1p(share) if share > -0.5 else max(0.0, -math.log(w / p))
        value = math.exp(epsilon) * w * gaussian(tau, mu) * (1 + 8 * sign * UNIT)
        assert found == pytest.approx(value + sign * 1e-6, rel=1e-9, abs=0)


def test_the_ratio_of_mills() -> None:
    x = np.array([-1.0, 0.0, 0.5, 3.0, 40.0])
    with mp.workdps(30):
        expected = [float(cdf(-mp.mpf(v)) / mp.npdf(mp.mpf(v))) for v in x.tolist()]
    assert _profiles.mills(x) == pytest.approx(expected, rel=1e-14, abs=0)


def rest(p: float, epsilon: float) -> mp.mpf:
    """The logarithm of d = (e^ε - 1)(1 - p)/p."""
    return mp.log(mp.expm1(mp.mpf(epsilon)) * (1 - mp.mpf(p)) / mp.mpf(p))


def half_log(mu: float, p: float, epsilon: float) -> mp.mpf:
    """The v with sinh v = d e^{μ²/2 - ε/2}/2."""
    return mp.asinh(mp.exp(rest(p, epsilon) + (mp.mpf(mu) ** 2 - mp.mpf(epsilon)) / 2) / 2)


EXCHANGES = [(0.3, 0.3), (1.0, 0.01), (2.5, 0.9), (8.0, 1e-6)]


@pytest.mark.parametrize(("mu", "p"), EXCHANGES)
def test_the_best_test_of_an_exchange(mu: float, p: float) -> None:
    """Its v and log d, to some units; d is 1 at ε = log 2 where p = 1/2."""
    epsilons = np.array([1e-12, 1e-3, 0.4, math.log(2), 0.999, 1.0, 3.0, 30.0, 300.0])
    with mp.workdps(60):
        logs = [float(rest(p, epsilon)) for epsilon in epsilons.tolist()]
        halves = [float(half_log(mu, p, epsilon)) for epsilon in epsilons.tolist()]
    assert _replaced._log_rest(p, epsilons) == pytest.approx(logs, rel=1e-14, abs=1e-15)
    assert _replaced._half_log(mu, p, epsilons) == pytest.approx(halves, rel=1e-13, abs=0)
    assert _replaced._log_rest(p, np.zeros(1)).tolist() == [-math.inf]
    assert _replaced._half_log(mu, p, np.zeros(1)).tolist() == [0.0]


@pytest.mark.parametrize(("mu", "p"), EXCHANGES)
def test_a_split_is_moved_by_the_rounding_of_its_parts(
    mu: float, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares up by eight units, ε down by four; log(d/(1-w)) down by sixteen of its parts.

    Below ε = 1 it is the logarithm of a ratio, beyond it is a difference of logarithms.
    """
    monkeypatch.setattr(_replaced, "_EPS", UNIT)
    epsilons = [1e-3, 0.4, 0.999, 1.0, 1.5, 4.0]
    found = _replaced.split(mu, p, np.array(epsilons))
    for k, epsilon in enumerate(epsilons):
        with mp.workdps(60):
            v, log_d = half_log(mu, p, epsilon), rest(p, epsilon)
            far, near = mp.exp(-2 * v), -mp.expm1(-2 * v)
            inner = log_d - mp.log(near)
            if epsilon < 1:
                inner -= 16 * mp.mpf(UNIT) * (1 + abs(inner))
            else:
                size = epsilon - mp.log(p) - mp.log(1 - mp.mpf(p)) - mp.log(near) + 1
                inner -= 16 * mp.mpf(UNIT) * size
            expected = [far * (1 + 8 * mp.mpf(UNIT)), (epsilon + 2 * v) * (1 - 4 * mp.mpf(UNIT))]
            expected += [near * (1 + 8 * mp.mpf(UNIT)), inner]
        parts = [found.far[k], found.far_epsilon[k], found.near[k], found.near_epsilon[k]]
        assert parts == pytest.approx([float(one) for one in expected], rel=1e-9, abs=1e-300)
    at_zero = _replaced.split(mu, p, np.zeros(1))
    assert at_zero.far.tolist() == [1 + 8 * UNIT]
    assert (at_zero.far_epsilon[0], at_zero.near[0], at_zero.near_epsilon[0]) == (0.0, 0.0, 0.0)


def test_numbers_that_leave_double_precision_are_taken_for_others() -> None:
    """A rate below 1e-200 for 1e-200, ε below 1e-80 for 0 and beyond 1e40 for 1e40."""

    def parts(p: float, epsilon: float) -> list[float]:
        one = _replaced.split(1.0, p, np.array([epsilon]))
        return [float(x[0]) for x in (one.far, one.far_epsilon, one.near, one.near_epsilon)]

    assert parts(1e-250, 1.0) == parts(1e-200, 1.0) != parts(1e-199, 1.0)
    assert parts(0.3, 0.9e-80) == parts(0.3, 0.0)
    assert parts(0.3, 1.1e-80)[1] >= 1.1e-80 * (1 - 1e-12)
    assert parts(0.3, 3e40) == parts(0.3, 1e40) != parts(0.3, 0.9e40)
    pair = ReplacedPair(1.0, 0.3)
    assert pair.lower("remove", np.array([1e40, 3e40])).tolist() == [0.0, 0.0]
    rare = ReplacedPair(1.0, 1e-250)
    assert rare.upper("remove", np.zeros(1)) >= 1e-200 * gaussian(0.0, 2.0)
    assert rare.lower("remove", np.zeros(1)) <= 1e-250 * gaussian(0.0, 2.0)


@pytest.mark.parametrize(("mu", "p"), EXCHANGES)
def test_lines_of_an_exchange_are_moved_by_the_rounding_of_their_weights(
    mu: float, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P(E) - e^x Q(E) at the test that is best at ε.

    Weights up by eight units of the terms of their logarithms; then three times sixteen for a
    tail, sixteen for its place, for φ(a) or the tails, and four for the rate.
    """
    monkeypatch.setattr(_replaced, "_EPS", UNIT)
    monkeypatch.setattr(_replaced, "_TINY", 1e-7)
    unit, tiny = mp.mpf(UNIT), mp.mpf(1e-7)
    epsilons = [0.1, 0.5, 1.2, 3.0]
    xs = [[0.0, 0.4, 1.1, 3.3], [0.2, 0.5, 1.4, 2.9]]
    found = ReplacedPair(mu, p).lines(np.array(epsilons), tuple(np.array(x) for x in xs))
    for k, epsilon in enumerate(epsilons):
        with mp.workdps(60):
            m, q = mp.mpf(mu), mp.mpf(p)
            log_ratio = epsilon + 2 * half_log(mu, p, epsilon)
            t = log_ratio / (2 * m)
            a, spread, density = t - m, t + m, mp.npdf(t - m)
            first = cdf(-a)
            for x, values in zip((x[k] for x in xs), found, strict=True):
                far = mp.exp(x - log_ratio + 8 * unit * (x + log_ratio))
                near = mp.mpf(0)
                if x > 0:
                    size = abs(rest(p, x)) + log_ratio + m * m - mp.log(q) - mp.log(1 - q)
                    near = mp.exp(rest(p, x) + (m * m - log_ratio) / 2 + 8 * unit * size)
                # e^x φ(t+μ) and d φ(t), over φ(a), are the weights of the two other tails.
                taken = density * far * cdf(-t - m) / mp.npdf(t + m)
                taken += density * near * cdf(-t) / mp.npdf(t)
                value = first - taken
                error = 48 * (first + taken) + 16 * spread * density * (1 + far + near)
                error += 16 * spread * abs(a) * (abs(value) if a > -1 else first + taken)
                value = q * (value - unit * error - tiny) * (1 - 4 * unit) - tiny
                assert values[k] == pytest.approx(float(value), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize(("mu", "p"), EXCHANGES)
def test_an_exchange_adds_up_its_two_parts(
    mu: float, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is p [w δ_G(·; 2μ) + (1-w) δ_G(·; μ)], eight units up, and at most 1."""
    epsilons = [0.0, 0.2, 1.0, 2.0]
    parts = _replaced.split(mu, p, np.array(epsilons))
    monkeypatch.setattr(_replaced, "_EPS", UNIT)
    monkeypatch.setattr(_replaced, "_TINY", 1e-6)
    monkeypatch.setattr(_replaced, "split", lambda *_: parts)
    found = ReplacedPair(mu, p).upper("remove", np.array(epsilons))
    for k, value in enumerate(found.tolist()):
        far = parts.far[k] * gaussian(parts.far_epsilon[k], 2 * mu)
        near = parts.near[k] * gaussian(parts.near_epsilon[k], mu)
        expected = min(1.0, p * (far + near) * (1 + 8 * UNIT) + 1e-6)
        assert value == pytest.approx(expected, rel=1e-9, abs=0)
    monkeypatch.setattr(_replaced, "_TINY", 2.0)
    assert ReplacedPair(mu, p).upper("remove", np.zeros(1)).tolist() == [1.0] * 4


# --- plain Gaussians, in closed form


@pytest.mark.parametrize("mu", [1e-3, 0.7, 20.0])
def test_a_false_negative_rate_is_lowered_by_its_rounding(mu: float) -> None:
    """1e-14 of the quantile, of 1 and of μ moves the tail; 1e-13 of it is taken off besides.

    Tails themselves are exact to some 1e-15, so that the margin is seen to 3 %.
    """
    for quantile in (37.0, 11.5, 3.1, 0.0):
        with mp.workdps(40):
            fpr, true = float(cdf(-mp.mpf(quantile))), cdf(quantile - mp.mpf(mu))
            hazard = mp.npdf(quantile - mp.mpf(mu)) / true
            margin = float(hazard * mp.mpf(1e-14) * (quantile + 1 + mu)) + 1e-13
        lost = 1 - _gaussian.trade_off(mu, np.array([fpr]))[0] / float(true)
        assert lost == pytest.approx(margin, rel=0.03, abs=8e-15)


def test_plain_ends_without_a_distance_are_idle() -> None:
    """An infinite upper μ proves nothing; δ is never below 0 or above 1."""
    assert _gaussian.delta_interval(1.0, math.inf, 0.5) == (0.0, 1.0)
    assert _gaussian.epsilon_interval(1.0, math.inf, 0.5) == (0.0, math.inf)
    low, high = _gaussian.delta_interval(0.5, 0.7, 0.3)
    assert (low, high) == pytest.approx((gaussian(0.3, 0.5), gaussian(0.3, 0.7)), rel=1e-12)
    assert _gaussian.delta_interval(1e-3, 1e-3, 5.0)[0] == 0.0
    assert _gaussian.delta_interval(1e-3, 1e-3, 5.0)[1] <= 1e-299
    assert _gaussian.delta_interval(300.0, 300.0, 0.0)[1] == 1.0
    low, high = _gaussian.epsilon_interval(0.5, 0.7, 1e-3)
    assert gaussian(low, 0.5) == pytest.approx(1e-3, rel=1e-9)
    assert gaussian(high, 0.7) == pytest.approx(1e-3, rel=1e-9)
    edges = _gaussian.trade_off(1.0, np.array([0.0, 1.0, math.nextafter(1.0, 0.0)]))
    assert edges[:2].tolist() == [1.0, 0.0]
    assert 0 <= edges[2] < 1e-14


@pytest.mark.parametrize("mu", [0.01, 1.0, 30.0])
def test_a_search_of_a_plain_epsilon_starts_beyond_it(
    mu: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """μ (μ/2 + 40): 40 deviations above the mean loss, where δ is below every double."""
    starts: list[float] = []
    inner = _gaussian.crossing

    def crossing(allowed: object, start: float) -> tuple[float, float]:
        starts.append(start)
        return inner(allowed, start)

    monkeypatch.setattr(_gaussian, "crossing", crossing)
    _gaussian.epsilon_interval(mu, mu, 1e-300)
    assert starts == pytest.approx([mu * mu / 2 + 40 * mu] * 2, rel=1e-12)


@pytest.mark.parametrize("root", [1e-30, 0.4, 0.999, 1.0, 700.0])
def test_bisection_ends_at_its_width(root: float) -> None:
    """The last pair is within 1e-13, the one before it was not."""
    asked: list[float] = []

    def allowed(epsilon: float) -> bool:
        asked.append(epsilon)
        return epsilon >= root

    low, high = _gaussian.crossing(allowed, 1.0)
    assert low < root <= high
    assert high - low <= 1e-13 * high < 2.1 * (high - low)
    assert len(asked) == len(set(asked))
