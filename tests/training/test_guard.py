"""preflight and WeightDeltaGuard: each trap is refused, and the sound neighbour of each passes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lora_privacy.core import LoRALinear, RandomProjection, adapt, decompress, refresh
from lora_privacy.errors import (
    IsolationError,
    LoraPrivacyError,
    NonFiniteError,
    StaleParameterError,
    UnsupportedLayerError,
    UnsupportedTrainingError,
    WeightsUnmovedError,
)
from lora_privacy.training import NoiseMultiplier, WeightDeltaGuard, make_private, preflight
from lora_privacy.training.trial import FLOAT32, Records, Trial, movement

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_privacy.training import PrivateTraining

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCABULARY, LENGTH, BATCH = 40, 8, 4
T = TypeVar("T")


def seeded(build: Callable[[], T]) -> T:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Sequential:
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)
        )
    )


def llama(**options: object) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        **options,
    )
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=32, n_layer=2, n_head=2
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def bert(kind: str) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        num_labels=3,
    )
    return seeded(lambda: getattr(transformers, kind)(config))


def with_peft(model: nn.Module, targets: list[str]) -> nn.Module:
    config = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.1)
    return seeded(lambda: peft.get_peft_model(model, config))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def vectors() -> tuple[Tensor, Tensor]:
    return numbers(BATCH, 6), torch.tensor([0, 1, 2, 0])


def mean_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def tokens(padded: bool = True, labels: str = "tokens") -> dict[str, Tensor]:
    """Row i has i padded positions at its end."""
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    lengths = LENGTH - torch.arange(BATCH) * padded
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    targets = (
        ids.masked_fill(mask == 0, -100) if labels == "tokens" else torch.tensor([0, 1, 2, 0])
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": targets}


def sequence_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean next-token loss over each record's own tokens."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    each = functional.cross_entropy(logits.mT, labels, reduction="none")
    return each.sum(1) / (labels != -100).sum(1)


def sequence_mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return sequence_losses(model, batch).mean()


def language_models() -> dict[str, Callable[[], nn.Module]]:
    return {
        "llama": lambda: adapt(llama(attention_dropout=0.1), 4, seed=0),
        "llama, FA": lambda: adapt(llama(), 4, method="lora-fa", seed=0),
        "llama, FLoRA": lambda: adapt(llama(), 4, method="flora", seed=0),
        "gpt2": lambda: adapt(gpt2(), 4, seed=0),
        "gpt2, peft": lambda: with_peft(gpt2(), ["c_attn", "c_proj"]),
    }


@pytest.mark.parametrize("name", language_models())
def test_a_mean_over_each_records_own_tokens_passes_and_one_over_the_batch_does_not(
    name: str,
) -> None:
    """The default loss of transformers averages over all tokens: also where rows are as long."""
    model = language_models()[name]()
    optimizer = sgd(model)
    for padded in (True, False):
        batch = tokens(padded)
        preflight(model, optimizer, batch, loss_of=sequence_mean)
        with pytest.raises(IsolationError, match=r"by a factor of .*number of tokens"):
            preflight(model, optimizer, batch)


def test_a_language_model_without_labels_in_the_mask_is_seen_through_lengths_alone() -> None:
    """A tuple has no named mask to cut; copies of a longer row change the token count."""
    model = adapt(llama(), 4, seed=0)

    def batch_mean(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        names = ("input_ids", "attention_mask", "labels")
        return model(**dict(zip(names, batch, strict=True))).loss

    with pytest.raises(IsolationError, match="copies of sample 0"):
        preflight(model, sgd(model), tuple(tokens().values()), loss_of=batch_mean)


def test_masked_language_modelling_averages_over_tokens_and_classification_over_records() -> None:
    masked = adapt(bert("BertForMaskedLM"), 4, seed=0)
    with pytest.raises(IsolationError, match="number of tokens"):
        preflight(masked, sgd(masked), tokens())
    classifier = adapt(bert("BertForSequenceClassification"), 4, seed=0, trainable=("classifier",))
    preflight(classifier, sgd(classifier), tokens(labels="classes"))
    encoding = transformers.BatchEncoding(tokens(labels="classes"))
    preflight(classifier, sgd(classifier), encoding)


@pytest.mark.parametrize("method", ["lora", "lora-fa", "flora", "dense"])
def test_a_mean_over_records_passes(method: str) -> None:
    model = mlp()
    if method != "dense":
        adapt(model, 2, method=method, targets=("0", "4"), seed=0)
    preflight(model, sgd(model))
    trained = [p.requires_grad for p in model.parameters()]
    preflight(model, sgd(model), vectors(), loss_of=mean_loss)
    assert [p.requires_grad for p in model.parameters()] == trained
    kinds = set()

    def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        kinds.add(type(batch))
        return mean_loss(model, batch)

    preflight(model, sgd(model), list(vectors()), loss_of=loss_of)
    assert kinds == {list}


def test_half_precision_bases_and_autocast_pass_and_a_token_mean_there_does_not() -> None:
    """A mask of ones is dropped and with it the kernel changes: rounding moves by 4e-3."""
    base = adapt(llama().to(torch.bfloat16), 4, seed=0)

    def mixed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return sequence_mean(model, batch)

    batch = tokens(padded=False)
    preflight(base, sgd(base), batch, loss_of=sequence_mean)
    with pytest.raises(IsolationError, match="number of tokens"):
        preflight(base, sgd(base), batch)
    full = adapt(llama(), 4, seed=0)
    preflight(full, sgd(full), batch, loss_of=mixed)


def test_gradient_checkpointing_passes() -> None:
    model = adapt(llama(attention_dropout=0.1), 4, seed=0)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    preflight(model, sgd(model), tokens(), loss_of=sequence_mean)


def test_rounding_stays_far_below_the_limits() -> None:
    """Biases of keys cancel in the softmax: their gradient is rounding, and moves by all of it."""
    model = bert("BertForSequenceClassification")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(("key.bias", "value.bias")))
    batch = {key: value[:3] for key, value in tokens(labels="classes").items()}  # 3 (1/3) rounds
    preflight(model, sgd(model), batch)
    trial = Trial(model, lambda model, batch: model(**batch).loss)
    plain, alone = trial.run(batch, 3), trial.run(Records(model, batch).alone(0), 1)
    bare, floored = (
        movement(plain, alone, floor=floor, row=0, after_row=0, scale=3.0)
        for floor in (0.0, FLOAT32.floor)
    )
    assert "key" in bare.layer
    assert bare.share > FLOAT32.alone
    assert floored.share < FLOAT32.replaced / 3


def test_the_share_and_the_factor_are_those_of_the_loss() -> None:
    """Two rows of 6 tokens; cutting one to 4 turns a mean over 12 into one over 10: by 1.2."""
    model = seeded(lambda: nn.Linear(3, 5))
    labels = torch.randint(0, 5, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"x": numbers(2, 6, 3), "labels": labels}

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch["x"]).mT, batch["labels"])

    with pytest.raises(
        IsolationError, match=r"the model itself .*by 20 % of its norm.*by a factor of 1\.2:"
    ):
        preflight(model, sgd(model), batch, loss_of=loss_of)


@pytest.mark.parametrize("size", [2, 4])
def test_a_sum_and_a_mean_are_told_apart(size: int) -> None:
    """Each is right under its own name, and named in the error under the other."""
    model = mlp()
    batch = tuple(value[:size] for value in vectors())

    def total(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    preflight(model, sgd(model), batch, loss_of=total, loss="per-sample-sum")
    with pytest.raises(IsolationError, match="pass loss='per-sample-sum'"):
        preflight(model, sgd(model), batch, loss_of=total)
    with pytest.raises(IsolationError, match="pass loss='per-sample-mean'"):
        preflight(model, sgd(model), batch, loss_of=mean_loss, loss="per-sample-sum")


def test_another_reduction_is_refused() -> None:
    """A sum over √B: neither a mean nor a sum over the records."""
    model = mlp()

    def root(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        return mean_loss(model, batch) * len(batch[0]) ** 0.5

    for loss in ("per-sample-mean", "per-sample-sum"):
        with pytest.raises(IsolationError, match=r"differ by a factor of (0\.5|2), but"):
            preflight(model, sgd(model), vectors(), loss_of=root, loss=loss)


def test_batch_norm_is_refused_without_a_batch() -> None:
    """A layer norm in its place passes, in ``mlp``."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.raises(UnsupportedTrainingError, match="BatchNorm1d"):
        preflight(model, sgd(model))


