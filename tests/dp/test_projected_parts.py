"""Each part of the bounds of a projected Gaussian by itself, against the proof on paper.

An upper end is a sum: what is computed, an error bound of the rule, what lies beyond its nodes,
and rounding. Here all but one of them are made 0, or the unit of rounding is made 1e-3, so that
neither a smaller nor a larger one goes unseen. The proofs: docs/theory/projected-gaussian.md.
"""

import itertools
import math
from typing import NamedTuple

import mpmath as mp
import numpy as np
import pytest
from projected_oracle import log_excess
from scipy import integrate, special, stats

from lora_privacy.dp import _hyp1f1, _majorant, _projected_rdp
from lora_privacy.dp._hyp1f1 import _integrate
from lora_privacy.dp._replaced import split
from lora_privacy.dp.projected import ProjectedGaussian

COARSE_EPS = 1e-3

# --- ln(₁F₁ - 1) by quadrature

# (features, rank, x): the peak left and right of 1/2, next to 0, next to 1, and in the middle.
CASES = [
    (2, 1, 301.0),
    (3, 2, 500.0),
    (9, 2, 400.0),
    (64, 60, 1e4),
    (768, 8, 320.0),
    (768, 8, 2000.0),
    (768, 767, 310.0),
    (4096, 64, 5000.0),
    (53248, 1, 2000.0),
]


class Panels(NamedTuple):
    """What ``_integrate`` found at one x, and where it put its panels, in logits."""

    value: float
    middle: float
    strides: tuple[float, float]
    low: float
    high: float
    count: int


def integrated(features: int, rank: int, x: float, **changes: object) -> Panels:
    edges: list[tuple[float, float]] = []
    counts: list[int] = []
    edge, share = _hyp1f1._edge, _hyp1f1._log_share
    with pytest.MonkeyPatch.context() as patch:
        for name, change in changes.items():
            patch.setattr(_hyp1f1, name, change)

        def watched_edge(height, middle, stride, floor):  # noqa: ANN001, ANN202
            found = edge(height, middle, stride, floor)
            edges.append((float(middle[0]), float(stride[0])))
            ends.append(float(found[0]))
            return found

        def watched_share(u: np.ndarray) -> np.ndarray:
            if u.ndim == 3:
                counts.append(u.shape[1])
            return share(u)

        ends: list[float] = []
        patch.setattr(_hyp1f1, "_edge", watched_edge)
        patch.setattr(_hyp1f1, "_log_share", watched_share)
        value = float(_integrate(features, rank, np.array([x]))[0])
    (middle, first), (_, second) = edges
    return Panels(value, middle, (first, second), ends[0], ends[1], counts[0])


NO_SUM = np.full(16, -np.inf)


def shape_of(features: int, rank: int) -> tuple[mp.mpf, mp.mpf]:
    return mp.mpf(rank) / 2, mp.mpf(features - rank) / 2


def log_height(features: int, rank: int, x: float, beta: mp.mpf) -> mp.mpf:
    """Of the integrand in logits, a ln β + c ln(1-β) + xβ + ln(1 - e^{-xβ})."""
    a, c = shape_of(features, rank)
    return a * mp.log(beta) + c * mp.log1p(-beta) + x * beta + mp.log(-mp.expm1(-x * beta))


def share_at(logit: float | mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-mp.mpf(logit)))


def norm(features: int, rank: int) -> mp.mpf:
    return mp.log(mp.beta(*shape_of(features, rank)))


@pytest.mark.parametrize(("features", "rank", "x"), CASES)
def test_panels_lie_about_the_peak(features: int, rank: int, x: float) -> None:
    """They begin at 4 standard deviations and grow by 5/4 until the integrand fell by e^-36.

    Each is at most half a logit wide, and 3.2 standard deviations of a peak as narrow as the one
    at hand, or as the curvature at either end.
    """
    found = integrated(features, rank, x)
    with mp.workdps(70):
        a, c = shape_of(features, rank)

        def plain(t: mp.mpf) -> mp.mpf:
            beta = 1 / (1 + mp.exp(-t))
            return -a * mp.log1p(mp.exp(-t)) - c * mp.log1p(mp.exp(t)) + x * beta

        middle = mp.mpf(found.middle)
        bend = -mp.diff(plain, middle, 2)
        assert abs(mp.diff(plain, middle)) <= 1e-13 * (bend + x + a)
        stride = 4 / mp.sqrt(bend)
        assert found.strides == pytest.approx((-float(stride), float(stride)), rel=1e-12)
        top, steepest = log_height(features, rank, x, share_at(found.middle)), bend
        for edge, side in ((found.low, -1), (found.high, 1)):
            reach = stride
            while log_height(features, rank, x, share_at(middle + side * reach)) > top - 36:
                reach *= 1.25
            assert edge == pytest.approx(float(middle + side * reach), rel=1e-11)
            beta = share_at(edge)
            steepest = max(steepest, a * (1 - beta) ** 2 + c * beta**2)
        wide = min(mp.mpf("0.5"), mp.mpf("3.2") / mp.sqrt(steepest))
        assert found.count == math.ceil((found.high - found.low) / wide)


@pytest.mark.parametrize(("features", "rank", "x"), CASES)
def test_the_rule_alone_is_exact_to_rounding(features: int, rank: int, x: float) -> None:
    """Oracle: ₁F₁ at 40 digits. Without any error bound, 2e-12 and a few ulp of its parts."""
    found = integrated(features, rank, x, _GAUSS=0.0, _EPS=0.0).value
    true = float(log_excess(features, rank, x))
    size = x + math.lgamma(features / 2)
    assert found == pytest.approx(true, rel=1e-15, abs=2e-12 + 2e-15 * size)


