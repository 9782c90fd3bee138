"""Which works stand behind the numbers of one assessment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy.assess.game import PAPERS
from lora_privacy.assess.methods import recipe_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_privacy.assess.result import Assessment, MethodResult

__all__ = ["citations"]

_TRAINS = {"lora": "hu-lora-2022", "lora-fa": "zhang-lora-fa-2023", "flora": "flora-2024"}


def citations(result: Assessment) -> tuple[str, ...]:
    """Keys into ``lora_privacy.references``, in the order in which the report needs them."""
    keys = dict.fromkeys(key for method in result.methods for key in _of(method))
    return tuple(keys)


def _of(method: MethodResult) -> Iterator[str]:
    way = recipe_of(method.method)
    if way.trains in _TRAINS:
        yield _TRAINS[way.trains]
    if way.private:
        yield "abadi-dpsgd-2016"
    yield from method.proved.references
    for reading in (method.implied, method.flattering):
        if reading is not None:
            yield from reading.references
    if method.curve.scores[-1].accuracy is not None:
        yield "clopper-pearson-1934"
    if method.layers:
        # Entry, row and matrix; the band of the check.
        yield from ("p1-implicit-2024", "gaunt-vg-2014", "muirhead-1982")
        yield from ("p2-projections-2026", "massart-dkw-1990")
    yield from _of_attacks(method)
    if way.denoise or method.spectra:
        yield from ("p3-denoising-2025", "gavish-shrinkage-2017")


def _of_attacks(method: MethodResult) -> Iterator[str]:
    if method.membership is not None:
        report = method.membership.report
        for name, rates in report.rates.items():
            yield PAPERS[name]
            yield from (
                key for rate in rates if not isinstance(rate, str) for key in rate.references
            )
        if not isinstance(report.epsilon, str):
            yield from report.epsilon.references
    if method.update is not None:
        yield from method.update.auc.references
    if method.secrets is not None and method.secrets.scores:
        yield from method.secrets.scores[0].exposure.to_dict()["references"]
