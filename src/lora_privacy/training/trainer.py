"""transformers' Trainer on top of ``make_private``.

The Trainer drives logging, evaluation, schedules and checkpoints; everything that ε rests on is
``make_private``'s. One step of the Trainer is one Poisson batch, whatever its size. What the
Trainer does by itself that would break the accounting (a second clip, accumulation, a loss
averaged over the batch's tokens, pickled states, logged training losses) is replaced here or
refused by name.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import DataLoader, Dataset
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Not from transformers itself: a type checker would read all its models to find them there.
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback

from lora_privacy.errors import StorageError, UnsupportedTrainingError
from lora_privacy.training.engine import make_private
from lora_privacy.training.guard import preflight
from lora_privacy.training.methods import refuse_packing
from lora_privacy.training.private_training import PrivateTraining
from lora_privacy.training.record_loss import is_by_token, record_losses, refuse_ignored

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers.trainer_callback import TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments

    from lora_privacy.dp import PrivacyBound
    from lora_privacy.training.clipping import Transform
    from lora_privacy.training.engine import Denoiser
    from lora_privacy.training.privacy import PrivacyArguments

__all__ = ["PrivateTrainer", "StepLoader"]

_logger = logging.getLogger(__name__)

LEDGER = "ledger.jsonl"
_PRIVATE, _SCHEDULER, _ARGUMENTS = "private_training", "scheduler.json", "training_args.json"
_SCANNED_RECORDS, _CHECKED_RECORDS = 1000, 4  # of the isolation check
# Computed from the private records without noise.
_PRIVATE_LOGS = ("loss", "grad_norm", "train_loss")


class PrivateTrainer(Trainer):
    """A ``Trainer`` whose training is private.

    ``per_device_train_batch_size`` is what runs at once. The expected batch of a step is that
    times ``gradient_accumulation_steps`` times the number of processes; divided by the number of
    records it is the sampling rate. Under torchrun the processes train together.

    The loss of a causal language model, and of any model with a label a token, is the mean over a
    record's own tokens, averaged over records, in evaluation too. Other models' own loss must be a
    mean over records, as ``compute_loss_func`` must.

    Args:
        *args: As for ``Trainer``.
        privacy: What it may cost.
        transform: As for ``make_private``.
        denoiser: As for ``make_private``.
        **options: As for ``Trainer``; ``optimizers`` may give an optimizer and a scheduler.

    Attributes:
        private: The training, once it has begun: ``private.bound()``, ``private.release(folder)``.

    Raises:
        UnsupportedTrainingError: An argument asks for what cannot be accounted.

    ::

        trainer = PrivateTrainer(
            model,
            TrainingArguments("out", per_device_train_batch_size=32,
                              gradient_accumulation_steps=16, learning_rate=1e-2),
            train_dataset=records, processing_class=tokenizer,
            privacy=PrivacyArguments(target_epsilon=8.0, delta=1e-5),
        )
        trainer.train()
        print(trainer.bound())
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        privacy: PrivacyArguments,
        transform: Transform | None = None,
        denoiser: Denoiser | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **options)
        given: TrainingArguments = self.args
        _refuse(given, self)
        self.privacy: PrivacyArguments = privacy
        self.private: PrivateTraining | None = None
        self._transform, self._denoiser = transform, denoiser
        self._resume: Path | None = None
        self.expected_batch_size: int = (
            given.per_device_train_batch_size
            * given.gradient_accumulation_steps
            * given.world_size
        )
        # The user's arguments stay as they are.
        self.args: TrainingArguments = copy.copy(given)
        self.args.max_grad_norm = 0.0
        self.args.gradient_accumulation_steps = 1
        self.args.average_tokens_across_devices = False
        self.args.ignore_data_skip = True  # the loader goes on where the training stands
        # No DistributedDataParallel: it would exchange gradients that are not clipped.
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = partial(prepare, evaluation_mode=True)
        self.add_callback(_Steps(self))

    def bound(self, delta: float | None = None) -> PrivacyBound:
        """What is proved of the training so far.

        Raises:
            UnsupportedTrainingError: It has not begun.
        """
        if self.private is None:
            raise UnsupportedTrainingError("Nothing was trained yet; call train() first.")
        return self.private.bound(delta)

    # ---- data and steps --------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:  # noqa: ANN401
        """Poisson batches, one item a step."""
        if self._resume is not None and self.private is not None:
            self.private.close()
            self.private = None
        if self.private is None:
            self.private = self._begin(self._resume)
        return StepLoader(self.private)

    def _begin(self, resume: Path | None) -> PrivateTraining:
        loader = self._loader()
        steps_per_epoch = max(
            1, round(len(cast("Any", loader.dataset)) / self.expected_batch_size)
        )
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * steps_per_epoch)
        self.create_optimizer()
        optimizer = self._plain_optimizer()
        if self.privacy.isolation_check:
            self._check_isolation(loader, optimizer)
        privacy = self.privacy
        ledger = privacy.ledger or str(Path(cast("str", self.args.output_dir)) / LEDGER)
        return make_private(
            cast("nn.Module", self.model),
            optimizer,
            loader,
            method=privacy.method,
            max_grad_norm=privacy.max_grad_norm,
            privacy=privacy.target(steps),
            delta=privacy.delta,
            adjacency=privacy.adjacency,
            physical_batch_size=self._train_batch_size,
            clipping=privacy.clipping,
            transform=self._transform,
            denoiser=self._denoiser,
            secure=privacy.secure,
            deterministic=privacy.deterministic,
            ledger=ledger,
            resume=None if resume is None else resume / _PRIVATE,
            distributed=self.args.world_size > 1,
        )

    def _loader(self) -> DataLoader[Any]:
        """All records, with the batch size of all processes."""
        if self.train_dataset is None:
            raise ValueError("PrivateTrainer needs a train_dataset.")
        dataset = cast("Any", self.train_dataset)
        refuse_packing(DataLoader(dataset, collate_fn=self.data_collator))
        return DataLoader(
            dataset,
            batch_size=self.expected_batch_size,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "training"),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _check_isolation(self, loader: DataLoader[Any], optimizer: torch.optim.Optimizer) -> None:
        records = cast("Any", loader.dataset)
        count = min(_SCANNED_RECORDS, len(records))
        rows = sorted({round(i * (len(records) - 1) / max(1, count - 1)) for i in range(count)})
        rows.sort(key=lambda row: _length(records[row]))
        # The shortest, the longest, and some between.
        few = min(_CHECKED_RECORDS, len(rows))
        chosen = [records[rows[i * (len(rows) - 1) // max(1, few - 1)]] for i in range(few)]
        if len(chosen) < 2:
            return  # a single record is isolated

        def collate(some: list[Any]) -> Any:  # noqa: ANN401
            return self._prepare_inputs(loader.collate_fn(some))

        def loss_of(model: nn.Module, records: Any) -> Tensor:  # noqa: ANN401
            return cast("Tensor", self.compute_loss(model, dict(records)))

        preflight(
            cast("nn.Module", self.model), optimizer, chosen, loss_of=loss_of, collate=collate
        )

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,  # noqa: ANN401
        num_items_in_batch: Any = None,  # noqa: ANN401, ARG002
    ) -> Tensor:
        """Run the parts of one Poisson batch; the step after the last one is the Trainer's."""
        assert self.private is not None
        model.train()
        total = torch.zeros((), device=self.args.device)
        parts = 0
        for batch in inputs:  # asking for the next part takes in the one before
            with self.compute_loss_context_manager():
                loss = cast("Tensor", self.compute_loss(model, self._prepare_inputs(batch)))
            self.accelerator.backward(loss)
            total += loss.detach()
            parts += 1
        return total / max(parts, 1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,  # noqa: ANN401
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401, ARG002
    ) -> Any:  # noqa: ANN401
        """Mean over records, each a function of its record alone."""
        labels: Any = inputs.get("labels")
        own = self.compute_loss_func is not None and labels is not None
        refuse_ignored(inputs)
        if not own and not is_by_token(labels):
            outputs = model(**inputs)
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
            return (loss, outputs) if return_outputs else loss
        config = getattr(self.model, "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            # Its own loss, over the tokens of the batch, would be computed for nothing.
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs)
        if own:
            loss = cast("Any", self.compute_loss_func)(outputs, labels, num_items_in_batch=None)
        else:
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
            causal = _is_causal(cast("Any", self.model))
            loss = record_losses(logits, cast("Tensor", labels), shift=causal).mean()
        return (loss, outputs) if return_outputs else loss

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        # accelerate would wrap its own wrapper at a second call of train().
        self.optimizer = self._plain_optimizer()
        return super()._prepare_for_training(*args, **kwargs)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", cast("Any", self.optimizer))

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:  # noqa: ARG002
        """The expected batch."""
        return self.expected_batch_size

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ANN401, ARG002
        """Not counted: the size of a Poisson batch is private."""
        return 0

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401, ARG002
        return None

    # ---- what is reported ------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log ε in place of what is computed from private records without noise."""
        if self.private is not None and any(name in logs for name in _PRIVATE_LOGS):
            if not self.privacy.log_private_metrics:
                for name in _PRIVATE_LOGS:
                    logs.pop(name, None)
            logs["epsilon"] = self.private.bound().epsilon
        super().log(logs, start_time)

    # ---- checkpoints -----------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,  # noqa: ANN401
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:  # noqa: ANN401
        """Train, or go on from a checkpoint of this class with its ledger and schedule.

        Returns:
            As ``Trainer.train``; the training loss, which no ε covers, is NaN unless
            ``log_private_metrics`` asks for it.

        Raises:
            StorageError: The folder is no such checkpoint.
        """
        if resume_from_checkpoint is True:
            from transformers.trainer_utils import get_last_checkpoint

            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise StorageError(f"There is no checkpoint in {self.args.output_dir} to resume.")
        self._resume = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        try:
            done = super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)
        finally:
            self._resume = None
        return done if self.privacy.log_private_metrics else done._replace(training_loss=math.nan)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, ARG002
        """Refused: its choice looks at the private records once a trial.

        Raises:
            UnsupportedTrainingError: Always.
        """
        raise UnsupportedTrainingError(
            "hyperparameter_search chooses among trainings on the private records, and the choice "
            "is not accounted. Search on public data."
        )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401, ARG002
        """Refused: see ``private.release``.

        Raises:
            UnsupportedTrainingError: Always.
        """
        raise UnsupportedTrainingError(
            "push_to_hub uploads the output folder, with the ledger and private states. Upload "
            "what trainer.private.release(folder) writes."
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401, ARG002
        if not (Path(resume_from_checkpoint) / _PRIVATE).is_dir():
            raise StorageError(
                f"{resume_from_checkpoint} is no checkpoint of a PrivateTrainer: it has no folder "
                f"{_PRIVATE!r}."
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.private is not None
        self.private.save(Path(output_dir) / _PRIVATE)
        if self.args.should_save:
            state = cast("Any", self.lr_scheduler).state_dict()
            try:
                text = json.dumps(state)
            except TypeError as error:
                raise StorageError(
                    f"The scheduler's state cannot be stored as JSON, and nothing is pickled: "
                    f"{error}."
                ) from error
            (Path(output_dir) / _SCHEDULER).write_text(text, encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / _SCHEDULER
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError(f"{path} holds no state of a scheduler: {error}.") from error
        scheduler = cast("Any", self.lr_scheduler)
        scheduler.load_state_dict(state)
        # Making the scheduler set the rates of a first step.
        for group, rate in zip(
            self._plain_optimizer().param_groups, scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: noise has generators of its own, and pickle is not written."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing was saved."""

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or cast("str", self.args.output_dir))
            # A pickle, which whoever loads it runs.
            (folder / "training_args.bin").unlink(missing_ok=True)
            (folder / _ARGUMENTS).write_text(self.args.to_json_string(), encoding="utf-8")


class StepLoader:
    """What the Trainer iterates over: an item a step, which iterates over its parts."""

    def __init__(self, private: PrivateTraining) -> None:
        self.dataset: Dataset[Any] = private.data_loader.dataset
        self._private, self._loader = private, private.data_loader

    def __len__(self) -> int:
        return self._loader.steps_per_epoch

    def __iter__(self) -> Iterator[Iterator[Any]]:
        if self._private.steps_left() == 0:
            _logger.warning("The privacy target has paid for all its steps: the training ends.")
            return iter(())  # the Trainer ends at an epoch without a step
        return self._loader.steps()


class _Steps(TrainerCallback):
    """End with the budget, and count epochs by the steps of the whole training."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self._trainer = trainer

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ANN401, ARG002
    ) -> None:
        """After each step."""
        private = cast("PrivateTraining", self._trainer.private)
        state.epoch = state.global_step / private.data_loader.steps_per_epoch
        if private.steps_left() == 0:
            control.should_training_stop = True


def _length(record: Any) -> int:  # noqa: ANN401
    """Tokens of a record; 0 where they cannot be told."""
    try:
        mask = record.get("attention_mask")
        return len(record["input_ids"]) if mask is None else int(sum(mask))
    except (AttributeError, TypeError, KeyError):
        return 0


def _is_causal(model: nn.Module) -> bool:
    inner = cast("Any", model).get_base_model() if hasattr(model, "get_base_model") else model
    return (
        getattr(inner, "loss_type", None) == "ForCausalLM"
        or type(inner).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )


def _refuse(args: TrainingArguments, trainer: Trainer) -> None:
    """Raise UnsupportedTrainingError for arguments that break what is accounted."""
    refused = {
        "fp16": (args.fp16, "its loss scaling multiplies gradients before the clip; take bf16"),
        "deepspeed": (args.deepspeed, "it has an optimizer of its own"),
        "fsdp": (args.fsdp, "it shards parameters that must be clipped whole"),
        "torch_compile": (args.torch_compile, "compiled layers call no hooks"),
        "auto_find_batch_size": (
            args.auto_find_batch_size,
            "it begins a training again; lower per_device_train_batch_size, which changes no ε",
        ),
        "label_smoothing_factor": (
            args.label_smoothing_factor,
            "it averages over the tokens of the batch; pass compute_loss_func",
        ),
        "use_liger_kernel": (args.use_liger_kernel, "it replaces layers that are clipped"),
        "include_num_input_tokens_seen": (
            str(args.include_num_input_tokens_seen) not in ("no", "False"),
            "the sizes of Poisson batches are private",
        ),
        "push_to_hub": (
            args.push_to_hub,
            "it uploads checkpoints with their private state; upload what "
            "trainer.private.release(folder) writes",
        ),
        "train_sampling_strategy": (
            str(getattr(args, "train_sampling_strategy", "random")) != "random",
            "every record must be drawn by its own coin",
        ),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha,
            "its noise depends on the longest record of the batch",
        ),
        "parallelism_config": (
            args.parallelism_config,
            "it shares the tokens or layers of a record among processes",
        ),
        "the training data as eval_dataset": (
            trainer.eval_dataset is not None and trainer.eval_dataset is trainer.train_dataset,
            "metrics of private records are not covered, nor a schedule or a choice by them",
        ),
        "n_gpu > 1": (args.n_gpu > 1, "DataParallel joins samples; start it with torchrun"),
        "model_init": (trainer.model_init, "pass the model"),
    }
    for name, (is_set, why) in refused.items():
        if is_set:
            raise UnsupportedTrainingError(f"PrivateTrainer does not take {name}: {why}.")
