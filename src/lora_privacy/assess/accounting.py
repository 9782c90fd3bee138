"""What the commands ``account`` and ``calibrate`` ask and print: one release, repeated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_privacy import _validate
from lora_privacy._digits import at_most
from lora_privacy.assess.tables import Table
from lora_privacy.dp import (
    GaussianEvent,
    PldAccountant,
    PrivacyBound,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    calibrate,
    calibrate_rank,
    calibrate_steps,
)
from lora_privacy.dp.curve import PrivacyCurve, privacy_curve
from lora_privacy.errors import UnsupportedEventError
from lora_privacy.references import cite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_privacy.dp import Adjacency, Calibration, Event

__all__ = [
    "ACCOUNTANTS",
    "Account",
    "Answer",
    "Release",
    "ReleaseConfig",
    "layers_of",
    "sample_rate_of",
]

AccountantName = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[AccountantName, ...] = ("pld", "rdp")


@dataclass(frozen=True, slots=True)
class Release:
    """One release, as it is accounted.

    Attributes:
        noise_multiplier: z = σ/C.
        sample_rate: Probability that a record takes part.
        layers: ``(in_features, rank)`` of every layer under a fresh A; empty for no projection.
    """

    noise_multiplier: float
    sample_rate: float
    layers: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: the release in words, and the numbers."""
        return {
            "release": str(self),
            "noise_multiplier": self.noise_multiplier,
            "sample_rate": self.sample_rate,
            "layers": [list(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """In words, with every digit: a rounded noise would name another release."""
        noise, rate = (
            repr(float(number)).removesuffix(".0")
            for number in (self.noise_multiplier, self.sample_rate)
        )
        parts = f"noise multiplier {noise}, sampling rate {rate}"
        if not self.layers:
            return f"Gaussian noise, {parts}"
        shapes = ", ".join(f"{in_features}:{rank}" for in_features, rank in self.layers)
        return f"Gaussian noise before a fresh projection ({shapes}), {parts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The answer of ``account``.

    Attributes:
        release: One release.
        steps: How many.
        bound: What is proved.
        curve: Other bounds of the same history; None where no finite ε is proved.
    """

    release: Release
    steps: int
    bound: PrivacyBound
    curve: PrivacyCurve | None

    def curve_or_error(self) -> PrivacyCurve:
        """The curve; UnsupportedEventError where there is none to draw."""
        if self.curve is None:
            raise UnsupportedEventError(f"There is nothing to plot: {self.bound.reason}")
        return self.curve

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; every number lies beside its adjacency, unit, method and citations."""
        return {
            **self.release.to_dict(),
            "steps": self.steps,
            "bound": _record(self.bound),
            "curve": None if self.curve is None else self.curve.to_dict(),
        }

    def text(self) -> str:
        """A Markdown table of the bound, with what it rests on."""
        rows: list[tuple[str, str]] = []
        references = self.bound.references
        if self.curve is not None:
            references = self.curve.references
            rows = [
                (
                    f"true-positive rate of an attack at false-positive rate {rate:g}, at most",
                    at_most(float(self.curve.tpr_bound(rate))),
                )
                for rate in (0.001, 0.01)
            ]
            rows.append(("advantage of an attack, at most", at_most(self.curve.advantage())))
        return _bound_text(self.bound, self.release, self.steps, rows, references)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of ``calibrate``: what was found, and the releases that its bound is about."""

    found: Calibration
    release: Release
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields."""
        return {
            **self.release.to_dict(),
            "steps": self.steps,
            **self.found.to_dict(),
            "bound": _record(self.found.bound),
        }

    def text(self) -> str:
        """The value, then the bound that certifies it."""
        name = self.found.quantity.replace("_", " ")
        bound = self.found.bound
        return (
            f"{name} = {self.found.value:,} meets ε ≤ {self.found.target!r} at δ = "
            f"{bound.delta!r}. The bound proved at this value:\n\n"
            + _bound_text(bound, self.release, self.steps, [], bound.references)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseConfig:
    """One kind of release, and what accounts it.

    Attributes:
        sample_rate: Probability that a record takes part in a step, in (0, 1].
        adjacency: Neighbouring relation.
        accountant: ``"pld"`` or ``"rdp"``.
        layers: ``(in_features, rank)`` of every trained layer when each step projects its
            gradient by a fresh A; empty for no projection.

    Raises:
        ValueError: A name is not known.
    """

    sample_rate: float
    adjacency: Adjacency = "add-remove"
    accountant: AccountantName = "pld"
    layers: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _validate.choice("accountant", self.accountant, ACCOUNTANTS)

    def empty(self) -> PldAccountant | RdpAccountant:
        """The accountant before any release."""
        kind = PldAccountant if self.accountant == "pld" else RdpAccountant
        return kind(self.adjacency)

    def event(self, noise_multiplier: float, rank: int | None = None) -> Event:
        """One release; ``rank`` replaces that of every layer."""
        if self.layers:
            return ProjectedGaussian(
                layers=self._shapes(rank),
                noise_multiplier=noise_multiplier,
                sample_rate=self.sample_rate,
            )
        if self.sample_rate == 1:
            return GaussianEvent(noise_multiplier)
        return SampledGaussian(noise_multiplier, self.sample_rate)

    def account(
        self, noise_multiplier: float, steps: int, *, delta: float | None, epsilon: float | None
    ) -> Account:
        """Bound of ``steps`` releases at ``delta`` or at ``epsilon``, and its curve.

        Raises:
            ValueError: Both or neither of δ and ε are given, or a number is out of range.
            UnsupportedEventError: There is no proof for this release under this adjacency.
        """
        steps = _validate.integer("steps", steps, 1)
        ledger = self.empty().compose(self.event(noise_multiplier), steps)
        if delta is not None and epsilon is None:
            bound = ledger.epsilon(delta)
        elif epsilon is not None and delta is None:
            bound = ledger.delta(epsilon)
        else:
            raise ValueError("Give --delta, to bound ε, or --epsilon, to bound δ, not both.")
        try:
            curve: PrivacyCurve | None = privacy_curve(ledger)
        except UnsupportedEventError:
            curve = None  # no finite ε at any δ: the bound gives the reason
        return Account(
            release=self._release(noise_multiplier), steps=steps, bound=bound, curve=curve
        )

    def calibrate(
        self, *, noise_multiplier: float | None, steps: int | None, epsilon: float, delta: float
    ) -> Answer:
        """Search what is left out: the noise, the steps, or the rank when both are given.

        Raises:
            ValueError: Nothing is left out, or two things are, or a number is out of range.
            CalibrationError: The target cannot be met, or is met by everything.
        """
        prover = self.empty()
        if noise_multiplier is None and steps is not None:
            found = calibrate(
                self.event, epsilon=epsilon, delta=delta, steps=steps, accountant=prover
            )
            return Answer(found, self._release(found.value), steps)
        if noise_multiplier is not None and steps is None:
            found = calibrate_steps(
                self.event(noise_multiplier), epsilon=epsilon, delta=delta, accountant=prover
            )
            return Answer(found, self._release(noise_multiplier), int(found.value))
        if noise_multiplier is None or steps is None or not self.layers:
            raise ValueError(
                "Leave out exactly one of --noise-multiplier, --steps and the rank in "
                "--projected: it is what is searched."
            )
        found = calibrate_rank(
            lambda rank: self.event(noise_multiplier, rank),
            epsilon=epsilon,
            delta=delta,
            steps=steps,
            max_rank=min(in_features for in_features, _ in self.layers),
            accountant=prover,
        )
        return Answer(found, self._release(noise_multiplier, int(found.value)), steps)

    def _release(self, noise_multiplier: float, rank: int | None = None) -> Release:
        """One release; ``rank`` replaces that of every layer."""
        return Release(noise_multiplier, self.sample_rate, self._shapes(rank))

    def _shapes(self, rank: int | None) -> tuple[tuple[int, int], ...]:
        return tuple((m, r if rank is None else rank) for m, r in self.layers)


def sample_rate_of(
    sample_rate: float | None, batch_size: int | None, dataset_size: int | None
) -> float:
    """The sampling rate, given as such or by expected batch size and number of records.

    Raises:
        ValueError: It is given twice or not at all, or a batch exceeds the data set.
    """
    if sample_rate is not None and batch_size is None and dataset_size is None:
        return sample_rate
    if sample_rate is None and batch_size is not None and dataset_size is not None:
        batch_size = _validate.integer("batch_size", batch_size, 1)
        dataset_size = _validate.integer("dataset_size", dataset_size, 1)
        if batch_size > dataset_size:
            raise ValueError(
                f"batch_size must be at most dataset_size = {dataset_size}, got {batch_size}."
            )
        return batch_size / dataset_size
    raise ValueError(
        "Give --sample-rate, or --batch-size and --dataset-size: the expected batch size and "
        "the number of records."
    )


def layers_of(texts: Sequence[str], *, with_rank: bool) -> tuple[tuple[int, int], ...]:
    """Layers from ``in_features:rank``, or from ``in_features`` alone where the rank is searched.

    >>> layers_of(["768:8", "3072:8"], with_rank=True)
    ((768, 8), (3072, 8))
    """
    layers: list[tuple[int, int]] = []
    for text in texts:
        parts = text.split(":")
        if len(parts) != 1 + with_rank or not all(part.isdecimal() for part in parts):
            wanted = "in_features:rank, such as 768:8" if with_rank else "in_features, such as 768"
            raise ValueError(f"--projected must be {wanted}, got {text!r}.")
        layers.append((int(parts[0]), int(parts[-1])))
    return tuple(layers)


def _record(bound: PrivacyBound) -> dict[str, Any]:
    """The bound as JSON, with its citations written out."""
    return {**bound.to_dict(), "citations": [cite(key) for key in bound.references]}


def _bound_text(
    bound: PrivacyBound,
    release: Release,
    steps: int,
    more: Sequence[tuple[str, str]],
    references: Sequence[str],
) -> str:
    rows = (
        ("ε, at most", "none" if bound.reason else f"{at_most(bound.epsilon)} nats"),
        ("δ, at most", repr(bound.delta) if bound.delta < 1 else "1"),
        ("neighbours", f"{bound.adjacency} of {bound.unit}"),
        ("releases", f"{steps:,} × {release}"),
        ("method", bound.method),
        *more,
    )
    lines = [Table(("quantity", "value"), rows).markdown(), ""]
    if bound.reason:
        lines += [f"No guarantee: {bound.reason}", ""]
    return "\n".join(
        [
            *lines,
            f"Assumes: {'; '.join(bound.assumptions)}.",
            f"Sources: {cite(*references)}.",
            f"Not covered: {' '.join(bound.caveats)}",
        ]
    )
