"""The ways of fine-tuning that an assessment compares, by name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

__all__ = ["ADDITIONS", "METHODS", "MethodName", "Recipe", "recipe_of"]

MethodName = Literal[
    "full", "lora", "lora-fa", "flora", "dp-sgd", "dp-lora", "dp-lora-fa", "dp-flora"
]
METHODS: tuple[MethodName, ...] = get_args(MethodName)
"""Names of methods without additions."""

ADDITIONS: tuple[str, ...] = ("scaling", "denoise")
"""What may follow the name of a private method, each after a ``+``, in this order."""

_WHY_NOT = {
    "scaling": "row scaling looks at A, which voids the amplification of a fresh projection",
    "denoise": "its noise went through A and is not independent from entry to entry",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One method, taken apart.

    Attributes:
        name: As asked for, such as ``"dp-lora+denoise"``.
        base: The same without additions, one of ``METHODS``.
        trains: ``"full"`` (the layers' own weights), ``"lora"``, ``"lora-fa"`` or ``"flora"``.
        private: Whether gradients are clipped and noise is added.
        scaling: Whether every row of a record's gradient is scaled to one norm before the clip.
        denoise: Whether singular values are restored after the noise.
    """

    name: str
    base: str
    trains: str
    private: bool
    scaling: bool
    denoise: bool


@lru_cache
def recipe_of(name: str) -> Recipe:
    """Take ``name`` apart.

    Raises:
        ValueError: There is no such method, or an addition is not sound for it.
    """
    base, *additions = name.split("+")
    if base not in METHODS:
        raise ValueError(f"methods must be of {', '.join(METHODS)}, got {name!r}.")
    if additions != [known for known in ADDITIONS if known in additions]:
        raise ValueError(
            f"{base!r} may be followed by +{' and +'.join(ADDITIONS)}, each once and in this "
            f"order, got {name!r}."
        )
    private = base.startswith("dp-")
    if additions and not private:
        raise ValueError(
            f"{name!r}: +{additions[0]} is for private methods; {base!r} adds no noise."
        )
    if additions and base == "dp-flora":
        raise ValueError(f"dp-flora takes no +{additions[0]}: {_WHY_NOT[additions[0]]}.")
    trains = "full" if base == "dp-sgd" else base.removeprefix("dp-")
    return Recipe(name, base, trains, private, "scaling" in additions, "denoise" in additions)