def ellipse_bounds(features: int, rank: int, x: float, panels: Panels) -> list[mp.mpf]:
    """Log of M times the half width for each panel, by the proof: ρ = 4 about each of them."""
    a, c = shape_of(features, rank)
    peak = share_at(panels.middle)
    step = (mp.mpf(panels.high) - mp.mpf(panels.low)) / panels.count
    cuts = [share_at(panels.low + i * step) for i in range(panels.count + 1)]
    logs = []
    for left, right in itertools.pairwise(cuts):
        centre, half = (left + right) / 2, (right - left) / 2
        real, off = mp.mpf("2.125") * half, mp.mpf("1.875") * half
        low, high = centre - real, centre + real
        at = min(max(peak, low), high)
        size = a * mp.log(at) + c * mp.log1p(-at) + x * at
        size += a / 2 * mp.log1p((off / low) ** 2) + c / 2 * mp.log1p((off / (1 - high)) ** 2)
        size += mp.log(min(mp.mpf(2), x * (high + off))) - mp.log(low) - mp.log(1 - high)
        logs.append(size + mp.log(half))
    return logs


@pytest.mark.parametrize(("features", "rank", "x"), CASES)
def test_the_error_bound_of_the_rule_is_that_of_the_proof(
    features: int, rank: int, x: float
) -> None:
    """M on the ellipse times the half width, with a constant of 1 and nothing else; 1e-9."""
    found = integrated(features, rank, x, _GAUSS=1.0, _EPS=0.0, _LOG_WEIGHTS=NO_SUM)
    with mp.workdps(70):
        total = sum(map(mp.exp, ellipse_bounds(features, rank, x, found)), mp.mpf(0))
        expected = float(mp.log(total) - norm(features, rank))
    assert found.value == pytest.approx(expected, rel=1e-14, abs=1e-9)


@pytest.mark.parametrize(("features", "rank", "x"), CASES)
def test_the_ellipse_bound_holds_and_is_near(features: int, rank: int, x: float) -> None:
    """Oracle: the integrand itself at 24 points of each ellipse; e^7 above it at most."""
    panels = integrated(features, rank, x)
    a, c = rank / 2, (features - rank) / 2
    circle = np.exp(1j * np.pi * (np.arange(24) + 0.5) / 24)
    with mp.workdps(70):
        bounds = [float(b) for b in ellipse_bounds(features, rank, x, panels)]
    cuts = np.linspace(panels.low, panels.high, panels.count + 1)
    beta, gamma = special.expit(cuts), special.expit(-cuts)
    largest = -math.inf
    for i, bound in enumerate(bounds):
        small = min(beta[i + 1], gamma[i])
        half = (gamma[i] - gamma[i + 1] if small == gamma[i] else beta[i + 1] - beta[i]) / 2
        place = (4 * circle + circle.conj() / 4) / 2 * half
        z, rest = (beta[i] + beta[i + 1]) / 2 + place, (gamma[i] + gamma[i + 1]) / 2 - place
        logs = (a - 1) * np.log(z) + (c - 1) * np.log(rest) + x * z + np.log(-np.expm1(-x * z))
        seen = float(logs.real.max()) + math.log(half)
        assert seen <= bound + 1e-9 * abs(bound)
        largest = max(largest, seen)
    assert max(bounds) <= largest + 7


def test_the_constants_of_the_ellipse() -> None:
    """Trefethen, ATAP, Thm. 19.3: (64/15) ρ^{-2n+2} / (1 - ρ^-2) for n nodes; docs state ρ = 4.

    The semi-axes are those of (z + 1/z)/2 on abs(z) = ρ.
    """
    assert pytest.approx(64 / 15 * 4.0**-30 / (1 - 1 / 16), rel=1e-15) == _hyp1f1._GAUSS
    assert (_hyp1f1._REAL, _hyp1f1._IMAGINARY) == (2.125, 1.875)


@pytest.mark.parametrize(("features", "rank", "x"), CASES)
@pytest.mark.parametrize("drop", [0.5, 36.0])
def test_tails_beyond_the_panels_are_those_of_the_proof(
    features: int, rank: int, x: float, drop: float
) -> None:
    """e^j / (θ (1-β)) on the left, θ = min(a, β j'(β)), and the same on the right with c.

    j' by numerical differentiation, but for xβ/(1 - e^{-xβ}) on the left, where the larger one of
    xβ and 1 stands for it.
    """
    changes = {"_GAUSS": 0.0, "_EPS": 0.0, "_LOG_WEIGHTS": NO_SUM, "_DROP": drop}
    found = integrated(features, rank, x, **changes)
    with mp.workdps(70):
        a, c = shape_of(features, rank)
        low, high = share_at(found.low), share_at(found.high)
        rise = low * mp.diff(lambda b: a * mp.log(b) + c * mp.log1p(-b), low)
        rise += max(x * low, mp.mpf(1))
        fall = -(1 - high) * mp.diff(lambda b: log_height(features, rank, x, b), high)
        total = mp.exp(log_height(features, rank, x, low)) / (min(a, rise) * (1 - low))
        total += mp.exp(log_height(features, rank, x, high)) / (min(c, fall) * high)
        expected = float(mp.log(total) - norm(features, rank))
    assert found.value == pytest.approx(expected, rel=1e-14, abs=1e-8)


