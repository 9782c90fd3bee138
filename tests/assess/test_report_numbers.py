"""Every number of the main tables, recomputed from report.json by code of its own."""

import html as escaped
import json
import math
import re
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from example_assessment import causal_assessment, example_assessment
from scipy import stats

from lora_privacy.assess import html

Json = Any  # what json.loads gives
Cells = dict[str, str]  # heading -> cell
NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?(?:e-?[0-9]+)?")


def tables_of(page: str) -> dict[str, dict[str, Cells]]:
    """Caption -> row name -> heading -> cell, read from the page's text."""

    def words(tag: str, text: str) -> list[str]:
        found = re.findall(rf"<{tag}(?: [^>]*)?>(.*?)</{tag}>", text, re.DOTALL)
        return [escaped.unescape(one) for one in found]

    found: dict[str, dict[str, Cells]] = {}
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        head, body = re.findall(r"<thead>(.*?)</thead><tbody>(.*?)</tbody>", table, re.DOTALL)[0]
        rows = {}
        for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL):
            cells = words("th", row) + words("td", row)
            rows[cells[0]] = dict(zip(words("th", head), cells, strict=True))
        found[words("caption", table)[0]] = rows
    return found


@pytest.fixture(scope="module")
def report() -> tuple[dict[str, dict[str, Cells]], Json]:
    result = example_assessment()
    data = json.loads(json.dumps(result.to_dict()))
    return tables_of(html.render(result, {})), data


def numbers(cell: str) -> list[float]:
    return [float(text.replace(",", "")) for text in NUMBER.findall(cell)]


def step(cell: str, index: int = 0) -> float:
    """What the last digit shown is worth."""
    text = NUMBER.findall(cell)[index]
    mantissa, _, power = text.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(power or 0) - decimals)


def near(cell: str, value: float, index: int = 0) -> bool:
    """Whether a number of the cell is ``value``, rounded to what is shown."""
    return abs(numbers(cell)[index] - value) <= 0.501 * step(cell, index)


def above(cell: str, value: float, index: int = 0) -> bool:
    """Rounded up, by less than one in the last digit."""
    return value - 1e-12 <= numbers(cell)[index] < value + step(cell, index)


def below(cell: str, value: float, index: int = 0) -> bool:
    return value - step(cell, index) < numbers(cell)[index] <= value + 1e-12


def check_rate(cell: str, rate: Json) -> None:
    if "reason" in rate:
        assert cell == "none"
        return
    assert near(cell, rate["value"], 0)
    assert below(cell, rate["low"], 1)
    assert above(cell, rate["high"], 2)


def column(row: Cells, part: str) -> str:
    found = [cell for heading, cell in row.items() if part in heading]
    assert len(found) == 1, (part, list(row))
    return found[0]


def each(report: tuple[dict[str, dict[str, Cells]], Json], caption: str) -> list[tuple]:
    tables, data = report
    rows = tables[next(name for name in tables if name.startswith(caption))]
    assert set(rows) <= {method["method"] for method in data["methods"]}
    return [(rows[m["method"]], m) for m in data["methods"] if m["method"] in rows]


def test_privacy(report: tuple) -> None:
    rows = each(report, "Privacy of each method")
    assert len(rows) == 6
    for row, method in rows:
        proved, plan, price = method["proved"], method["noise"], method["price"]
        cell = column(row, "proved ε")
        if proved["epsilon"] == "inf":
            assert cell == "none"
        else:
            assert above(cell, proved["epsilon"])
        assert f"δ = {proved['delta']!r}" in " ".join(row)
        for heading, name in (
            ("multiplier added", "noise_multiplier"),
            ("sampling rate", "sample_rate"),
            ("private steps", "steps"),
        ):
            cell = column(row, heading)
            assert cell == "–" if plan is None else near(cell, plan[name])
        cell = column(row, "price")
        assert cell == "out of reach" if price is None else above(cell, price["noise_multiplier"])
        for heading, name in (("implied", "implied"), ("flattering", "flattering")):
            cell, reading = column(row, heading), method[name]
            if reading is None:
                assert cell == "–"
            elif reading["epsilon"] == "inf":
                assert cell == "∞"
            else:
                assert near(cell, reading["epsilon"])
        cell, member = column(row, "attacks show"), method["membership"]
        if member is None:
            assert cell == "not finished"
        else:
            assert below(cell, member["epsilon"]["epsilon"])


