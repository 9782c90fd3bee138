"""A small assessment made by hand: every kind of row, and text that means harm."""

import math
from dataclasses import replace
from functools import cache

import numpy as np

from lora_privacy.assess.auditing import AuditConfig, Game, audit
from lora_privacy.assess.config import AssessConfig
from lora_privacy.assess.dynamics import LayerDynamics
from lora_privacy.assess.measure import EntryCheck, LayerNoise
from lora_privacy.assess.membership import Membership
from lora_privacy.assess.noise_plan import NoisePlan
from lora_privacy.assess.readings import plain_readings, private_readings
from lora_privacy.assess.result import Assessment, DataSummary, MethodResult
from lora_privacy.assess.secrets import SecretScore, SecretsResult
from lora_privacy.assess.spectra import LayerSpectrum
from lora_privacy.assess.training import Score, TrainingCurve
from lora_privacy.assess.updates import UpdateAttack
from lora_privacy.audit import auc, exposure, roc_curve

#: Text that must be shown, and do nothing, wherever it turns up.
HOSTILE = (
    "<script>alert('x')</script>",
    "\\input{/etc/passwd}",
    "$\\frac{1}$ $x^2$",
    "100 % & {a}_b ~^#",
    "a|b`c`**d** [x](javascript:alert(1)) ![y](http://example.org/z.png)",
    "line\nbreak\ttab\rreturn",
    "\x1b[2J\x1b]0;title\x07bell\x00nul",
    "\u202egnp.exe\u2066\u200f",
    "half\ud800pair",
    "&lt;b&gt; &#x41; &amp;",
    "' onload='alert(1)' \" onerror=\"alert(2)",
    "</style></title><img src=x onerror=alert(3)>",
    "naïve café ß 猫 \U0001f600",
    "[0pt] * --- `` ''",
)
LAYERS = (
    "encoder.layer.0.query",
    "encoder.layer.1.$\\frac{a}$ <b>|",
)


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


def make_membership(seed: int, strength: float, records: int = 60) -> Membership:
    """Attacks on log-probabilities that are ``strength`` nats larger for members."""
    rng = np.random.default_rng(seed)
    members = np.arange(records) % 2 == 0
    inside = rng.random((4, records)) < 0.5
    inside[0], inside[1] = members, ~members  # so that every record can be calibrated
    game = Game(
        target_log_probs=-1 - strength * ~members - rng.exponential(size=records),
        target_members=members,
        population_log_probs=-1 - strength - rng.exponential(size=40),
        reference_log_probs=-1 - strength * ~inside - rng.exponential(size=(4, records)),
        reference_members=inside,
        population_reference_log_probs=-1 - strength - rng.exponential(size=(4, 40)),
    )
    curves = {}
    scores, coins = game.attacks()
    for name, values in scores.items():
        curve = roc_curve(values, coins)
        curves[name] = (tuple(curve.fpr.tolist()), tuple(curve.tpr.tolist()))
    return Membership(
        records=records,
        members=int(members.sum()),
        references=4,
        report=audit(game, AuditConfig(delta=1e-5, fpr=0.1, threat_model="black box: <i>all</i>")),
        curves=curves,
        log_prob_in=-1.5,
        log_prob_out=-2.0,
    )


def make_secrets(ranks_in: tuple[int, ...], ranks_out: tuple[int, ...]) -> SecretsResult:
    """Secrets at these ranks among 100 alternatives."""
    scores = []
    for included, ranks in ((True, ranks_in), (False, ranks_out)):
        for rank in ranks:
            others = np.where(np.arange(100) < rank - 1, 1.0, -1.0)
            ranked = exposure(0.0, others, space=10_000)
            scores.append(SecretScore(included=included, log_prob=-3.0, exposure=ranked))
    return SecretsResult(
        task="classification", threat_model="black box: ranks codes", scores=tuple(scores)
    )


def make_update(method: str, strength: float, best_auc: float | None) -> UpdateAttack:
    """An attack on one update whose scores are ``strength`` larger for members."""
    rng = np.random.default_rng(3)
    members = np.arange(30) % 2 == 0
    rate = auc(rng.normal(size=30) + strength * members, members, threat_model="white box: <all>")
    return UpdateAttack(
        method=method,
        rank=2,
        noise_multiplier=0.0 if best_auc is None else 1.1,
        batch_size=4,
        games=30,
        layers=LAYERS,
        shapes=((5, 8), (5, 8)),
        auc=rate,
        delta=1e-5,
        epsilon=None if best_auc is None else 4.2,
        best_auc=best_auc,
    )


def make_spectrum(layer: str) -> LayerSpectrum:
    values = tuple(0.5**i for i in range(5))
    return LayerSpectrum(
        layer=layer,
        shape=(5, 8),
        noise_std=0.2,
        edge=0.9,
        before=values,
        after=tuple(1.5 * value + 0.2 for value in values),
        restored=tuple(1.1 * value for value in values),
        cosine_after=0.61,
        cosine_restored=0.72,
    )


def make_curve(accuracy: float, *, passes: int = 2) -> TrainingCurve:
    score = Score(
        loss=1.3 - accuracy,
        accuracy=accuracy,
        accuracy_error=math.sqrt(accuracy * (1 - accuracy) / 200),
        examples=200,
    )
    return TrainingCurve(
        steps=4,
        losses=(0.9, 0.8, 0.7, 0.6),
        scores=(score,) * passes,
        wall_seconds=2.0,
        cpu_seconds=3.0,
        peak_bytes=512 * 2**20,
    )


