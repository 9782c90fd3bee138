"""Moments of the sampled Gaussian, part by part: nodes, steps, error terms, blocks of memory.

Error terms are put together again from docs/theory/rdp.md, with a unit roundoff, an aliasing and
a reach that are coarse enough for each of them to be seen.
"""

import math

import mpmath as mp
import numpy as np
import pytest

from lora_privacy.dp import _moments

UNIT = 1e-6


# --- which way a moment goes


def test_whole_orders_are_summed_and_the_others_integrated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to order 1024; a column that is integrated for one row does little for the others."""
    seen = []
    monkeypatch.setattr(_moments, "_sum", lambda z, _p, orders: z + orders)
    monkeypatch.setattr(_moments, "_integrate", lambda z, _p, o: seen.append(o) or -z[:, None] - o)
    z = np.array([0.25, 0.125])
    orders = np.array([[2.0, 2.5, 1024.0, 1025.0], [3.0, 4.0, 1.25, 7.0]])
    found = _moments.log_moment(z, 0.1, orders)
    assert found.tolist() == [
        [2.25, -2.75, 1024.25, -1025.25],
        [3.125, 4.125, -1.375, 7.125],
    ]
    ((first, second),) = seen
    assert [first[0], first[2], second[1]] == [2.5, 1025.0, 1.25]
    for idle in (first[1], second[0], second[2]):
        assert 1 < idle < 2
    seen.clear()
    assert _moments.log_moment(z, 0.1, np.full((2, 1), 5.0)).tolist() == [[5.25], [5.125]]
    assert _moments.log_moment(z, 0.1, np.full((2, 1), 5.5)).tolist() == [[-5.75], [-5.625]]
    assert len(seen) == 1


def test_limits_of_memory_and_of_the_sum() -> None:
    """Orders up to 1024 are summed, four million nodes at most; work arrays of 2 MB."""
    assert _moments.MAX_INTEGER_ORDER == 1024
    assert _moments._MAX_NODES == 4 * 2**20
    assert np.zeros(_moments._BLOCK).nbytes == 2 * 2**20
    factorials = [math.lgamma(n + 1) for n in (0, 1, 2, 10, 1024)]
    found = [_moments._LOG_FACTORIAL[n] for n in (0, 1, 2, 10, 1024)]
    assert found == pytest.approx(factorials, rel=1e-13, abs=1e-15)
    assert len(_moments._LOG_FACTORIAL) == 1025
    assert math.erfc(_moments._REACH / math.sqrt(2)) / 2 < 2e-19


# --- whole orders


def excess_of(z: float, p: float, alpha: int) -> mp.mpf:
    """Σ_{k>=2} C(α,k) (1-p)^{α-k} p^k (e^{k(k-1)/(2z²)} - 1)."""
    with mp.workdps(40):
        q = mp.mpf(p)
        return mp.fsum(
            mp.binomial(alpha, k)
            * (1 - q) ** (alpha - k)
            * q**k
            * mp.expm1(mp.mpf(k * (k - 1)) / (2 * mp.mpf(z) ** 2))
            for k in range(2, alpha + 1)
        )


def test_a_sum_is_moved_by_the_rounding_of_its_largest_term(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sixteen units, and eight of what the largest exponent, rates and factorial can be."""
    monkeypatch.setattr(_moments, "_EPS", UNIT)
    z, orders = np.array([0.7, 3.0, 0.7, 20.0, 1.0]), np.array([2.0, 2.0, 7.0, 12.0, 3.0])
    for p in (0.01, 0.6):
        found = _moments._sum(z, p, orders)
        for noise, alpha, value in zip(
            z.tolist(), orders.astype(int).tolist(), found, strict=True
        ):
            size = alpha * (alpha - 1) / (2 * noise**2)
            size += -alpha * math.log(p) - alpha * math.log(1 - p) + math.lgamma(alpha + 1)
            with mp.workdps(40):
                true = mp.log1p(excess_of(noise, p, alpha) * mp.exp(UNIT * (16 + 8 * size)))
            assert value == pytest.approx(float(true), rel=1e-10, abs=0)


