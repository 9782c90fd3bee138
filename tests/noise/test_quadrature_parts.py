"""The inversion integral of the entry law part by part: saddle, path, range, exponent, steps.

Any path through any point gives the same tail, so that a wrong part costs nodes and not digits.
Each part is held to what it is meant to be.
"""

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest

from lora_privacy.errors import ConvergenceError
from lora_privacy.noise import _quadrature
from lora_privacy.noise._quadrature import entry_tails

# Laws and places of all kinds: rank, ρ, x in standard deviations.
POINTS = [
    (1, 0.0, 0.5),
    (1, 0.3, -0.1),
    (2, -0.6, 1.7),
    (3, 0.9, -0.9),
    (8, 1 - 1e-9, -0.7),
    (64, 0.5, -3.0),
    (1000, -0.2, 6.0),
    (100_000, 0.99, -2.0),
    (8, 0.2, -12.0),
]
Array = np.ndarray


def place(rank: int, rho: float, z: float) -> float:
    return z * math.sqrt((1 + rho**2) / rank)


def watch(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """Record arguments and result of each call of a function of the module."""
    inner, seen = getattr(_quadrature, name), []

    def outer(*args: object, **options: object) -> object:
        result = inner(*args, **options)
        seen.append(((*args, *options.values()), result))
        return result

    monkeypatch.setattr(_quadrature, name, outer)
    return seen


@pytest.mark.parametrize(("rank", "rho", "z"), POINTS)
def test_the_path_starts_at_the_saddle(
    rank: int, rho: float, z: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start bisects a bracket of 130 in its logit 24 times; the curvature there is exact.

    Oracle: derivatives of ln(E[exp(sN')]/s) - s x by mpmath, from the definition
    N' = ((1+ρ)X - (1-ρ)Y)/2 - rρ, X, Y ~ χ²_r.
    """
    seen, x = watch(monkeypatch, "_trapezoid"), place(rank, rho, z)
    entry_tails(rank, rho, x)
    (k, p, at, start, gap, focus, curvature), _ = seen[0]
    with mp.workdps(40):
        half, r, a = mp.mpf(float(k[0])), mp.mpf(float(p[0])), mp.mpf(float(at[0]))

        def log_integrand(s: mp.mpf) -> mp.mpf:
            powers = mp.log(1 - (1 + r) * s) + mp.log(1 + (1 - r) * s)
            return -half * powers - 2 * half * (a + r) * s - mp.log(abs(s))

        s = mp.mpf(float(start[0]))
        cut = 1 / (1 + r) if s > 0 else 1 / (1 - r)
        logit = mp.log(abs(s)) - mp.log(cut - abs(s))
        slope = [
            mp.diff(log_integrand, mp.sign(s) * cut / (1 + mp.exp(-logit - shift)))
            for shift in (-mp.mpf(130) / 2**25, mp.mpf(130) / 2**25)
        ]
        assert slope[0] * slope[1] < 0
        second = mp.diff(log_integrand, s, 2)
        assert curvature[0] == pytest.approx(float(second), rel=1e-9, abs=0)
        assert gap[0] == pytest.approx(float(1 / (1 + r) - s), rel=1e-6, abs=0)
    # The path opens around the cut, or around the pole at 0.
    assert focus[0] == (gap[0] if start[0] > 0 else -start[0])


def test_the_saddle_is_halved_24_times(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch(monkeypatch, "_logistic")
    entry_tails(8, 0.3, [0.1, 0.2])
    assert len(seen) == 2 * 24 + 2


@pytest.mark.parametrize("rho", [0.0, 0.4, 1 - 1e-12])
def test_a_saddle_next_to_either_end(rho: float) -> None:
    """Where the tail is 1e-300 the saddle is next to the cut; 1 - αs keeps its digits there."""
    k, x = np.array([0.5]), np.array([1e9])
    alpha, beta = 1 + np.array([rho]), 1 - np.array([rho])
    s, gap, _ = _quadrature._saddle(k, alpha, beta, 2 * k * (x + rho))
    # k/gap = t to a relative 1e-9 there.
    assert gap[0] == pytest.approx(0.5 / (1e9 + rho), rel=1e-5, abs=0)
    assert s[0] == pytest.approx(1 / (1 + rho), rel=1e-8)


@pytest.mark.parametrize(("rank", "rho", "z"), POINTS)
def test_nodes_lie_on_a_hyperbola_around_the_cut(
    rank: int, rho: float, z: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have constant difference of distances to the foci, and equal steps along the path.

    The path is Re s = c + B sin 30° cosh u, Im s = B cos 30° sinh u; its right focus c + B is the
    one that it opens around, at the given distance, and near the start Im s = v/√curvature.
    """
    inner, x = watch(monkeypatch, "_trapezoid"), place(rank, rho, z)
    outer = watch(monkeypatch, "_exponent")
    entry_tails(rank, rho, x)
    _, _, _, start, gap, focus, curvature = (float(v[0]) for v in inner[0][0])
    nodes, left = (np.ravel(v) for v in outer[-1][0][3:])  # the last sum is the finest
    assert nodes + left == pytest.approx(start + gap, rel=1e-9, abs=1e-9 * np.abs(nodes).max())
    near = nodes[np.abs(nodes) < 1e6 * focus]  # beyond, the difference is lost to rounding
    right, other = start + focus, start - 3 * focus
    apart = np.abs(near - other) - np.abs(near - right)
    assert apart == pytest.approx(2 * focus, rel=1e-7)
    half_axis = 2 * focus * math.cos(math.pi / 6)
    v = np.arcsinh(np.arcsinh(nodes.imag / half_axis) * half_axis * math.sqrt(curvature))
    v = v[: np.searchsorted(np.arcsinh(nodes.imag / half_axis), 299.0)]
    steps = np.diff(v)
    assert steps == pytest.approx(steps[0], rel=1e-9)
    assert math.log2(0.05 / steps[0]) == pytest.approx(round(math.log2(0.05 / steps[0])), abs=1e-9)


@pytest.mark.parametrize(("rank", "rho", "z"), POINTS)
def test_the_range_ends_where_nothing_is_left(
    rank: int, rho: float, z: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a unit after the last place, of those a quarter apart, that has 1e-18 of the peak.

    Oracle: the integrand from (1 - αs)^-k (1 + βs)^-k e^(-ts) / s itself; at most 6.75.
    """
    inner, x = watch(monkeypatch, "_trapezoid"), place(rank, rho, z)
    sums = watch(monkeypatch, "_exponent")
    entry_tails(rank, rho, x)
    k, p, at, start, _, focus, curvature = (float(v[0]) for v in inner[0][0])
    width = 1 / (math.sqrt(curvature) * 2 * focus * math.cos(math.pi / 6))

    def size(v: Array) -> Array:
        turn = math.pi / 6 + 1j * np.minimum(width * np.sinh(v), 300.0)
        s = start - focus + 2 * focus * np.sin(turn)
        log = -k * (np.log(1 - (1 + p) * s) + np.log(1 + (1 - p) * s)) - 2 * k * (at + p) * s
        ds = 2 * focus * 1j * np.cos(turn) * width * np.cosh(v)
        return np.log(np.abs((np.exp(1j * log.imag) / s * ds).imag)) + log.real

    last = sums[-1][0][3].size
    step = 0.05 / 2 ** ((len(sums) - 1) // 2 - 1)
    end = 0.25 * round(last * step / 0.25)
    assert last == math.ceil(end / step - 1e-9)
    survey = np.arange(0.0, 6.5, 0.25)
    heavy = np.flatnonzero(size(survey) > math.log(1e-18) + size(survey).max())
    assert end == pytest.approx(survey[heavy[-1]] + 0.5)


def test_a_range_that_is_too_short_gives_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at 1.25, where the integrand is 1e-6 of its peak: both sums agree, on a wrong number."""
    monkeypatch.setattr(_quadrature, "_REACH", 1.5)
    monkeypatch.setattr(_quadrature, "_AGREEMENT", 1.0)
    for rank in (1, 8, 1000):
        with pytest.raises(ConvergenceError, match="missed its tolerance"):
            entry_tails(rank, 0.2, 0.1)


def test_five_steps_are_tried_each_half_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """And then no value is returned, but the point is named as it was given."""
    monkeypatch.setattr(_quadrature, "_AGREEMENT", -1.0)
    seen = watch(monkeypatch, "_sums")
    with pytest.raises(ConvergenceError, match=r"at rank=3, ρ=0\.25, x/‖q‖=0\.5 missed"):
        entry_tails(3, 0.25, 0.5)
    assert [args[-1] for args, _ in seen] == [0.05 / 2**i for i in range(5)]


def test_only_points_that_missed_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps the value of the first step at which it agrees."""
    steps: dict[int, list[float]] = {i: [] for i in range(3)}

    def sums(k: Array, *_: Array, step: float) -> tuple[Array, Array]:
        for v in k[:, 0]:
            steps[int(2 * v) - 1].append(step)
        # Point i agrees, on the value -step, from its i-th halving on.
        fine = np.full(len(k), -step)
        off = np.where(2 * k[:, 0] - 1 > round(math.log2(0.05 / step)), 2e-12, 0.0)
        return fine, fine * (1 + off)

    monkeypatch.setattr(_quadrature, "_sums", sums)
    one = np.ones(3)
    k = np.array([0.5, 1.0, 1.5])
    value = _quadrature._trapezoid(k, 0 * one, 0 * one, 0.5 * one, 0.5 * one, 0.5 * one, one)
    assert steps == {0: [0.05], 1: [0.05, 0.025], 2: [0.05, 0.025, 0.0125]}
    peak = -k * math.log(1 - 0.25)  # E[exp(sN')] at ρ = 0, s = 1/2
    assert value == pytest.approx(-0.05 / 2.0 ** np.arange(3) * np.exp(peak), rel=1e-14)


def exact_exponent(k: float, rho: float, x: float, s: complex, gap: complex) -> mp.mpc:
    """Log of E[exp(sN')] - 2kxs; next to the cut 1/α the distance from it is the exact number."""
    p, at = mp.mpf(rho), mp.mpc(s)
    first = mp.log((1 + p) * mp.mpc(gap)) if abs(gap) < 1e-3 else mp.log(1 - (1 + p) * at)
    return -k * (first + mp.log(1 + (1 - p) * at)) - 2 * k * (p + x) * at


@pytest.mark.parametrize(
    ("k", "rho", "x", "s"),
    [
        (1e12, 0.3, 1e-6, 1e-6 + 2e-6j),  # near 0 the logs cancel to the second order
        (1e12, 0.0, -2e-6, -1e-6 + 3e-6j),
        (4.0, 0.3, 0.7, 0.4 + 0.1j),
        (4.0, 0.8, 0.7, 0.4 + 2.1j),
        (0.5, 0.9, -0.7, -0.3 + 0.9j),
        (0.5, 0.2, -1.7, 0.1 + 30.0j),
        (500.0, 0.2, 1.0, -0.2 + 0.4j),
    ],
)
def test_the_exponent(k: float, rho: float, x: float, s: complex) -> None:
    """Complex, by mpmath: 2e-15 of the size of what is multiplied by k, cancelled parts apart."""
    gap = 1 / (1 + rho) - s
    with mp.workdps(40):
        true = exact_exponent(k, rho, x, s, gap)
    value = _quadrature._exponent(*(np.array([v]) for v in (k, rho, x, s, gap)))[0]
    a = abs(s * (2 * rho + (1 - rho**2) * s))
    assert abs(value - complex(true)) < 2e-15 * k * (a + abs(2 * (rho + x) * s) + (a > 0.3))


@pytest.mark.parametrize("gap", [1e-12, 1e-12 - 1e-13j, 1e-9j])
def test_the_exponent_next_to_the_cut(gap: complex) -> None:
    """1 - a is lost there; the distance from the cut is not. 1e-14 relative."""
    rho, x = 0.3, 0.2
    s = 1 / (1 + rho) - gap
    with mp.workdps(40):
        true = complex(exact_exponent(2.0, rho, x, s, gap))
    value = _quadrature._exponent(*(np.array([v]) for v in (2.0, rho, x, s, gap)))[0]
    assert value == pytest.approx(true, rel=1e-14, abs=0)


def test_points_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 2,048 at a time, which bounds the memory, and the parts do not show."""
    parts = watch(monkeypatch, "_small_tail")
    monkeypatch.setattr(_quadrature, "_trapezoid", lambda k, *_: np.zeros(k.size))
    entry_tails(8, 0.1, np.linspace(-1, 1, 2048))
    assert [part.size for _, part in parts] == [2048]
    entry_tails(8, 0.1, np.linspace(-1, 1, 2049))
    assert [part.size for _, part in parts] == [2048, 2048, 1]
    monkeypatch.undo()
    x = np.linspace(-0.8, 0.9, 9).reshape(3, 3)
    whole = entry_tails(8, [[0.1], [-0.3], [0.9]], x)
    monkeypatch.setattr(_quadrature, "_CHUNK", 2)
    for part, all_ in zip(entry_tails(8, [[0.1], [-0.3], [0.9]], x), whole, strict=True):
        assert part == pytest.approx(all_, rel=1e-13, abs=0)


@pytest.mark.parametrize("rho", [0.0, -0.0, 0.4, -0.4])
def test_the_smaller_side_is_computed(rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the mean upwards, before it downwards; the other tail is its complement."""
    seen, x = watch(monkeypatch, "_small_tail"), np.array([-0.9, -0.2, 0.0, 0.3, 1.4])
    low, high = entry_tails(4, rho, x)
    small = seen[0][1]
    assert np.where(x >= 0, high, low).tolist() == small.tolist()
    assert np.where(x >= 0, low, high).tolist() == (1.0 - small).tolist()


def test_tails_down_to_the_smallest_double() -> None:
    """At ρ = 0 and rank 2 the tail is exp(-2x)/2, also where it is 1e-310, and 0 beyond."""
    for x in (1.0, 300.0, 371.0):
        true = float(mp.exp(-2 * mp.mpf(x)) / 2)
        upper, lower = entry_tails(2, 0.0, x)[1], entry_tails(2, 0.0, -x)[0]
        assert upper == lower == pytest.approx(true, rel=1e-11, abs=5e-324)
    assert entry_tails(2, 0.0, 1e4)[1] == 0.0
