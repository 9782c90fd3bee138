"""The exact profile of one projected pair: pins, mpmath, the definition, limits, refusals."""

import itertools
import math

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_privacy.dp import (
    PairDivergence,
    RdpAccountant,
    VectorProjection,
    _vector_loss,
    vector_projection_bound,
)
from lora_privacy.errors import ConvergenceError, UnsupportedEventError
from lora_privacy.noise import RowNoise

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
FORWARD = [
    ((5, 3, 0.95, 1.0), ".11238360 .07530828 .04447772 .02520630 .01543904"),
    ((20, 10, 0.99, 1.05), ".03906435 .00900794 9.448553e-4 4.630033e-5 1.623099e-6"),
    ((768, 8, 0.999, 1.0), ".02810141 .00944582 .00166298 1.445958e-4 8.148210e-6"),
]
BACKWARD = [
    ((20, 10, 0.99, 1.05), ".07361687 .02750139 .00429333 2.135451e-4 4.999363e-6"),
]
# m, r, ρ, ν, ε: r below, at and above m + 1, both signs of ρ, losses from R > 1, far tails.
ORACLE = [
    (5, 3, 0.95, 1.0, 2.0),
    (20, 10, 0.99, 1.05, 0.01),
    (20, 10, 0.99, 1.05, 8.0),
    (2, 1, 0.3, 0.7, 1.0),
    (3, 7, 0.8, 1.3, 4.0),
    (6, 7, -0.4, 1.2, 0.3),
    (768, 8, 0.9999, 1.1, 0.5),
    (768, 8, 0.999999, 1.0, 0.02),
    (400, 400, 0.9, 1.0, 71.0),
    (27, 40, 0.0, 3.0, 0.0),
    # Just above the floor: all of the rest is a sliver of T next to R = 0.
    (5, 3, 0.95, 1.0, 3e4),
    (768, 8, 0.999, 1.0, 1e6),
    (1000, 256, 0.9999, 1.0, 3.0),
    # Next to parallel: the mass lies within 1e-5 and 2e-7 of R = 0, and of R = ∞.
    (5, 3, math.cos(1e-5), 1.0, 2.784),
    (2, 1, math.cos(2e-7), 1.0, 2.784),
    (768, 8, math.cos(1e-6), 1.0, 2.784),
]


def delta_by_tails(m: int, r: int, rho: float, nu: float, epsilon: float, digits: int) -> mp.mpf:
    """δ by Gauss-Legendre over T ~ t_r of a difference of χ² tails, at ``digits`` digits."""
    with mp.workdps(digits):
        rho_, nu_, eps = mp.mpf(rho), mp.mpf(nu), mp.mpf(epsilon)
        k, c = m + r - 1, mp.mpf(m + 1 - r) / 2
        scale = mp.sqrt((1 - rho_**2) / r)

        def inner(t: mp.mpf) -> mp.mpf:
            ratio = nu_ * (rho_ + scale * t)
            a = (r - 1) * mp.log(nu_) + c * mp.log(ratio)
            x = max(mp.mpf(0), 2 * (eps - a) / (1 / ratio - 1))
            tilt = mp.exp(eps + (r - 1) * mp.log(ratio / nu_))
            ends = (0, x / 2) if ratio > 1 else (x / 2, mp.inf)
            other = tuple(end / ratio for end in ends)
            half = mp.mpf(k) / 2
            return mp.gammainc(half, *ends, regularized=True) - tilt * mp.gammainc(
                half, *other, regularized=True
            )

        def density(t: mp.mpf) -> mp.mpf:
            return (1 + t * t / r) ** (-mp.mpf(r + 1) / 2) / (
                mp.sqrt(r) * mp.beta(mp.mpf(r) / 2, mp.mpf(1) / 2)
            )

        points = [-rho_ / scale, (1 / nu_ - rho_) / scale]
        if c:
            points.append((mp.exp((eps - (r - 1) * mp.log(nu_)) / c) / nu_ - rho_) / scale)
        zero = points[0]
        grid = {s * mp.mpf(2) ** (e / 2) for s in (-1, 1) for e in range(-4, 14)} | {mp.mpf(0)}
        # Geometric cuts towards the points where the integrand is not analytic.
        near = {p + s * mp.mpf(2) ** -e for p in points for s in (-1, 1) for e in range(2, 20, 3)}
        if epsilon > 1e3:
            near |= {zero + mp.mpf(2) ** (-e / 2) for e in range(60)}
        if scale < 1e-3:  # the mass may lie at t ≈ ±1/scale, on that scale
            halves = [mp.mpf(2) ** (mp.mpf(e) / 2) for e in range(-59, 24, 2)]
            near |= {p + s * f / scale for f in halves for p, s in ((zero, 1), (0, 1), (0, -1))}
        cuts = sorted({p for p in (*points, *grid, *near) if p >= zero})
        nodes = [(mp.mpf(float(x)), mp.mpf(float(w))) for x, w in zip(*GAUSS, strict=True)]
        # The heavy tail below R = 0, as an integral over tan θ = t/√r.
        ends = [-mp.pi / 2, mp.atan(zero / mp.sqrt(r))]
        total = mp.quad(lambda angle: mp.cos(angle) ** (r - 1), ends)
        total /= mp.beta(mp.mpf(r) / 2, mp.mpf(1) / 2)
        for low, high in itertools.pairwise(cuts):
            half = (high - low) / 2
            total += half * sum(
                w * density(t) * inner(t) for x, w in nodes for t in [low + half * (1 + x)]
            )
        return total + mp.quad(lambda t: density(t) * inner(t), [cuts[-1], 4 * cuts[-1], mp.inf])


