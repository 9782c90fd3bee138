"""Profiles of private steps: against plain numpy, and the edge against large noise matrices."""

import json
import math
from typing import Any

import numpy as np
import pytest

from lora_privacy.assess.spectra import LayerSpectrum, spectra
from lora_privacy.core import RandomProjection

OPTIONS: dict[str, Any] = {"rank": 6, "batch_size": 12, "seed": 2, "noise_multiplier": 0.05}


def pool(size: float = 1.8) -> dict[str, np.ndarray]:
    """Twelve records, some beyond a clip of 1, with a mean of few large singular values."""
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for name, (n, m) in {"q": (40, 60), "v": (50, 30)}.items():
        common = np.outer(rng.standard_normal(n), rng.standard_normal(m)) / math.sqrt(n * m)
        own = rng.standard_normal((12, n, m)) / math.sqrt(n * m)
        found[name] = size * rng.uniform(0.1, 1, (12, 1, 1)) * (common + 0.3 * own)
    return found


def frobenius(noised: np.ndarray, std: float) -> np.ndarray:
    """Gavish & Donoho's shrinker, from a full decomposition."""
    left, y, right = np.linalg.svd(noised / std, full_matrices=False)
    n, m = noised.shape
    inside = np.maximum((y**2 - n - m) ** 2 - 4 * n * m, 0)
    f = np.where(y > math.sqrt(n) + math.sqrt(m), np.sqrt(inside) / y, 0)
    return std * (left * f) @ right


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("method", ["dp-sgd", "dp-lora", "dp-lora-fa", "dp-flora"])
def test_a_step_in_plain_numpy(method: Any) -> None:
    """Clip, mean, noise, A and shrinker written out; all 12 records, so only noise is a draw.

    1e-9 relative. The noise is the generator's, in the order of the layers.
    """
    gradients = pool()
    found = spectra(gradients, method=method, law="orthonormal", **OPTIONS)
    a = {
        name: RandomProjection(6, g.shape[2], "orthonormal", seed=2, layer=name)._draw(0)
        for name, g in gradients.items()
    }
    released = gradients
    if method.startswith("dp-lora"):
        released = {name: np.einsum("kij,rj->kir", g, a[name]) for name, g in gradients.items()}
    total = sum((g**2).sum((1, 2)) for g in released.values())
    factor = np.minimum(1, 1 / np.sqrt(total))
    assert 0 < (factor < 1).sum() < 12
    rng = np.random.default_rng(2)
    rng.choice(12, 12, replace=False)
    std = 0.05 / 12
    for one, (name, g) in zip(found, released.items(), strict=True):
        clean = np.einsum("k,kij->ij", factor, g) / 12
        noised = clean + std * rng.standard_normal(clean.shape)
        restored = frobenius(noised, std)
        if method == "dp-flora":
            noised = noised @ a[name].T @ a[name]
        assert (one.layer, one.shape, one.noise_std) == (name, clean.shape, pytest.approx(std))
        for values, matrix in ((one.before, clean), (one.after, noised)):
            expected = np.linalg.svd(matrix)[1][:16]
            assert values == pytest.approx(expected, rel=1e-9, abs=1e-14)
        assert one.cosine_after == pytest.approx(cosine(clean, noised), rel=1e-9, abs=0)
        if method == "dp-flora":
            assert one.restored is None
            assert one.cosine_restored is None
            continue
        expected = np.linalg.svd(restored)[1][:16]
        assert one.restored == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert one.cosine_restored == pytest.approx(cosine(clean, restored), rel=1e-9, abs=0)
        assert one.cosine_restored > one.cosine_after


@pytest.mark.parametrize("method", ["dp-sgd", "dp-lora", "dp-flora"])
def test_the_edge_is_where_noise_ends(method: Any) -> None:
    """Noise far above the gradient: its largest singular value within 6 % of the edge.

    The edge is a limit for large matrices; without the stretch m/r of dp-flora it is 10 times
    off.
    """
    rng = np.random.default_rng(1)
    gradients = {"q": 1e-6 * rng.standard_normal((3, 200, 300))}
    options = {**OPTIONS, "batch_size": 3, "noise_multiplier": 2.0, "rank": 30}
    for one in spectra(gradients, method=method, law="orthonormal", **options):
        assert one.edge is not None
        assert one.after[0] == pytest.approx(one.edge, rel=0.06)
        assert len(one.after) == 16
        assert one.noise_std == pytest.approx(2 / 3)
        assert abs(one.cosine_after) < 0.1


def test_no_edge_is_claimed_for_a_gaussian_a() -> None:
    found = spectra(pool(), method="dp-flora", law="gaussian", **OPTIONS)
    assert all(one.edge is None for one in found)


def test_a_saved_spectrum_comes_back() -> None:
    for one in spectra(pool(), method="dp-lora", **OPTIONS) + spectra(
        pool(), method="dp-flora", **OPTIONS
    ):
        saved = json.loads(json.dumps(one.to_dict(), allow_nan=False))
        assert LayerSpectrum.from_dict(saved) == one
        with pytest.raises(TypeError):
            LayerSpectrum.from_dict({**saved, "colour": "grey"})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "lora"}, "must add noise"),
        ({"method": "pca"}, "method must be one of"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be positive"),
        ({"batch_size": 13}, "batch_size must lie in"),
        ({"rank": None}, "rank must be given"),
        ({"shrinker": "soft"}, "shrinker must be one of"),
        ({"method": "dp-flora", "law": "uniform"}, "law must be one of"),
    ],
)
def test_what_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        spectra(pool(), **{"method": "dp-lora", **OPTIONS, **change})


def test_a_layer_without_a_gradient_is_named() -> None:
    gradients = {**pool(), "dead": np.zeros((12, 4, 5))}
    with pytest.raises(ValueError, match="'dead' is 0"):
        spectra(gradients, method="dp-sgd", **OPTIONS)
