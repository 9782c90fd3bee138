"""What was to be reached, row by row: the only place that holds a target.

A benchmark looks its targets up here, ``check.py`` looks that none is missing, and the page shows
them.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TARGETS", "KnownMiss", "Target", "target_of"]


@dataclass(frozen=True, slots=True)
class KnownMiss:
    """A target that cannot be reached, why, and what is held instead.

    Attributes:
        limit: The bound that the same row is held to.
        reason: Why the target stands although it is missed.
    """

    limit: float
    reason: str


@dataclass(frozen=True, slots=True)
class Target:
    """A limit of one row; ``peer`` is None where the number stands by itself."""

    benchmark: str
    part: str
    name: str
    peer: str | None
    limit: float
    known_miss: KnownMiss | None = None


_PLAIN, _PEFT, _HOOKS, _GHOST = "plain LoRA", "plain PEFT LoRA", "Opacus hooks", "Opacus ghost"
_DENSE = "on the dense weights"
_LORA = {
    "training-lora": "dp-lora, MiniLM, query and value, r = 8, 8 × 128 tokens",
    "training-gpt2-128": "dp-lora, GPT-2 of 2 blocks, c_attn, r = 16, 4 × 128 tokens",
    "training-gpt2-512": "dp-lora, GPT-2 of 2 blocks, c_attn, r = 16, 2 × 512 tokens",
    "training-gpt2-1024": "dp-lora, GPT-2 of 2 blocks, c_attn, r = 16, 2 × 1024 tokens",
}
_MEMORY = ("MiniLM, 8 × 128 tokens", "GPT-2, 4 × 128 tokens", "GPT-2, 2 × 1024 tokens")
_FLORA = "dp-flora, MiniLM, {what}, r = 8, 8 × {length} tokens"
# benchmark: its part, times of a plain LoRA step that are allowed, share of ghost's time instead
# of one half
_FLORAS = {
    "training-flora-40": (_FLORA.format(what="query, value and head", length=40), 1.3, 0.85),
    "training-flora-128": (_FLORA.format(what="query, value and head", length=128), 1.3, 0.75),
    "training-flora-all": (_FLORA.format(what="all linear layers", length=128), 1.5, 0.65),
}
_ONE_PASS = (
    "ghost clipping runs one forward and two backward passes, and one of each, which every method "
    "needs, is most of half of that"
)
_PAIRS = (
    "5 inputs, rank 3, cosine 0.95, equal norms",
    "20 inputs, rank 10, cosine 0.99, norms 1 : 1.05",
    "768 inputs, rank 8, cosine 0.999, equal norms",
    "768 inputs, rank 64, cosine 0.99, norms 1 : 1.1",
    "400 inputs, rank 400, cosine 0.9, equal norms",
    "53,248 inputs, rank 4,096, cosine 0.9999, equal norms",
    "768 inputs, rank 8, cosine 0.999, norms 1 : 1.1",
)
_LAWS = "all laws for the shapes of Llama 3 70B, ranks 8 and 64"
_PROBE = "GradientProbe on a LoRA step of MiniLM, 16 × 40 tokens"
_HEAD = "private steps of a linear head, 384 wide, batch 256 of 6,920"
_RDP = "ε of 200 noise multipliers by Rényi divergences, the same orders"
_PLD = "ε of 200 noise multipliers × 10 steps by loss distributions, both certified ends"
_DENOISE = {
    "denoise-lora": "denoising dp-lora, MiniLM, query and value, r = 8, 8 × 128 tokens",
    "denoise-gpt2": "denoising dp-lora, GPT-2 of 2 blocks, c_attn, r = 16, 4 × 128 tokens",
}
_RMIA = "RMIA, 10,000 members × 10,000 population points, 16 references"

TARGETS: tuple[Target, ...] = (
    *(
        target
        for benchmark, part in _LORA.items()
        for target in (
            Target(benchmark, part, "dp-lora", _PLAIN, 1.05),
            Target(benchmark, part, "dp-lora", _PEFT, 1.05),
            Target(benchmark, part, "dp-lora", _HOOKS, 1.0),
            Target(benchmark, part, "dp-lora", _GHOST, 1.0),
            Target(benchmark, part, "dp-lora, backward passes a step", None, 1.0),
        )
    ),
    *(
        Target(
            "training-memory", "peak memory of a process, over one that trains plain LoRA",
            f"dp-lora, {name}", _PLAIN, 1.05,
        )
        for name in _MEMORY
    ),
    Target(
        "training-kernel", "per-sample norms of LoRA's A, r = 16, 768 inputs, 4 samples",
        "ours, T = 1024", "kernel of Opacus ghost", 10.0,
    ),
    *(
        target
        for benchmark, (part, plain, instead) in _FLORAS.items()
        for target in (
            Target(benchmark, part, "dp-flora", _PLAIN, plain),
            Target(benchmark, part, "dp-flora", f"{_HOOKS} {_DENSE}", 1.0),
            Target(
                benchmark, part, "dp-flora", f"{_GHOST} {_DENSE}", 0.5,
                KnownMiss(instead, _ONE_PASS),
            ),
        )
    ),
    *(
        Target(benchmark, part, f"the denoiser, {noise} noise", "the rest of the step", 0.05)
        for benchmark, part in _DENOISE.items()
        for noise in ("little", "much")
    ),
    Target("training-head", _HEAD, "dp-sgd", None, 200.0),
    Target("training-head", _HEAD, "dp-flora", None, 200.0),
    Target("rdp", _RDP, "one call", "Opacus", 100.0),
    Target("rdp", _RDP, "one call", "dp-accounting", 100.0),
    Target("rdp", _RDP, "one ledger of all", "Opacus, a ledger", 100.0),
    Target("rdp", _RDP, "nats below Opacus, at most", None, 1e-9),
    Target("pld", _PLD, "ours", "dp-accounting, grid 1e-4", 10.0),
    Target("pld", _PLD, "ours", "Opacus PRV", 10.0),
    *(
        Target("pairwise", "VectorProjection.epsilon, both directions", name, None, 10.0)
        for name in _PAIRS
    ),
    Target("laws", _LAWS, "the whole process with its imports", None, 1.0),
    Target("laws", _LAWS, "memory of the process", None, 200.0),
    Target("probe", _PROBE, "every step, nothing read", "plain step", 1.35),
    Target("probe", _PROBE, "every step, G and noise of all layers", "plain step", 1.35),
    Target("probe", _PROBE, "every 10 steps, G and noise of all layers", "plain step", 1.05),
    *(
        Target("rmia", f"{_RMIA}, {mode}", "by sorting", None, 5.0)
        for mode in ("offline", "online")
    ),
    Target("rmia", f"{_RMIA}, offline", "memory of the whole process", None, 500.0),
    Target("growth-canaries", "exponents", "RMIA, time, between the two largest", None, 1.2),
    Target("growth-canaries", "exponents", "RMIA, memory, between the two largest", None, 1.05),
)  # fmt: skip

_BY_KEY = {(t.benchmark, t.part, t.name, t.peer): t for t in TARGETS}


def target_of(benchmark: str, part: str, name: str, peer: str | None) -> Target | None:
    """The target of a row, or None."""
    return _BY_KEY.get((benchmark, part, name, peer))
