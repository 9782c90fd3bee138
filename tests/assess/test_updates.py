"""The game on one update: gradients against autograd, and AUCs against closed forms."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lora_privacy.assess import updates
from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.gradients import sample_gradients
from lora_privacy.assess.models import MeanPoolClassifier
from lora_privacy.assess.updates import (
    UpdateAttack,
    attack_updates,
    best_auc,
    clip_factors,
)
from lora_privacy.audit import LeakageEstimate, projection_attack
from lora_privacy.core import CachedPrefix, adapt
from lora_privacy.data import TextDataset
from lora_privacy.dp import GaussianEvent, PldAccountant, ProjectedGaussian
from lora_privacy.errors import NonFiniteError, UnsupportedLayerError

WORDS = ["refund", "my", "order", "please", "late", "again", "the", "box", "came", "open"]
RNG = np.random.default_rng(5)
TEXTS = tuple(" ".join(RNG.choice(WORDS, RNG.integers(2, 9))) for _ in range(19))


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[EOS]", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", eos_token="[EOS]", unk_token="[PAD]"
    )


def bert() -> tuple[nn.Module, TokenisedDataset, str, tuple[str, ...]]:
    """Dropout is on, and layers in two blocks."""
    torch.manual_seed(0)
    encoder = BertModel(
        BertConfig(
            vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=12, hidden_dropout_prob=0.5, attn_implementation="eager",
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    labels = tuple(i % 3 for i in range(len(TEXTS)))
    data = TextDataset(name="toy", texts=TEXTS, labels=labels, classes=("a", "b", "c"), origin="")
    layers = tuple(f"encoder.encoder.layer.{i}.attention.self.query" for i in (0, 1))
    model = MeanPoolClassifier(encoder, 8, 3).double().train()
    return model, TokenisedDataset(data, tokenizer(), 16, causal=False), "classification", layers


def llama() -> tuple[nn.Module, TokenisedDataset, str, tuple[str, ...]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, attention_dropout=0.5, use_cache=False,
            attn_implementation="eager",
        )
    )  # fmt: skip
    data = TextDataset(name="toy", texts=TEXTS, origin="")
    layers = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    causal = TokenisedDataset(data, tokenizer(), 16, causal=True)
    return model.double().train(), causal, "causal-lm", layers


def gpt2() -> tuple[nn.Module, TokenisedDataset, str, tuple[str, ...]]:
    """Conv1D layers, which store the transpose."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16, use_cache=False)
    )
    data = TextDataset(name="toy", texts=TEXTS, origin="")
    causal = TokenisedDataset(data, tokenizer(), 16, causal=True)
    return model.double().train(), causal, "causal-lm", ("transformer.h.0.attn.c_attn",)


def by_autograd(
    model: nn.Module, data: TokenisedDataset, task: str, weight: nn.Parameter, row: int
) -> np.ndarray:
    """One record alone, so nothing is padded, with the loss written out."""
    batch = data.batch(np.array([row]))
    model.eval()
    weight.requires_grad_(True)
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    if task == "classification":
        loss = -output.log_softmax(1)[0, batch.labels[0]]
    else:
        tokens = batch.input_ids[0, 1:]
        logs = output.logits[0, :-1].log_softmax(1)
        loss = -logs[torch.arange(len(tokens)), tokens].mean()
    return torch.autograd.grad(loss, weight)[0].numpy()


@pytest.mark.parametrize("make", [bert, llama, gpt2])
@pytest.mark.parametrize("method", [None, "lora", "flora"])
def test_gradients_are_those_of_single_records(
    make: Callable[[], Any], method: str | None
) -> None:
    """Oracle: autograd on one record of the unadapted model, 1e-9; padding and dropout are off."""
    plain, data, task, layers = make()
    model = make()[0]
    if method:
        adapt(model, 2, method=method, targets=layers, seed=0)
        model.train()
    rows = np.arange(len(TEXTS))[::-1].copy()  # more than one micro-batch, in another order
    found = sample_gradients(model, data, layers, rows, task)
    assert tuple(found) == layers
    for layer in layers:
        weight = plain.get_submodule(layer).weight
        for place in (0, 7, 18):
            expected = by_autograd(plain, data, task, weight, int(rows[place]))
            expected = expected.T if make is gpt2 else expected
            assert found[layer][place] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    sizes = [np.linalg.norm(g, axis=(1, 2)).min() for g in found.values()]
    assert min(sizes) > 1e-6


def test_the_model_is_put_back() -> None:
    """Flags, modes and gradients, module by module, also after an error."""
    model, data, task, layers = bert()
    adapt(model, 2, targets=layers, seed=0, trainable=("head",))
    model.train()
    dropped: Any = model.get_submodule("encoder.embeddings.dropout")
    dropped.eval()
    head: Any = model.get_submodule("head")
    head.weight.grad = torch.ones_like(head.weight)

    def state() -> tuple[Any, ...]:
        return (
            [p.requires_grad for p in model.parameters()],
            [m.training for m in model.modules()],
            [p.grad for p in model.parameters()],
            torch.random.get_rng_state().tolist(),
        )

    before = state()
    sample_gradients(model, data, layers, [0, 1], task)  # pyright: ignore[reportArgumentType]
    assert state() == before
    with torch.no_grad():
        head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="query"):
        sample_gradients(model, data, layers, [0, 1], task)  # pyright: ignore[reportArgumentType]
    assert state() == before


