"""What to assess: one frozen value that is checked before any work starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lora_privacy import _validate
from lora_privacy.laws import LAW_NAMES, LawName

__all__ = ["METHODS", "AssessConfig", "Method", "Task"]

Method = Literal["lora", "lora-fa", "flora"]
Task = Literal["classification", "causal-lm"]
METHODS: tuple[Method, ...] = get_args(Method)


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
        methods: Which of ``METHODS`` to run.
        rank: Rank r of every adapter.
        alpha: LoRA's alpha; None takes ``rank``, so that alpha/rank = 1.
        law: Law of the entries of A.
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
    methods: tuple[Method, ...] = METHODS
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

    def __post_init__(self) -> None:
        _validate.choice("task", self.task, get_args(Task))
        _validate.choice("law", self.law, LAW_NAMES)
        if not self.methods:
            raise ValueError(f"methods must name at least one of {', '.join(METHODS)}.")
        for method in self.methods:
            _validate.choice("methods", method, METHODS)
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods names one twice: {', '.join(self.methods)}.")
        for name in ("rank", "epochs", "batch_size", "probe_every"):
            _validate.integer(name, getattr(self, name), 1)
        for name in ("train_size", "dev_size", "last_layers"):
            if getattr(self, name) is not None:
                _validate.integer(name, getattr(self, name), 1)
        _validate.integer("max_length", self.max_length, 2)
        _validate.integer("noise_draws", self.noise_draws, 2, "One draw has no spread.")
        _validate.integer("seed", self.seed, 0)
        _validate.integer("dynamics_steps", self.dynamics_steps, 0)
        _validate.positive("learning_rate", self.learning_rate)
        _validate.positive("dense_learning_rate", self.dense_learning_rate)
        _validate.positive("dynamics_learning_rate", self.dynamics_learning_rate)
        if self.alpha is not None:
            _validate.positive("alpha", self.alpha)
        _validate.inside("delta", self.delta, 0, 1)
        if self.distortion is not None:
            _validate.inside("distortion", self.distortion, 0, 1)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON (tuples become lists)."""
        return json.loads(json.dumps(asdict(self)))

    def fingerprint(self) -> str:
        """Hash of all settings but ``methods``: runs that share it may share a folder."""
        settings = {name: value for name, value in self.to_dict().items() if name != "methods"}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
