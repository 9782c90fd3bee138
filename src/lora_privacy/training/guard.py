"""Guards of a private training: an experiment before it, and a look at every step.

``preflight`` replaces the other samples of a batch and requires that one sample's gradient stays:
one experiment in place of a list of forbidden layers and losses. ``WeightDeltaGuard`` sees that
steps move the weights that the model uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self, cast, get_args

import torch
from torch import nn

from lora_privacy import _validate
from lora_privacy.core import FLoRALinear
from lora_privacy.errors import (
    IsolationError,
    StaleParameterError,
    UnsupportedTrainingError,
    WeightsUnmovedError,
)
from lora_privacy.training.engine import LossName
from lora_privacy.training.methods import (
    check_optimizer,
    known_adapters,
    refuse_joined_samples,
)
from lora_privacy.training.recorder import trained_layers
from lora_privacy.training.trial import LossOf, Movement, Records, Trial, movement

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from lora_privacy.training.recorder import LayerTap

__all__ = ["WeightDeltaGuard", "preflight"]

_DENOMINATOR = (
    "Only its length changes, by a factor of {factor:.3g}: the loss is divided by something that "
    "the other samples change, such as the number of tokens in the batch, as transformers' "
    "language models do. Average over each record's own tokens first, then over the records, in "
    "loss_of and in the training loop."
)
_MIXED = (
    "Likely causes: statistics or a normalisation over the batch, in-batch negatives of a "
    "contrastive loss, an auxiliary loss or a capacity of routed experts, several records in one "
    "row, or a layer whose first dimension does not count the samples."
)
_NAMED = 0.1  # a factor this close to the batch size is named as such


def preflight(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: object = None,
    *,
    loss_of: LossOf | None = None,
    loss: LossName = "per-sample-mean",
    collate: Callable[[list[Any]], Any] | None = None,
) -> None:
    """Raise a named error if a private training would not be what it seems to be.

    Without a batch: the optimizer holds the model's own trained parameters, every trained layer
    has per-sample gradients, and there is no batch norm. With a batch the isolation of samples is
    tried out, in evaluation mode and again in training mode with repeated dropout masks:

    - sample i keeps its gradient when all others are replaced by copies of it, and when the
      attention masks and labels of all others are cut to half;
    - sample i alone has the gradient that it has in the batch, scaled as ``make_private`` does;
    - every trained layer is reached and has a gradient, except where it is 0 by construction
      (LoRA's A at B = 0).

    The first and the last sample take the part of i. The model, its gradients and torch's
    generators are left as they were. Call it before ``make_private``, whose taps leave nothing
    for others.

    It does not see records packed into one row without an input that tells, interactions that
    move less than 1e-4 of a gradient (3e-2 in half precision, TF32 and autocast), and samples
    that are joined where neither the first nor the last one is. Rows of different lengths, in a
    mapping with ``attention_mask`` and ``labels``, show the most.

    Args:
        model: As it is when its training begins.
        optimizer: The one to train it with.
        batch: At least two different records: a mapping as transformers' collators make it, or a
            tuple or list of tensors. Tensors whose first dimension is the batch size hold a row
            for each record; all else is passed on.
        loss_of: The loss that the loop backpropagates; ``model(**batch).loss`` for a mapping.
        loss: As for ``make_private``.
        collate: How records become a batch. With it ``batch`` is a list of records, and it is
            tried too whether the first and the last one keep their gradients when they are
            collated alone, with each other in both orders, and with all: a collator that mixes
            rows is seen, and padding that shifts positions. A short and a long record at the ends
            show the most.

    Raises:
        ValueError: The batch holds fewer than two different records.
        TypeError: The batch is neither a mapping nor a tuple or list, or a loss is no number.
        IsolationError: A sample's gradient depends on another sample.
        StaleParameterError: The optimizer holds other parameters than the model, or the loss does
            not go through a trained layer.
        UnsupportedTrainingError: The model holds a batch norm, rows hold several records, or a
            trained layer has no gradient.
        UnsupportedLayerError: A trained layer has no per-sample gradients.
        NonFiniteError: A gradient holds NaN or infinity.
        TrainingOrderError: The model carries the taps of ``make_private``.

    Examples:
        >>> from torch.nn.functional import mse_loss
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batch = (torch.eye(3), torch.ones(3, 1))
        >>> preflight(model, optimizer, batch, loss_of=lambda m, b: mse_loss(m(b[0]), b[1]))
    """
    _validate.choice("loss", loss, get_args(LossName))
    check_optimizer(model, optimizer)
    refuse_joined_samples(model)
    trained_layers(model)
    if batch is None:
        return
    listed = batch
    if collate is not None:
        batch = collate(cast("list[Any]", listed))
    records = Records(model, batch)
    trial = Trial(model, _default_loss(batch) if loss_of is None else loss_of)
    size, rows = records.size, (0, records.size - 1)
    plain = trial.run(batch, size)
    trained = trial.run(batch, size, training=True)
    _check_reached(model, plain, trained)
    again = trial.run(batch, size, training=True)
    for row in rows:
        moved = movement(trained, again, floor=trial.limits.floor, row=row)
        if moved.share > trial.limits.replaced:
            raise IsolationError(
                f"Two passes over the same batch give {_told(moved)} Something draws from another "
                "generator than torch's global one (numpy, random), so that the isolation of "
                "samples cannot be seen; fix its seed inside loss_of."
            )
    for row in rows:
        for what, other, training in records.without_others(row):
            found = trial.run(other, size, training=training)
            reference = trained if training else plain
            moved = movement(reference, found, floor=trial.limits.floor, row=row)
            if moved.share > trial.limits.replaced:
                cause = _DENOMINATOR.format(factor=moved.factor) if moved.parallel else _MIXED
                raise IsolationError(
                    f"In {'training' if training else 'evaluation'} mode, {what} give "
                    f"{_told(moved)} Clipping then does not bound what one sample does. {cause}"
                )
        found = trial.run(records.alone(row), 1)
        scale = float(size) if loss == "per-sample-mean" else 1.0
        moved = movement(plain, found, floor=trial.limits.floor, row=row, after_row=0, scale=scale)
        if moved.share > trial.limits.alone:
            raise IsolationError(
                f"A batch of one record, in place of {size}, gives {_told(moved)} "
                f"{_reduction(moved, size, loss)}"
            )
    if collate is not None:
        _check_collation(trial, cast("list[Any]", listed), collate, plain, loss)


def _check_collation(
    trial: Trial,
    records: list[Any],
    collate: Callable[[list[Any]], Any],
    together: dict[str, LayerTap],
    loss: LossName,
) -> None:
    """See that what is collated with a record does not move its gradient."""
    ends = {0: records[0], len(records) - 1: records[-1]}
    (first, a), (last, b) = ends.items()
    alone = {row: trial.run(collate([record]), 1) for row, record in ends.items()}
    forward, backward = trial.run(collate([a, b]), 2), trial.run(collate([b, a]), 2)
    tried = [
        (first, together, first, len(records)),
        (last, together, last, len(records)),
        (first, forward, 0, 2),
        (last, forward, 1, 2),
        (last, backward, 0, 2),
        (first, backward, 1, 2),
    ]
    for row, found, place, size in tried:
        scale = 1 / size if loss == "per-sample-mean" else 1.0
        moved = movement(
            alone[row], found, floor=trial.limits.floor, row=0, after_row=place, scale=scale
        )
        if moved.share > trial.limits.alone:
            raise IsolationError(
                f"Record {row}, collated with {size - 1} others in place of alone, gives "
                f"{_told(moved)} Clipping then does not bound what one sample does. The collate "
                "function mixes records, or pads so that positions or masks of the shorter ones "
                "change: pad at the right, with an attention_mask that the model uses."
            )


class WeightDeltaGuard:
    """See that steps of ``optimizer`` move the weights of ``model``, inside a ``with`` block.

    A step is judged for each trained parameter with non-zero entries in its gradient, unless its
    learning rate is 0: at least half of those entries must change a bit. This catches updates
    below the rounding of half-precision weights and parameters that the optimizer does not hold
    any more. On leaving the block without an error, every trained parameter must have moved at
    least once, which catches a learning rate of 0 throughout and layers that are never reached.
    A step without any gradient, such as one after a micro-batch, is not judged.

    Hooks run in the order in which they were registered, and ``make_private`` puts the gradient
    into ``.grad`` by such a hook: make the guard after it. The block should hold at least one
    whole step. What moves weights without the optimizer (``fold``, ``sgd_step``) is not seen.

    Args:
        model: The model that is used.
        optimizer: The one that is stepped.
        every: Judge one step in so many. For the time of a judged step the weights are held
            twice.

    Raises:
        ValueError: ``every`` is below 1.
        WeightsUnmovedError: At a step, or on leaving.

    Examples:
        >>> model = nn.Linear(2, 1).to(torch.bfloat16)
        >>> model.weight.data.fill_(0.05)
        tensor([[0.0500, 0.0500]], dtype=torch.bfloat16)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        >>> with WeightDeltaGuard(model, optimizer):
        ...     model(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
        ...     optimizer.step()
        Traceback (most recent call last):
        lora_privacy.errors.WeightsUnmovedError: ...
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int = 1
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._every = _validate.integer("every", every, 1)
        self._handles: list[RemovableHandle] = []
        self._before: dict[str, tuple[nn.Parameter, Tensor, Tensor]] = {}
        self._settled: set[str] = set()
        self._calls = self._steps = 0

    def __enter__(self) -> Self:
        self._settled, self._calls, self._steps = set(), 0, 0
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._before = {}
        if kind is None and self._calls:
            self._check_all_moved()

    def _before_step(self, *_: object) -> None:
        self._calls += 1
        self._before = {}
        graded = {
            name: parameter
            for name, parameter in _trained(self._model).items()
            if parameter.grad is not None
        }
        if not graded:
            return
        judged = self._steps % self._every == 0
        self._steps += 1
        for name, parameter in graded.items():
            # What has not moved yet is looked at in every step.
            if not judged and name in self._settled:
                continue
            assert parameter.grad is not None
            entries = parameter.grad.detach() != 0
            if bool(entries.any()):
                self._before[name] = (parameter, parameter.detach().clone(), entries)
            else:
                self._settled.add(name)  # nothing to move it, as LoRA's A at B = 0

    def _after_step(self, *_: object) -> None:
        rates = {
            id(parameter): float(group.get("lr", 1.0))
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }
        worst, share, seen = "", 0.5, ""
        for name, (parameter, before, entries) in self._before.items():
            moved = (parameter.detach() != before) & entries
            if bool(moved.any()):
                self._settled.add(name)
            unmoved = 1.0 - float(moved.sum()) / float(entries.sum())
            rate = rates.get(id(parameter), math.nan)
            if unmoved > share and rate != 0:
                worst, share = name, unmoved
                seen = "not held by the optimizer" if math.isnan(rate) else f"lr {rate:g}"
                seen = f"{parameter.dtype}, {seen}"
        self._before = {}
        if worst:
            raise WeightsUnmovedError(
                f"A step left {100 * share:.3g} % of the entries of {worst!r} ({seen}) that have "
                "a gradient as they were, bit by bit. Either the model uses another copy of the "
                "parameter than the optimizer (make the optimizer last), or the update is lost in "
                "the rounding of the weight: train in float32 (FLoRA keeps a float32 master of a "
                "half-precision base), or raise the learning rate."
            )

    def _check_all_moved(self) -> None:
        if not self._steps:
            raise WeightsUnmovedError(
                f"None of {self._calls} calls of optimizer.step() found a gradient in the model: "
                "another copy of it is trained, or the guard was made before make_private, whose "
                "hook sets the gradients. Make it after."
            )
        still = [name for name in _trained(self._model) if name not in self._settled]
        if still:
            rates = sorted({float(g.get("lr", 1.0)) for g in self._optimizer.param_groups})
            raise WeightsUnmovedError(
                f"{_listed(still)} never moved in {self._steps} steps (learning rates now: "
                f"{', '.join(f'{rate:g}' for rate in rates)}). Either the rate was 0 throughout, "
                "or no gradient ever came there. Freeze what is not to be trained."
            )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> trained parameter; the probe of a FLoRA layer must stay 0."""
    probes = {
        id(layer.expand.weight) for layer in model.modules() if isinstance(layer, FLoRALinear)
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in probes
    }


def _told(moved: Movement) -> str:
    return (
        f"sample {moved.sample} another gradient: that of {_listed([moved.layer])} moves most, "
        f"by {100 * moved.share:.3g} % of its norm."
    )


def _reduction(moved: Movement, size: int, loss: LossName) -> str:
    """What the loss seems to be."""
    # Factor of the gradient alone over the scaled one: a sum that is taken for a mean is
    # B times too large in the batch, and a mean that is taken for a sum B times too small.
    swapped: tuple[LossName, float] = (
        ("per-sample-sum", 1 / size) if loss == "per-sample-mean" else ("per-sample-mean", size)
    )
    if moved.parallel and math.isclose(moved.factor, swapped[1], rel_tol=_NAMED):
        return (
            f"The loss is a {swapped[0].removeprefix('per-sample-')} over the records: pass "
            f"loss={swapped[0]!r}, here and to make_private."
        )
    if moved.parallel:
        return (
            f"The two differ by a factor of {moved.factor:.3g}, but loss={loss!r} was stated: the "
            "loss must be divided by the number of records in the batch, or by nothing."
        )
    return _MIXED


def _check_reached(
    model: nn.Module, plain: dict[str, LayerTap], trained: dict[str, LayerTap]
) -> None:
    """See that every layer takes part in the loss, in one of the modes."""
    unreached = [name for name in plain if not plain[name].samples and not trained[name].samples]
    if unreached:
        raise StaleParameterError(
            f"The loss does not go through the trained layers {_listed(unreached)}: they would "
            "take noise and learn nothing. Their forward pass is not called (another copy of the "
            "model is used, an adapter is merged or disabled, the weight is used directly), or "
            "their result is detached. Use the model itself, or freeze them."
        )
    idle = _idle_by_construction(model)
    zero = [
        name
        for name, tap in plain.items()
        if not any(p.data_ptr() in idle for p in tap.parameters.values())
        and not any(bool(t.square_norms().any()) for t in (tap, trained[name]) if t.samples)
    ]
    if zero:
        raise UnsupportedTrainingError(
            f"The gradient of {_listed(zero)} is 0 for every sample: noise alone would move them. "
            "Look at the loss and at layers whose result is not used, or freeze them."
        )


def _idle_by_construction(model: nn.Module) -> set[int]:
    """Addresses of the factors of LoRA whose partner is 0."""
    idle: set[int] = set()
    for adapter in known_adapters(model).values():
        if adapter.kind != "flora":
            a, b = adapter.a(), adapter.b()
            idle |= {x.data_ptr() for x, partner in ((a, b), (b, a)) if not bool(partner.any())}
    return idle


def _default_loss(batch: object) -> LossOf:
    if not isinstance(batch, Mapping):
        raise TypeError("A batch that is no mapping needs loss_of=lambda model, batch: ….")

    def loss_of(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401 - a type of transformers
        return getattr(model(**batch), "loss", None)

    return loss_of


def _listed(names: list[str]) -> str:
    shown = [repr(name) if name else "the model itself" for name in names[:5]]
    return ", ".join(shown) + (", …" if len(names) > 5 else "")
