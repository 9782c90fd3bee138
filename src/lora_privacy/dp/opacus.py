"""The bridge to Opacus. The only module of ``dp`` that imports torch and opacus."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from opacus.accountants import (  # pyright: ignore[reportMissingTypeStubs]
    IAccountant,
    create_accountant,
    register_accountant,
)
from opacus.accountants import (  # pyright: ignore[reportMissingTypeStubs]
    RDPAccountant as OpacusRdpAccountant,
)
from opacus.optimizers import DPOptimizer  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from lora_privacy._digest import tensor_digest
from lora_privacy.dp.attestation import (
    AttestedLedger,
    ProjectionAttestation,
    append_step,
    checked_history,
    checked_layers,
)
from lora_privacy.dp.calibration import Accountant
from lora_privacy.dp.events import GaussianEvent, ProjectedGaussian, SampledGaussian
from lora_privacy.dp.pld import PldAccountant
from lora_privacy.dp.rdp import RdpAccountant
from lora_privacy.dp.result import ImpliedPrivacy, PrivacyBound
from lora_privacy.errors import AttestationError, UnsupportedEventError

__all__ = [
    "ProjectedOpacusAccountant",
    "ProjectionAttestation",
    "SampledOpacusAccountant",
    "chain_step_hook",
    "projection_digest",
    "register",
    "register_projected",
    "to_opacus",
]

History = list[tuple[float, float, int]]
EventOf = Callable[[float, float], object]


def register() -> None:
    """Make ``PrivacyEngine(accountant="pld")`` account by ``PldAccountant``, for any Opacus run.

    The ε holds for a run whose every step is taken on a Poisson batch of its own. The accountant
    sees neither the loader nor the batch, so this is for you to ensure:

    - **Do not call** ``make_private(poisson_sampling=False)``. Opacus reports the same steps, and
      the ε printed for them is void.
    - **Take one step on each batch**, with one optimizer that holds all parameters. A second
      optimizer is refused; a second step of the same optimizer on the same batch is not seen.

    ``get_epsilon(delta)`` is a bare number; ``bound(delta)`` states these assumptions with it.
    Registering twice does nothing the second time.

    Raises:
        ValueError: Opacus has another accountant named ``"pld"``.
    """
    _register("pld", functools.partial(SampledOpacusAccountant, "pld", PldAccountant()))


def register_projected(name: str, layers: Sequence[tuple[int, int]]) -> None:
    """Make ``PrivacyEngine(accountant=name)`` account each step as a ``ProjectedGaussian``.

    Its step hook refuses every optimizer that does not attest a fresh A at this step; see
    ``ProjectedOpacusAccountant``. Registering the same again does nothing.

    Args:
        name: Any name that Opacus does not use.
        layers: ``(in_features, rank)`` of every trained layer.

    Raises:
        ValueError: ``layers`` is malformed, or Opacus has another accountant of this name.
    """
    shapes = checked_layers(layers)

    def event_of(noise_multiplier: float, sample_rate: float) -> ProjectedGaussian:
        return ProjectedGaussian(
            layers=shapes, noise_multiplier=noise_multiplier, sample_rate=sample_rate
        )

    event_of(1.0, 1.0)  # refuses layers that the proof does not cover, before any run
    make = functools.partial(ProjectedOpacusAccountant, name, shapes, PldAccountant(), event_of)
    _register(name, make)


class SampledOpacusAccountant(IAccountant):
    """Opacus accountant whose ε is proved by one of ours, from Poisson-sampled Gaussian steps.

    What it cannot see it states as an assumption of the bound: with
    ``make_private(poisson_sampling=False)`` Opacus reports the same steps, and the bound is void.
    Its step hook serves one optimizer, the first that it charges.

    Args:
        name: Name it is registered under.
        empty: What proves ε, before any release.

    Attributes:
        history: ``[(noise multiplier, sampling rate, steps), …]``, as in Opacus. Its
            ``get_noise_multiplier`` writes it, to plan a run.
    """

    def __init__(self, name: str, empty: Accountant) -> None:
        self._name = name
        self._empty = empty
        self._optimizer = _OneOptimizer()
        self.history: History = []

    def __len__(self) -> int:
        """Steps so far."""
        return sum(count for _, _, count in self.history)

    def mechanism(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The registered name. A method of the object, which is all that Opacus asks for."""
        return self._name

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Charge one step; ValueError where it has no noise or a rate outside (0, 1]."""
        append_step(self.history, SampledGaussian(noise_multiplier, sample_rate))

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[DPOptimizer], None]:
        """Hook that charges a step once its noise is added, before the weights move.

        The hook raises UnsupportedEventError for a second optimizer and for accumulated batches.
        """

        def hook(optimizer: DPOptimizer) -> None:
            self._optimizer.check(optimizer)
            _refuse_accumulation(optimizer)
            self.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=sample_rate)
            self._optimizer.remember(optimizer)

        return hook

    def bound(self, delta: float) -> PrivacyBound:
        """What is proved of the history at ``delta``, with its assumptions and sources.

        Raises:
            UnsupportedEventError: The history is empty.
        """
        return _prove(self._empty, SampledGaussian, self.history, delta)

    # A misspelt parameter must not vanish, so there is no **kwargs.
    def get_epsilon(self, delta: float) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """ε of ``bound(delta)``, in nats."""
        return self.bound(delta).epsilon

    def state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, destination: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """History and name, in plain Python types; whoever can edit them can change the ε."""
        return _fill(destination, history=checked_history(self.history), mechanism=self._name)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take over a state, which is trusted: one that was edited is not detected.

        Raises:
            ValueError: It is not one of ours, or something was charged already.
        """
        _check_state(state_dict, {"history"}, self._name, charged=bool(self.history))
        self.history = checked_history(state_dict["history"])


