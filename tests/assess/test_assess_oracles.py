"""Second oracles of the numbers of an assessment: peers, one text at a time, and written-out sums.

``docs/oracles.md`` lists both of each number.
"""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import special, stats
from sklearn import metrics
from test_updates import TEXTS, WORDS, bert, gpt2, llama
from torch import nn

from lora_privacy.assess.config import AssessConfig
from lora_privacy.assess.dynamics import check_dynamics
from lora_privacy.assess.game import Game
from lora_privacy.assess.measure import NoiseMeter
from lora_privacy.assess.membership import _read
from lora_privacy.assess.methods import recipe_of
from lora_privacy.assess.run import _summary
from lora_privacy.assess.shadows import Shadows
from lora_privacy.assess.training import evaluate, trained_parameters
from lora_privacy.assess.updates import best_auc
from lora_privacy.core import GradientProbe, adapt, adapters
from lora_privacy.data import TextDataset
from lora_privacy.dp import GaussianEvent, PldAccountant

# Held-out scores.


def test_accuracy_and_loss_are_those_of_scikit_learn() -> None:
    """Oracle: logits of one text at a time, its padding and dropout gone, then scikit-learn; 1e-9.

    Labels in another order, as a batch by length has them, are rejected.
    """
    model, data, _, _ = bert()
    nn.init.normal_(model.head.weight, std=4.0, generator=torch.Generator().manual_seed(1))
    score = evaluate(model, data, AssessConfig(batch_size=1), None)
    assert model.training, "modes are put back"
    model.eval()
    logits, labels = [], []
    for row in range(len(data)):
        one = data.batch(np.array([row]))
        with torch.no_grad():
            logits.append(model(one.input_ids, one.attention_mask)[0].numpy())
        labels.append(int(one.labels))
    table = np.array(logits)
    right = metrics.accuracy_score(labels, table.argmax(1))
    assert 0.2 < right < 0.8
    assert score.accuracy == pytest.approx(right, rel=1e-12)
    loss = metrics.log_loss(labels, special.softmax(table, axis=1), labels=[0, 1, 2])
    assert score.loss == pytest.approx(loss, rel=1e-9)
    outcomes = np.array(labels) == table.argmax(1)
    assert score.accuracy_error == pytest.approx(outcomes.std() / math.sqrt(len(data)), rel=1e-12)
    assert score.examples == len(data)
    wrong = metrics.log_loss(labels[::-1], special.softmax(table, axis=1), labels=[0, 1, 2])
    assert score.loss != pytest.approx(wrong, rel=1e-2)


class Reader(nn.Module):
    """Class scores of 5 for the first token modulo 3, and of 0 for the others."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return 5.0 * nn.functional.one_hot(input_ids[:, 0] % 3, 3).double()


def test_a_model_of_known_answers_has_a_known_score() -> None:
    """Right answers cost ln(1 + 2e⁻⁵) and wrong ones 5 more; they are counted on the texts."""
    _, data, _, _ = bert()
    vocabulary = {word: i + 2 for i, word in enumerate(WORDS)}
    right = sum(vocabulary[text.split()[0]] % 3 == i % 3 for i, text in enumerate(TEXTS))
    share, count = right / len(TEXTS), len(TEXTS)
    assert 0 < right < count
    score = evaluate(Reader(), data, AssessConfig(batch_size=1), None)
    assert score.accuracy == pytest.approx(share, rel=1e-12)
    assert score.accuracy_error == pytest.approx(stats.binom.std(count, share) / count, rel=1e-12)
    expected = math.log1p(2 * math.exp(-5)) + 5 * (1 - share)
    assert score.loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_loss_of_a_language_model_is_that_of_transformers(make: Any) -> None:
    """Oracle: the loss that transformers computes of one text alone, averaged over texts; 1e-5.

    An average over all tokens, where long texts weigh more, is rejected.
    """
    model, data, _, _ = make()
    score = evaluate(model, data, AssessConfig(task="causal-lm", batch_size=2), None)
    model.eval()
    losses, tokens = [], []
    for row in range(len(data)):
        ids = data.batch(np.array([row])).input_ids
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
        tokens.append(ids.shape[1] - 1)
    assert score.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert score.loss != pytest.approx(np.average(losses, weights=tokens), rel=1e-5)
    assert score.accuracy is None


def test_trained_numbers_are_those_of_peft() -> None:
    """Oracle: peft's own count for the same layers and rank."""
    model = gpt2()[0]
    twin = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    adapt(model, 2, targets=("c_attn",), seed=0)
    expected, _ = twin.get_nb_trainable_parameters()
    assert trained_parameters(model, recipe_of("lora")) == expected == 2 * (8 + 24)