class Centred(nn.Module):
    """A home-made batch norm: the batch's mean in training, a running one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x - self.mean
        mean = x.mean(0)
        self.mean.lerp_(mean.detach(), 0.1)
        return x - mean


class Mixup(nn.Module):
    """Mixes each sample with its neighbour, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * x.roll(1, 0) if self.training else x


class Scramble(nn.Module):
    """Adds numbers of numpy's global generator."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(np.random.standard_normal(5)).float()  # noqa: NPY002


class Shared(nn.Module):
    """Scales by a maximum over the batch, as a capacity or a quantiser does."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().max()


class Earlier(nn.Module):
    """Adds earlier samples, as a capacity that is filled in order does: the first sees none."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * (x.cumsum(0) - x).detach()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Earlier, "evaluation mode, copies of sample 3"),
        (Centred, "training mode, copies .*statistics"),
        (Mixup, "training mode, copies"),
        (Shared, "evaluation mode, copies"),
        (Scramble, "Two passes over the same batch"),
    ],
)
def test_layers_that_join_samples_are_caught(layer: type[nn.Module], message: str) -> None:
    """By what they do; the model without the layer passes, even where both modes look at it."""
    model = mlp()
    model[2] = nn.Sequential(nn.Tanh(), layer())
    with pytest.raises(IsolationError, match=message):
        preflight(model, sgd(model), vectors(), loss_of=mean_loss)
    model[2] = nn.Tanh()
    preflight(model, sgd(model), vectors(), loss_of=mean_loss)


def test_in_batch_negatives_are_caught() -> None:
    """Pairs against all other pairs; a loss of each pair for itself passes."""
    model = mlp()
    batch = (numbers(BATCH, 6), numbers(BATCH, 6, seed=1))

    def contrastive(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        scores = model(batch[0]) @ functional.normalize(batch[1][:, :3], dim=1).T
        return functional.cross_entropy(scores, torch.arange(len(scores)))

    def paired(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1][:, :3]).square().mean()

    preflight(model, sgd(model), batch, loss_of=paired)
    with pytest.raises(IsolationError, match="in-batch negatives"):
        preflight(model, sgd(model), batch, loss_of=contrastive)


@pytest.mark.parametrize("weight", [1e-2, 0.0])
def test_an_auxiliary_loss_over_the_batch_is_caught(weight: float) -> None:
    """A balance of frozen experts' shares, 1 % of the loss; without it the same model passes."""
    model, router = mlp(), numbers(3, 4, seed=2)

    def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        output = model(batch[0])
        balance = (output @ router).softmax(-1).mean(0).square().sum()
        return functional.cross_entropy(output, batch[1]) + weight * balance

    if not weight:
        preflight(model, sgd(model), vectors(), loss_of=loss_of)
        return
    with pytest.raises(IsolationError, match="auxiliary loss"):
        preflight(model, sgd(model), vectors(), loss_of=loss_of)