GAUSS = np.polynomial.legendre.leggauss(16)


@pytest.mark.parametrize(
    ("direction", "pair", "values"),
    [("forward", *pin) for pin in FORWARD] + [("backward", *pin) for pin in BACKWARD],
)
def test_profile_meets_its_pins(
    direction: str, pair: tuple[int, int, float, float], values: str
) -> None:
    """Reference values from another program, to the last digit they are printed with."""
    law = VectorProjection(*pair)
    for epsilon, text in zip(EPSILONS, values.split(), strict=True):
        digits = len(text.split("e")[0].lstrip("0.").replace(".", ""))
        half_unit = 0.51 * 10.0 ** (math.floor(math.log10(float(text))) - digits + 1)
        got = law.delta(epsilon, direction=direction)
        assert got == pytest.approx(float(text), rel=0, abs=half_unit)


@pytest.mark.parametrize(("m", "r", "rho", "nu", "epsilon"), ORACLE)
def test_profile_matches_mpmath(m: int, r: int, rho: float, nu: float, epsilon: float) -> None:
    """Oracle: differences of χ² tails at 25 digits; 1e-9 relative."""
    expected = delta_by_tails(m, r, rho, nu, epsilon, 25)
    got = VectorProjection(m, r, rho, nu).delta(epsilon, "forward")
    assert got == pytest.approx(float(expected), rel=1e-9, abs=0)


@pytest.mark.parametrize(
    ("m", "r", "rho", "nu", "epsilon"),
    [
        (5, 3, 0.8, 1.0, 3.0),
        (4, 6, 0.9, 1.3, 0.7),
        (12, 2, 0.97, 0.8, 2.0),
        (3, 1, 0.5, 1.0, 0.5),
    ],
)
def test_profile_matches_its_definition(
    m: int, r: int, rho: float, nu: float, epsilon: float
) -> None:
    """Draws of AᵀAv, both densities written out: E (1 - p'/p e^ε)₊ within 5 standard errors.

    A profile with one column less, or one degree of freedom more, must be rejected.
    """
    rng = np.random.default_rng(20260117)
    size = 200_000
    v = np.zeros(m)
    v[0] = 1.0
    w = np.zeros(m)
    w[0], w[1] = nu * rho, nu * math.sqrt(1 - rho**2)
    a = rng.standard_normal((size, r, m)) / math.sqrt(r)
    y = np.einsum("sri,sr->si", a, a @ v)
    loss = RowNoise(r, v).logpdf(y - v) - RowNoise(r, w).logpdf(y - w)
    gain = -np.expm1(np.minimum(epsilon - loss, 0.0))
    error = gain.std() / math.sqrt(size)
    assert abs(VectorProjection(m, r, rho, nu).delta(epsilon, "forward") - gain.mean()) < 5 * error
    for wrong in (VectorProjection(m + 1, r, rho, nu), VectorProjection(m, r + 1, rho, nu)):
        assert abs(wrong.delta(epsilon, "forward") - gain.mean()) > 5 * error