def test_the_largest_class_is_counted() -> None:
    """Oracle: scipy's mode."""
    labels = tuple(np.random.default_rng(2).integers(0, 4, 50).tolist())
    data = TextDataset(
        name="x", texts=tuple(map(str, range(50))), labels=labels, classes=tuple("abcd"), origin=""
    )
    assert _summary(data).largest_class == stats.mode(labels).count / 50


# What attacks got.


def shadows_of(seed: int, records: int = 80) -> Shadows:
    """Nine models; ln p of a member is larger."""
    rng = np.random.default_rng(seed)
    members = rng.random((9, records)) < 0.5
    members[1], members[2] = True, False  # so that each record can be calibrated
    logits = rng.normal(0, 1, records) + 1.5 * members + rng.standard_normal(members.shape)
    population = rng.normal(0, 1, 60) + rng.standard_normal((9, 60))
    return Shadows(
        reference_log_probs=-np.logaddexp(0, -logits),
        reference_members=members,
        population_reference_log_probs=-np.logaddexp(0, -population),
        seeds=np.arange(9),
        fingerprint="toy",
    )


def test_what_attacks_got_is_what_scikit_learn_says_of_their_scores() -> None:
    """AUC, curve and TPR of every attack; the means of ln p by loops; the first is the target."""
    shadows = shadows_of(3)
    found = _read(shadows, AssessConfig(delta=1e-5))
    target, coins = shadows.reference_log_probs[0], shadows.reference_members[0]
    game = Game(
        target_log_probs=target,
        target_members=coins,
        population_log_probs=shadows.population_reference_log_probs[0],
        reference_log_probs=shadows.reference_log_probs[1:],
        reference_members=shadows.reference_members[1:],
        population_reference_log_probs=shadows.population_reference_log_probs[1:],
    )
    scores, members = game.attacks()
    assert set(scores) == {"attack-P", "attack-R", "LiRA", "RMIA"} == set(found.curves)
    for name, values in scores.items():
        area = metrics.roc_auc_score(members, values)
        assert found.report.rates[name][0].value == pytest.approx(area, rel=1e-12)
        fpr, tpr, _ = metrics.roc_curve(members, values, drop_intermediate=False)
        assert found.curves[name][0] == pytest.approx(fpr, abs=1e-12)
        assert found.curves[name][1] == pytest.approx(tpr, abs=1e-12)
        assert metrics.auc(*found.curves[name]) == pytest.approx(area, rel=1e-12)
    inside = [x for x, coin in zip(target, coins, strict=True) if coin]
    outside = [x for x, coin in zip(target, coins, strict=True) if not coin]
    assert found.log_prob_in == pytest.approx(math.fsum(inside) / len(inside), rel=1e-12)
    assert found.log_prob_out == pytest.approx(math.fsum(outside) / len(outside), rel=1e-12)
    assert (found.records, found.members, found.references) == (80, len(inside), 8)


@pytest.mark.parametrize("z", [0.7, 2.0])
def test_the_best_area_is_that_of_the_likelihood_ratio(z: float) -> None:
    """Draws of the mechanism, its likelihood ratio as score, scikit-learn's area; 4.5 errors.

    ``best_auc`` is above it by at most .003 beside. That of noise 10 % larger is rejected.
    """
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.normal(1, z, 40_000), rng.normal(0, z, 40_000)])
    ratio = stats.norm.logpdf(x, 1, z) - stats.norm.logpdf(x, 0, z)
    area = metrics.roc_auc_score(np.arange(80_000) < 40_000, ratio)
    error = 4.5 * math.sqrt(area * (1 - area) / 40_000)
    best = best_auc(PldAccountant().compose(GaussianEvent(z)))
    assert area - error <= best <= area + error + 3e-3
    assert best_auc(PldAccountant().compose(GaussianEvent(1.1 * z))) < area - error


# The noise of a projection.