def test_the_tail_bounds_hold() -> None:
    """Oracle: adaptive quadrature in logits, where the panels end at e^-2 of the peak."""
    for features, rank, x in CASES[:5]:
        changes = {"_GAUSS": 0.0, "_EPS": 0.0, "_LOG_WEIGHTS": NO_SUM, "_DROP": 2.0}
        found = integrated(features, rank, x, **changes)
        a, c = rank / 2, (features - rank) / 2

        scale = found.value + math.lgamma(a) + math.lgamma(c) - math.lgamma(a + c) - x

        def density(
            t: float, a: float = a, c: float = c, x: float = x, scale: float = scale
        ) -> float:
            beta, gamma = special.expit(t), special.expit(-t)
            height = a * math.log(beta) + c * math.log(gamma) - x * gamma
            return math.exp(height - scale) * -math.expm1(-x * beta)

        beyond = sum(
            integrate.quad(density, *ends, epsrel=1e-10, epsabs=0)[0]
            for low, high in [(found.low, found.high)]
            for ends in (
                (low - 90, low - 9),
                (low - 9, low),
                (high, high + 9),
                (high + 9, high + 90),
            )
        )
        true = found.value + math.log(beyond)
        assert true <= found.value <= true + 1.5


@pytest.mark.parametrize(("features", "rank", "x"), CASES)
def test_rounding_of_the_exponents_is_eight_units_of_each_part(
    features: int, rank: int, x: float
) -> None:
    """With a unit of 1e-3: of a + 1 times ln β, c + 1 times ln(1-β), x β, three ln Γ.

    And of a width, whose two ends are an ulp off; 64 more, and 4 units of the sum.
    """
    exact = integrated(features, rank, x, _EPS=0.0)
    found = integrated(features, rank, x, _EPS=COARSE_EPS).value
    with mp.workdps(70):
        a, c = shape_of(features, rank)
        low, high = share_at(exact.low), share_at(exact.high)
        shifted = exact.middle > 0
        size = (a + 1) * abs(mp.log(low)) + (c + 1) * abs(mp.log1p(-high))
        size += x * (1 - low) if shifted else x * high
        size += sum(abs(mp.loggamma(s)) for s in (a, c, a + c))
        size += exact.count / (mp.mpf(exact.high) - mp.mpf(exact.low))
        shift = x if shifted else 0
        inner = exact.value - shift + COARSE_EPS * (64 + 8 * size)
        expected = shift + inner + 4 * COARSE_EPS * (shift + abs(inner))
    assert found == pytest.approx(float(expected), rel=1e-12)


def test_an_edge_is_the_first_of_a_geometric_walk() -> None:
    """Row by row: rows that have arrived stand still."""
    asked: list[np.ndarray] = []

    def height(t: np.ndarray) -> np.ndarray:
        asked.append(t.copy())
        return -np.abs(t)

    found = _hyp1f1._edge(
        height, np.array([0.0, 1.0]), np.array([2.0, 1.0]), np.array([-3.0, -2.0])
    )
    assert found.tolist() == [3.125, 2.0]
    assert len(asked) == 4 - 1
    found = _hyp1f1._edge(height, np.zeros(1), -np.ones(1), np.array([-1.5]))
    assert found.tolist() == [-1.5625]


def test_a_tail_needs_a_rate() -> None:
    found = _hyp1f1._tail(np.array([0.0, -2.0, 0.0, 0.0]), np.array([2.0, 0.25, 0.0, -1.0]))
    assert found == pytest.approx([0.5, 4 * math.exp(-2.0), math.inf, math.inf])
    assert _hyp1f1._log_share(np.array([1e-20, 2.0])) == pytest.approx(
        [math.log(1e-20), math.log(1 - math.exp(-2.0))], rel=1e-15
    )


def test_rows_are_split_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work array is larger than a block, unless it is one row; the values are the same."""
    x = np.geomspace(301, 1e4, 7)
    whole = _integrate(20, 3, x)
    seen: list[tuple[int, ...]] = []
    share = _hyp1f1._log_share
    monkeypatch.setattr(_hyp1f1, "_log_share", lambda u: (seen.append(u.shape), share(u))[1])
    most = 2 * max(math.prod(s) for s in (seen or [(1,)]))
    _integrate(20, 3, x[:1])
    one = max(math.prod(s) for s in seen)
    for block in (one, 3 * one):
        seen.clear()
        monkeypatch.setattr(_hyp1f1, "_BLOCK", block)
        assert _integrate(20, 3, x) == pytest.approx(whole, rel=0, abs=4e-9)
        large = [s for s in seen if len(s) == 3]
        assert all(math.prod(s) <= block or s[0] == 1 for s in large)
        assert sum(s[0] for s in large) == len(x)
        assert len(large) <= (7 if block == one else 5)
    assert most > 0


# --- ln(₁F₁ - 1) by its series, and which of them is asked


@pytest.mark.parametrize("eps", [2.0**-52, COARSE_EPS])
@pytest.mark.parametrize(("features", "rank"), [(2, 1), (9, 4), (768, 8), (700, 650)])
@pytest.mark.parametrize("x", [1e-200, 0.3, 4.0, 120.0, 300.0])
def test_the_series_pays_for_its_remainder_and_its_rounding(
    features: int, rank: int, x: float, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terms until one is a unit of the sum and they halve; the last one is added once more.

    A term is a product of k ratios of 8 roundings at most, and a sum and its logarithm are off by
    20 and 4 more.
    """
    monkeypatch.setattr(_hyp1f1, "_EPS", eps)
    with mp.workdps(40):
        a, total, at = mp.mpf(rank) / 2, mp.mpf(features) / 2, mp.mpf(x)
        term = value = a / total * at
        k = 1
        while True:
            ratio = (a + k) / (total + k) * at / (k + 1)
            if ratio < 0.5 and term <= eps * value:
                break
            term *= ratio
            value += term
            k += 1
        expected = mp.log(value + term) + eps * (16 + 8 * k + 4 * abs(mp.log(value)))
        true = log_excess(features, rank, x) if x > 1e-100 else mp.log(a / total * at)
    found = float(_hyp1f1._series(features, rank, np.array([x]))[0])
    assert found == pytest.approx(float(expected), rel=1e-14, abs=1e-14)
    assert true <= found


