"""Private steps against plain ones and against Opacus: CPU time, memory, the kernel of norms.

    OMP_NUM_THREADS=1 python benchmarks/training.py [--parts lora gpt2-128 flora-40] [--pairs 100]

Theirs and ours must first give the same clipped gradient. Each part writes a file of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from _measure import MIN_PAIRS, Median, measure, median, ratio
from _results import Results
from _tasks import (
    CLASSES,
    NO_NOISE,
    WIDTH,
    PerSampleLoss,
    Task,
    Work,
    gpt2,
    hooks,
    minilm,
    opacus,
    ours,
    peft,
    plain,
    with_dense,
    with_flora,
    with_lora,
)
from lora_privacy.core import FLoRALinear, adapt
from lora_privacy.training import NoiseMultiplier, make_private
from lora_privacy.training.samples import matrix_samples

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_privacy.training.methods import Method

# The pooler, which nothing calls, is left out.
ALL_LINEAR = r"encoder\.encoder\..*\.(query|key|value|dense)"
SAME = 1e-4  # largest relative difference of two gradients that count as the same
QUERY_VALUE = ("query", "value")
RUNS = 3  # processes of each kind, for memory


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Norm of the difference of two gradients over that of the first."""
    if a.keys() != b.keys() or not a:
        raise SystemExit(f"Other parameters are trained: {sorted(a.keys() ^ b.keys())[:5]}")
    whole = sum(float(v.double().square().sum()) for v in a.values())
    return (sum(float((a[k] - b[k]).double().square().sum()) for k in a) / whole) ** 0.5


def once(value: float) -> Median:
    """A number that does not vary."""
    return Median(value=value, low=value, high=value, count=1)


def checked(
    results: Results, part: str, name: str, our: dict[str, Tensor], make: Callable[[float], Work]
) -> Work | None:
    """The peer of noise 1, once that of noise 0 has our gradient; None where it cannot run."""
    try:
        found = difference(our, make(0.0).gradients())
        peer = make(1.0)
        peer.step()
    except SystemExit:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, the other peers still count
        print(f"{name} cannot run this model: {type(error).__name__}: {error}", flush=True)
        return None
    if not found <= SAME:
        raise SystemExit(f"{name} computes another clipped gradient: {found:.1e} apart.")
    what = f"clipped gradient without noise, relative distance from that of {name}"
    results.add(part, what, once(found), unit="–")
    return peer


def compare(
    results: Results,
    part: str,
    works: dict[str, Work],
    pairs: int,
    over: list[tuple[str, str]],
    seldom: tuple[str, ...],
) -> None:
    """A row for the time of each work, and for each of (work, peer) whose works exist."""
    seconds = measure({k: work.step for k, work in works.items()}, pairs, seldom=seldom)
    for name, values in seconds.items():
        results.add(part, name, median(1e3 * values), unit="ms")
    for work, peer in over:
        if work in works and peer in works:
            results.add(part, work, ratio(seconds[work], seconds[peer]), peer=peer)


def lora_against_all(
    results: Results, part: str, task: Task, rank: int, targets: tuple[str, ...], head: bool,
    pairs: int,
) -> None:  # fmt: skip
    works = {"plain PEFT LoRA": peft(task, rank, targets, head)}
    task = with_lora(task, rank, targets, head)
    clip = task.max_grad_norm()
    works |= {"plain LoRA": plain(task), "dp-lora": ours(task, "dp-lora", clip)}
    quiet = ours(task, "dp-lora", clip, NO_NOISE).gradients()
    peers = {
        "hooks of 25 lines": partial(hooks, task, clip),
        "Opacus hooks": partial(opacus, task, "hooks", clip, False),
        "Opacus ghost": partial(opacus, task, "ghost", clip, False),
    }
    for name, make in peers.items():
        peer = checked(results, part, name, quiet, make)
        if peer is not None:
            works[name] = peer
    for name in ("dp-lora", "Opacus ghost"):
        if name in works:
            passes = once(works[name].backward_passes())
            results.add(part, f"{name}, backward passes a step", passes, unit="–")
    over = [("dp-lora", peer) for peer in works if peer != "dp-lora"]
    over += [(peer, "plain LoRA") for peer in peers]
    # Opacus' hooks are as fast as ours, so that only many rounds can tell.
    compare(results, part, works, pairs, over, seldom=("hooks of 25 lines", "Opacus ghost"))


def part_lora(results: Results, pairs: int) -> None:
    part = "dp-lora, MiniLM, query and value, r = 8, 8 × 128 tokens"
    lora_against_all(results, part, minilm(128), 8, QUERY_VALUE, True, pairs)


def part_gpt2(results: Results, pairs: int, length: int, batch: int) -> None:
    part = f"dp-lora, GPT-2 of 2 blocks, c_attn, r = 16, {batch} × {length} tokens"
    lora_against_all(results, part, gpt2(length, batch), 16, ("c_attn",), False, pairs)


