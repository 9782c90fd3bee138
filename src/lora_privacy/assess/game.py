"""What membership attacks are given, and the scores that four of them give each record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lora_privacy.audit import attack_p, attack_r, lira, rmia

__all__ = ["PAPERS", "Game", "Scores"]

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

PAPERS = {
    "attack-P": "ye-attacks-2022",
    "attack-R": "ye-attacks-2022",
    "LiRA": "carlini-lira-2022",
    "RMIA": "zarifzadeh-rmia-2024",
}
"""Attack -> key of its paper."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Scores of one attack, (n,), higher means member, and who is one, bool (n,)."""

    scores: Array
    members: Mask


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Game:
    """A target model beside reference models, each trained on the records that its coins put in.

    Attributes:
        target_log_probs: ln p of each record under the target, (N,).
        target_members: Its coins, bool (N,).
        population_log_probs: ln p of records outside every training set, (Z,).
        reference_log_probs: As the target's, (R, N).
        reference_members: bool (R, N).
        population_reference_log_probs: (R, Z).
    """

    target_log_probs: Array
    target_members: Mask
    population_log_probs: Array
    reference_log_probs: Array
    reference_members: Mask
    population_reference_log_probs: Array

    def usable(self) -> Mask:
        """Records with a reference trained on them and one not, (N,).

        The target's coins have no part in this choice, so a lower bound on ε survives it.
        """
        members = np.asarray(self.reference_members)
        if members.dtype != np.bool_ or members.ndim != 2:
            raise ValueError(
                f"reference_members must be boolean of shape (references, records), got "
                f"{members.dtype} of shape {members.shape}."
            )
        found = np.asarray(members.any(axis=0) & ~members.all(axis=0))
        if not found.any():
            raise ValueError(
                "No record has both a reference that was trained on it and one that was not; "
                "train more references, each on a random half."
            )
        return found

    def attacks(self) -> tuple[dict[str, Array], Mask]:
        """Name -> scores of the usable records, and their coins."""
        log_probs = np.asarray(self.target_log_probs)
        truth, kept = np.asarray(self.target_members), self.usable()
        for name, array in (("target_log_probs", log_probs), ("target_members", truth)):
            if array.shape != kept.shape:
                raise ValueError(f"{name} must have shape {kept.shape}, got {array.shape}.")
        references = np.asarray(self.reference_log_probs)
        if references.shape != self.reference_members.shape:
            raise ValueError(
                f"reference_log_probs must have shape {self.reference_members.shape}, got "
                f"{references.shape}."
            )
        own, references = log_probs[kept], references[:, kept]
        members = self.reference_members[:, kept]
        return {
            "attack-P": attack_p(losses=-own, population_losses=-self.population_log_probs),
            "attack-R": attack_r(
                losses=-own, reference_losses=-references, reference_members=members
            ),
            "LiRA": lira(
                log_probs=own,
                reference_log_probs=references,
                reference_members=members,
                mode="online",
            ),
            "RMIA": rmia(
                log_probs=own,
                reference_log_probs=references,
                reference_members=members,
                population_log_probs=self.population_log_probs,
                population_reference_log_probs=self.population_reference_log_probs,
                mode="online",
            ),
        }, truth[kept]
