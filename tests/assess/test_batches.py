"""Examples as token ids: pairs, token types, padding, and texts that give no tokens."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.models import MeanPoolClassifier
from lora_privacy.core import CachedPrefix, adapt
from lora_privacy.data import TextDataset
from lora_privacy.errors import DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "d", "e", "->"]
PAD, CLS, SEP, ARROW = 0, 2, 3, 9
A, B, C, D, E = range(4, 9)


def _tokenizer(template: bool = True, eos: str | None = "[SEP]") -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Replace("\u200b", " ")
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token=eos
    )


def _data(texts: tuple[str, ...], pairs: tuple[str, ...] | None = None) -> TextDataset:
    labels = tuple(i % 2 for i in range(len(texts)))
    return TextDataset(
        name="own", texts=texts, pairs=pairs, labels=labels, classes=("x", "y"), origin="here"
    )


PAIRS = _data(("a b", "c", "d d d"), ("c", "e e", "a"))


def test_a_pair_carries_its_token_types() -> None:
    """Oracle: the template of the tokenizer, spelled out."""
    batch = TokenisedDataset(PAIRS, _tokenizer(), 16, causal=False).batch(np.array([0, 1]))
    assert batch.input_ids.tolist() == [[CLS, A, B, SEP, C, SEP], [CLS, C, SEP, E, E, SEP]]
    assert batch.inputs()["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    both = TokenisedDataset(PAIRS, _tokenizer(), 16, causal=False).batch(np.array([1, 2]))
    assert both.inputs()["token_type_ids"].tolist()[0] == [0, 0, 0, 1, 1, 1, 0]
    assert both.attention_mask.tolist()[0] == [1, 1, 1, 1, 1, 1, 0]


def test_single_texts_carry_none() -> None:
    """They would be zeros, and GPT-2 would look up a word for each."""
    batch = TokenisedDataset(_data(("a", "b c")), _tokenizer(), 16, causal=False).batch(
        np.array([0, 1])
    )
    assert set(batch.inputs()) == {"input_ids", "attention_mask"}
    assert batch.input_ids.tolist() == [[CLS, A, SEP, PAD], [CLS, B, C, SEP]]


def test_a_pair_without_separator_is_joined() -> None:
    """Else "a b" + "c" and "a" + "b c" would be one example."""
    tokens = TokenisedDataset(PAIRS, _tokenizer(template=False), 16, causal=False)
    assert tokens.batch(np.array([0])).input_ids.tolist() == [[A, B, ARROW, C]]
    assert tokens.batch(np.array([0])).token_type_ids is None


@pytest.mark.parametrize("eos", ["[SEP]", None])
def test_a_language_model_learns_the_end_where_there_is_one(eos: str | None) -> None:
    """Without an end token nothing is appended, least of all the word "None"."""
    batch = TokenisedDataset(PAIRS, _tokenizer(False, eos), 16, causal=True).batch(
        np.array([0, 2])
    )
    end = [] if eos is None else [SEP]
    long = [D, D, D, ARROW, A, *end]
    assert batch.input_ids.tolist() == [[A, B, ARROW, C, *end, PAD], long]
    assert batch.labels.tolist() == [[A, B, ARROW, C, *end, -100], long]
    assert batch.token_type_ids is None


def test_texts_without_tokens_are_named() -> None:
    """Blank to the tokenizer, though Python's strip() leaves something."""
    blank = _data(("a b", "\u200b", "c d"))
    with pytest.raises(DataError, match=r"1 texts have no token.*text 2, '\\u200b'"):
        TokenisedDataset(blank, _tokenizer(template=False), 16, causal=False)
    with pytest.raises(DataError, match="text 1, 'a'"):
        TokenisedDataset(_data(("a", "b c")), _tokenizer(False, None), 16, causal=True)


def test_no_room_beside_special_tokens() -> None:
    """Every example would be the same."""
    with pytest.raises(ValueError, match="max_length must be more than 3"):
        TokenisedDataset(PAIRS, _tokenizer(), 3, causal=False)
    tokens = TokenisedDataset(PAIRS, _tokenizer(), 4, causal=False)
    assert {len(row) for row in tokens.batch(np.arange(3)).input_ids} == {4}


def test_a_cached_prefix_remembers_the_types() -> None:
    """Oracle: the model without the cache. Types that are left out must make a difference."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=20,
        )
        model = MeanPoolClassifier(BertModel(settings), 16, 2).eval()
    adapt(model, 2, seed=0, layers=[2], trainable=("head",))
    tokens = TokenisedDataset(PAIRS, _tokenizer(), 16, causal=False)
    prefix = CachedPrefix(model)
    prefix.fill((batch.ids, batch.inputs()) for batch in tokens.ordered(2))
    batch = tokens.batch(np.array([2, 0]))
    with prefix.using(batch.ids, batch.attention_mask):
        cached = model(**batch.inputs())
    assert prefix.depth == 2
    torch.testing.assert_close(cached, model(**batch.inputs()), rtol=1e-5, atol=1e-6)
    untyped = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert (cached - untyped).abs().max() > 1e-3
