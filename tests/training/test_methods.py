"""Traps of peft, transformers and their neighbours: handled exactly, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from private_models import (
    VOCABULARY,
    FakeQuantLinear,
    clipped_by_hand,
    gpt2,
    llama,
    loop,
    lora_mlp,
    norms_of,
    quantised_llama,
    sequence_losses,
    trained,
    with_peft,
)
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding

from lora_privacy.core import LoRALinear
from lora_privacy.errors import (
    IsolationError,
    StaleParameterError,
    UnsupportedLayerError,
    UnsupportedTrainingError,
)
from lora_privacy.training import NoiseMultiplier, PrivateTraining, make_private, preflight
from lora_privacy.training.methods import METHODS, Method, refuse_packing
from lora_privacy.training.randomness import KeyedRandomness

NONE = 1e-30  # a noise multiplier that adds nothing in float32
SIZE, LENGTH = 6, 5
ATTENTION = ["q_proj", "v_proj"]
NO_FLORA: tuple[Method, ...] = ("dp-lora", "dp-lora-fa", "dp-sgd")


class Sentences(Dataset[dict[str, Tensor]]):
    """Record i has i padded positions at its end, but two real ones."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < max(2, LENGTH - index)).long()
        return {"input_ids": ids, "attention_mask": mask}


def whole() -> dict[str, Tensor]:
    return default_collate([Sentences()[i] for i in range(SIZE)])


def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return sequence_losses(model, batch["input_ids"], batch["attention_mask"])


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return losses_of(model, batch).mean()


def sgd(model: nn.Module, lr: float = 1.0) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def make(
    model: nn.Module,
    method: Method = "dp-lora",
    *,
    optimizer: torch.optim.Optimizer | None = None,
    z: float = NONE,
    collate: Any = None,
    **options: Any,
) -> PrivateTraining:
    options = {"max_grad_norm": 1.0, "sample_rate": 1.0, "secure": False, **options}
    return make_private(
        model,
        sgd(model) if optimizer is None else optimizer,
        DataLoader(Sentences(), collate_fn=collate),
        method=method,
        privacy=NoiseMultiplier(z),
        delta=1e-5,
        **options,
    )


def run(private: PrivateTraining) -> None:
    """An epoch; of one step at a sampling rate of 1."""
    for batch in private.data_loader:
        mean_loss(private.model, batch).backward()
        private.optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def llama_peft(**options: Any) -> nn.Module:
    return with_peft(llama(), options.pop("targets", ATTENTION), **options)


def set_init(init: str) -> nn.Module:
    """To build it so needs data; what that leaves behind is the configuration.

    peft takes every name that begins with corda.
    """
    model = llama_peft()
    model.peft_config["default"].init_lora_weights = init
    return model


def assert_step_is_by_hand(
    model: nn.Module,
    method: Method = "dp-lora",
    *,
    tolerance: float = 1e-5,
    part: int | None = None,
    fresh: Callable[[], nn.Module] | None = None,
) -> None:
    """One step moves what is trained by (clipped sum)/N, and nothing else.

    Oracle: a backward pass a sample through a copy without hooks (or ``fresh``), and the clip of
    whole gradients in double precision at their median, so that half of the samples are clipped.
    The error is a share of a parameter's norm, or of 1e-3 of the whole norm where a parameter's
    cancels to rounding (biases of keys before a softmax).
    """
    oracle = copy.deepcopy(model) if fresh is None else fresh()
    if method == "dp-lora-fa":
        for name, parameter in oracle.named_parameters():
            if "lora_A" in name or "project" in name:
                parameter.requires_grad_(False)
    gradients = loop(oracle, lambda m: losses_of(m, whole()))
    limit = float(norms_of(gradients).median())
    expected = clipped_by_hand(gradients, limit)
    floor = 1e-3 * float(torch.stack([value.norm() for value in expected.values()]).norm())
    before = weights(model)
    private = make(model, method, max_grad_norm=limit, physical_batch_size=part)
    caught: dict[str, Tensor] = {}
    private.optimizer.register_step_pre_hook(
        lambda *_: caught.update(
            {n: p.grad for n, p in trained(model).items() if p.grad is not None}
        )
    )
    run(private)
    private.close()
    assert private.step == 1
    assert set(expected) == set(private.parameters)
    for name, value in weights(model).items():
        if name not in expected:
            assert torch.equal(value, before[name]), name
            continue
        assert value.equal(before[name] - caught[name]), name  # a learning rate of 1
        error = (caught[name].double() * SIZE - expected[name]).norm()
        error = error / expected[name].norm().clamp(min=floor)
        assert error <= tolerance, (name, float(error))