def test_a_series_goes_on_until_all_rows_end() -> None:
    """A small argument beside a large one gains nothing but the rounding of more terms."""
    alone = _hyp1f1._series(9, 4, np.array([1e-3]))[0]
    both = _hyp1f1._series(9, 4, np.array([1e-3, 200.0]))[0]
    assert alone <= both <= alone + 1e-12


def test_which_method_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The series to 300, the quadrature to 1e200, each at most so many at once; then β = 1."""
    asked: dict[str, list[np.ndarray]] = {"_series": [], "_integrate": []}
    for name, seen in asked.items():
        monkeypatch.setattr(
            _hyp1f1, name, lambda _m, _r, x, seen=seen: (seen.append(x), np.log(x) - 9)[1]
        )
    monkeypatch.setattr(_hyp1f1, "_CHUNK", 2)
    x = np.array([[0.0, 1.0, 300.0, 300.5], [1e5, 1e199, 1e201, 4.0]])
    found = _hyp1f1.log_excess(9, 4, x)
    assert [part.tolist() for part in asked["_series"]] == [[1e-290, 1.0], [300.0, 4.0]]
    assert [part.tolist() for part in asked["_integrate"]] == [[300.5, 1e5], [1e199]]
    wanted = np.maximum(x, 1e-290)
    expected = np.log(wanted) - 9
    expected[1, 2] = 1e201
    assert found == pytest.approx(expected, rel=1e-14)


def test_the_cap_is_a_share_of_one_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """ln(e^x - 1) and four units of it and of 1; it also caps what the methods say."""
    x = np.array([1e-290, 1e-3, 2.0, 500.0])
    plain = x + np.log(-np.expm1(-x))
    monkeypatch.setattr(_hyp1f1, "_EPS", COARSE_EPS)
    expected = plain + 4e-3 * (1 + np.abs(plain))
    assert _hyp1f1.log_excess(7, 7, x) == pytest.approx(expected, rel=1e-13)
    for name in ("_series", "_integrate"):
        monkeypatch.setattr(_hyp1f1, name, lambda _m, _r, x: np.full(x.shape, np.inf))
    assert _hyp1f1.log_excess(7, 3, x) == pytest.approx(expected, rel=1e-13)


# --- the Gaussian profile and its sampling


def gaussian(epsilon: float, mu: float) -> tuple[mp.mpf, mp.mpf, mp.mpf, mp.mpf]:
    """Both tails of Balle and Wang's formula, a, and the density at it."""
    a = mp.mpf(epsilon) / mu - mp.mpf(mu) / 2
    return mp.ncdf(-a), mp.exp(epsilon) * mp.ncdf(-a - mu), a, mp.npdf(a)


