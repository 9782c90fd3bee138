"""Second oracles of the numbers of ``core``: finite differences, and products in closed form.

``docs/oracles.md`` lists both of each number.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lora_privacy.core import (
    GradientProbe,
    adapt,
    adapters,
    disagreement,
    drift,
    predicted_update,
    recursion,
    snapshot,
    update_bound,
)


@pytest.mark.parametrize("method", ["lora", "lora-fa", "flora"])
def test_the_gradient_of_a_weight_is_a_difference_quotient(method: str) -> None:
    """Oracle: the loss after moving each entry of the frozen weight by ±1e-5; 1e-7.

    Row norms, and the noise of the projection with A of variance 1/r, follow by numpy.
    """
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model = adapt(base, 2, targets=("0",), method=method, seed=1)  # type: ignore[arg-type]
    layer = adapters(model)["0"].layer
    if method != "flora":
        nn.init.normal_(layer.expand.weight)
    x = torch.randn(3, 5, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return model(x).square().sum()

    weight = layer.weight if method == "flora" else layer.base.weight
    expected = np.zeros((4, 5))
    with torch.no_grad():
        for i, j in np.ndindex(4, 5):
            ends = []
            for sign in (1, -1):
                weight[i, j] += sign * 1e-5
                ends.append(float(loss()))
                weight[i, j] -= sign * 1e-5
            expected[i, j] = (ends[0] - ends[1]) / 2e-5
    with GradientProbe(model) as probe:
        loss().backward()
        record = probe.records["0"]
        found, norms = record.gradient.numpy(), record.row_norms.numpy()
        noise, a = record.noise.numpy(), record.a.detach().numpy()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert norms == pytest.approx(np.linalg.norm(expected, axis=1), rel=1e-6)
    assert noise == pytest.approx(expected @ (a.T @ a - np.eye(5)), rel=1e-5, abs=1e-6)


def test_the_recursion_of_diagonal_gradients_is_a_product() -> None:
    """With A_0 = I, entry by entry: a ± b is multiplied by 1 ∓ ηsg at every step; 1e-12.

    So are drift, update and their bounds. A wrong sign of the second factor is rejected.
    """
    rng, rate, scaling, size = np.random.default_rng(2), 0.1, 2.0, 4
    entries = rng.uniform(0.2, 1.5, (6, size))
    state = recursion((torch.diag(torch.from_numpy(g)) for g in entries), rate, scaling=scaling)
    plus = np.prod(1 - rate * scaling * entries, axis=0)
    minus = np.prod(1 + rate * scaling * entries, axis=0)
    a, b = (plus + minus) / 2, (plus - minus) / 2
    a0 = torch.eye(size, dtype=torch.float64)
    assert state.a(a0).numpy() == pytest.approx(np.diag(a), rel=1e-12, abs=1e-12)
    assert state.b(a0).numpy() == pytest.approx(np.diag(b), rel=1e-12, abs=1e-12)
    update = torch.diag(torch.from_numpy(scaling * a * b))
    predicted = predicted_update(
        (torch.diag(torch.from_numpy(g)) for g in entries), a0, rate, scaling=scaling
    )
    straight = -rate * scaling**2 * entries.sum(axis=0)
    assert predicted.numpy() == pytest.approx(np.diag(straight), rel=1e-12, abs=1e-12)
    gap = scaling * a * b - straight
    expected = np.linalg.norm(gap) / np.linalg.norm(scaling * a * b)
    assert disagreement(update, predicted) == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(
        np.linalg.norm(scaling * a * b + straight) / np.linalg.norm(scaling * a * b), rel=0.1
    )
    norms = entries.max(axis=1)
    assert np.abs(gap).max() <= scaling * update_bound(norms, rate, scaling=scaling)


def test_drift_is_a_ratio_of_numpys_norms() -> None:
    """Oracle: ``numpy.linalg.norm`` after a move at random; 1e-6 in float32."""
    model = nn.Sequential(nn.Linear(6, 3))
    adapt(model, 2, targets=("0",), seed=3)
    before = snapshot(model)
    weight = adapters(model)["0"].layer.project.weight
    start = weight.detach().numpy().copy()
    with torch.no_grad():
        weight.add_(torch.randn(2, 6, generator=torch.Generator().manual_seed(4)))
    moved = weight.detach().numpy() - start
    expected = math.sqrt(np.sum(moved.astype(float) ** 2) / np.sum(start.astype(float) ** 2))
    assert drift(model, before)["0"] == pytest.approx(expected, rel=1e-6)
