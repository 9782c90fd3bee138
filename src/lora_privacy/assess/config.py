"""What to assess: one frozen value that is checked before any work starts."""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from lora_privacy import _validate
from lora_privacy.assess.methods import Recipe, recipe_of
from lora_privacy.errors import ConfigError
from lora_privacy.laws import LAW_NAMES, LawName

__all__ = ["DEFAULT_METHODS", "AssessConfig", "Task", "json_hash", "read_settings", "toml_text"]

Task = Literal["classification", "causal-lm"]
_FEWEST_REFERENCES = 4
_ALL_WHEN_ZERO = ("train_size", "dev_size", "audit_records")  # TOML has no None
DEFAULT_METHODS = ("lora", "flora", "dp-lora", "dp-flora")


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessConfig:
    """Settings of one assessment; every field has a default, and all are saved with the result.

    Attributes:
        model: ``"minilm"`` or ``"smollm2"`` (packaged models), a local folder, or a hub id.
        gguf_file: File name inside ``model`` when its weights are GGUF.
        task: ``"classification"`` (mean-pooled linear head) or ``"causal-lm"``.
        train: ``"tickets"`` (the embedded synthetic set), a local file, or a hub id.
        dev: Source of the held-out set; for ``"tickets"`` it is drawn apart from the seed.
        text_columns: Names, or positions from 0 in a file without header, of the text columns.
        label_column: Name or position of the label column.
        header: Whether the first line names the columns; None looks for the named columns in it.
        delimiter: Column separator; None takes it from the file's ending.
        train_size: Examples to train on, at most; None takes all.
        dev_size: Held-out examples, at most; None takes all.
        methods: What to compare: names of ``lora_privacy.assess.methods.METHODS``, a private one
            perhaps with ``+scaling`` or ``+denoise``. ``"full"`` and ``"dp-sgd"`` train the
            targets' own weights.
        rank: Rank r of every adapter.
        alpha: LoRA's alpha; None takes ``rank``, so that alpha/rank = 1.
        law: Law of the entries of A; dp-flora, whose row space must be uniform, takes
            orthonormal rows unless this is ``"gaussian"``.
        targets: Names of the modules to adapt; None takes queries and values.
        last_layers: Adapt only the last so many blocks, over a cached frozen prefix; None: all.
        epochs: Passes over the training set.
        batch_size: Examples a step.
        learning_rate: Of AdamW on the adapters and the head.
        dense_learning_rate: Of AdamW on the dense weights that FLoRA moves.
        max_length: Tokens an example is cut to.
        seed: Of data order, head, dropout and A; written into the report, so never a secret.
        probe_every: Measure the projection on every so many-th step.
        noise_draws: Fresh draws of A in the check of the law, a layer.
        dynamics_steps: Plain SGD steps in the check of the linearised dynamics; 0 leaves it out.
        dynamics_learning_rate: Its learning rate.
        delta: δ at which the implied ε is read.
        distortion: Johnson–Lindenstrauss distortion τ of the implied reading; None takes the
            smallest τ that holds for all gradient rows of a run with probability 0.95.
        epsilon: Target ε of the private methods, in nats; for the others the noise that it
            would take is computed.
        max_grad_norm: Clipping norm C of a record's whole gradient.
        private_epochs: Passes of a private method, each of round(1/q) steps; None takes
            ``epochs``.
        private_batch_size: Expected records a private step; q is this over the training set.
        private_learning_rate: Of AdamW on the factors and the head of dp-lora and dp-lora-fa.
        private_dense_learning_rate: Of SGD with momentum 0.9, for dp-sgd and dp-flora.
        references: Reference models a method for the membership attacks, at least 4; 0 leaves
            the attacks out.
        audit_records: Training examples that these attacks are about, at most; None takes all.
            Target and references train on random halves of them.
        secrets: Made-up secrets, each put into the training set or left out by a fair coin,
            whose exposure is measured; 0 leaves them out, as pairs of texts need.
        alternatives: Other secrets that each is ranked among.
        update_games: Games of the attack on one update; 0 leaves it out.
    """

    model: str = "minilm"
    gguf_file: str | None = None
    task: Task = "classification"
    train: str = "tickets"
    dev: str | None = None
    text_columns: tuple[str | int, ...] | None = None
    label_column: str | int | None = None
    header: bool | None = None
    delimiter: str | None = None
    train_size: int | None = 2_000
    dev_size: int | None = 1_000
    methods: tuple[str, ...] = DEFAULT_METHODS
    rank: int = 8
    alpha: float | None = None
    law: LawName = "gaussian"
    targets: tuple[str, ...] | None = None
    last_layers: int | None = None
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    dense_learning_rate: float = 1e-4
    max_length: int = 64
    seed: int = 0
    probe_every: int = 10
    noise_draws: int = 2_000
    dynamics_steps: int = 20
    dynamics_learning_rate: float = 0.05
    delta: float = 1e-5
    distortion: float | None = None
    epsilon: float = 8.0
    max_grad_norm: float = 1.0
    private_epochs: int | None = None
    private_batch_size: int = 256
    private_learning_rate: float = 1e-2
    private_dense_learning_rate: float = 0.2
    references: int = 4
    audit_records: int | None = 1_000
    secrets: int = 8
    alternatives: int = 100
    update_games: int = 300

    def __post_init__(self) -> None:
        _validate.choice("task", self.task, get_args(Task))
        _validate.choice("law", self.law, LAW_NAMES)
        if not self.methods:
            raise ValueError(
                f"methods must name at least one, such as {', '.join(DEFAULT_METHODS)}."
            )
        for method in self.methods:
            recipe_of(method)  # refuses what it does not know
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods names one twice: {', '.join(self.methods)}.")
        for name in ("rank", "epochs", "batch_size", "probe_every", "private_batch_size"):
            _validate.integer(name, getattr(self, name), 1)
        for name in ("train_size", "dev_size", "last_layers", "private_epochs"):
            if getattr(self, name) is not None:
                _validate.integer(name, getattr(self, name), 1)
        for name in ("seed", "dynamics_steps", "references", "secrets", "update_games"):
            _validate.integer(name, getattr(self, name), 0)
        if self.seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, as torch takes it, got {self.seed}.")
        _validate.integer("max_length", self.max_length, 2)
        _validate.integer("noise_draws", self.noise_draws, 2, "One draw has no spread.")
        _validate.integer("alternatives", self.alternatives, 1)
        if 0 < self.references < _FEWEST_REFERENCES:
            raise ValueError(
                f"references must be 0, which leaves membership attacks out, or at least "
                f"{_FEWEST_REFERENCES}, got {self.references}: with fewer, most records have no "
                "reference on one of the two sides."
            )
        if self.audit_records is not None:
            _validate.integer("audit_records", self.audit_records, 4, "Halves hold members.")
        for name in (
            "learning_rate",
            "dense_learning_rate",
            "dynamics_learning_rate",
            "private_learning_rate",
            "private_dense_learning_rate",
            "epsilon",
            "max_grad_norm",
        ):
            _validate.positive(name, getattr(self, name))
        if self.alpha is not None:
            _validate.positive("alpha", self.alpha)
        _validate.inside("delta", self.delta, 0, 1)
        if self.distortion is not None:
            _validate.inside("distortion", self.distortion, 0, 1)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The methods, taken apart."""
        return tuple(recipe_of(name) for name in self.methods)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> AssessConfig:
        """Build from plain values; what is left out takes its default.

        A 0 for ``train_size``, ``dev_size`` or ``audit_records`` takes all.

        Raises:
            ConfigError: A name is unknown, or a value is of the wrong kind.
            ValueError: A value is out of range.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        for name, value in settings.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"there is no setting {name!r}.{hint}")
            _check_kind(name, value, known[name])
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
        for name in _ALL_WHEN_ZERO:
            if values.get(name) == 0:
                values[name] = None
        return cls(**values)

    def to_toml(self) -> str:
        """All settings, as a file that ``read_settings`` reads back; None is left out, or 0."""
        settings = self.to_dict()
        for name in _ALL_WHEN_ZERO:
            settings[name] = settings[name] or 0
        return toml_text(settings)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON (tuples become lists)."""
        return json.loads(json.dumps(asdict(self)))

    def fingerprint(self) -> str:
        """Hash of all settings but ``methods``: runs that share it may share a folder."""
        settings = {name: value for name, value in self.to_dict().items() if name != "methods"}
        return json_hash(settings)


def json_hash(value: object) -> str:
    """64 bits of the SHA-256 of plain values, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def read_settings(path: str | Path) -> dict[str, Any]:
    """Settings of a TOML file, for ``AssessConfig.from_dict``.

    Raises:
        ConfigError: The file is missing, is no TOML, or holds tables.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}.") from error
    for name, value in found.items():
        if isinstance(value, dict):
            raise ConfigError(
                f"{path}: [{name}] is a table; write settings one a line, such as rank = 8."
            )
    return found


def toml_text(settings: dict[str, Any]) -> str:
    """Plain values as TOML, one a line, without those that are None.

    >>> print(toml_text({"rank": 8, "dev": None, "methods": ["lora"]}), end="")
    rank = 8
    methods = ["lora"]
    """
    # JSON's strings, numbers, booleans and lists are TOML too, but for one character.
    lines = (
        f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
        for name, value in settings.items()
        if value is not None
    )
    return "".join(f"{line}\n" for line in lines)


def _check_kind(name: str, value: object, kind: str) -> None:
    """Raise ConfigError where a file holds, say, text for a number; ranges are checked later."""
    if value is None and "None" in kind:
        return
    allowed: tuple[type, ...] = (str,)
    if kind.startswith("tuple"):
        allowed = (list, tuple)
    elif "bool" in kind:
        allowed = (bool,)
    elif "float" in kind:
        allowed = (int, float)
    elif "int" in kind:
        allowed = (int, str) if "str" in kind else (int,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        shown = "a list" if list in allowed else " or ".join(t.__name__ for t in allowed)
        raise ConfigError(f"{name} must be {shown}, got {value!r}.")
    if isinstance(value, list | tuple):
        for item in value:
            if not isinstance(item, str | int) or isinstance(item, bool):
                raise ConfigError(f"{name} must be a list of names, got {item!r} in it.")