@pytest.mark.parametrize(
    ("epsilon", "mu"),
    [(0.0, 0.3), (0.1, 1.0), (2.0, 0.5), (2.0, 4.0), (30.0, 3.0), (0.5, 6.0), (0.4, 2.9)],
)
def test_rounding_of_a_gaussian_profile(
    epsilon: float, mu: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a unit of 1e-5: 32 of each tail; 8 of the parts of a, as far as they move δ; 4 of δ.

    dδ/da is at most abs(a) δ + φ(a) where the tails are written with Mills' ratio.
    """
    monkeypatch.setattr(_majorant, "_EPS", 1e-5)
    found, slope = _majorant._gauss(np.array([epsilon]), np.array([mu]))
    with mp.workdps(40):
        first, second, a, density = gaussian(epsilon, mu)
        value = first - second
        slack = 32 * (first + second) + 8 * (epsilon / mu + mu) * (abs(a) * value + density)
        expected = min(value * (1 + mp.mpf("4e-5")) + mp.mpf("1e-5") * slack, mp.mpf(1))
    assert found[0] == pytest.approx(float(expected), rel=1e-9)
    assert slope[0] == pytest.approx(float(density), rel=1e-12)


def test_a_profile_at_the_ends_of_double_precision() -> None:
    """Far out it is 0, and its rounding too; next to μ = 0 nothing overflows."""
    value, slope = _majorant._gauss(np.array([1e300, 1e300, 0.0]), np.array([1.0, 1e-300, 1e3]))
    assert value.tolist() == [0.0, 0.0, 1.0]
    assert slope.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("p", [1e-4, 0.3, 0.9])
def test_sampling_scales_the_profile(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove: p and ln(1 + (e^ε - 1)/p). Add: e^ε w and ln(p/w), w = p - (1 - e^-ε).

    With a unit of 1e-3 each is 8 of them towards a larger δ, and w 4 of p; no w, no δ.
    """
    epsilons = np.array([0.0, 1e-9, 0.2, 0.999, 1.001, 30.0, 900.0])
    end = -math.log1p(-p)
    monkeypatch.setattr(_majorant, "_EPS", COARSE_EPS)
    scale, inner = _majorant._inner(p, "remove", epsilons)
    assert scale == pytest.approx(np.full(7, p), rel=1e-15)
    with mp.workdps(40):
        true = [float(mp.log1p(mp.expm1(mp.mpf(e)) / p)) for e in epsilons.tolist()]
    assert inner == pytest.approx(np.array(true) * (1 - 8e-3), rel=1e-12)

    epsilons = end * np.array([0.0, 1e-9, 0.2, 0.45, 0.75, 0.95, 1.0, 1.2])
    scale, inner = _majorant._inner(p, "add", epsilons)
    for at, size, other in zip(epsilons.tolist(), scale.tolist(), inner.tolist(), strict=True):
        lost = -math.expm1(-at)
        w = p - lost + 4e-3 * p
        assert size == pytest.approx(
            max(math.exp(at) * w * (1 + 8e-3), 0.0), rel=1e-11, abs=1e-300
        )
        if w > 0:
            # Where half of p is lost the sum itself, with its margin, is the more precise one.
            true = -math.log1p(-lost / p) if lost < p / 2 else max(-math.log(w / p), 0.0)
            assert other == pytest.approx(true * (1 - 8e-3), rel=1e-11, abs=1e-300)
    assert scale[-1] == 0
    assert _majorant._inner(1.0, "add", epsilons)[1] is epsilons


def test_the_tangent_of_a_profile() -> None:
    """Oracle: dφ/dβ of δ_G(ε; √β/z) by mpmath."""
    for epsilon, touch, z in ((0.3, 0.4, 0.7), (2.0, 0.9, 0.4), (0.0, 1.0, 2.0), (0.5, 1e-3, 0.1)):
        value, slope = _majorant._tangent(np.array([epsilon]), np.array([touch]), z)
        with mp.workdps(30):

            def delta(beta: mp.mpf, epsilon: float = epsilon, z: float = z) -> mp.mpf:
                first, second, _, _ = gaussian(epsilon, mp.sqrt(beta) / z)
                return first - second

            assert value[0] == pytest.approx(float(delta(mp.mpf(touch))), rel=1e-12)
            assert slope[0] == pytest.approx(float(mp.diff(delta, mp.mpf(touch))), rel=1e-9)


# --- expectations of majorants


@pytest.mark.parametrize(("features", "rank"), [(2, 1), (7, 3), (64, 8), (40, 39), (5000, 2)])
def test_points_and_hat_functions(features: int, rank: int) -> None:
    """Points: evenly in logits between a mass of 1e-7 and the median, and to 1e-60 beyond.

    A mass is the expectation of the hat of its point; beyond the last inner point all goes to 1.
    Oracle: incomplete Beta integrals at 90 digits.
    """
    size = 6
    points, masses = _majorant._dilated.__wrapped__(features, rank, size)
    half, a, c = 1 << (size - 1), rank / 2, (features - rank) / 2
    law, other = stats.beta(a, c), stats.beta(c, a)
    left, centre = special.logit(law.ppf(1e-7)), -special.logit(other.ppf(0.5))
    right = min(-float(special.logit(other.ppf(1e-60))), 36.0)  # there β is 1 in doubles
    assert points[0] == 0
    assert points[-1] == 1
    assert len(points) == 2 * half + 2
    logits = [mp.mpf(left) + (centre - left) * j / half for j in range(half)]
    logits += [mp.mpf(centre) + (right - centre) * j / (half - 1) for j in range(half)]
    inner = [float(share_at(t)) for t in logits]
    assert points[1:-1] == pytest.approx(inner, rel=1e-10)
    assert 1 - points[1:-1] == pytest.approx(1 - np.array(inner), rel=1e-9, abs=1e-15)
    with mp.workdps(90):
        grid = [mp.mpf(0), *map(share_at, logits), mp.mpf(1)]
        a_, c_ = mp.mpf(a), mp.mpf(c)
        mean = a_ / (a_ + c_)
        below = [mp.betainc(a_, c_, 0, g, regularized=True) for g in grid]
        first_moment = [mean * mp.betainc(a_ + 1, c_, 0, g, regularized=True) for g in grid]
        expected = [mp.mpf(0)] * len(grid)
        for j in range(len(grid) - 2):
            low, high = grid[j], grid[j + 1]
            mass, moment = below[j + 1] - below[j], first_moment[j + 1] - first_moment[j]
            right = (moment - low * mass) / (high - low)
            expected[j] += mass - right
            expected[j + 1] += right
        expected[-1] += 1 - below[-2]
    true = np.array([float(e) for e in expected])
    # So few points are far apart in the last tail.
    assert masses == pytest.approx(true, rel=0.1, abs=0)
    seen = true > 1e-20
    assert masses[seen] == pytest.approx(true[seen], rel=1e-7, abs=0)
    assert not masses.flags.writeable
    assert not points.flags.writeable


@pytest.mark.parametrize(
    ("features", "rank", "z", "epsilon"),
    [(20, 3, 0.7, 0.1), (9, 8, 1.0, 0.5), (64, 8, 0.3, 0.5), (5, 1, 0.2, 2.0), (4, 2, 1.0, 0.1)],
)
def test_the_touch_is_the_best_one(features: int, rank: int, z: float, epsilon: float) -> None:
    """Oracle: E ψ of every touch of a fine grid, on the same points; none is better by 1e-4.

    It halves: as many tangents as the points have bits, and two more.
    """
    points, masses = _majorant._dilated(features, rank, 9)
    at = np.array([epsilon])
    turn = 2 * z * z * (math.sqrt(1 + epsilon**2) - 1)
    assert turn < 1
    calls: list[int] = []
    tangent = _majorant._tangent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_majorant, "_tangent", lambda *a: (calls.append(1), tangent(*a))[1])
        found = float(_majorant._best_touch(points, masses, z, at, np.array([turn]))[0])
    assert turn <= found <= 1
    assert len(calls) <= 9 + 2

    height = np.zeros(len(points))
    height[1:] = _majorant._gauss(at, np.sqrt(points[1:]) / z)[0]

    def expectation(touch: float) -> float:
        value, slope = (float(x[0]) for x in tangent(at, np.array([touch]), z))
        line = value + slope * (points - touch)
        psi = np.where(points <= turn, np.maximum(height, line), line)
        return float(psi @ masses)

    best = min(expectation(t) for t in np.linspace(turn, 1, 400)[1:])
    assert expectation(found) <= best * (1 + 1e-4)
    shapes = [(features, rank)]
    assert _majorant._least(shapes, z, at, 9)[0] == pytest.approx(expectation(found), rel=1e-13)


