"""A small assessment made by hand, for what renders it."""

import math

from lora_privacy.assess.config import AssessConfig
from lora_privacy.assess.dynamics import LayerDynamics
from lora_privacy.assess.measure import EntryCheck, LayerNoise
from lora_privacy.assess.readings import plain_readings
from lora_privacy.assess.result import Assessment, DataSummary, MethodResult
from lora_privacy.assess.training import Score, TrainingCurve


def make_layer(name: str, **changes: object) -> LayerNoise:
    levels = [(i + 1) / 10 for i in range(9)]
    entry = EntryCheck(
        row=3,
        column=1,
        cosine=0.1,
        draws=2_000,
        distance=0.013,
        band=0.05,
        reference="exact",
        observed=tuple(x - 0.5 for x in levels),
        expected=tuple(x - 0.5 for x in levels),
        normal=tuple(1.1 * (x - 0.5) for x in levels),
    )
    values: dict[str, object] = {
        "layer": name,
        "out_features": 384,
        "in_features": 384,
        "rank": 8,
        "scaling": 1.0,
        "law": "gaussian",
        "variance": 0.125,
        "steps": 19,
        "projections": 1,
        "gradient_norm": 0.0123,
        "training_ratio": 1.02,
        "fresh_ratio": 1.0005,
        "fresh_standard_error": 0.001,
        "one_draw_spread": 0.05,
        "entry": entry,
        "tv_median": 0.0414,
        "tv_largest": 0.052,
        "tv_published_largest": 0.061,
        "tv_bound": 0.11,
        "joint_tv": 0.8,
        "matrix_tv": 1.0,
    }
    return LayerNoise(**{**values, **changes})


def example_assessment() -> Assessment:
    """Two methods, two layers, hostile names, an infinite ε."""
    config = AssessConfig(methods=("lora", "flora"), epochs=2)
    names = ("encoder.layer.0.query", "encoder.layer.1.value")
    score = Score(loss=0.31, accuracy=0.875, accuracy_error=0.01, examples=1_000)
    curve = TrainingCurve(
        steps=4,
        losses=(0.9, 0.8, 0.7, 0.6),
        scores=(score, score),
        wall_seconds=2.0,
        cpu_seconds=3.0,
        peak_bytes=512 * 2**20,
    )
    readings = plain_readings(config, [(384, 8)] * 2, 2_000, 4, None)
    methods = tuple(
        MethodResult(
            method=method,
            trained_parameters=12_345,
            curve=curve,
            drift={name: 0.004 for name in names} if method == "lora" else {},
            shapes=((384, 8), (384, 8)),
            layers=tuple(make_layer(name) for name in names),
            dynamics=tuple(
                LayerDynamics(
                    layer=name,
                    steps=20,
                    learning_rate=0.05,
                    drift=0.001 if method == "lora" else None,
                    drift_bound=math.inf if method == "lora" else None,
                    disagreement=0.002,
                )
                for name in names
            ),
            proved=readings.proved,
            implied=readings.implied,
            flattering=readings.flattering,
        )
        for method in ("lora", "flora")
    )
    data = DataSummary(
        name="<script>alert('x')</script>",
        origin="synthetic seed=0",
        examples=2_000,
        classes=("billing & refunds", '"quoted"'),
        largest_class=0.2,
        sha256="ab" * 32,
    )
    return Assessment(
        config=config,
        model_name="minilm <b>",
        train=data,
        dev=data,
        methods=methods,
        missing=("lora-fa",),
        environment={"python": "3.11"},
    )