pairs = st.tuples(
    st.integers(2, 2000),
    st.integers(1, 300),
    st.floats(-1, 1),
    st.floats(0.2, 5),
)


@settings(max_examples=60, deadline=None)
@given(pairs, st.floats(1e-3, 50))
def test_both_directions_share_their_total_variation(
    pair: tuple[int, int, float, float], epsilon: float
) -> None:
    """At ε = 0 both are the total variation; δ falls, convex in e^ε, to the floor."""
    law = VectorProjection(*pair)
    start = law.delta(0.0, "forward")
    assert law.delta(0.0, "backward") == pytest.approx(start, rel=1e-9, abs=1e-300)
    for direction in ("forward", "backward"):
        middle = math.log((1 + math.exp(epsilon)) / 2)
        half, end = law.delta(middle, direction), law.delta(epsilon, direction)
        assert start <= 1
        assert start * (1 + 1e-9) + 1e-300 >= half
        assert half * (1 + 1e-9) + 1e-300 >= end >= law.floor
        assert half <= (start + end) / 2 * (1 + 1e-9) + 1e-300


@settings(max_examples=40, deadline=None)
@given(pairs, st.floats(1e-12, 0.9))
def test_epsilon_inverts_delta(pair: tuple[int, int, float, float], delta: float) -> None:
    """δ at the returned ε is at most the target, and above it at an ε lower by 1e-6 of it."""
    law = VectorProjection(*pair)
    found = law.epsilon(delta)
    for direction, epsilon in (("forward", found.forward), ("backward", found.backward)):
        if math.isinf(epsilon):
            assert law.floor >= delta * (1 - 1e-9)
            assert found.epsilon == math.inf
            assert found.reason is not None
            continue
        assert law.delta(epsilon, direction) <= delta
        if epsilon > 0:
            # Near the floor a tiny change of ε changes nothing in δ: then equality to rounding.
            assert law.delta(epsilon * (1 - 1e-6), direction) > delta * (1 - 1e-9)


@pytest.mark.parametrize(
    ("pair", "delta"),
    [
        ((5, 3, 0.95, 1.0), 1e-2),
        ((20, 10, 0.99, 1.05), 1e-5),
        ((768, 8, 0.999, 1.1), 1e-5),
        ((2, 400, 0.9999, 0.8), 1e-3),
        ((53_248, 4096, 0.9999, 1.0), 1e-5),
    ],
)
@pytest.mark.parametrize("blind", [False, True])
def test_epsilon_is_confirmed_from_new_panels(
    monkeypatch: pytest.MonkeyPatch,
    pair: tuple[int, int, float, float],
    delta: float,
    blind: bool,
) -> None:
    """δ at the result is (1 - 3e-10) to (1 - 1e-10) of the target, give or take 3e-11.

    The search ends with panels of an ε nearby; ``delta`` has none. Nor does the result depend on
    the coarse nodes: where they see nothing, finer ones go on.
    """
    if blind:
        nothing = np.zeros(1), np.zeros(1)  # one node, of weight 0
        monkeypatch.setattr(_vector_loss, "_COARSE", _vector_loss.Rule(nothing, nothing, 15.0))
    law = VectorProjection(*pair)
    found = law.epsilon(delta)
    assert -3.3e-10 < law.delta(found.forward, "forward") / delta - 1 < -0.7e-10
    assert -3.3e-10 < law.delta(found.backward, "backward") / delta - 1 < -0.7e-10


@pytest.mark.parametrize("excess", [2e-10, 1e-9, 1e-8, 1e-7])
@pytest.mark.parametrize(
    "pair",
    [(23_316, 1, 0.9457), (5501, 2, -0.2256, 1.015), (2762, 21, 0.9), (25_581, 1220, 0.002)],
)
def test_the_search_ends_next_to_the_floor(
    pair: tuple[int, int, float] | tuple[int, int, float, float], excess: float
) -> None:
    """Where log(δ - floor) may be anything in a wide window and ε is of order 1e10."""
    law = VectorProjection(*pair)
    delta = law.floor * (1 + excess)
    found = law.epsilon(delta)
    assert found.epsilon < math.inf
    assert law.floor < law.delta(found.epsilon) < delta


