"""Processes that train one model together: what they say to each other at a step.

Every process clips the gradients of its own records. Their sums go to the first process, which
alone writes the ledger and draws the noise; what it releases goes back to all. So there is one
noise draw, and nothing reaches another process's weights that the ledger does not hold.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from lora_privacy.errors import ProcessError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["OneProcess", "ProcessGroup", "Processes", "processes_of"]

_COMPARED = 16  # records
_WORD_BITS = 62  # of an integer that is sent in words of 64 bits with a sign


class Processes(Protocol):
    """The processes of one training; the first one has rank 0."""

    @property
    def rank(self) -> int:
        """Which one this is."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def share(self, draw: Callable[[], int]) -> int:
        """What ``draw`` gives in the first process, a number of at most 128 bits."""
        ...

    def sum_to_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums over processes, in the first one; elsewhere the values mean nothing."""
        ...

    def from_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of the first process, in all; shapes and types are those given."""
        ...

    def object_from_first(self, value: Any) -> Any:  # noqa: ANN401
        """A plain object of the first process, in all."""
        ...

    def same(self, what: str, value: Any) -> None:  # noqa: ANN401
        """Raise ProcessError unless ``value`` is equal in all processes."""
        ...

    def copy_first(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first one, **in place**."""
        ...


class OneProcess:
    """A training of its own."""

    rank: int = 0
    size: int = 1

    def share(self, draw: Callable[[], int]) -> int:
        """What it draws."""
        return draw()

    def sum_to_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its own."""
        return dict(tensors)

    def from_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its own."""
        return dict(tensors)

    def object_from_first(self, value: Any) -> Any:  # noqa: ANN401
        """Its own."""
        return value

    def same(self, what: str, value: Any) -> None:  # noqa: ANN401
        """Always."""

    def copy_first(self, model: nn.Module) -> None:
        """It is the first."""


class ProcessGroup:
    """All processes of ``torch.distributed``, by any backend.

    Raises:
        ProcessError: The group is not initialised.
    """

    def __init__(self) -> None:
        if not _is_running():
            raise ProcessError(
                "distributed=True needs a process group: start the script with torchrun and call "
                "torch.distributed.init_process_group first."
            )
        self.rank: int = torch.distributed.get_rank()
        self.size: int = torch.distributed.get_world_size()
        # A group of its own: messages of the script cannot pair with ours, or get our sums.
        self._group: Any = torch.distributed.new_group(timeout=_timeout())

    def share(self, draw: Callable[[], int]) -> int:
        """What the first process draws, by broadcast."""
        number = draw() if self.rank == 0 else 0
        mask = (1 << _WORD_BITS) - 1
        words = [(number >> (i * _WORD_BITS)) & mask for i in range(3)]
        sent = torch.tensor(words, dtype=torch.int64, device=_device())
        with self._named():
            torch.distributed.broadcast(sent, src=0, group=self._group)
        return sum(int(word) << (i * _WORD_BITS) for i, word in enumerate(sent.tolist()))

    def sum_to_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One reduction of all numbers of a type."""
        return self._joined(tensors, self._reduce)

    def from_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One broadcast of all numbers of a type, so that every process gets the same bits."""
        return self._joined(tensors, self._broadcast)

    def object_from_first(self, value: Any) -> Any:  # noqa: ANN401
        """By broadcast; torch pickles it for the way."""
        sent = [value]
        with self._named():
            torch.distributed.broadcast_object_list(sent, src=0, group=self._group)
        return sent[0]

    def same(self, what: str, value: Any) -> None:  # noqa: ANN401
        """By gathering all values."""
        values: list[Any] = [None] * self.size
        with self._named():
            torch.distributed.all_gather_object(values, value, group=self._group)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ProcessError(
                    f"Process {rank} has {what} = {_shortened(other)}, process 0 has "
                    f"{_shortened(values[0])}: they must train the same thing."
                )

    def copy_first(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first one, **in place**."""
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.same(
            "the model's tensors", {k: (tuple(t.shape), str(t.dtype)) for k, t in own.items()}
        )
        with torch.no_grad(), self._named():
            for tensor in own.values():
                self._broadcast(tensor.detach())

    def _reduce(self, flat: Tensor) -> None:
        torch.distributed.reduce(flat, dst=0, group=self._group)

    def _broadcast(self, flat: Tensor) -> None:
        torch.distributed.broadcast(flat, src=0, group=self._group)

    def _joined(
        self, tensors: Mapping[str, Tensor], exchange: Callable[[Tensor], Any]
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for dtype in sorted({tensor.dtype for tensor in tensors.values()}, key=str):
            some = {name: t for name, t in tensors.items() if t.dtype == dtype}
            flat = torch.cat([t.detach().flatten() for t in some.values()])
            with self._named():
                exchange(flat)
            parts = flat.split([t.numel() for t in some.values()])
            found |= {n: p.view(t.shape) for (n, t), p in zip(some.items(), parts, strict=True)}
        return {name: found[name] for name in tensors}

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessError(
                f"Process {self.rank} of {self.size} lost the others: one of them ended, failed "
                "or left the loop. No weight moved at this step; it counts only if the ledger of "
                "process 0 holds it. Start all of them again, from the last checkpoint."
            ) from error


def processes_of(distributed: bool | None) -> Processes:
    """The processes that train together.

    Raises:
        ProcessError: Several run, and it was not said whether they share the training; or none.
    """
    if distributed:
        return ProcessGroup()
    if distributed is None and not _is_running() and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ProcessError(
            f"The script was started as one of {os.environ['WORLD_SIZE']} processes, and no "
            "process group is initialised: call torch.distributed.init_process_group and pass "
            "distributed=True, or pass False for a training of its own in every process."
        )
    if distributed is None and _is_running() and torch.distributed.get_world_size() > 1:
        raise ProcessError(
            f"torch.distributed runs {torch.distributed.get_world_size()} processes: pass "
            "distributed=True to train one model together, each with its share of the records, "
            "or False for a training of its own in every process."
        )
    return OneProcess()


class _Hashes(tuple[str, ...]):
    """Hashes of private records: no message shows them, for a short record is soon guessed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{len(self)} hashes, not shown"


def digests_of(dataset: Any) -> tuple[str, ...]:  # noqa: ANN401
    """Hashes of a few records, to see that processes hold the same ones in the same order.

    A record that comes out otherwise the second time (augmentation) has the hash of its type.
    """
    size = len(dataset)
    rows = sorted({round(i * (size - 1) / (_COMPARED - 1)) for i in range(_COMPARED)})
    found: list[str] = []
    for row in rows:
        first, second = (_bytes_of(dataset[row]) for _ in range(2))
        known = first if first == second else type(dataset[row]).__name__.encode()
        found.append(hashlib.sha256(known).hexdigest())
    return _Hashes(found)


def _bytes_of(item: Any) -> bytes:  # noqa: ANN401
    if isinstance(item, torch.Tensor):
        return repr((item.dtype, tuple(item.shape), item.tolist())).encode()
    if isinstance(item, Mapping):
        return b"{" + b",".join(_bytes_of(x) for pair in item.items() for x in pair) + b"}"
    if isinstance(item, list | tuple):
        return b"[" + b",".join(map(_bytes_of, item)) + b"]"
    if hasattr(item, "tolist"):
        return _bytes_of(item.tolist())
    if item is None or isinstance(item, str | int | float | bool | bytes):
        return repr(item).encode()
    return type(item).__name__.encode()  # its repr may hold an address


def _timeout() -> timedelta | None:
    """Of the default group, which a new one does not take over by itself."""
    group: Any = torch.distributed.group.WORLD
    options = getattr(group._get_backend(_device()), "options", None)
    return getattr(options, "_timeout", None)


def _is_running() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    if "nccl" in cast("str", torch.distributed.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _shortened(value: Any) -> str:  # noqa: ANN401
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"
