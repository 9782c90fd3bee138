"""Passes on trial: batches that differ in the other samples, and what that does to one sample.

Used by ``preflight`` alone. A pass leaves no trace in the model and repeats its random numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lora_privacy.core import FLoRALinear
from lora_privacy.errors import NonFiniteError, UnsupportedTrainingError
from lora_privacy.training.record_loss import IGNORED
from lora_privacy.training.recorder import LayerTap, SampleRecorder, trained_layers
from lora_privacy.training.samples import DenseSamples, FactoredSamples, Samples

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["FLOAT32", "HALF", "Limits", "LossOf", "Movement", "Records", "Trial", "movement"]

LossOf = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> the loss that is backpropagated, one number."""

# Inputs by which models and collators tell apart the records that share a row.
_PACKING = ("cu_seq", "seq_idx", "max_length_q", "max_length_k", "document_id")
_SIDEWAYS = 0.1  # of a movement: with less than this off its old line, a gradient was rescaled


@dataclass(frozen=True, slots=True)
class Limits:
    """How far rounding can move a gradient, as shares of its norm.

    Attributes:
        replaced: Other samples replaced. Shapes are the same, so that mostly not a bit changes;
            what can change is the choice of a kernel, as a mask without zeros may be dropped.
        alone: Another batch size, which changes kernels and the order of sums.
        floor: A layer's norm counts as at least this share of the whole gradient's: gradients
            that cancel to 0 (the bias of keys before a softmax) are rounding alone.
    """

    replaced: float
    alone: float
    floor: float


# A float32 sum in another order moves by some 1e-7 a layer, 1e-5 through a deep network. In half
# precision and TF32 one rounding is up to 4e-3, and a weak coupling cannot be told from it.
FLOAT32 = Limits(replaced=1e-4, alone=1e-2, floor=1e-2)
HALF = Limits(replaced=3e-2, alone=1e-1, floor=1.0)


class Records:
    """The rows of a batch, and the batches that differ in them.

    Args:
        model: Its ``main_input_name`` tells which tensor has a row for each record.
        batch: A mapping, a tuple or a list of tensors.

    Attributes:
        size: Records in it.

    Raises:
        ValueError: It holds fewer than two records.
        TypeError: It is no batch.
        UnsupportedTrainingError: A row holds several records.
    """

    def __init__(self, model: nn.Module, batch: object) -> None:
        if isinstance(batch, Mapping):
            _refuse_packed(batch)
            self._items: dict[Any, Any] = dict(batch)
        elif isinstance(batch, tuple | list):
            self._items = dict(enumerate(batch))
        else:
            raise TypeError(
                "batch must be a mapping, a tuple or a list of tensors, got "
                f"{type(batch).__name__}."
            )
        self._batch = batch
        tensors = {k: v for k, v in self._items.items() if isinstance(v, Tensor) and v.dim() > 0}
        if not tensors:
            raise TypeError("batch must hold tensors with a row for each record.")
        main = getattr(model, "main_input_name", None)
        first = tensors[main] if main in tensors else next(iter(tensors.values()))
        self.size: int = first.shape[0]
        self._rows = {k: v for k, v in tensors.items() if v.shape[0] == self.size}
        if self.size < 2:
            raise ValueError(
                f"batch must hold at least two records to tell them apart, got {self.size}."
            )

    def without_others(self, row: int) -> Iterator[tuple[str, object, bool]]:
        """Batches with ``row`` as it is: (what changed, batch, whether for training mode).

        Raises:
            ValueError: All records are the same.
        """
        shorter = self._shorter(row)
        if shorter:
            yield "other samples cut to half of their tokens", self._with(shorter), False
        copies = {key: value[row].expand_as(value).clone() for key, value in self._rows.items()}
        changed = {key: v for key, v in copies.items() if not torch.equal(v, self._rows[key])}
        # Masks choose kernels, and kernels draw dropout masks: for training mode they stay.
        kept = {key: v for key, v in changed.items() if "mask" not in str(key)}
        if not kept:
            raise ValueError("All records of the batch are the same; pass different ones.")
        what = f"copies of sample {row} in place of all others"
        yield what, self._with(changed), False
        yield what, self._with(kept), True

    def alone(self, row: int) -> object:
        """The batch of one record."""
        return self._with({key: value[row : row + 1] for key, value in self._rows.items()})

    def _with(self, changed: dict[Any, Tensor]) -> object:
        if isinstance(self._batch, Mapping):
            # A shallow copy: transformers' batches are no plain dictionaries.
            new = cast("Any", copy.copy(self._batch))
            for key, value in changed.items():
                new[key] = value
            return new
        values = {**self._items, **changed}.values()
        return list(values) if isinstance(self._batch, list) else tuple(values)

    def _shorter(self, row: int) -> dict[Any, Tensor]:
        """Masks and labels with half of what they hold in all rows but one."""
        found: dict[Any, Tensor] = {}
        for key, off in (("attention_mask", 0), ("labels", IGNORED)):
            value = self._rows.get(key)
            if value is None or value.dim() != 2 or value.is_floating_point():
                continue
            held = value != off
            # The first half: padded at the right, no query sees nothing. At least two, as a
            # causal model predicts nothing from one.
            keep = held.cumsum(1) <= held.sum(1, keepdim=True) // 2 + 1
            keep[row] = True
            new = torch.where(keep, value, off)
            if not torch.equal(new, value):
                found[key] = new
        return found


