"""The law of both sources, and that purposes tell streams apart."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats

from lora_privacy.training.randomness import KeyedRandomness, Randomness, SystemRandomness, new_key

LEVEL = 1e-5
SOURCES = [SystemRandomness(), KeyedRandomness(bytes(range(32)))]


@pytest.mark.parametrize("source", SOURCES, ids=["system", "keyed"])
def test_normal_numbers_are_normal(source: Randomness) -> None:
    """KS at level 1e-5 on 10⁶ draws; a deviation 3 % too large must be rejected."""
    draws = source.normal(1_000_001, "noise", 0)
    assert draws.shape == (1_000_001,)
    assert stats.kstest(draws, "norm").pvalue > LEVEL
    assert stats.kstest(1.03 * draws, "norm").pvalue < LEVEL


@pytest.mark.parametrize("source", SOURCES, ids=["system", "keyed"])
def test_neighbouring_numbers_are_independent(source: Randomness) -> None:
    """Correlations at lags 1, 2 and half the length (Box and Muller's pairs), of x and of x²."""
    draws = source.normal(200_000, "noise", 1)
    for values in (draws, draws**2):
        centred = (values - values.mean()) / values.std()
        for lag in (1, 2, 100_000):
            product = centred[:-lag] * centred[lag:]
            # Standard error 1/√n; 4.4 of them is level 1e-5.
            assert abs(product.mean()) < 4.4 / len(product) ** 0.5
    pair = np.concatenate([draws[:1000], draws[:1000]])  # what a repeated stream would look like
    assert abs(np.mean(pair[:1000] * pair[1000:])) > 4.4 / 1000**0.5


def test_the_tail_of_the_system_source_is_not_cut() -> None:
    """Largest radius that can come out: beyond 12 standard deviations."""
    zero = bytes(8)
    draws = []

    def no_bits(count: int) -> bytes:
        return zero * (count // 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_privacy.training.randomness.os.urandom", no_bits)
        draws = SystemRandomness().normal(2)
    assert np.isfinite(draws).all()
    assert np.abs(draws).max() > 12


@pytest.mark.parametrize("source", SOURCES, ids=["system", "keyed"])
def test_uniform_numbers_are_uniform(source: Randomness) -> None:
    """KS at level 1e-5; the same numbers with 1 % of them moved must be rejected."""
    draws = source.uniform(200_000, "coins", 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > LEVEL
    moved = np.where(np.arange(200_000) % 50 == 0, 0.5, draws)
    assert stats.kstest(moved, "uniform").pvalue < LEVEL


def test_a_key_and_a_purpose_fix_the_stream() -> None:
    """The same again for the same; another for another key, word, number or type of number."""
    source = KeyedRandomness(bytes(32))
    first = source.normal(8, "noise", 1, "a")
    np.testing.assert_array_equal(first, KeyedRandomness(bytes(32)).normal(8, "noise", 1, "a"))
    others = [
        KeyedRandomness(bytes(31) + b"\1").normal(8, "noise", 1, "a"),
        source.normal(8, "noise", 2, "a"),
        source.normal(8, "noise", "1", "a"),
        source.normal(8, "noise", 1, "b"),
        source.normal(8, "noise1", "a"),
    ]
    for other in others:
        assert not np.isclose(first, other).any()
    assert source.seed("projection", 0) != source.seed("projection", 1)
    assert source.seed("x") < 2**128


def test_global_generators_neither_matter_nor_move() -> None:
    """Two sources made under one global seed differ, and the global states stay."""
    draws = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)  # noqa: NPY002 - the global one is the point
        random.seed(42)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        for source in (SystemRandomness(), KeyedRandomness(new_key())):
            draws.append(source.normal(4, "noise", 0))
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert len({tuple(d) for d in draws}) == 4


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        KeyedRandomness(b"short")
