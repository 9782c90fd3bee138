"""What a training is asked to cost: a noise multiplier, or a target to find one for."""

from __future__ import annotations

from dataclasses import dataclass

from lora_privacy import _validate

__all__ = ["NoiseMultiplier", "PrivacyTarget", "TargetEpsilon"]


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
        if self.epsilon is not None:
            _validate.positive("epsilon", self.epsilon)


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
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "Give either steps or epochs: noise is found for a length of training."
            )
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None:
                _validate.integer(name, getattr(self, name), 1)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the training."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch


PrivacyTarget = NoiseMultiplier | TargetEpsilon
