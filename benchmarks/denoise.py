"""Cost of denoising: a private step with a denoiser over the same step without.

    OMP_NUM_THREADS=1 python benchmarks/denoise.py [--parts lora gpt2 dense kernel] [--pairs 100]

Steps are those of ``make_private``, as in ``training.py``. A denoiser works hardest where singular
values pass the edge, so the steps are timed at little noise, where many of them do, and at much,
where hardly one does. The target is for the time of the denoiser inside the same steps, which the
drift of a busy machine disturbs less than the difference of two steps.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch

from _measure import MIN_PAIRS, measure, median, ratio
from _results import Results
from _tasks import Task, gpt2, minilm, ours, with_dense, with_lora
from lora_privacy.training import SingularValueDenoiser, denoise

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_privacy.training.methods import Method

NOISES = {"little noise": 1e-3, "much noise": 1e3}  # noise multipliers
BUDGET = 30.0  # CPU seconds of one comparison


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


def share_passing(task: Task, method: Method, clip: float, noise: float) -> float:
    """Singular values of one step's gradients above the edge, in % of all there are."""
    found = [0, 0]

    def look(_: str, gradient: torch.Tensor, noise_std: float) -> torch.Tensor:
        if gradient.dim() == 2:
            n, m = gradient.shape
            y = torch.linalg.svdvals(gradient.double())
            found[0] += int((y > noise_std * (n**0.5 + m**0.5)).sum())
            found[1] += len(y)
        return gradient

    ours(task, method, clip, noise, look).step()
    return 100 * found[0] / found[1]


def with_and_without(results: Results, part: str, task: Task, method: Method, pairs: int) -> None:
    """Rows for each amount of noise."""
    clip = task.max_grad_norm()
    for name, noise in NOISES.items():
        timed, inside = Timed(), list[float]()
        without = ours(task, method, clip, noise).step
        denoised = ours(task, method, clip, noise, timed).step

        def step(timed: Timed = timed, inside: list[float] = inside, run=denoised) -> None:  # noqa: ANN001
            before = timed.seconds
            run()
            inside.append(timed.seconds - before)

        seconds = measure({"without": without, "with": step}, pairs, budget=BUDGET)
        own = np.array(inside[-len(seconds["with"]) :])  # after the warm-up
        rest = seconds["with"] - own
        passing = median(np.array([share_passing(task, method, clip, noise)]))
        results.add(part, f"singular values above the edge, {name}", passing, unit="%")
        results.add(part, f"the denoiser, {name}", median(1e3 * own), unit="ms")
        results.add(part, f"the denoiser, {name}", ratio(own, rest), peer="the rest of the step")
        whole = ratio(seconds["with"], seconds["without"])
        results.add(part, f"a step with a denoiser, {name}", whole, peer="a step without")


def part_lora(results: Results, pairs: int) -> None:
    task = with_lora(minilm(128), 8, ("query", "value"))
    part = "denoising dp-lora, MiniLM, query and value, r = 8, 8 × 128 tokens"
    with_and_without(results, part, task, "dp-lora", pairs)


def part_gpt2(results: Results, pairs: int) -> None:
    task = with_lora(gpt2(128, 4), 16, ("c_attn",), head=False)
    part = "denoising dp-lora, GPT-2 of 2 blocks, c_attn, r = 16, 4 × 128 tokens"
    with_and_without(results, part, task, "dp-lora", pairs)


def part_dense(results: Results, pairs: int) -> None:
    task = with_dense(minilm(128), ("query", "value"))
    part = "denoising dp-sgd, MiniLM, query and value in full (384 × 384), 8 × 128 tokens"
    with_and_without(results, part, task, "dp-sgd", pairs)


def part_kernel(results: Results, pairs: int) -> None:
    """One matrix, whose spectrum has one value above the edge, against a plain SVD."""
    part = "denoising one matrix, one value above the edge"
    generator = torch.Generator().manual_seed(0)
    for n, m in ((8, 384), (16, 768), (384, 384), (768, 768)):
        spike = torch.outer(*(torch.randn(k, generator=generator) for k in (n, m)))
        spike *= 4 * (n * m) ** 0.25 / spike.norm()
        g = spike + torch.randn(n, m, generator=generator)
        works: dict[str, Callable[[], object]] = {
            "ours": lambda g=g: denoise(g, 1.0),
            "svd": lambda g=g: torch.linalg.svd(g, full_matrices=False),
        }
        seconds = measure(works, pairs, budget=20.0)
        results.add(part, f"{n} × {m}", median(1e3 * seconds["ours"]), unit="ms")
        peer = "torch.linalg.svd in float32"
        results.add(part, f"{n} × {m}", ratio(seconds["ours"], seconds["svd"]), peer=peer)


PARTS: dict[str, Callable[[Results, int], None]] = {
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
        results = Results(f"denoise-{name}")
        PARTS[name](results, options.pairs)
        results.save()


if __name__ == "__main__":
    main()
