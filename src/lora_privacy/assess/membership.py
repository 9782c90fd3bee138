"""Membership attacks on one method: a target model beside references, trained likewise."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from lora_privacy.assess.adapter_fit import AdapterFit, examples_of
from lora_privacy.assess.auditing import AuditConfig, LeakageReport, audit
from lora_privacy.assess.game import Game
from lora_privacy.assess.shadows import Shadows, complete_shadows
from lora_privacy.audit import roc_curve
from lora_privacy.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_privacy.assess.config import AssessConfig
    from lora_privacy.assess.noise_plan import NoisePlan
    from lora_privacy.assess.setup import Data
    from lora_privacy.data import TextDataset

__all__ = ["THREAT_MODEL", "Membership", "attack_membership", "audited_data"]

THREAT_MODEL = (
    "black box: the log-probability of a record's true label (or of its text, the mean over "
    "tokens) under the target, under {references} reference models that the attacker trained "
    "likewise on random halves, and of other records"
)
_CURVE_POINTS = 200
_POPULATION = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What membership attacks got from one target model.

    The target is trained like the assessed model on a random half of ``records``, with the same
    noise, sampling rate and steps if it is private. With fewer records than the assessed model's
    a model without noise learns each of them better by heart.

    Attributes:
        records: Records that a fair coin each put into the target's training set or left out.
        members: How many were in.
        references: Reference models.
        report: Rates of every attack, and the lower bound on ε.
        curves: Attack -> (false positive rates, true positive rates), at most 200 points.
        log_prob_in: Mean ln p of the members under the target. log_prob_out: Of the others.
    """

    records: int
    members: int
    references: int
    report: LeakageReport
    curves: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    log_prob_in: float
    log_prob_out: float

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "report"}
        return {**own, **self.report.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What ``to_dict`` gave."""
        curves = {name: (tuple(a), tuple(b)) for name, (a, b) in data["curves"].items()}
        own = {f.name: data[f.name] for f in fields(cls) if f.name not in ("report", "curves")}
        return cls(report=LeakageReport.from_dict(data), curves=curves, **own)


def attack_membership(
    config: AssessConfig,
    data: Data,
    folder: Path,
    *,
    plan: NoisePlan | None,
    n_jobs: int | None = None,
) -> Membership:
    """Train a target and ``config.references`` references, and attack the target.

    Args:
        config: One method and its settings.
        data: Records are taken from its training set without secrets; the held-out set is the
            population.
        folder: Of the shadow models; what is finished there is not trained again.
        plan: Noise of a private method.
        n_jobs: Processes, as ``joblib.Parallel`` takes it.
    """
    train, population = audited_data(config, data)
    fit = AdapterFit(config, train, population, plan)
    shadows = complete_shadows(
        fit, folder, count=config.references + 1, seed=config.seed, n_jobs=n_jobs
    )
    return _read(shadows, config)


def audited_data(config: AssessConfig, data: Data) -> tuple[TextDataset, TextDataset]:
    """The records that the attacks are about, and a population outside of them.

    Raises:
        DataError: All held-out examples are records too.
    """
    train, dev = data.train, data.dev
    if config.audit_records is not None and config.audit_records < len(train):
        train = train.take(config.audit_records, seed=config.seed)
    # A held-out text that is a record too would be a member of the population's own.
    seen = set(examples_of(train))
    outside = [i for i, one in enumerate(examples_of(dev)) if one not in seen][:_POPULATION]
    if not outside:
        raise DataError(
            "every held-out example is a training record too, so that membership attacks have no "
            "population; name other held-out data, or leave the attacks out with references = 0."
        )
    return train, dev.select(outside)


def _read(shadows: Shadows, config: AssessConfig) -> Membership:
    game = Game(
        target_log_probs=shadows.reference_log_probs[0],
        target_members=shadows.reference_members[0],
        population_log_probs=shadows.population_reference_log_probs[0],
        reference_log_probs=shadows.reference_log_probs[1:],
        reference_members=shadows.reference_members[1:],
        population_reference_log_probs=shadows.population_reference_log_probs[1:],
    )
    threat = THREAT_MODEL.format(references=len(shadows.seeds) - 1)
    report = audit(game, AuditConfig(delta=config.delta, threat_model=threat))
    scores, members = game.attacks()
    inside = game.target_members
    return Membership(
        records=len(inside),
        members=int(inside.sum()),
        references=len(shadows.seeds) - 1,
        report=report,
        curves={name: _curve(values, members) for name, values in scores.items()},
        log_prob_in=float(game.target_log_probs[inside].mean()),
        log_prob_out=float(game.target_log_probs[~inside].mean()),
    )


def _curve(scores: np.ndarray, members: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    curve = roc_curve(scores, members)
    points = np.unique(np.linspace(0, len(curve.fpr) - 1, _CURVE_POINTS).round().astype(int))
    return tuple(curve.fpr[points].tolist()), tuple(curve.tpr[points].tolist())
