"""What a result costs, in evaluations: a search that loses its way shows here, not in its result.

Results of such a search are checked whatever it does, so that a bad first guess or a step in the
wrong direction would only make it slow. Seconds depend on the machine; counts do not. Each limit
is what is needed now and at most a tenth more.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lora_privacy.dp import (
    Accountant,
    PldAccountant,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    VectorFamily,
    VectorProjection,
    _family_cover,
    _fourier,
    _gaussian,
    _grid,
    _hyp1f1,
    _majorant,
    _vector_loss,
    calibrate,
    calibrate_rank,
    calibrate_steps,
    rdp,
)

Count = Callable[[object, str, Callable[[tuple, Any], int]], Counter]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Wrap a function: how often it is called, and the sum of a size of what it works on."""

    def wrap(owner: object, name: str, size: Callable[[tuple, Any], int]) -> Counter:
        inner, seen = getattr(owner, name), Counter()

        def outer(*args: object, **options: object) -> object:
            result = inner(*args, **options)
            seen.update(calls=1, size=size(args, result))
            return result

        monkeypatch.setattr(owner, name, outer)
        return seen

    return wrap


# (m, r, cosine, ratio), and nodes of θ for ε at δ = 1e-2, 1e-4 and 1e-8 together.
SEARCHES = [
    (768, 8, 0.999, 1.0, 4452),
    (20, 10, 0.99, 1.05, 9240),
    (400, 400, 0.9, 1.0, 4293),
    (768, 64, 0.9999, 1.1, 9776),
    (53248, 4096, 0.9999, 1.0, 5838),
]


@pytest.mark.parametrize(("m", "r", "cosine", "ratio", "nodes"), SEARCHES)
def test_the_epsilon_of_a_pair(
    m: int, r: int, cosine: float, ratio: float, nodes: int, count: Count
) -> None:
    """Five or six profiles a direction, the checked ones among them."""
    seen = count(_vector_loss.VectorLoss, "_integrand", lambda args, _: len(args[2]))
    for delta in (1e-2, 1e-4, 1e-8):
        VectorProjection(m, r, cosine, ratio).epsilon(delta)
    assert seen["size"] <= 1.1 * nodes
    assert seen["calls"] <= 3 * 6 * (1 if ratio == 1 else 2)


def composed(accountant: Accountant, ledger: list[tuple[float, float, int]]) -> Accountant:
    for z, p, steps in ledger:
        accountant = accountant.compose(SampledGaussian(z, p), steps)
    return accountant


@pytest.mark.parametrize(
    ("ledger", "grids", "points", "transforms"),
    [
        ([(1.0, 0.01, 1000)], 4, 3606, 98_304),
        ([(0.7, 0.02, 300), (1.5, 0.1, 50), (5.0, 1.0, 3)], 18, 10_250, 81_920),
        ([(2.0, 0.2, 100)], 6, 637, 9216),
        ([(0.5, 0.001, 10_000)], 7, 77_254, 1_179_648),
        ([(30.0, 0.5, 5)], 6, 420, 2432),
    ],
)
def test_the_epsilon_of_a_ledger(
    ledger: list[tuple[float, float, int]], grids: int, points: int, transforms: int, count: Count
) -> None:
    """At δ = 1e-3, 1e-6 and 1e-10: few grids are tried, and only the last one is transformed."""
    built = count(_grid, "above", lambda _, measures: len(measures[0].masses))
    composed_ = count(_fourier, "compose", lambda _, curve: len(curve.deltas))
    accountant = composed(PldAccountant(), ledger)
    for delta in (1e-3, 1e-6, 1e-10):
        accountant.epsilon_interval(delta)
    assert built["calls"] <= grids
    assert built["size"] <= 1.1 * points
    assert composed_["size"] <= 1.1 * transforms


@pytest.mark.parametrize(
    ("ledger", "grids", "points", "transforms"),
    [
        ([(1.0, 0.01, 1000)], 6, 10_091, 233_984),
        ([(0.7, 0.02, 300), (1.5, 0.1, 50), (5.0, 1.0, 3)], 18, 12_661, 48_128),
        ([(2.0, 0.2, 100)], 5, 620, 9728),
        ([(0.5, 0.001, 10_000)], 9, 135_238, 1_300_480),
    ],
)
def test_the_delta_of_a_ledger(
    ledger: list[tuple[float, float, int]], grids: int, points: int, transforms: int, count: Count
) -> None:
    """At ε = .1, 1 and 5."""
    built = count(_grid, "above", lambda _, measures: len(measures[0].masses))
    composed_ = count(_fourier, "compose", lambda _, curve: len(curve.deltas))
    accountant = composed(PldAccountant(), ledger)
    for epsilon in (0.1, 1.0, 5.0):
        accountant.delta_interval(epsilon)
    assert built["calls"] <= grids
    assert built["size"] <= 1.1 * points
    assert composed_["size"] <= 1.1 * transforms