def test_a_cached_prefix_changes_nothing() -> None:
    """1e-9 against the whole model; the first block is frozen."""
    model, data, task, layers = bert()
    adapt(model, 2, targets=layers[1:], seed=0)
    model.train()
    prefix = CachedPrefix(model)
    prefix.fill((batch.ids, batch.inputs()) for batch in data.ordered(8))
    assert prefix.depth == 1
    rows = np.arange(5)
    whole = sample_gradients(model, data, layers[1:], rows, task)  # pyright: ignore
    cached = sample_gradients(model, data, layers[1:], rows, task, prefix)  # pyright: ignore
    assert cached[layers[1]] == pytest.approx(whole[layers[1]], rel=1e-9, abs=1e-14)


def test_layers_that_are_not_linear_are_refused() -> None:
    model, data, task, _ = bert()
    with pytest.raises(UnsupportedLayerError, match="LayerNorm"):
        sample_gradients(model, data, ["encoder.embeddings.LayerNorm"], [0], task)  # pyright: ignore
    with pytest.raises(ValueError, match="at least one layer and one record"):
        sample_gradients(model, data, [], [0], task)  # pyright: ignore[reportArgumentType]


def pool(records: int = 40, seed: int = 1) -> dict[str, np.ndarray]:
    """Gradients of rank one of two layers, far above a clip of 1."""
    rng = np.random.default_rng(seed)
    return {
        name: 50 * rng.standard_normal((records, n, 1)) * rng.standard_normal((records, 1, m))
        for name, (n, m) in {"q": (5, 24), "v": (7, 24)}.items()
    }


GAMES = 1_500
SMALL: dict[str, Any] = {"batch_size": 6, "games": GAMES, "seed": 3, "delta": 1e-5}


@pytest.mark.parametrize("method", ["dp-sgd", "dp-lora", "dp-lora-fa"])
def test_the_auc_of_a_gaussian_step(method: Any) -> None:
    """Φ(1/(√2 z)), two normal laws at a distance of 1/z, inside an interval of level 1e-3.

    Half or twice the noise, or a clip of each layer on its own (distance √2/z), lie outside.
    """
    found = attack_updates(
        pool(), method=method, rank=4, noise_multiplier=1.0, significance=1e-3, **SMALL
    )
    auc = found.auc
    assert auc.low < stats.norm.cdf(1 / math.sqrt(2)) < auc.high
    for distance in (0.5, math.sqrt(2), 2):
        assert not auc.low < stats.norm.cdf(distance / math.sqrt(2)) < auc.high
    # δ of ε for two normal laws at distance 1 (Balle & Wang 2018)
    epsilon, delta = found.epsilon or 0.0, found.delta
    exact = stats.norm.cdf(0.5 - epsilon) - math.exp(epsilon) * stats.norm.cdf(-0.5 - epsilon)
    assert exact == pytest.approx(delta, rel=1e-3, abs=0)
    assert not found.contradicts


@pytest.mark.parametrize("law", ["orthonormal", "gaussian"])
def test_the_auc_of_a_fresh_projection(law: Any) -> None:
    """E Φ(√(β + β')/(2z)), β ~ Beta(r/2, (m - r)/2), of one layer, inside a level of 1e-3.

    The step without its projection, or a rank twice as large, lies outside.
    """
    z, m, r = 0.3, 24, 4
    found = attack_updates(
        {"q": pool()["q"]},
        method="dp-flora", rank=r, law=law, noise_multiplier=z, significance=1e-3, **SMALL,
    )  # fmt: skip
    rng = np.random.default_rng(0)

    def exact(rank: int) -> float:
        kept = rng.beta(rank / 2, (m - rank) / 2, (2, 200_000)).sum(0)
        return float(stats.norm.cdf(np.sqrt(kept) / (2 * z)).mean())

    assert exact(4) == pytest.approx(0.821, abs=2e-3)  # docs/theory/projection-attack.md
    assert found.auc.low < exact(4) < found.auc.high < exact(8)
    assert found.auc.high < stats.norm.cdf(1 / (z * math.sqrt(2)))
    assert found.best_auc == pytest.approx(0.835, abs=2e-3)
    assert not found.contradicts
    assert found.epsilon == pytest.approx(
        ProjectedGaussian([(m, r)], noise_multiplier=z).epsilon(1e-5).epsilon, rel=0.02
    )


@pytest.mark.parametrize("method", ["full", "lora", "lora-fa", "flora"])
def test_without_noise_an_update_hides_nothing(method: Any) -> None:
    found = attack_updates(pool(), method=method, rank=2, **{**SMALL, "games": 200})
    assert found.auc.value == 1.0
    assert found.auc.low > 0.9
    assert (found.epsilon, found.best_auc, found.contradicts) == (None, None, False)
    assert found.rank == (None if method == "full" else 2)
    assert "and not" in found.knowledge or method == "full"
    assert "other 5 records" in found.knowledge


