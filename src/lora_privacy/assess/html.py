"""One self-contained page: no script, nothing fetched, all text of the data escaped."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING

from lora_privacy.assess.tables import Table, layer_table, main_table, number
from lora_privacy.references import REFERENCES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_privacy.assess.plots import Drawing
    from lora_privacy.assess.result import Assessment, MethodResult

__all__ = ["render"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ccc; --soft: #f4f4f2;
  --warn: #8a3b12; --link: #1b4f8a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --paper: #171717; --line: #444;
  --soft: #222; --warn: #ffb38a; --link: #8ab8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.25rem 4rem; max-width: 72rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1.2rem 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid var(--line); }
p, li { max-width: 46rem; }
.banner { border: 2px solid var(--warn); color: var(--warn); padding: .5rem .8rem;
  max-width: none; }
.verdict { background: var(--soft); border-left: 5px solid var(--ink); padding: .6rem 1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { font-weight: 600; background: var(--soft); max-width: 8rem; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; } figure img { width: 100%; max-width: 52rem; background: #fff; }
figcaption { font-size: .88rem; max-width: 46rem; }
code, pre { font-size: .85rem; } pre { white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--soft); padding: .7rem; }
a { color: var(--link); } summary { cursor: pointer; padding: .3rem 0; }
@media print { .scroll { overflow: visible; } body { max-width: none; font-size: 11px; } }
"""

_CAPTIONS = {
    "noise-ratio": "The energy of the injected noise N = G(AᵀA − I), measured over predicted by "
    "its exact law. Filled: over fresh draws of A, with bars of two standard errors. Hollow: with "
    "the A of training. LoRA-FA keeps one A, a single draw, which scatters; LoRA trains its A, "
    "which then follows the gradients and may leave the prediction for good.",
    "quantiles": "One noise entry a layer over fresh draws of A. Dots on the line: the exact law "
    "holds. The dashed line is a Gaussian of the same variance; it leaves the dots in the tails.",
    "distances": "How far the noise is from a Gaussian. An entry comes close as the rank grows, "
    "never as the layer widens; a whole row stays far, and two non-zero rows or more are told "
    "apart surely, so no Gaussian mechanism can be read off.",
    "dynamics": "How far the weight change of plain SGD is from −ηs²ΣG·AᵀA. LoRA-FA and FLoRA "
    "follow it to rounding; LoRA does as far as A stays where it was.",
    "training": "Training loss (mean of 20 steps) and held-out result.",
}


def render(result: Assessment, figures: Mapping[str, Drawing]) -> str:
    """The page as text.

    Args:
        result: The assessment.
        figures: Drawings by name, as ``plots.draw_all`` returns them.
    """
    title = f"{result.model_name} on {result.train.name} ({result.train.origin})"
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width, initial-scale=1'>",
        f"<title>LoRA privacy assessment: {escape(title)}</title><style>{_STYLE}</style></head>",
        "<body><p class=banner role=note><strong>This report is itself not private.</strong> It "
        "holds losses, gradient norms and hashes computed from the training data.</p>",
        f"<h1>LoRA privacy assessment<br>{escape(title)}</h1>",
        _missing(result),
        "<h2>Is this private, and how do we know?</h2>",
        _verdict(result),
        _section_main(result),
        _figures(figures),
        _section_implied(result),
        _section_layers(result),
        _section_setting(result),
        _section_references(),
        "</body></html>",
    ]
    return "\n".join(parts)


def _missing(result: Assessment) -> str:
    if not result.missing:
        return ""
    names = escape(", ".join(result.missing))
    return (
        f"<p class=banner>Not finished: {names}. The run was interrupted; the same command with "
        "<code>--resume</code> goes on from here.</p>"
    )


def _verdict(result: Assessment) -> str:
    if not result.methods:
        return "<p class=verdict>No method finished, so nothing is said here.</p>"
    if any(method.proved.reason is None for method in result.methods):
        lines = "".join(
            f"<li><strong>{escape(m.method)}</strong>: {escape(str(m.proved))}</li>"
            for m in result.methods
        )
        return f"<div class=verdict><ul>{lines}</ul></div>"
    names = escape(", ".join(method.method for method in result.methods))
    reasons = {method.proved.reason or "" for method in result.methods}
    readings = "; ".join(
        f"ε = {number(method.implied.epsilon)}, or {number(method.flattering.epsilon)} in the "
        f"most flattering case ({escape(group)})"
        for group, method in _grouped(result)
    )
    return (
        "<div class=verdict><p><strong>No.</strong> None of these runs protects its training "
        f"data by a proved (ε, δ) bound.</p><ul><li><strong>{names}</strong>: no guarantee, "
        f"because {escape(' '.join(sorted(reasons)))}</li><li>Read as if the noise were Gaussian "
        "and independent, which it is not, an accountant would print, at δ = "
        f"{result.config.delta:g}: {readings}. This is a reading, not a guarantee, whatever "
        "its size.</li></ul><p>The projection does inject noise; its law is known exactly and "
        "measured below. But a law is not a guarantee: one A multiplies every gradient of a "
        "step, and the weight update shows the row space of A to everybody.</p></div>"
    )