def test_each_majorant_is_taken_over_all_layers() -> None:
    """Least over touches of the largest expectation over layers; φ itself where it is convex."""
    shapes, z, size = [(12, 2), (30, 8)], 0.8, 8
    epsilons = np.array([0.05, 0.3, 0.6, 1.5, 4.0])
    found = _majorant._least(shapes, z, epsilons, size)
    grids = [_majorant._dilated(*shape, size) for shape in shapes]
    for i, epsilon in enumerate(epsilons.tolist()):
        at = epsilons[i : i + 1]
        turn = 2 * z * z * (math.sqrt(1 + epsilon**2) - 1)
        heights = [
            np.append(0.0, _majorant._gauss(at, np.sqrt(points[1:]) / z)[0]) for points, _ in grids
        ]
        options = []
        for points, masses in grids:
            bent = np.array([min(turn, 1.0)])
            touch = _majorant._best_touch(points, masses, z, at, bent)
            value, slope = _majorant._tangent(at, touch, z)
            worst = 0.0
            for (g, mass), height in zip(grids, heights, strict=True):
                line = value + slope * (g - touch)
                psi = np.where(g <= turn, np.maximum(height, line), line)
                worst = max(worst, float((psi if turn < 1 else height) @ mass))
            options.append(worst)
        assert found[i] == pytest.approx(min(options), rel=1e-12)


def test_a_profile_is_scaled_rounded_up_and_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """By 1e-9 and 1e-300; δ of the plain Gaussian caps it; at most a block of work at once."""
    asked: list[list[float]] = []

    def least(_shapes: object, _z: float, epsilons: np.ndarray, _size: int) -> np.ndarray:
        asked.append(epsilons.tolist())
        return np.full(epsilons.shape, 1e-5)

    monkeypatch.setattr(_majorant, "_least", least)
    monkeypatch.setattr(_majorant, "_BLOCK", 3 << 4)
    epsilons = np.linspace(0.1, 0.7, 7)
    upper, plain = _majorant.upper_profile([(9, 2)], 1.0, 0.5, "remove", epsilons, 4)
    inner = _majorant._inner(0.5, "remove", epsilons)[1]
    assert asked == [inner[:3].tolist(), inner[3:6].tolist(), inner[6:].tolist()]
    assert upper == pytest.approx(np.full(7, 0.5e-5 * (1 + 1e-9)), rel=1e-14)
    true = [0.5 * float(np.subtract(*gaussian(float(e), 1.0)[:2])) for e in inner]
    assert plain == pytest.approx(true, rel=1e-12)
    far = np.array([60.0, 800.0])
    upper, plain = _majorant.upper_profile([(9, 2)], 1.0, 0.5, "remove", far, 4)
    assert upper.tolist() == plain.tolist()
    assert plain[1] == 1e-300
    asked.clear()
    upper, plain = _majorant.upper_profile([(9, 9), (9, 2)], 1.0, 0.5, "remove", epsilons, 4)
    assert upper is plain
    assert not asked


