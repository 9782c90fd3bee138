"""The sections of the page below the answer, each from the result and its figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy.assess import markup
from lora_privacy.assess.cells import number, target_of
from lora_privacy.assess.citations import citations
from lora_privacy.assess.escaping import html_text
from lora_privacy.assess.report_tables import (
    attack_table,
    layer_table,
    membership_table,
    privacy_table,
    projection_table,
    secrets_table,
    settings_table,
    utility_table,
)
from lora_privacy.assess.tables import Table
from lora_privacy.audit.result import CAVEAT, confidence
from lora_privacy.dp.result import CAVEATS
from lora_privacy.references import REFERENCES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_privacy.assess.plots import Drawing, Section
    from lora_privacy.assess.result import Assessment, MethodResult

__all__ = ["SECTIONS", "sections"]

#: Anchor and title of every section, in order.
SECTIONS = {
    "privacy": "What is proved, and what it would cost",
    "attacks": "What attacks got",
    "utility": "What it scored and cost",
    "projection": "What the projection did",
    "layers": "Layer by layer",
    "threats": "Who attacks, and what he sees",
    "assumptions": "What must be true, and what fails",
    "setting": "Setting",
    "references": "References",
}


def sections(result: Assessment, figures: Mapping[str, Drawing]) -> str:
    """All of them as HTML."""
    bodies = {
        "privacy": _privacy(result, figures),
        "attacks": _attacks(result, figures),
        "utility": _utility(result, figures),
        "projection": _projection(result, figures),
        "layers": _layers(result),
        "threats": _threats(result),
        "assumptions": _assumptions(result),
        "setting": markup.table(settings_table(result), "Settings, data and versions", text=True),
        "references": _references(result),
    }
    return "\n".join(
        markup.section(name, title, bodies[name], wide=name in ("privacy", "attacks", "layers"))
        for name, title in SECTIONS.items()
    )


def _privacy(result: Assessment, figures: Mapping[str, Drawing]) -> str:
    target = target_of(result.config.epsilon)
    return "\n".join(
        [
            markup.table(privacy_table(result), "Privacy of each method"),
            markup.paragraph(
                "A proved ε is rounded up and one that attacks show is rounded down, both in "
                "nats. A guarantee of “none” says that no finite ε can be proved. The noise "
                "multiplier is the noise's standard deviation over the clipping norm; the price "
                "is the least that "
                f"buys {target}, for a method without noise by its private twin. What is called "
                "a reading treats the injected noise as Gaussian, fresh and independent, which "
                "it is not: it bounds nothing, whatever its size."
            ),
            _drawn(figures, "privacy"),
        ]
    )


def _attacks(result: Assessment, figures: Mapping[str, Drawing]) -> str:
    reports = [m.membership.report for m in result.methods if m.membership is not None]
    level = confidence(reports[0].significance) if reports else None
    notes = [
        CAVEAT,
        "AUC: 0.5 is blind guessing, 1 is certainty. TPR: share of the members found while so "
        "many of the others are accused wrongly (FPR).",
    ]
    if level is not None:
        notes.append(
            "The lower bound on ε is paid for by all membership attacks on a method together, at "
            f"confidence {level}, and holds although the records share one target. The intervals "
            f"of AUC hold together at confidence {level} as if records were independent, those of "
            "TPR likewise; over targets both vary more."
        )
    if any(method.update is not None for method in result.methods):
        notes.append(
            "The attack on one update looks at a single step of a few layers, whose batch it "
            "knows but for one record. Its proved limit is that of this one step without "
            "sampling: it is not the limit of the run."
        )
    if any(method.secrets is not None for method in result.methods):
        notes.append(
            "Exposure: log2 of (alternatives + 1) over the secret's rank. Brackets hold the least "
            "and the largest. The p-value is that of the exposures of all secrets that were in, "
            "if none was memorised."
        )
    reasons = dict.fromkeys(
        tpr for report in reports for _, tpr in report.rates.values() if isinstance(tpr, str)
    )
    notes += [f"No TPR: {reason}" for reason in reasons]
    left_out = {
        method.method: method.membership.report.left_out
        for method in result.methods
        if method.membership is not None and method.membership.report.left_out
    }
    if left_out:
        counts = ", ".join(f"{count:,} of {name}" for name, count in left_out.items())
        notes.append(f"Records that the reference models cannot calibrate are left out: {counts}.")
    parts = [
        markup.table(attack_table(result), "What attacks got from each method: evidence"),
        *map(markup.paragraph, notes),
        _drawn(figures, "attacks"),
    ]
    more = (
        (membership_table(result), "Every membership attack: evidence"),
        (secrets_table(result), "Exposure of planted secrets: evidence"),
    )
    parts += [markup.table(table, caption) for table, caption in more if table.rows]
    return "\n".join(parts)


def _utility(result: Assessment, figures: Mapping[str, Drawing]) -> str:
    largest = result.dev.largest_class
    base = f" Guessing the most frequent class scores {100 * largest:.1f} %." if largest else ""
    if result.config.task == "causal-lm":
        limits = "The loss has no interval: losses of single examples are not kept."
    else:
        limits = "Intervals are Clopper–Pearson's, over examples."
    return "\n".join(
        [
            markup.table(utility_table(result), "Utility and cost"),
            markup.paragraph(
                f"Held-out: {result.dev.examples:,} examples. {limits} Each method was trained "
                f"once, from one seed; no interval covers that.{base} Time includes what was "
                "measured on the way; memory is that of the process."
            ),
            _drawn(figures, "utility"),
        ]
    )


def _projection(result: Assessment, figures: Mapping[str, Drawing]) -> str:
    table = projection_table(result)
    if not table.rows and not any(f.section == "projection" for f in figures.values()):
        return markup.paragraph("No method here was measured under a projection.")
    return "\n".join(
        [
            markup.table(table, "Laws and measurements; none of them is a guarantee")
            if table.rows
            else "",
            markup.paragraph(
                "The projection does inject noise; its law is known exactly and measured here. "
                "But a law is not a guarantee: one A multiplies every gradient of a step, and "
                "the weight update shows the row space of A to everybody. TV is the total "
                "variation distance to a Gaussian, from 0 to 1: of one noise entry (exact "
                "variance), one row of the noise and the whole matrix (published variance)."
            ),
            _drawn(figures, "projection"),
        ]
    )


def _layers(result: Assessment) -> str:
    parts = []
    for method in result.methods:
        if method.layers:
            title = f"{method.method}: {len(method.layers)} layers"
            parts.append(markup.table(layer_table(method), title))
    if not parts:
        return markup.paragraph("No method here was measured under a projection.")
    parts.append(
        markup.paragraph(
            "“Law gap / band”: the largest gap between the drawn and the stated distribution "
            "function of one entry; it stays below the band with probability 0.99 for all layers "
            "of a method together. “Spread of one draw”: standard deviation of the ratio when A "
            "is drawn once."
        )
    )
    return "\n".join(parts)


def _threats(result: Assessment) -> str:
    rows: list[tuple[str, str, str]] = []
    for method in result.methods:
        if method.membership is not None:
            area = next(iter(method.membership.report.rates.values()))[0]
            rows.append((method.method, "membership", area.threat_model))
        if method.update is not None:
            rows.append((method.method, "one update", method.update.knowledge))
        if method.secrets is not None:
            rows.append((method.method, "planted secrets", method.secrets.threat_model))
    if not rows:
        return markup.paragraph("No attack was run.")
    merged = _merge((attack, sees, name) for name, attack, sees in rows)
    cells = tuple((", ".join(names), attack, sees) for (attack, sees), names in merged.items())
    table = Table(("methods", "attack", "sees and knows"), cells)
    return markup.table(table, "Threat models", text=True)


def _assumptions(result: Assessment) -> str:
    parts: list[str] = []
    proofs = _merge(
        (m.proved.method, m.proved.assumptions, m.method)
        for m in result.methods
        if m.proved.reason is None
    )
    for (accountant, assumptions), names in proofs.items():
        parts.append(f"<h3>The guarantee of {html_text(', '.join(names))} holds if</h3>")
        parts.append(markup.items([*assumptions, f"the accountant {accountant} has no mistake"]))
    if parts:
        parts.append(markup.items(CAVEATS))
    reasons = _merge(
        (m.proved.reason, (), m.method) for m in result.methods if m.proved.reason is not None
    )
    for (reason, _), names in reasons.items():
        parts.append(f"<h3>No guarantee for {html_text(', '.join(names))}</h3>")
        parts.append(markup.paragraph(f"Because {reason}"))
    readings = _merge(
        (m.implied, m.flattering, m.method)
        for m in result.methods
        if m.implied is not None and m.flattering is not None
    )
    for (implied, flattering), names in readings.items():
        parts.append(
            f"<h3>The implied ε of {html_text(', '.join(names))} is no guarantee, because "
            "these assumptions fail</h3>"
        )
        parts.append(markup.items(implied.failing_assumptions))
        parts.append(
            markup.paragraph(
                f"Reading, not a guarantee: noise multiplier {number(implied.noise_multiplier)} "
                f"and ε = {number(implied.epsilon)} at distortion {number(implied.distortion)}, "
                f"which fails with probability up to {number(implied.failure_probability)}. The "
                "most flattering reading, with no distortion at all, which has probability 0, "
                "and all noises of a batch adding up to the same side: noise multiplier "
                f"{number(flattering.noise_multiplier)} and ε = {number(flattering.epsilon)}."
            )
        )
    evidence = dict.fromkeys(line for m in result.methods for line in _evidence_assumes(m))
    if evidence:
        parts += ["<h3>The evidence assumes</h3>", markup.items(evidence)]
    return "\n".join(parts) or markup.paragraph("No method finished.")


def _evidence_assumes(method: MethodResult) -> Iterable[str]:
    if method.membership is not None:
        report = method.membership.report
        for rates in report.rates.values():
            for rate in rates:
                if not isinstance(rate, str):
                    yield from rate.assumptions
        if isinstance(report.epsilon, str):
            yield f"(no lower bound on ε for {method.method}: {report.epsilon})"
        else:
            yield from report.epsilon.assumptions
    if method.update is not None:
        yield from method.update.auc.assumptions


def _references(result: Assessment) -> str:
    used = [REFERENCES[key] for key in citations(result)]
    return markup.items(
        f"{work.short()}: {work.title}" if work.authors else work.short() for work in used
    ) + markup.paragraph(
        "These are the works behind the numbers above; references.bib holds them."
    )


def _drawn(figures: Mapping[str, Drawing], section: Section) -> str:
    return "\n".join(markup.figure(f) for f in figures.values() if f.section == section)


def _merge(rows: Iterable[tuple]) -> dict[tuple, list[str]]:
    """Rows that agree in all but the last part, with those parts."""
    found: dict[tuple, list[str]] = {}
    for *key, name in rows:
        found.setdefault(tuple(key), []).append(name)
    return found