def _grouped(result: Assessment) -> list[tuple[str, MethodResult]]:
    """One method for each distinct reading, with the names of all that share it."""
    groups: dict[str, list[MethodResult]] = {}
    for method in result.methods:
        if method.implied is None or method.flattering is None:
            continue
        groups.setdefault(f"{method.implied}{method.flattering}", []).append(method)
    return [(", ".join(m.method for m in group), group[0]) for group in groups.values()]


def _section_main(result: Assessment) -> str:
    if not result.methods:
        return ""
    largest = result.dev.largest_class
    base = f" Guessing the most frequent class scores {100 * largest:.1f} %." if largest else ""
    return (
        "<h2>Result</h2>"
        + _html(main_table(result))
        + f"<p>Held-out: {result.dev.examples:,} examples; intervals are 95 %, over examples, one "
        f"seed.{base} Distances and drift are medians over layers. TV is the total variation "
        "distance to a Gaussian, from 0 to 1: one noise entry (exact variance), one row of the "
        "noise and the whole matrix (published variance). “Implied ε” is a heuristic reading, "
        "not a guarantee.</p>"
    )


def _figures(figures: Mapping[str, Drawing]) -> str:
    parts = ["<h2>What the projection did</h2>"] if figures else []
    for name, figure in figures.items():
        caption = _CAPTIONS[name.split("-")[0] if name.startswith("quantiles") else name]
        if name.startswith("quantiles"):
            caption = f"{name.removeprefix('quantiles-')}: {caption}"
        data = base64.b64encode(figure.svg).decode()
        parts.append(
            f"<figure><img alt='{escape(figure.alt)}' src='data:image/svg+xml;base64,{data}'>"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return "\n".join(parts)


def _section_implied(result: Assessment) -> str:
    parts = ["<h2>The implicit-privacy reading, and why it is not a guarantee</h2>"]
    for group, method in _grouped(result):
        parts.append(f"<h3>{escape(group)}</h3><pre>{escape(str(method.implied))}</pre>")
        parts.append(
            "<p>The most flattering of these readings, with no distortion at all, which has "
            "probability 0, and all noises of a batch adding up to the same side, would be z = "
            f"{number(method.flattering.noise_multiplier)} and ε = "
            f"{number(method.flattering.epsilon)}. It is no guarantee either. What is proved:</p>"
            f"<pre>{escape(str(method.proved))}</pre>"
        )
    return "\n".join(parts)


def _section_layers(result: Assessment) -> str:
    parts = ["<h2>Layer by layer</h2>"]
    for method in result.methods:
        parts.append(
            f"<details open><summary>{escape(method.method)}: {len(method.layers)} layers"
            f"</summary>{_html(layer_table(method))}</details>"
        )
    parts.append(
        "<p>“Law gap / band”: the largest gap between the drawn and the stated distribution "
        "function of one entry; it stays below the band with probability 0.99 for all layers of "
        "a method together. “Spread of one draw”: standard deviation of the ratio when A is "
        "drawn once.</p>"
    )
    return "\n".join(parts)


def _section_setting(result: Assessment) -> str:
    rows = [(name, _shown(value)) for name, value in result.config.to_dict().items()]
    data = [
        (f"{role}, {field}", _shown(value))
        for role, part in (("train", result.train), ("held out", result.dev))
        for field, value in (
            ("origin", part.origin),
            ("examples", part.examples),
            ("classes", ", ".join(part.classes)),
            ("sha256", part.sha256),
        )
    ]
    environment = list(result.environment.items())
    table = Table(("setting", "value"), tuple((*rows, *data, *environment)))
    return f"<h2>Setting</h2><details><summary>All settings</summary>{_html(table)}</details>"


def _section_references() -> str:
    items = "".join(
        f"<li>{escape(reference.short())}: <em>{escape(reference.title)}</em></li>"
        if reference.authors
        else f"<li>{escape(reference.short())}</li>"
        for reference in REFERENCES.values()
    )
    return f"<h2>References</h2><ul>{items}</ul>"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "default" if value is None else str(value)


def _html(table: Table) -> str:
    head = "".join(f"<th scope=col>{escape(text)}</th>" for text in table.headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>"
        for row in table.rows
    )
    return (
        f"<div class=scroll tabindex=0><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )
