"""The noise that a privacy target asks for, and the steps that it pays for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy.dp import calibrate, calibrate_steps
from lora_privacy.errors import CalibrationError
from lora_privacy.training.privacy import NoiseMultiplier, PrivacyTarget

if TYPE_CHECKING:
    from lora_privacy.training.ledger import Ledger

__all__ = ["begun", "resumed"]


def begun(
    privacy: PrivacyTarget,
    ledger: Ledger,
    *,
    sample_rate: float,
    delta: float,
    steps_per_epoch: int,
) -> tuple[float, int | None]:
    """Noise multiplier, and steps in all, those in ``ledger`` included; None without a target.

    Raises:
        CalibrationError: The target cannot be met.
    """
    before = len(ledger)
    if isinstance(privacy, NoiseMultiplier):
        if privacy.epsilon is None:
            return privacy.noise_multiplier, None
        left = _affordable(privacy.epsilon, ledger, privacy.noise_multiplier, sample_rate, delta)
        return privacy.noise_multiplier, before + left
    steps = privacy.total_steps(steps_per_epoch)
    found = calibrate(
        lambda z: ledger.mechanism.event(z, sample_rate),
        epsilon=privacy.epsilon,
        delta=delta,
        steps=steps,
        accountant=ledger.accountant(),
    )
    return found.value, before + steps


def resumed(
    budget: int,
    charged: int,
    ledger: Ledger,
    *,
    epsilon: float,
    noise_multiplier: float,
    sample_rate: float,
    delta: float,
) -> int:
    """``budget``, less if ``ledger`` went on with other steps than this training would take.

    Args:
        budget: Steps in all, as they were counted when the training began.
        charged: Steps in the ledger when the checkpoint was written.
        ledger: As it is now.
        epsilon: The target.
        noise_multiplier: z of this training.
        sample_rate: q of this training.
        delta: δ of the target.
    """
    later = list(ledger)[charged:]
    if all((x.noise_multiplier, x.sample_rate) == (noise_multiplier, sample_rate) for x in later):
        return budget
    try:
        left = _affordable(epsilon, ledger, noise_multiplier, sample_rate, delta)
    except CalibrationError:
        left = 0
    return min(budget, len(ledger) + left)


def _affordable(
    epsilon: float, ledger: Ledger, noise_multiplier: float, sample_rate: float, delta: float
) -> int:
    """Steps that ``epsilon`` pays for beyond those in the ledger."""
    found = calibrate_steps(
        ledger.mechanism.event(noise_multiplier, sample_rate),
        epsilon=epsilon,
        delta=delta,
        accountant=ledger.accountant(),
    )
    return int(found.value)