class Trial:
    """Passes of a model that leave it as it was.

    Args:
        model: With trained layers.
        loss_of: The loss.

    Attributes:
        limits: What rounding can do, for the precision met so far.
    """

    def __init__(self, model: nn.Module, loss_of: LossOf) -> None:
        self._model, self._loss_of = model, loss_of
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        cuda = any(p.is_cuda for p in model.parameters())
        tensor_float = cuda and torch.get_float32_matmul_precision() != "highest"
        self.limits: Limits = HALF if half or tensor_float else FLOAT32

    def run(self, batch: object, size: int, *, training: bool = False) -> dict[str, LayerTap]:
        """Per-sample gradients of a batch of ``size`` records, by path of the layer.

        Raises:
            TypeError: The loss is no number.
            UnsupportedLayerError: A layer saw another number of samples, or was bypassed.
        """
        model = self._model
        with _untouched(model), self._watched(), SampleRecorder(model) as recorder:
            model.train(training)
            loss = self._loss_of(model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(
                    f"The loss must be a tensor with one number, got {got}. Put labels into the "
                    "batch, or pass loss_of=…."
                )
            if loss.requires_grad:
                loss.backward()
            if recorder.recorded:
                recorder.check(size)
        return recorder.taps

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Look at every trained layer before a recorder's taps do."""
        handles: list[RemovableHandle] = []
        try:
            for tap in trained_layers(self._model).values():
                handles.append(tap.module.register_forward_pre_hook(self._look(tap)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self, tap: LayerTap) -> Callable[..., None]:
        parameters = list(tap.parameters.values())

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:  # noqa: ARG001
            if torch.is_autocast_enabled(parameters[0].device.type):
                self.limits = HALF

        return before


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put modes, gradients, buffers and torch's generators back, whatever happens.

    So every pass inside a block of its own draws the same numbers. The compressed branches of
    FLoRA are frozen meanwhile, as ``make_private`` freezes them.
    """
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone(), buffer._version) for buffer in model.buffers()]
    devices = {p.device.index for p, _ in grads if p.is_cuda}
    branches = [m.expand.weight for m, _ in modes if isinstance(m, FLoRALinear)]
    branches = [weight for weight in branches if weight.requires_grad]
    for weight in branches:
        weight.requires_grad_(False)
    for parameter, _ in grads:
        parameter.grad = None
    try:
        with torch.random.fork_rng(sorted(devices)), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, grad in grads:
            parameter.grad = grad
        for weight in branches:
            weight.requires_grad_(True)
        with torch.no_grad():
            for buffer, value, version in buffers:
                if buffer._version != version:
                    buffer.copy_(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """How far one sample's gradient is from what it was.

    Attributes:
        sample: Its row.
        layer: Path of the layer that moved most.
        share: By how much, as a share of its norm; ``inf`` from a gradient of 0.
        factor: By how much the whole gradient grew along itself.
        parallel: Whether it was rescaled, and no more.
    """

    sample: int
    layer: str
    share: float
    factor: float
    parallel: bool


def movement(
    before: dict[str, LayerTap],
    after: dict[str, LayerTap],
    *,
    floor: float,
    row: int,
    after_row: int | None = None,
    scale: float = 1.0,
) -> Movement:
    """Compare a sample of ``after`` with ``scale`` times the one of ``before``.

    Args:
        before: A pass.
        after: Another one.
        floor: As in ``Limits``.
        row: The sample in ``before``.
        after_row: The sample in ``after``; None for the same row.
        scale: Factor of the gradients in ``before``.

    Raises:
        NonFiniteError: One of them holds NaN or infinity.
    """
    after_row = row if after_row is None else after_row
    sizes, moves = dict.fromkeys(before, 0.0), dict.fromkeys(before, 0.0)
    inner = grown = 0.0
    for name, tap in before.items():
        for key in {**tap.samples, **after[name].samples}:
            # The layer may be reached in one of the passes only.
            old = _row(tap.samples.get(key), row) * scale
            new = _row(after[name].samples.get(key), after_row)
            sizes[name] += _square(old)
            moves[name] += _square(new - old)
            grown += _square(new)
            inner += float((old * new).sum(dtype=torch.float64))
    whole = sum(sizes.values())
    if not math.isfinite(whole + sum(moves.values())):
        raise NonFiniteError(
            f"The gradient of sample {row} holds NaN or infinity, so that its isolation cannot be "
            "seen. Look at the loss, also for a batch of one record."
        )
    shares = {
        name: _ratio(math.sqrt(moves[name]), math.sqrt(max(sizes[name], floor**2 * whole)))
        for name in before
    }
    layer = max(shares, key=shares.__getitem__)
    return Movement(
        sample=row,
        layer=layer,
        share=shares[layer],
        factor=_ratio(inner, whole),
        parallel=inner > 0 and grown - inner**2 / whole <= _SIDEWAYS**2 * sum(moves.values()),
    )


def _row(samples: Samples | None, row: int) -> Tensor:
    """The gradient of one sample; 0 where a pass left none."""
    if samples is None:
        return torch.zeros(())
    if isinstance(samples, FactoredSamples):
        pairs = [(x[row : row + 1], g[row : row + 1]) for x, g in samples.pairs]
        return FactoredSamples(pairs).weighted(pairs[0][0].new_ones(1))
    return cast("DenseSamples", samples).gradients[row]


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _ratio(part: float, whole: float) -> float:
    if part == 0:
        return 0.0
    return part / whole if whole else math.inf


def _refuse_packed(batch: Mapping[Any, Any]) -> None:
    """Raise UnsupportedTrainingError when inputs say that a row holds several records."""
    why = "several records in one row are one unit of privacy with one clip. Pad, one record a row"
    for key in batch:
        if str(key).startswith(_PACKING):
            raise UnsupportedTrainingError(f"The batch is packed, it holds {key!r}: {why}.")
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point():
        mask = None
    elif bool((mask > 1).any()):
        raise UnsupportedTrainingError(
            f"The batch is packed, its attention_mask counts up to {int(mask.max())}: {why}."
        )
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return
    if mask is None or mask.shape != positions.shape:
        mask = torch.ones_like(positions)
    for row, held in zip(positions, mask.bool(), strict=True):
        if bool((row[held].diff() <= 0).any()):
            raise UnsupportedTrainingError(
                f"The batch is packed, its position_ids begin again within a row: {why}, and pass "
                "attention_mask where there is padding."
            )
