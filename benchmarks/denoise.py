"""Cost of denoising: a private step with a denoiser over the same step without.

    OMP_NUM_THREADS=1 python benchmarks/denoise.py [--parts lora gpt2 dense kernel] [--pairs 100]

Steps are those of ``make_private``, as in ``training.py``. A denoiser works hardest where singular
values pass the edge, so the steps are timed at little noise, where many of them do, and at much,
where hardly one does. A second row times the denoiser inside the same steps, which the drift of
a busy machine disturbs less than the difference of two steps.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from _measure import MIN_PAIRS, measure, ratio
from lora_privacy.training import NoiseMultiplier, SingularValueDenoiser, denoise, make_private
from training import (
    PerSampleLoss,
    Task,
    Work,
    gpt2,
    header,
    minilm,
    optimizer_of,
    row,
    with_dense,
    with_lora,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_privacy.training.engine import Denoiser
    from lora_privacy.training.methods import Method

NOISES = {"little noise": 1e-3, "much noise": 1e3}  # noise multipliers


class Timed:
    """A denoiser, and the CPU seconds of all its calls so far."""

    def __init__(self) -> None:
        self.denoiser, self.seconds = SingularValueDenoiser(), 0.0

    def __call__(self, path: str, gradient: torch.Tensor, noise_std: float) -> torch.Tensor:
        """As the denoiser."""
        start = time.process_time()
        found = self.denoiser(path, gradient, noise_std)
        self.seconds += time.process_time() - start
        return found


def private_step(
    task: Task, method: Method, clip: float, noise: float, denoiser: Denoiser | None
) -> Work:
    """A step of ``make_private``, the batch from its loader."""
    model, loss = copy.deepcopy(task.model), PerSampleLoss()
    optimizer = optimizer_of(model, sgd=method == "dp-sgd")
    private = make_private(
        model, optimizer, DataLoader(TensorDataset(*task.batch), batch_size=len(task.batch[1])),
        method=method, max_grad_norm=clip, privacy=NoiseMultiplier(noise), delta=1e-5,
        sample_rate=1.0, denoiser=denoiser,
    )  # fmt: skip

    def step() -> None:
        for x, y in private.data_loader:  # one batch
            loss(model(x), y).backward()
            optimizer.step()

    return Work(step, optimizer, private.parameters)


def count_passing(task: Task, method: Method, clip: float, noise: float) -> tuple[int, int]:
    """Singular values of one step's gradients above the edge, and all there are."""
    found = [0, 0]

    def look(_: str, gradient: torch.Tensor, noise_std: float) -> torch.Tensor:
        if gradient.dim() == 2:
            n, m = gradient.shape
            y = torch.linalg.svdvals(gradient.double())
            found[0] += int((y > noise_std * (n**0.5 + m**0.5)).sum())
            found[1] += len(y)
        return gradient

    private_step(task, method, clip, noise, look).step()
    return found[0], found[1]


def with_and_without(
    title: str, task: Task, method: Method, target: float | None, pairs: int
) -> None:
    """A row for each amount of noise."""
    clip = task.max_grad_norm()
    header(title)
    for name, noise in NOISES.items():
        timed, inside = Timed(), []
        without = private_step(task, method, clip, noise, None).step
        denoised = private_step(task, method, clip, noise, timed).step

        def step(timed: Timed = timed, inside: list[float] = inside, run=denoised) -> None:  # noqa: ANN001
            before = timed.seconds
            run()
            inside.append(timed.seconds - before)

        seconds = measure({"without": without, "with": step}, pairs)
        passing, of = count_passing(task, method, clip, noise)
        label = f"{name}, {passing} of {of} values above the edge"
        row(f"{label}, over no denoiser", ratio(seconds["with"], seconds["without"]), target)
        own = np.array(inside[-pairs:])  # after the warm-up
        rest = seconds["with"] - own
        row("the same, by the clock inside", ratio(seconds["with"], rest), target)
        inner, outer = 1e3 * np.median(own), 1e3 * np.median(rest)
        print(f"<!-- CPU ms: denoiser {inner:.2f}, the rest {outer:.1f} -->", flush=True)
    print(f"\n{pairs} pairs.", flush=True)


def part_lora(pairs: int) -> None:
    task = with_lora(minilm(128), 8, ("query", "value"))
    title = "dp-lora, MiniLM, query and value, r = 8, 8 × 128 tokens"
    with_and_without(title, task, "dp-lora", 1.05, pairs)


def part_gpt2(pairs: int) -> None:
    task = with_lora(gpt2(128, 4), 16, ("c_attn",), head=False)
    title = "dp-lora, GPT-2 of 2 blocks, c_attn, r = 16, 4 × 128 tokens"
    with_and_without(title, task, "dp-lora", 1.05, pairs)


def part_dense(pairs: int) -> None:
    task = with_dense(minilm(128), ("query", "value"))
    title = "dp-sgd, MiniLM, query and value in full (384 × 384), 8 × 128 tokens"
    with_and_without(title, task, "dp-sgd", None, pairs)


def part_kernel(pairs: int) -> None:
    """One matrix, whose spectrum has one value above the edge, against a plain SVD."""
    header("One matrix, one value above the edge, over torch.linalg.svd in float32")
    generator = torch.Generator().manual_seed(0)
    for n, m in ((8, 384), (16, 768), (384, 384), (768, 768)):
        spike = torch.outer(*(torch.randn(k, generator=generator) for k in (n, m)))
        spike *= 4 * (n * m) ** 0.25 / spike.norm()
        g = spike + torch.randn(n, m, generator=generator)
        works: dict[str, Callable[[], object]] = {
            "ours": lambda g=g: denoise(g, 1.0),
            "svd": lambda g=g: torch.linalg.svd(g, full_matrices=False),
        }
        seconds = measure(works, pairs)
        times = " and ".join(f"{1e3 * np.median(s):.2f}" for s in seconds.values())
        row(f"{n} × {m} ({times} ms)", ratio(seconds["ours"], seconds["svd"]), None)


PARTS: dict[str, Callable[[int], None]] = {
    "lora": part_lora,
    "gpt2": part_gpt2,
    "dense": part_dense,
    "kernel": part_kernel,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of denoising.")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.parts or PARTS:
        PARTS[name](options.pairs)


if __name__ == "__main__":
    main()
