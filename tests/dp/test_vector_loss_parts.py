"""Each step of the exact profile of a pair by itself, so that no other step can make up for it.

Oracles are mpmath, brentq, and the geometry and the densities of docs/theory/projection-pairs.md.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator

import mpmath as mp
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from lora_privacy.dp import VectorProjection, _chi_tail, _vector_loss
from lora_privacy.dp._chi_tail import Rule
from lora_privacy.dp._vector_loss import Panels, VectorLoss
from lora_privacy.errors import ConvergenceError

FINE = np.polynomial.legendre.leggauss(64)
RULE = Rule(FINE, FINE, 30.0)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Logs of 0 are -inf, as in the callers of these parts."""
    with np.errstate(divide="ignore"):
        yield


# --- the χ law


@pytest.mark.parametrize("k", [1, 2, 3, 50, 57_343])
def test_the_log_density_of_chi_keeps_its_digits(k: int) -> None:
    """Oracle: (k-1) ln(s/mode) - (s² - mode²)/2 at 40 digits; relative 1e-12 next to the mode."""
    s = math.sqrt(k - 1) + np.array([-0.9, -1e-3, 1e-4, 0.5, 3.0, 9.0])
    s = s[s > 0]
    found = _chi_tail._log_chi(k, s.copy())
    for at, value in zip(s.tolist(), found.tolist(), strict=True):
        with mp.workdps(40):
            true = -(mp.mpf(at) ** 2 - (k - 1)) / 2
            if k > 1:
                true += (k - 1) * mp.log(mp.mpf(at) / mp.sqrt(k - 1))
            # s - mode is rounded by an ulp of the mode.
            slack = 1e-12 * abs(true) + 4e-16 * math.sqrt(k) * abs(at - (k - 1) / at)
        assert abs(value - true) <= slack


@pytest.mark.parametrize("k", [1, 2, 7, 400, 57_343])
def test_the_norm_of_chi(k: int) -> None:
    """Oracle: 2^{1-k/2} s^{k-1} e^{-s²/2} / Γ(k/2) at its mode, by mpmath."""
    with mp.workdps(40):
        half = mp.mpf(k) / 2
        true = (1 - half) * mp.log(2) - mp.loggamma(half) - mp.mpf(k - 1) / 2
        true += mp.mpf(k - 1) / 2 * mp.log(k - 1) if k > 1 else 0
    assert _chi_tail.log_chi_norm(k) == pytest.approx(float(true), rel=0, abs=3e-13)


@pytest.mark.parametrize("rank", [1, 2, 3, 30, 4096])
def test_the_norm_of_the_angle(rank: int) -> None:
    """Oracle: Γ((r+1)/2) / (√π Γ(r/2)), the density of θ at 0."""
    with mp.workdps(40):
        true = (
            mp.loggamma(mp.mpf(rank + 1) / 2) - mp.loggamma(mp.mpf(rank) / 2) - mp.log(mp.pi) / 2
        )
    assert _vector_loss._log_angle_norm(rank) == pytest.approx(float(true), rel=0, abs=3e-13)


