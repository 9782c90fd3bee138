"""What importing a package costs, and that its public names are there."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import lora_privacy

LIGHT = (
    "lora_privacy.noise",
    "lora_privacy.dp",
    "lora_privacy.audit",
    "lora_privacy.laws",
    "lora_privacy.references",
    "lora_privacy.plots",
)
HEAVY = ("torch", "opacus", "transformers", "peft", "matplotlib", "pandas")
PACKAGES = [
    "lora_privacy",
    *(f"lora_privacy.{module.name}" for module in pkgutil.iter_modules(lora_privacy.__path__)),
]


def _loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    script = f"{code}\nimport sys\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_laws_and_accounting_need_no_torch() -> None:
    """Importing the light packages, with every public name, and using the accountant."""
    code = "\n".join(
        [
            *(f"import {name}" for name in LIGHT),
            "from lora_privacy import audit, dp, noise",
            "for package in (audit, dp, noise):",
            "    for name in getattr(package, '__all__', ()):",
            "        getattr(package, name)",
            "bound = dp.RdpAccountant().compose(dp.SampledGaussian(1.0, 0.01), 10).epsilon(1e-5)",
            "assert bound.epsilon > 0",
            "dp.implied_privacy(layers=[(768, 8)], batch_size=32, dataset_size=3200, steps=1,",
            "                   delta=1e-5, distortion=0.5)",
            "audit.epsilon_one_run(canaries=100, guesses=50, correct=40, delta=1e-5,",
            "                      significance=0.05)",
        ]
    )
    loaded = _loaded_after(code)
    assert "scipy" in loaded
    assert not loaded & set(HEAVY)


def test_the_check_sees_a_heavy_import() -> None:
    """The bridge does load torch and opacus, so the check above can fail."""
    assert {"torch", "opacus"} <= _loaded_after("import lora_privacy.dp.opacus")


def test_importing_the_package_loads_none_of_its_rooms() -> None:
    """A lazy package loads a room when a name is asked for."""
    script = "import lora_privacy.dp, sys; print(*(m for m in sys.modules if 'lora' in m))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert "lora_privacy.dp.rdp" not in done.stdout.split()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_resolves(package: str) -> None:
    """``__all__`` is free of doubles, and each name is there and in ``dir``."""
    module = importlib.import_module(package)
    names = list(getattr(module, "__all__", ()))
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(module, name) is not None
        assert name in dir(module)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    """A misspelt name must not import as something else."""
    with pytest.raises(AttributeError, match="no attribute 'RdpAcountant'"):
        _ = importlib.import_module("lora_privacy.dp").RdpAcountant


def test_public_names_of_dp() -> None:
    """The list is a contract: a change here is a change for users."""
    dp = importlib.import_module("lora_privacy.dp")
    assert set(dp.__all__) == {
        "Accountant",
        "Adjacency",
        "Aggregation",
        "AttestedLedger",
        "Calibration",
        "Event",
        "GaussianEvent",
        "ImpliedPrivacy",
        "NoisedProjection",
        "PairDivergence",
        "PldAccountant",
        "PrivacyBound",
        "PrivacyCurve",
        "ProjectedGaussian",
        "ProjectionAttestation",
        "RdpAccountant",
        "SampledGaussian",
        "SketchRelease",
        "VectorFamily",
        "VectorProjection",
        "calibrate",
        "calibrate_rank",
        "calibrate_steps",
        "event_rdp",
        "implied_noise_multiplier",
        "implied_privacy",
        "matrix_projection",
        "privacy_curve",
        "sampled_gaussian_bounds",
        "sampled_gaussian_rdp",
        "vector_projection_bound",
    }
