"""Exposure of planted secrets in a fine-tuned model: do those that were in stand out?

A black-box attack: the model's log-probability of each secret is ranked among those of sentences
that differ in the code alone. Secrets that the coin left out show what a rank is worth without
memorisation. Theory: ``docs/theory/exposure.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from lora_privacy import _validate
from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.training import evaluating, loss_of
from lora_privacy.audit import Exposure, exposure, exposure_p_value
from lora_privacy.data import TextDataset
from lora_privacy.errors import DataError, NonFiniteError
from lora_privacy.training.record_loss import IGNORED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from lora_privacy.assess.config import AssessConfig, Task
    from lora_privacy.data import Secret

__all__ = ["SecretScore", "SecretsResult", "score_secrets", "secret_log_probs", "threat_model"]

Array = npt.NDArray[np.float64]

_THREAT_MODELS: dict[Task, str] = {
    "causal-lm": (
        "black box: gets the trained model's log-probability of any sentence; knows the sentence "
        "but for its code, and ranks codes"
    ),
    "classification": (
        "black box: gets the trained model's log-probability of any class for any sentence; knows "
        "the class and the sentence but for its code, and ranks codes"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretScore:
    """One planted secret.

    Attributes:
        included: Whether the coin put it into the training set.
        log_prob: Of the secret, in nats: of its sentence, or of its label for a classifier.
        exposure: Its rank among sentences with other codes.
    """

    included: bool
    log_prob: float
    exposure: Exposure

    @property
    def bits(self) -> float:
        """Exposure, in bits."""
        return self.exposure.bits

    @property
    def most_bits(self) -> float:
        """Exposure of a secret that is ranked first."""
        return math.log2(self.exposure.alternatives + 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields."""
        return {
            "included": self.included,
            "log_prob": self.log_prob,
            "most_bits": self.most_bits,
            "exposure": self.exposure.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a saved score; its bits are computed anew from the rank."""
        saved = data["exposure"]
        rank, alternatives = saved["rank"], saved["alternatives"]
        _validate.between("rank", rank, 1, alternatives + 1)
        # Scores of the same rank: who lies above, and who below.
        others = np.where(np.arange(alternatives) < rank - 1, 1.0, -1.0)
        return cls(
            included=data["included"],
            log_prob=data["log_prob"],
            exposure=exposure(0.0, others, space=saved["space"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretsResult:
    """Exposure of all planted secrets.

    Attributes:
        task: Whose log-probabilities were ranked.
        threat_model: What the attacker sees and chooses.
        scores: One a secret, in the order they were drawn in.
    """

    task: Task
    threat_model: str
    scores: tuple[SecretScore, ...]

    @property
    def p_value_in(self) -> float | None:
        """Of all secrets that were in, if none was memorised; None where none was in."""
        return self._p_value(included=True)

    @property
    def p_value_out(self) -> float | None:
        """Of those left out, which cannot be memorised: a check; None where none was left out."""
        return self._p_value(included=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe fields."""
        return {
            "kind": "evidence, exposure of secrets",
            "task": self.task,
            "threat_model": self.threat_model,
            "scores": [score.to_dict() for score in self.scores],
            "p_value_in": self.p_value_in,
            "p_value_out": self.p_value_out,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a saved result; its p-values are computed anew."""
        return cls(
            task=data["task"],
            threat_model=data["threat_model"],
            scores=tuple(SecretScore.from_dict(score) for score in data["scores"]),
        )

    def _p_value(self, *, included: bool) -> float | None:
        bits = [score.bits for score in self.scores if score.included is included]
        return exposure_p_value(bits) if bits else None


def score_secrets(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    secrets: Sequence[Secret],
    config: AssessConfig,
    *,
    alternatives: int = 100,
) -> SecretsResult:
    """Rank each secret among sentences with other codes; the model's modes are put back.

    A language model gives the log-probability of the sentence, summed over its tokens; a
    classifier that of the class the secret was planted with, or would have been. Frozen blocks
    run: no cached prefix knows these sentences.

    Args:
        model: Fine-tuned on the secrets that were included.
        tokenizer: Its tokenizer.
        secrets: From ``plant_secrets``.
        config: Task, longest example and batch size of the training.
        alternatives: Sentences that each is ranked among; they cap the exposure.

    Raises:
        ValueError: There is no secret, or ``alternatives`` is out of range.
        DataError: A secret has no label, or is longer than the training's examples were.
        NonFiniteError: The model gives a log-probability that is NaN or infinite.
    """
    if not secrets:
        raise ValueError("secrets must name at least one; plant_secrets makes them.")
    alternatives = _validate.integer("alternatives", alternatives, 1)
    scores: list[SecretScore] = []
    for number, secret in enumerate(tqdm(secrets, desc="secrets", leave=False)):
        found = secret_log_probs(
            model, tokenizer, secret, config, alternatives=alternatives, seed=number
        )
        ranked = exposure(found[0], found[1:], space=secret.space)
        scores.append(
            SecretScore(included=secret.included, log_prob=float(found[0]), exposure=ranked)
        )
    return SecretsResult(
        task=config.task, threat_model=threat_model(config.task), scores=tuple(scores)
    )


def threat_model(task: Task) -> str:
    """What the attacker sees and chooses, in words."""
    return _THREAT_MODELS[task]


@torch.no_grad()
def secret_log_probs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    secret: Secret,
    config: AssessConfig,
    *,
    alternatives: int,
    seed: int,
) -> Array:
    """Log-probabilities in nats, (1 + alternatives,), that of the secret first.

    ``seed`` draws the alternatives; each secret needs its own, or they would not be independent.
    Otherwise as ``score_secrets``.
    """
    causal = config.task == "causal-lm"
    texts = (secret.text, *secret.alternatives(alternatives, seed=seed))
    end = tokenizer.eos_token if causal else ""
    longest = max(len(row) for row in tokenizer([f"{text}{end}" for text in texts])["input_ids"])
    if longest > config.max_length:
        raise DataError(
            f"a secret has up to {longest} tokens and max_length={config.max_length} cuts it, "
            f"perhaps the code itself: no code could be told from another. Set max_length to "
            f"{longest} at least."
        )
    labels, classes = None, ()
    if not causal:
        if secret.label is None:
            raise DataError(
                "a secret has no label to score; plant_secrets draws one in a labelled set."
            )
        labels = (secret.label,) * len(texts)
        classes = tuple(map(str, range(secret.label + 1)))
    named = TextDataset(
        name="secret", texts=texts, labels=labels, classes=classes, origin="plant_secrets"
    )
    data = TokenisedDataset(named, tokenizer, config.max_length, causal=causal)
    found: list[Array] = []
    with evaluating(model):
        for start in range(0, len(texts), config.batch_size):
            batch = data.batch(np.arange(start, min(start + config.batch_size, len(texts))))
            losses = loss_of(model, batch, config.task)[0].double()
            if causal:  # a mean over tokens, whose number may depend on the code
                losses = losses * (batch.labels[:, 1:] != IGNORED).sum(1)
            found.append(-losses.cpu().numpy())
    values = np.concatenate(found)
    if not np.isfinite(values).all():
        raise NonFiniteError("the model gives a secret a log-probability that is NaN or infinite.")
    return values