def test_a_layers_noise_is_the_sum_written_out() -> None:
    """Two measured steps: sums over G(AᵀA − I) in numpy, over ‖G‖²(m + 1)/r; 1e-10.

    The spread of one draw of A is that of 20,000 draws, within 5 %; a spread of √2 is rejected.
    """
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    adapt(model, 3, targets=("0",), seed=5)
    with torch.no_grad():
        adapters(model)["0"].layer.expand.weight.normal_()
    meter = NoiseMeter(adapters(model), "lora")
    a, gradients = adapters(model)["0"].a().detach().numpy(), []
    with GradientProbe(model) as probe:
        for _ in range(2):
            x = torch.randn(7, 6, dtype=torch.float64)
            model(x).square().sum().backward()
            weight = model[0].base.weight + model[0].delta()
            gradients.append((2 * x @ weight.T).T.detach().numpy() @ x.numpy())
            meter.add(probe.records)
            probe.step()
    (found,) = meter.layers(draws=400, seed=6)
    noises = [g @ (a.T @ a - np.eye(6)) for g in gradients]
    sizes = [np.sum(g**2) for g in gradients]
    assert found.gradient_norm == pytest.approx(math.sqrt(np.mean(sizes)), rel=1e-10)
    expected = sum(np.sum(n**2) for n in noises) / (sum(sizes) * 7 / 3)
    assert found.training_ratio == pytest.approx(expected, rel=1e-10)
    assert abs(found.fresh_ratio - 1) < 4.5 * found.fresh_standard_error
    rng = np.random.default_rng(7)
    fresh = rng.standard_normal((20_000, 3, 6)) / math.sqrt(3)
    last = gradients[-1]
    energy = np.square(np.einsum("nm,krm,krj->knj", last, fresh, fresh) - last).sum(axis=(1, 2))
    ratio = energy / (sizes[-1] * 7 / 3)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / math.sqrt(20_000)
    assert found.one_draw_spread == pytest.approx(ratio.std(), rel=0.05)
    assert found.fresh_standard_error == pytest.approx(ratio.std() / 20, rel=0.05)
    order = np.argsort(np.abs(last[found.entry.row]))
    assert found.entry.row == np.argmax(np.linalg.norm(last, axis=1))
    assert found.entry.column == order[3]
    assert found.entry.cosine == pytest.approx(
        last[found.entry.row, order[3]] / np.linalg.norm(last[found.entry.row]), rel=1e-10
    )


def text_by_text(model: nn.Module, data: Any, weight: torch.Tensor) -> torch.Tensor:
    """∂/∂weight of the mean loss of transformers over the texts, each alone."""
    losses = []
    for row in range(len(data)):
        ids = data.batch(np.array([row])).input_ids
        losses.append(model(input_ids=ids, labels=ids).loss)
    return torch.autograd.grad(torch.stack(losses).mean(), weight)[0]


def test_drift_and_disagreement_are_those_of_the_chain_rule() -> None:
    """Three steps on A and B by hand, from the dense gradient of the plain model; 1e-4.

    ∂L/∂B = s G Aᵀ and ∂L/∂A = s Bᵀ G. A prediction without s² is rejected.
    """
    model, data, _, layers = llama()
    plain, rate, scaling = copy.deepcopy(model).eval(), 2.0, 2.0
    adapt(model, 2, targets=(layers[0],), alpha=4, seed=8)
    a = adapters(model)[layers[0]].a().detach().clone()
    config = AssessConfig(
        task="causal-lm", batch_size=64, dynamics_steps=3, dynamics_learning_rate=rate
    )
    (found,) = check_dynamics(model, data, config, method="lora")
    weight: Any = plain.get_submodule(layers[0]).weight
    start, first = weight.detach().clone(), a.clone()
    b, total = torch.zeros(len(start), 2, dtype=torch.float64), torch.zeros_like(start)
    for _ in range(3):
        weight.data = start + scaling * b @ a
        gradient = text_by_text(plain, data, weight)
        total += gradient
        a, b = a - rate * scaling * b.T @ gradient, b - rate * scaling * gradient @ a.T
    moved = scaling * b @ a
    assert found.drift == pytest.approx(float((a - first).norm() / first.norm()), rel=1e-4)
    gap = moved + rate * scaling**2 * total @ first.T @ first
    assert found.disagreement == pytest.approx(float(gap.norm() / moved.norm()), rel=1e-4)
    other = moved + rate * total @ first.T @ first
    assert found.disagreement != pytest.approx(float(other.norm() / moved.norm()), rel=1e-2)
    assert found.drift <= found.drift_bound
