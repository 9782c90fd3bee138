"""Private training: clipped per-sample gradients, noise and accounting in an ordinary loop.

``make_private`` returns the same model and the same optimizer, with hooks, and a loader of Poisson
batches. A backward pass then leaves nothing in ``.grad``; ``optimizer.step()`` enters the step in
the ledger, puts the clipped and noised gradient there, and moves the weights. Any other optimizer
finds no gradient and moves nothing.

The class is long because the order of its calls is what the accounting rests on: it is kept in one
place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn

from lora_privacy import _validate
from lora_privacy.dp import Adjacency, PldAccountant, PrivacyBound, calibrate, calibrate_steps
from lora_privacy.dp.result import ADJACENCIES
from lora_privacy.errors import (
    BudgetSpentError,
    CalibrationError,
    LedgerError,
    TrainingOrderError,
    UnsupportedTrainingError,
)
from lora_privacy.training import checkpoint
from lora_privacy.training.clipping import (
    Clipping,
    ClippingName,
    Transform,
    clipped_sums,
    clipping_of,
    weighted_sum,
)
from lora_privacy.training.freshness import FreshProjections
from lora_privacy.training.ledger import Ledger, Mechanism, Release
from lora_privacy.training.methods import Method, frozen_digest, prepare, refuse_packing
from lora_privacy.training.privacy import NoiseMultiplier, PrivacyTarget, TargetEpsilon
from lora_privacy.training.processes import Processes, digests_of, processes_of
from lora_privacy.training.randomness import (
    KeyedRandomness,
    Randomness,
    SystemRandomness,
    new_key,
)
from lora_privacy.training.recorder import LayerTap, SampleRecorder
from lora_privacy.training.samples import GRAM_RTOL
from lora_privacy.training.sampling import MicroBatch, PoissonLoader, checked_sample_rate

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader
    from torch.utils.hooks import RemovableHandle

__all__ = ["Denoiser", "LossName", "PrivateTraining", "make_private"]

LossName = Literal["per-sample-mean", "per-sample-sum"]

Denoiser = Callable[[str, "Tensor", float], "Tensor"]
"""(name of a parameter, noised gradient, standard deviation of its noise) -> gradient to use.

