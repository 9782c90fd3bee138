"""Table-to-text pairs of reproduction P3: read, split, cached and scored."""

from __future__ import annotations

import csv
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _p3_training import Records
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_privacy.core import CachedPrefix

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

__all__ = ["Pairs", "pairs_of"]

FILES = {"e2e": "e2e/devset.csv", "dart": "dart/dart-v1.1.1-full-dev.json"}
FILLED = 32  # pairs that run through the frozen blocks at once
SCORED = 32  # and that are scored at once

Pair = tuple[list[int], list[int]]


def pairs_of(task: str, data: Path) -> list[tuple[str, str]]:
    """What is told and how it is said, from the file that is trained on."""
    path = data / FILES[task]
    if not path.exists():
        raise SystemExit(f"{path} is missing; docs/reproduction.md says where it is from.")
    if task == "e2e":
        with path.open(encoding="utf-8", newline="") as file:
            return [(row["mr"], row["ref"]) for row in csv.DictReader(file)]
    found = []
    for item in json.loads(path.read_text(encoding="utf-8")):
        told = ", ".join(" | ".join(triple) for triple in item["tripleset"])
        found.append((told, item["annotations"][0]["text"]))
    return found


class TokenLoss(torch.autograd.Function):
    """Cross entropy of a frozen output layer without bias, a value for each token.

    In one buffer of the logits: with 49,152 tokens to choose from, what cross entropy keeps for
    its gradient costs as much time as the layer itself.

    Shape:
        states ``(tokens, width)``, weight ``(vocabulary, width)``, targets and losses
        ``(tokens,)``.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # noqa: ANN401
        shares = states @ weight.T
        said = shares.gather(1, targets[:, None])[:, 0]
        top = shares.amax(1)
        total = shares.sub_(top[:, None]).exp_().sum(1)
        if ctx.needs_input_grad[0]:
            gradient = shares.div_(total[:, None]) @ weight - weight[targets]
            ctx.save_for_backward(gradient)
        return total.log() + top - said

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return upstream[:, None] * gradient, None, None


class Pairs:
    """Short pairs of a task, split at random, and what the frozen blocks make of them.

    Two parts are held out, with no text told in common with each other or with the training
    part: settings are chosen on one, and results are of the other.

    Attributes:
        training: Ids of pairs, by length, so that little is padded.
        held_out: ``"choice"`` and ``"final"`` -> ids of pairs.
    """

    def __init__(
        self,
        task: str,
        base: nn.Module,
        tokenizer: Any,  # noqa: ANN401
        args: argparse.Namespace,
    ) -> None:
        rows: list[Pair] = []
        for told, said in pairs_of(task, args.data):
            prompt = tokenizer(f"{told} -> ")["input_ids"]
            text = tokenizer(said + tokenizer.eos_token)["input_ids"]
            if len(prompt) + len(text) <= args.max_length:
                rows.append((prompt, text))
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
        first: dict[tuple[int, ...], int] = {}
        for i, (prompt, _) in enumerate(rows):
            first.setdefault(tuple(prompt), i)
        held_out = list(first.values())[: args.tuning + args.validation]
        apart = {tuple(rows[i][0]) for i in held_out}
        others = [i for i, row in enumerate(rows) if tuple(row[0]) not in apart]
        training = others[: args.records]
        if len(held_out) < args.tuning + args.validation or len(training) < args.records:
            raise SystemExit(
                f"{task} has {len(rows)} pairs of {len(first)} texts told at most "
                f"{args.max_length} tokens long: too few for {args.records} to train on and "
                f"{args.tuning + args.validation} held out. Raise --max-length."
            )
        self.rows, self.physical = rows, args.physical_batch_size
        self.training = self._by_length(training)
        self.held_out = {
            "choice": self._by_length(held_out[: args.tuning]),
            "final": self._by_length(held_out[args.tuning :]),
        }
        self._prefix = CachedPrefix(base.get_decoder())
        everyone = self._by_length([*held_out, *training])
        parts = [everyone[i : i + FILLED] for i in range(0, len(everyone), FILLED)]
        self._prefix.fill((part, self._inputs(part)) for part in parts)

    def _by_length(self, ids: list[int]) -> list[int]:
        return sorted(ids, key=lambda i: sum(map(len, self.rows[i])))

    def _padded(self, values: list[list[int]], fill: int) -> Tensor:
        longest = max(len(row) for row in values)
        return torch.tensor([row + [fill] * (longest - len(row)) for row in values])

    def _inputs(self, ids: list[int]) -> dict[str, Tensor]:
        both = [[*self.rows[i][0], *self.rows[i][1]] for i in ids]
        mask = [[1] * len(row) for row in both]
        return {"input_ids": self._padded(both, 0), "attention_mask": self._padded(mask, 0)}

    def losses(self, model: nn.Module, prefix: CachedPrefix, ids: list[int]) -> Tensor:
        """Mean over each pair's own tokens of what is said, what is told left out, (pairs,)."""
        inputs = self._inputs(ids)
        said = [[0] * (len(self.rows[i][0]) - 1) + [1] * len(self.rows[i][1]) for i in ids]
        wanted = self._padded(said, 0).bool()
        with prefix.using(ids, inputs["attention_mask"]):
            states = model.get_decoder()(**inputs).last_hidden_state
        # The output layer costs more than a block: it runs where something is to be said.
        output = model.get_output_embeddings()
        loss = TokenLoss.apply(
            states[:, :-1][wanted], output.weight, inputs["input_ids"][:, 1:][wanted]
        )
        row = wanted.nonzero()[:, 0]
        return torch.zeros(len(ids)).index_add(0, row, loss) / wanted.sum(1)

    def records(self, model: nn.Module, stage: str) -> Records:
        """The training part, for ``model``, scored on what is held out for ``stage``."""
        prefix = self._prefix.over(model.get_decoder())
        held_out = self.held_out[stage]

        @torch.no_grad()
        def score(model: nn.Module) -> dict[str, float]:
            parts = [held_out[i : i + SCORED] for i in range(0, len(held_out), SCORED)]
            found = torch.cat([self.losses(model, prefix, part) for part in parts])
            return {"loss": float(found.mean())}

        return Records(
            order=self.training,
            batch=list,
            loss=lambda model, ids: self.losses(model, prefix, ids).mean(),
            score=score,
            physical=self.physical,
        )
