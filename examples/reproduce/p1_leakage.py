"""Does a smaller rank leak less, and is it the noise of the projection or the capacity?

    OMP_NUM_THREADS=1 python examples/reproduce/p1_leakage.py --data FOLDER

The question that arXiv:2409.17538 leaves open. Methods differ in whether the projection is random
and whether all of the weight can move:

    full     all of it can move, nothing is projected
    flora    all of it can move, through a projection drawn anew at each step
    fixed    r directions can move, the same in every run: no randomness (the control)
    lora-fa  r directions can move, drawn anew for each run
    shared   as lora-fa, but one draw serves every run, the references' too
    lora     as lora-fa, but the directions are trained too
    head     the block stays as it was: rank 0

Members: MiniLM's last block over a cached prefix, each shadow the target once, the others its
references. Secrets: a small language model trained here. docs/reproduction/p1-leakage.md reports.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from _common import Runs, parser, save_figure, save_json
from _leakage_report import figure, tables
from _leakage_statistics import at_level, estimate, slope, tested
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from lora_privacy.assess import AssessConfig
from lora_privacy.assess.auditing import Game
from lora_privacy.assess.batches import TokenisedDataset
from lora_privacy.assess.models import load_model
from lora_privacy.assess.shadows import coins_of
from lora_privacy.assess.training import prefixed
from lora_privacy.audit import auc, exposure, exposure_p_value, roc_curve
from lora_privacy.core import CachedPrefix, adapt, adapters, decompress, flora_layers, refresh
from lora_privacy.data import TextDataset, load, plant_secrets, tickets

Array: TypeAlias = npt.NDArray[np.float64]
Setting: TypeAlias = tuple[str, int | None]

RANKED = ("lora", "lora-fa", "shared", "fixed", "flora")
PAIRS = (
    ("shared", "lora-fa"), ("fixed", "lora-fa"), ("fixed", "shared"), ("lora", "full"),
    ("lora-fa", "full"), ("shared", "full"), ("flora", "full"),
)  # fmt: skip
SHARED_SEED = 10**6  # of the one A
QUICK_RANKS, FULL_RANKS = (1, 8, 64), (1, 4, 16, 64, 256)
SEED, SEARCH_SEED = 0, 1  # of all coins and trainings; rates were found on the second
MEMBER_EPOCHS, SECRET_EPOCHS = (3, 5, 7, 10), (1, 3, 12)
# Where runs are compared at equal training loss, in nats; the search fixed both.
MEMBER_LEVEL, SECRET_LEVEL = 0.15, 1.8
MEMBER_BATCH, SECRET_BATCH, MAX_LENGTH, HEAD_RATE = 16, 8, 24, 3e-3
ATTACKS = ("RMIA", "LiRA", "attack-P")
FPR = 0.05
ALTERNATIVES = 127  # at most 7 bits
TOKENS = 48
BASE_EPOCHS, BASE_RATE = 6, 3e-3

# AdamW's rates at ranks 1, 8 and 64, found by --search; other ranks are interpolated. A dense
# weight has no rank.
MEMBER_RATES: dict[str, tuple[float, ...]] = {
    "lora": (1e-2, 1.5e-3, 5e-4), "lora-fa": (3e-2, 5e-3, 1.5e-3), "fixed": (3e-2, 5e-3, 1.5e-3),
    "shared": (3e-2, 5e-3, 1.5e-3),
    "flora": (6e-3, 2.5e-3, 1e-3), "full": (3e-4,), "head": (HEAD_RATE,),
}  # fmt: skip
SECRET_RATES: dict[str, tuple[float, ...]] = {
    "lora": (1e-2, 4e-3, 1.5e-3), "lora-fa": (1e-2, 6e-3, 2.5e-3), "fixed": (1e-2, 6e-3, 2.5e-3),
    "flora": (1e-3, 1e-3, 1e-3), "full": (7e-4,),
}  # fmt: skip


def settings(
    ranks: tuple[int, ...], rates: dict[str, tuple[float, ...]], alone: tuple[str, ...]
) -> list[Setting]:
    """All of ``rates``; the second control at the middle rank only, for time."""
    ranked = [method for method in RANKED if method in rates]
    middle = ranks[len(ranks) // 2]
    pairs = ((m, r) for m in ranked for r in ranks if m != "shared" or r == middle)
    return [*((m, None) for m in alone), *pairs]


def rate_of(rates: dict[str, tuple[float, ...]], method: str, rank: int | None) -> float:
    found = rates[method]
    if rank is None:
        return found[0]
    at = np.interp(np.log2(rank), (0, 3, 6), np.log(found))
    return float(f"{np.exp(at):.3g}")


def directions(rank: int, width: int) -> Tensor:
    """The control's A (rank, width): rows 1 … rank of the cosine basis (DCT-II).

    Orthogonal and dense, so that no coordinate is singled out, the same in every run and layer,
    and scaled to the mean square 1/rank of an entry that the random ones have. Row 0, a constant,
    is left out: layer normalisation removes most of what it would see.
    """
    row, column = np.arange(1, rank + 1)[:, None], np.arange(width)[None, :]
    basis = np.sqrt(2 / width) * np.cos(np.pi * row * (column + 0.5) / width)
    return torch.from_numpy(basis * np.sqrt(width / rank)).float()


def prepare(
    model: nn.Module, method: str, rank: int | None, seed: int, **where: tuple[Any, ...]
) -> list[nn.Parameter]:
    """Adapt ``model`` in place; the parameters to train, those of a head apart.

    ``head`` gets an adapter that stays 0, so that dropout and cost are those of the others.
    """
    if method == "full":
        # To find the weights, and only those, that the others adapt.
        names = list(adapters(adapt(copy.deepcopy(model), 1, seed=seed, **where)))
        weights = [model.get_submodule(name).weight for name in names]
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for name in where.get("trainable", ()):
            model.get_submodule(name).requires_grad_(True)
        return weights
    kind: Any = "lora-fa" if method in ("fixed", "shared", "head") else method
    seed = SHARED_SEED if method == "shared" else seed
    adapt(model, rank or 1, method=kind, seed=seed, **where)
    if method == "flora":
        return [layer.weight for layer in flora_layers(model).values()]
    found = [adapter.layer for adapter in adapters(model).values()]
    if method == "head":
        for layer in found:
            layer.requires_grad_(False)
        return []
    if method == "fixed":
        for layer in found:
            with torch.no_grad():
                layer.project.weight.copy_(directions(layer.rank, layer.in_features))
    return [p for layer in found for p in layer.parameters() if p.requires_grad]


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, method: str) -> None:
    if method == "flora":
        decompress(model)
    optimizer.step()
    optimizer.zero_grad()
    if method == "flora":
        refresh(model)


def batches(rows: npt.NDArray[np.int64], size: int, rng: np.random.Generator) -> Iterator[Any]:
    order = rng.permutation(rows)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def rounded(values: Array) -> list[float]:
    """Six digits: what a line of the runs keeps of log-probabilities, however near 0 they are."""
    return [float(f"{value:.6g}") for value in values]


# ---- members of a classifier -------------------------------------------------------------------


def sentences(folder: Path, records: int, population: int) -> tuple[TextDataset, TextDataset]:
    """SST-2, or the embedded tickets where there is no folder."""
    path = folder / "sst2_sentences"
    if not path.is_dir():
        return tickets(records, seed=0), tickets(population, seed=0, split="dev")
    columns: dict[str, Any] = {"text_columns": (0,), "label_column": 1, "header": False}
    train = load(str(path / "train.tsv"), split="train", **columns)
    dev = load(str(path / "dev.tsv"), split="validation", classes=train.classes, **columns)
    return train.take(records, seed=0), dev.take(population, seed=0)


class Members:
    """Shadow trainings of one block and a head, all over one cached prefix."""

    def __init__(self, train: TextDataset, population: TextDataset) -> None:
        torch.manual_seed(SEED)
        self._model, tokenizer = load_model(AssessConfig(), len(train.classes))
        self.parts = [
            TokenisedDataset(texts, tokenizer, MAX_LENGTH, causal=False)
            for texts in (train, population)
        ]
        self._prefixes: list[CachedPrefix] = []

    def build(self, method: str, rank: int | None, seed: int) -> tuple[nn.Module, list[Any]]:
        """The model, and the optimiser's groups of parameters."""
        model: Any = copy.deepcopy(self._model)
        model.head.reset_parameters()
        where = {"targets": ("query", "value"), "layers": (-1,), "trainable": ("head",)}
        adapted = prepare(model, method, rank, seed, **where)
        return model.train(), [adapted, list(model.head.parameters())]

    def train(
        self, method: str, rank: int | None, rate: float, coins: npt.NDArray[np.bool_], seed: int
    ) -> dict[str, Any]:
        """Log-probabilities of the true labels at each checkpoint, of records and population."""
        begun = time.process_time()
        torch.manual_seed(seed)
        model, (adapted, head) = self.build(method, rank, seed)
        if not self._prefixes:
            for part in self.parts:
                self._prefixes.append(CachedPrefix(model))
                self._prefixes[-1].fill((b.ids, b.inputs()) for b in part.ordered(64))
        prefixes = [prefix.over(model) for prefix in self._prefixes]
        groups = [{"params": head, "lr": HEAD_RATE}]
        if adapted:
            groups.append({"params": adapted, "lr": rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        rng = np.random.default_rng(seed)
        found: list[list[Array]] = []
        for epoch in range(1, MEMBER_EPOCHS[-1] + 1):
            for rows in batches(np.flatnonzero(coins), MEMBER_BATCH, rng):
                batch = self.parts[0].batch(rows)
                with prefixed(prefixes[0], batch):
                    functional.cross_entropy(model(**batch.inputs()), batch.labels).backward()
                advance(model, optimizer, method)
            if epoch in MEMBER_EPOCHS:
                both = zip(self.parts, prefixes, strict=True)
                found.append([self.log_probs(model, *part) for part in both])
        return {
            "records": [rounded(inside) for inside, _ in found],
            "population": [rounded(outside) for _, outside in found],
            "cpu_seconds": time.process_time() - begun,
        }

    @torch.no_grad()
    def log_probs(self, model: nn.Module, part: TokenisedDataset, prefix: CachedPrefix) -> Array:
        """Of the true labels, without dropout."""
        model.eval()
        found = np.empty(len(part))
        for batch in part.ordered(64):
            with prefixed(prefix, batch):
                logits = model(**batch.inputs()).double()
            loss = functional.cross_entropy(logits, batch.labels, reduction="none")
            found[batch.ids.numpy()] = -loss.numpy()
        model.train()
        return np.minimum(found, 0.0)


def attacked(runs: list[dict[str, Any]], coins: npt.NDArray[np.bool_]) -> dict[str, Array]:
    """What attacks get from each target at each checkpoint, (targets, checkpoints) each.

    Args:
        runs: Of one setting, a shadow each.
        coins: Who was in, (shadows, records).
    """
    records = np.array([run["records"] for run in runs])
    population = np.array([run["population"] for run in runs])
    found: dict[str, list[list[float]]] = {}
    for target in range(len(runs)):
        others = np.arange(len(runs)) != target
        row: dict[str, list[float]] = {}
        for at in range(records.shape[1]):
            game = Game(
                target_log_probs=records[target, at],
                target_members=coins[target],
                population_log_probs=population[target, at],
                reference_log_probs=records[others, at],
                reference_members=coins[others],
                population_reference_log_probs=population[others, at],
            )
            scores, members = game.attacks()
            own, inside = records[target, at], coins[target]
            unseen = np.concatenate([own[~inside], population[target, at]])
            values = {name: auc(score, members).value for name, score in scores.items()}
            values |= {
                "tpr": tpr(scores["RMIA"], members),
                "loss": float(-own[inside].mean()),
                "train_accuracy": float((own[inside] > np.log(0.5)).mean()),
                "test_accuracy": float((unseen > np.log(0.5)).mean()),
                "test_loss": float(-unseen.mean()),
            }
            for name, value in values.items():
                row.setdefault(name, []).append(value)
        for name, curve in row.items():
            found.setdefault(name, []).append(curve)
    return {name: np.array(curves) for name, curves in found.items()}


def tpr(scores: Array, members: npt.NDArray[np.bool_]) -> float:
    """Largest TPR at an FPR of 5 % at most, on these scores."""
    curve = roc_curve(scores, members)
    return float(curve.tpr[curve.fpr <= FPR].max())


# ---- secrets in a small language model ---------------------------------------------------------


class Secrets:
    """A two-block GPT-2 of word pieces, trained on public tickets and other people's codes."""

    def __init__(self, work: Path, public: int, private: int, secrets: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        self.private, self.secrets = private, secrets
        _, self._tokenizer = load_model(AssessConfig(), 2)
        texts, _ = plant_secrets(unlabelled(public, 1), max(1, public // 2), seed=10**6)
        pieces = self._pieces((*texts.texts, *(f"{pair:02d}" for pair in range(100))))
        # Only word pieces that occur keep a number; 0 pads and 1 stands for all others.
        self._number = {p: i + 2 for i, p in enumerate(sorted({p for t in pieces for p in t}))}
        width = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": TOKENS}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        torch.manual_seed(SEED)
        vocabulary = len(self._number) + 2
        self._model = GPT2LMHeadModel(
            GPT2Config(vocab_size=vocabulary, **width, **dropout, **ends)
        )
        file = work / f"p1-leakage-base-{public}.safetensors"
        if file.exists():
            self._model.load_state_dict(load_file(file), strict=False)
        else:
            self._teach(self.encode(texts.texts))
            file.parent.mkdir(parents=True, exist_ok=True)
            tied = {"lm_head.weight"}  # the embedding again
            save_file({k: v for k, v in self._model.state_dict().items() if k not in tied}, file)

    def _pieces(self, texts: tuple[str, ...]) -> list[list[int]]:
        """Word pieces, with the separator at the end and without the one at the start."""
        return [ids[1:] for ids in self._tokenizer(list(texts))["input_ids"]]

    def encode(self, texts: tuple[str, ...]) -> list[Tensor]:
        """Numbers of the word pieces of each text."""
        rows = self._pieces(texts)
        return [torch.tensor([self._number.get(p, 1) for p in row[:TOKENS]]) for row in rows]

    def _teach(self, rows: list[Tensor]) -> None:
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=BASE_RATE, weight_decay=0.01)
        rng, size = np.random.default_rng(SEED), 16
        steps, step = BASE_EPOCHS * -(-len(rows) // size), 0
        for _ in range(BASE_EPOCHS):
            for some in batches(np.arange(len(rows)), size, rng):
                for group in optimizer.param_groups:
                    group["lr"] = BASE_RATE * (1 - step / steps)
                self._mean_loss(self._model, [rows[i] for i in some]).backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1

    def _losses(self, model: nn.Module, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Of each next token, and whether it is one, (rows, tokens)."""
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        logits = model(input_ids=tokens).logits[:, :-1].transpose(1, 2)
        real = tokens[:, 1:] != 0
        loss = functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
        return loss * real, real

    def _mean_loss(self, model: nn.Module, rows: list[Tensor]) -> Tensor:
        loss, real = self._losses(model, rows)
        return loss.sum() / real.sum()

    def train(
        self, method: str, rank: int | None, rate: float, number: int, seed: int
    ) -> dict[str, Any]:
        """Training loss and the exposure of every secret at each checkpoint."""
        begun = time.process_time()
        data_seed = 10**4 * (seed + 1) + number
        texts, secrets = plant_secrets(
            unlabelled(self.private, data_seed), self.secrets, seed=data_seed
        )
        rows = self.encode(texts.texts)
        model: Any = copy.deepcopy(self._model)
        parameters = prepare(model, method, rank, data_seed, targets=("c_attn", "c_proj", "c_fc"))
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        rng = np.random.default_rng(data_seed)
        found: dict[str, list[Any]] = {"loss": [], "bits_in": [], "bits_out": []}
        for epoch in range(1, SECRET_EPOCHS[-1] + 1):
            for some in batches(np.arange(len(rows)), SECRET_BATCH, rng):
                self._mean_loss(model, [rows[i] for i in some]).backward()
                advance(model, optimizer, method)
            if epoch in SECRET_EPOCHS:
                with torch.no_grad():
                    found["loss"].append(self._mean_loss(model, rows).item())
                    bits = self._exposures(model, secrets)
                found["bits_in"].append([b for b, s in bits if s.included])
                found["bits_out"].append([b for b, s in bits if not s.included])
        return {**found, "cpu_seconds": time.process_time() - begun}

    def scores(self, model: nn.Module, texts: tuple[str, ...]) -> Array:
        """Log-probability of each text, less that of the beginning that all of them share."""
        tokens = nn.utils.rnn.pad_sequence(self.encode(texts), batch_first=True)
        shared = int((tokens == tokens[0]).all(0).int().cumprod(0).sum())
        first = model(input_ids=tokens[:1, :shared], use_cache=True)
        past = first.past_key_values
        past.batch_repeat_interleave(len(texts))
        rest, real = tokens[:, shared:], tokens[:, shared:] != 0
        logits = model(input_ids=rest, past_key_values=past).logits[:, :-1]
        logits = torch.cat([first.logits[:, -1:].expand(len(texts), 1, -1), logits], dim=1)
        loss = functional.cross_entropy(logits.transpose(1, 2), rest, reduction="none")
        return -(loss.double() * real).sum(1).numpy()

    def _exposures(self, model: nn.Module, secrets: tuple[Any, ...]) -> list[tuple[float, Any]]:
        """Bits by rank among other codes, of one secret after the other."""
        found = []
        for number, secret in enumerate(secrets):
            others = secret.alternatives(ALTERNATIVES, seed=number)
            scores = self.scores(model, (secret.text, *others))
            found.append((exposure(scores[0], scores[1:], space=secret.space).bits, secret))
        return found


def unlabelled(size: int, seed: int) -> TextDataset:
    plain = tickets(size, seed=seed)
    return TextDataset(name=plain.name, texts=plain.texts, origin=plain.origin)


# ---- comparisons -------------------------------------------------------------------------------


def views(found: dict[str, Array], level: float) -> dict[str, dict[str, Array | None]]:
    """Quantity -> values of the targets after the last epoch, and at equal training loss."""
    return {
        "last": {name: curve[:, -1] for name, curve in found.items()},
        "level": {name: at_level(curve, found["loss"], level) for name, curve in found.items()},
    }


def compare(
    by_setting: dict[Setting, dict[str, dict[str, Array | None]]],
    ranks: tuple[int, ...],
    quantity: str,
) -> dict[str, Any]:
    """Slopes on the rank, and paired differences of methods that share their coins."""

    def of(view: str, method: str, rank: int | None) -> Array | None:
        found = by_setting.get((method, None if method == "full" else rank))
        return None if found is None else found[view][quantity]

    slopes, differences = [], []
    for view in ("last", "level"):
        for method in RANKED:
            curves = [curve for rank in ranks if (curve := of(view, method, rank)) is not None]
            whole = len(curves) == len(ranks)
            fitted = slope(np.stack(curves, axis=1), ranks) if whole else None
            slopes.append({"view": view, "method": method, "slope": fitted})
        for first, second in PAIRS:
            for rank in ranks:
                one, other = of(view, first, rank), of(view, second, rank)
                gap = None if one is None or other is None else tested(one - other)
                differences.append(
                    {"view": view, "methods": [first, second], "rank": rank, "difference": gap}
                )
    return {"slopes": slopes, "differences": differences}


def rows_of(
    by_setting: dict[Setting, dict[str, dict[str, Array | None]]],
    rates: dict[str, tuple[float, ...]],
) -> list[dict[str, Any]]:
    return [
        {
            "method": method, "rank": rank, "rate": rate_of(rates, method, rank),
            **{
                view: {k: None if v is None else estimate(v) for k, v in values.items()}
                for view, values in found.items()
            },
        }
        for (method, rank), found in by_setting.items()
    ]  # fmt: skip


# ---- the whole ---------------------------------------------------------------------------------


def member_results(
    options: argparse.Namespace, runs: Runs, ranks: tuple[int, ...]
) -> dict[str, Any] | None:
    train, population = sentences(options.data, options.records, options.population)
    members = cache(lambda: Members(train, population))  # not loaded when all runs are there
    shared = {
        "part": "members", "data": train.sha256[:16] + population.sha256[:16],
        "epochs": list(MEMBER_EPOCHS), "length": MAX_LENGTH, "batch": MEMBER_BATCH,
        "head_rate": HEAD_RATE,
    }  # fmt: skip

    def run(setting: Setting, number: int, rate: float, seed: int) -> dict[str, Any]:
        method, rank = setting
        key = {**shared, "method": method, "rank": rank, "rate": rate, "shadow": number}
        coins = coins_of(seed, number, len(train))
        # The seed is the same for all settings: the same head, order and dropout in each.
        own = 1_000 * (seed + 1) + number
        return runs.get(
            {**key, "seed": seed}, lambda: members().train(method, rank, rate, coins, own)
        )

    chosen = settings(ranks, MEMBER_RATES, ("head", "full"))
    if options.search:
        score = partial(member_loss, run, records=len(train))
        search(chosen, MEMBER_RATES, options.search, score)
        return None
    coins = np.stack([coins_of(SEED, i, len(train)) for i in range(options.shadows)])
    by_setting, curves, seconds = {}, [], 0.0
    rows = each(chosen, MEMBER_RATES, options.shadows, run)
    for setting, done in rows.items():
        seconds += sum(row["cpu_seconds"] for row in done)
        found = attacked(done, coins)
        by_setting[setting] = views(found, MEMBER_LEVEL)
        mean = {name: curve.mean(axis=0).tolist() for name, curve in found.items()}
        curves.append({"method": setting[0], "rank": setting[1], **mean})
        print(setting, by_setting[setting]["last"]["RMIA"].mean(), mean["loss"], flush=True)
    return {
        "data": train.name, "records": len(train), "population": len(population),
        "shadows": options.shadows, "epochs": MEMBER_EPOCHS[-1], "level": MEMBER_LEVEL,
        "checkpoints": list(MEMBER_EPOCHS), "cpu_seconds": seconds,
        "rows": rows_of(by_setting, MEMBER_RATES), "curves": curves,
        "compared": {name: compare(by_setting, ranks, name) for name in ATTACKS},
    }  # fmt: skip


def member_loss(
    run: Callable[..., Any], setting: Setting, rate: float, *, records: int
) -> list[float]:
    """Training loss of one run on other coins, at each checkpoint."""
    found = np.array(run(setting, 0, rate, SEARCH_SEED)["records"])
    return (-found[:, coins_of(SEARCH_SEED, 0, records)].mean(axis=1)).tolist()


def secret_loss(run: Callable[..., Any], setting: Setting, rate: float) -> list[float]:
    """As ``member_loss``."""
    return run(setting, 0, rate, SEARCH_SEED)["loss"]


def each(
    chosen: list[Setting],
    rates: dict[str, tuple[float, ...]],
    count: int,
    run: Callable[..., dict[str, Any]],
) -> dict[Setting, list[dict[str, Any]]]:
    """All runs, one of each setting after the other, so that a kill leaves them level."""
    found: dict[Setting, list[dict[str, Any]]] = {setting: [] for setting in chosen}
    for number in range(count):
        for setting in chosen:
            found[setting].append(run(setting, number, rate_of(rates, *setting), SEED))
            print(f"{setting} {number}", flush=True)
    return found


def search(
    chosen: list[Setting],
    rates: dict[str, tuple[float, ...]],
    factors: list[float],
    loss: Callable[[Setting, float], list[float]],
) -> None:
    """Print the training loss at several rates, of one run on other coins."""
    for setting in chosen:
        for factor in factors:
            rate = float(f"{rate_of(rates, *setting) * factor:.3g}")
            losses = " ".join(f"{value:.4f}" for value in loss(setting, rate))
            print(f"search {setting} {rate:g}: {losses}", flush=True)


def secret_results(
    options: argparse.Namespace, runs: Runs, ranks: tuple[int, ...]
) -> dict[str, Any] | None:
    model = cache(lambda: Secrets(options.work, options.public, options.private, options.secrets))
    shared = {
        "part": "secrets", "public": options.public, "private": options.private,
        "secrets": options.secrets, "epochs": list(SECRET_EPOCHS), "batch": SECRET_BATCH,
        "alternatives": ALTERNATIVES,
    }  # fmt: skip

    def run(setting: Setting, number: int, rate: float, seed: int) -> dict[str, Any]:
        method, rank = setting
        key = {**shared, "method": method, "rank": rank, "rate": rate, "run": number}
        return runs.get(
            {**key, "seed": seed}, lambda: model().train(method, rank, rate, number, seed)
        )

    chosen = settings(ranks, SECRET_RATES, ("full",))
    if options.search:
        search(chosen, SECRET_RATES, options.search, partial(secret_loss, run))
        return None
    by_setting, p_values, seconds = {}, [], 0.0
    rows = each(chosen, SECRET_RATES, options.runs, run)
    for setting, done in rows.items():
        seconds += sum(row["cpu_seconds"] for row in done)
        found = {
            "bits": np.array([[np.mean(b) for b in row["bits_in"]] for row in done]),
            "bits_out": np.array([[np.mean(b) for b in row["bits_out"]] for row in done]),
            "loss": np.array([row["loss"] for row in done]),
        }
        by_setting[setting] = views(found, SECRET_LEVEL)
        every = {
            key: exposure_p_value([b for row in done for b in row[f"bits_{key}"][-1]])
            for key in ("in", "out")
        }
        p_values.append({"method": setting[0], "rank": setting[1], **every})
        print(setting, found["bits"].mean(0), found["loss"].mean(0), every, flush=True)
    return {
        "tickets": options.private, "secrets": options.secrets, "runs": options.runs,
        "alternatives": ALTERNATIVES, "epochs": SECRET_EPOCHS[-1], "level": SECRET_LEVEL,
        "checkpoints": list(SECRET_EPOCHS), "cpu_seconds": seconds,
        "rows": rows_of(by_setting, SECRET_RATES), "p_values": p_values,
        "compared": {"bits": compare(by_setting, ranks, "bits")},
    }  # fmt: skip


def main() -> None:
    found = parser(__doc__.splitlines()[0])
    found.add_argument("--records", type=int, default=200)
    found.add_argument("--population", type=int, default=100)
    found.add_argument("--shadows", type=int, help="of each setting (quick: 6, full: 16)")
    found.add_argument("--runs", type=int, help="of the language model (quick: 3, full: 10)")
    found.add_argument("--ranks", type=int, nargs="+", help="(quick: 1 8 64)")
    found.add_argument("--public", type=int, default=1_500, help="tickets for the base model")
    found.add_argument("--private", type=int, default=24, help="tickets to fine-tune on")
    found.add_argument("--secrets", type=int, default=16, help="a fair coin each")
    found.add_argument(
        "--search", type=float, nargs="+", help="try these multiples of the rates, on other seeds"
    )
    found.add_argument("--parts", nargs="+", default=["members", "secrets"])
    options = found.parse_args()
    options.shadows = options.shadows or (16 if options.full else 6)
    options.runs = options.runs or (10 if options.full else 3)
    ranks = tuple(options.ranks or (FULL_RANKS if options.full else QUICK_RANKS))
    runs = Runs(options.work / "p1-leakage.jsonl")
    parts = {"members": member_results, "secrets": secret_results}
    with torch.random.fork_rng():
        results = {name: parts[name](options, runs, ranks) for name in options.parts}
    if options.search or len(results) < len(parts):
        return
    results = {"ranks": list(ranks), "seed": SEED, **results}
    save_json(options.docs, "p1-leakage", results)
    save_figure(options.docs, "p1_leakage", figure(results))
    print("\n\n".join(tables(results)))


if __name__ == "__main__":
    main()
