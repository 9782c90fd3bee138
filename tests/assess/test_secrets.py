"""Exposure in a model whose probabilities are written out, and what is refused."""

import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.secrets import SecretsResult, score_secrets, secret_log_probs
from lora_privacy.data import Secret, TextDataset, plant_secrets
from lora_privacy.errors import DataError, NonFiniteError

CLASSES = ("a", "b", "c")
CAUSAL = AssessConfig(task="causal-lm", max_length=160, batch_size=7)
LABELLED = AssessConfig(max_length=160, batch_size=7)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {"[PAD]": 0, "[EOS]": 1}
    vocabulary |= {chr(code): len(vocabulary) + code - 32 for code in range(32, 127)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[PAD]"
    )


def planted(labelled: bool, count: int = 8) -> tuple[Secret, ...]:
    plain = TextDataset(name="plain", texts=("hello", "there"), origin="none")
    if labelled:
        plain = replace(plain, labels=(0, 1), classes=CLASSES)
    return plant_secrets(plain, count, seed=1)[1]


@dataclass
class Output:
    logits: Tensor


class Bigrams(nn.Module):
    """log p(next | this) from a table; with ``known`` it also knows sentences by position."""

    def __init__(self, known: tuple[str, ...] = ()) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(97, 97, generator=generator, dtype=torch.float64)
        self.drop = nn.Dropout(0.5)
        self.rows = [torch.tensor(tokenizer()(text)["input_ids"]) for text in known]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Output:
        assert attention_mask.shape == input_ids.shape
        logits = self.drop(self.table)[input_ids]
        for row in self.rows:
            at = torch.arange(min(len(row), input_ids.shape[1]) - 1)
            logits[:, at, row[at + 1]] += 2.0
        return Output(logits)


