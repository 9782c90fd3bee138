"""Poisson batches: every record takes part in a step by a coin of its own."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from lora_privacy import _validate
from lora_privacy.errors import BudgetSpentError, UnsupportedTrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_privacy.training.randomness import Randomness

__all__ = ["MicroBatch", "PoissonLoader", "StepControl", "checked_sample_rate"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A part of the Poisson batch of one step that is small enough to run at once.

    Attributes:
        iteration: Which pass over the loader handed it out.
        step: Which step it belongs to.
        size: Records in it.
        last: Whether no further part follows.
    """

    iteration: int
    step: int
    size: int
    last: bool


class StepControl(Protocol):
    """What the loader asks of the training it feeds."""

    @property
    def step(self) -> int:
        """Steps taken."""
        ...

    @property
    def randomness(self) -> Randomness:
        """Source of the coins."""
        ...

    @property
    def sample_rate(self) -> float:
        """The rate that is accounted."""
        ...

    def steps_left(self) -> int | None:
        """Steps that the budget still pays for; None without a budget."""
        ...

    def start(self) -> int:
        """A new iteration begins: drop what an older one left of its batch; return its number."""
        ...

    def begin(self, micro: MicroBatch) -> None:
        """The next micro-batch, or an empty one, is about to be handed out."""
        ...

    def step_without_records(self, micro: MicroBatch) -> None:
        """Take the step of an empty batch: noise only."""
        ...


class PoissonLoader:
    """Poisson batches of a data set, in micro-batches, an epoch of ``round(1/q)`` steps at a time.

    What comes out are batches of the original loader's collate function, none empty: the step of
    an empty Poisson batch, noise alone, is taken by the loader itself and counts like any other.
    Iteration goes on at the step that the training has reached, so a resumed run ends its epoch.
    It ends early with the privacy budget, and begins no more after it. A new iteration hands out
    again the batch that an older one was left in, and the older one ends with an error.

    Args:
        loader: Its data set, collate function and workers are used; its order is not.
        physical_batch_size: Most records of a micro-batch; None hands out whole batches.
        control: The training.
        share: (rank, number) of the processes that train together: each record belongs to one.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        physical_batch_size: int | None,
        control: StepControl,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.dataset: Dataset[Any] = loader.dataset
        self.physical_batch_size: int | None = physical_batch_size
        self.steps_per_epoch: int = max(1, round(1 / control.sample_rate))
        self._size = len(cast("Any", loader.dataset))
        self._control, self._share = control, share
        self._drawn: dict[int, np.ndarray] = {}
        dataset: Dataset[Any] = loader.dataset
        collate = loader.collate_fn
        if type(dataset) is TensorDataset and collate is default_collate:
            # One indexing of each tensor in place of one a record; a subclass may do more.
            dataset, collate = _Rows(dataset), _as_is
        self._dataset = dataset
        self._options: dict[str, Any] = {
            "collate_fn": collate,
            "num_workers": loader.num_workers,
            "pin_memory": loader.pin_memory,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
        }
        if loader.num_workers:
            self._options["prefetch_factor"] = loader.prefetch_factor

    def __len__(self) -> int:
        """Steps of an epoch; batches are fewer where one is empty, more where one is split."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        for parts in self._micro_batches():
            for micro, batch in parts:
                if micro.size:
                    self._control.begin(micro)
                    yield batch
                else:
                    self._control.step_without_records(micro)

    def steps(self) -> Iterator[Iterator[Any]]:
        """The same epoch step by step: each item iterates over the parts of one Poisson batch.

        An empty batch has no part. Whoever drives this calls ``optimizer.step()`` once after the
        parts of each step.
        """

        def begun(parts: Iterator[tuple[MicroBatch, Any]]) -> Iterator[Any]:
            for micro, batch in parts:
                self._control.begin(micro)
                if micro.size:
                    yield batch

        for parts in self._micro_batches():
            yield begun(parts)

    def _micro_batches(self) -> Iterator[Iterator[tuple[MicroBatch, Any]]]:
        """For each step of the epoch its parts with their records, None for an empty batch."""
        control = self._control
        iteration = control.start()
        first = control.step
        count = self.steps_per_epoch - first % self.steps_per_epoch
        left = control.steps_left()
        if left == 0:
            raise BudgetSpentError(
                f"All {first} steps are taken that the privacy target pays for. Loop while "
                "private.steps_left() is not 0, or begin a training with a larger target."
            )
        steps = range(first, first + (count if left is None else min(count, left)))
        queue: deque[MicroBatch] = deque()
        # A generator of its own: the loader would draw the seed of its workers from the global.
        seed = control.randomness.seed("workers", first) % 2**63
        base = DataLoader(
            self._dataset,
            batch_sampler=cast("Any", _Parts(self, iteration, steps, queue)),
            generator=torch.Generator().manual_seed(seed),
            **self._options,
        )

        def described() -> Iterator[tuple[MicroBatch, Any]]:
            for batch in base:
                while not queue[0].size:
                    yield queue.popleft(), None
                yield queue.popleft(), batch
            while queue:
                yield queue.popleft(), None

        for _, parts in itertools.groupby(described(), key=lambda part: part[0].step):
            yield parts

    def indices(self, step: int) -> np.ndarray:
        """The records of ``step`` that fall to this process, ascending.

        Drawn once: a batch that was dropped comes again with the same records. To draw anew, after
        a look at its loss, would choose who takes part.
        """
        for taken in [step for step in self._drawn if step < self._control.step]:
            del self._drawn[taken]
        if step not in self._drawn:
            coins = self._control.randomness.uniform(self._size, "coins", step)
            # At most with probability q: coins are multiples of 2⁻⁵³, which q need not be.
            rows = np.flatnonzero(coins + 2.0**-53 <= self._control.sample_rate)
            rank, size = self._share
            self._drawn[step] = rows[rows % size == rank]
        return self._drawn[step]