class Flat(nn.Module):
    """Joins batch and tokens before its layer, or does not."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat, self.layer = flat, seeded(lambda: nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            return self.layer(x.flatten(0, 1)).view(*x.shape[:2], 3)
        return self.layer(x)


@pytest.mark.parametrize("flat", [True, False])
def test_a_model_that_flattens_batch_and_tokens_is_refused(flat: bool) -> None:
    model, batch = Flat(flat), (numbers(BATCH, 5, 6),)

    def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        return model(batch[0]).square().mean()

    if not flat:
        preflight(model, sgd(model), batch, loss_of=loss_of)
        return
    with pytest.raises(UnsupportedLayerError, match="saw 20 samples of a batch of 4"):
        preflight(model, sgd(model), batch, loss_of=loss_of)


def test_a_layer_that_swaps_batch_and_tokens_is_caught_where_the_numbers_agree() -> None:
    """As many tokens as records: the count cannot tell, the experiment does."""

    class Swapped(Flat):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    model = Swapped(False)
    with pytest.raises(IsolationError, match="first dimension"):
        preflight(
            model,
            sgd(model),
            (numbers(BATCH, BATCH, 6),),
            loss_of=lambda model, batch: model(batch[0]).square().mean(),
        )


def test_an_optimizer_of_another_copy_is_refused() -> None:
    model = mlp()
    optimizer = sgd(model)
    preflight(model, optimizer)
    with pytest.raises(StaleParameterError, match="not in the model"):
        preflight(copy.deepcopy(model), optimizer)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    with pytest.raises(StaleParameterError, match="not in the model"):
        preflight(model, optimizer)
    preflight(model, sgd(model))


def test_a_loss_of_another_copy_is_refused() -> None:
    """The loop trains a copy: the model itself passes."""
    model = mlp()
    other = copy.deepcopy(model)
    with pytest.raises(StaleParameterError, match="does not go through"):
        preflight(model, sgd(model), vectors(), loss_of=lambda _, batch: mean_loss(other, batch))


class Bypassed(nn.Module):
    """Two layers of which the second can be used, skipped, detached or read."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = seeded(lambda: (nn.Linear(6, 3), nn.Linear(6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        output = self.first(x)
        match self.how:
            case "used":
                return output + self.second(x)
            case "detached":
                return output + self.second(x).detach()
            case "zeroed":
                return output + 0 * self.second(x)
            case "read":
                return output + functional.linear(x, self.second.weight)
        return output


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("skipped", StaleParameterError, "'second'"),
        ("detached", StaleParameterError, "'second'"),
        ("zeroed", UnsupportedTrainingError, "'second' is 0"),
        ("read", UnsupportedLayerError, r"second\.weight got a gradient outside"),
    ],
)
def test_layers_that_take_no_part_are_named(
    how: str, error: type[Exception], message: str
) -> None:
    used = Bypassed("used")
    preflight(used, sgd(used), vectors(), loss_of=mean_loss)
    model = Bypassed(how)
    with pytest.raises(error, match=message):
        preflight(model, sgd(model), vectors(), loss_of=mean_loss)


