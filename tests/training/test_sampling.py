"""Poisson batches: their law, their parts, and empty ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lora_privacy.errors import UnsupportedTrainingError
from lora_privacy.training.randomness import KeyedRandomness, Randomness
from lora_privacy.training.sampling import MicroBatch, PoissonLoader, checked_sample_rate

SIZE = 60


@dataclass
class Recorder:
    """Stands for a training: takes a step after the last part of a batch."""

    sample_rate: float = 0.1
    step: int = 0
    iteration: int = 0
    randomness: Randomness = field(default_factory=lambda: KeyedRandomness(bytes(32)))
    left: int | None = None
    seen: list[MicroBatch] = field(default_factory=list)
    empty: int = 0

    def steps_left(self) -> int | None:
        return self.left

    def start(self) -> int:
        self.iteration += 1
        return self.iteration

    def begin(self, micro: MicroBatch) -> None:
        assert (micro.iteration, micro.step) == (self.iteration, self.step)
        self.seen.append(micro)
        self.step += micro.last

    def step_without_records(self, micro: MicroBatch) -> None:
        assert (micro.iteration, micro.step, micro.size) == (self.iteration, self.step, 0)
        self.empty += 1
        self.step += 1


def dataset(size: int = SIZE) -> TensorDataset:
    rows = torch.arange(size)
    return TensorDataset(rows, 10 * rows)


def poisson(
    rate: float, control: Recorder, part: int | None = None, **options: Any
) -> PoissonLoader:
    control.sample_rate = rate
    return PoissonLoader(DataLoader(dataset(), **options), part, control)


def test_each_record_enters_by_its_own_coin() -> None:
    """Sizes are binomial (χ², level 1e-4), pairs of records independent.

    A shuffled loader, whose batches have one size, is rejected by the same test.
    """
    control = Recorder()
    loader = poisson(0.1, control)
    rows = [loader.indices(step) for step in range(4000)]
    sizes = np.array([len(r) for r in rows])
    law = stats.binom(SIZE, 0.1)
    edges = [*range(2, 12)]

    def p_value(counts: np.ndarray) -> float:
        found = np.histogram(counts, [-1, *[e - 0.5 for e in edges], SIZE + 1])[0]
        cdf = law.cdf([e - 1 for e in edges])
        shares = np.diff([0, *cdf, 1])
        return float(stats.chisquare(found, shares * len(counts)).pvalue)

    assert p_value(sizes) > 1e-4
    assert p_value(np.full(4000, 6)) < 1e-4
    taken = np.zeros((4000, SIZE))
    for step, ids in enumerate(rows):
        taken[step, ids] = 1
    z = (taken.mean(0) - 0.1) / np.sqrt(0.09 / 4000)
    assert np.abs(z).max() < 5
    both = (taken[:, 0] * taken[:, 1]).mean()
    assert abs(both - 0.01) < 5 * np.sqrt(0.01 / 4000)


class Coins:
    """Stands for a source of randomness: these coins, one a record."""

    def __init__(self, *coins: float) -> None:
        self.coins = np.array(coins)

    def uniform(self, size: int, *purpose: str | int) -> np.ndarray:
        assert size == len(self.coins)
        return self.coins


def test_a_record_enters_at_most_with_the_stated_probability() -> None:
    """Coins are multiples of 2⁻⁵³, each equally likely: so many lie below q, and no more.

    Before, ⌈q·2⁵³⌉ did: at q = 1e-17 a record entered eleven times as often as was accounted.
    """

    def entered(rate: float, *coins: float) -> list[int]:
        control = Recorder(sample_rate=rate, randomness=Coins(*coins))
        return PoissonLoader(DataLoader(dataset(len(coins))), None, control).indices(0).tolist()

    for rate in (0.1, 1 / 3, 1e-15, 2.0**-53, 1e-17):
        count = int(Fraction(rate) * 2**53)  # rounded down
        coins = (count * 2.0**-53, max(0, count - 1) * 2.0**-53, 0.0)
        assert entered(rate, *coins) == ([1, 2] if count else []), rate
    assert entered(1.0, 1 - 2.0**-53, 0.0) == [0, 1]


def test_parts_make_up_the_batch() -> None:
    """Parts of at most 4 records, each record once, the last one marked."""
    control = Recorder()
    loader = poisson(0.2, control, part=4)
    assert len(loader) == 5
    for batch in loader:
        rows, tens = batch
        micro = control.seen[-1]
        assert len(rows) == micro.size <= 4
        assert torch.equal(tens, 10 * rows)
        expected = loader.indices(micro.step)
        offset = 4 * sum(m.step == micro.step for m in control.seen[:-1])
        np.testing.assert_array_equal(rows.numpy(), expected[offset : offset + 4])
        assert micro.last == (offset + 4 >= len(expected))
    assert control.step == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_empty_batches_are_steps_and_are_never_handed_out(workers: int) -> None:
    """At 60 records and q = 1/100 more than half of the batches are empty."""
    control = Recorder()
    loader = poisson(0.01, control, num_workers=workers)
    wanted = [len(loader.indices(step)) for step in range(100)]
    sizes = [len(batch[0]) for batch in loader]
    assert sizes == [n for n in wanted if n]
    assert control.empty == wanted.count(0) > 30
    assert control.step == 100
    assert [m.step for m in control.seen] == [s for s, n in enumerate(wanted) if n]


def test_iteration_goes_on_where_the_training_stands_and_ends_with_the_budget() -> None:
    control = Recorder(step=7)
    loader = poisson(0.2, control)
    list(loader)
    assert control.step == 10  # the rest of the second epoch of 5
    control.left = 2
    list(loader)
    assert control.step == 12


def test_the_fast_path_for_tensors_gives_the_same_batches() -> None:
    """Oracle: the same rows through the default collate function, one by one."""
    control = Recorder()
    fast = poisson(0.3, control)
    slow = PoissonLoader(
        DataLoader(dataset(), collate_fn=lambda rows: torch.utils.data.default_collate(rows)),
        None,
        Recorder(randomness=control.randomness, sample_rate=0.3),
    )
    for a, b in zip(fast, slow, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_no_global_generator_is_read_or_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(poisson(0.2, Recorder()))
    assert torch.equal(before, torch.get_rng_state())


def test_the_rate_is_batch_size_over_records() -> None:
    loader = DataLoader(dataset(), batch_size=6, shuffle=True)
    assert checked_sample_rate(loader, None) == pytest.approx(0.1, rel=1e-15)
    assert checked_sample_rate(loader, 0.25) == 0.25


class _Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(dataset(), sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)), "Weighted"),
        (DataLoader(dataset(), sampler=SubsetRandomSampler(range(9))), "SubsetRandomSampler"),
        (DataLoader(dataset(), sampler=SequentialSampler(range(9))), "SequentialSampler"),
        (DataLoader(dataset(), batch_sampler=[[0, 1], [2]]), "list"),
        (DataLoader(_Stream()), "iterable"),
        (DataLoader(dataset(), batch_size=None), "no batch size"),
    ],
)
def test_loaders_that_are_no_poisson_batches_are_refused(
    loader: DataLoader[Any], message: str
) -> None:
    with pytest.raises(UnsupportedTrainingError, match=message):
        checked_sample_rate(loader, None)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="sample_rate"):
        checked_sample_rate(DataLoader(dataset()), rate)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the 60 records"):
        checked_sample_rate(DataLoader(dataset(), batch_size=64), None)
