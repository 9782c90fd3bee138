"""What the projections of a run *without* noise do, in the logs of transformers' Trainer."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from transformers.trainer_callback import TrainerCallback

from lora_privacy import _validate
from lora_privacy.core import GradientProbe, adapters, drift, snapshot
from lora_privacy.dp import implied_privacy
from lora_privacy.errors import UnsupportedTrainingError
from lora_privacy.training.trainer import StepLoader

if TYPE_CHECKING:
    from transformers.trainer import Trainer
    from transformers.trainer_callback import TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments

    from lora_privacy.core import AdapterSnapshot

__all__ = ["NoiseCallback"]


class NoiseCallback(TrainerCallback):
    """Log the noise that projections put into gradients, how A drifts, and the ε one might read.

    With every log come ``noise_to_gradient``, the median over layers of ‖G(AᵀA − I)‖/‖G‖ at the
    last probed step; ``drift_of_a``, the largest ‖A_t − A_0‖/‖A_0‖; and
    ``implied_epsilon_not_a_guarantee``, the heuristic of ``dp.implied_privacy``, which proves
    nothing: a run without noise is not private at any ε. For runs of a plain ``Trainer``: they
    are computed from the records.

    A callback that is passed as ``callbacks=[…]`` comes after the reporters of ``report_to``, so
    that its numbers are in ``trainer.state.log_history`` and on the screen only. To put it before
    them: ``NoiseCallback(every=20).attach(trainer)``.

    Args:
        every: Probe one step in so many.
        delta: δ of the reading.
        distortion: τ of the reading.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, *, every: int = 10, delta: float = 1e-5, distortion: float = 0.5) -> None:
        self._every = _validate.integer("every", every, 1)
        _validate.inside("delta", delta, 0, 1)
        self._delta, self._distortion = delta, distortion
        self._probe: GradientProbe | None = None
        self._reference: AdapterSnapshot | None = None
        self._shapes: list[tuple[int, int]] = []
        self._batch_size = self._records = 0
        self._ratio: float | None = None

    def attach(self, trainer: Trainer) -> None:
        """Put it before all callbacks of ``trainer``."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Hold A as it is, and begin to probe.

        Raises:
            UnsupportedTrainingError: The run is private, and what is logged here would not be.
            NoTargetError: The model carries no adapter.
        """
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        if isinstance(loader, StepLoader):
            raise UnsupportedTrainingError(
                "NoiseCallback logs numbers computed from the records without noise: leave it out "
                "of a PrivateTrainer."
            )
        self._end()  # of a run that raised
        self._shapes = [(x.out_features, x.rank) for x in adapters(model).values()]
        self._reference, self._ratio = snapshot(model), None
        parts = args.gradient_accumulation_steps * args.world_size
        self._records = len(loader.dataset)
        self._batch_size = min(args.per_device_train_batch_size * parts, self._records)
        self._probe = GradientProbe(model, self._every)
        self._probe.__enter__()

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Read the probe."""
        if self._probe is None:
            return
        ratios = [
            float(record.noise.norm() / norm)
            for record in self._probe.records.values()
            if (norm := record.gradient.norm()) > 0
        ]
        if ratios:
            self._ratio = statistics.median(ratios)
        self._probe.step()

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        """Add the numbers to what is logged."""
        logs = kwargs["logs"]
        if self._probe is None or "loss" not in logs or not state.global_step:
            return
        found: dict[str, float] = {}
        if self._ratio is not None:
            found["noise_to_gradient"] = self._ratio
        assert self._reference is not None
        drifts = drift(kwargs["model"], self._reference)
        if drifts:
            found["drift_of_a"] = max(drifts.values())
        found["implied_epsilon_not_a_guarantee"] = implied_privacy(
            layers=self._shapes,
            batch_size=self._batch_size,
            dataset_size=self._records,
            steps=state.global_step,
            delta=self._delta,
            distortion=self._distortion,
        ).epsilon
        logs.update(found)
        state.log_history[-1].update(found)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """Stop probing."""
        self._end()

    def _end(self) -> None:
        if self._probe is not None:
            self._probe.__exit__()
        self._probe = None