@pytest.mark.parametrize("library", ["ours", "peft"])
def test_merged_and_disabled_adapters_are_named_and_a_of_new_ones_is_not(library: str) -> None:
    """At B = 0 the gradient of A is 0 by construction; a merged adapter is never called."""
    model = adapt(llama(), 4, seed=0) if library == "ours" else with_peft(llama(), ["q_proj"])
    optimizer, batch = sgd(model), tokens()
    preflight(model, optimizer, batch, loss_of=sequence_mean)
    if library == "ours":
        layer = model.model.layers[1].self_attn.q_proj
        layer.merge()
    else:
        model.base_model.disable_adapter_layers()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)  # peft freezes what it disables
    with pytest.raises((StaleParameterError, LoraPrivacyError), match=r"does not go|merged"):
        preflight(model, optimizer, batch, loss_of=sequence_mean)


def test_a_is_exempt_only_while_b_is_zero() -> None:
    """A whose output is dropped, with B off 0, learns nothing by mistake."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = seeded(lambda: nn.Linear(6, 3))
            self.lora = LoRALinear(base, 2, 2.0, RandomProjection(2, 6, seed=0))

        def forward(self, x: Tensor) -> Tensor:
            lora = self.lora
            return lora.base(x) + lora.expand(0 * lora.project(x) + x[:, :2])

    model = Dropped()
    preflight(model, sgd(model), vectors(), loss_of=mean_loss)
    nn.init.ones_(model.lora.expand.weight)
    with pytest.raises(UnsupportedTrainingError, match=r"'lora.project' is 0"):
        preflight(model, sgd(model), vectors(), loss_of=mean_loss)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cu_seq_lens_q", torch.tensor([0, 8, 16]), "'cu_seq_lens_q'"),
        ("cu_seqlens", torch.tensor([0, 8, 16]), "'cu_seqlens'"),
        ("seq_idx", torch.zeros(BATCH, LENGTH), "'seq_idx'"),
        ("position_ids", torch.arange(LENGTH).remainder(4).expand(BATCH, -1), "begin again"),
        ("position_ids", torch.arange(LENGTH).remainder(4)[None], "begin again"),
        ("attention_mask", torch.arange(1, LENGTH + 1).expand(BATCH, -1) // 4, "counts up to 2"),
    ],
)
def test_packed_rows_are_refused(key: str, value: Tensor, message: str) -> None:
    """As transformers' flattening collator and Axolotl's packing write them."""
    model = adapt(llama(), 4, seed=0)
    batch = {**tokens(padded=False), key: value}
    with pytest.raises(UnsupportedTrainingError, match=f"packed.*{message}"):
        preflight(model, sgd(model), batch, loss_of=sequence_mean)


@pytest.mark.parametrize("side", ["left", "right"])
def test_position_ids_of_padded_rows_pass(side: str) -> None:
    """As ``generate`` makes them: positions of padding are 1, below those before or after."""
    model, batch = adapt(llama(), 4, seed=0), tokens()
    if side == "left":
        batch = {key: value.flip(1) for key, value in batch.items()}
    mask = batch["attention_mask"]
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    preflight(model, sgd(model), {**batch, "position_ids": positions}, loss_of=sequence_mean)


def test_arguments_are_checked() -> None:
    model = mlp()
    optimizer, (x, y) = sgd(model), vectors()

    def check(batch: object, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            preflight(model, optimizer, batch, loss_of=mean_loss)

    check((x[:1], y[:1]), "at least two records")
    check((x[:1].expand(3, -1), y[:1].expand(3)), "the same")
    check("records", "got str", TypeError)
    check((1, 2), "must hold tensors", TypeError)
    with pytest.raises(TypeError, match="needs loss_of"):
        preflight(model, optimizer, (x, y))
    with pytest.raises(TypeError, match=r"got \(4, 3\)"):
        preflight(model, optimizer, (x, y), loss_of=lambda model, batch: model(batch[0]))
    with pytest.raises(ValueError, match="per-sample-mean"):
        preflight(model, optimizer, loss="mean")  # pyright: ignore
    language, batch = adapt(llama(), 4, seed=0), tokens()
    del batch["labels"]
    with pytest.raises(TypeError, match="Put labels"):
        preflight(language, sgd(language), batch)


def test_gradients_that_are_no_numbers_are_refused() -> None:
    """NaN would compare as unmoved."""
    model = mlp()

    def loss_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        return mean_loss(model, batch) * torch.nan

    with pytest.raises(NonFiniteError, match="sample 0"):
        preflight(model, sgd(model), vectors(), loss_of=loss_of)


@pytest.mark.parametrize("failing", [False, True])
def test_nothing_is_left_behind(failing: bool) -> None:
    """Weights, gradients, modes, buffers, hooks and generators, also after an error."""
    model = mlp()
    model[2] = nn.Sequential(nn.Tanh(), Centred() if failing else nn.Identity())
    model.register_buffer("count", torch.zeros(()))
    model[3].eval()
    model[0].register_forward_hook(lambda *_: model.count.add_(1) and None)
    optimizer = sgd(model)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    generator = torch.get_rng_state()

    with torch.no_grad():
        if failing:
            with pytest.raises(IsolationError):
                preflight(model, optimizer, vectors(), loss_of=mean_loss)
        else:
            preflight(model, optimizer, vectors(), loss_of=mean_loss)

    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name], name
        assert parameter.requires_grad


def private(
    model: nn.Module, optimizer: torch.optim.Optimizer, **options: object
) -> PrivateTraining:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(numbers(24, 6), torch.randint(0, 3, (24,), generator=generator))
    arguments = {"method": "dp-sgd", "sample_rate": 0.5, "max_grad_norm": 1.0, "delta": 1e-5}
    return make_private(
        model,
        optimizer,
        DataLoader(data, batch_size=12),
        privacy=NoiseMultiplier(1.0),
        **{**arguments, **options},
    )


def train(training: PrivateTraining) -> int:
    """An epoch; return the number of micro-batches."""
    count = 0
    for batch in training.data_loader:
        mean_loss(training.model, batch).backward()
        training.optimizer.step()
        count += 1
    return count


def test_within_a_training_it_disturbs_nothing() -> None:
    """The trial's passes reach its own recorder alone: the training's next step is undisturbed."""
    model = mlp()
    training = private(model, sgd(model))
    preflight(model, training.optimizer, vectors(), loss_of=mean_loss)
    batches = iter(training.data_loader)
    batch = next(batches)
    preflight(model, training.optimizer, vectors(), loss_of=mean_loss)
    assert not training._recorder.recorded
    mean_loss(model, batch).backward()
    training.optimizer.step()
    assert training.step == 1
    training.close()
    preflight(model, training.optimizer, vectors(), loss_of=mean_loss)


# WeightDeltaGuard


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 6, dtype=dtype)).sum().backward()
        optimizer.step()


def constant(dtype: torch.dtype) -> nn.Linear:
    """Weights of .05."""
    model = nn.Linear(6, 3, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, 0.05)
    return model


def test_updates_lost_in_bf16_are_caught() -> None:
    """200 updates of 1e-5 into bf16 weights of .05 keep nothing; float32 keeps them all."""
    for dtype in (torch.float32, torch.bfloat16):
        model = constant(dtype)
        optimizer = sgd(model, lr=5e-6)  # the gradient is 2
        steps(model, optimizer, 200)
        lost = bool((model.weight == torch.tensor(0.05, dtype=dtype)).all())
        assert lost == (dtype == torch.bfloat16)
        if lost:
            with (
                pytest.raises(WeightsUnmovedError, match=r"100 %.*bfloat16"),
                WeightDeltaGuard(model, optimizer),
            ):
                steps(model, optimizer)
        else:
            with WeightDeltaGuard(model, optimizer):
                steps(model, optimizer)


def test_flora_beside_a_bf16_base_passes_by_its_master_and_fails_without() -> None:
    """The master moves by less than the base can show."""
    base = nn.Linear(6, 3, bias=False, dtype=torch.bfloat16)
    nn.init.constant_(base.weight, 0.05)
    model = nn.Sequential(base)
    adapt(model, 2, method="flora", targets=("0",), seed=0)
    optimizer = torch.optim.SGD([model[0].weight], lr=1e-6)
    with WeightDeltaGuard(model, optimizer):
        for _ in range(3):
            model(torch.ones(2, 6, dtype=torch.bfloat16)).float().sum().backward()
            decompress(model)
            optimizer.step()
            refresh(model)
    assert bool((model[0].base.weight == torch.tensor(0.05, dtype=torch.bfloat16)).all())
    model[0].master.data = model[0].master.data.to(torch.bfloat16)
    model[0].master.grad = torch.ones_like(model[0].master)
    with (
        pytest.raises(WeightsUnmovedError, match=r"0\.master"),
        WeightDeltaGuard(model, optimizer),
    ):
        optimizer.step()


@pytest.mark.parametrize("method", ["dp-sgd", "dp-lora", "dp-flora"])
@pytest.mark.parametrize("physical", [None, 3])
def test_private_trainings_pass_and_micro_batches_are_not_judged(
    method: str, physical: int | None
) -> None:
    """Made before make_private, the guard sees no gradient, and says so."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    if method == "dp-flora":
        adapt(model, 2, method="flora", targets=("0", "2"), law="orthonormal", seed=0)
        model[0].bias.requires_grad_(False)
        model[2].bias.requires_grad_(False)
    elif method == "dp-lora":
        adapt(model, 2, targets=("0",), seed=0, trainable=("2",))
    optimizer = sgd(model)
    early = WeightDeltaGuard(model, optimizer).__enter__()
    training = private(model, optimizer, method=method, physical_batch_size=physical)
    train(training)
    with pytest.raises(WeightsUnmovedError, match="made before make_private"):
        early.__exit__(None)
    with WeightDeltaGuard(model, optimizer):
        count = train(training)
    assert (count > training.data_loader.steps_per_epoch) == (physical is not None)


