"""Privacy profiles: what an accountant of loss distributions needs to know of one release."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["DIRECTIONS", "Direction", "Profile", "ProfiledEvent"]

Array = npt.NDArray[np.float64]

Direction = Literal["remove", "add"]
DIRECTIONS: tuple[Direction, Direction] = ("remove", "add")


class Profile(Protocol):
    """Upper bound δ(ε) of one release in one direction of the adjacency, vectorised.

    ``profile(epsilons)`` takes finite ε >= 0 in nats, shape (K,), ascending, and returns shape
    (K,) in [0, 1], without NaN. It must satisfy, with P the law of the output when the record
    takes part and Q the law when it does not,

    * ``"remove"``: δ(ε) >= sup over all neighbours of sup_E P(E) - e^ε Q(E);
    * ``"add"``: δ(ε) >= sup over all neighbours of sup_E Q(E) - e^ε P(E);

    at the very ε it is asked for, rounding included, after everything public (such as the drawn
    projection) is part of the output. It need not be decreasing, nor convex in e^ε: the accountant
    takes the greatest convex minorant in e^ε of both together, which is still an upper bound
    because the true supremum is convex. Values at any set of ε must belong to one mechanism: an
    upper bound at each ε separately is enough, and so the maximum over layers may be taken at each
    ε. Composition is adaptive: the bounds must hold whatever was released before.
    """

    def __call__(self, epsilons: Array, /) -> Array: ...


@runtime_checkable
class ProfiledEvent(Protocol):
    """An event that brings its own proof: hashable, equal when the mechanism is equal.

    ``PldAccountant`` composes it under ``"add-remove"`` with any other event.
    """

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What must be true of the run for the profiles to hold, one sentence each."""
        ...

    @property
    def references(self) -> tuple[str, ...]:
        """Keys into ``lora_privacy.references`` of the results behind the profiles."""
        ...

    def profile(self, direction: Direction) -> Profile:
        """The upper profile in one direction; see ``Profile``."""
        ...