@pytest.mark.parametrize(
    ("ledger", "orders"),
    [
        ([(1.0, 0.01, 1000)], 49),
        ([(0.7, 0.02, 300), (1.5, 0.1, 50), (5.0, 1.0, 3)], 105),
        ([(2.0, 0.2, 100)], 28),
        ([(0.05, 1.0, 1)], 28),
        ([(100.0, 1.0, 1)], 35),
    ],
)
def test_orders_that_a_renyi_bound_tries(
    ledger: list[tuple[float, float, int]], orders: int, count: Count
) -> None:
    """Seven orders a round, at four strides; the start is right but for the sampling."""
    accountant = composed(RdpAccountant(), ledger)
    seen = count(rdp, "_rows", lambda _, result: result.size)
    for delta in (1e-3, 1e-6, 1e-10):
        seen.clear()
        accountant.epsilon(delta)
        assert seen["size"] <= orders


@pytest.mark.parametrize(
    ("family", "cells"),
    [
        (VectorFamily(5, 3, 0.95, (1.0, 1.0)), 762),
        (VectorFamily(20, 10, 0.99, (1 / 1.05, 1.05)), 43),
        (VectorFamily(768, 8, 0.999, (1.0, 1.0)), 1),
    ],
)
def test_cells_that_cover_a_family(family: VectorFamily, cells: int, count: Count) -> None:
    seen = count(_family_cover.FamilyCover, "delta", lambda _, result: len(result))
    family.epsilon(1e-2)
    assert seen["size"] <= 1.1 * cells


@pytest.mark.parametrize(
    ("features", "rank", "nodes"),
    [(2, 1, 14_197), (768, 8, 913), (4096, 4095, 14_165), (53248, 1, 3454), (53248, 4096, 625)],
)
def test_nodes_of_a_moment(features: int, rank: int, nodes: int, count: Count) -> None:
    """Panels are as wide as their error bound allows, over arguments from 301 to 1e12."""
    seen = count(_hyp1f1, "_log_share", lambda _, result: result.size)
    for x in (301.0, 1e3, 1e4, 1e6, 1e12):
        _hyp1f1.log_excess(features, rank, x)
    assert seen["size"] <= 1.1 * nodes


def test_bisection_halves() -> None:
    """44 halvings reach 1e-13 from a bracket that is right to a factor of two."""
    for root, limit in ((1e-9, 80), (0.3, 50), (1.0, 48), (2.9, 47), (50.0, 52)):
        asked: list[float] = []

        def allowed(epsilon: float, root: float = root, asked: list[float] = asked) -> bool:
            asked.append(epsilon)
            return epsilon >= root

        _gaussian.crossing(allowed, 3.0)
        assert len(asked) <= limit


@pytest.mark.parametrize(
    ("accountant", "noise", "steps", "rank"),
    [(RdpAccountant(), 22, 31, 8), (PldAccountant(), 19, 16, 8)],
    ids=["rdp", "pld"],
)
@pytest.mark.parametrize(
    ("epsilon", "delta", "count_", "rate"), [(2.0, 1e-5, 1000, 0.01), (8.0, 1e-6, 100, 0.1)]
)
def test_bounds_that_a_calibration_asks_for(
    accountant: Accountant,
    noise: int,
    steps: int,
    rank: int,
    epsilon: float,
    delta: float,
    count_: int,
    rate: float,
    count: Count,
) -> None:
    """The accountant itself is dear: a cheap one scouts where there is one."""
    seen = count(type(accountant), "epsilon", lambda *_: 0)
    goal: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "accountant": accountant}
    calibrate(lambda z: SampledGaussian(z, rate), steps=count_, **goal)
    assert seen["calls"] <= noise
    seen.clear()
    calibrate_steps(SampledGaussian(2.0, 0.02), **goal)
    assert seen["calls"] <= steps
    seen.clear()
    calibrate_rank(lambda r: ProjectedGaussian([(64, r)], 3.0), steps=1, max_rank=64, **goal)
    assert seen["calls"] <= rank


def test_a_long_curve_of_a_projection_is_interpolated(count: Count) -> None:
    """Two thousand knots at most, however many ε are asked for; few are answered one by one."""
    seen = count(_majorant, "upper_profile", lambda args, _: len(args[4]))
    profile = ProjectedGaussian([(64, 8)], 1.0).profile("remove")
    profile(np.linspace(0.0, 3.0, 40_000))
    assert seen["size"] <= 2049
    seen.clear()
    profile(np.linspace(0.0, 3.0, 100))
    assert seen["size"] == 100
