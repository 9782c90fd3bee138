"""What an optimizer must state at a step before it is charged as a fresh random projection.

``ProjectedGaussian`` is far cheaper than the plain Gaussian, and only the optimizer knows whether
a step was one. So the ledger takes a step on a statement about that step alone, compares it with
all earlier ones, and refuses whatever it cannot tell from a frozen A. It does not see the
matrices: the statement must come from the code that drew and used them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

from lora_privacy import _validate
from lora_privacy.dp.events import SampledGaussian
from lora_privacy.errors import AttestationError

__all__ = ["AttestedLedger", "ProjectionAttestation"]

HAAR_LAWS = ("gaussian", "orthonormal")
_LEAST_DIGITS = 32  # hexadecimal: 128 bits, so that two draws never share a digest by accident
_FACTS = {
    "clipped_whole": "the clip must bound the norm of the whole gradient, before A is looked at",
    "noised_whole": "the noise must be added to the whole gradient, before the projection",
    "factors_reset": "B must be folded into the weights and reset to 0 before A is drawn anew",
    "all_projected": "every trained parameter must be projected: the others are not amplified",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionAttestation:
    """Statement of an optimizer about the projection of one step.

    An optimizer that makes it has a method ``attest_projection()`` without arguments, which is
    called once a step, after the noise and before the weights move. Each field is one condition of
    the proof for ``ProjectedGaussian``; none has a default.

    Attributes:
        step: Steps that were charged before this one; the first is 0.
        law: Law of the entries of A. Only ``"gaussian"`` and ``"orthonormal"`` have a row space
            that is uniform (Haar), which the proof needs.
        layers: ``(in_features, rank)`` of the A of every trained layer, in any order.
        seed_digest: Hexadecimal digest of the seed that the A's of this step were drawn from. The
            seed is drawn after the data set is fixed, tells nothing about the seeds of the noise
            and of the sampling, and serves no other step and no other run.
        matrix_digest: Hexadecimal digest of the entries of the A's themselves.
        clipped_whole: Each record's gradient was clipped by the norm of all of it, not of its
            projection, and no transform before the clip looked at A.
        noised_whole: The noise was added to the whole gradient, so what leaves is M(V + E).
        factors_reset: The forward pass used W alone: no B of an earlier A was carried through it.
        all_projected: No parameter was trained without a projection.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A digest is no hexadecimal text of at least 128 bits, or a number is out of
            range.
    """

    step: int
    law: str
    layers: tuple[tuple[int, int], ...]
    seed_digest: str
    matrix_digest: str
    clipped_whole: bool
    noised_whole: bool
    factors_reset: bool
    all_projected: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", _validate.integer("step", self.step, 0))
        object.__setattr__(self, "layers", checked_layers(self.layers))
        for name in ("seed_digest", "matrix_digest"):
            _check_digest(name, getattr(self, name))
        for name in _FACTS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}.")


class AttestedLedger:
    """Steps that were shown to be fresh projections of ``layers``, and nothing else.

    Args:
        layers: ``(in_features, rank)`` of every trained layer.
    """

    def __init__(self, layers: Sequence[tuple[int, int]]) -> None:
        self.layers: tuple[tuple[int, int], ...] = checked_layers(layers)
        self._history: list[tuple[float, float, int]] = []
        # Dictionaries, because they keep the order of the steps and are searched at once.
        self._seeds: dict[str, None] = {}
        self._matrices: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._seeds)

    @property
    def history(self) -> tuple[tuple[float, float, int], ...]:
        """``(noise multiplier, sampling rate, steps)`` in order, equal neighbours joined."""
        return tuple(self._history)

    def charge(self, attestation: object, *, noise_multiplier: float, sample_rate: float) -> None:
        """Enter one step, or raise and enter nothing.

        Raises:
            AttestationError: The attestation is of another type, fails a condition of the proof,
                is out of turn, or repeats a seed or a matrix.
            ValueError: A number is out of range or NaN.
        """
        event = SampledGaussian(noise_multiplier, sample_rate)
        # The exact type: a subclass may answer differently each time it is asked.
        if type(attestation) is not ProjectionAttestation:
            raise AttestationError(
                "attest_projection() must return a ProjectionAttestation, got "
                f"{type(attestation).__name__}."
            )
        self._check(attestation)
        self._seeds[attestation.seed_digest] = None
        self._matrices[attestation.matrix_digest] = None
        append_step(self._history, event)

    def _check(self, attestation: ProjectionAttestation) -> None:
        if attestation.law not in HAAR_LAWS:
            raise AttestationError(
                f"A has law {attestation.law!r}, whose row space is not uniform: the proof holds "
                f"for {' and '.join(HAAR_LAWS)} only. Account the run as SampledGaussian."
            )
        if sorted(attestation.layers) != sorted(self.layers):
            raise AttestationError(
                f"The optimizer projects layers (in_features, rank) {list(attestation.layers)}, "
                f"the accountant was registered for {list(self.layers)}."
            )
        for name, condition in _FACTS.items():
            if not getattr(attestation, name):
                raise AttestationError(
                    f"The optimizer attests {name}=False: {condition}. Account the run as "
                    "SampledGaussian."
                )
        if attestation.step != len(self):
            raise AttestationError(
                f"The attestation is for step {attestation.step}, the next one to charge is "
                f"{len(self)}: every step needs an attestation of its own."
            )
        if attestation.matrix_digest in self._matrices:
            raise AttestationError(
                "A is one that an earlier step has used. A frozen A, or one that is refreshed "
                "every several steps, is the plain SampledGaussian for all steps."
            )
        if attestation.seed_digest in self._seeds:
            raise AttestationError(
                "The seed of A was used at an earlier step. Draw a new one for every step."
            )

    def state(self) -> dict[str, Any]:
        """The ledger in plain Python types; keep it where only the run can write."""
        return {
            "history": list(self._history),
            "layers": list(self.layers),
            "seed_digests": list(self._seeds),
            "matrix_digests": list(self._matrices),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], layers: Sequence[tuple[int, int]]) -> Self:
        """The ledger that ``state()`` gave; ValueError unless it is whole and of ``layers``.

        The state is trusted: one that was edited and is still whole is not detected.
        """
        ledger = cls(layers)
        found = checked_layers(state["layers"])
        if sorted(found) != sorted(ledger.layers):
            raise ValueError(
                f"The state is of layers {list(found)}, this accountant of {list(ledger.layers)}."
            )
        ledger._history = checked_history(state["history"])
        for name, into in (("seed_digests", ledger._seeds), ("matrix_digests", ledger._matrices)):
            for digest in state[name]:
                _check_digest(name, digest)
                into[digest] = None
            if not len(state[name]) == len(into) == sum(n for _, _, n in ledger._history):
                raise ValueError(
                    f"{name} must hold one digest for each step of the history, all different; "
                    "the state is damaged."
                )
        return ledger


def checked_layers(layers: object) -> tuple[tuple[int, int], ...]:
    """``layers`` as a tuple of ``(in_features, rank)``; ValueError or TypeError otherwise."""
    rows = _rows("layers", layers, "(in_features, rank)", 2)
    if not rows:
        raise ValueError("layers must name at least one (in_features, rank), got none.")
    return tuple(
        (_validate.integer("in_features", m, 1), _validate.integer("rank", r, 1)) for m, r in rows
    )


def append_step(history: list[tuple[float, float, int]], event: SampledGaussian) -> None:
    """Add one step to ``history``, to the count of an equal one if that was the last."""
    z, p, count = event.noise_multiplier, event.sample_rate, 1
    if history and tuple(history[-1][:2]) == (z, p):
        count += history.pop()[2]
    history.append((z, p, count))


def checked_history(history: object) -> list[tuple[float, float, int]]:
    """``history`` as ``[(noise multiplier, sampling rate, steps), …]``; an error otherwise."""
    entries: list[tuple[float, float, int]] = []
    for noise_multiplier, sample_rate, steps in _rows("history", history, "(σ, q, steps)", 3):
        event = SampledGaussian(noise_multiplier, sample_rate)
        count = _validate.integer("steps", steps, 1)
        entries.append((event.noise_multiplier, event.sample_rate, count))
    return entries


def _rows(name: str, value: object, row: str, width: int) -> list[Sequence[Any]]:
    """``value`` as a list of sequences of ``width`` items; ValueError otherwise."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} must be a list of {row}, got {value!r}.")
    rows = cast("Sequence[object]", value)
    result: list[Sequence[Any]] = []
    for item in rows:
        found = cast("Sequence[Any]", item)
        if not isinstance(item, Sequence) or isinstance(item, str) or len(found) != width:
            raise ValueError(f"{name} must hold {row}, got {item!r}.")
        result.append(found)
    return result


def _check_digest(name: str, digest: object) -> None:
    if not isinstance(digest, str):
        raise TypeError(f"{name} must be hexadecimal text, got {digest!r}.")
    if len(digest) < _LEAST_DIGITS or set(digest) - set("0123456789abcdef"):
        raise ValueError(
            f"{name} must be at least {_LEAST_DIGITS} lower-case hexadecimal digits (128 bits), "
            f"got {digest!r}."
        )