@pytest.mark.parametrize(("block", "calls"), [(12, 6), (24, 3), (35, 3), (60, 1), (5, 6)])
def test_sums_are_taken_in_blocks_of_memory(
    block: int, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pairs, of up to twelve terms each: as many at once as fit, or one."""
    z, orders = np.array([0.7, 3.0, 0.7, 20.0, 1.0]), np.array([2.0, 2.0, 12.0, 5.0, 3.0])
    expected = _moments._sum(z, 0.3, orders)
    sizes, inner = [], _moments.log_binomial_sum

    def counted(alpha: np.ndarray, *args: object) -> np.ndarray:
        sizes.append(len(alpha))
        return inner(alpha, *args)

    monkeypatch.setattr(_moments, "_BLOCK", block)
    monkeypatch.setattr(_moments, "log_binomial_sum", counted)
    assert _moments._sum(z, 0.3, orders) == pytest.approx(expected, rel=1e-12, abs=0)
    assert sum(sizes) == 5
    most = max(1, block // 12)
    first = [min(most, 5)] if block >= 60 else [most]
    assert sizes[:1] == first
    assert len(sizes) <= calls


def test_a_binomial_sum_of_any_moments() -> None:
    """Moments of rows or of all; one that is infinite within the sum makes it so."""
    logs = np.array([0.5, 3.0, -2.0, 1.0])
    factorials = np.array([math.lgamma(n + 1) for n in range(8)])
    orders = np.array([2, 3, 5])
    for p in (0.2, 0.7):
        for rows in (logs, np.vstack([logs, logs + 1, logs - 2])):
            found = _moments.log_binomial_sum(orders, p, rows, factorials)
            for i, alpha in enumerate(orders.tolist()):
                row = rows if rows.ndim == 1 else rows[i]
                total = math.fsum(
                    math.comb(alpha, k) * (1 - p) ** (alpha - k) * p**k * math.exp(row[k - 2])
                    for k in range(2, alpha + 1)
                )
                assert found[i] == pytest.approx(math.log(total), rel=1e-12, abs=0)
    logs[1] = math.inf
    found = _moments.log_binomial_sum(orders, 0.2, logs, factorials)
    assert found.tolist()[1:] == [math.inf, math.inf]
    assert found[0] == pytest.approx(2 * math.log(0.2) + 0.5, rel=1e-12, abs=0)
    high = _moments.log_binomial_sum(orders, 0.2, np.full(4, 5000.0), factorials)
    assert high[0] == pytest.approx(5000 + 2 * math.log(0.2), rel=1e-12, abs=0)


# --- the grid of an integral


@pytest.mark.parametrize("z", [1e-3, 0.1, 1.0, 2.5, 3.0, 3.15, 3.5, 10.0, 1e3])
def test_the_step_is_the_largest_for_its_aliasing(z: float) -> None:
    """At the best shift a <= πz of the line, a²/2 - 2πa/step is -46.7, that is 1e-20."""
    step = float(_moments._step(np.array([z]))[0])
    a = min(2 * math.pi / step, math.pi * z)
    assert a * a / 2 - 2 * math.pi * a / step == pytest.approx(-46.7, rel=1e-12, abs=0)
    assert 2 * math.exp(-46.7) < _moments._ALIAS < 1.1e-20 * 1.01


def test_grids_that_are_alike_are_grouped() -> None:
    """By octaves of the shortest: less than twice apart, and no group could take the next."""
    need = np.array([3.9, 1.0, 64.0, 2.0, 1.9, 4.1, 1.0, 127.9])
    groups = [sorted(need[group].tolist()) for group in _moments._alike(need)]
    assert groups == [[1.0, 1.0, 1.9], [2.0, 3.9], [4.1], [64.0, 127.9]]


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> list:
    """Shapes that ``_trapezoid`` is called with; it returns sums of z and order."""
    seen = []

    def trapezoid(z: np.ndarray, _p: float, orders: np.ndarray, step: np.ndarray) -> np.ndarray:
        assert step.tolist() == _moments._step(z).tolist()
        seen.append(orders.shape)
        return z[:, None] + orders

    monkeypatch.setattr(_moments, "_trapezoid", trapezoid)
    return seen


def nodes_of(z: float, alpha: float) -> float:
    """From -9 to α/z + 9, in steps."""
    return (alpha / z + 18) / float(_moments._step(np.array([z]))[0])


@pytest.mark.parametrize(
    ("room", "shapes"),
    [
        (0.5, [(1, 1)] * 35),
        (1.0, [(1, 1)] * 35),
        (2.9, [(1, 2)] * 14 + [(2, 1)] * 3 + [(1, 1)]),
        (5.0, [(1, 5)] * 7),
        (10.5, [(2, 5), (2, 5), (2, 5), (1, 5)]),
        (14.9, [(2, 5), (2, 5), (2, 5), (1, 5)]),
        (35.1, [(7, 5)]),
    ],
)
def test_integrals_are_taken_in_blocks_of_memory(
    room: float, shapes: list, cells: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven noises and five orders on grids alike: as many at once as fit; all get their own."""
    z, orders = np.linspace(5.0, 5.06, 7), np.linspace(1.5, 1.6, 5)
    wide = max(nodes_of(noise, alpha) for noise in z for alpha in orders)
    monkeypatch.setattr(_moments, "_BLOCK", int(room * math.ceil(wide)))
    found = _moments._integrate(z, 0.3, np.broadcast_to(orders, (7, 5)))
    assert found.tolist() == (z[:, None] + orders).tolist()
    assert sorted(cells) == sorted(shapes)


def test_rows_and_columns_of_other_grids_are_apart(cells: list) -> None:
    """A factor of two in nodes or more: small z, large orders."""
    z, orders = np.array([5.0, 0.05, 5.1]), np.array([1.5, 1.6, 2000.5])
    found = _moments._integrate(z, 0.3, np.broadcast_to(orders, (3, 3)))
    assert found.tolist() == (z[:, None] + orders).tolist()
    assert sorted(cells) == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_an_order_that_needs_too_many_nodes_is_given_up(
    cells: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = nodes_of(1.0, 100.5)
    monkeypatch.setattr(_moments, "_MAX_NODES", math.ceil(need))
    orders = np.array([[100.5, 1000.5]])
    assert _moments._integrate(np.ones(1), 0.3, orders).tolist() == [[101.5, math.inf]]
    assert len(cells) == 1
    monkeypatch.setattr(_moments, "_MAX_NODES", math.ceil(need) - 1)
    assert _moments._integrate(np.ones(1), 0.3, orders).tolist() == [[math.inf, math.inf]]


# --- its sum and its errors


def upper_end(
    z: float, p: float, alpha: float, top: float, step: float, ends: tuple[int, int]
) -> mp.mpf:
    """A - 1 from the nodes, and what the page adds: rounding, tails, aliasing.

    g is exact to 16 units of α|u|, α E|u| <= 2 α p min(1, 0.4/z), and to the rounding of its
    exponents where (1+u)^top > e.
    """
    with mp.workdps(40):
        z, p, alpha, h = mp.mpf(z), mp.mpf(p), mp.mpf(alpha), mp.mpf(step)
        unit, reach = mp.mpf(_moments._EPS), mp.mpf(_moments._REACH)
        y = [h * k for k in range(-ends[0], ends[1] + 1)]
        u = [p * mp.expm1(one / z - 1 / (2 * z * z)) for one in y]
        weight = [h * mp.npdf(one) for one in y]
        excess = mp.fsum(
            w * (mp.power(1 + one, alpha) - 1 - alpha * one)
            for w, one in zip(weight, u, strict=True)
        )
        rounding = unit * (16 + 4 * (alpha * y[-1] / z + y[-1] ** 2 / 2))
        heavy = mp.fsum(
            w * (1 + one) for w, one in zip(weight, u, strict=True) if top * mp.log1p(one) > 1
        )
        total = excess * (1 + rounding) + rounding * alpha * heavy
        total += 16 * unit * 2 * alpha * p * min(mp.mpf(1), mp.mpf(0.4) / z)
        total += mp.power(1 + u[-1], alpha) * weight[-1] / mp.expm1(reach * h)
        total += alpha * p * weight[0] * (1 + 1 / (reach * h))
        return total + mp.mpf(_moments._ALIAS) * (2 + total + 2 * alpha * p)


TRAPEZOIDS = [
    ([0.3], [1.5, 3.5], [0.1]),
    ([0.2], [1.01], [0.17]),
    ([2.0], [1.25, 2.0, 40.5], [0.5]),
    ([1.0, 4.0], [1.5, 8.25], [0.5, 0.8]),
    ([4.0, 1.0], [8.25, 1.5], [0.8, 0.5]),
]


@pytest.mark.parametrize("p", [0.01, 0.4, 0.9])
@pytest.mark.parametrize(("z", "orders", "steps"), TRAPEZOIDS)
def test_each_error_of_the_integral_is_paid_for_once(
    z: list[float],
    orders: list[float],
    steps: list[float],
    p: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wide steps from -2 to α/z + 2 and beyond, as far as the longest row goes."""
    for name, value in (("_EPS", UNIT), ("_REACH", 2.0), ("_ALIAS", 1e-3)):
        monkeypatch.setattr(_moments, name, value)
    top = max(orders)
    ends = (
        max(math.ceil(2.0 / step) for step in steps),
        max(math.ceil((top / noise + 2.0) / step) for noise, step in zip(z, steps, strict=True)),
    )
    for unit in (UNIT, 1e-3):
        monkeypatch.setattr(_moments, "_EPS", unit)
        wanted = np.broadcast_to(orders, (len(z), len(orders)))
        found = _moments._trapezoid(np.array(z), p, wanted, np.array(steps))
        for i, (noise, step) in enumerate(zip(z, steps, strict=True)):
            for j, alpha in enumerate(orders):
                true = upper_end(noise, p, alpha, top, step, ends)
                assert found[i, j] == pytest.approx(float(mp.log1p(true)), rel=1e-10, abs=0)


@pytest.mark.parametrize("p", [1e-6, 0.3])
@pytest.mark.parametrize(("z", "orders"), [(0.1, [1.5, 3.5]), (0.5, [1.1, 30.5]), (0.07, [2.5])])
def test_powers_that_overflow_are_shifted(
    z: float, orders: list[float], p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if exp overflowed at 60: the sum is that of the nodes, and its exponents' rounding.

    Once a shift is needed nothing else is added: it is below e^-60 of A.
    """
    monkeypatch.setattr(_moments, "_EPS", UNIT)
    monkeypatch.setattr(_moments, "_HUGE", 60.0)
    step = 0.4
    top = max(orders)
    ends = math.ceil(9.0 / step), math.ceil((top / z + 9.0) / step)
    found = _moments._trapezoid(np.array([z]), p, np.array([orders]), np.array([step]))
    shifted = 0
    for j, alpha in enumerate(orders):
        true = mp.log1p(upper_end(z, p, alpha, top, step, ends))
        if true > 60:  # log(A (1 + r)) there; log A + r here
            last = step * ends[1]
            rounding = UNIT * (16 + 4 * (alpha * last / z + last**2 / 2))
            true += rounding - math.log1p(rounding)
            shifted += 1
        assert found[0, j] == pytest.approx(float(true), rel=1e-11, abs=0)
    assert shifted or p == 1e-6


def test_large_powers_are_summed_apart_from_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """(1+u)^α - 1 - αu is (1+u)^α (1 - αv) with v = (1+u)^{1-α} where α log(1+u) > 5 = "huge".

    What is left out there is (α-1) v (1+u)^{α-1}, e^-5 of it.
    """
    monkeypatch.setattr(_moments, "_HUGE", 5.0)
    orders = np.array([[1.5, 4.0]])
    log_ratio = np.array([[-0.2, 0.5, 1.25, 1.5, 3.0, 3.4, 6.0]])
    u, log_weight = np.expm1(log_ratio), np.array([[-1.0, -2.0, -1.5, 0.0, 1.0, -3.0, -2.0]])
    near, powers, shift = _moments._far(orders, log_ratio, u, np.exp(log_weight), log_weight)
    for j, alpha in enumerate(orders[0].tolist()):
        small, large = 0.0, []
        for r, w in zip(log_ratio[0].tolist(), log_weight[0].tolist(), strict=True):
            if alpha * r <= 5:
                small += math.exp(w) * (math.exp(alpha * r) - 1 - alpha * math.expm1(r))
            else:
                tilt = math.log(1 - alpha * math.exp((1 - alpha) * r))
                large.append(alpha * r + w + tilt)
        assert near[0, j] == pytest.approx(small, rel=1e-12, abs=0)
        assert shift[0, j] == pytest.approx(max(0.0, max(large) - 5), rel=1e-12, abs=0)
        total = math.fsum(math.exp(one - shift[0, j]) for one in large)
        assert powers[0, j] == pytest.approx(total, rel=1e-12, abs=0)


def test_a_rare_record_far_out_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """At s > "huge" and p e^s far below 1, u is p e^s, whatever the power of it.

    Oracle: the sum over the same nodes. With 1 + u in its place it would be below 0.
    """
    monkeypatch.setattr(_moments, "_HUGE", 30.0)
    monkeypatch.setattr(_moments, "_EPS", 0.0)
    monkeypatch.setattr(_moments, "_ALIAS", 0.0)
    z, p, alpha, step = 0.15, 1e-20, 1.5, 0.4
    ends = math.ceil(9.0 / step), math.ceil((alpha / z + 9.0) / step)
    found = _moments._trapezoid(np.array([z]), p, np.array([[alpha]]), np.array([step]))
    true = mp.log1p(upper_end(z, p, alpha, alpha, step, ends))
    assert found[0, 0] == pytest.approx(float(true), rel=1e-9, abs=0)