def part_flora(results: Results, pairs: int, length: int, every_layer: bool) -> None:
    few, head = QUERY_VALUE, ("classifier",)
    what = "all linear layers" if every_layer else "query, value and head"
    part = f"dp-flora, MiniLM, {what}, r = 8, 8 × {length} tokens"
    lora = with_lora(minilm(length), 8, ALL_LINEAR if every_layer else few)
    flora = with_flora(
        minilm(length), 8, f"{ALL_LINEAR}|classifier" if every_layer else (*few, *head)
    )
    names = tuple(name for name, m in flora.model.named_modules() if isinstance(m, FLoRALinear))
    dense = with_dense(minilm(length), names)
    clip = dense.max_grad_norm()
    works = {"plain LoRA": plain(lora), "dp-flora": ours(flora, "dp-flora", clip)}
    # What dp-flora projects is what our dp-sgd clips: Opacus must have the same.
    quiet = ours(dense, "dp-sgd", clip, NO_NOISE).gradients()
    peers = {f"Opacus {mode} on the dense weights": mode for mode in ("hooks", "ghost")}
    for name, mode in peers.items():
        peer = checked(results, part, name, quiet, partial(opacus, dense, mode, clip, True))
        if peer is not None:
            works[name] = peer
    over = [("dp-flora", peer) for peer in works if peer != "dp-flora"]
    over += [("plain LoRA", peer) for peer in peers]
    compare(results, part, works, pairs, over, seldom=tuple(peers))


def part_kernel(results: Results, pairs: int) -> None:
    from opacus.grad_sample.linear import compute_linear_norm_sample

    part = "per-sample norms of LoRA's A, r = 16, 768 inputs, 4 samples"
    torch.manual_seed(0)
    layer = nn.Linear(768, 16, bias=False)
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
        results.add(part, f"ours, T = {length}", median(1e3 * seconds["ours"]), unit="ms")
        faster = ratio(seconds["ghost"], seconds["ours"])
        results.add(
            part, f"ours, T = {length}", faster, peer="kernel of Opacus ghost", unit="faster",
            smaller_is_better=False,
        )  # fmt: skip


def part_head(results: Results, pairs: int) -> None:
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
    part = f"private steps of a linear head, {WIDTH} wide, batch {batch} of {records:,}"
    seconds = measure({name: epoch for name, (epoch, _) in epochs.items()}, pairs)
    for name, (_, steps) in epochs.items():
        found = median(steps / seconds[name])
        results.add(part, name, found, unit="steps a second", smaller_is_better=False)


MEMORY = {
    "MiniLM, 8 × 128 tokens": lambda: with_lora(minilm(128), 8, ("query", "value")),
    "GPT-2, 4 × 128 tokens": lambda: with_lora(gpt2(128, 4), 16, ("c_attn",), head=False),
    "GPT-2, 2 × 1024 tokens": lambda: with_lora(gpt2(1024, 2), 16, ("c_attn",), head=False),
}


def memory_of(name: str, kind: str, steps: int = 5) -> None:
    """Print the peak of this process while it takes steps, in MB, and its growth since before."""
    task = MEMORY[name]()
    work = plain(task) if kind == "plain LoRA" else ours(task, "dp-lora", 1.0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak := present size
    before = _status("VmRSS")
    for _ in range(steps):
        work.step()
    print(_status("VmHWM"), _status("VmHWM") - before)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def part_memory(results: Results, runs: int) -> None:
    if not Path("/proc/self/clear_refs").exists():
        print("Peak memory is read from /proc, which this system lacks.")
        return
    part = "peak memory of a process, over one that trains plain LoRA"
    for name in MEMORY:
        found: dict[str, list[list[float]]] = {"plain LoRA": [], "dp-lora": []}
        for _ in range(runs):
            for kind, values in found.items():
                command = [sys.executable, __file__, "--memory-of", name, kind]
                out = subprocess.run(command, check=True, capture_output=True, text=True)
                values.append([float(word) for word in out.stdout.split()])
        peaks = {kind: np.array(values)[:, 0] for kind, values in found.items()}
        for kind, values in found.items():
            grown = median(np.array(values)[:, 1])
            results.add(part, f"{kind}, {name}", median(peaks[kind]), unit="MB")
            results.add(part, f"{kind}, {name}, of it for the steps", grown, unit="MB")
        over = ratio(peaks["dp-lora"], peaks["plain LoRA"])
        results.add(part, f"dp-lora, {name}", over, peer="plain LoRA", unit="memory")


PARTS: dict[str, Callable[[Results, int], None]] = {
    "kernel": part_kernel,
    "head": part_head,
    "lora": part_lora,
    "gpt2-128": partial(part_gpt2, length=128, batch=4),
    "gpt2-512": partial(part_gpt2, length=512, batch=2),
    "gpt2-1024": partial(part_gpt2, length=1024, batch=2),
    "flora-40": partial(part_flora, length=40, every_layer=False),
    "flora-128": partial(part_flora, length=128, every_layer=False),
    "flora-all": partial(part_flora, length=128, every_layer=True),
    "memory": part_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of private steps.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--pairs", type=int, help=f"{MIN_PAIRS}, and {RUNS} processes for memory")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory_of:
        memory_of(*options.memory_of)
        return
    for name in options.parts or PARTS:
        results = Results(f"training-{name}")
        PARTS[name](results, options.pairs or (RUNS if name == "memory" else MIN_PAIRS))
        results.save()


if __name__ == "__main__":
    main()
