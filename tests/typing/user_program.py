"""What a user of the library might write: every public name, once, with the type it is read as.

It is checked by pyright, strictly, as a program outside of the library (``test_typing.py``), and
never run. ``assert_type`` also sees an ``Any`` where a type was promised.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, assert_type

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import Trainer

from lora_privacy.assess import (
    AssessConfig,
    Assessment,
    ShadowFit,
    Shadows,
    assess,
    train_shadows,
)
from lora_privacy.audit import (
    Exposure,
    GoodnessOfFit,
    Guesses,
    LeakageEstimate,
    RateEstimate,
    RocCurve,
    asymmetry,
    attack_p,
    attack_r,
    auc,
    epsilon_clopper_pearson,
    epsilon_from_counts,
    epsilon_one_run,
    epsilon_one_run_fdp,
    epsilon_one_run_scores,
    exposure,
    exposure_p_value,
    gradient_canaries,
    guess,
    lira,
    logit_confidence,
    mean_log_prob,
    min_k,
    min_k_plus_plus,
    one_run_p_value,
    projection_attack,
    reference_calibrated,
    rmia,
    roc_curve,
    strongest,
    tpr_at_fpr,
    tune_offline_a,
)
from lora_privacy.core import (
    Adapter,
    AdapterSnapshot,
    CachedPrefix,
    FLoRALinear,
    FLoRAMomentum,
    GradientProbe,
    GradientRecord,
    LoRALinear,
    RandomProjection,
    Recursion,
    adapt,
    adapters,
    decompress,
    disagreement,
    drift,
    drift_bound,
    find_targets,
    flora_layers,
    is_conv1d,
    load_flora,
    predicted_update,
    recursion,
    refresh,
    save_flora,
    save_peft,
    sgd_step,
    snapshot,
    unfreeze,
    update_bound,
)
from lora_privacy.data import LABEL_NOISE, Secret, TextDataset, load, plant_secrets, tickets
from lora_privacy.dp import (
    Accountant,
    Adjacency,
    Aggregation,
    AttestedLedger,
    Calibration,
    Event,
    GaussianEvent,
    ImpliedPrivacy,
    NoisedProjection,
    PairDivergence,
    PldAccountant,
    PrivacyBound,
    PrivacyCurve,
    ProjectedGaussian,
    ProjectionAttestation,
    RdpAccountant,
    SampledGaussian,
    SketchRelease,
    VectorFamily,
    VectorProjection,
    calibrate,
    calibrate_rank,
    calibrate_steps,
    event_rdp,
    implied_noise_multiplier,
    implied_privacy,
    matrix_projection,
    privacy_curve,
    sampled_gaussian_bounds,
    sampled_gaussian_rdp,
    vector_projection_bound,
)
from lora_privacy.noise import (
    Distance,
    EmpiricalNoise,
    EntryNoise,
    LawsRow,
    LawsTable,
    LayerShape,
    RowNoise,
    WishartMoments,
    berry_esseen_bound,
    expected_noise_energy,
    jl_distortion,
    jl_failure,
    jl_probability,
    joint_tv_to_gaussian,
    kl_to_gaussian,
    kolmogorov_to_gaussian,
    laws_table,
    lyapunov_ratio,
    matrix_tv_to_gaussian,
    maximal_coupling,
    model_shapes,
    noise_covariance,
    noise_energy_variance,
    noise_variance,
    tv_bound,
    tv_of_entries,
    tv_to_gaussian,
    wishart_moments,
)
from lora_privacy.training import (
    AutomaticClipping,
    FlatClipping,
    LayerClipping,
    NoiseCallback,
    NoiseMultiplier,
    PrivacyArguments,
    PrivateTrainer,
    PrivateTraining,
    RowScaling,
    SampleRecorder,
    SingularValueDenoiser,
    SpectrumProfile,
    TargetEpsilon,
    WeightDeltaGuard,
    clipped_sums,
    denoise,
    make_private,
    predicted_cosine,
    preflight,
    sample_norms,
)

Array = npt.NDArray[np.float64]


def laws(row: Array, gradient: Array, rng: np.random.Generator) -> None:
    law = EntryNoise(rank=8, norm=1.0, coord=0.5)
    assert_type(law.rank, int)
    assert_type(law.rho, float)
    assert_type(law.std(), float)
    assert_type(law.cdf([0.0, 1.0]), Array)
    assert_type(law.rvs((2, 3), rng), Array)
    drawn = EmpiricalNoise("uniform", 8, row, 0, draws=100, random_state=rng)
    assert_type(drawn.band(0.95), float)
    assert_type(drawn.samples, Array)
    whole = RowNoise(8, row)
    assert_type(whole.covariance(), Array)
    assert_type(whole.entry(0), EntryNoise)

    assert_type(tv_to_gaussian(law), Distance)
    assert_type(kolmogorov_to_gaussian(law), Distance)
    assert_type(kl_to_gaussian(law, variance="published"), Distance)
    assert_type(tv_bound(law), Distance)
    assert_type(berry_esseen_bound(law).value, float)
    assert_type(joint_tv_to_gaussian(8, 768), Distance)
    assert_type(matrix_tv_to_gaussian(gradient, 8).references, tuple[str, ...])
    assert_type(tv_of_entries(row, 8), Array)
    assert_type(maximal_coupling(law, rng, 10), tuple[Array, Array])
    assert_type(lyapunov_ratio(row, 8, "columns"), float)

    assert_type(noise_variance(row, "gaussian", 8), Array)
    assert_type(noise_covariance(row, row, "gaussian", 8), Array)
    assert_type(expected_noise_energy(gradient, "rademacher", 8), float)
    assert_type(noise_energy_variance(gradient, "gaussian", 8), float)
    assert_type(wishart_moments(8, "gaussian", 768), WishartMoments)
    assert_type(jl_probability(8, 0.5), float)
    assert_type(jl_failure(8, 0.5, vectors=2), float)
    assert_type(jl_distortion(8, 0.1), float)

    shapes = model_shapes(Path("config.json"))
    assert_type(shapes, tuple[LayerShape, ...])
    table = laws_table(shapes, 8)
    assert_type(table, LawsTable)
    assert_type(table[0], LawsRow)
    assert_type([line.to_dict() for line in table], list[dict[str, Any]])


def accounting(pairs: Sequence[tuple[int, int]], v: Array) -> None:
    adjacency: Adjacency = "replace"
    aggregation: Aggregation = "coherent"
    events: list[Event] = [
        GaussianEvent(1.0),
        SampledGaussian(1.0, 0.01),
        ProjectedGaussian([(768, 8)], 1.0),
    ]
    rdp = RdpAccountant(adjacency)
    for event in events:
        rdp = rdp.compose(event, 10)
        assert_type(event_rdp(event, [2.0, 3.0]), Array)
    assert_type(rdp, RdpAccountant)
    assert_type(rdp.epsilon(1e-5), PrivacyBound)
    pld = PldAccountant().compose(SampledGaussian(1.0, 0.01), 1_000)
    assert_type(pld.delta(1.0).reason, str | None)
    assert_type(pld.epsilon_interval(1e-5), tuple[float, float])
    assert_type(pld.tpr_bound(0.01), Array)
    accountants: list[Accountant] = [rdp, pld]
    assert_type(accountants[0].epsilon(1e-5).adjacency, Adjacency)
    curve = privacy_curve(pld)
    assert_type(curve, PrivacyCurve)
    assert_type(curve.advantage(), float)

    found = calibrate(GaussianEvent, epsilon=1.0, delta=1e-5, steps=100)
    assert_type(found, Calibration)
    assert_type(found.bound, PrivacyBound)
    ranks = calibrate_rank(
        lambda rank: ProjectedGaussian([(768, rank)], 1.0),
        epsilon=1.0,
        delta=1e-5,
        steps=1,
        max_rank=8,
        accountant=PldAccountant(),
    )
    assert_type(ranks.value, float)
    assert_type(calibrate_steps(events[0], epsilon=8.0, delta=1e-5).target, float)
    assert_type(sampled_gaussian_rdp(1.0, 0.01, [2.0]), Array)
    assert_type(sampled_gaussian_bounds([1.0], 0.01, steps=1, delta=1e-5), list[PrivacyBound])

    reading = implied_privacy(
        layers=pairs,
        batch_size=32,
        dataset_size=3_200,
        steps=10,
        delta=1e-5,
        distortion=0.5,
        aggregation=aggregation,
    )
    assert_type(reading, ImpliedPrivacy)
    assert_type(reading.failing_assumptions, tuple[str, ...])
    noise = implied_noise_multiplier(rank=8, out_features=8, batch_size=2, distortion=0.5)
    assert_type(noise, float)

    pair = VectorProjection(768, 8, cosine=0.9)
    assert_type(pair.delta(1.0, "forward"), float)
    assert_type(pair.epsilon(1e-5), PairDivergence)
    assert_type(vector_projection_bound(768, 8, 0.9, 1e-5), PairDivergence)
    assert_type(VectorFamily(768, 8, 0.9, (0.5, 2.0)).epsilon(1e-5), PrivacyBound)
    assert_type(matrix_projection(v, v, 8, 1e-5), PairDivergence)
    assert_type(SketchRelease(v, v, 8).rdp([2.0]), Array)
    assert_type(NoisedProjection(v, v, 8, 1.0).epsilon(1e-5).forward, float)


def attested(ledger: AttestedLedger, attestation: ProjectionAttestation) -> None:
    ledger.charge(attestation, noise_multiplier=1.0, sample_rate=0.01)
    assert_type(ledger.history, tuple[tuple[float, float, int], ...])
    assert_type(AttestedLedger.restored(ledger.state(), [(768, 8)]), AttestedLedger)
    assert_type(attestation.layers, tuple[tuple[int, int], ...])


def adapting(model: nn.Module, folder: Path) -> None:
    adapted = adapt(model, 8, method="flora", targets=["query"], seed=0)
    assert_type(adapted, nn.Module)
    assert_type(find_targets(model, "all-linear"), dict[str, nn.Module])
    assert_type(unfreeze(model, trainable=["classifier"]), nn.Module)
    for name, adapter in adapters(adapted).items():
        assert_type(name, str)
        assert_type(adapter, Adapter)
        assert_type(adapter.kind, Literal["lora", "lora-fa", "flora", "peft"])
        assert_type(adapter.a(), Tensor)
        assert_type(is_conv1d(adapter.layer), bool)
    before = snapshot(adapted)
    assert_type(before, AdapterSnapshot)
    assert_type(drift(adapted, before), dict[str, float])

    projection = RandomProjection(8, 768, "orthonormal", seed=0)
    assert_type(projection.matrix(0, torch.float64), Tensor)
    assert_type(projection.kurtosis, float)
    linear = LoRALinear(nn.Linear(768, 768), 8, 16.0, projection, train_a=False)
    assert_type(linear.delta(), Tensor)
    assert_type(linear.merged, bool)
    fresh = FLoRALinear(nn.Linear(768, 768), 8, 16.0, projection)
    assert_type(fresh.forward(torch.zeros(1, 768)), Tensor)
    assert_type(flora_layers(adapted), dict[str, FLoRALinear])

    with GradientProbe(adapted, every=10) as probe:
        probe.step()
    for record in probe.records.values():
        assert_type(record, GradientRecord)
        assert_type(record.noise, Tensor)
        assert_type(record.row_norms, Tensor)
    prefix = CachedPrefix(adapted)
    prefix.fill([(["a", "b"], {"input_ids": torch.zeros(2, 3)})])
    with prefix.using(["a"]):
        assert_type(prefix.nbytes, int)

    FLoRAMomentum(adapted, lr=0.1).step()
    sgd_step(adapted, 0.1)
    refresh(adapted)
    decompress(adapted)
    assert_type(save_flora(adapted, folder), Path)
    assert_type(load_flora(model, folder), nn.Module)
    assert_type(save_peft(adapted, folder), Path)

    gradients = [torch.zeros(8, 8)]
    linearised = recursion(gradients, 0.1)
    assert_type(linearised, Recursion)
    assert_type(linearised.b(torch.zeros(2, 8)), Tensor)
    update = predicted_update(gradients, torch.zeros(2, 8), 0.1)
    assert_type(disagreement(update, update), float)
    assert_type(drift_bound([1.0], 0.1), float)
    assert_type(update_bound([1.0], 0.1, scaling=2.0), float)


def training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    folder: Path,
) -> None:
    preflight(model, optimizer, [1], loss_of=loss_of)
    private = make_private(
        model,
        optimizer,
        loader,
        method="dp-lora",
        max_grad_norm=1.0,
        privacy=TargetEpsilon(8.0, epochs=3),
        delta=1e-5,
        transform=RowScaling(1.0),
        denoiser=SingularValueDenoiser("hard"),
    )
    assert_type(private, PrivateTraining)
    while private.steps_left():
        with WeightDeltaGuard(private.model, private.optimizer):
            for batch in private.data_loader:
                loss_of(private.model, batch)
                private.optimizer.step()
    assert_type(private.bound(), PrivacyBound)
    assert_type(private.accountant, PldAccountant)
    assert_type(private.parameters, dict[str, nn.Parameter])
    assert_type(private.release(folder), Path)
    profile = SpectrumProfile(SingularValueDenoiser(), before_noise=True)
    make_private(
        model,
        optimizer,
        loader,
        method="dp-flora",
        max_grad_norm={"layer": 1.0},
        privacy=NoiseMultiplier(1.0),
        delta=1e-5,
        denoiser=profile,
        clipping="per-layer",
    )
    assert_type(profile.to_dict(), dict[str, Any])

    recorder = SampleRecorder(model)
    for rule in (FlatClipping(1.0), AutomaticClipping(1.0), LayerClipping({"layer": 1.0})):
        assert_type(rule.sensitivity, float)
        assert_type(clipped_sums(recorder, rule), dict[str, Tensor])
    assert_type(sample_norms(recorder), dict[str, Tensor])
    assert_type(denoise(torch.zeros(4, 4), 1.0, "partial", strength=0.5), Tensor)
    assert_type(predicted_cosine([2.0, 1.0], 1.0, (4, 4)), float)


def with_the_trainer(model: nn.Module, records: Sequence[dict[str, Tensor]]) -> None:
    arguments = PrivacyArguments(target_epsilon=8.0, delta=1e-5, method="dp-flora")
    assert_type(arguments.target(10), NoiseMultiplier | TargetEpsilon)
    trainer = PrivateTrainer(model, train_dataset=records, privacy=arguments)
    assert_type(trainer.bound(), PrivacyBound)
    assert_type(trainer.private, PrivateTraining | None)


def watching(trainer: Trainer) -> None:
    NoiseCallback(every=10).attach(trainer)


def attacking(scores: Array, members: npt.NDArray[np.bool_], shadows: Array) -> None:
    assert_type(attack_p(losses=scores, population_losses=scores), Array)
    assert_type(attack_r(losses=scores, reference_losses=shadows), Array)
    assert_type(
        lira(log_probs=scores, reference_log_probs=shadows, mode="offline", variance="each"), Array
    )
    assert_type(
        rmia(
            log_probs=scores,
            reference_log_probs=shadows,
            population_log_probs=scores,
            population_reference_log_probs=shadows,
            mode="offline",
        ),
        Array,
    )
    tuned = tune_offline_a(
        reference_log_probs=shadows,
        reference_members=members,
        population_reference_log_probs=shadows,
    )
    assert_type(tuned, float)
    assert_type(logit_confidence(scores), Array)
    assert_type(mean_log_prob(token_log_probs=shadows, mask=members), Array)
    assert_type(min_k(token_log_probs=shadows, mask=members, k=0.1), Array)
    assert_type(
        min_k_plus_plus(token_log_probs=shadows, means=shadows, stds=shadows, mask=members), Array
    )
    assert_type(
        reference_calibrated(
            token_log_probs=shadows, reference_token_log_probs=shadows, mask=members
        ),
        Array,
    )
    assert_type(projection_attack(shadows, shadows, noise_at="gradient", rank=8), Array)
    assert_type(asymmetry(shadows, shadows), Array)

    curve = roc_curve(scores, members)
    assert_type(curve, RocCurve)
    assert_type(curve.tpr, Array)
    assert_type(auc(scores, members), RateEstimate)
    assert_type(tpr_at_fpr(scores, members, fpr=0.01).low, float)


def bounding(scores: Array, members: npt.NDArray[np.bool_], rng: np.random.Generator) -> None:
    counts = guess(scores, members, top=10, bottom=10)
    assert_type(counts, Guesses)
    estimates = [
        epsilon_clopper_pearson(scores, members, delta=1e-5, significance=0.05, seed=0),
        epsilon_from_counts(
            members=10,
            true_positives=9,
            non_members=10,
            false_positives=1,
            delta=1e-5,
            significance=0.05,
        ),
        epsilon_one_run(
            canaries=counts.canaries,
            guesses=counts.guesses,
            correct=counts.correct,
            delta=1e-5,
            significance=0.05,
        ),
        epsilon_one_run_fdp(canaries=10, guesses=5, correct=5, delta=1e-5, significance=0.05),
        epsilon_one_run_scores(scores, members, guesses=[5], delta=1e-5, significance=0.05),
    ]
    assert_type(estimates, list[LeakageEstimate])
    assert_type(LeakageEstimate.from_dict(estimates[0].to_dict()).epsilon, float)

    def one_attack(significance: float) -> LeakageEstimate:
        return epsilon_one_run_fdp(
            canaries=10, guesses=5, correct=5, delta=1e-5, significance=significance
        )

    assert_type(strongest({"one": one_attack}, significance=0.05), LeakageEstimate)
    p_value = one_run_p_value(canaries=10, guesses=5, correct=5, epsilon=1.0, delta=1e-5)
    assert_type(p_value, float)
    shown = exposure(1.0, scores, space=1_000, method="skew-normal")
    assert_type(shown, Exposure)
    assert_type(shown.fit, GoodnessOfFit | None)
    assert_type(exposure_p_value([3.0, 4.0]), float)
    canaries = gradient_canaries("basis", shape=(4, 4), norm=1.0, count=2, random_state=rng)
    assert_type(canaries, Array)


def reading() -> None:
    texts = load("train.csv", text_columns="text", label_column="label")
    assert_type(texts, TextDataset)
    assert_type(texts.labels, tuple[int, ...] | None)
    assert_type(tickets(100, seed=0, split="dev").select([0, 1]), TextDataset)
    planted, secrets = plant_secrets(texts, 4, seed=0)
    assert_type(planted, TextDataset)
    assert_type(secrets, tuple[Secret, ...])
    assert_type(secrets[0].alternatives(10, seed=0), tuple[str, ...])
    assert_type(1.0 - LABEL_NOISE, float)


class Fit:
    """A training of one's own, which shadows can repeat."""

    @property
    def records(self) -> int:
        return 10

    def fingerprint(self) -> str:
        return "ten records"

    def __call__(self, seed: int, rows: npt.NDArray[np.int64]) -> tuple[Array, Array]:
        return np.zeros(10), np.zeros(seed + len(rows))


def assessing(folder: Path) -> None:
    config = AssessConfig(train_size=100, methods=("lora", "dp-lora+denoise"), text_columns=(0,))
    assert_type(config.to_dict(), dict[str, Any])
    result = assess(config, folder, resume=True, n_jobs=2)
    assert_type(result, Assessment)
    assert_type(result.methods[0].proved, PrivacyBound)
    assert_type(result.methods[0].implied, ImpliedPrivacy | None)
    assert_type(Assessment.load(folder).cite(), str)
    fit: ShadowFit = Fit()
    for way in (fit, config):
        shadows = train_shadows(way, folder, count=2)
        assert_type(shadows, Shadows)
        assert_type(shadows.reference_log_probs, Array)