def test_symmetry_is_blind_to_one_output() -> None:
    """With one output G Uᵀ is one number, so that every score is 0: AUC ½."""
    one_row = {"q": pool()["q"][:, :1]}
    found = attack_updates(one_row, method="lora", rank=2, **{**SMALL, "games": 60})
    assert found.auc.value == 0.5


def test_the_basis_of_the_rows_changes_no_score() -> None:
    """Against projection_attack on the whole matrices; 1e-6."""
    g = pool()["v"]
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, 24)) / 2
    known, one = g[:5].sum(0), g[5]
    for total in (known, known + one):
        update = -total @ a.T @ a
        expected = projection_attack(update, one[None], known=known)[0]
        score = updates._score("flora", total, known, one, a, 0.0, rng)
        assert score == pytest.approx(expected, rel=1e-6, abs=0)
        assert abs(score) > 5


@pytest.mark.parametrize("z", [0.3, 1.0, 3.0, 10.0])
def test_best_auc_is_just_above_the_exact_one(z: float) -> None:
    """Φ(1/(√2 z)) for a plain Gaussian; two steps are one at z/√2."""
    one = PldAccountant().compose(GaussianEvent(z))
    for accountant, distance in ((one, 1 / z), (one.compose(GaussianEvent(z)), math.sqrt(2) / z)):
        exact = stats.norm.cdf(distance / math.sqrt(2))
        assert exact <= best_auc(accountant) <= exact + 3e-3


def test_clip_factors() -> None:
    g = {"a": np.array([[[3.0]], [[0.3]], [[0.0]]]), "b": np.array([[[4.0]], [[0.4]], [[0.0]]])}
    assert clip_factors(g.values(), 1.0).tolist() == [pytest.approx(0.2), 1.0, 1.0]


def test_a_contradiction_shows() -> None:
    """Halved noise in the release, so that the proof is about another mechanism, is caught."""
    found = attack_updates(pool(), method="dp-sgd", noise_multiplier=0.5, **SMALL)
    claimed = attack_updates(pool(), method="dp-sgd", noise_multiplier=1.0, **SMALL)
    assert replace(claimed, auc=found.auc).contradicts
    assert not claimed.contradicts


@pytest.mark.parametrize("method", ["lora", "dp-flora"])
def test_a_saved_attack_comes_back(method: Any) -> None:
    """Through JSON; what is proved is not believed from a file."""
    z = 0.5 * (method == "dp-flora")
    found = attack_updates(
        pool(), method=method, rank=2, noise_multiplier=z, **{**SMALL, "games": 30}
    )
    saved = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert UpdateAttack.from_dict({**saved, "epsilon": 0.01, "best_auc": 0.51}) == found
    with pytest.raises(ValueError, match="value must lie in"):
        UpdateAttack.from_dict({**saved, "auc": {**saved["auc"], "value": 1.5}})


def test_the_same_seed_plays_the_same_games() -> None:
    def play(seed: int) -> float:
        options = {**SMALL, "games": 40, "seed": seed}
        return attack_updates(pool(), method="dp-sgd", noise_multiplier=1.0, **options).auc.value

    assert play(3) == play(3) != play(4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "dp-sgd"}, "noise_multiplier must be positive"),
        ({"noise_multiplier": 1.0}, "noise_multiplier must be 0"),
        ({"rank": None}, "rank must be given"),
        ({"batch_size": 1}, "batch_size must be at least 2"),
        ({"batch_size": 41}, "batch_size must lie in"),
        ({"method": "adalora"}, "method must be one of"),
        ({"method": "dp-flora", "noise_multiplier": 1.0, "law": "rademacher"}, "law must be"),
        ({"delta": 0.0}, "delta must lie in"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be positive"),
    ],
)
def test_what_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        attack_updates(pool(), **{"method": "lora", "rank": 2, **SMALL, **change})


def test_arrays_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        attack_updates({}, method="full", **SMALL)
    uneven = {"a": np.ones((9, 2, 2)), "b": np.ones((8, 2, 2))}
    with pytest.raises(ValueError, match="same records"):
        attack_updates(uneven, method="full", **SMALL)


def test_saved_evidence_comes_back() -> None:
    """Checked again, an infinite ceiling included; another kind or field is refused."""
    found = LeakageEstimate(
        epsilon=1.5, delta=1e-5, significance=0.05, canaries=10, ceiling=math.inf, method="m",
        observed="o", assumptions=("a", "b"), references=("hoeffding-1963",), mu=0.25,
    )  # fmt: skip
    saved = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert LeakageEstimate.from_dict(saved) == found
    for change, match in (
        ({"kind": "guarantee"}, "got kind 'guarantee'"),
        ({"colour": "grey"}, "colour"),
        ({"epsilon": -1.0}, "epsilon must lie in"),
        ({"assumptions": []}, "assumptions must name"),
    ):
        with pytest.raises(ValueError, match=match):
            LeakageEstimate.from_dict({**saved, **change})