class _Parts:
    """Index lists of the micro-batches of ``steps``, each one described in ``queue``."""

    def __init__(
        self, loader: PoissonLoader, iteration: int, steps: range, queue: deque[MicroBatch]
    ) -> None:
        self._loader, self._iteration = loader, iteration
        self._steps, self._queue = steps, queue

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            rows = self._loader.indices(step)
            most = self._loader.physical_batch_size or len(rows)
            if not len(rows):
                self._queue.append(MicroBatch(self._iteration, step, 0, last=True))
            for start in range(0, len(rows), most or 1):
                part = rows[start : start + most]
                last = start + most >= len(rows)
                self._queue.append(MicroBatch(self._iteration, step, len(part), last))
                yield part.tolist()


class _Rows(Dataset[Any]):
    """A ``TensorDataset`` that is indexed by all rows of a batch at once."""

    def __init__(self, dataset: TensorDataset) -> None:
        self._tensors = dataset.tensors

    def __len__(self) -> int:
        return len(self._tensors[0])

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, rows: list[int]) -> list[torch.Tensor]:
        wanted = torch.tensor(rows)
        return [tensor.index_select(0, wanted) for tensor in self._tensors]


def _as_is(batch: Any) -> Any:  # noqa: ANN401
    return batch


def checked_sample_rate(loader: DataLoader[Any], sample_rate: float | None) -> float:
    """``sample_rate``, or the loader's batch size over the number of records.

    Raises:
        UnsupportedTrainingError: The loader's records cannot be drawn by coins of equal
            probability, or its batch size is not known.
        ValueError: The rate is out of range.
    """
    if isinstance(loader.dataset, IterableDataset):
        raise UnsupportedTrainingError(
            "The data set is iterable: a Poisson batch needs records by number. Use a map-style "
            "data set, with __len__ and __getitem__."
        )
    size = len(cast("Any", loader.dataset))
    if size < 1:
        raise UnsupportedTrainingError("The data set is empty.")
    # The exact types: a subclass may weight records or repeat them.
    plain = type(loader.sampler) in (RandomSampler, SequentialSampler)
    plain = plain and type(loader.batch_sampler) in (BatchSampler, type(None))
    if (
        not plain
        or len(cast("Any", loader.sampler)) != size
        or (isinstance(loader.sampler, RandomSampler) and loader.sampler.replacement)
    ):
        raise UnsupportedTrainingError(
            f"The loader draws records by {type(loader.sampler).__name__} and "
            f"{type(loader.batch_sampler).__name__}, whose choice a Poisson batch would drop. "
            "Pass a loader with shuffle=True or False; for several processes leave the sampler "
            "out."
        )
    if sample_rate is None:
        if loader.batch_size is None:
            raise UnsupportedTrainingError(
                "The loader has no batch size to take the sampling rate from; pass sample_rate, "
                "the expected batch size over the number of records."
            )
        if loader.batch_size > size:
            raise ValueError(
                f"The batch size {loader.batch_size} exceeds the {size} records; the expected "
                "batch size must not. Pass sample_rate."
            )
        return loader.batch_size / size
    _validate.between("sample_rate", sample_rate, 0, 1)
    _validate.positive("sample_rate", sample_rate)
    return float(sample_rate)
