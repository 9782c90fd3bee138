"""The tables of the page: what a method costs, what is proved, what attacks got, what A did."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_privacy.assess.cells import (
    NONE,
    at_most,
    interval,
    median,
    number,
    rate_cell,
    score_cell,
    target_of,
)
from lora_privacy.assess.methods import recipe_of
from lora_privacy.assess.tables import (
    Table,
    audited_cell,
    implied_cell,
    membership_cell,
    price_cell,
    proved_cell,
    short_names,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_privacy.assess.result import Assessment, DataSummary, MethodResult
    from lora_privacy.assess.secrets import SecretsResult

__all__ = [
    "all_tables",
    "attack_table",
    "layer_table",
    "membership_table",
    "privacy_table",
    "projection_table",
    "secrets_table",
    "settings_table",
    "utility_table",
]


def all_tables(result: Assessment) -> dict[str, Table]:
    """Every table with a row, by the name of its file."""
    tables = {
        "privacy": privacy_table(result),
        "attacks": attack_table(result),
        "membership": membership_table(result),
        "secrets": secrets_table(result),
        "utility": utility_table(result),
        "projection": projection_table(result),
        **{f"layers-{method.method}": layer_table(method) for method in result.methods},
        "settings": settings_table(result),
    }
    return {name: table for name, table in tables.items() if table.rows}


def utility_table(result: Assessment) -> Table:
    """What each method scored on held-out data, and what it cost to train."""
    causal = result.config.task == "causal-lm"
    headings = (
        "method",
        *(() if causal else ("held-out accuracy, % [95 %]",)),
        "held-out loss, nats",
        "trained numbers",
        "steps",
        "seconds a step",
        "peak memory, MiB",
    )
    rows = []
    for method in result.methods:
        curve = method.curve
        score, memory = curve.scores[-1], curve.peak_bytes
        rows.append(
            (
                method.method,
                *(() if causal else (score_cell(score),)),
                f"{score.loss:.4f}",
                f"{method.trained_parameters:,}",
                f"{curve.steps:,}",
                number(curve.wall_seconds / curve.steps, 2),
                "unknown" if memory is None else f"{memory / 2**20:,.0f}",
            )
        )
    return Table(headings, tuple(rows))


def privacy_table(result: Assessment) -> Table:
    """What is proved, what an attack shows, what the target would cost, and the readings."""
    config = result.config
    headings = (
        "method",
        f"guarantee: proved ε ≤, at δ = {config.delta!r}",
        "noise multiplier added",
        "sampling rate",
        "private steps",
        "evidence: attacks show ε ≥",
        f"price: noise multiplier for {target_of(config.epsilon)}",
        "reading, not a guarantee: implied ε",
        "reading, not a guarantee: most flattering ε",
    )
    rows = []
    for method in result.methods:
        plan = method.noise
        rows.append(
            (
                method.method,
                proved_cell(method),
                NONE if plan is None else number(plan.noise_multiplier, 5),
                NONE if plan is None else number(plan.sample_rate),
                NONE if plan is None else f"{plan.steps:,}",
                audited_cell(method, result),
                price_cell(method),
                implied_cell(method.implied),
                implied_cell(method.flattering),
            )
        )
    return Table(headings, tuple(rows))


def attack_table(result: Assessment) -> Table:
    """The strongest evidence of each kind, with its limits."""
    fpr = _fpr(result)
    headings = (
        "method",
        "membership: RMIA AUC",
        f"RMIA TPR at FPR {fpr:g}",
        "membership attacks show ε ≥",
        "one update: white-box AUC",
        "its proved limit ≤",
        "secrets put in: exposure, bits, median [least, most]",
        "their p-value ≤",
    )
    rows = []
    for method in result.methods:
        update, secrets = method.update, method.secrets
        best = None if update is None else update.best_auc
        rows.append(
            (
                method.method,
                membership_cell(method, result, "RMIA", "auc"),
                membership_cell(method, result, "RMIA", "tpr"),
                audited_cell(method, result),
                _update_absent(method, result) if update is None else rate_cell(update.auc),
                NONE if best is None else at_most(best),
                "not run" if secrets is None else _bits(secrets, included=True),
                "not run" if secrets is None else _p_value(secrets.p_value_in),
            )
        )
    return Table(headings, tuple(rows))


def membership_table(result: Assessment) -> Table:
    """Every membership attack; a row an attack and method."""
    headings = (
        "method",
        "attack",
        "AUC",
        f"TPR at FPR {_fpr(result):g}",
        "records",
        "members",
        "reference models",
    )
    rows = []
    for method in result.methods:
        found = method.membership
        for name, (area, tpr) in () if found is None else found.report.rates.items():
            assert found is not None
            counts = (f"{found.records:,}", f"{found.members:,}", f"{found.references:,}")
            rows.append((method.method, name, rate_cell(area), rate_cell(tpr), *counts))
    return Table(headings, tuple(rows))


def secrets_table(result: Assessment) -> Table:
    """Exposure of the planted secrets: those in, and those out, which none can have memorised."""
    headings = (
        "method",
        "secrets in",
        "secrets out",
        "exposure in, bits: median [least, most]",
        "exposure out, bits: median [least, most]",
        "most there can be",
        "p-value ≤, in",
        "p-value ≤, out (a check)",
    )
    rows = []
    for method in result.methods:
        secrets = method.secrets
        if secrets is None or not secrets.scores:
            continue
        inside = sum(score.included for score in secrets.scores)
        rows.append(
            (
                method.method,
                str(inside),
                str(len(secrets.scores) - inside),
                _bits(secrets, included=True),
                _bits(secrets, included=False),
                f"{max(score.most_bits for score in secrets.scores):.2f}",
                _p_value(secrets.p_value_in),
                _p_value(secrets.p_value_out),
            )
        )
    return Table(headings, tuple(rows))


def projection_table(result: Assessment) -> Table:
    """What A did to the gradients of each method that has one: laws and measurements."""
    headings = (
        "method",
        "noise measured / predicted, ± 2 standard errors",
        "entry TV, median",
        "row TV, median",
        "matrix TV, largest",
        "drift of A, median %",
        "SGD: ΔW off −ηs²ΣGAᵀA, median %",
    )
    rows = []
    for method in result.methods:
        layers = method.layers
        if not layers and not method.drift and not method.dynamics:
            continue
        rows.append(
            (
                method.method,
                _pooled_ratio(method) if layers else NONE,
                number(median([layer.tv_median for layer in layers])) if layers else NONE,
                number(median([layer.joint_tv for layer in layers])) if layers else NONE,
                number(max(layer.matrix_tv for layer in layers)) if layers else NONE,
                _median_percent(method.drift.values()),
                _median_percent(layer.disagreement for layer in method.dynamics),
            )
        )
    return Table(headings, tuple(rows))


def layer_table(method: MethodResult) -> Table:
    """One row a layer: shapes, noise ratios, law, distances and dynamics; none without noise."""
    headings = (
        "layer",
        "n × m",
        "r",
        "law of A",
        "rms ‖G‖",
        "ratio in training",
        "A's seen",
        "ratio, fresh A",
        "spread of one draw",
        "law gap / band",
        "entry TV, median",
        "entry TV, largest",
        "its proved bound",
        "row TV",
        "matrix TV",
        "drift of A, %",
        "SGD: ΔW off −ηs²ΣGAᵀA, %",
    )
    gaps = {layer.layer: layer.disagreement for layer in method.dynamics}
    names = short_names([layer.layer for layer in method.layers])
    rows = [
        (
            name,
            f"{layer.out_features} × {layer.in_features}",
            str(layer.rank),
            layer.law,
            number(layer.gradient_norm),
            number(layer.training_ratio),
            str(layer.projections),
            f"{layer.fresh_ratio:.4f} ± {2 * layer.fresh_standard_error:.4f}",
            number(layer.one_draw_spread, 2),
            f"{layer.entry.distance:.4f} / {layer.entry.band:.4f}",
            number(layer.tv_median),
            number(layer.tv_largest),
            at_most(layer.tv_bound),
            number(layer.joint_tv),
            number(layer.matrix_tv),
            number(100 * method.drift[layer.layer], 2) if layer.layer in method.drift else NONE,
            number(100 * gaps[layer.layer], 2) if layer.layer in gaps else NONE,
        )
        for name, layer in zip(names, method.layers, strict=True)
    ]
    return Table(headings, tuple(rows))


def settings_table(result: Assessment) -> Table:
    """Everything that decides the numbers: settings, data and versions."""
    rows = [(name, _shown(value)) for name, value in result.config.to_dict().items()]
    for role, part in (("train", result.train), ("held out", result.dev)):
        rows += [(f"{role}, {name}", text) for name, text in _data_rows(part)]
    return Table(("setting", "value"), (*rows, *result.environment.items()))


def _data_rows(data: DataSummary) -> Iterable[tuple[str, str]]:
    yield "name", data.name
    yield "origin", data.origin
    yield "examples", f"{data.examples:,}"
    yield "classes", ", ".join(data.classes) or NONE
    yield "sha256", data.sha256


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "default" if value is None else str(value)


def _fpr(result: Assessment) -> float:
    """The false positive rate of the report; all methods were asked at one."""
    rates = (m.membership.report.fpr for m in result.methods if m.membership is not None)
    return next(rates, 0.01)


def _update_absent(method: MethodResult, result: Assessment) -> str:
    asked = result.config.update_games and not recipe_of(method.method).scaling
    return "not finished" if asked else "not run"


def _bits(secrets: SecretsResult, *, included: bool) -> str:
    """Median exposure with the range it came from: few secrets, so the range is the interval."""
    found = [score.bits for score in secrets.scores if score.included is included]
    if not found:
        return NONE
    return interval(median(found), min(found), max(found), places=2)


def _p_value(value: float | None) -> str:
    return NONE if value is None else at_most(value, 2)


def _median_percent(values: Iterable[float]) -> str:
    found = list(values)
    return number(100 * median(found), 2) if found else NONE


def _pooled_ratio(method: MethodResult) -> str:
    """Mean over layers of the fresh-draw ratio, ± 2 standard errors; layers draw separately."""
    count = len(method.layers)
    mean = sum(layer.fresh_ratio for layer in method.layers) / count
    error = math.sqrt(sum(layer.fresh_standard_error**2 for layer in method.layers)) / count
    return f"{mean:.4f} ± {2 * error:.4f}"