@pytest.mark.parametrize("unit", [0.0, COARSE_EPS])
def test_an_exchange_is_split_at_three_shares(
    unit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum p [w far + (1-w) near], the least at β = r/m, √(r/m) and 1, and 16 units of it.

    The far part is a record of norm 2C, at half the noise; left of 0 the near one is
    1 - e^ε (1 - δ(-ε)).
    """
    z, p, layers = 0.8, 0.3, [(16, 1), (8, 2)]
    epsilons = np.array([1e-3, 0.02, 0.4, 1.5])
    asked: list[float] = []

    def upper(_l: object, noise: float, rate: float, _d: str, at: np.ndarray, _n: int) -> tuple:
        assert rate == 1
        assert np.all(at >= 0)
        asked.append(noise)
        return 0.4 * np.exp(-at) / (1 + noise), None

    class Vacuous:
        def __init__(self, mu: float, rate: float) -> None:
            assert (mu, rate) == (1 / z, p)

        def upper(self, _direction: str, at: np.ndarray) -> np.ndarray:
            return np.ones(at.shape)

    monkeypatch.setattr(_majorant, "upper_profile", upper)
    monkeypatch.setattr(_majorant, "ReplacedPair", Vacuous)
    monkeypatch.setattr(_majorant, "_EPS", unit)
    found, plain = _majorant.replaced_profile(layers, z, p, epsilons, 4)
    assert plain.tolist() == [1.0] * 4
    assert asked == [z / 2, z] * 3
    best = np.ones(4)
    below = 0
    for share in (1 / 4, 1 / 2, 1.0):
        parts = split(math.sqrt(share) / z, p, epsilons)
        for i in range(4):
            far = parts.far[i] * 0.4 * math.exp(-parts.far_epsilon[i]) / (1 + z / 2)
            at = float(parts.near_epsilon[i])
            near = 0.4 * math.exp(-abs(at)) / (1 + z)
            if at < 0:
                near = 1 - math.exp(at) * (1 - near)
                below += 1
            best[i] = min(best[i], p * (far + parts.near[i] * near) * (1 + 16 * unit) + 1e-300)
    assert found == pytest.approx(best, rel=1e-13)
    assert below > 0


# --- moments under sampling


def test_the_mixture_bound_and_its_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """ln(1 + p (A - 1)) with 4 units of its exponent; 4 of the result, and 4 of α(α-1)/(2z²)."""
    monkeypatch.setattr(_projected_rdp, "_EPS", COARSE_EPS)
    monkeypatch.setattr(_projected_rdp, "log_excess", lambda _m, _r, x: np.log(x))
    p, z, orders = 0.2, 1e150, np.array([[2.0, 20_000.0]])
    argument = orders * (orders - 1) / z / z / 2 * (1 + 8e-3)
    assert _projected_rdp._argument(z, orders) == pytest.approx(argument, rel=1e-13, abs=0)
    z, orders = 1e-160, np.array([20_000.5, 3e4])  # beyond what is summed, and what is known
    monkeypatch.setattr(_projected_rdp, "_argument", lambda _z, orders: orders**2)
    exponent = 2 * np.log(orders) + math.log(p)
    expected = np.logaddexp(0.0, exponent + 4e-3 * (1 + np.abs(exponent))) * (1 + 4e-3)
    found = _projected_rdp.log_moment([(9, 2)], z, p, orders)
    assert found == pytest.approx(expected, rel=1e-13)
    exponent = 2 * np.log(orders)
    found = _projected_rdp.log_moment([(9, 2)], z, 1.0, orders)
    assert found == pytest.approx(np.logaddexp(0.0, exponent) * (1 + 4e-3), rel=1e-13)


def test_which_moments_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders to 16,384 by chords; without a projection for noises that can be squared twice.

    The least of the three bounds is returned.
    """
    summed, known = list[float](), list[tuple[float, float]]()

    def chords(_s: object, _z: float, _p: float, orders: np.ndarray) -> np.ndarray:
        summed.extend(orders.tolist())
        return 0.3 * orders

    def plain(noise: np.ndarray, p: float, orders: np.ndarray) -> np.ndarray:
        known.append((noise[0], p))
        return np.where(orders == 3.0, 0.01, 1e9)

    monkeypatch.setattr(_projected_rdp, "_chords", chords)
    monkeypatch.setattr(_projected_rdp._moments, "log_moment", plain)
    orders = np.array([2.0, 3.0, 16384.0, 16384.5])
    excess = np.array([-50.0, 50.0, 1e5, 1e5])
    found = _projected_rdp._sampled([(9, 2)], 1.0, 0.5, orders, excess)
    assert summed == [2.0, 3.0, 16384.0]
    assert known == [(1.0, 0.5)]
    expected = [0.5 * math.exp(-50.0), 0.01, 0.3 * 16384, 1e5 + math.log(0.5)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for z, asked in ((1.1e-150, 1), (0.9e-150, 0), (0.9e150, 1), (1.1e150, 0)):
        known.clear()
        _projected_rdp._sampled([(9, 2)], z, 0.5, orders, excess)
        assert len(known) == asked


def test_rounding_of_a_binomial_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a unit of 1e-6: 8 of the largest summand of an exponent, and 16.

    Those are ln F_α and F_2, ln α! and α ln(p (1-p)). Oracle of the sum: mpmath.
    """
    p, orders = 0.1, np.array([2, 3, 7, 19])
    table = np.append([-np.inf, -np.inf], np.linspace(-4.0, 6.0, 19))
    exact, margin = list[float](), list[float]()
    for alpha in orders.tolist():
        total = mp.mpf(0)
        for k in range(2, alpha + 1):
            weight = mp.binomial(alpha, k) * mp.mpf(1 - p) ** (alpha - k) * mp.mpf(p) ** k
            total += weight * mp.exp(mp.mpf(float(table[k])))
        size = abs(table[alpha]) + math.lgamma(alpha + 1) - alpha * math.log(p * (1 - p))
        exact.append(float(mp.log(total)))
        margin.append(1e-6 * (16 + 8 * (abs(table[2]) + size)))
    monkeypatch.setattr(_projected_rdp, "_EPS", 1e-6)
    found = _projected_rdp._binomial_sum(table, p, orders)
    # One at a time the work is split into blocks.
    monkeypatch.setattr(_projected_rdp, "_BLOCK", 20)
    assert _projected_rdp._binomial_sum(table, p, orders) == pytest.approx(found, rel=1e-12)
    expected = np.logaddexp(0.0, np.array(exact) + np.array(margin))
    assert found == pytest.approx(expected, rel=1e-11)


def test_tables_are_kept_by_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 64 and at least as long as asked; k = 0 and 1 hold F - 1 = 0."""
    asked: list[int] = []
    excess = _projected_rdp.log_excess
    _projected_rdp._power_table.cache_clear()
    monkeypatch.setattr(
        _projected_rdp, "log_excess", lambda m, r, x: (asked.append(x.size), excess(m, r, x))[1]
    )
    for top, length in ((2, 64), (63, 64), (64, 128), (127, 128), (128, 256)):
        table = _projected_rdp._table(9, 2, 1.3, top)
        assert len(table) == length
        assert table[:2].tolist() == [-np.inf, -np.inf]
        assert not table.flags.writeable
        for k in (2, min(top, 9)):
            true = log_excess(9, 2, k * (k - 1) / 2 / 1.3**2)
            assert float(table[k]) == pytest.approx(float(true), rel=1e-9)
    assert asked == [62, 126, 254]


def test_a_chord_ends_at_whole_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the largest layer at either end; at whole orders nothing else; 0 at order 1."""
    monkeypatch.setattr(
        _projected_rdp, "_table", lambda m, _r, _z, top: np.full(top + 1, float(m))
    )
    monkeypatch.setattr(
        _projected_rdp,
        "_binomial_sum",
        lambda table, _p, orders: np.where(orders % 2 == 0, table[0], 5 - table[0]) * orders,
    )
    orders = np.array([1.25, 2.0, 2.25, 3.0, 3.5, 4.75, 5.0])
    found = _projected_rdp._chords([(1, 1), (3, 1)], 1.0, 0.5, orders)
    values = {1: 0.0, 2: 6.0, 3: 12.0, 4: 12.0, 5: 20.0}
    for order, value in zip(orders.tolist(), found.tolist(), strict=True):
        low = math.floor(order)
        part = order - low
        expected = values[low] + part * (values.get(low + 1, 0.0) - values[low])
        assert value == pytest.approx(expected, rel=1e-15)


# --- one step as a bound


@pytest.mark.parametrize("root", [1e-9, 0.2, 1.0, 3.7, 4.0, 900.0])
def test_the_search_over_epsilon_brackets_and_halves(
    root: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The upper end of a bracket of 1e-10, in as many steps as its bits, with its own label."""
    asked: list[float] = []

    def exact(_self: object, _adjacency: str, epsilon: float) -> tuple[float, str]:
        asked.append(epsilon)
        return (1e-6, "low") if epsilon >= root else (1e-4, "high")

    monkeypatch.setattr(ProjectedGaussian, "_exact", exact)
    event = ProjectedGaussian([(9, 2)], 1.0)
    found, method = event._search("replace", 1e-5)
    assert root <= found <= root * (1 + 1.01e-10)
    assert method == "low"
    top = max(1.0, 4.0 ** math.ceil(math.log(root, 4)))
    assert len(asked) <= 2 + math.ceil(math.log(top, 4)) + math.log2(top / root / 1e-10) + 1
    assert event._search("replace", 1e-3) == (0.0, "high")


def test_chords_between_the_knots_of_a_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """In e^ε, and 16 units above; with 5 knots of an exponential curve they are exact.

    δ = .6 - .1 e^ε is straight in e^ε, so each chord is δ itself.
    """
    monkeypatch.setattr("lora_privacy.dp.projected._MAX_KNOTS", 5)
    monkeypatch.setattr("lora_privacy.dp.projected._EPS", 1e-4)
    asked: list[np.ndarray] = []

    def upper(_self: object, _d: str, _a: str, epsilons: np.ndarray, _size: int) -> tuple:
        asked.append(epsilons)
        return 0.6 - 0.1 * np.exp(epsilons), None

    monkeypatch.setattr(ProjectedGaussian, "_upper", upper)
    epsilons = np.array([1.0, 0.0, 0.3, 0.3, 0.7, 0.2, 0.95, 0.1, 0.5, 0.0])
    event = ProjectedGaussian([(9, 2)], 1.0)
    found = event._curve("remove", "add-remove", epsilons)
    assert len(asked[0]) == 5
    assert {0.0, 1.0} <= set(asked[0].tolist())
    assert found == pytest.approx((0.6 - 0.1 * np.exp(epsilons)) * (1 + 16e-4), rel=1e-13)
    # Few different ones are all knots.
    found = event._curve("remove", "add-remove", np.array([0.1, 0.2, 0.1, 0.2, 0.1, 0.3, 0.3]))
    assert asked[1].tolist() == [0.1, 0.2, 0.3]
    assert found[1] == pytest.approx((0.6 - 0.1 * math.exp(0.2)) * (1 + 16e-4), rel=1e-13)
    assert (
        event._curve("remove", "add-remove", epsilons[:5]).tolist()
        == upper(None, "", "", epsilons[:5], 0)[0].tolist()
    )


def test_the_search_over_orders_starts_at_the_plain_divergence() -> None:
    """α/2 · (largest share) / z² at α = 1, within the range of doubles."""
    event = ProjectedGaussian([(64, 8), (9, 3)], 2.0)
    assert event._start(2.0).tolist() == pytest.approx([0.5 / 3 / 4])
    assert event._start(1e-160).tolist() == [1e300]
    assert event._start(1e160).tolist() == [1e-300]