def test_attacks(report: tuple) -> None:
    """AUC of the curves by the trapezoid rule; p-values by chi-square; bits from the ranks."""
    for row, method in each(report, "What attacks got"):
        member = method["membership"]
        cells = column(row, "RMIA AUC"), column(row, "RMIA TPR")
        if member is None:
            assert cells == ("not finished", "not finished")
        else:
            rates = next(one for one in member["attacks"] if one["attack"] == "RMIA")
            check_rate(cells[0], rates["auc"])
            check_rate(cells[1], rates["tpr"])
            fpr, tpr = member["curves"]["RMIA"]
            area = float(np.trapezoid(tpr, fpr))
            assert near(cells[0], area, 0)
        cell, update = column(row, "white-box AUC"), method["update"]
        if update is None:
            assert cell == "not finished"
            assert column(row, "its proved limit") == "–"
        else:
            check_rate(cell, update["auc"])
            limit = column(row, "its proved limit")
            best = update["best_auc"]
            assert limit == "–" if best is None else above(limit, best)
        secrets = method["secrets"]
        cells = column(row, "secrets put in"), column(row, "p-value")
        if secrets is None:
            assert cells == ("not run", "not run")
            continue
        bits = [
            math.log2((s["exposure"]["alternatives"] + 1) / s["exposure"]["rank"])
            for s in secrets["scores"]
            if s["included"]
        ]
        if not bits:
            assert cells == ("–", "–")
            continue
        assert near(cells[0], statistics.median(bits), 0)
        assert below(cells[0], min(bits), 1)
        assert above(cells[0], max(bits), 2)
        p_value = stats.chi2.sf(2 * math.log(2) * sum(bits), 2 * len(bits))
        assert above(cells[1], float(p_value))


def test_utility(report: tuple) -> None:
    """Limits of the accuracy by scipy's exact interval."""
    rows = each(report, "Utility and cost")
    assert len(rows) == 6
    for row, method in rows:
        curve = method["curve"]
        score = curve["scores"][-1]
        cell = column(row, "accuracy")
        right = round(score["accuracy"] * score["examples"])
        limits = stats.binomtest(right, score["examples"]).proportion_ci(0.95, "exact")
        assert near(cell, 100 * score["accuracy"], 0)
        assert below(cell, 100 * limits.low, 1)
        assert above(cell, 100 * limits.high, 2)
        assert near(column(row, "loss"), score["loss"])
        assert near(column(row, "trained numbers"), method["trained_parameters"])
        assert near(column(row, "steps"), curve["steps"])
        assert near(column(row, "seconds a step"), curve["wall_seconds"] / curve["steps"])
        assert near(column(row, "memory"), curve["peak_bytes"] / 2**20)


def test_projection(report: tuple) -> None:
    rows = each(report, "Laws and measurements")
    assert [method["method"] for _, method in rows] == ["lora", "flora"]
    for row, method in rows:
        layers = method["layers"]
        cell = column(row, "measured / predicted")
        assert near(cell, statistics.fmean(layer["fresh_ratio"] for layer in layers), 0)
        errors = math.hypot(*(layer["fresh_standard_error"] for layer in layers)) / len(layers)
        assert near(cell, 2 * errors, 1)
        for heading, name, pick in _DISTANCES:
            assert near(column(row, heading), pick([layer[name] for layer in layers]))
        drift = list(method["drift"].values())
        cell = column(row, "drift of A")
        assert near(cell, 100 * statistics.median(drift)) if drift else cell == "–"
        gaps = [layer["disagreement"] for layer in method["dynamics"]]
        assert near(column(row, "SGD"), 100 * statistics.median(gaps))


_DISTANCES: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("entry TV", "tv_median", statistics.median),
    ("row TV", "joint_tv", statistics.median),
    ("matrix TV", "matrix_tv", max),
)


def test_composition_is_the_sum_of_what_is_proved(report: tuple) -> None:
    result = example_assessment()
    page = escaped.unescape(html.render(result, {}))
    proved = [m["proved"] for m in report[1]["methods"] if m["proved"]["epsilon"] != "inf"]
    assert len(proved) == 3
    said = re.findall(r"by simple composition, ε ≤ (\S+) at δ ≤ ([^;]+);", page)[0]
    assert above(said[0], sum(one["epsilon"] for one in proved))
    assert above(said[1], sum(one["delta"] for one in proved))


def test_proved_numbers_against_another_accountant(report: tuple) -> None:
    """Oracle: dp-accounting, from the plan in the JSON; ε, and what an attack is left with."""
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    method = next(m for m in report[1]["methods"] if m["method"] == "dp-sgd")
    plan, delta = method["noise"], method["proved"]["delta"]
    spent = pld.from_gaussian_mechanism(
        plan["noise_multiplier"],
        sampling_prob=plan["sample_rate"],
        value_discretization_interval=1e-3,
    ).self_compose(plan["steps"])
    oracle = spent.get_epsilon_for_delta(delta)
    assert method["proved"]["epsilon"] == pytest.approx(oracle, rel=5e-3, abs=0)
    fpr = 0.01
    grid = [i / 100 for i in range(500)]
    best = min(math.exp(e) * fpr + spent.get_delta_for_epsilon(e) for e in grid)
    page = escaped.unescape(html.render(example_assessment(), {}))
    said = page.split("<h3>dp-sgd</h3>")[1].split("</div>")[0]
    rate = re.findall(r"more often than in (\S+) % of cases, at 1 % false alarms", said)[0]
    assert float(rate) == pytest.approx(100 * best, rel=0.01, abs=0)


def test_a_language_model_has_losses_and_no_accuracy() -> None:
    result = causal_assessment()
    rows = tables_of(html.render(result, {}))["Utility and cost"]
    assert {column(row, "loss") for row in rows.values()} == {"3.2100"}
    assert not any("accuracy" in heading for row in rows.values() for heading in row)
