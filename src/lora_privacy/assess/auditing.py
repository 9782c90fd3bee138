"""What the command ``audit`` reads, asks and prints: evidence of leakage from saved scores."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from lora_privacy import _validate
from lora_privacy._digits import round_down, round_up
from lora_privacy.assess.files import array_names, read_arrays
from lora_privacy.assess.game import PAPERS, Game, Scores
from lora_privacy.assess.tables import Table
from lora_privacy.audit import (
    LeakageEstimate,
    RateEstimate,
    auc,
    epsilon_clopper_pearson,
    epsilon_one_run_scores,
    strongest,
    tpr_at_fpr,
)
from lora_privacy.audit.bounds import SELECTIONS, Selection
from lora_privacy.audit.result import (
    ADJACENCIES,
    CAVEAT,
    NOT_STATED,
    Adjacency,
    confidence,
)
from lora_privacy.errors import DataError
from lora_privacy.references import cite

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["AuditConfig", "Game", "LeakageReport", "Scores", "audit", "read"]

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]

_SCORES = ("scores", "members")
_TARGET = ("target_log_probs", "target_members", "population_log_probs")
_REFERENCES = (
    "reference_log_probs",
    "reference_members",
    "population_reference_log_probs",
)
_EXPECTED = (
    f"Expected a .csv with the columns score,member, or an .npz with {' and '.join(_SCORES)}, or "
    f"with {', '.join(_REFERENCES)} of train_shadows, and {', '.join(_TARGET)} of the target."
)
_SHARED = (
    "the records count as independent, though they share one training run: over runs a rate "
    "varies more than its interval says"
)
_TRUTH = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """What to claim, and at which confidence; all of it is fixed before looking at the scores.

    Attributes:
        delta: δ of the lower bound on ε, in [0, 1).
        significance: Probability that ε is claimed too large, in (0, 1); likewise that an
            interval of AUC, or one of TPR, misses.
        fpr: False positive rate of the TPR, in (0, 1).
        one_run: Scores share one training run, in which a coin of its own put each record.
        guesses: Numbers of guesses of a one-run audit, of which the best counts; empty for half
            of the records. Half of the guesses are "in", half "out".
        selection: How a threshold is chosen where runs are independent. ``"split"`` draws its
            halves anew each time: calling until one pleases is a choice that nothing pays for.
        adjacency: Whether a record that is out is absent or replaced.
        threat_model: What the attacker sees and chooses; None for what is known from the file.
    """

    delta: float
    significance: float = 0.05
    fpr: float = 0.01
    one_run: bool = False
    guesses: tuple[int, ...] = ()
    selection: Selection = "bonferroni"
    adjacency: Adjacency = "add-remove"
    threat_model: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.delta < 1:
            raise ValueError(f"delta must lie in [0, 1), got {self.delta!r}.")
        _validate.inside("significance", self.significance, 0, 1)
        _validate.inside("fpr", self.fpr, 0, 1)
        _validate.choice("selection", self.selection, SELECTIONS)
        _validate.choice("adjacency", self.adjacency, ADJACENCIES)
        for number in self.guesses:
            _validate.integer("guesses", number, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeakageReport:
    """The answer of ``audit``.

    Attributes:
        rates: Attack -> its AUC, and its TPR or why there is none. The intervals of all attacks
            hold together: each pays its share of the significance.
        epsilon: Lower bound on ε of the strongest attack, paid for by all; or why there is none.
        significance: Of each kind of statement.
        fpr: False positive rate of the TPR.
        left_out: Records that the references cannot calibrate.
    """

    rates: dict[str, tuple[RateEstimate, RateEstimate | str]]
    epsilon: LeakageEstimate | str
    significance: float
    fpr: float
    left_out: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields; every number lies beside its assumptions and citations."""
        return {
            "attacks": [
                {
                    "attack": name,
                    "auc": _record(area, name),
                    "tpr": _record(tpr, name),
                }
                for name, (area, tpr) in self.rates.items()
            ],
            "epsilon": _record(self.epsilon),
            "significance": self.significance,
            "fpr": self.fpr,
            "records_left_out": self.left_out,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What ``to_dict`` gave, checked again."""
        return cls(
            rates={
                row["attack"]: (
                    _restored(RateEstimate, row["auc"]),
                    _restored(RateEstimate, row["tpr"]),
                )
                for row in data["attacks"]
            },
            epsilon=_restored(LeakageEstimate, data["epsilon"]),
            significance=data["significance"],
            fpr=data["fpr"],
            left_out=data["records_left_out"],
        )

    def text(self) -> str:
        """A Markdown table of the rates, then ε with what it rests on."""
        rows = tuple(
            (name, _interval(area), _interval(tpr)) for name, (area, tpr) in self.rates.items()
        )
        area, tpr = next(iter(self.rates.values()))
        shown = [area] if isinstance(tpr, str) else [area, tpr]
        papers = dict.fromkeys(PAPERS[name] for name in self.rates if name in PAPERS)
        keys = dict.fromkeys([*papers, *(key for rate in shown for key in rate.references)])
        lines = [
            Table(("attack", "AUC", f"TPR at FPR {self.fpr:g}"), rows).markdown(),
            "",
            f"Rates: the intervals of a column hold together at confidence "
            f"{confidence(self.significance)}, on {area.canaries} records. {CAVEAT}",
            *([f"No TPR: {tpr}"] if isinstance(tpr, str) else []),
            f"Threat model: {area.threat_model}.",
            f"Assumes: {'; '.join(area.assumptions)}.",
            f"Sources: {cite(*keys)}.",
        ]
        if self.left_out:
            lines.append(
                f"Left out: {self.left_out} records without a reference trained on them, or "
                "without one not trained on them."
            )
        none = isinstance(self.epsilon, str)
        lines += ["", f"No lower bound on ε: {self.epsilon}" if none else str(self.epsilon)]
        return "\n".join(lines)


def read(path: Path, target: int | None = None) -> Scores | Game:
    """Read a file of scores, or of what a target and reference models say of the records.

    Args:
        path: ``.csv`` or ``.npz``.
        target: Of a file that holds references only: number of the one that plays the target.

    Raises:
        DataError: The file is malformed; the message says what is expected.
        StorageError: The ``.npz`` is missing, damaged or holds Python objects.
        ValueError: ``target`` is no such reference, or the file has a target of its own.
    """
    if path.suffix == ".csv":
        found: Scores | Game = _read_csv(path)
    elif path.suffix == ".npz":
        names = array_names(path)
        if set(_SCORES) <= set(names):
            found = Scores(**read_arrays(path, _SCORES))
        elif set(_REFERENCES) <= set(names):
            return _read_game(path, names, target)
        else:
            raise DataError(f"{path} holds {', '.join(names) or 'nothing'}. {_EXPECTED}")
    else:
        raise DataError(f"{path} must end in .csv or .npz. {_EXPECTED}")
    if target is not None:
        raise ValueError("--target is for files of reference models; this one holds scores.")
    return found


def audit(data: Scores | Game, config: AuditConfig) -> LeakageReport:
    """Rates of every attack, and the strongest lower bound on ε, all of them paid for.

    Records of a game share the target's one training run, so its ε is that of a one-run audit.

    Raises:
        TypeError: Members are not boolean.
        ValueError: Arrays disagree or hold NaN, a class is empty, or an option does not fit.
    """
    if isinstance(data, Game):
        if config.adjacency != "add-remove":
            raise ValueError(
                "Coins put records in or leave them out: the adjacency of reference models is "
                f"add-remove, got {config.adjacency!r}."
            )
        scores, members = data.attacks()
        left_out = len(data.target_log_probs) - len(members)
        known = (
            "log-probabilities of records under the target, under "
            f"{len(data.reference_log_probs)} reference models that the attacker trained "
            "likewise, and of a population"
        )
        config = replace(config, one_run=True, threat_model=config.threat_model or known)
    else:
        scores, members, left_out = {"scores": data.scores}, data.members, 0
    if config.guesses and not config.one_run:
        raise ValueError("--guesses are those of a one-run audit; add --one-run.")
    threat_model = config.threat_model or NOT_STATED
    share = config.significance / len(scores)

    def stated(rate: RateEstimate) -> RateEstimate:
        if not config.one_run:
            return rate
        return replace(rate, assumptions=(*rate.assumptions, _SHARED))

    rates: dict[str, tuple[RateEstimate, RateEstimate | str]] = {}
    for name, values in scores.items():
        area = auc(values, members, significance=share, threat_model=threat_model)
        rates[name] = (
            stated(area),
            _or_reason(
                lambda values=values: stated(
                    tpr_at_fpr(
                        values,
                        members,
                        fpr=config.fpr,
                        significance=share,
                        threat_model=threat_model,
                    )
                )
            ),
        )
    guesses = config.guesses or (max(1, len(members) // 2),)
    for number in guesses:
        if config.one_run and number > len(members):
            raise ValueError(f"guesses must be at most {len(members)}, the records, got {number}.")
    bounds = {
        name: _bound(name, values, members, config, guesses, threat_model)
        for name, values in scores.items()
    }
    if len(bounds) == 1:
        epsilon = _or_reason(lambda: bounds["scores"](config.significance))
    else:
        epsilon = _or_reason(lambda: strongest(bounds, significance=config.significance))
    return LeakageReport(
        rates=rates,
        epsilon=epsilon,
        significance=config.significance,
        fpr=config.fpr,
        left_out=left_out,
    )


def _bound(
    name: str,
    scores: Array,
    members: Mask,
    config: AuditConfig,
    guesses: tuple[int, ...],
    threat_model: str,
) -> Callable[[float], LeakageEstimate]:
    def at(significance: float) -> LeakageEstimate:
        if not config.one_run:
            return epsilon_clopper_pearson(
                scores,
                members,
                delta=config.delta,
                significance=significance,
                threat_model=threat_model,
                adjacency=config.adjacency,
                selection=config.selection,
            )
        found = epsilon_one_run_scores(
            scores,
            members,
            guesses=guesses,
            delta=config.delta,
            significance=significance,
            threat_model=threat_model,
            adjacency=config.adjacency,
        )
        papers = (PAPERS[name],) if name in PAPERS else ()
        return replace(found, references=(*found.references, *papers))

    return at


def _or_reason(compute: Callable[[], Any]) -> Any:  # noqa: ANN401 - what it computes, or a text
    """What is computed, or why there is too little to show anything; arguments are checked."""
    try:
        return compute()
    except ValueError as error:
        return str(error)


def _read_csv(path: Path) -> Scores:
    if not path.is_file():
        raise DataError(f"There is no file {path}. {_EXPECTED}")
    scores: list[float] = []
    members: list[bool] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"score", "member"} <= set(rows.fieldnames or ()):
                raise DataError(
                    f"{path} must begin with a line that names score and member, got "
                    f"{','.join(rows.fieldnames or ()) or 'nothing'!r}. {_EXPECTED}"
                )
            for row in rows:
                try:
                    scores.append(float(row["score"]))
                    members.append(_TRUTH[row["member"].strip().lower()])
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise DataError(
                        f"{path}, line {rows.line_num}: score must be a number and member one of "
                        f"{', '.join(_TRUTH)}, got {row['score']!r} and {row['member']!r}."
                    ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no table of text ({error}). {_EXPECTED}") from error
    return Scores(np.array(scores), np.array(members, dtype=np.bool_))


def _read_game(path: Path, names: tuple[str, ...], target: int | None) -> Game:
    given = [name for name in _TARGET if name in names]
    if given:
        if target is not None:
            raise ValueError(f"{path} holds a target of its own; leave --target out.")
        if len(given) < len(_TARGET):
            absent = [name for name in _TARGET if name not in names]
            raise DataError(f"{path} has {given[0]}, but not {', '.join(absent)}. {_EXPECTED}")
        return Game(**read_arrays(path, _TARGET + _REFERENCES))
    arrays = read_arrays(path, _REFERENCES)
    shapes = {name: np.shape(array) for name, array in arrays.items()}
    counts = {shape[0] for shape in shapes.values() if len(shape) == 2}
    if len(counts) != 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise DataError(f"{path} holds arrays of shapes {shapes}; a row a reference is expected.")
    count = counts.pop()
    if target is None:
        raise DataError(
            f"{path} holds {count} reference models and no target. Name the one that plays it, "
            f"say --target 0, or add {', '.join(_TARGET)} to the file."
        )
    if not 0 <= target < count:
        raise ValueError(f"--target must lie in 0 … {count - 1}, got {target}.")
    others = {name: np.delete(array, target, axis=0) for name, array in arrays.items()}
    played = zip(_TARGET, (arrays[name][target] for name in _REFERENCES), strict=True)
    return Game(**dict(played), **others)


def _interval(rate: RateEstimate | str) -> str:
    if isinstance(rate, str):
        return "none"
    return f"{rate.value:.4g} in [{round_down(rate.low)}, {round_up(rate.high)}]"


def _record(estimate: RateEstimate | LeakageEstimate | str, name: str = "") -> dict[str, Any]:
    """As JSON, with its citations written out; or the reason why there is none."""
    if isinstance(estimate, str):
        return {"reason": estimate}
    keys = [*estimate.references, *([PAPERS[name]] if name in PAPERS else [])]
    return {**estimate.to_dict(), "citations": [cite(key) for key in keys]}


def _restored(kind: Any, record: dict[str, Any]) -> Any:  # noqa: ANN401 - an estimate, or a text
    if "reason" in record:
        return record["reason"]
    return kind.from_dict({name: v for name, v in record.items() if name != "citations"})