@pytest.mark.parametrize(("m", "r"), [(768, 8), (1, 3), (4, 40)])
def test_parallel_inputs(m: int, r: int) -> None:
    """Equal inputs cost nothing, v' = -v is told surely, v' = 2v is a difference of χ² tails."""
    assert VectorProjection(m, r, 1.0).delta(0.0) == 0
    assert VectorProjection(m, r, 1.0).epsilon(1e-9).epsilon == 0
    assert VectorProjection(m, r, -1.0).delta(100.0) == 1
    assert math.isinf(VectorProjection(m, r, -1.0, 2.0).epsilon(0.5).epsilon)
    k = m + r - 1
    with mp.workdps(30):
        # ν = 2: the loss (k/2) ln 2 - Q/4 exceeds 1 for Q < x.
        x = 4 * (k / mp.mpf(2) * mp.log(2) - 1)
        half = mp.mpf(k) / 2
        expected = mp.gammainc(half, 0, x / 2, regularized=True)
        expected -= mp.e * mp.gammainc(half, 0, x / 4, regularized=True)
    got = VectorProjection(m, r, 1.0, 2.0).delta(1.0, "forward")
    assert got == pytest.approx(float(expected), rel=1e-9, abs=0)


@pytest.mark.parametrize(
    ("pair", "floor"),
    [((5, 3, 0.95), 6.7e-3), ((20, 10, 0.99), 3.9e-10), ((768, 8, 0.999), 2.2e-12)],
)
def test_floor(pair: tuple[int, int, float], floor: float) -> None:
    """No ε is below P[(Av)·(Av') <= 0]; just above it ε is finite, and huge."""
    law = VectorProjection(*pair)
    assert law.floor == pytest.approx(floor, rel=0.02, abs=0)
    assert law.delta(1e200) == pytest.approx(law.floor, rel=1e-9, abs=0)
    below = law.epsilon(law.floor)
    assert math.isinf(below.epsilon)
    assert "never gives" in str(below)
    # There δ - floor ≈ E[Q] f(0) / (2ε) with f the density of R, as L ≈ Q/(2R) near R = 0.
    m, r, rho = pair
    scale = math.sqrt((1 - rho**2) / r)
    density = stats.t.pdf(rho / scale, r) / scale
    expected = (m + r - 1) * density / (2 * 1e-3 * law.floor)
    assert law.epsilon(law.floor * 1.001).epsilon == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("pair", "delta"),
    [
        ((53_248, 4096, 0.9999, 1.0), 1e-300),
        ((53_248, 4096, 0.9999, 1.0), 1e-320),
        ((53_248, 1, 0.95, 1.0), 0.5),
        ((2, 1, 0.95, 9e99), 0.3),
        ((768, 8, 1 - 1e-16, 1.0), 1e-10),
    ],
)
def test_extremes_are_solved(pair: tuple[int, int, float, float], delta: float) -> None:
    """Sizes of the largest models, subnormal δ, huge ratios: the search ends and δ is met."""
    law = VectorProjection(*pair)
    found = law.epsilon(delta)
    assert 0 < found.epsilon < math.inf
    assert law.delta(found.forward, "forward") <= delta
    assert law.delta(found.forward * 0.999, "forward") > delta * 0.99


