"""A private training under way: the order of its calls, which the accounting rests on.

The loader says which batch comes, hooks of the optimizer take what the backward pass left, enter
the step in the ledger and put the noised gradient into ``.grad``. The class is long because these
calls depend on each other: their order is kept in one place.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lora_privacy.errors import BudgetSpentError, TrainingOrderError
from lora_privacy.training import budget, checkpoint
from lora_privacy.training.clipping import Clipping, Transform, clipped_sums
from lora_privacy.training.freshness import FreshProjections
from lora_privacy.training.ledger import Ledger, Release
from lora_privacy.training.methods import Method, frozen_digest
from lora_privacy.training.noising import Noising
from lora_privacy.training.privacy import NoiseMultiplier, PrivacyTarget
from lora_privacy.training.processes import Processes, digests_of
from lora_privacy.training.randomness import KeyedRandomness, Randomness
from lora_privacy.training.recorder import SampleRecorder
from lora_privacy.training.samples import GRAM_RTOL, wide
from lora_privacy.training.sampling import MicroBatch, PoissonLoader

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader
    from torch.utils.hooks import RemovableHandle

    from lora_privacy.dp import PldAccountant, PrivacyBound
    from lora_privacy.training.engine import Denoiser, LossName

__all__ = ["PrivateTraining"]

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
        self.model: nn.Module = model
        self.optimizer: torch.optim.Optimizer = optimizer
        self.method: Method = method
        self.delta: float = delta
        self._sample_rate, self._expected_batch_size = sample_rate, expected_batch_size
        self._noise_multiplier = math.nan
        self._step = 0
        self._recorder, self._clipping, self._fresh = recorder, clipping, fresh
        self._ledger, self._loss = ledger, loss
        self._transform = transform
        self._randomness, self._deterministic = randomness, deterministic
        self._processes = processes
        self._privacy: PrivacyTarget = NoiseMultiplier(1.0)
        self._budget: int | None = None
        self._run = _run_name(randomness)
        self._sums: dict[str, Tensor] = {}
        self._micro: MicroBatch | None = None
        self._absorbed = True
        self._iteration = 0
        self._parameters = {
            tap.path(key): parameter
            for tap in recorder.taps.values()
            for key, parameter in tap.parameters.items()
        }
        self._noising = Noising(self._parameters, fresh, denoiser, expected_batch_size)
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
        profiled = (_PROFILED,) if self._noising.profiled else ()
        stated = (*proved.assumptions, *_ASSUMPTIONS, *known, *profiled)
        return replace(proved, assumptions=stated)

    @property
    def exchanged_numbers(self) -> int:
        """Numbers that a process sends to the first one at a step, and gets back."""
        return sum(math.prod(self._noising.shape(path)) for path in self._parameters)

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

    def _begin(self, privacy: PrivacyTarget) -> None:
        self._privacy = privacy
        self._noise_multiplier, self._budget = budget.begun(
            privacy,
            self._ledger,
            sample_rate=self.sample_rate,
            delta=self.delta,
            steps_per_epoch=self.data_loader.steps_per_epoch,
        )

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
        self._noising.profiled |= state.profiled
        if self._budget is not None:
            self._budget = budget.resumed(
                self._budget,
                state.charged,
                self._ledger,
                epsilon=cast("float", privacy.epsilon),
                noise_multiplier=self.noise_multiplier,
                sample_rate=self.sample_rate,
                delta=self.delta,
            )
        if state.key is not None and state.generator is not None:
            self._randomness = KeyedRandomness(state.key)
            self._run = _run_name(self._randomness)
            torch.set_rng_state(state.generator)
        if self._fresh is not None:
            self._fresh.end_step()

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
            "profiled": self._noising.profiled,
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
                reduce=None if self._fresh is None else self._fresh.projected_sum,
            )
        self._recorder.clear()
        self._absorbed = True
        for path, term in sums.items():
            self._sums[path] = self._sums[path].add_(term) if path in self._sums else term

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
            attestation = self._fresh.attest(turn, self.model)
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

    def _release(self) -> dict[str, Tensor]:
        """Path -> the gradient of this step, of the records of all processes."""
        processes = self._processes
        if self._fresh is not None:
            self._fresh.begin_step()  # an empty share draws no A, but all exchange its seed
        if processes.size > 1:
            self._sums = processes.sum_to_first(
                {
                    path: self._sums.get(path, wide(zero))
                    for path, zero in self._noising.zeros().items()
                }
            )
        if processes.rank == 0:
            digest = self._sum_digest()
            # From here on the step counts, whatever becomes of it.
            self._charge(digest)
            std, step = self._noise_std_of_sum, self.step
            noised = self._noising.release(
                self._sums,
                std,
                lambda size, path: self._randomness.normal(
                    size, "noise", step, path, digest or ""
                ),
            )
            released = processes.from_first(noised)
        else:
            released = processes.from_first(self._noising.zeros())
            self._charge(None)
        return {path: self._noising.gradient(path, mean) for path, mean in released.items()}


def _run_name(randomness: Randomness) -> str:
    """A name for one source of randomness: equal for equal keys, and of no use to find one."""
    return f"{randomness.seed('run'):032x}"
