"""Small models, and per-sample gradients by a plain loop, for tests of private training."""

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_privacy.core import FLoRALinear, LoRALinear, RandomProjection, adapt
from lora_privacy.training.clipping import FlatClipping, clipped_sums
from lora_privacy.training.recorder import SampleRecorder

VOCABULARY = 50
INFINITE = FlatClipping(float("inf"))

Losses = Callable[[nn.Module], Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers from their own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every trained parameter off its start: at B = 0, A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def gpt2(dropout: float = 0.1) -> nn.Module:
    """Two blocks of Conv1D layers of width 16; the embeddings, tied to the head, are frozen."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    return model.train()


def llama() -> nn.Module:
    """Two blocks of width 16 whose four heads share two keys and values."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).train()


def with_peft(model: nn.Module, targets: list[str], **options: object) -> nn.Module:
    """A peft LoRA model of rank 8, with B drawn."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomise(get_peft_model(model, config))


class FakeQuantLinear(nn.Linear):
    """A linear map that rounds its weight to 15 levels in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x``."""
        step = self.weight.abs().max() / 7
        return functional.linear(x, (self.weight / step).round() * step, self.bias)


def quantised_llama() -> nn.Module:
    """Every projection of the attention replaced by a frozen fake-quantised one, then LoRA."""
    model = llama()
    for block in model.model.layers:
        for name in ("q_proj", "v_proj"):
            plain = block.self_attn.get_submodule(name)
            packed = FakeQuantLinear(plain.in_features, plain.out_features)
            packed.load_state_dict(plain.state_dict())
            setattr(block.self_attn, name, packed)
    return randomise(adapt(model, 8, seed=0))


def token_batch(length: int, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Token ids and a mask; sample i has i padded positions at its end, but two real ones."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    lengths = (length - torch.arange(batch)).clamp(min=2)
    return ids, (torch.arange(length) < lengths[:, None]).long()


def token_losses(length: int) -> Losses:
    """Mean over each sequence's own tokens, one loss a sample."""
    ids, mask = token_batch(length)

    def losses(model: nn.Module) -> Tensor:
        return sequence_losses(model, ids, mask)

    return losses


def sequence_losses(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean next-token loss of each sequence."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    each = functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return (each * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def output_losses(x: Tensor) -> Losses:
    """A loss with another gradient at every output, the same function for every sample."""

    def losses(model: nn.Module) -> Tensor:
        output = model(x)
        weights = numbers(*output.shape[1:], seed=1).to(output.dtype)
        return (torch.tanh(output) * weights).flatten(1).sum(1)

    return losses


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Path -> trained parameter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def seeded(losses_of: Losses, model: nn.Module) -> Tensor:
    """The losses, with the same dropout masks at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return losses_of(model)


def loop(model: nn.Module, losses_of: Losses) -> dict[str, Tensor]:
    """Path -> gradients (batch, *shape), by one backward pass for each sample."""
    parameters = trained(model)
    found = [
        torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        for loss in seeded(losses_of, model)
    ]
    return {n: torch.stack(g) for n, g in zip(parameters, zip(*found, strict=True), strict=True)}


def norms_of(gradients: dict[str, Tensor]) -> Tensor:
    """Norm of each sample's whole gradient, in double precision."""
    flat = [gradient.double().flatten(1) for gradient in gradients.values()]
    return torch.cat(flat, dim=1).norm(dim=1)


def clipped_by_hand(gradients: dict[str, Tensor], limit: float) -> dict[str, Tensor]:
    """Path -> Σ min(1, C/‖G_i‖) G_i, in double precision."""
    factors = [min(1.0, limit / float(norm)) for norm in norms_of(gradients)]
    return {
        name: sum(f * g for f, g in zip(factors, gradient.double(), strict=True))
        for name, gradient in gradients.items()
    }


def recorded(recorder: SampleRecorder, losses_of: Losses, model: nn.Module) -> int:
    """Run one pass under an installed recorder; return the number of samples."""
    losses = seeded(losses_of, model)
    losses.sum().backward()
    recorder.check(len(losses))
    return len(losses)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Same names and shapes, and ‖difference‖ <= tolerance · ‖expected‖ for each parameter."""
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        error = (actual[name].double() - value.double()).norm() / value.double().norm()
        assert error <= tolerance, (name, float(error))  # a NaN fails, too


def assert_is_the_loop(
    model: nn.Module, losses_of: Losses, tolerance: float = 1e-5, oracle: nn.Module | None = None
) -> set[str]:
    """Compare a clipped pass with the loop; half the samples are clipped. Return the forms met."""
    gradients = loop(model if oracle is None else oracle, losses_of)
    limit = float(norms_of(gradients).median())
    with SampleRecorder(model) as recorder:
        recorded(recorder, losses_of, model)
        sums = clipped_sums(recorder, FlatClipping(limit))
    assert_close(sums, clipped_by_hand(gradients, limit), tolerance)
    assert all(parameter.grad is None for parameter in model.parameters())
    return {
        type(tap.samples["weight"]).__name__
        for tap in recorder.taps.values()
        if "weight" in tap.samples
    }


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy with the plain trained layer in place of every FLoRA layer."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, FLoRALinear):
            base = module.base
            base.weight.requires_grad_(True)
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, base)
    return twin


def lora_mlp() -> nn.Module:
    """A LoRA layer, a LoRA-FA layer and a trained head."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 9), nn.Linear(9, 3))
    adapt(model, 4, targets=("0",), seed=0, trainable=("3",))
    model[2] = LoRALinear(model[2], 4, 8.0, RandomProjection(4, 8, seed=1), train_a=False)
    return randomise(model)