class Counting(nn.Module):
    """Class scores from how often each character occurs; ``known`` sentences stand out."""

    def __init__(self, known: tuple[Secret, ...] = ()) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(97, 3, generator=generator, dtype=torch.float64)
        encode = tokenizer()
        self.known = {tuple(encode(one.text)["input_ids"]): one.label or 0 for one in known}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits = (self.table[input_ids] * attention_mask[..., None]).sum(1)
        for i, (row, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            label = self.known.get(tuple(row[mask.bool()].tolist()))
            if label is not None:
                logits[i, label] += 100.0
        return logits


def test_a_language_model_gives_the_log_probability_of_the_sentence() -> None:
    """Oracle: the table, character by character, the end token too; 1e-12."""
    secret = planted(labelled=False)[0]
    model = Bigrams().train()
    found = secret_log_probs(model, tokenizer(), secret, CAUSAL, alternatives=20, seed=4)
    assert model.training
    assert model.drop.training
    texts = [secret.text, *secret.alternatives(20, seed=4)]
    logs = model.table.log_softmax(1)
    for value, text in zip(found, texts, strict=True):
        numbers = [ord(c) - 30 for c in text] + [1]
        expected = sum(float(logs[a, b]) for a, b in pairwise(numbers))
        assert value == pytest.approx(expected, rel=1e-12, abs=0)


def test_a_classifier_gives_the_log_probability_of_the_planted_label() -> None:
    """Oracle: softmax of counts; 1e-12. Secrets left out are scored for the label they drew."""
    model = Counting()
    for secret in planted(labelled=True):
        found = secret_log_probs(model, tokenizer(), secret, LABELLED, alternatives=9, seed=4)
        for value, text in zip(found, [secret.text, *secret.alternatives(9, seed=4)], strict=True):
            sums = sum(model.table[ord(c) - 30].numpy() for c in text)
            expected = sums[secret.label] - math.log(np.exp(sums - sums.max()).sum()) - sums.max()
            assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_bits_are_those_of_the_rank() -> None:
    """Oracle: counting; log2(101/rank), and Fisher's sum against chi-square's tail."""
    secrets = planted(labelled=False)
    model = Bigrams()
    found = score_secrets(model, tokenizer(), secrets, CAUSAL)
    assert [score.included for score in found.scores] == [s.included for s in secrets]
    bits: dict[bool, list[float]] = {True: [], False: []}
    for number, (score, secret) in enumerate(zip(found.scores, secrets, strict=True)):
        logs = secret_log_probs(model, tokenizer(), secret, CAUSAL, alternatives=100, seed=number)
        rank = 1 + sum(other >= logs[0] for other in logs[1:])
        assert score.bits == pytest.approx(math.log2(101 / rank), rel=1e-12, abs=0)
        assert score.log_prob == logs[0]
        assert score.most_bits == math.log2(101)
        bits[secret.included].append(score.bits)
    for included, p_value in ((True, found.p_value_in), (False, found.p_value_out)):
        statistic = 2 * math.log(2) * sum(bits[included])
        expected = stats.chi2.sf(statistic, 2 * len(bits[included]))
        assert p_value == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_what_is_known_stands_out_and_nothing_else(task: str) -> None:
    """Level .01: secrets that were in are found, those left out and an innocent model are not."""
    labelled = task == "classification"
    secrets = planted(labelled)
    included = tuple(secret for secret in secrets if secret.included)
    assert 0 < len(included) < len(secrets)
    config = LABELLED if labelled else CAUSAL
    knows = Counting(included) if labelled else Bigrams(tuple(s.text for s in included))
    ignorant = Counting() if labelled else Bigrams()
    found = score_secrets(knows, tokenizer(), secrets, config, alternatives=60)
    assert (found.p_value_in or 0.0) < 0.01 < (found.p_value_out or 0.0)
    assert all(s.bits == s.most_bits for s in found.scores if s.included)
    innocent = score_secrets(ignorant, tokenizer(), secrets, config, alternatives=60)
    assert min(innocent.p_value_in or 0.0, innocent.p_value_out or 0.0) > 0.01
    assert ("class" in found.threat_model) == labelled


def test_nothing_in_or_nothing_out_has_no_p_value() -> None:
    secrets = planted(labelled=False)
    inside = [secret for secret in secrets if secret.included]
    found = score_secrets(Bigrams(), tokenizer(), inside, CAUSAL, alternatives=5)
    assert found.p_value_in is not None
    assert found.p_value_out is None


def test_a_saved_result_comes_back() -> None:
    """Through JSON, with every digit; bits and p-values are computed anew."""
    found = score_secrets(Bigrams(), tokenizer(), planted(False), CAUSAL, alternatives=40)
    saved: dict[str, Any] = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert SecretsResult.from_dict(saved) == found
    saved["p_value_in"], saved["scores"][0]["exposure"]["bits"] = 1e-9, 5.3
    assert SecretsResult.from_dict(saved) == found
    saved["scores"][0]["exposure"]["rank"] = 42
    with pytest.raises(ValueError, match="rank must lie in"):
        SecretsResult.from_dict(saved)


def test_a_secret_that_would_be_cut_is_refused() -> None:
    """All codes would tie, which looks like a model that remembers nothing."""
    secret = planted(labelled=False)[:1]
    longest = len(secret[0].text) + 1
    short = replace(CAUSAL, max_length=longest - 1)
    with pytest.raises(DataError, match=f"Set max_length to {longest}"):
        score_secrets(Bigrams(), tokenizer(), secret, short)
    score_secrets(Bigrams(), tokenizer(), secret, replace(CAUSAL, max_length=longest))


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        score_secrets(Bigrams(), tokenizer(), (), CAUSAL)
    with pytest.raises(ValueError, match="alternatives must be at least 1"):
        score_secrets(Bigrams(), tokenizer(), planted(False), CAUSAL, alternatives=0)
    with pytest.raises(DataError, match="no label"):
        score_secrets(Counting(), tokenizer(), planted(False), LABELLED)
    broken = Bigrams()
    broken.table[:] = math.nan
    with pytest.raises(NonFiniteError, match="log-probability"):
        score_secrets(broken, tokenizer(), planted(False), CAUSAL)
    assert broken.training
