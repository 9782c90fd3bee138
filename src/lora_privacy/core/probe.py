"""What the frozen projection of an adapter does to the gradient of its base weight, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from lora_privacy import _validate
from lora_privacy.core.adapter import Adapter, adapters
from lora_privacy.errors import NonFiniteError, NoTargetError, ProbeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from lora_privacy.laws import EntryLaw

__all__ = ["GradientProbe", "GradientRecord"]


class GradientProbe:
    """Record ∂loss/∂W of the base weight of every adapted layer, though W itself is frozen.

    Inside the ``with`` block each adapted layer keeps a reference to its input and to the
    gradient of its output, which is enough to compute all that `GradientRecord` offers, later
    and only if asked. The model computes the same outputs and gradients, bit for bit, and is
    left without a trace on exit, also after an exception. ::

        with GradientProbe(model, every=10) as probe:
            for batch in batches:
                model(**batch).loss.backward()
                for name, record in probe.records.items():
                    print(name, record.noise.var())
                optimizer.step()
                optimizer.zero_grad()
                probe.step()

    A record sums over all backward passes since the last `step`: micro-batches, repeated calls
    of a layer, a second backward through a retained graph. A pass counts where its forward and
    its backward both run on a probed step inside the block. Forward passes without gradients
    are not recorded. Inputs and output gradients stay in memory until `step`; of several passes
    in one step all but the last are summed into a dense (out_features, in_features) matrix.

    With gradient checkpointing the inputs of the probed layers stay in memory as well.

    Args:
        model: A model with adapters of this library or of peft.
        every: Probe the steps 0, every, 2·every, …; the others cost next to nothing.
        layers: Names to probe, as `adapters` gives them; None means all.

    Raises:
        NoTargetError: The model has no adapters, or ``layers`` holds a name that is not one.
        TypeError: ``every`` is not an integer, or ``layers`` is a single string.
        ValueError: ``every`` is below 1.
        ProbeError: On entry, when the probe is active already.
    """

    def __init__(
        self, model: nn.Module, every: int = 1, layers: Iterable[str] | None = None
    ) -> None:
        self._every = _validate.integer("every", every, 1)
        self._adapters = _choose(adapters(model), layers)
        self._handles: list[RemovableHandle] = []
        self._records: dict[str, GradientRecord] = {}
        self._step = 0
        # A pass belongs to the block it began in; outside of a block this is None.
        self._block: object | None = None

    @property
    def records(self) -> dict[str, GradientRecord]:
        """Records of the current step by layer name; layers that took no part are absent."""
        found = self._records  # in the order of backward; ours is that of the model
        return {name: found[name] for name in self._adapters if name in found}

    @property
    def probing(self) -> bool:
        """Whether the current step is one that is recorded."""
        return self._step % self._every == 0

    def step(self) -> None:
        """End the step: drop its records. Call it once after each ``optimizer.step()``."""
        self._records = {}
        self._step += 1

    def __enter__(self) -> Self:
        if self._block is not None:
            raise ProbeError(
                "This GradientProbe is active already; nest a second probe, not the same one."
            )
        self._block = object()
        for name, adapter in self._adapters.items():
            hook = self._forward_hook(name, adapter)
            self._handles.append(adapter.layer.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        self._block = None
        while self._handles:
            self._handles.pop().remove()

    def _forward_hook(self, name: str, adapter: Adapter) -> Callable[..., None]:
        def on_forward(
            module: nn.Module,  # noqa: ARG001
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Tensor,
        ) -> None:
            # Evaluation, and the first forward of reentrant checkpointing, need no gradient.
            if not self.probing or not output.requires_grad:
                return
            block = self._block
            x: Tensor = (args[0] if args else kwargs["x"]).detach()
            if x.is_inference():  # has no version counter, so nothing could tell of changes
                x = x.clone()
            version = x._version
            a = adapter.a().detach().clone()

            # The closure pairs each input with its own gradient and dies with the graph.
            # On the tensor, not on the module: it sees the gradient of the value that the
            # layer returned, also when that tensor is overwritten later.
            def on_gradient(gradient: Tensor) -> None:
                if self._block is not block or not self.probing:
                    return
                record = self._records.get(name)
                if record is None:
                    record = self._records[name] = GradientRecord(name, adapter)
                if torch.is_grad_enabled():  # backward(create_graph=True)
                    record._watch_second_order(gradient)
                gradient = gradient.detach()
                record._add(_Pass(x, version, gradient, gradient._version, a))

            output.register_hook(on_gradient)

        return on_forward


@dataclass(frozen=True, slots=True)
class _Pass:
    """One backward pass through one call of a layer; references, with their versions."""

    x: Tensor  # (..., in_features)
    x_version: int
    grad: Tensor  # (..., out_features)
    grad_version: int
    a: Tensor  # (rank, in_features)

    def intact(self) -> bool:
        return self.x._version == self.x_version and self.grad._version == self.grad_version

    def factors(self) -> tuple[Tensor, Tensor]:
        """Inputs (tokens, in) and output gradients (tokens, out), at least in float32."""
        dtype = _wide(self.x, self.grad)
        return (
            self.x.reshape(-1, self.x.shape[-1]).to(dtype),
            self.grad.reshape(-1, self.grad.shape[-1]).to(dtype),
        )


class GradientRecord:
    """Gradient of one base weight W in one step, and what the adapter makes of it.

    Write G = ∂loss/∂W, (n, m) = (out_features, in_features) in the orientation of ``nn.Linear``
    (for ``Conv1D`` too), A (r, m) as it was in the forward pass, v the variance of A's entries
    and s the adapter's scaling. Computed when asked for, in float32 (float64 for float64
    models), without autograd. Results share no memory with the model; treat them as read-only.

    Dropout in front of A is not part of G: these are the quantities for the input that the base
    layer sees.

    Attributes:
        name: Name of the layer.
        rank: r.
        law: Law of A's entries when it was drawn; a trained A has moved since (see ``drift``).
        scaling: s, lora_alpha / r unless the adapter says otherwise.

    Raises:
        NonFiniteError: From every quantity, when a gradient or A holds NaN or infinity.
        ProbeError: From every quantity, when it can no longer be computed: the input of the
            layer or its output gradient was overwritten in place, or a second-order backward
            went through the layer; from those with A, when A changed within the step.

    References:
        arXiv:2409.17538, versions 2–3, eq. 12 as numbered there, for ``projected`` and ``noise``.
    """

    __slots__ = (
        "_a",
        "_a_fault",
        "_fault",
        "_pending",
        "_total",
        "law",
        "name",
        "rank",
        "scaling",
    )

    def __init__(self, name: str, adapter: Adapter) -> None:
        self.name: str = name
        self.rank: int = adapter.rank
        self.law: EntryLaw = adapter.law
        self.scaling: float = adapter.scaling
        self._pending: _Pass | None = None
        self._total: Tensor | None = None
        self._a: Tensor | None = None
        self._fault = ""
        self._a_fault = ""

    @property
    def a(self) -> Tensor:
        """A (rank, in_features) as it was in the forward pass, in the dtype of the model."""
        if self._a is None or self._a_fault:
            raise ProbeError(self._a_fault or f"Layer {self.name!r} has no recorded pass.")
        return self._a

    @property
    def gradient(self) -> Tensor:
        """G = ∂loss/∂W, shape (n, m)."""
        self._fold()
        if self._fault or self._total is None:
            raise ProbeError(self._fault or f"Layer {self.name!r} has no recorded pass.")
        return self._finite(self._total)

    @property
    def projected(self) -> Tensor:
        """G AᵀA / (v r), shape (n, m): its mean over draws of A is G.

        Raises:
            ValueError: The law of A is unknown, so v is.
        """
        variance = self.law.variance
        if not variance > 0:
            raise ValueError(
                f"The law of A in layer {self.name!r} must be known to normalise G AᵀA, got "
                f"{self.law.name!r}. Draw A from a named law (adapt(..., law='gaussian'), or "
                "init_lora_weights=True in peft), or use .actual_update, which needs no law."
            )
        return self._through_a(1.0 / (variance * self.rank))

    @property
    def noise(self) -> Tensor:
        """The injected noise ``projected - gradient`` = G (AᵀA/(v r) - I), shape (n, m)."""
        gradient = self.gradient  # first, so that `projected` starts from G
        return self.projected - gradient

    @property
    def actual_update(self) -> Tensor:
        """s² G AᵀA, shape (n, m): a step of SGD on B alone at rate η moves W by -η times this.

        Dropout in front of A makes it approximate; training A adds what A's own step does.
        Needs no law of A.
        """
        return self._through_a(self.scaling**2)

    @property
    def row_norms(self) -> Tensor:
        """‖G_i‖ of each row, shape (n,); through the Gram matrix of the inputs where cheaper."""
        one = self._single()
        if one is not None and one.x.device.type != "mps":  # mps has no float64
            x, grad = (factor.double() for factor in one.factors())
            tokens, n, m = len(x), grad.shape[1], x.shape[1]
            # ‖G_i‖² = g_iᵀ (X Xᵀ) g_i. float64, since squares of cancelling sums would keep
            # half the digits only; it halves the speed, hence the 2.
            if 2 * tokens * (n + m) < n * m:
                squares = ((x @ x.T) @ grad).mul_(grad).sum(0)
                return self._finite(squares.clamp_min_(0.0).sqrt_().to(_wide(one.x, one.grad)))
        return self.gradient.norm(dim=1)

    @property
    def projected_row_norms(self) -> Tensor:
        """‖G_i Aᵀ‖ of each row, shape (n,), neither normalised nor scaled; G is not formed."""
        return self._compressed().norm(dim=1)

    def _through_a(self, factor: float) -> Tensor:
        compressed = self._compressed()
        with torch.no_grad(), _full_precision(compressed):
            return (compressed * factor) @ self.a.to(compressed.dtype)

    def _compressed(self) -> Tensor:
        """G Aᵀ, (n, r), from the factors unless G is there already."""
        one = self._single()
        if one is None:
            gradient = self.gradient
            with torch.no_grad(), _full_precision(gradient):
                return self._finite(gradient @ self.a.to(gradient.dtype).T)
        x, grad = one.factors()
        with torch.no_grad(), _full_precision(x):
            return self._finite(grad.T @ (x @ self.a.to(x.dtype).T))

    def _single(self) -> _Pass | None:
        """The only pass of the step, when it is intact and not folded into G yet."""
        if self._fault or self._total is not None or self._pending is None:
            return None
        return self._pending if self._pending.intact() else None

    def _finite(self, value: Tensor) -> Tensor:
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"The gradient of layer {self.name!r} must be finite, got NaN or infinity. "
                "Check the loss, the learning rate and the weights (A included)."
            )
        return value

    def _add(self, one: _Pass) -> None:
        """Count one more pass; runs inside backward, so it notes faults and never raises."""
        self._fold()
        self._pending = one
        if self._a is None:
            self._a = one.a
        elif not torch.equal(self._a, one.a):
            self._a_fault = (
                f"A of layer {self.name!r} changed between two backward passes of one step. "
                "Call probe.step() after every optimizer.step()."
            )

    def _fold(self) -> None:
        """Move the pending pass into the dense sum."""
        one, self._pending = self._pending, None
        if one is None:
            return
        if not one.intact():
            self._fault = (
                f"The input of layer {self.name!r}, or the gradient of its output, was "
                "overwritten in place before it was used. Read the record before that, or "
                "replace the in-place operation."
            )
            return
        x, grad = one.factors()
        with torch.no_grad(), _full_precision(x):
            term = grad.T @ x
            # Not in place: a caller may hold the sum so far.
            self._total = term if self._total is None else self._total + term

    def _watch_second_order(self, gradient: Tensor) -> None:
        def spoil(_: Tensor | None = None) -> None:
            self._fault = (
                f"A second-order backward went through layer {self.name!r}; the probe measures "
                "first-order gradients only. Leave the step with create_graph=True unprobed."
            )

        if gradient.requires_grad:  # the second backward, if it comes, passes here
            gradient.register_hook(spoil)
        else:  # the loss is linear in this output, and nothing could tell
            spoil()


def _choose(found: dict[str, Adapter], layers: Iterable[str] | None) -> dict[str, Adapter]:
    if layers is None:
        return found
    if isinstance(layers, str):
        raise TypeError(f"layers must be an iterable of names, got the string {layers!r}.")
    names = list(layers)
    unknown = [name for name in names if name not in found]
    if unknown or not names:
        raise NoTargetError(
            f"layers must name adapted layers, got {unknown or names}. "
            f"The model has: {', '.join(found)}."
        )
    return {name: found[name] for name in names}


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _full_precision(tensor: Tensor) -> torch.autocast:
    """No autocast: inside such a block the products would be rounded to 16 bits."""
    return torch.autocast(tensor.device.type, enabled=False)
