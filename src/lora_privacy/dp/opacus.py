"""The bridge to Opacus. The only module of ``dp`` that imports torch and opacus."""

from __future__ import annotations

import math

from opacus.accountants import (  # pyright: ignore[reportMissingTypeStubs]
    RDPAccountant as OpacusRdpAccountant,
)

from lora_privacy.dp.events import SampledGaussian
from lora_privacy.dp.rdp import RdpAccountant
from lora_privacy.dp.result import ImpliedPrivacy
from lora_privacy.errors import UnsupportedEventError

__all__ = ["to_opacus"]


def to_opacus(source: ImpliedPrivacy | RdpAccountant) -> OpacusRdpAccountant:
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
    elif isinstance(source, RdpAccountant):  # pyright: ignore[reportUnnecessaryIsInstance]
        if source.adjacency != "add-remove":
            raise UnsupportedEventError(
                "Opacus accounts for adding or removing one record; the accountant has "
                f"adjacency={source.adjacency!r}."
            )
        if not source.events:
            raise UnsupportedEventError("The accountant is empty: compose an event first.")
        history = [
            (
                event.noise_multiplier,
                event.sample_rate if isinstance(event, SampledGaussian) else 1.0,
                count,
            )
            for event, count in source.events
        ]
    else:
        raise TypeError(
            f"source must be an ImpliedPrivacy or an RdpAccountant, got {type(source).__name__}."
        )
    accountant = OpacusRdpAccountant()
    accountant.history = history
    return accountant