class ProjectedOpacusAccountant(IAccountant):
    """Opacus accountant for runs that project each step's gradient by a fresh A, and show it.

    Its step hook asks the optimizer for ``attest_projection()``, charges the step when the
    ``ProjectionAttestation`` fits the proof and repeats no earlier one, and raises otherwise,
    before the weights move. A stock ``DPOptimizer`` has no such method and is refused.

    A history that is set from outside is a plan: it has an ε, but it is no ledger. An object holds
    a plan or attested steps, never both.

    Args:
        name: Name it is registered under.
        layers: ``(in_features, rank)`` of every trained layer.
        empty: What proves ε, before any release.
        event_of: The release at a noise multiplier and a sampling rate.
    """

    def __init__(
        self, name: str, layers: Sequence[tuple[int, int]], empty: Accountant, event_of: EventOf
    ) -> None:
        self._name = name
        self._empty = empty
        self._event_of = event_of
        self._ledger = AttestedLedger(layers)
        self._optimizer = _OneOptimizer()
        self._plan: History = []

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """``(in_features, rank)`` of every trained layer."""
        return self._ledger.layers

    @property
    def history(self) -> tuple[tuple[float, float, int], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Attested steps, or the plan. A tuple, so that an ``append`` raises and is not lost."""
        return self._ledger.history or tuple(self._plan)

    @history.setter
    def history(self, plan: Sequence[tuple[float, float, int]]) -> None:
        if len(self._ledger):
            raise AttestationError(
                f"This accountant holds {len(self._ledger)} attested steps, and a history that is "
                "set is only a plan. Plan with a new accountant."
            )
        self._plan = checked_history(plan)

    def __len__(self) -> int:
        """Attested steps so far; a plan has none."""
        return len(self._ledger)

    def mechanism(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The registered name."""
        return self._name

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Raise: a step without an attestation cannot be charged as a fresh projection."""
        raise AttestationError(
            f"Accountant {self._name!r} takes no bare step (noise multiplier "
            f"{noise_multiplier!r}, sampling rate {sample_rate!r}): it charges fresh projections, "
            "and only the hook of get_optimizer_hook_fn asks the optimizer to attest one."
        )

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[DPOptimizer], None]:
        """Hook that charges an attested step, and raises before the weights move otherwise."""

        def hook(optimizer: DPOptimizer) -> None:
            if self._plan:
                raise AttestationError(
                    "This accountant holds a plan; train with a new one, so that its ε is of "
                    "attested steps only."
                )
            attest = getattr(optimizer, "attest_projection", None)
            if not callable(attest):
                raise AttestationError(
                    f"{type(optimizer).__name__} does not attest a projection: it has no "
                    "attest_projection(). Its steps are plain sampled Gaussians; use "
                    'accountant="pld".'
                )
            self._optimizer.check(optimizer)
            _refuse_accumulation(optimizer)
            self._ledger.charge(
                attest(), noise_multiplier=optimizer.noise_multiplier, sample_rate=sample_rate
            )
            self._optimizer.remember(optimizer)

        return hook

    def bound(self, delta: float) -> PrivacyBound:
        """What is proved at ``delta``; of a plan it says that no step was taken.

        Raises:
            UnsupportedEventError: There is neither a step nor a plan.
        """
        proved = _prove(self._empty, self._event_of, self.history, delta)
        said = "each step's A is what the optimizer attested it to be"
        if self._plan:
            said = "this is a plan: no step of it has been taken or attested"
        return replace(proved, assumptions=(*proved.assumptions, said))

    def get_epsilon(self, delta: float) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """ε of ``bound(delta)``, in nats."""
        return self.bound(delta).epsilon

    def state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, destination: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The attested ledger with its digests; AttestationError for a plan, which is none.

        Whoever can edit it can change the ε, and can erase the draws that must not come back.
        """
        if self._plan:
            raise AttestationError("A plan has no state to save: no step was attested.")
        return _fill(destination, **self._ledger.state(), mechanism=self._name)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take over a ledger, which is trusted: one that was edited is not detected.

        Raises:
            ValueError: It is not whole or not ours, or something was charged already.
        """
        keys = {"history", "layers", "seed_digests", "matrix_digests"}
        _check_state(state_dict, keys, self._name, charged=bool(self.history))
        self._ledger = AttestedLedger.restored(state_dict, self.layers)


def _history_entry(event: object, count: int) -> tuple[float, float, int]:
    if isinstance(event, GaussianEvent):
        return event.noise_multiplier, 1.0, count
    if isinstance(event, SampledGaussian):
        return event.noise_multiplier, event.sample_rate, count
    raise UnsupportedEventError(
        f"Opacus has no history that means {type(event).__name__}: it would account it as a "
        "plain Gaussian. Use register_projected."
    )


def chain_step_hook(optimizer: DPOptimizer, hook: Callable[[DPOptimizer], None]) -> None:
    """Run ``hook`` after the step hook that ``optimizer`` has, which stays in place.

    ``optimizer.attach_step_hook(hook)`` would replace the accounting hook, and later steps would
    be charged nowhere. ``hook`` runs once the step is charged, before the weights move, and does
    not run where the accounting hook raises.

    Args:
        optimizer: What ``make_private`` returned.
        hook: Called with the optimizer.

    Raises:
        ValueError: The optimizer has no step hook yet.
    """
    first: Callable[[DPOptimizer], None] | None = optimizer.step_hook
    if first is None:
        raise ValueError(
            "optimizer has no step hook to keep, so its steps are not charged. Call this on the "
            "optimizer that make_private returned."
        )

    def both(charged: DPOptimizer) -> None:
        first(charged)
        hook(charged)

    optimizer.attach_step_hook(both)


def projection_digest(matrices: Iterable[Tensor]) -> str:
    """SHA-256 of the shapes, types and entries of one step's A's, for a ``ProjectionAttestation``.

    Args:
        matrices: The A of each layer, (rank, in_features), in a fixed order.
    """
    return tensor_digest(("", matrix) for matrix in matrices)


def _register(name: str, make: functools.partial[Any]) -> None:
    """Register ``make``, or find that the same was registered before."""
    try:
        register_accountant(name, make)  # pyright: ignore[reportArgumentType]
    except ValueError:
        present, wanted = create_accountant(name), make()
        same = type(present) is type(wanted)
        if not same or getattr(present, "layers", None) != getattr(wanted, "layers", None):
            raise ValueError(
                f"Opacus has another accountant named {name!r} already: "
                f"{type(present).__name__}. Choose another name."
            ) from None


def _prove(
    empty: Accountant, event_of: EventOf, history: Sequence[tuple[float, float, int]], delta: float
) -> PrivacyBound:
    if not history:
        raise UnsupportedEventError(
            "No step was charged, so there is nothing to prove an ε of: either none was taken, or "
            "the accounting hook was lost (attach_step_hook replaces it). Add a hook of your own "
            "by lora_privacy.dp.opacus.chain_step_hook."
        )
    accountant = empty
    for noise_multiplier, sample_rate, steps in checked_history(list(history)):
        accountant = accountant.compose(event_of(noise_multiplier, sample_rate), steps)
    return accountant.epsilon(delta)


class _OneOptimizer:
    """The first optimizer that was charged; every other one is refused, even when it is gone.

    Two optimizers that step on one Poisson batch release two sums that hang on the same coin of a
    record. Charged as two samples, they would seem to cost far less than they do.
    """

    def __init__(self) -> None:
        # Weak, so that the accountant keeps no model alive; not id(), which is given out again.
        self._first: weakref.ref[DPOptimizer] | None = None

    def check(self, optimizer: DPOptimizer) -> None:
        """Raise UnsupportedEventError unless ``optimizer`` is the first one or there is none."""
        if self._first is not None and self._first() is not optimizer:
            raise UnsupportedEventError(
                "This accountant has charged another optimizer. Two optimizers may step on one "
                "Poisson batch, and their releases are then not independent samples, as they "
                "would be charged. Put all parameters into one optimizer. For a later phase with "
                "batches of its own, load state_dict() into a new accountant."
            )

    def remember(self, optimizer: DPOptimizer) -> None:
        """Take ``optimizer``, which was just charged, for the only one."""
        if self._first is None:
            self._first = weakref.ref(optimizer)


def _refuse_accumulation(optimizer: DPOptimizer) -> None:
    """Raise where one step sums several Poisson batches.

    Opacus charges k batches at rate q as one at rate kq. But a record may be in several of them,
    each time with its full clip norm, so that such a step is no ``SampledGaussian`` at all.
    """
    batches = optimizer.accumulated_iterations
    if batches != 1:
        raise UnsupportedEventError(
            f"A step summed {batches} Poisson batches; a record may be in several of them, so its "
            "contribution is not bounded by one clip norm. Use one batch a step; "
            "opacus.utils.batch_memory_manager.BatchMemoryManager splits a large one."
        )


def _fill(destination: dict[str, Any] | None, **state: object) -> dict[str, Any]:
    target: dict[str, Any] = {} if destination is None else destination
    target.update(state)
    return target


def _check_state(state: Mapping[str, Any], keys: set[str], name: str, *, charged: bool) -> None:
    """Raise ValueError unless ``state`` is of accountant ``name``, which has no history yet."""
    found = state.get("mechanism") if state else None
    if found != name:
        raise ValueError(
            f"state_dict must be of mechanism {name!r}, got {found!r}: the steps of another "
            "mechanism mean something else."
        )
    if set(state) != {"mechanism", *keys}:
        raise ValueError(
            f"state_dict must hold exactly {sorted({'mechanism', *keys})}, got {sorted(state)}."
        )
    if charged:
        raise ValueError(
            "state_dict would replace steps that were charged already, and what they released "
            "stays released. Load it into a new accountant."
        )


def to_opacus(source: ImpliedPrivacy | RdpAccountant | PldAccountant) -> OpacusRdpAccountant:
    """Return an Opacus accountant whose ``history`` holds ``[(σ, q, steps), …]`` of ``source``.

    The history of a reading is a reading: Opacus' ``get_epsilon`` prints the implied ε, which is
    not a guarantee, without saying so. On Opacus' own orders its ε equals that of
    ``RdpAccountant(orders=…)`` up to rounding, and its rounding is not upwards.

    Args:
        source: A reading with a positive noise multiplier, or an accountant under
            ``"add-remove"`` with at least one event.

    Raises:
        UnsupportedEventError: Opacus has no history that means ``source``.
        TypeError: ``source`` is something else.
    """
    if isinstance(source, ImpliedPrivacy):
        history = [(source.noise_multiplier, source.sample_rate, source.steps)]
        if not 0 < source.noise_multiplier < math.inf:
            raise UnsupportedEventError(
                f"The reading has an implied noise multiplier of {source.noise_multiplier:g}: "
                f"{source.reason}. There is no noise for Opacus to account; lower the distortion."
            )
    elif isinstance(source, RdpAccountant | PldAccountant):  # pyright: ignore[reportUnnecessaryIsInstance]
        if source.adjacency != "add-remove":
            raise UnsupportedEventError(
                "Opacus accounts for adding or removing one record; the accountant has "
                f"adjacency={source.adjacency!r}."
            )
        if not source.events:
            raise UnsupportedEventError("The accountant is empty: compose an event first.")
        history = [_history_entry(event, count) for event, count in source.events]
    else:
        raise TypeError(
            f"source must be an ImpliedPrivacy or an accountant, got {type(source).__name__}."
        )
    accountant = OpacusRdpAccountant()
    accountant.history = history
    return accountant