@pytest.mark.parametrize("k", [1, 2, 9, 800])
def test_both_norms_integrate_to_where_little_is_left(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To e^-30 of the peak by the bound of each; with e^-1 for it the missing part shows.

    Oracle: quadrature to √2 on either side of the mode of χ, whose curvature is at least 1, and to
    √(2/(r-1)) for cos^{r-1} θ <= e^{-(r-1)θ²/2}.
    """
    monkeypatch.setattr(_chi_tail, "DROP", 1.0)
    monkeypatch.setattr(_vector_loss, "DROP", 1.0)
    mode = math.sqrt(k - 1)

    def density(s: float) -> float:
        return math.exp((k - 1) * math.log(s / mode if k > 1 else 1.0) - (s * s - mode**2) / 2)

    ends = max(0.0, mode - math.sqrt(2)), mode + math.sqrt(2)
    total = integrate.quad(density, *ends, epsabs=0, epsrel=1e-12)[0]
    assert _chi_tail.log_chi_norm(k) == pytest.approx(-math.log(total), rel=0, abs=1e-11)
    end = min(math.pi / 2, math.sqrt(2 / (k - 1)) if k > 1 else 2.0)
    total = integrate.quad(lambda t: math.cos(t) ** (k - 1), 0, end, epsabs=0, epsrel=1e-12)[0]
    assert _vector_loss._log_angle_norm(k) == pytest.approx(-math.log(2 * total), rel=0, abs=1e-11)


@pytest.mark.parametrize("rank", [1, 2, 9])
@pytest.mark.parametrize("cosine", [-0.999, -0.4, 0.0, 0.3, 0.99])
def test_the_chance_of_a_flipped_sign(rank: int, cosine: float) -> None:
    """Oracle: P[tan θ < -cot φ] by quadrature of cos^{r-1}."""
    with mp.workdps(20):
        end = mp.acos(mp.mpf(cosine)) - mp.pi / 2
        cuts = [end - (end + mp.pi / 2) * mp.mpf(2) ** -j for j in range(0, 14, 2)] + [end]
        total = mp.quad(lambda t: mp.cos(t) ** (rank - 1), cuts)
        total /= mp.beta(mp.mpf(rank) / 2, mp.mpf(1) / 2)
    found = _vector_loss.projected_sign_flip(rank, cosine)
    assert found == pytest.approx(float(total), rel=1e-10, abs=0)


def test_a_window_ends_where_the_fall_is_the_drop() -> None:
    fall, curvature = np.array([0.0, 0.3, 40.0, 1e6]), np.array([1.0, 2.0, 1.5, 3.0])
    width = _chi_tail._window(17.0, fall, curvature)
    assert fall * width + curvature * width**2 / 2 == pytest.approx(np.full(4, 17.0), rel=1e-13)


# (k, x, slope): either tail, next to and far from the mode, steep and flat losses.
TAILS = [
    (1, 0.3, -0.8),
    (1, 2.0, 0.4),
    (2, 0.01, -3.0),
    (12, 4.0, -0.5),
    (12, 11.0, -1e-5),
    (12, 40.0, -2.0),
    (12, 3.0, 0.7),
    (12, 11.0, 5.0),
    (12, 60.0, 0.2),
    (775, 700.0, -0.05),
    (775, 774.0, -0.9),
    (775, 1000.0, -1e-3),
    (775, 500.0, 0.3),
    (775, 900.0, 0.01),
    (775, 2000.0, 0.6),
]


def panels_of(k: int, x: float, slope: float, drop: float) -> list[tuple[float, float]]:
    """Ends of the panels that ``log_tails`` puts its nodes on."""
    seen: list[np.ndarray] = []
    inner = _chi_tail._log_chi
    nodes = FINE[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chi_tail, "_log_chi", lambda k, s: (seen.append(s.copy()), inner(k, s))[1])
        rule = Rule(FINE, FINE, drop)
        _chi_tail.log_tails(k, 0.0, np.array([x]), np.array([slope]), rule)
    ends = []
    for row in seen[1]:
        half = (row[-1] - row[0]) / (nodes[-1] - nodes[0])
        ends.append((row[0] - half * (1 + nodes[0]), row[0] + half * (1 - nodes[0])))
    return ends


def window(drop: float, fall: float, curvature: float) -> float:
    return optimize.brentq(lambda w: fall * w + curvature * w * w / 2 - drop, 0, 1e9, xtol=1e-14)


@pytest.mark.parametrize(("k", "x", "slope"), TAILS)
@pytest.mark.parametrize("drop", [30.0, 4.0])
def test_panels_of_a_tail_end_where_nothing_is_left(
    k: int, x: float, slope: float, drop: float
) -> None:
    """From x, or the point e^-drop below the mode, to where the density fell by e^-drop.

    Beyond the point with slope d it falls by d w + κ w²/2, κ at least 1 above, the least of it at
    the end of the window, and 2 below the mode. Where 1 - e^{-loss} is 1 but for e^-drop a panel
    ends.
    """
    mode, edge = math.sqrt(k - 1), math.sqrt(x)
    up = slope < 0
    start = max(edge, mode) if up else min(edge, mode)
    fall = abs(start - (k - 1) / start) if start else 0.0
    if up:
        first = window(drop, fall, 1.0)
        far = start + window(drop, fall, 1 + (k - 1) / (start + first) ** 2)
        near = max(edge, mode - math.sqrt(drop))
    else:
        far = max(start - window(drop, fall, 2.0), 0.0)
        near = min(edge, mode + math.sqrt(2 * drop))
    cut = math.sqrt(max(x - 2 * drop / slope, 0.0))
    cut = min(max(cut, min(near, far)), max(near, far))
    expected = [(near, cut)] + ([(cut, far)] if cut != far else [])
    found = panels_of(k, x, slope, drop)
    assert np.array(found) == pytest.approx(np.array(expected), rel=1e-9, abs=1e-9)
    # What the windows promise, by the density itself.
    if far > 0:
        logs = [(k - 1) * math.log(s) - s * s / 2 if k > 1 else -s * s / 2 for s in (start, far)]
        assert drop * (1 - 1e-12) - 1e-9 <= logs[0] - logs[1] <= 2.5 * drop


@pytest.mark.parametrize(("k", "x", "slope"), TAILS)
def test_expectations_over_a_tail(k: int, x: float, slope: float) -> None:
    """Oracle: the integrals over Q ~ χ²_k as differences of incomplete Γ at 60 digits."""
    with mp.workdps(60):
        half, at, tilt = mp.mpf(k) / 2, mp.mpf(x), 1 - mp.mpf(slope)
        ends = (lambda y: (y / 2, mp.inf)) if slope < 0 else (lambda y: (0, y / 2))
        plain = mp.gammainc(half, *ends(at), regularized=True)
        # E e^{slope (Q - x)/2}, whose Q has the density of χ²/(1 - slope).
        if tilt > 0:
            tilted = mp.gammainc(half, *ends(at * tilt), regularized=True) * tilt**-half
        else:
            power = mp.quad(
                lambda q: q ** (half - 1) * mp.exp(-tilt * q / 2), mp.linspace(0, at, 4)
            )
            tilted = power / (2**half * mp.gamma(half))
        tilted *= mp.exp(-mp.mpf(slope) * at / 2)
        expected = [float(mp.log(plain - tilted)), float(mp.log(plain))]
    norm = _chi_tail.log_chi_norm(k)
    for rule, error in ((RULE, 1e-12), *((rule, 2e-11) for rule in _vector_loss._RULES)):
        found = _chi_tail.log_tails(k, norm, np.array([x]), np.array([slope]), rule)
        assert [float(v[0]) for v in found] == pytest.approx(expected, rel=0, abs=error)


def test_tails_are_taken_one_by_one() -> None:
    """Many at once are what each is alone, whichever of them need a second panel."""
    chosen = [(x, slope) for k, x, slope in TAILS if k == 12]
    square, slope = (np.array(part) for part in zip(*chosen, strict=True))
    together = _chi_tail.log_tails(12, 0.1, square, slope, RULE)
    for i in range(len(square)):
        alone = _chi_tail.log_tails(12, 0.1, square[i : i + 1], slope[i : i + 1], RULE)
        for one, many in zip(alone, together, strict=True):
            assert one[0] == pytest.approx(many[i], rel=0, abs=1e-13)


# --- the inner integral, given R


def exact_inner(m: int, r: int, nu: float, epsilon: float, ratio: mp.mpf) -> tuple[mp.mpf, mp.mpf]:
    """E[(1 - e^{ε-L})₊ | R] and P[L > ε | R] from the loss, section 1 of the page."""
    k, c, nu_, eps = m + r - 1, mp.mpf(m + 1 - r) / 2, mp.mpf(nu), mp.mpf(epsilon)
    constant = (r - 1) * mp.log(nu_) + c * mp.log(ratio) - eps
    half, slope = mp.mpf(k) / 2, 1 / ratio - 1
    x = -2 * constant / slope
    if slope > 0:
        ends = (max(x, mp.mpf(0)) / 2, mp.inf)
    elif x <= 0:
        return mp.mpf(0), mp.mpf(0)
    else:
        ends = (mp.mpf(0), x / 2)
    plain = mp.gammainc(half, *ends, regularized=True)
    scaled = mp.gammainc(half, *(end / ratio for end in ends), regularized=True)
    return plain - mp.exp(eps + (r - 1) * mp.log(ratio / nu_)) * scaled, plain


@pytest.mark.parametrize(
    ("m", "r", "nu", "epsilon"),
    [
        (20, 10, 1.0, 0.7),
        (20, 10, 1.3, 2.0),
        (3, 8, 0.8, 0.1),
        (3, 8, 1.5, 4.0),
        (1, 1, 2.5, 0.0),
        (9, 10, 0.9, 1.0),
    ],
)
def test_expectations_given_the_ratio(m: int, r: int, nu: float, epsilon: float) -> None:
    """Oracle: differences of χ² tails at 80 digits, at R on either side of 1, near and far."""
    law = VectorLoss(m, r, 0.5, nu)
    # Next to 1 it is the excess that holds the digits.
    excess = np.array([-0.999, -0.7, -0.4, -0.1, -1e-3, -1e-9, 1e-9, 1e-3, 0.2, 0.9, 1.2, 30.0])
    ratio = 1 + excess
    weight = np.linspace(-3.0, 2.0, len(ratio))
    found = law._inner(epsilon, ratio, excess, weight, RULE, -math.inf)
    with mp.workdps(80):
        for i, (near, at) in enumerate(zip(excess.tolist(), ratio.tolist(), strict=True)):
            exact = exact_inner(
                m, r, nu, epsilon, 1 + mp.mpf(near) if 0.5 < at < 2 else mp.mpf(at)
            )
            for value, true in zip(found[:, i].tolist(), exact, strict=True):
                if true < mp.mpf("1e-400"):
                    assert value < -900
                else:
                    expected = float(mp.log(true)) + weight[i]
                    assert value == pytest.approx(expected, rel=1e-11, abs=3e-11)


def test_nodes_are_skipped_by_the_chernoff_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those, and only those, whose weight times e^{-(x-k-k ln(x/k))/2} is e^-34 below the result.

    On the other side of the mean the bound is 1.
    """
    m, r, epsilon, about = 40, 3, 0.5, -2.0
    k, law = m + r - 1, VectorLoss(m, r, 0.9, 1.0)
    kept: list[float] = []
    tails = _vector_loss.log_tails

    def watched(k: int, norm: float, square: np.ndarray, slope: np.ndarray, rule: Rule) -> object:
        kept.extend(square.tolist())
        return tails(k, norm, square, slope, rule)

    monkeypatch.setattr(_vector_loss, "log_tails", watched)
    ratio = np.concatenate([np.linspace(0.3, 0.999, 60), np.linspace(1.001, 3.0, 60)])
    excess = ratio - 1
    square = 2 * (epsilon - (m + 1 - r) / 2 * np.log(ratio)) / (1 / ratio - 1)
    inside = np.where(ratio < 1, square > 0, (ratio > 1) & (square > 0))
    chernoff = np.where(
        np.where(ratio < 1, square > k, square < k),
        0.5 * (square - k - k * np.log(np.abs(square) / k)),
        0.0,
    )
    for drop in (3.0, 30.0):
        for weight in (-1.0, -20.0, -33.0, -38.0):
            kept.clear()
            rule = Rule(FINE, FINE, drop)
            law._inner(epsilon, ratio, excess, np.full(120, weight), rule, about)
            expected = square[inside & (weight - chernoff > about - drop - 4)]
            assert kept == pytest.approx(expected.tolist(), rel=1e-9)


# --- the outer integral


@pytest.mark.parametrize("cosine", [-0.9, -1e-3, 0.2, 0.95, math.cos(1e-3), math.cos(1e-7)])
@pytest.mark.parametrize("rank", [1, 5, 4097])
def test_the_outer_integrand_keeps_its_digits(
    cosine: float, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: R = ν cos(θ-φ)/cos θ and cos^{r-1} θ at 50 digits, measured from either end."""
    seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    monkeypatch.setattr(
        VectorLoss,
        "_inner",
        lambda _self, _e, ratio, excess, weight, *_: seen.append((ratio, excess, weight)),
    )
    rng = np.random.default_rng(40)
    for nu in (1.0, 1.7):
        law = VectorLoss(6, rank, cosine, nu)
        with mp.workdps(50):
            angle = mp.acos(mp.mpf(cosine))
            span = float(mp.pi - angle)
            x = span * np.concatenate([[1e-9, 1e-4], rng.uniform(0.001, 0.499, 6)])
            x = np.append(x, span / 2 - 1e-3)
            right = np.arange(len(x)) % 2 == 1
            law._integrand(1.0, x, right, RULE, -math.inf)
            ratio, excess, weight = seen.pop()
            for i, at in enumerate(x.tolist()):
                theta = mp.pi / 2 - mp.mpf(at) if right[i] else angle - mp.pi / 2 + mp.mpf(at)
                true = nu * mp.cos(theta - angle) / mp.cos(theta)
                assert ratio[i] == pytest.approx(float(true), rel=1e-13, abs=0)
                if nu == 1 and abs(at - span / 2) > 0.1 * span:
                    assert excess[i] == pytest.approx(float(true - 1), rel=1e-13, abs=0)
                else:
                    assert excess[i] == pytest.approx(float(true - 1), rel=1e-12, abs=0)
                log_cos = mp.log(mp.cos(theta))
                expected = law._log_angle + float((rank - 1) * log_cos)
                slack = 1e-14 * (1 + abs(expected)) + (rank - 1) * 3e-16 * abs(mp.tan(theta))
                assert abs(weight[i] - expected) <= slack


@pytest.mark.parametrize("cosine", [-0.6, 0.3, math.cos(1e-6)])
@pytest.mark.parametrize("g", [1e-8, 0.5, 1.0, 3.0, 1e9])
def test_places_are_measured_from_both_ends(cosine: float, g: float) -> None:
    """Oracle: tan θ = (g - ρ)/√(1-ρ²) at 50 digits, from φ - π/2, where R = 0, and from π/2."""
    found = VectorLoss(6, 3, cosine, 1.0)._ends(g)
    with mp.workdps(50):
        rho = mp.mpf(cosine)
        theta = mp.atan((g - rho) / mp.sqrt(1 - rho**2))
        expected = [float(theta - mp.acos(rho) + mp.pi / 2), float(mp.pi / 2 - theta)]
    assert found == pytest.approx(expected, rel=1e-13, abs=0)


@pytest.mark.parametrize(
    ("m", "r", "cosine", "nu", "epsilon"),
    [
        (20, 10, 0.99, 1.05, 0.4),
        (20, 10, -0.3, 0.7, 3.0),
        (4, 5, 0.6, 1.2, 1.0),
        (3, 9, 0.8, 1.4, 2.0),
        (5, 3, 0.95, 1.0, 0.0),
        (2, 1, 0.1, 1.0, 2000.0),
    ],
)
def test_pieces_of_the_angle(m: int, r: int, cosine: float, nu: float, epsilon: float) -> None:
    """Cut at R = 1, R = ν and c ln R + (r-1) ln ν = ε; measured from the nearer end, covering all.

    Oracle: θ of each by atan.
    """
    law = VectorLoss(m, r, cosine, nu)
    c, sine = (m + 1 - r) / 2, math.sqrt(1 - cosine**2)
    ratios = {1.0, nu}
    if c:
        ratios.add(math.exp(min((epsilon - (r - 1) * math.log(nu)) / c, 690.0)))
    first = math.acos(cosine) - math.pi / 2
    thetas = [first, *sorted(math.atan((q / nu - cosine) / sine) for q in ratios), math.pi / 2]
    outer, width, right = law._segments(epsilon)
    ends = sorted(
        {
            (round(math.pi / 2 - o - (w if flag else 0), 12) if flag else round(first + o, 12))
            for o, w, flag in zip(outer, width, right, strict=True)
        }
    )
    assert width.sum() == pytest.approx(math.pi / 2 - first, rel=1e-12)
    assert ends == pytest.approx(sorted({round(t, 12) for t in thetas[:-1]}), abs=1e-11)
    assert np.all(width >= 0)
    # No piece that reaches into the half next to R = 0 is measured from R = ∞.
    middle = first + (math.pi / 2 - first) / 2
    for o, w, flag in zip(outer, width, right, strict=True):
        end = math.pi / 2 - o if flag else first + o + w
        assert flag == (end - w >= middle - 1e-9) or w == 0


@pytest.mark.parametrize("rank", [1, 8, 60, 61, 62, 4096])
def test_steps_of_s_reach_beyond_the_peak(rank: int) -> None:
    """The peak of j^r e^{-j²} is at j = √(r/2); 4 beyond it e^-32 of it is left."""
    steps = VectorLoss(6, rank, 0.5, 1.0)._steps()
    assert steps[:6] == [-4.0, -1.5, 0.0, 1.5, 4.0, 8.5]
    wanted = 4 + math.sqrt(rank / 2)
    assert steps[-1] >= wanted
    assert len(steps) == 6 or steps[-2] < wanted
    assert all(b == 2 * a for a, b in itertools.pairwise(steps[5:]))


# (m, r, ν, ε), and how close two steps come; c > 0, c = 0 and c < 0.
CROSSINGS = [
    (20, 10, 1.05, 0.4, 0.1),
    (768, 8, 1.0, 2.0, 4e-4),
    (768, 8, 0.9, 60.0, 4e-5),
    (53248, 64, 1.0, 5.0, 1e-5),
    (64, 8, 5.0, 0.1, 6e-4),
    (2, 1, 1.0, 1e5, 3e-6),
    (1, 1, 1.3, 0.2, 4e-3),
    (9, 10, 1.2, 0.3, 1e-4),
    (9, 10, 1.0, 40.0, 1e-6),
    (3, 9, 1.4, 2.0, 1e-6),
    (3, 9, 1.0, 2.0, 1e-6),
    (2, 40, 0.7, 1e-3, 1e-6),
    (2, 40, 1.0, 50.0, 2e-3),
    (2, 40, 0.7, 3000.0, 1e-6),
]


@pytest.mark.parametrize(("m", "r", "nu", "epsilon", "close"), CROSSINGS)
def test_crossings_are_found_in_few_steps(
    m: int, r: int, nu: float, epsilon: float, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All R with loss ε at s = √(k-1) ∓ j, and no other; each from the side of the larger loss.

    Three steps are enough for 1e-5. Oracle: brentq in ln R on either side of where the loss has
    its only stationary point.
    """
    law = VectorLoss(m, r, 0.5, nu)
    k, c, expected = m + r - 1, (m + 1 - r) / 2, list[tuple[float, int]]()
    for side in (-1, 1) if c > 0 else (-1,):
        for j in law._steps():
            square = max(math.sqrt(k - 1) - side * j, 0.1) ** 2

            def excess(u: float, square: float = square) -> float:
                loss = (r - 1) * math.log(nu) + c * u + square / 2 * math.expm1(min(-u, 700.0))
                return loss - epsilon

            inside = math.log(square / (2 * c)) if c > 0 else 700.0
            end = side * 700.0
            if excess(inside) < 0 < excess(end):
                root = optimize.brentq(excess, *sorted((inside, end)), xtol=1e-15)
                expected.append((root, side))
    for steps, error in ((1, 10.0), (2, close), (3, 1e-5)):
        monkeypatch.setattr(_vector_loss, "_NEWTON", steps)
        found = list(map(math.log, law._crossings(epsilon)))
        assert len(found) == len(expected)
        for u, (true, side) in zip(found, expected, strict=True):
            slack = 1e-11 if steps > 1 else 0.02
            assert -1e-11 <= side * (u - true) <= error * abs(true) + slack


def test_first_panels_cut_at_scales_and_crossings() -> None:
    """θ = ± atan(2^i/√r), 0, and the crossings, each in its piece as a fraction of it."""
    law, epsilon = VectorLoss(20, 10, 0.9, 1.05), 0.8
    segments = law._segments(epsilon)
    low, high, segment = law._first_panels(epsilon, segments)
    sine, first = math.sqrt(1 - 0.9**2), math.acos(0.9) - math.pi / 2
    cuts = {0.0} | {s * math.atan(2.0**i / math.sqrt(10)) for i in range(6) for s in (-1, 1)}
    cuts |= {math.atan((q / 1.05 - 0.9) / sine) for q in law._crossings(epsilon)}
    outer, width, right = segments
    thetas = set()
    for i in range(len(outer)):
        if width[i] == 0:
            assert not np.any(segment == i)
            continue
        mine = segment == i
        a, b = low[mine], high[mine]
        assert a[0] == 0
        assert b[-1] == 1
        assert np.all(a[1:] == b[:-1])
        assert np.all(a < b)
        for at in a[1:] * width[i] + outer[i]:
            thetas.add(math.pi / 2 - at if right[i] else first + at)
    ends = [math.pi / 2 - o if f else first + o for o, f in zip(outer, right, strict=True)]
    ends += [
        math.pi / 2 - o - w if f else first + o + w for o, w, f in zip(*segments, strict=True)
    ]
    expected = sorted(t for t in cuts if t > first and min(abs(t - e) for e in ends) > 1e-9)
    assert sorted(thetas) == pytest.approx(expected, abs=1e-12)
    assert len(expected) > 12


@pytest.mark.parametrize(("part", "kept"), [(5e-13, True), (2e-14, False), (-1e-14, False)])
def test_cuts_in_the_rounding_of_an_end_are_left_out(
    part: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closer than 1e-13 of a piece to an end of it; not where that end is one of θ, R = 0."""
    law = VectorLoss(20, 10, 0.9, 1.0)
    g = 1e-3
    monkeypatch.setattr(VectorLoss, "_crossings", lambda *_: [g])
    at, width = law._ends(g)[0], 0.01  # no other cut is so close
    for outer in (at - part * width, at - (1 - part) * width):
        piece = np.array([outer]), np.array([width]), np.zeros(1, bool)
        assert (len(law._first_panels(1.0, piece)[0]) == 2) == kept
    g = abs(part) * width / math.sin(math.acos(0.9))
    piece = np.zeros(1), np.array([width]), np.zeros(1, bool)
    assert len(law._first_panels(1.0, piece)[0]) == 2
    # Pieces without a width have no panel, and the others keep their numbers.
    pieces = np.full(3, 0.3), np.array([0.0, 0.01, 0.0]), np.zeros(3, bool)
    assert law._first_panels(1.0, pieces)[2].tolist() == [1]


# --- halving panels


Integral = Callable[[np.ndarray], np.ndarray]


def watch_panels(patch: pytest.MonkeyPatch, of: Integral) -> list[tuple[int, float]]:
    """Integrate ``of`` over [0, 1] in place of a pair: how many panels, and about what."""
    seen: list[tuple[int, float]] = []

    def sums(
        _self: object,
        _epsilon: float,
        _segments: object,
        low: np.ndarray,
        high: np.ndarray,
        _segment: object,
        rule: Rule,
        about: float,
    ) -> np.ndarray:
        seen.append((len(low), about))
        half = (high - low) / 2
        values = of(low[:, None] + half[:, None] * (1 + rule.outer[0])) @ rule.outer[1] * half
        return np.log(np.stack([values, 3 * values]))

    patch.setattr(VectorLoss, "_panel_sums", sums)
    return seen


def adapt(count: int = 1, about: float = -math.inf) -> tuple[float, float]:
    edges = np.linspace(0, 1, count + 1)
    panels = Panels(1.0, [True], edges[:-1], edges[1:], np.zeros(count, dtype=np.int64))
    nothing = np.zeros(1), np.ones(1), np.zeros(1, dtype=bool)
    return VectorLoss(5, 3, 0.9, 1.0)._adapt(1.0, nothing, panels, about)


def test_smooth_panels_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """∫ e^x = e - 1, twice the same panels and no halving; e^-34 is judged by the first sum."""
    seen = watch_panels(monkeypatch, np.exp)
    found = adapt(3)
    assert found == pytest.approx((math.log(math.e - 1), math.log(3 * (math.e - 1))), abs=1e-14)
    assert [n for n, _ in seen] == [3, 3]
    assert seen[0][1] == -math.inf
    assert seen[1][1] == pytest.approx(math.log(math.e - 1), abs=1e-12)
    seen.clear()
    adapt(3, 5.0)
    assert [about for _, about in seen] == [5.0, 5.0]


def test_only_panels_that_disagree_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """∫ x^.3 dx = 1/1.3: it is the first panel that never agrees until it is small."""
    seen = watch_panels(monkeypatch, lambda x: x**0.3)
    found = adapt(4)
    assert found == pytest.approx((-math.log(1.3), math.log(3 / 1.3)), abs=1e-10)
    sizes = [n for n, _ in seen]
    # Both halves of what disagreed are halved again.
    assert sizes[:3] == [4, 4, 2]
    assert set(sizes[3:]) == {4}
    # A panel of width w is off by about w^1.3 times what one of width 1 is.
    whole = abs(
        float(
            _vector_loss._RULES[0].outer[1] @ (0.5 + 0.5 * _vector_loss._RULES[0].outer[0]) ** 0.3
        )
        / 2
        - 1 / 1.3
    )
    needed = math.log2((whole * 1.3 / (2e-11 / 8)) ** (1 / 1.3) / 4)
    assert len(sizes) - 2 == pytest.approx(needed, abs=4)


def test_panels_that_hold_nothing_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch_panels(monkeypatch, np.zeros_like)
    assert adapt(2) == (-math.inf, -math.inf)
    assert [n for n, _ in seen] == [2, 2]


def test_more_open_panels_than_allowed_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the limit they are halved, beyond it they are not."""
    noise = np.random.default_rng(41)
    seen = watch_panels(monkeypatch, lambda x: noise.uniform(1, 2, x.shape))
    monkeypatch.setattr(_vector_loss, "_MAX_PANELS", 8)
    with pytest.raises(ConvergenceError, match="missed its tolerance"):
        adapt(2)
    assert [n for n, _ in seen] == [2, 2, 4, 8, 16]
    seen.clear()
    monkeypatch.setattr(_vector_loss, "_MAX_PANELS", 10**6)
    monkeypatch.setattr(_vector_loss, "_ROUNDS", 4)
    with pytest.raises(ConvergenceError, match="missed its tolerance"):
        adapt(2)
    assert [n for n, _ in seen] == [2, 2, 4, 8]


# --- the search for ε


def test_one_step_solves_a_power_law() -> None:
    """Log δ straight in log ε, with an exponent below 3 and from above -1 with any."""
    for epsilon, power, at, aim in ((2.0, 1.5, -4.0, -5.0), (0.1, 0.5, -0.5, -0.3)):
        slope = power / epsilon
        for last in (None, (at + (at - aim), 0.7), (at - (at - aim), 0.7)):
            found = _vector_loss._newton(epsilon, at, slope, aim, last)
            assert power * math.log(found / epsilon) == pytest.approx(at - aim, rel=1e-12)
    for epsilon, slope, at in ((2.0, 5.0, -0.9), (2.0, 1.45, -9.0), (0.25, 11.6, -9.0)):
        found = _vector_loss._newton(epsilon, at, slope, at - 0.6, None)
        assert slope * epsilon * math.log(found / epsilon) == pytest.approx(0.6, rel=1e-12)


def test_one_step_solves_a_normal_tail() -> None:
    """√(-log δ) straight in ε, steeper than ε^-3; no step shrinks ε to less than a tenth."""
    for aim in (-30.0, -9.5, -8.0, -2.5):
        for level, rise, epsilon in ((0.5, 1.25, 2.0), (2.4, 1.2, 0.5)):
            root = level + rise * epsilon
            value, slope = -(root**2), 2 * root * rise
            found = _vector_loss._newton(epsilon, value, slope, aim, None)
            aimed = max(math.sqrt(-aim), level + rise * epsilon / 8)
            assert level + rise * found == pytest.approx(
                min(aimed, level + rise * epsilon * 8), rel=1e-12
            )
    found = _vector_loss._newton(2.0, -9.0, 15.0, 0.0, None)
    assert found == pytest.approx(2.0 + 2 * 3 * (0 - 3) / 15, rel=1e-12)
    assert _vector_loss._newton(2.0, -9.0, 3.0, 0.5, None) == pytest.approx(0.25, rel=1e-12)


def test_one_step_solves_a_bent_line_close_to_the_end() -> None:
    """1/slope straight in log δ, from the last two points: ε = a + b v + c v² in v = log δ."""

    def place(v: float) -> tuple[float, float]:
        return 3.0 - 0.4 * v + 0.05 * v * v, -1 / (-0.4 + 0.1 * v)

    (_, before), (epsilon, slope) = place(-2.0), place(-3.0)
    found = _vector_loss._newton(epsilon, -3.0, slope, -3.2, (-2.0, before))
    assert found == pytest.approx(place(-3.2)[0], rel=1e-12)
    # A quarter of the last step is close; farther away it is the rule for a first step.
    plain = _vector_loss._newton(epsilon, -3.0, slope, -3.26, None)
    assert _vector_loss._newton(epsilon, -3.0, slope, -3.26, (-2.0, before)) == plain
    assert _vector_loss._newton(epsilon, -3.0, slope, -3.24, (-2.0, before)) != plain
    # It shrinks ε to a tenth at most.
    assert _vector_loss._newton(1.0, -3.0, 0.01, -2.8, (-1.0, 0.01)) == pytest.approx(0.125)


def test_steps_are_at_most_a_factor_of_eight() -> None:
    assert _vector_loss._newton(2.0, -1.0, 0.0, -5.0, None) == pytest.approx(16.0)
    assert _vector_loss._newton(2.0, -5.0, 0.0, -1.0, None) == pytest.approx(0.25)
    assert _vector_loss._newton(2.0, -1.0, 1e-3, -5.0, None) == pytest.approx(16.0)


class Law:
    """A law in place of that of a pair: log δ - floor at ε, and who asked for it."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        value: Callable[[float], float],
        start: float,
        **faults: float,
    ) -> None:
        self.value, self.asked, self.floor = value, list[tuple[str, float]](), 0.0
        self.blind, self.flat = "blind" in faults, "flat" in faults
        patch.setattr(VectorLoss, "floor", property(lambda _: self.floor))
        patch.setattr(VectorLoss, "_guess", lambda _self, _delta: start)
        patch.setattr(VectorLoss, "_resolved", self._resolved)
        patch.setattr(VectorLoss, "_glance", self._glance)

    def _at(self, epsilon: float) -> tuple[float, float]:
        value = self.value(epsilon)
        if self.flat or value == -math.inf:
            return value, value
        step = 1e-6 * max(epsilon, 1e-3)
        slope = (self.value(max(epsilon - step, 0)) - self.value(epsilon + step)) / (
            epsilon + step - max(epsilon - step, 0)
        )
        return value, value + math.log1p(max(slope, 0.0))

    # Static for the class whose method it replaces: a bound method gets no other self.
    def _resolved(
        self, epsilon: float, about: float = -math.inf, panels: object = None
    ) -> tuple[float, float]:
        del about, panels
        self.asked.append(("checked", epsilon))
        return self._at(epsilon)

    def _glance(
        self,
        epsilon: float,
        about: float = -math.inf,
        panels: object = None,
        rule: Rule = _vector_loss._RULES[0],
    ) -> tuple[float, float, None]:
        del about, panels
        coarse = rule is _vector_loss._COARSE
        self.asked.append(("coarse" if coarse else "fine", epsilon))
        value, above = (0.0, 0.0) if coarse and self.blind else self._at(epsilon)
        return value, above, None

    def count(self) -> Counter[str]:
        return Counter(kind for kind, _ in self.asked)


PAIR = (20, 10, 0.9, 1.0)


def test_the_search_aims_at_the_middle_of_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """δ(ε) = floor + C ε^-1.7 is solved by one step: two coarse values, a fine one, a checked one.

    The window is from (1 - 3 RTOL) to (1 - RTOL) of δ, all of it above the floor; its middle, in
    logs, is returned.
    """
    monkeypatch.setattr(_vector_loss, "RTOL", 1e-2)
    for floor, delta in ((0.0, 0.3), (0.2, 0.3), (0.09, 0.1)):
        law = Law(monkeypatch, lambda e: -1.7 * math.log(e) - 3.0, 1.0)
        law.floor = floor
        found = VectorLoss(*PAIR).epsilon(delta)
        least, most = delta * 0.97 - floor, delta * 0.99 - floor
        aim = (math.log(least) + math.log(most)) / 2
        assert -1.7 * math.log(found) - 3.0 == pytest.approx(aim, abs=1e-6)
        assert law.count() == {"coarse": 2, "fine": 1, "checked": 1}


def test_next_to_the_floor_the_search_aims_below_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where (1 - 3 RTOL) δ lies below the floor any value above it will do: half of the goal."""
    monkeypatch.setattr(_vector_loss, "RTOL", 1e-2)
    law = Law(monkeypatch, lambda e: -1.7 * math.log(e) - 3.0, 1.0)
    law.floor = 0.098
    found = VectorLoss(*PAIR).epsilon(0.1)
    goal = math.log(0.099 - 0.098)
    assert -1.7 * math.log(found) - 3.0 == pytest.approx(goal - math.log(2), abs=1e-6)
    law.floor = 0.0990001
    assert VectorLoss(*PAIR).epsilon(0.1) == math.inf
    law.floor = 0.0989999
    assert VectorLoss(*PAIR).epsilon(0.1) < math.inf


def test_without_slopes_the_search_brackets_and_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """By factors of eight, then by halves, to 3e-2 with coarse nodes, 3e-5 with fine ones."""
    law = Law(monkeypatch, lambda e: -math.log(e) if e else 0.0, 1.0, flat=1.0)
    found = VectorLoss(*PAIR).epsilon(1e-2)
    assert 100 < found < 100 * (1 + 4e-10)
    coarse = [e for kind, e in law.asked if kind == "coarse"]
    assert coarse[:6] == pytest.approx([1.0, 8.0, 64.0, 512.0, 288.0, 176.0])
    assert abs(coarse[-1] / 100 - 1) < 3.1e-2 or len(coarse) == 11
    fine = [e for kind, e in law.asked if kind == "fine"]
    assert abs(fine[-1] / 100 - 1) < 3.1e-5
    # What the last stage has bracketed the next one finds anew: by 8 from where it stands.
    assert len(law.asked) <= 66


def test_coarse_values_that_lead_nowhere_are_left_after_ten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Coarse values of 1 everywhere: fine nodes then start over."""
    law = Law(monkeypatch, lambda e: -1.2 * e, 3.0, blind=1.0)
    found = VectorLoss(*PAIR).epsilon(1e-2)
    assert -1.2 * found == pytest.approx(math.log(1e-2), abs=1e-9)
    assert law.count()["coarse"] == 11
    assert law.count()["fine"] <= 13  # ten factors of eight back, and three
    assert law.count()["checked"] <= 3


def test_zero_is_returned_where_nothing_is_to_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where δ(0) <= δ, after one look and one check at 0; just above it the search goes on."""
    law = Law(monkeypatch, lambda e: -5.0 - e, 4.0)
    assert VectorLoss(*PAIR).epsilon(math.exp(-5.0) * (1 + 1e-9)) == 0.0
    assert [e for kind, e in law.asked if kind == "checked"] == [0.0]
    assert law.asked[-1] == ("checked", 0.0)
    law.asked.clear()
    delta = math.exp(-5.5)
    assert VectorLoss(*PAIR).epsilon(delta) == pytest.approx(0.5, abs=1e-9)
    assert ("checked", 0.0) not in law.asked
    assert sum(e == 0 for _, e in law.asked) <= 1


@pytest.mark.parametrize(
    ("m", "r", "cosine", "nu", "delta"),
    [
        (768, 8, 0.999, 1.0, 1e-5),
        (20, 10, 0.99, 1.05, 1e-2),
        (20, 10, 0.99, 0.9, 1e-8),
        (400, 400, 0.9, 1.0, 1e-3),
        (3, 9, 0.8, 1.3, 0.1),
        (5, 1, 0.99, 1.0, 0.2),
        (2, 1, 0.3, 1.0, 0.2),
        (20, 10, 0.9, 1.0, 0.7),
        (768, 8, 1 - 1e-13, 1.0, 0.1),
    ],
)
@pytest.mark.parametrize("far", [False, True])
def test_the_first_guess_is_the_largest_loss_on_a_circle(
    m: int,
    r: int,
    cosine: float,
    nu: float,
    delta: float,
    far: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Oracle: the same of twelve directions one by one, with quantiles of scipy.stats.

    T has the tail of one normal score, s that of the other; beyond ε the loss is taken as
    exponential, with the mean that a second circle, a quarter farther out, shows: then
    δ(ε) = P[L > ε] / (1 + 1/mean). Where there is no quantile P[tan θ > x] < x^-r has one.
    """
    k, law = m + r - 1, VectorLoss(m, r, cosine, nu)
    if far:
        nothing = lambda _r, tail: np.full(tail.shape, -math.inf)  # noqa: E731
        monkeypatch.setattr(_vector_loss.special, "stdtrit", nothing)

    def quantile(tail: float) -> float:
        return tail ** (-1 / r) if far else stats.t.isf(tail, r) / math.sqrt(r)

    def largest(score: float) -> float:
        found = list[float]()
        for i in range(12):
            one = score * math.cos(2 * math.pi * i / 12)
            two = score * math.sin(2 * math.pi * i / 12)
            tangent = math.copysign(quantile(stats.norm.sf(abs(one))), one)
            g = max(cosine + math.sqrt(1 - cosine**2) * tangent, 1e-12)
            s = max(math.sqrt(k - 0.5) + two / math.sqrt(2), 0.0)
            loss = (r - 1) * math.log(nu) + (m + 1 - r) / 2 * math.log(nu * g)
            found.append(loss + s * s / 2 * (1 / (nu * g) - 1))
        return max(found) if score > 0 else min(found)

    score = stats.norm.isf(delta)
    first, second = largest(score), largest(score + 0.25)
    mean = (second - first) / (stats.norm.logsf(score) - stats.norm.logsf(score + 0.25))
    expected = max(first - mean * math.log1p(1 / mean), first / 4, 1e-3)
    assert law._guess(delta) == pytest.approx(expected, rel=1e-9)


def test_panels_are_kept_for_an_epsilon_nearby() -> None:
    """Fine nodes keep them within .1 %, coarse ones within a quarter; other pieces never."""
    law = VectorLoss(20, 10, 0.9, 1.05)
    known = law._panels(1.0, law._segments(1.0), None, 1e-3)
    for epsilon, same in ((1.0009, True), (1.0011, False), (0.9992, True)):
        segments = law._segments(epsilon)
        assert (law._panels(epsilon, segments, known, 1e-3) is known) == same
        assert (law._glance(epsilon, panels=known)[2] is known) == same
    for epsilon, same in ((1.24, True), (1.4, False), (0.81, True), (0.79, False)):
        found = law._glance(epsilon, panels=known, rule=_vector_loss._COARSE)[2]
        assert (found is known) == same
    other = known._replace(live=[not x for x in known.live])
    assert law._panels(1.0, law._segments(1.0), other, 1e-3) is not other


def test_opposite_and_parallel_vectors_need_no_angle() -> None:
    """R = ±ν surely: for ρ = -1 and for equal vectors nothing lies above the floor.

    Oracle: differences of χ² tails.
    """
    for cosine, nu in ((-1.0, 1.0), (-1.0, 2.0), (1.0, 1.0)):
        law = VectorLoss(6, 3, cosine, nu)
        assert law._resolved(0.3) == (-math.inf, -math.inf)
        assert law._glance(0.3) == (-math.inf, -math.inf, None)
    for nu in (1.3, 0.6):
        with mp.workdps(40):
            exact = exact_inner(6, 3, nu, 0.3, mp.mpf(nu))
            expected = [float(mp.log(x)) for x in exact]
        law = VectorLoss(6, 3, 1.0, nu)
        assert law._resolved(0.3) == pytest.approx(expected, abs=1e-11)
        assert law._glance(0.3)[:2] == law._resolved(0.3)


def test_sums_in_logs() -> None:
    """Oracle: the plain sum; -inf where nothing is summed, and no overflow."""
    values = np.array([[0.0, -1.0, -math.inf], [-math.inf] * 3, [800.0, 800.0, -5.0]])
    found = _vector_loss._logsumexp(values)
    assert found[0] == pytest.approx(math.log(1 + math.exp(-1.0)), rel=1e-15)
    assert found[1] == -math.inf
    assert found[2] == pytest.approx(800 + math.log(2), rel=1e-15)


def test_the_profile_of_a_pair_is_floor_and_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """δ = P[R <= 0] + e^rest, and 1 at most whatever rounding adds to it."""
    law = VectorLoss(5, 3, 0.95, 1.0)
    rest = law._resolved(1.0)[0]
    assert law.delta(1.0) == pytest.approx(law.floor + math.exp(rest), rel=1e-15)
    assert VectorProjection(5, 3, -1.0).delta(1.0) == 1.0
    monkeypatch.setattr(VectorLoss, "_resolved", lambda *_: (math.log1p(-law.floor) + 1e-9, 0.0))
    assert law.delta(1.0) == 1.0