@pytest.mark.parametrize("pair", [(5, 3), (2, 1), (768, 8), (1000, 256), (4, 40)])
@pytest.mark.parametrize("angle", [1e-5, 1e-7])
def test_small_angles(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[int, int], angle: float
) -> None:
    """With φ, δ falls like sin^r φ, in logs that hold no δ, and few panels must do.

    R reaches what makes a loss of ε where tan θ is ≈ 1/φ, and the density there is ∝ φ^{r-1} dθ.
    Next order: a share of at most r (φ/(R - 1))²/2, and R - 1 is .004 or more where δ lies.
    """
    monkeypatch.setattr(_vector_loss, "_MAX_PANELS", 48)
    rank = pair[1]
    scaled: list[float] = []
    for cosine in (math.cos(angle), math.cos(angle / 3)):
        law = _vector_loss.VectorLoss(*pair, cosine, 1.0)
        log_sine = 0.5 * math.log((1 - cosine) * (1 + cosine))
        scaled.append(law._resolved(2.784)[0] - rank * log_sine)
    assert scaled[0] == pytest.approx(scaled[1], rel=0, abs=1e-10 + rank * (300 * angle) ** 2)


def test_a_profile_that_does_not_settle_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bounded number of panels."""
    monkeypatch.setattr(_vector_loss, "_AGREEMENT", -1.0)
    with pytest.raises(ConvergenceError, match="missed its tolerance"):
        VectorProjection(5, 3, 0.95).delta(1.0)


BOUNDS = [
    (100, 0.5, 792.6, 635.3, 418.1),
    (100, 0.9, 86.5, 45.9, 30.11),
    (200, 0.5, 660.4, 590.2, None),
    (200, 0.9, 77.3, 58.4, None),
    (400, 0.5, 737.5, 737.3, 609.5),
    (400, 0.9, 86.4, 86.4, 71.03),
]


@pytest.mark.parametrize(("rank", "cosine", "published", "sharper", "exact"), BOUNDS)
def test_closed_bound_meets_its_pins(
    rank: int, cosine: float, published: float, sharper: float, exact: float | None
) -> None:
    """At m = 400, δ = .01: both shapes, and the exact ε below them, to the digits printed."""
    wide = vector_projection_bound(400, rank, cosine, 0.01, shape="published").epsilon
    close = vector_projection_bound(400, rank, cosine, 0.01).epsilon
    found = VectorProjection(400, rank, cosine).epsilon(0.01).epsilon
    assert wide == pytest.approx(published, rel=0, abs=0.051)
    assert close == pytest.approx(sharper, rel=0, abs=0.051)
    assert found <= close <= wide
    if exact is not None:
        assert found == pytest.approx(exact, rel=2e-4)


def test_closed_bound_covers_ratios_above_one() -> None:
    """At m = 400, r = 8, ρ = .9999 the term c ln(ρ+K), for R > 1, is the larger one."""
    m, r, rho, third = 400, 8, 0.9999, 0.01 / 3
    reach = stats.t.isf(third, r) * math.sqrt((1 - rho**2) / r)
    x, c, low = stats.chi2.isf(third, m + r - 1), (m - r + 1) / 2, rho - reach
    above = c * math.log(rho + reach)
    assert above > 1.5 * (c * math.log(low) + (1 - low) * x / (2 * low))
    found = vector_projection_bound(m, r, rho, 0.01).epsilon
    assert found == pytest.approx(above, rel=1e-6, abs=0)


def test_the_printed_constant_is_false() -> None:
    """With c = (m+r-1)/2 the theorem claims ε = 545.6 where the true δ is .0415, not .01."""
    m = r = 400
    rho, third = 0.5, 0.01 / 3
    k = m + r - 1
    x, t = stats.chi2.isf(third, k), stats.t.isf(third, r)
    reach = t * math.sqrt((1 - rho**2) / r)
    wrong = k / 2 * math.log(rho + reach) + (1 - rho + reach) * x / (2 * (rho - reach))
    assert wrong == pytest.approx(545.6, abs=0.1)
    assert VectorProjection(m, r, rho).delta(wrong) == pytest.approx(0.0415, abs=1e-4)
    ours = vector_projection_bound(m, r, rho, 0.01).epsilon
    assert VectorProjection(m, r, rho).delta(ours) < 0.01


def test_the_published_shape_is_false_for_large_ranks() -> None:
    """It is refused beyond rank = m + 1, where a pair exceeds it; the sharper shape holds."""
    m, r, rho, third = 2, 400, 0.9999, 0.01 / 3
    x, t = stats.chi2.isf(third, m + r - 1), stats.t.isf(third, r)
    reach = t * math.sqrt((1 - rho**2) / r)
    c = (m - r + 1) / 2
    wrong = c * math.log(rho + reach) + (1 - rho + reach) * x / (2 * (rho - reach))
    law = VectorProjection(m, r, rho)
    assert law.delta(max(wrong, 0.0)) > 0.01
    with pytest.raises(ValueError, match=r"false for rank > in_features \+ 1"):
        vector_projection_bound(m, r, rho, 0.01, shape="published")
    assert law.delta(vector_projection_bound(m, r, rho, 0.01).epsilon) <= 0.01


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 800), st.integers(1, 800), st.floats(0.3, 1), st.floats(1e-9, 0.5))
def test_closed_bound_lies_above_the_exact_profile(
    m: int, r: int, cosine: float, delta: float
) -> None:
    """For all shapes of A, on either side of ρ + K = 1."""
    bound = vector_projection_bound(m, r, cosine, delta)
    if math.isinf(bound.epsilon):
        assert "cosine > K" in str(bound)
        return
    assert VectorProjection(m, r, cosine).delta(bound.epsilon) <= delta
    assert bound.epsilon == bound.forward == bound.backward


def test_rényi_accounting_is_refused() -> None:
    """By the pair, with the reason, and by the accountant."""
    with pytest.raises(UnsupportedEventError, match=r"infinite unless v' = cv.*privacy-loss"):
        VectorProjection(768, 8, 0.999).rdp([2.0])
    with pytest.raises(UnsupportedEventError, match="no proof for VectorProjection"):
        RdpAccountant().compose(VectorProjection(768, 8, 0.999))  # pyright: ignore


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((768, 8, 1.1), "cosine must lie in"),
        ((768, 8, math.nan), "cosine must lie in"),
        ((768, 0, 0.9), "rank must be at least 1"),
        ((0, 8, 1.0), "in_features must be at least 1"),
        ((1, 8, 0.5), "cosine must be 1 or -1"),
        ((768, 8, 0.9, 0.0), "norm_ratio must be positive"),
        ((768, 8, 0.9, -1.0), "norm_ratio must be positive"),
        ((768, 8, 0.9, math.nan), "norm_ratio must be positive"),
        ((768, 8, 0.9, 1e200), "norm_ratio must lie in"),
    ],
)
def test_pairs_that_do_not_exist_are_refused(
    arguments: tuple[int, int, float], match: str
) -> None:
    """Each with what must hold."""
    with pytest.raises(ValueError, match=match):
        VectorProjection(*arguments)


def test_arguments_of_the_profile_are_checked() -> None:
    """δ in (0, 1), ε finite and not negative, a known direction, whole ranks."""
    law = VectorProjection(768, 8, 0.999)
    for delta in (0.0, 1.0, math.nan, -0.1):
        with pytest.raises(ValueError, match="delta must lie in"):
            law.epsilon(delta)
    for epsilon in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="epsilon must be finite"):
            law.delta(epsilon)
    with pytest.raises(ValueError, match="direction must be one of"):
        law.delta(1.0, "up")  # pyright: ignore
    for arguments in ((768, 8, 0.9, 1.0), (768, 8, 0.9, math.nan), (768, 8, 1.5, 0.1)):
        with pytest.raises(ValueError, match="must lie in"):
            vector_projection_bound(*arguments)
    with pytest.raises(ValueError, match="shape must be one of"):
        vector_projection_bound(768, 8, 0.9, 0.1, shape="printed")  # pyright: ignore
    with pytest.raises(TypeError, match="rank must be an integer"):
        VectorProjection(768, 8.0, 0.999)  # pyright: ignore


def test_result_says_that_it_is_no_guarantee() -> None:
    """In its text, in its JSON, and it cannot be built inconsistent."""
    found = VectorProjection(20, 10, 0.99, 1.05).epsilon(1e-5)
    assert found.epsilon == found.backward > found.forward
    assert str(found).startswith("Not a guarantee.")
    assert "not a guarantee" in found.to_dict()["kind"]
    for change in ({"epsilon": found.forward}, {"backward": math.nan}, {"delta": 1.0}):
        fields = {name: getattr(found, name) for name in PairDivergence.__slots__} | change
        with pytest.raises(ValueError, match="must"):
            PairDivergence(**fields)