def make_plain(method: str, config: AssessConfig, **parts: object) -> MethodResult:
    """A row without noise; one that projects unless it is ``"full"``."""
    shapes = () if method == "full" else ((384, 8), (384, 8))
    plan = NoisePlan(noise_multiplier=0.912345, sample_rate=0.125, steps=16)
    readings = plain_readings(config, shapes, 2_000, 4, plan)
    trains_a = method == "lora"
    values: dict[str, object] = {
        "method": method,
        "trained_parameters": 12_345,
        "curve": make_curve(0.875),
        "drift": dict(zip(LAYERS, (0.004, 0.006), strict=True)) if trains_a else {},
        "shapes": shapes,
        "layers": tuple(
            make_layer(name, tv_median=0.04 + 0.01 * i) for i, name in enumerate(LAYERS)
        )
        if shapes
        else (),
        "dynamics": tuple(
            LayerDynamics(
                layer=name,
                steps=20,
                learning_rate=0.05,
                drift=0.001 if trains_a else None,
                drift_bound=math.inf if trains_a else None,
                disagreement=0.002,
            )
            for name in LAYERS
        )
        if shapes
        else (),
        "proved": readings.proved,
        "implied": readings.implied,
        "flattering": readings.flattering,
        "price": readings.price,
    }
    return MethodResult(**{**values, **parts})


def make_private(method: str, config: AssessConfig, **parts: object) -> MethodResult:
    """A row with noise, whose ε is that of its plan."""
    projected = ((8, 2),) if method == "dp-flora" else ()
    plan = NoisePlan(noise_multiplier=1.1, sample_rate=0.25, steps=4, projected=projected)
    assumed = ("each record takes part by a coin of its own", "the noise is fresh <b>")
    readings = private_readings(plan, config.delta, assumed)
    values: dict[str, object] = {
        "method": method,
        "trained_parameters": 12_345,
        "curve": make_curve(0.81, passes=3),
        "drift": {},
        "shapes": ((384, 8), (384, 8)),
        "layers": (),
        "dynamics": (),
        "proved": readings.proved,
        "implied": None,
        "flattering": None,
        "noise": plan,
        "price": readings.price,
    }
    return MethodResult(**{**values, **parts})


@cache
def example_assessment() -> Assessment:
    """Rows with and without noise, with all attacks and with none, and hostile names."""
    config = AssessConfig(
        methods=("full", "lora", "flora", "dp-sgd", "dp-lora+denoise", "dp-flora"),
        epochs=2,
        model=HOSTILE[1],
        train=HOSTILE[6],
    )
    methods = (
        make_plain("full", config, price=None),
        make_plain(
            "lora",
            config,
            membership=make_membership(1, 2.5, records=240),
            update=make_update("lora", 9.0, None),
            secrets=make_secrets((1, 1, 2), (40, 77)),
        ),
        make_plain("flora", config, secrets=make_secrets((), (3,))),
        make_private("dp-sgd", config, secrets=make_secrets((13, 60, 99), (40, 77))),
        make_private(
            "dp-lora+denoise",
            config,
            membership=make_membership(2, 0.1),
            update=make_update("dp-lora", 0.4, 0.7407),
            secrets=make_secrets((13, 60, 99), (40, 77)),
            spectra=tuple(map(make_spectrum, LAYERS)),
        ),
        make_private("dp-flora", config, membership=make_membership(3, 0.0, records=20)),
    )
    data = DataSummary(
        name=HOSTILE[0],
        origin=HOSTILE[7],
        examples=2_003,
        classes=HOSTILE,
        largest_class=0.2,
        sha256="ab" * 32,
    )
    return Assessment(
        config=config,
        model_name="minilm <b> " + HOSTILE[1] + HOSTILE[8],
        train=data,
        dev=replace(data, examples=200),
        methods=methods,
        missing=("lora-fa", "dp-sgd (attacks)"),
        environment={"python": "3.11"},
    )


def contradicting_assessment() -> Assessment:
    """A proof that an attack refutes: the noise was planned, and somehow not added."""
    whole = example_assessment()
    private = whole.methods[4]
    sure = make_membership(4, 40.0, records=2_000)
    noise = NoisePlan(noise_multiplier=5.0, sample_rate=0.25, steps=4)
    proved = private_readings(noise, 1e-5, ("the noise is added",)).proved
    update = private.update
    assert update is not None
    best = replace(update, auc=replace(update.auc, value=0.99, low=0.95, high=1.0), best_auc=0.8)
    refuted = replace(private, noise=noise, proved=proved, membership=sure, update=best)
    return replace(whole, methods=(whole.methods[1], refuted))


def causal_assessment() -> Assessment:
    """Language models have no accuracy and no classes."""
    whole = example_assessment()
    config = replace(whole.config, task="causal-lm", methods=("lora", "dp-sgd"), references=0)
    score = Score(loss=3.21, accuracy=None, accuracy_error=None, examples=200)
    rows = (whole.methods[1], whole.methods[3])
    methods = tuple(
        replace(row, curve=replace(row.curve, scores=(score,)), membership=None) for row in rows
    )
    data = replace(whole.train, classes=(), largest_class=None)
    return replace(whole, config=config, methods=methods, train=data, dev=data, missing=())