# ---- peft: what is read from data or has no per-sample gradients --------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("init", ["eva", "corda", "corda_ipm", "lora_ga", "EVA"])
def test_an_initialisation_from_data_is_refused(init: str, method: Method) -> None:
    with pytest.raises(UnsupportedTrainingError, match=f"'{init}' computes A from training data"):
        make(set_init(init), method)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_an_initialisation_from_a_law_or_from_weights_is_trained(init: bool | str) -> None:
    """Built without ``randomise``: what is trained is the start that peft makes."""

    def build() -> nn.Module:
        config = LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=init)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return get_peft_model(llama(), config)

    model = build()
    before = weights(model)
    private = make(model)
    run(private)
    assert private.step == 1
    # A law leaves B at 0, where A has no gradient yet.
    assert any(not p.equal(before[name]) for name, p in trained(model).items())


@pytest.mark.parametrize("method", NO_FLORA)
def test_an_initialisation_that_loading_cannot_repeat_is_refused(
    method: Method, tmp_path: Path
) -> None:
    """Built twice, a randomised PiSSA leaves two bases, and one's adapter is not the other's."""
    model = llama_peft(init_lora_weights="pissa_niter_2")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path))
    with torch.no_grad():
        assert not loaded(**whole()).logits.equal(model(**whole()).logits)
    with pytest.raises(UnsupportedTrainingError, match=r"pissa_niter_2.*Take 'pissa'"):
        make(model, method)


def two_active() -> nn.Module:
    model = llama_peft()
    model.add_adapter("two", LoraConfig(r=4, target_modules=ATTENTION))
    model.base_model.set_adapter(["default", "two"])
    return model


def cast_adapters() -> nn.Module:
    config = LoraConfig(r=4, target_modules=ATTENTION)
    return get_peft_model(llama().bfloat16(), config, autocast_adapter_dtype=False)


def on_parameters(targets: list[str]) -> nn.Module:
    config = LoraConfig(r=4, target_modules=targets, target_parameters=["q_proj.weight"])
    return get_peft_model(llama(), config)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DoRA": (lambda: llama_peft(use_dora=True), "q_proj' is Dora.*not plain LoRA"),
    "parameters": (lambda: on_parameters([]), "q_proj' is adapted by peft's target_parameters"),
    "parameters and layers": (lambda: on_parameters(["v_proj"]), "q_proj'.*target_parameters"),
    "another method of peft": (
        lambda: get_peft_model(
            llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])
        ),
        "q_proj' is adapted by peft's Linear; only LoRA",
    ),
    "token indices": (
        lambda: llama_peft(trainable_token_indices=[1, 2]),
        "peft's TrainableTokensLayer; only LoRA",
    ),
    "embedding": (
        lambda: llama_peft(targets=["q_proj", "embed_tokens"]),
        "embed_tokens' is LoRA on an embedding",
    ),
    "saved embedding": (
        lambda: llama_peft(modules_to_save=["embed_tokens"]),
        r"embed_tokens.*\(Embedding: weight\) have no per-sample gradients",
    ),
    "several adapters": (two_active, r"several active adapters \(default, two\); choose one"),
    "adapters in bf16": (cast_adapters, r"lora_.*trained in torch\.bfloat16"),
    "all in bf16": (lambda: llama_peft().bfloat16(), r"lora_.*trained in torch\.bfloat16"),
}


@pytest.mark.parametrize("method", NO_FLORA)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_per_sample_gradients_is_refused_at_once(kind: str, method: Method) -> None:
    """By its name, before a hook is installed."""
    build, message = REFUSED[kind]
    model = build()
    with pytest.raises(UnsupportedLayerError, match=message):
        make(model, method)
    assert not any(m._forward_pre_hooks for m in model.modules())


# ---- what works, exactly ------------------------------------------------------------------------


def checkpointed(reentrant: bool) -> nn.Module:
    model = llama_peft()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def fake_quantised() -> nn.Module:
    model = llama()
    for block in model.model.layers:
        for name in ATTENTION:
            plain = block.self_attn.get_submodule(name)
            packed = FakeQuantLinear(plain.in_features, plain.out_features)
            packed.load_state_dict(plain.state_dict())
            setattr(block.self_attn, name, packed)
    return with_peft(model, ATTENTION)