It runs after the noise: whatever it computes from its arguments costs no privacy.
"""

# Norms are known to this relative error only, so that the noise is this much larger than stated.
_SLACK = 1 + GRAM_RTOL
_KNOWN_SEED = "noise seed known: no guarantee against its holder"
_PROFILED = (
    "NOT covered: the singular values before noise, which a diagnostics profile recorded; they "
    "are private data"
)
_ASSUMPTIONS = (
    "each record's gradient depends on that record alone (preflight checks it on a batch)",
    "the starting weights, all settings and schedules are chosen without the private records",
    "the expected batch size is public",
    "only what optimizer.step() did to the weights is released: training losses, norms and "
    "metrics of private records are not",
)


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    *,
    method: Method,
    max_grad_norm: float | Mapping[str, float],
    privacy: PrivacyTarget,
    delta: float,
    sample_rate: float | None = None,
    expected_batch_size: float | None = None,
    adjacency: Adjacency = "add-remove",
    physical_batch_size: int | None = None,
    loss: LossName = "per-sample-mean",
    clipping: ClippingName = "flat",
    transform: Transform | None = None,
    denoiser: Denoiser | None = None,
    secure: bool = True,
    deterministic: bool = False,
    ledger: str | Path | None = None,
    resume: str | Path | None = None,
    distributed: bool | None = None,
) -> PrivateTraining:
    """Make a training private, **in place**: the model and the optimizer get hooks.

    The loop stays what it was, with the loader that is returned::

        private = make_private(model, optimizer, loader, method="dp-lora", max_grad_norm=1.0,
                               privacy=TargetEpsilon(8.0, epochs=3), delta=1e-5)
        while private.steps_left():
            for batch in private.data_loader:
                loss_of(model, batch).backward()
                optimizer.step()
        print(private.bound())

    At each step every record takes part with probability q; the gradients of those that do are
    clipped and summed, noise of standard deviation z times the sensitivity is added, and the sum
    is divided by the *expected* batch size q·N. The loss of a batch must be a function of that
    batch alone: a backward pass over other records of the data is not accounted.

    Args:
        model: For ``"dp-lora"`` and ``"dp-lora-fa"`` with LoRA adapters, of ``adapt`` or of peft;
            for ``"dp-flora"`` adapted with ``method="flora"``, with everything that is trained
            among its targets, the head too; for ``"dp-sgd"`` any model.
        optimizer: Holds every trained parameter; ``torch.optim.SGD`` for ``"dp-flora"``.
        data_loader: Gives the data set, the collate function, and, as its batch size, the
            expected one. Its order is replaced by Poisson sampling.
        method: ``"dp-lora"`` trains A and B, ``"dp-lora-fa"`` B only, ``"dp-sgd"`` whatever asks
            for a gradient, all accounted as sampled Gaussians. ``"dp-flora"`` clips and noises the
            full gradient and releases it through an A that is drawn anew at each step, accounted
            as ``ProjectedGaussian``.
        max_grad_norm: Clipping norm C > 0; with ``clipping="per-layer"`` also a norm for each
            trained layer.
        privacy: ``NoiseMultiplier(z)``, or ``TargetEpsilon(ε, epochs=…)`` (or ``steps=…``), which
            finds z and ends the training when its steps are taken.
        delta: δ, in (0, 1), of the target and of ``bound()``.
        sample_rate: q; None takes the loader's batch size over the number of records.
        expected_batch_size: What the noised sum is divided by, > 0; None takes q·N. Give it, and
            ``sample_rate``, where N is not public: the noise that a step is seen to have, its
            standard deviation over this number, would tell N.
        adjacency: Under ``"replace"`` a record is exchanged and moves the sum by 2C.
        physical_batch_size: Most records run at once: larger batches come in parts, and
            ``optimizer.step()``, called after each part, moves the weights after the last one.
        loss: Whether the loss that is backpropagated is the mean or the sum over the records of
            the batch. A loss of a language model must average over a record's own tokens.
        clipping: ``"flat"``, ``"per-layer"`` or ``"automatic"``.
        transform: Applied to each sample's gradients before the clip, such as ``RowScaling``.
        denoiser: Applied to each noised gradient.
        secure: Draw noise, sampling and A from the operating system; nothing of it is ever stored.
            False takes faster generators that the operating system seeds.
        deterministic: Draw them from a key that checkpoints hold, so that a resumed run goes on
            bit by bit. Needs ``secure=False``; the bound then says that the key's holder is not
            covered.
        ledger: File that each step is written to before it moves a weight. Steps that it holds
            already are part of the cost. ``save`` before the first step gives a crash something
            to go on from.
        resume: Folder of ``PrivateTraining.save`` to go on from, with the same arguments.
        distributed: Whether the processes of ``torch.distributed`` train this model together.
            Every one is given the same arguments, the plain model (not in
            ``DistributedDataParallel``), the whole data set and, as the loader's batch size, that
            of all of them; ``physical_batch_size`` is its own. Weights start as those of rank 0,
            each process draws from its own share of the records, rank 0 alone writes the ledger
            and draws the noise, one for all. None refuses to guess when several run.

    Raises:
        ValueError: An argument is out of range, or two contradict.
        UnsupportedLayerError: A trained layer has no per-sample gradients here.
        UnsupportedTrainingError: The method does not cover this model, optimizer or loader.
        StaleParameterError: The optimizer holds parameters that the model does not have.
        CalibrationError: The target cannot be met.
        LedgerError, StorageError: The ledger or the checkpoint does not fit.
        ProcessError: Processes that train together differ, or one of them is gone.
    """
    _validate.inside("delta", delta, 0, 1)
    _validate.choice("adjacency", adjacency, ADJACENCIES)
    _validate.choice("loss", loss, get_args(LossName))
    if expected_batch_size is not None:
        _validate.positive("expected_batch_size", expected_batch_size)
    if physical_batch_size is not None:
        physical_batch_size = _validate.integer("physical_batch_size", physical_batch_size, 1)
    if deterministic and secure:
        raise ValueError(
            "deterministic=True keeps the seed of the noise, and whoever holds it is not covered "
            "by the guarantee. Pass secure=False with it to say that this is meant."
        )
    if not isinstance(privacy, NoiseMultiplier | TargetEpsilon):
        raise TypeError(
            "privacy must be NoiseMultiplier(z) or TargetEpsilon(epsilon, steps=… or epochs=…), "
            f"got {privacy!r}."
        )
    processes = processes_of(distributed)
    if deterministic and processes.size > 1:
        raise UnsupportedTrainingError(
            "deterministic=True repeats a run bit by bit in one process only; leave it out with "
            "distributed=True."
        )
    rate = checked_sample_rate(data_loader, sample_rate)
    refuse_packing(data_loader)
    fresh = prepare(model, optimizer, method, transform=transform, clipping=clipping)
    if fresh is not None and denoiser is not None:
        raise UnsupportedTrainingError(
            "method='dp-flora' takes no denoiser: its noise went through A and is not independent "
            "from entry to entry, as denoisers assume."
        )
    recorder = SampleRecorder(model, dense=transform is not None)
    rule = clipping_of(clipping, max_grad_norm, list(recorder.taps))
    mechanism = Mechanism(adjacency=adjacency, layers=fresh.shapes if fresh else None)
    if resume is not None and ledger is None:
        ledger = Path(resume) / checkpoint.LEDGER
    if processes.rank > 0:
        ledger = None  # rank 0 writes; the others follow in memory
    elif resume is not None and not Path(str(ledger)).exists():
        raise LedgerError(
            f"There is no ledger at {ledger}; pass the ledger=… that the training was begun with."
        )
    training = PrivateTraining(
        model=model,
        optimizer=optimizer,
        recorder=recorder,
        clipping=rule,
        fresh=fresh,
        ledger=Ledger(mechanism, ledger),
        method=method,
        delta=float(delta),
        sample_rate=rate,
        expected_batch_size=expected_batch_size or rate * len(cast("Any", data_loader.dataset)),
        loss=loss,
        transform=transform,
        denoiser=denoiser,
        randomness=SystemRandomness() if secure else KeyedRandomness(new_key()),
        deterministic=deterministic,
        processes=processes,
    )
    try:
        training.data_loader = PoissonLoader(
            data_loader, physical_batch_size, training, (processes.rank, processes.size)
        )
        training._join(data_loader)
        if resume is None:
            if any(optimizer.state.values()):
                raise UnsupportedTrainingError(
                    "The optimizer holds state of earlier steps, which were not private and would "
                    "go on moving the weights. Make a new optimizer."
                )
            training._set_privacy(privacy)
        else:
            training._resume(Path(resume), privacy)
        processes.same("what it trains", training._facts())
        groups = optimizer.state_dict()["param_groups"]
        processes.same("the optimizer", [type(optimizer).__name__, *map(repr, groups)])
    except BaseException:
        training.close()  # the ledger's file, for another try
        raise
    training._install()
    return training


class PrivateTraining:
    """A training that ``make_private`` made private.

    Attributes:
        model: The model, with hooks.
        optimizer: The optimizer, with hooks.
        data_loader: Poisson batches.
        method: How it is trained.
        delta: δ of ``bound()``.
    """

    data_loader: PoissonLoader

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        recorder: SampleRecorder,
        clipping: Clipping,
        fresh: FreshProjections | None,
        ledger: Ledger,
        method: Method,
        delta: float,
        sample_rate: float,
        expected_batch_size: float,
        loss: LossName,
        transform: Transform | None,
        denoiser: Denoiser | None,
        randomness: Randomness,
        deterministic: bool,
        processes: Processes,
    ) -> None:
        self.model, self.optimizer, self.method = model, optimizer, method
        self.delta = delta
        self._sample_rate, self._expected_batch_size = sample_rate, expected_batch_size
        self._noise_multiplier = math.nan
        self._step = 0
        self._recorder, self._clipping, self._fresh = recorder, clipping, fresh
        self._ledger, self._loss = ledger, loss
        self._transform, self._denoiser = transform, denoiser
        self._randomness, self._deterministic = randomness, deterministic
        self._processes = processes
        self._profiled = _profiles(denoiser)
        self._privacy: PrivacyTarget = NoiseMultiplier(1.0)
        self._budget: int | None = None
        self._run = run_name(randomness)
        self._sums: dict[str, Tensor] = {}
        self._micro: MicroBatch | None = None
        self._absorbed = True
        self._iteration = 0
        self._parameters = {
            tap.path(key): parameter
            for tap in recorder.taps.values()
            for key, parameter in tap.parameters.items()
        }
        self._handles: list[RemovableHandle] = []
        if fresh is not None:
            fresh.draw = lambda: self._processes.share(
                lambda: self._randomness.seed("projection", self._step)
            )

    @property
    def noise_multiplier(self) -> float:
        """Z = σ/C."""
        return self._noise_multiplier

    @property
    def sample_rate(self) -> float:
        """q, the probability with which a record takes part in a step."""
        return self._sample_rate

    @property
    def expected_batch_size(self) -> float:
        """q·N, what sums are divided by."""
        return self._expected_batch_size

    @property
    def step(self) -> int:
        """Steps taken, those before a resume included."""
        return self._step

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Path -> every trained parameter; a FLoRA weight goes by the path of its layer."""
        return dict(self._parameters)

    @property
    def accountant(self) -> PldAccountant:
        """An accountant that has paid for every step in the ledger."""
        return self._ledger.accountant()

    @property
    def epoch(self) -> int:
        """Whole epochs taken. Lost steps shorten the last one: loop on ``steps_left()``."""
        return self.step // self.data_loader.steps_per_epoch

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in a gradient, before any projection: z·S/(q·N).

        It is larger by 1e-3 of it, which covers the rounding of norms.
        """
        return self._noise_std_of_sum / self.expected_batch_size

    @property
    def _noise_std_of_sum(self) -> float:
        return _SLACK * self.noise_multiplier * self._clipping.sensitivity

    @property
    def randomness(self) -> Randomness:
        """Source of noise, sampling and projections."""
        return self._randomness

    def bound(self, delta: float | None = None) -> PrivacyBound:
        """What is proved of all steps so far, lost ones included; None takes the training's δ."""
        proved = self.accountant.epsilon(self.delta if delta is None else delta)
        known = (_KNOWN_SEED,) if self._deterministic or self._ledger.seed_known else ()
        profiled = (_PROFILED,) if self._profiled else ()
        stated = (*proved.assumptions, *_ASSUMPTIONS, *known, *profiled)
        return replace(proved, assumptions=stated)

    @property
    def exchanged_numbers(self) -> int:
        """Numbers that a process sends to the first one at a step, and gets back."""
        return sum(math.prod(self._released_shape(path)) for path in self._parameters)

    def steps_left(self) -> int | None:
        """Steps that the target still pays for; None without one."""
        if self._budget is None:
            return None
        # Steps of this run that a resume draws again, bit by bit, were paid for.
        again = max(0, self._ledger.reached(self._run) - self.step)
        return max(0, self._budget - len(self._ledger) + again)

    def save(self, folder: str | Path) -> Path:
        """Write a checkpoint to go on from; see ``make_private(resume=…)``.

        Its folder ``private`` must not leave the machine. Without ``make_private(ledger=…)`` the
        folder also gets the ledger, which from then on is written to at every step. Of several
        processes only the first one writes.

        Raises:
            TrainingOrderError: A batch is under way.
            ValueError: The ledger lies in another checkpoint already.
        """
        self._between_steps("save()")
        folder = Path(folder)
        if self._processes.rank > 0:
            return folder
        own = folder / checkpoint.LEDGER
        path = self._ledger.path
        if path is None:
            self._ledger.attach(own)
        elif path.resolve() != own.resolve() and (path.parent / checkpoint.STATE).exists():
            raise ValueError(
                f"The ledger of this training lies in the checkpoint {path.parent}. To keep "
                "several checkpoints of one training, pass make_private(ledger=…), a file outside."
            )
        key = self._randomness.key if isinstance(self._randomness, KeyedRandomness) else None
        return checkpoint.save(
            folder,
            optimizer=self.optimizer,
            parameters=self._parameters,
            facts=self._facts(),
            key=key if self._deterministic else None,
        )

    def release(self, folder: str | Path) -> Path:
        """Write what may leave the machine: the trained weights and the bound; no private state.

        Of several processes only the first one writes.

        Raises:
            TrainingOrderError: A batch is under way.
        """
        self._between_steps("release()")
        if self._processes.rank > 0:
            return Path(folder)
        return checkpoint.release(
            Path(folder), model=self.model, parameters=self._parameters, bound=self.bound()
        )

    def close(self) -> None:
        """Take all hooks off the model and the optimizer, and give the ledger's file back."""
        self._recorder.__exit__()
        self._recorder.clear()
        while self._handles:
            self._handles.pop().remove()
        if self._fresh is not None:
            self._fresh.close()
        self._ledger.close()

    def start(self) -> int:
        """Called by the loader when an iteration begins.

        A batch that an older iteration was left in is handed out again: nothing of it was
        released. A step that was released but failed before the weights moved is counted, and the
        next one begins.
        """
        if self._micro is not None and self._processes.size > 1:
            raise TrainingOrderError(
                "A batch was left under way, which the other processes wait for: take its step, "
                "or end all processes and go on from the last checkpoint."
            )
        self._recorder.clear()
        self._sums, self._micro, self._absorbed = {}, None, True
        for parameter in self._parameters.values():
            parameter.grad = None
        if not self._deterministic:
            self._step = max(self._step, self._ledger.reached(self._run))
        if self._fresh is not None:
            self._fresh.end_step()
        self._iteration += 1
        return self._iteration

    def begin(self, micro: MicroBatch) -> None:
        """Called by the loader before it hands out a micro-batch, or for an empty batch.

        Raises:
            TrainingOrderError: The one before was not used up, or another iteration has begun.
        """
        if micro.iteration != self._iteration:
            raise TrainingOrderError(
                "Another iteration over private.data_loader has begun since this one; one batch "
                "must not enter two steps, nor two batches one step. Use one iteration at a time."
            )
        if self._micro is not None:
            if self._micro.last:
                raise TrainingOrderError(
                    f"The loader went on to the next batch, but optimizer.step() was not called "
                    f"for step {self._micro.step}, or failed. Call it once after the backward "
                    "pass of every batch; to accumulate, use physical_batch_size."
                )
            self._absorb()
        if micro.step != self._step:
            raise TrainingOrderError(
                f"The batch is of step {micro.step}, but {self._step} steps were taken."
            )
        if self._recorder.recorded:
            raise TrainingOrderError(
                "A backward pass ran that belongs to no batch of the loader: its samples would "
                "enter the next step. Run it under torch.no_grad(), or before make_private."
            )
        self._micro, self._absorbed = micro, not micro.size

    def step_without_records(self, micro: MicroBatch) -> None:
        """Called by the loader for an empty Poisson batch: a step of noise alone."""
        self.begin(micro)
        self.optimizer.step()

    def _join(self, data_loader: DataLoader[Any]) -> None:
        """Begin as rank 0 does, on the same records: its weights, its run, its ledger."""
        if self._processes.size > 1:
            self._processes.same("the records", digests_of(cast("Any", data_loader.dataset)))
        self._processes.copy_first(self.model)
        self._run = self._processes.object_from_first(self._run)
        for release in self._processes.object_from_first(list(self._ledger)):
            self._ledger.charge(release)  # nothing new in rank 0

    def _set_privacy(self, privacy: PrivacyTarget) -> None:
        self._privacy = privacy
        mechanism = self._ledger.mechanism
        if isinstance(privacy, NoiseMultiplier):
            self._noise_multiplier = privacy.noise_multiplier
            if privacy.epsilon is not None:
                self._budget = self._affordable(privacy.epsilon) + len(self._ledger)
            return
        steps = privacy.total_steps(self.data_loader.steps_per_epoch)
        found = calibrate(
            lambda z: mechanism.event(z, self.sample_rate),
            epsilon=privacy.epsilon,
            delta=self.delta,
            steps=steps,
            accountant=self.accountant,
        )
        self._noise_multiplier, self._budget = found.value, steps + len(self._ledger)

    def _resume(self, folder: Path, privacy: PrivacyTarget) -> None:
        # What is found out from the target is taken from the checkpoint, not searched again.
        self._privacy = privacy
        state = checkpoint.load(
            folder,
            optimizer=self.optimizer,
            parameters=self._parameters,
            settings=self._settings(),
            ledger=self._ledger,
            deterministic=self._deterministic,
        )
        self._noise_multiplier, self._budget = state.noise_multiplier, state.budget
        self._step = state.step
        self._profiled |= state.profiled
        self._check_budget(state.charged)
        if state.key is not None and state.generator is not None:
            self._randomness = KeyedRandomness(state.key)
            self._run = run_name(self._randomness)
            torch.set_rng_state(state.generator)
        if self._fresh is not None:
            self._fresh.end_step()

    def _check_budget(self, charged: int) -> None:
        """Count steps anew if the ledger went on with others than this training would take."""
        if self._budget is None:
            return
        own = (self.noise_multiplier, self.sample_rate)
        later = list(self._ledger)[charged:]
        if all((x.noise_multiplier, x.sample_rate) == own for x in later):
            return
        try:
            left = self._affordable(cast("float", self._privacy.epsilon))
        except CalibrationError:
            left = 0
        self._budget = min(self._budget, len(self._ledger) + left)

    def _affordable(self, epsilon: float) -> int:
        """Steps that ``epsilon`` pays for beyond those in the ledger."""
        found = calibrate_steps(
            self._ledger.mechanism.event(self.noise_multiplier, self.sample_rate),
            epsilon=epsilon,
            delta=self.delta,
            accountant=self.accountant,
        )
        return int(found.value)

    def _settings(self) -> dict[str, Any]:
        """What must be the same in a run that goes on from a checkpoint."""
        return {
            "method": self.method,
            "adjacency": self._ledger.mechanism.adjacency,
            "layers": [list(shape) for shape in self._ledger.mechanism.layers or ()],
            "clipping": repr(self._clipping),
            "privacy": repr(self._privacy),
            "delta": self.delta,
            "sample_rate": self.sample_rate,
            "expected_batch_size": self.expected_batch_size,
            "loss": self._loss,
            "deterministic": self._deterministic,
            "frozen_a": frozen_digest(self.model),
        }

    def _facts(self) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "noise_multiplier": self.noise_multiplier,
            "budget": self._budget,
            "step": self.step,
            "charged": len(self._ledger),
            "profiled": self._profiled,
            "ledger": self._ledger.digest(len(self._ledger)),
        }

    def _install(self) -> None:
        # Gradients from before would move weights, frozen ones too, without clip and noise.
        for parameter in (*self.model.parameters(), *self._held()):
            parameter.grad = None
        self._recorder.__enter__()
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def _held(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _between_steps(self, what: str) -> None:
        if self._micro is not None:
            raise TrainingOrderError(
                f"{what} was called between a batch and its optimizer.step(); call it after."
            )

    def _full_precision(self) -> torch.autocast:
        """Keep autocast out: it would round norms, sums and noise to half precision."""
        return torch.autocast(next(iter(self._parameters.values())).device.type, enabled=False)

    def _absorb(self) -> None:
        """Add the recorded pass to the sums of this step."""
        if self._absorbed:
            return
        micro = self._micro
        assert micro is not None
        self._recorder.check(micro.size)
        scale = float(micro.size) if self._loss == "per-sample-mean" else 1.0
        with self._full_precision(), torch.no_grad():
            sums = clipped_sums(
                self._recorder,
                self._clipping,
                scale=scale,
                transform=self._transform,
                reduce=weighted_sum if self._fresh is None else self._projected_sum,
            )
        self._recorder.clear()
        self._absorbed = True
        for path, term in sums.items():
            self._sums[path] = self._sums[path].add_(term) if path in self._sums else term

    def _projected_sum(self, tap: LayerTap, key: str, weights: Tensor) -> Tensor:
        assert self._fresh is not None
        # A is drawn here at the latest, after the pass it is applied to.
        return tap.samples[key].projected(weights, self._fresh.a(tap.name))

    def _before_step(
        self,
        optimizer: torch.optim.Optimizer,  # noqa: ARG002
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        # torch hands over the optimizer itself as the first argument.
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise TrainingOrderError(
                "optimizer.step(closure) would run a backward pass after the gradient was "
                "released; call loss.backward() and then optimizer.step()."
            )
        if self._micro is None:
            raise TrainingOrderError(
                "optimizer.step() without a batch of private.data_loader before it: every step "
                "needs a Poisson batch of its own. Loop over the loader of make_private."
            )
        self._absorb()
        if not self._micro.size:
            self._recorder.check_trained()  # else a part of _absorb
        if any(parameter.grad is not None for parameter in self._held()):
            raise TrainingOrderError(
                "The optimizer holds a gradient that was neither clipped nor noised: a parameter "
                "was added to it, unfrozen, or given a gradient by hand. Set it to None; choose "
                "what is trained before make_private."
            )
        if not self._micro.last:
            return  # no gradient is set, so the optimizer moves nothing
        if self.steps_left() == 0:  # the loader ends before; this holds whatever it does
            raise BudgetSpentError(f"{self._privacy} pays for {self._budget} steps, all taken.")
        with self._full_precision(), torch.no_grad():
            for path, gradient in self._release().items():
                self._parameters[path].grad = gradient

    def _after_step(
        self,
        optimizer: torch.optim.Optimizer,  # noqa: ARG002
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
    ) -> None:
        if self._micro is None or not self._micro.last:
            return
        for parameter in self._parameters.values():
            parameter.grad = None
        if self._fresh is not None:
            self._fresh.end_step()
        self._sums, self._micro = {}, None
        self._step += 1

    def _sum_digest(self) -> str | None:
        """What ties the noise of a key to the sums that it covers; None without a key."""
        if not isinstance(self._randomness, KeyedRandomness):
            return None
        parts = [
            self._sums[path].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            if path in self._sums
            else b""
            for path in self._parameters
        ]
        return self._randomness.digest(b"".join(parts), "sums", self._step)

    def _charge(self, digest: str | None) -> None:
        earlier = self._ledger.find(self._run, self.step)
        if earlier is not None and not self._deterministic:
            # Other noise on the same sum would be a second release.
            raise TrainingOrderError(
                f"Step {self.step} was released, but the optimizer failed to take it. It counts; "
                "begin a new iteration over the loader to go on."
            )
        attestation = None
        if self._fresh is not None:
            turn = len(self._ledger)
            if earlier is not None and earlier.attestation is not None:
                turn = earlier.attestation.step
            attestation = self._fresh.attest(turn, all_projected=self._all_projected())
        self._ledger.charge(
            Release(
                run=self._run,
                step=self.step,
                noise_multiplier=self.noise_multiplier,
                sample_rate=self.sample_rate,
                sum_digest=digest if self._deterministic else None,
                attestation=attestation,
            )
        )

    def _all_projected(self) -> bool:
        """Whether nothing but the FLoRA layers' weights can move at this step."""
        assert self._fresh is not None
        own = {id(layer.weight) for layer in self._fresh.layers.values()}
        return own == {id(p) for p in self.model.parameters() if p.requires_grad}

    def _release(self) -> dict[str, Tensor]:
        """Path -> the gradient of this step, of the records of all processes."""
        processes = self._processes
        if self._fresh is not None:
            self._fresh.begin_step()  # an empty share draws no A, but all exchange its seed
        if processes.size > 1:
            self._sums = processes.sum_to_first(
                {path: self._sums.get(path, zero) for path, zero in self._zeros().items()}
            )
        if processes.rank == 0:
            digest = self._sum_digest()
            # From here on the step counts, whatever becomes of it.
            self._charge(digest)
            released = processes.from_first(self._noised(digest))
        else:
            released = processes.from_first(self._zeros())
            self._charge(None)
        return {path: self._gradient(path, mean) for path, mean in released.items()}

    def _noised(self, digest: str | None) -> dict[str, Tensor]:
        """What is released: (clipped sum + noise)/(q·N); for dp-flora times Aᵀ."""
        std = self._noise_std_of_sum
        released: dict[str, Tensor] = {}
        for path, parameter in self._parameters.items():
            total = self._sums.get(path)
            noise = self._normal(self._released_shape(path), path, digest, parameter) * std
            if self._fresh is not None:
                mean = self._fresh.release(self._layer(path), total, noise)
            else:
                if _profiles(self._denoiser):
                    self._profiled = True
                    clean = torch.zeros_like(noise) if total is None else total
                    cast("Any", self._denoiser).before(path, clean / self.expected_batch_size)
                mean = noise if total is None else total + noise
            mean = mean / self.expected_batch_size
            if self._denoiser is not None:
                restored = self._denoiser(path, mean, std / self.expected_batch_size)
                if restored.shape != mean.shape:
                    raise ValueError(
                        f"The denoiser must keep the shape {tuple(mean.shape)} of {path}, got "
                        f"{tuple(restored.shape)}. The step counts, though no weight moved."
                    )
                mean = restored.to(mean.dtype)
            released[path] = mean
        return released

    def _gradient(self, path: str, mean: Tensor) -> Tensor:
        """What is released of a parameter, in its shape and type."""
        if self._fresh is not None:
            mean = self._fresh.decompress(self._layer(path), mean)
        parameter = self._parameters[path]
        if (mean.dtype, mean.stride()) == (parameter.dtype, parameter.stride()):
            return mean
        # As autograd does: torch's fused optimizers read both in the order of their memory.
        return torch.empty_like(parameter).copy_(mean)

    def _layer(self, path: str) -> str:
        """Path of the FLoRA layer that the weight at ``path`` belongs to."""
        return path.rpartition("weight")[0].removesuffix(".")

    def _released_shape(self, path: str) -> tuple[int, ...]:
        """Shape of what is released of a parameter: (out, rank) for dp-flora."""
        if self._fresh is None:
            return tuple(self._parameters[path].shape)
        layer = self._fresh.layers[self._layer(path)]
        return layer.out_features, layer.rank

    def _zeros(self) -> dict[str, Tensor]:
        """Of the shapes and types of what is released."""
        return {
            path: torch.zeros(
                self._released_shape(path), dtype=_sum_dtype(parameter), device=parameter.device
            )
            for path, parameter in self._parameters.items()
        }

    def _normal(
        self, shape: tuple[int, ...], path: str, digest: str | None, like: Tensor
    ) -> Tensor:
        size = math.prod(shape)
        numbers = self._randomness.normal(size, "noise", self.step, path, digest or "")
        return torch.from_numpy(numbers).to(like.device, _sum_dtype(like)).view(shape)


def _sum_dtype(parameter: Tensor) -> torch.dtype:
    """Type of the sums and the noise of a parameter."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _profiles(denoiser: Denoiser | None) -> bool:
    """Whether it records gradients before their noise."""
    return bool(getattr(denoiser, "before_noise", False))


def run_name(randomness: Randomness) -> str:
    """A name for one source of randomness: equal for equal keys, and of no use to find one."""
    return f"{randomness.seed('run'):032x}"
