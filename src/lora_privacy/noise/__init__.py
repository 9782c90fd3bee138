"""Laws of the noise that a random projection injects into a gradient, and their distances.

A law is not a guarantee: nothing in this package returns an ε. numpy and scipy only, no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_privacy._lazy import attach

if TYPE_CHECKING:
    from lora_privacy.noise.bounds import berry_esseen_bound, lyapunov_ratio, tv_bound
    from lora_privacy.noise.empirical import EmpiricalNoise
    from lora_privacy.noise.entry import EntryNoise
    from lora_privacy.noise.gaussianity import (
        Distance,
        kl_to_gaussian,
        kolmogorov_to_gaussian,
        maximal_coupling,
        tv_of_entries,
        tv_to_gaussian,
    )
    from lora_privacy.noise.jl import jl_distortion, jl_failure, jl_probability
    from lora_privacy.noise.joint import joint_tv_to_gaussian, matrix_tv_to_gaussian
    from lora_privacy.noise.moments import (
        WishartMoments,
        expected_noise_energy,
        noise_covariance,
        noise_energy_variance,
        noise_variance,
        wishart_moments,
    )
    from lora_privacy.noise.row import RowNoise
    from lora_privacy.noise.shapes import LayerShape, model_shapes
    from lora_privacy.noise.table import LawsRow, LawsTable, laws_table

__all__ = [
    "Distance",
    "EmpiricalNoise",
    "EntryNoise",
    "LawsRow",
    "LawsTable",
    "LayerShape",
    "RowNoise",
    "WishartMoments",
    "berry_esseen_bound",
    "expected_noise_energy",
    "jl_distortion",
    "jl_failure",
    "jl_probability",
    "joint_tv_to_gaussian",
    "kl_to_gaussian",
    "kolmogorov_to_gaussian",
    "laws_table",
    "lyapunov_ratio",
    "matrix_tv_to_gaussian",
    "maximal_coupling",
    "model_shapes",
    "noise_covariance",
    "noise_energy_variance",
    "noise_variance",
    "tv_bound",
    "tv_of_entries",
    "tv_to_gaussian",
    "wishart_moments",
]

if not TYPE_CHECKING:  # checkers read the imports above; these would hide a misspelt name
    __getattr__, __dir__ = attach(
        __name__,
        {
            "Distance": "gaussianity",
            "EmpiricalNoise": "empirical",
            "EntryNoise": "entry",
            "LawsRow": "table",
            "LawsTable": "table",
            "LayerShape": "shapes",
            "RowNoise": "row",
            "WishartMoments": "moments",
            "berry_esseen_bound": "bounds",
            "expected_noise_energy": "moments",
            "jl_distortion": "jl",
            "jl_failure": "jl",
            "jl_probability": "jl",
            "joint_tv_to_gaussian": "joint",
            "kl_to_gaussian": "gaussianity",
            "kolmogorov_to_gaussian": "gaussianity",
            "laws_table": "table",
            "lyapunov_ratio": "bounds",
            "matrix_tv_to_gaussian": "joint",
            "maximal_coupling": "gaussianity",
            "model_shapes": "shapes",
            "noise_covariance": "moments",
            "noise_energy_variance": "moments",
            "noise_variance": "moments",
            "tv_bound": "bounds",
            "tv_of_entries": "gaussianity",
            "tv_to_gaussian": "gaussianity",
            "wishart_moments": "moments",
        },
    )