def test_another_copy_of_the_model_is_caught_from_either_side() -> None:
    model = mlp()
    optimizer = sgd(model)
    other = copy.deepcopy(model)
    with (
        pytest.raises(WeightsUnmovedError, match="not held by the optimizer"),
        WeightDeltaGuard(other, optimizer),
    ):
        steps(other, optimizer)
    with (
        pytest.raises(WeightsUnmovedError, match="None of 1 calls"),
        WeightDeltaGuard(model, optimizer),
    ):
        steps(other, optimizer)
    with WeightDeltaGuard(model, optimizer):
        steps(model, optimizer)


def test_a_learning_rate_of_zero_is_allowed_for_a_while_only() -> None:
    """A warm-up begins at 0; a rate that stays there is an accident."""
    model = constant(torch.float32)
    optimizer = sgd(model, lr=0.0)
    with WeightDeltaGuard(model, optimizer, every=2):
        steps(model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.1
        steps(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    with (
        pytest.raises(WeightsUnmovedError, match=r"'weight' never moved in 2 steps .*now: 0\)"),
        WeightDeltaGuard(model, optimizer),
    ):
        steps(model, optimizer, 2)


def test_a_layer_that_is_never_reached_is_named_on_leaving() -> None:
    """LoRA's A does not move at B = 0 either, by construction, and is not named."""
    skipped = Bypassed("skipped")
    optimizer = sgd(skipped)
    with (
        pytest.raises(WeightsUnmovedError, match=r"'second.weight', 'second.bias' never"),
        WeightDeltaGuard(skipped, optimizer),
    ):
        steps(skipped, optimizer)
    model = adapt(nn.Sequential(nn.Linear(6, 3)), 2, targets=("0",), seed=0)
    optimizer = sgd(model)
    with WeightDeltaGuard(model, optimizer):
        steps(model, optimizer)


class Partial(torch.optim.SGD):
    """Moves the first ``moves`` entries of each parameter, from step ``until`` on none."""

    moves, until = 18, 100

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.view(-1)[: self.moves * (self.until > 0)] += 1
        self.until -= 1


@pytest.mark.parametrize(("moves", "unmoved"), [(18, False), (9, False), (8, True)])
def test_half_of_the_entries_must_move(moves: int, unmoved: bool) -> None:
    """9 of 18 are enough, 8 are not."""
    model = constant(torch.float32)
    optimizer = Partial(model.parameters(), lr=0.1)
    optimizer.moves = moves
    guard = WeightDeltaGuard(model, optimizer)
    if not unmoved:
        with guard:
            steps(model, optimizer)
        return
    with pytest.raises(WeightsUnmovedError, match=r"55\.6 %"), guard:
        steps(model, optimizer)


def test_every_second_step_is_judged() -> None:
    """Stuck from the second step on: seen at the third, not at the second."""
    model = constant(torch.float32)
    optimizer = Partial(model.parameters(), lr=0.1)
    optimizer.until = 1
    with pytest.raises(WeightsUnmovedError), WeightDeltaGuard(model, optimizer, every=2):
        steps(model, optimizer, 5)
    assert optimizer.until == -2  # after three steps
    with pytest.raises(ValueError, match="every"):
        WeightDeltaGuard(model, optimizer, every=0)


def test_errors_inside_come_through_and_hooks_are_removed() -> None:
    model = constant(torch.bfloat16)
    optimizer = sgd(model, lr=1e-6)
    optimizer.register_step_post_hook(lambda *_: {}["missing"])
    with pytest.raises(KeyError), WeightDeltaGuard(model, optimizer):
        optimizer.step()
    optimizer = sgd(model, lr=1e-6)
    with WeightDeltaGuard(model, optimizer):
        pass
    steps(model, optimizer)  # a guard would raise
