"""What an assessment found: frozen results, saved as report.json beside the page and figures."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_privacy._plain import plain
from lora_privacy.assess.files import read_json, write_bytes, write_json, write_text
from lora_privacy.references import bibtex

if TYPE_CHECKING:
    from lora_privacy.assess.config import AssessConfig
    from lora_privacy.assess.dynamics import LayerDynamics
    from lora_privacy.assess.measure import LayerNoise
    from lora_privacy.assess.membership import Membership
    from lora_privacy.assess.noise_plan import NoisePlan
    from lora_privacy.assess.secrets import SecretsResult
    from lora_privacy.assess.spectra import LayerSpectrum
    from lora_privacy.assess.training import TrainingCurve
    from lora_privacy.assess.updates import UpdateAttack
    from lora_privacy.dp import ImpliedPrivacy, PrivacyBound

__all__ = ["NOTICE", "Assessment", "DataSummary", "MethodResult", "versions"]

NOTICE = (
    "It holds losses, gradient norms, singular values, attack results, class names and hashes "
    "computed from the training data, and settings with their paths, outside of every guarantee. "
    "Its seed, with the data, tells the planted secrets and who was in which audited training set."
)
"""What stands at the top of every report."""

_PACKAGES = ("lora-privacy", "torch", "numpy", "scipy", "transformers", "peft", "opacus")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """Which data a run used.

    Attributes:
        name: Name of the set.
        origin: Hub id, file name or ``synthetic seed=…``.
        examples: Number used.
        classes: Class names; empty for a language model.
        largest_class: Share of the most frequent class; None for a language model.
        sha256: Hash of the texts and labels used. It identifies the data: keep it with them.
    """

    name: str
    origin: str
    examples: int
    classes: tuple[str, ...]
    largest_class: float | None
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodResult:
    """One row of the assessment.

    Attributes:
        method: Its name, such as ``"lora"`` or ``"dp-lora+denoise"``.
        trained_parameters: Numbers that the optimiser moves, the head included.
        curve: Loss, held-out score, time and memory.
        drift: ‖A_T − A_0‖/‖A_0‖ after training, a layer; empty where A is fixed or fresh.
        shapes: (out_features, rank) of every adapted layer.
        layers: Noise, measured and predicted, of every layer that had a gradient; empty for
            private methods, whose noise is added, and where nothing is projected.
        dynamics: The check of the linearised dynamics, a layer; empty when left out.
        proved: The proved ε, or ``inf`` with the reason.
        implied: The implicit-privacy reading at the honest distortion. Not a guarantee. None
            where nothing is projected, and for private methods.
        flattering: The most flattering reading: coherent noises and no distortion at all, which
            has probability 0. Not a guarantee either.
        noise: What a private method added; None without noise.
        price: The noise with which the same method would cost the target ε; None if no noise
            within reach does.
        secrets: Exposure of the planted secrets; None where none were planted.
        membership: What membership attacks got; None when left out or not finished.
        update: What an attack on one update got; None likewise.
        spectra: Singular values of one update of a private method, before and after its noise.
    """

    method: str
    trained_parameters: int
    curve: TrainingCurve
    drift: dict[str, float]
    shapes: tuple[tuple[int, int], ...]
    layers: tuple[LayerNoise, ...]
    dynamics: tuple[LayerDynamics, ...]
    proved: PrivacyBound
    implied: ImpliedPrivacy | None
    flattering: ImpliedPrivacy | None
    noise: NoisePlan | None = None
    price: NoisePlan | None = None
    secrets: SecretsResult | None = None
    membership: Membership | None = None
    update: UpdateAttack | None = None
    spectra: tuple[LayerSpectrum, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; infinities are the string ``"inf"``."""
        data = {
            name: getattr(self, name)
            for name in ("method", "trained_parameters", "drift", "shapes")
        }
        data["curve"] = asdict(self.curve)
        data["layers"] = [asdict(layer) for layer in self.layers]
        data["dynamics"] = [asdict(layer) for layer in self.dynamics]
        for name in ("noise", "price"):
            plan = getattr(self, name)
            data[name] = None if plan is None else asdict(plan)
        for name in ("proved", "implied", "flattering", "secrets", "membership", "update"):
            part = getattr(self, name)
            data[name] = None if part is None else part.to_dict()
        data["spectra"] = [layer.to_dict() for layer in self.spectra]
        return plain(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """The result of ``assess``.

    Attributes:
        config: What was asked.
        model_name: The model's own name or the one asked for.
        train: Data trained on. dev: Data held out.
        methods: Finished methods, in the order asked.
        missing: Methods asked for that did not finish (interrupted), or that lack attacks.
        environment: Versions of what computed the numbers.
    """

    config: AssessConfig
    model_name: str
    train: DataSummary
    dev: DataSummary
    methods: tuple[MethodResult, ...]
    missing: tuple[str, ...]
    environment: dict[str, str]

    @classmethod
    def load(cls, folder: str | Path) -> Assessment:
        """Read what ``save`` wrote; the privacy statements are computed anew, never read.

        Raises:
            StorageError: ``report.json`` is missing or damaged, or of another version.
        """
        from lora_privacy.assess.stored import assessment_from_dict

        return assessment_from_dict(read_json(Path(folder) / "report.json"))

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; infinities are the string ``"inf"``."""
        return {
            "notice": f"This report is itself not private. {NOTICE}",
            "config": self.config.to_dict(),
            "model": self.model_name,
            "train": plain(asdict(self.train)),
            "dev": plain(asdict(self.dev)),
            "methods": [method.to_dict() for method in self.methods],
            "missing": list(self.missing),
            "environment": self.environment,
        }

    def save(self, folder: str | Path) -> Path:
        """Write report.json, report.html, references.bib, figures and tables; return the page.

        Args:
            folder: Made if absent; the files named above are replaced, others are left alone.
        """
        # Drawing is imported here: matplotlib is not needed to compute or to hold a result.
        from lora_privacy.assess import html, plots
        from lora_privacy.assess.latex import latex_table
        from lora_privacy.assess.report_tables import all_tables

        folder = Path(folder)
        for part in ("figures", "tables"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        write_json(folder / "report.json", self.to_dict())
        figures = plots.draw_all(self)
        for name, figure in figures.items():
            for ending in ("svg", "png", "pdf"):
                write_bytes(folder / "figures" / f"{name}.{ending}", getattr(figure, ending))
        for name, table in all_tables(self).items():
            for ending, text in (("tex", latex_table(table)), ("md", table.markdown())):
                write_text(folder / "tables" / f"{name}.{ending}", f"{text}\n")
        page = folder / "report.html"
        write_text(page, html.render(self, figures))
        write_text(folder / "references.bib", f"{self.cite()}\n")
        return page

    def cite(self) -> str:
        """BibTeX of the works behind the numbers of this report; empty where there are none."""
        from lora_privacy.assess.citations import citations

        keys = citations(self)
        return bibtex(*keys) if keys else ""

    def _repr_html_(self) -> str:
        from lora_privacy.assess.html import notebook

        return notebook(self)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that computed the numbers."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