def small_gpt2(**options: Any) -> nn.Module:
    return with_peft(gpt2(dropout=0.0), ["c_attn", "c_fc"], fan_in_fan_out=True, **options)


WORKS: dict[str, Callable[[], nn.Module]] = {
    "grouped attention": lambda: llama_peft(targets=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "rslora": lambda: llama_peft(use_rslora=True),
    "biases of adapted layers": lambda: llama_peft(bias="lora_only"),
    "biases of B": lambda: llama_peft(lora_bias=True),
    "all biases": lambda: small_gpt2(bias="all"),
    "head": lambda: llama_peft(modules_to_save=["lm_head"]),
    "head and all biases": lambda: llama_peft(modules_to_save=["lm_head"], bias="all"),
    "conv1d": small_gpt2,
    "quantised base": fake_quantised,
    "quantised base, ours": quantised_llama,
    "pissa": lambda: llama_peft(init_lora_weights="pissa"),
    "olora": lambda: llama_peft(init_lora_weights="olora"),
    "float64": lambda: llama_peft().double(),
}


@pytest.mark.parametrize("kind", WORKS)
def test_a_step_is_the_clipped_sum(kind: str) -> None:
    assert_step_is_by_hand(WORKS[kind]())


def test_all_biases_are_those_of_norms_too_and_not_of_the_saved_head() -> None:
    """The head's first copy is not used: noise would move it."""
    names = set(make(small_gpt2(bias="all")).parameters)
    assert any("ln_1.bias" in name for name in names)
    head = set(make(llama_peft(modules_to_save=["lm_head"], bias="all")).parameters)
    assert {name for name in head if "lm_head" in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


@pytest.mark.parametrize("part", [1, 2, 4])
@pytest.mark.parametrize("kind", ["head and all biases", "conv1d"])
def test_a_batch_in_micro_batches_is_the_same_step(kind: str, part: int) -> None:
    assert_step_is_by_hand(WORKS[kind](), part=part)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    """Oracle: the model without it. Every block runs twice, and its taps count once."""
    model = checkpointed(reentrant)
    calls: list[int] = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_step_is_by_hand(model, fresh=llama_peft)
    assert len(calls) == 2


def test_a_half_precision_base_with_adapters_in_full_precision() -> None:
    """To 3e-2 of the same model's own sample by sample pass; the base stays bit for bit."""
    model = with_peft(llama().bfloat16(), ATTENTION)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert_step_is_by_hand(model, tolerance=3e-2)


@pytest.mark.parametrize("head", [False, True])
def test_dp_lora_fa_freezes_the_a_of_peft(head: bool) -> None:
    """B moves by its clipped sum, with norms that leave A out; the head, if saved, moves too."""
    model = llama_peft(modules_to_save=["lm_head"] if head else None)
    assert any("lora_A" in name for name in trained(model))
    assert_step_is_by_hand(model, "dp-lora-fa")
    kinds = {"lora_B" if "lora_B" in name else name for name in trained(model)}
    assert len(kinds) == 1 + head
    with pytest.raises(UnsupportedTrainingError, match=r"A of .* is frozen; method='dp-lora-fa'"):
        make(model)


def test_of_two_adapters_the_active_one_is_trained() -> None:
    model = llama_peft()
    model.add_adapter("two", LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=False))
    model.set_adapter("two")
    assert_step_is_by_hand(model)
    assert all(".two." in name for name in trained(model))


# ---- adapters that the forward pass goes around -------------------------------------------------


@pytest.mark.parametrize("method", NO_FLORA)
@pytest.mark.parametrize("head", [False, True])
def test_a_merged_adapter_of_peft_is_refused(head: bool, method: Method) -> None:
    """With a head beside it, training would go on and move the adapter by noise alone."""
    model = llama_peft(modules_to_save=["lm_head"] if head else None)
    model.merge_adapter()
    with pytest.raises(UnsupportedTrainingError, match=r"q_proj' is merged.*unmerge_adapter\(\)"):
        make(model, method)
    model.unmerge_adapter()
    run(make(model, method))


@pytest.mark.parametrize("method", NO_FLORA)
def test_a_merged_adapter_of_ours_is_refused(method: Method) -> None:
    model = lora_mlp()
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    layer.merge()
    with pytest.raises(UnsupportedTrainingError, match="'0' is merged"):
        make(model, method)


@pytest.mark.parametrize("method", ["dp-lora", "dp-lora-fa"])
def test_a_disabled_adapter_is_refused(method: Method) -> None:
    """As peft leaves it, frozen, beside a head; and unfrozen by hand."""
    model = llama_peft(modules_to_save=["lm_head"])
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.requires_grad_(True)
    with pytest.raises(UnsupportedTrainingError, match=r"is disabled.*enable_adapter_layers\(\)"):
        make(model, method)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    for kind in (method, "dp-sgd"):
        with pytest.raises(UnsupportedTrainingError, match="is disabled"):
            make(model, kind)
    model.base_model.enable_adapter_layers()
    run(make(model, method))


@pytest.mark.parametrize("method", ["dp-lora", "dp-lora-fa"])
def test_an_adapter_loaded_for_inference_is_refused(method: Method, tmp_path: Path) -> None:
    """Its B is frozen; with the head unfrozen by hand, the head alone would be trained."""
    llama_peft().save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(llama(), str(tmp_path))
    model.base_model.model.lm_head.requires_grad_(True)
    with pytest.raises(UnsupportedTrainingError, match=r"B of .* is frozen.*is_trainable=True"):
        make(model, method)
    run(make(PeftModel.from_pretrained(llama(), str(tmp_path), is_trainable=True), method))


def test_a_frozen_adapter_is_a_part_of_the_base_for_dp_sgd() -> None:
    """Merged or not: nothing of it is trained."""
    model = llama_peft().requires_grad_(False)
    model.base_model.model.lm_head.requires_grad_(True)
    model.merge_adapter()
    assert_step_is_by_hand(model, "dp-sgd")


# ---- the loss and the loader --------------------------------------------------------------------


def test_the_default_loss_of_a_language_model_is_refused() -> None:
    """It averages over the tokens of the batch; a mean over each record's own tokens passes."""
    model = llama_peft()
    batch = whole()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with pytest.raises(IsolationError, match="number of tokens"):
        preflight(model, sgd(model), batch)
    preflight(model, sgd(model), batch, loss_of=mean_loss)
    assert_step_is_by_hand(model)


def test_an_empty_batch_that_comes_first_is_a_step_of_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The attention of transformers cannot reshape 0 records: none may reach it."""
    with pytest.raises(RuntimeError, match="0 elements"):
        mean_loss(llama(), {key: value[:0] for key, value in whole().items()})
    private = make(llama_peft(), z=1.0, sample_rate=0.25)
    rows = [np.array([], dtype=int), np.array([1, 4]), np.array([], dtype=int), np.array([0])]
    monkeypatch.setattr(private.data_loader, "indices", lambda step: rows[step])
    before = weights(private.model)
    sizes, steps = [], []
    for batch in private.data_loader:
        sizes.append(len(batch["input_ids"]))
        steps.append(private.step)
        if private.step == 1:
            moved = {n for n, p in private.model.named_parameters() if not p.equal(before[n])}
            assert moved == set(private.parameters)
        mean_loss(private.model, batch).backward()
        private.optimizer.step()
    assert (sizes, steps, private.step, len(private._ledger)) == ([2, 1], [1, 3], 4, 4)


class PaddingFree:
    """As trl's collator with ``padding_free=True``."""

    padding_free = True

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return DataCollatorWithFlattening()(rows)


class Flattening(DataCollatorWithFlattening):
    """A collator of somebody's own."""


class Tokenizer:
    """Stands where a collator keeps its tokenizer."""


@pytest.mark.parametrize("collate", [DataCollatorWithFlattening(), Flattening(), PaddingFree()])
def test_a_collator_that_joins_records_in_one_row_is_refused(collate: Any) -> None:
    loader = DataLoader(Sentences(), collate_fn=collate)
    with pytest.raises(UnsupportedTrainingError, match=type(collate).__name__ + ", which joins"):
        refuse_packing(loader)


def test_a_row_of_several_records_is_refused_at_the_first_step() -> None:
    """Whatever joined them."""

    def join(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.cat([row[key] for row in rows])[None] for key in rows[0]}

    private = make(llama_peft(), collate=join)
    with pytest.raises(UnsupportedLayerError, match=r"saw 1 samples of a batch of 6.*packing"):
        run(private)
    assert not len(private._ledger)


def test_a_collator_that_pads_passes() -> None:
    refuse_packing(DataLoader(Sentences()))
    padding: Any = DataCollatorWithPadding
    refuse_packing(DataLoader(Sentences(), collate_fn=padding(Tokenizer())))


# ---- the optimizer ------------------------------------------------------------------------------


def test_an_optimizer_made_before_peft_is_stale() -> None:
    """It holds the base, which peft freezes, and none of the adapters."""
    base = llama()
    optimizer = torch.optim.SGD(base.parameters(), lr=1.0)
    model = with_peft(base, ATTENTION, modules_to_save=["lm_head"])
    for check in (lambda: make(model, optimizer=optimizer), lambda: preflight(model, optimizer)):
        with pytest.raises(
            StaleParameterError, match=r"lacks the trained.*lora_A.*lm_head|lora_A"
        ):
            check()


@contextmanager
def replaced_on_conversion() -> Iterator[None]:
    """Let ``model.to`` make new parameters, as it does where the old ones cannot be kept."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_an_optimizer_made_before_a_conversion_is_refused_if_it_is_stale() -> None:
    """Where it can, torch keeps the parameters, and the optimizer still holds them."""
    model = llama_peft()
    optimizer = sgd(model)
    model.to(torch.float64)
    before = weights(model)
    run(private := make(model, optimizer=optimizer))
    moved = {name for name, value in weights(model).items() if not value.equal(before[name])}
    assert moved == set(private.parameters)

    model = llama_peft()
    optimizer = sgd(model)
    with replaced_on_conversion():
        model.to(torch.float64)
    for check in (lambda: make(model, optimizer=optimizer), lambda: preflight(model, optimizer)):
        with pytest.raises(StaleParameterError, match="moved, converted or wrapped"):
            check()

    model = llama_peft()
    private = make(model)
    with replaced_on_conversion():
        model.to(torch.float64)
    with pytest.raises((StaleParameterError, UnsupportedLayerError), match=r"lora_A"):
        run(private)


def test_a_schedule_sets_the_rate_of_every_step() -> None:
    """Oracle: the gradient caught at the step, times the rate that the schedule is to set."""
    model = llama_peft()
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.5)
    private = make(model, optimizer=optimizer, z=1.0, sample_rate=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    caught: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *_: caught.update({n: p.grad for n, p in private.parameters.items()})
    )
    seen = 0
    while private.step < 4:
        for batch in private.data_loader:
            # An empty batch, of which the loop hears nothing, moves the weights at the old rate.
            before = weights(model)
            mean_loss(model, batch).backward()
            optimizer.step()
            for name, parameter in private.parameters.items():
                expected = before[name] - 0.5 / (1 + seen) * caught[name]
                torch.testing.assert_close(parameter.detach(), expected)
            schedule.step()
            seen += 1
    assert seen >= 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / (1 + seen), rel=1e-12)


def test_zeroed_and_clipped_gradients_change_nothing() -> None:
    """There is none outside of ``step``. Oracle: the same keyed run without those calls."""
    found = []
    for meddling in (False, True):
        model = llama_peft()
        private = make(model, z=1.0, physical_batch_size=2)
        private._randomness = KeyedRandomness(bytes(32))

        def meddle(private: PrivateTraining, asked: bool = meddling) -> None:
            if asked:
                private.optimizer.zero_grad()
                private.model.zero_grad(set_to_none=False)
                norm = torch.nn.utils.clip_grad_norm_(private.model.parameters(), 1e-3)
                assert float(norm) == 0

        for batch in private.data_loader:
            meddle(private)
            loss = mean_loss(model, batch)
            meddle(private)
            loss.backward()
            meddle(private)
            private.optimizer.step()
            meddle(private)
        assert private.step == 1
        found.append(weights(model))
    for name, value in found[0].items():
        assert value.equal(found[1][name]), name


def test_no_generator_of_the_caller_is_read_or_moved() -> None:
    """Neither torch's global one nor the loader's own: both seeded alike, no draw is alike."""
    found = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(42)
            own = torch.Generator().manual_seed(42)
            model = llama_peft()
            state, held = torch.get_rng_state(), own.get_state()
            private = make_private(
                model,
                sgd(model),
                DataLoader(Sentences(), batch_size=3, shuffle=True, generator=own),
                method="dp-lora",
                max_grad_norm=1.0,
                privacy=NoiseMultiplier(1.0),
                delta=1e-5,
            )
            coins = [private.data_loader.indices(step).tolist() for step in range(20)]
            run(private)
            assert torch.get_rng_state().equal(state)
            assert own.get_state().equal(held)
        found.append((coins, weights(model)))
    assert found[0][0] != found[1][0]
    for name in trained(model):
        assert not torch.isclose(found[0][1][name], found[1][1][name]).all(), name


# ---- wrappers -----------------------------------------------------------------------------------


@contextmanager
def one_process(folder: Path) -> Iterator[None]:
    init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
    try:
        yield
    finally:
        destroy_process_group()


@pytest.mark.parametrize("method", ["dp-lora", "dp-sgd"])
def test_models_of_several_processes_are_refused(method: Method, tmp_path: Path) -> None:
    wrapped = nn.DataParallel(llama_peft())
    with pytest.raises(UnsupportedTrainingError, match=r"in DataParallel.*Pass the model inside"):
        make(wrapped, method)
    inside = nn.Sequential(wrapped)
    with pytest.raises(UnsupportedTrainingError, match="'0' is wrapped in DataParallel"):
        make(inside, method)
    with one_process(tmp_path):
        wrapped = nn.parallel.DistributedDataParallel(llama_peft())
        with pytest.raises(UnsupportedTrainingError, match="wrapped in DistributedDataParallel"):
            make(wrapped, method)
        sharded = llama_peft()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UnsupportedTrainingError, match="wrapped in FSDPModule"):
            make(sharded, method)


@pytest.mark.parametrize("method", ["dp-lora", "dp-sgd"])
def test_models_and_optimizers_of_opacus_and_accelerate_are_refused(method: Method) -> None:
    from accelerate.optimizer import AcceleratedOptimizer
    from opacus.grad_sample import GradSampleHooks, GradSampleModule, GradSampleModuleNoOp
    from opacus.optimizers import DPOptimizer

    for wrapper in (GradSampleModule, GradSampleModuleNoOp):
        with pytest.raises(UnsupportedTrainingError, match=rf"Opacus \({wrapper.__name__}\)"):
            make(wrapper(llama_peft()), method)
    hooked = llama_peft()
    hooks = GradSampleHooks(hooked)
    with pytest.raises(UnsupportedTrainingError, match="hooks of Opacus"):
        make(hooked, method)
    hooks.cleanup()
    run(make(hooked, method))

    model = llama_peft()
    plain = sgd(model)
    noisy = DPOptimizer(plain, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)
    # Made without its constructor, which would set up a state for the whole process.
    for optimizer in (noisy, AcceleratedOptimizer.__new__(AcceleratedOptimizer)):
        with pytest.raises(
            UnsupportedTrainingError, match=f"is a {type(optimizer).__name__}, a w"
        ):
            make(model, method, optimizer=optimizer)
    run(make(model, method, optimizer=plain))


# ---- what is left behind ------------------------------------------------------------------------

RELEASED: dict[str, tuple[Method, dict[str, Any]]] = {
    "plain": ("dp-lora", {}),
    "frozen A": ("dp-lora-fa", {}),
    "head": ("dp-lora", {"modules_to_save": ["lm_head"]}),
    "head, frozen A": ("dp-lora-fa", {"modules_to_save": ["lm_head"]}),
    "biases": ("dp-lora", {"bias": "lora_only"}),
    "all biases": ("dp-lora", {"bias": "all"}),
    "rslora": ("dp-lora", {"use_rslora": True}),
    "pissa": ("dp-lora", {"init_lora_weights": "pissa"}),
}


@pytest.mark.parametrize("kind", RELEASED)
def test_the_model_stays_what_it_was_and_peft_loads_what_is_released(
    kind: str, tmp_path: Path
) -> None:
    """Type and keys as before, and equal outputs, bit by bit, on a new base."""
    method, options = RELEASED[kind]
    model = llama_peft(**options)
    keys, start = list(model.state_dict()), weights(model)
    private = make(model, method, z=1.0)
    assert private.model is model
    run(private)
    private.release(tmp_path)
    assert type(model) is type(llama_peft())
    assert list(model.state_dict()) == keys
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    model.eval()
    batch = whole()
    with torch.no_grad():
        assert loaded(**batch).logits.equal(model(**batch).logits)
        assert not model(**batch).logits.equal(llama_peft(**options).eval()(**batch).logits)
    assert set(private.parameters) == {
        name for name, p in model.named_parameters() if not p.equal(start[name])
    }


def test_an_adapter_put_in_by_transformers_is_trained_and_released(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights=False))
    assert_step_is_by_hand(model)
    private = make(model, z=1.0)
    run(private)
    private.release(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    with torch.no_grad():
        assert loaded(**whole()).logits.equal(model.eval()(**whole()).logits)
