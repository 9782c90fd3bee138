"""The frozen blocks below the first adapted one, run once per example and then remembered."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_privacy.core._frozen import FrozenWeights
from lora_privacy.core._prefix_checks import (
    check_agreement,
    check_batch,
    check_output,
    checksums,
    right_padded,
)
from lora_privacy.core.adapter import adapters
from lora_privacy.errors import NoTargetError, PrefixError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

__all__ = ["CachedPrefix"]


@dataclass(frozen=True, slots=True)
class _Row:
    """Where the states of an example lie, and one number for its tokens."""

    start: int
    end: int
    checksum: int | None


class CachedPrefix:
    """Hidden states that enter the first block with something to train, one run per example.

    Blocks below it do nothing but recompute the same numbers in every epoch, run and sweep.
    `fill` runs them once; inside `using` the model takes their result from memory instead,
    while its own forward still makes masks, positions and heads::

        prefix = CachedPrefix(model)
        prefix.fill((batch.pop("id"), batch) for batch in loader)
        with prefix.using(ids, batch["attention_mask"]):
            model(**batch).loss.backward()

    The blocks are those of the outermost ``nn.ModuleList`` that holds the trainable parameters
    and adapters; `depth` counts the leading ones that hold neither. With ``depth == 0`` there
    is nothing to remember: `fill` reads nothing and `using` changes nothing.

    States are those of **evaluation mode**: dropout below `depth` is off. Outputs and gradients
    equal an uncached run where dropout is 0. Padding is not stored and enters the blocks as
    zeros, so outputs *at* padding differ, and no loss may look there. The first batch of each
    `fill` is run both ways, and models where that makes a difference are refused.

    Args:
        model: A model with adapters, or with some parameters frozen.
        dtype: Type to store states in, such as ``torch.bfloat16``; None keeps the model's.

    Attributes:
        depth: Number of leading blocks that need not run again.

    Raises:
        PrefixError: No stack of blocks is found, or several are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._model = model
        self._dtype = dtype
        self._blocks = _find_blocks(model)
        self.depth: int = _count_frozen(model, self._blocks)
        self._rows: dict[Hashable, _Row] = {}
        self._states = torch.empty(0)
        self._used = 0
        self._hidden_dtype = torch.float32
        self._tuples: list[bool] = []
        self._weights: FrozenWeights | None = None
        self._in_use = False

    def __len__(self) -> int:
        """Number of examples remembered."""
        return len(self._rows)

    def __contains__(self, example_id: object) -> bool:
        return example_id in self._rows

    @property
    def nbytes(self) -> int:
        """Memory of the states, in bytes, spare room included."""
        return self._states.numel() * self._states.element_size()

    def fill(
        self, batches: Iterable[tuple[Sequence[Hashable] | Tensor, Mapping[str, Any]]]
    ) -> None:
        """Run the frozen blocks on every example and remember what comes out.

        May be called again with further examples. After an exception, the batches before it
        are kept.

        Args:
            batches: Pairs of example ids (hashable, one a row) and the keyword arguments of
                the model, with ``attention_mask`` (batch, tokens) where there is padding.

        Raises:
            ValueError: An id comes twice, or the number of ids is not that of rows.
            PrefixError: Padding is not on the right, a weight below `depth` is trainable, or
                the model computes something else with remembered states.
            StalePrefixError: The frozen weights changed since an earlier `fill`.
        """
        if self.depth == 0:
            return
        if self._weights is not None:
            self._weights.check()
        first = True
        for example_ids, inputs in batches:
            ids = _as_list(example_ids)
            with _evaluating(self._model):
                full = self._learn(inputs) if first else None
                hidden = self._capture(inputs)
                self._append(ids, inputs, hidden)
                if first:
                    with self.using(ids, inputs.get("attention_mask")):
                        cached = self._model(**inputs)
                    check_agreement(full, cached, inputs.get("attention_mask"), self._states.dtype)
            first = False

    def over(self, model: nn.Module) -> CachedPrefix:
        """What is remembered, for another model of the same frozen blocks; no state is copied.

        So that many adapters on one base, trained one after the other, need one `fill`.

        Args:
            model: Built like the model of this prefix. Its weights below `depth` are compared,
                its code is not.

        Raises:
            PrefixError: It has another number of frozen blocks, or lacks a weight.
            StalePrefixError: A frozen weight differs.
        """
        other = CachedPrefix(model, self._dtype)
        if other.depth != self.depth:
            raise PrefixError(
                f"The other model must have {self.depth} frozen blocks, got {other.depth}; adapt "
                "the same blocks."
            )
        if self._weights is not None:
            other._weights = self._weights.of(model)
        # Without the spare room, so that a later fill() of either grows a tensor of its own.
        other._states, other._used = self._states[: self._used], self._used
        other._rows = dict(self._rows)
        other._hidden_dtype, other._tuples = self._hidden_dtype, list(self._tuples)
        return other

    @contextmanager
    def using(
        self, example_ids: Sequence[Hashable] | Tensor, attention_mask: Tensor | None = None
    ) -> Iterator[None]:
        """Let the model take the states of these examples from memory inside the block.

        The blocks below `depth` have a stand-in for their ``forward`` meanwhile; it is removed
        on exit, also after an exception. The backward pass may run inside or outside.

        Args:
            example_ids: Ids as given to `fill`, one a row of the batch.
            attention_mask: (batch, tokens), 1 for tokens and 0 for padding on the right; None
                where there is no padding.

        Raises:
            PrefixError: An id is unknown, the mask does not have the example's length or pads
                on the left, a weight below `depth` is trainable, or the block is entered
                twice; from the model's call, when its batch is another one, labels at padding
                are not -100, or it returns what the skipped blocks should have computed
                (``past_key_values``, ``hidden_states``, ``attentions``).
            StalePrefixError: The frozen weights changed since `fill`.
        """
        if self.depth == 0:
            yield
            return
        if self._in_use:
            raise PrefixError("using() is active already; leave it before the next batch.")
        rows = [self._row(example_id) for example_id in _as_list(example_ids)]
        if self._weights is not None:
            self._weights.check()
        states, mask = self._gather(rows, attention_mask)

        def stand_in(block: int) -> Callable[..., Tensor | tuple[Tensor]]:
            def forward(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:  # noqa: ANN401
                hidden: Tensor = args[0] if args else kwargs["hidden_states"]
                if block == self.depth - 1:
                    hidden = self._enter(hidden, states)
                return (hidden,) if self._tuples[block] else hidden

            return forward

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            check_batch(args, kwargs, mask, [row.checksum for row in rows])

        with ExitStack() as stack:
            self._in_use = True
            stack.callback(setattr, self, "_in_use", False)
            for i, block in enumerate(self._blocks[: self.depth]):
                stack.enter_context(_forward_replaced(block, stand_in(i)))
            handles = (
                self._model.register_forward_pre_hook(before, with_kwargs=True),
                self._model.register_forward_hook(check_output),
            )
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def _enter(self, hidden: Tensor, states: Tensor) -> Tensor:
        if hidden.shape != states.shape:
            raise PrefixError(
                f"The batch must have the shape of the attention mask given to using(), "
                f"{tuple(states.shape)}, got hidden states {tuple(hidden.shape)}."
            )
        states = states.to(hidden.device, self._hidden_dtype).detach()
        # Reentrant checkpointing gives no gradients unless the input of a block asks for one.
        return states.requires_grad_(hidden.requires_grad)

    def _row(self, example_id: Hashable) -> _Row:
        if example_id not in self._rows:
            raise PrefixError(
                f"Example {example_id!r} is not in the cached prefix ({len(self)} examples are); "
                "pass it to fill() first."
            )
        return self._rows[example_id]

    def _gather(self, rows: list[_Row], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """States (batch, tokens, width), 0 at padding, and the mask, bool, on the CPU."""
        starts = torch.tensor([row.start for row in rows])
        lengths = torch.tensor([row.end for row in rows]) - starts
        if mask is None:
            if len(set(lengths.tolist())) > 1:
                raise PrefixError("The examples differ in length; pass their attention_mask.")
            mask = torch.ones(len(rows), int(lengths.max()), dtype=torch.bool)
        mask = right_padded(mask)
        if mask.shape[0] != len(rows) or not torch.equal(mask.sum(1), lengths):
            raise PrefixError(
                f"attention_mask must cover the cached lengths {lengths.tolist()}, got "
                f"{mask.sum(1).tolist()}; was the text tokenised or cut in another way?"
            )
        where = starts[:, None] + torch.arange(mask.shape[1])
        states = self._states[where.masked_fill_(~mask, 0)]
        states[~mask] = 0
        return states, mask

    def _learn(self, inputs: Mapping[str, Any]) -> object:
        """Run the whole model; note the weights used on the way and what the blocks return."""
        above = {m for m in self._model.modules() if any(s is self._blocks for s in m.modules())}
        called: dict[nn.Module, None] = {}
        done = False
        tuples: list[bool] = []

        def before(module: nn.Module, _: tuple[Any, ...]) -> None:
            if not done:
                called[module] = None

        def after(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
            nonlocal done
            tuples.append(isinstance(output, tuple))
            done = len(tuples) >= self.depth

        with ExitStack() as stack:
            for module in self._model.modules():
                stack.callback(module.register_forward_pre_hook(before).remove)
            for block in self._blocks[: self.depth]:
                stack.callback(block.register_forward_hook(after).remove)
            full = self._model(**inputs)
        if len(tuples) != self.depth:
            raise PrefixError(
                f"Each of the {self.depth} frozen blocks must run once in a forward pass, "
                f"got {len(tuples)} runs; this model cannot be cached."
            )
        names = {module: name for name, module in self._model.named_modules()}
        weights = {
            f"{names[module]}.{name}".lstrip("."): tensor
            for module in called
            for kind in (module.named_parameters, module.named_buffers)
            for name, tensor in kind(recurse=module not in above)
        }
        if self._weights is None:
            self._weights, self._tuples = FrozenWeights(weights), tuples
        return full

    def _capture(self, inputs: Mapping[str, Any]) -> Tensor:
        """What leaves the last frozen block; nothing above it runs."""

        def stop(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
            raise _ReachedError(output)

        handle = self._blocks[self.depth - 1].register_forward_hook(stop)
        try:
            self._model(**inputs)
        except _ReachedError as reached:
            output = reached.args[0]
        else:
            raise PrefixError("The forward pass did not reach the first adapted block.")
        finally:
            handle.remove()
        first, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(first, Tensor) or first.dim() != 3 or any(r is not None for r in rest):
            raise PrefixError(
                "A frozen block must return hidden states (batch, tokens, width) and nothing "
                f"else, got {type(output).__name__}; this model cannot be cached."
            )
        return first

    def _append(self, ids: list[Hashable], inputs: Mapping[str, Any], hidden: Tensor) -> None:
        mask = inputs.get("attention_mask")
        mask = right_padded(torch.ones(hidden.shape[:2]) if mask is None else mask)
        if mask.shape != hidden.shape[:2] or len(ids) != len(hidden):
            raise ValueError(
                f"A batch needs one id a row and a mask of shape {tuple(hidden.shape[:2])}, got "
                f"{len(ids)} ids and a mask of shape {tuple(mask.shape)}."
            )
        repeated = [i for i in ids if i in self._rows] or (len(set(ids)) < len(ids) and ids)
        if repeated:
            raise ValueError(f"Each example must come once, got these ids again: {repeated[:5]}.")
        rows = hidden.cpu()[mask]
        if not self._rows:
            self._hidden_dtype = hidden.dtype
            self._states = rows.new_empty((0, rows.shape[1]), dtype=self._dtype or rows.dtype)
        start, end = self._used, self._used + len(rows)
        if end > len(self._states):  # doubling: one tensor, and no copy of the whole a batch
            grown = self._states.new_empty((max(end, 2 * start), rows.shape[1]))
            grown[:start] = self._states[:start]
            self._states = grown
        self._states[start:end] = rows
        # Before the rows are entered, so that an interrupt never lets two examples share room.
        self._used = end
        ends = (start + mask.sum(1).cumsum(0)).tolist()
        sums = checksums(inputs.get("input_ids"), mask)
        for row in zip(ids, [start, *ends], ends, sums, strict=False):
            self._rows[row[0]] = _Row(*row[1:])


class _ReachedError(Exception):
    """Carries the output of the last frozen block out of the forward pass."""


def _find_blocks(model: nn.Module) -> nn.ModuleList:
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    inner = {s for m in lists.values() for s in m.modules() if s is not m}
    outer = {n: m for n, m in lists.items() if m not in inner}
    layers = _adapted(model)
    live = {n: m for n, m in outer.items() if any(_is_live(block, layers) for block in m)}
    # Nothing to train inside any stack: a head on top of a frozen one.
    candidates = live or outer
    if len(candidates) != 1:
        raise PrefixError(
            "The model must have one nn.ModuleList of blocks to cache a prefix of, got "
            f"{', '.join(candidates) or 'none'}."
        )
    return next(iter(candidates.values()))


def _count_frozen(model: nn.Module, blocks: nn.ModuleList) -> int:
    layers = _adapted(model)
    live = [i for i, block in enumerate(blocks) if _is_live(block, layers)]
    return live[0] if live else len(blocks)


def _adapted(model: nn.Module) -> set[nn.Module]:
    try:
        return {adapter.layer for adapter in adapters(model).values()}
    except NoTargetError:  # a head, or some blocks, trained in full
        return set()


def _is_live(block: nn.Module, layers: set[nn.Module]) -> bool:
    return any(p.requires_grad for p in block.parameters()) or not layers.isdisjoint(
        block.modules()
    )


def _as_list(ids: Sequence[Hashable] | Tensor) -> list[Hashable]:
    """Ids as plain values: tensors hash by identity, so that none would be found again."""
    plain: Sequence[Any] = ids.tolist() if isinstance(ids, Tensor) else ids
    # Tensors and numpy numbers; the latter hash as plain ones do, but the type is then mixed.
    return [i.item() if hasattr(i, "item") else i for i in plain]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _forward_replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Shadow ``block.forward``: hooks, names, weights and other attributes stay where they are."""
    before = block.__dict__.get("forward")  # set by wrappers such as accelerate's
    block.forward = forward
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before
