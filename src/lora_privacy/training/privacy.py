"""What a training is asked to cost: a noise multiplier, or a target to find one for; and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from lora_privacy import _validate

# At run time too, since HfArgumentParser looks the names of types up here.
from lora_privacy.dp import Adjacency
from lora_privacy.training.clipping import ClippingName
from lora_privacy.training.methods import Method

__all__ = ["NoiseMultiplier", "PrivacyArguments", "PrivacyTarget", "TargetEpsilon"]


@dataclass(frozen=True, slots=True)
class NoiseMultiplier:
    """Train with this much noise, for as long as the loop runs or ``epsilon`` allows.

    Args:
        noise_multiplier: z = σ/C, the noise in units of the clipping norm, > 0.
        epsilon: ε in nats, > 0, at the δ of the training: the training ends before the step that
            would exceed it. None does not limit it.

    Raises:
        ValueError: It is out of range. Without noise nothing is private: train without
            ``make_private`` then.
    """

    noise_multiplier: float
    epsilon: float | None = None

    def __post_init__(self) -> None:
        _validate.positive("noise_multiplier", self.noise_multiplier)
        # In half precision of numpy z·C would be rounded, to 0 if C is small.
        object.__setattr__(self, "noise_multiplier", float(self.noise_multiplier))
        if self.epsilon is not None:
            _validate.positive("epsilon", self.epsilon)
            object.__setattr__(self, "epsilon", float(self.epsilon))


@dataclass(frozen=True, slots=True)
class TargetEpsilon:
    """Find the noise at which the steps of the training cost ``epsilon``, and take no more.

    Args:
        epsilon: Target ε in nats, > 0, at the δ of the training.
        steps: Steps of the training, or
        epochs: passes over the data, of ``round(1/q)`` steps each.

    Raises:
        ValueError: A number is out of range, or not exactly one of steps and epochs is given.
    """

    epsilon: float
    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        _validate.positive("epsilon", self.epsilon)
        object.__setattr__(self, "epsilon", float(self.epsilon))
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "Give either steps or epochs: noise is found for a length of training."
            )
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _validate.integer(name, getattr(self, name), 1))

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the training."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch


PrivacyTarget = NoiseMultiplier | TargetEpsilon


@dataclass(frozen=True, kw_only=True)
class PrivacyArguments:
    """What a private training may cost and how; ``HfArgumentParser`` reads it from flags.

    Of ``target_epsilon`` and ``noise_multiplier`` at least one is given. The first alone finds the
    noise for all steps of the training. The second alone runs for as long as the Trainer does.
    Both: that noise, and an early stop before the step that would exceed the target.

    Args:
        delta: δ, in (0, 1); well below one over the number of records.
        target_epsilon: ε in nats.
        noise_multiplier: z = σ/C.
        method: As for ``make_private``.
        max_grad_norm: Clipping norm C of a record's gradient; that of ``TrainingArguments`` is
            not used.
        adjacency: As for ``make_private``.
        clipping: ``"flat"`` or ``"automatic"``.
        secure: As for ``make_private``.
        deterministic: As for ``make_private``.
        ledger: File of the ledger; None for ``ledger.jsonl`` in the output folder. A run in the
            same folder goes on with the same ledger: what was spent there counts.
        isolation_check: Try ``preflight`` on four records before the first step.
        log_private_metrics: Log the training loss, which no ε covers, to wherever the Trainer
            reports. False logs ε in its place.

    Raises:
        ValueError: Neither a target nor a noise is given.
    """

    delta: float
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    method: Method = "dp-lora"
    max_grad_norm: float = 1.0
    adjacency: Adjacency = "add-remove"
    clipping: ClippingName = "flat"
    secure: bool = True
    deterministic: bool = False
    ledger: str | None = None
    isolation_check: bool = True
    log_private_metrics: bool = False

    def __post_init__(self) -> None:
        if self.target_epsilon is None and self.noise_multiplier is None:
            raise ValueError("Give target_epsilon, noise_multiplier, or both.")

    def target(self, steps: int) -> PrivacyTarget:
        """For ``make_private``, of a training of ``steps``."""
        if self.noise_multiplier is not None:
            return NoiseMultiplier(self.noise_multiplier, self.target_epsilon)
        return TargetEpsilon(cast("float", self.target_epsilon), steps=steps)
