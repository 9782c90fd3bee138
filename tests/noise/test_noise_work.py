"""What laws and distances cost, in evaluations: a lost way shows here, not in the result."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lora_privacy.noise import EntryNoise, _quadrature, gaussianity, tv_of_entries

Count = Callable[[object, str, Callable[[Any], int]], Counter]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """Wrap a function: how often it is called, and the sum of a size of its result."""

    def wrap(owner: object, name: str, size: Callable[[Any], int]) -> Counter:
        inner, seen = getattr(owner, name), Counter()

        def outer(*args: object, **options: object) -> object:
            result = inner(*args, **options)
            seen.update(calls=1, size=size(result))
            return result

        monkeypatch.setattr(owner, name, outer)
        return seen

    return wrap


def test_nodes_of_a_tail(count: Count) -> None:
    """281 nodes a point on average; of 1,200 points 75 need the step halved."""
    nodes = count(_quadrature, "_exponent", lambda result: result.size)
    points = count(_quadrature, "_sums", lambda result: result[0].size)
    for rank in (1, 2, 8, 64, 1000, 100_000):
        for rho in (0.0, 0.1, -0.5, 0.9, 1 - 1e-9):
            law = EntryNoise(rank, 1.0, rho)
            law.cdf(np.linspace(-8, 8, 40) * law.std())
    assert nodes["size"] <= 1.05 * 337_668
    assert points["size"] <= 1.05 * 2131


def test_steps_to_a_quantile(count: Count) -> None:
    """Newton's method on the log of a tail: fourteen tails a quantile with its bracket."""
    tails = count(_quadrature, "_small_tail", lambda result: result.size)
    for rank in (1, 2, 8, 64, 1000):
        for rho in (0.0, 0.1, -0.5, 0.9):
            law = EntryNoise(rank, 1.0, rho)
            law.ppf([1e-12, 1e-3, 0.2, 0.9])
            law.isf([1e-200])
    assert tails["calls"] <= 1.05 * 570
    assert tails["size"] <= 1.05 * 1410


@pytest.mark.parametrize("variance", ["exact", "published"])
@pytest.mark.parametrize("rank", [1, 8])
def test_a_row_is_interpolated(rank: int, variance: gaussianity.Variance, count: Count) -> None:
    """17 nodes do for a row of 8,192 entries that are about equally large."""
    seen = count(gaussianity, "_tv", lambda result: result.size)
    tv_of_entries(np.random.default_rng(3).standard_normal(8192), rank, variance)
    assert seen["size"] == 17
