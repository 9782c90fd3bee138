"""The frozen blocks below the first adapted one, run once per example and then remembered."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_privacy.core.adapt import adapters
from lora_privacy.errors import NoTargetError, PrefixError, StalePrefixError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

__all__ = ["CachedPrefix"]

_SAMPLES = 16  # entries of each weight that are compared at every use
_IGNORED_LABEL = -100  # what transformers' token losses leave out
_HASH_STEP = -7046029254386353131  # 2^64 over the golden ratio, odd, as int64


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
        self.depth = _count_frozen(model, self._blocks)
        self._index: dict[Hashable, int] = {}
        self._offsets = [0]
        self._checksums: list[int | None] = []
        self._states = torch.empty(0)
        self._hidden_dtype = torch.float32
        self._tuples: list[bool] = []
        self._weights: dict[str, Tensor] = {}
        self._seen: tuple[object, ...] = ()
        self._digest = b""
        self._in_use = False

    def __len__(self) -> int:
        """Number of examples remembered."""
        return len(self._index)

    def __contains__(self, example_id: object) -> bool:
        return example_id in self._index

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
        if self._weights:
            self._check_fresh()
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
                    _check_agreement(
                        full, cached, inputs.get("attention_mask"), self._states.dtype
                    )
            first = False

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
        self._check_fresh()
        states, mask = self._gather(rows, attention_mask)
        checksums = [self._checksums[row] for row in rows]

        def stand_in(block: int) -> Callable[..., Tensor | tuple[Tensor]]:
            def forward(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:  # noqa: ANN401
                hidden: Tensor = args[0] if args else kwargs["hidden_states"]
                if block == self.depth - 1:
                    hidden = self._enter(hidden, states)
                return (hidden,) if self._tuples[block] else hidden

            return forward

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _check_batch(args, kwargs, mask, checksums)

        with ExitStack() as stack:
            self._in_use = True
            stack.callback(setattr, self, "_in_use", False)
            for i, block in enumerate(self._blocks[: self.depth]):
                stack.enter_context(_forward_replaced(block, stand_in(i)))
            handles = (
                self._model.register_forward_pre_hook(before, with_kwargs=True),
                self._model.register_forward_hook(_check_output),
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

    def _row(self, example_id: Hashable) -> int:
        if example_id not in self._index:
            raise PrefixError(
                f"Example {example_id!r} is not in the cached prefix ({len(self)} examples are); "
                "pass it to fill() first."
            )
        return self._index[example_id]

    def _gather(self, rows: list[int], mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """States (batch, tokens, width), 0 at padding, and the mask, bool, on the CPU."""
        starts = torch.tensor([self._offsets[row] for row in rows])
        lengths = torch.tensor([self._offsets[row + 1] for row in rows]) - starts
        if mask is None:
            if len(set(lengths.tolist())) > 1:
                raise PrefixError("The examples differ in length; pass their attention_mask.")
            mask = torch.ones(len(rows), int(lengths.max()), dtype=torch.bool)
        mask = _right_padded(mask)
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
        called: dict[nn.Module, None] = dict.fromkeys(self._blocks[: self.depth])
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
        if not self._weights:
            self._weights, self._tuples = weights, tuples
            self._check_frozen()
            self._seen, self._digest = self._fingerprint(), self._hash()
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
        mask = _right_padded(torch.ones(hidden.shape[:2]) if mask is None else mask)
        if mask.shape != hidden.shape[:2] or len(ids) != len(hidden):
            raise ValueError(
                f"A batch needs one id a row and a mask of shape {tuple(hidden.shape[:2])}, got "
                f"{len(ids)} ids and a mask of shape {tuple(mask.shape)}."
            )
        repeated = [i for i in ids if i in self._index] or (len(set(ids)) < len(ids) and ids)
        if repeated:
            raise ValueError(f"Each example must come once, got these ids again: {repeated[:5]}.")
        rows = hidden.cpu()[mask]
        if not self._index:
            self._hidden_dtype = hidden.dtype
            self._states = rows.new_empty((0, rows.shape[1]), dtype=self._dtype or rows.dtype)
        start, end = self._offsets[-1], self._offsets[-1] + len(rows)
        if end > len(self._states):  # doubling: one tensor, and no copy of the whole a batch
            grown = self._states.new_empty((max(end, 2 * start), rows.shape[1]))
            grown[:start] = self._states[:start]
            self._states = grown
        self._states[start:end] = rows
        for example_id, length, checksum in zip(
            ids, mask.sum(1).tolist(), _checksums(inputs.get("input_ids"), mask), strict=True
        ):
            self._index[example_id] = len(self._index)
            self._offsets.append(self._offsets[-1] + length)
            self._checksums.append(checksum)

    def _check_frozen(self) -> None:
        trainable = [name for name, tensor in self._weights.items() if tensor.requires_grad]
        if trainable:
            raise PrefixError(
                f"Everything before block {self.depth} must be frozen, got trainable "
                f"{', '.join(trainable[:5])}. Call requires_grad_(False) on it."
            )

    def _check_fresh(self) -> None:
        self._check_frozen()
        seen = self._fingerprint()
        if seen == self._seen:
            return
        # Loading the same weights again moves the versions and nothing else.
        if self._hash() != self._digest:
            raise StalePrefixError(
                "The weights below the first adapted block changed since fill(); make a new "
                "CachedPrefix."
            )
        self._seen = seen

    def _fingerprint(self) -> tuple[object, ...]:
        """Version of every weight and a few of its entries: microseconds each.

        The version misses writes through ``.data``; the entries catch all that touch many.
        """
        return tuple(
            (t._version, *t.detach().reshape(-1)[:: max(1, t.numel() // _SAMPLES)].tolist())
            for t in self._weights.values()
        )

    def _hash(self) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for tensor in self._weights.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.digest()


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


def _right_padded(given: Tensor) -> Tensor:
    """``given`` as booleans on the CPU; PrefixError unless it is 1s followed by 0s."""
    mask = given.detach().cpu()
    if mask.dim() != 2:
        raise PrefixError(
            f"attention_mask must have shape (batch, tokens), got {tuple(mask.shape)}."
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise PrefixError("attention_mask must hold 0 and 1 only.")
    mask = mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise PrefixError(
            "Padding must be on the right, got a token after padding. Set "
            "tokenizer.padding_side = 'right'."
        )
    return mask


def _checksums(input_ids: Tensor | None, mask: Tensor) -> list[int | None]:
    """One number for the tokens of each row, to tell a wrong example id; None without tokens."""
    if not isinstance(input_ids, Tensor) or input_ids.shape != mask.shape:
        return [None] * len(mask)
    factors = (torch.arange(mask.shape[1]) * 2 + 1) * _HASH_STEP  # int64, wraps around
    factors = factors ^ (factors >> 29)
    sums: list[int | None] = ((input_ids.cpu().long() + 1) * mask * factors).sum(1).tolist()
    return sums


def _check_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor, checksums: list[int | None]
) -> None:
    """Raise PrefixError unless the model is called on the batch that using() was given."""
    given = kwargs.get("attention_mask")
    same = torch.equal(given.cpu().bool(), mask) if given is not None else bool(mask.all())
    if not same and (given is not None or not args):
        raise PrefixError("The model must be called with the attention_mask given to using().")
    found = _checksums(kwargs.get("input_ids"), mask)
    wrong = [
        i for i, (a, b) in enumerate(zip(found, checksums, strict=True)) if a and b and a != b
    ]
    if wrong:
        raise PrefixError(
            f"The tokens of row {wrong[0]} are not those cached under its example id; "
            "do ids and rows have the same order?"
        )
    labels = kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.shape != mask.shape:
        return
    if bool((labels.cpu()[~mask] != _IGNORED_LABEL).any()):
        raise PrefixError(
            "Labels at padding must be -100: the outputs there are not those of an uncached "
            "run. Set labels[attention_mask == 0] = -100."
        )


def _check_output(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
    """Raise PrefixError if the model returned what the skipped blocks should have computed."""
    for name in ("past_key_values", "hidden_states", "attentions"):
        if getattr(output, name, None) is not None:
            flag = "use_cache" if name == "past_key_values" else f"output_{name}"
            raise PrefixError(
                f"The output must not hold {name}, since the cached blocks have none; pass "
                f"{flag}=False."
            )


def _check_agreement(
    full: object, cached: object, mask: Tensor | None, stored: torch.dtype
) -> None:
    """Raise PrefixError unless both outputs agree outside of padding."""
    pairs = list(zip(_tensors(full), _tensors(cached), strict=True))
    for expected, got in pairs:
        if mask is not None and expected.shape[: mask.dim()] == mask.shape:
            expected, got = expected[mask.bool()], got[mask.bool()]
        # Half of the digits: sums run in the same order, so that what differs is an error.
        eps = max(torch.finfo(d).eps for d in (expected.dtype, got.dtype, stored))
        error, scale = (expected - got).abs().max(), expected.abs().max()
        if not bool(error <= eps**0.5 * scale):
            raise PrefixError(
                "The model must give the same output from remembered states, got a difference "
                f"of {float(error):.2g} beside {float(scale):.2g}. Its blocks share more than "
                "hidden states, or its output depends on padding; this model cannot be cached."
            )


def _tensors(output: object) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    values: Iterable[Any] = ()
    if hasattr(output, "values"):
        values = output.values()  # pyright: ignore
    elif isinstance(output, tuple | list):
        values = output
    return [t for value in values for t in _tensors(value)]


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
