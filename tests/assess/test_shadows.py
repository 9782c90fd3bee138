"""Shadow models: who is in, that the cache and the backend change nothing, and what is kept."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lora_privacy.assess import AssessConfig, Shadows, train_shadows
from lora_privacy.assess.adapter_fit import AdapterFit
from lora_privacy.assess.shadows import coins_of
from lora_privacy.audit import attack_r, lira, rmia, tune_offline_a
from lora_privacy.core import adapt
from lora_privacy.data import TextDataset, tickets
from lora_privacy.errors import DataError, FolderInUseError, StorageError
from lora_privacy.training import make_private

NAMES = ("reference_log_probs", "reference_members", "population_reference_log_probs", "seeds")
SMALL: dict[str, Any] = {
    "train_size": 20,
    "dev_size": 9,
    "epochs": 2,
    "batch_size": 4,
    "rank": 2,
    "max_length": 12,
    "last_layers": 1,
    "learning_rate": 0.02,
}


@dataclass
class Toy:
    """Says of each record whether it was in; a random number from the seed is the rest."""

    records: int = 30
    name: str = "toy"
    population: int = 5
    fail_at: int = 10**9
    calls: list[int] = field(default_factory=list)

    def fingerprint(self) -> str:
        return self.name

    def __call__(self, seed: int, rows: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        self.calls.append(seed)
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        inside = np.isin(np.arange(self.records), rows)
        noise = np.random.default_rng(seed).random(self.records) + torch.rand(1).item()
        return -2.0 - noise + inside, -1.0 - torch.rand(self.population)


def same(first: Shadows, second: Shadows) -> bool:
    """Bit by bit."""
    assert first.fingerprint == second.fingerprint
    pairs = [(getattr(first, name), getattr(second, name)) for name in NAMES]
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], str]:
    """A 3-block BERT of random weights in a folder, by its dropout."""
    words = sorted({word for text in tickets(200, seed=0).texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
    )

    def make(dropout: float) -> str:
        folder = tmp_path_factory.mktemp("bert")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            BertModel(
                BertConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=16,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    intermediate_size=32,
                    max_position_embeddings=32,
                    hidden_dropout_prob=dropout,
                    attention_probs_dropout_prob=dropout,
                )
            ).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def test_coins_are_fair_and_independent() -> None:
    """400 × 500 coins, each test at level 1e-4; exactly half a set, or one mask for all, fails."""
    coins = np.array([coins_of(7, number, 500) for number in range(400)])

    def p_values(masks: npt.NDArray[np.bool_]) -> list[float]:
        # Heads in all, spread of the sizes of the sets, spread of the counts of the records.
        centred = np.where(masks, 0.5, -0.5)
        found = [stats.binomtest(int(masks.sum()), masks.size).pvalue]
        for axis in (0, 1):
            sums = np.sum(centred, axis=axis)
            chi2 = float(np.sum(sums**2)) / (masks.shape[axis] / 4)
            law = stats.chi2(masks.shape[1 - axis])
            found.append(2 * min(law.cdf(chi2), law.sf(chi2)))
        return found

    assert min(p_values(coins)) > 1e-4
    rng = np.random.default_rng(1)
    half = rng.permuted(np.tile(np.arange(500) < 250, (400, 1)), axis=1)
    assert min(p_values(half)) < 1e-4
    assert min(p_values(np.tile(coins[0], (400, 1)))) < 1e-4
    assert not np.array_equal(coins[0], coins_of(8, 0, 500))


def test_masks_name_the_rows_that_were_trained_on(tmp_path: Path) -> None:
    """The toy's records say it; and a mask of another shadow is seen to be wrong."""
    toy = Toy()
    found = train_shadows(toy, tmp_path / "out", count=6, seed=3)
    noise = [np.random.default_rng(seed).random(30) for seed in toy.calls]
    inside = found.reference_log_probs + 2.0 + noise
    inside -= inside.min(axis=1, keepdims=True)  # the one number of the seed
    assert np.array_equal(inside > 0.5, found.reference_members)
    assert not np.array_equal(inside > 0.5, np.roll(found.reference_members, 1, axis=0))
    assert toy.calls == found.seeds.tolist()
    assert len(set(toy.calls)) == 6
    assert found.population_reference_log_probs.shape == (6, 5)


def test_arrays_go_into_the_attacks_as_they_are(tmp_path: Path) -> None:
    """The first shadow plays the target: all attacks tell its members, whom the toy gives away."""
    found = train_shadows(Toy(records=200, population=40), tmp_path / "out", count=13, seed=1)
    target, truth = found.reference_log_probs[0], found.reference_members[0]
    rest = {name: value[1:] for name, value in found.arrays().items()}
    population = found.population_reference_log_probs[0]
    log_probs = {name: value for name, value in rest.items() if "population" not in name}
    scores = [
        rmia(log_probs=target, population_log_probs=population, mode="online", **rest),
        rmia(
            log_probs=target,
            population_log_probs=population,
            mode="offline",
            a=tune_offline_a(**rest),
            **rest,
        ),
        lira(log_probs=target, mode="online", **log_probs),
        attack_r(
            losses=-target,
            reference_losses=-rest["reference_log_probs"],
            reference_members=rest["reference_members"],
        ),
    ]
    for score in scores:
        assert stats.mannwhitneyu(score[truth], score[~truth], alternative="greater").pvalue < 1e-4


@pytest.mark.parametrize(
    "backend",
    [
        {"n_jobs": 2, "backend": "threading"},
        pytest.param({"n_jobs": 2, "backend": "loky"}, marks=pytest.mark.slow),
    ],
)
def test_backends_give_the_same_bits(
    bert: Callable[[float], str], tmp_path: Path, backend: dict[str, Any]
) -> None:
    """With dropout, which draws from a global generator; another seed gives other bits."""
    config = AssessConfig(model=bert(0.2), methods=("lora",), **SMALL)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    plain = train_shadows(config, tmp_path / "plain", count=4, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    with joblib.parallel_config(**backend):
        other = train_shadows(config, tmp_path / "other", count=4, seed=5)
    assert same(plain, other)
    files = [tmp_path / name / "shadows.npz" for name in ("plain", "other")]
    assert same(*map(Shadows.load, files))
    assert not np.array_equal(plain.reference_log_probs[0], plain.reference_log_probs[1])
    again = train_shadows(config, tmp_path / "again", count=1, seed=6)
    assert not np.array_equal(again.reference_log_probs[0], plain.reference_log_probs[0])


@pytest.mark.parametrize("method", ["lora", "lora-fa", "flora"])
def test_a_shadow_is_what_a_plain_loop_trains(
    bert: Callable[[float], str], tmp_path: Path, method: Any
) -> None:
    """Oracle: transformers' BERT and AdamW in a loop here, without cache; 1e-4 of ln p.

    For FLoRA a dense gradient is projected by hand. Training on everyone is 0.01 or more away.
    """
    config = AssessConfig(model=bert(0.0), methods=(method,), dense_learning_rate=0.02, **SMALL)
    found = train_shadows(config, tmp_path / "out", count=2, seed=11)
    for number in range(2):
        members = np.flatnonzero(coins_of(11, number, 20))
        for rows, near in ((members, True), (np.arange(20), False)):
            records, population = plain_loop(config, int(found.seeds[number]), rows)
            gap = np.abs(records - found.reference_log_probs[number]).max()
            assert (gap < 1e-4) if near else (gap > 0.01)
            if near:
                gap = population - found.population_reference_log_probs[number]
                assert np.abs(gap).max() < 1e-4


def plain_loop(
    config: AssessConfig, seed: int, rows: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """One shadow, by hand: text by text, one forward pass of the whole model each."""
    train, dev = (tickets(n, seed=0, split=s) for n, s in ((20, "train"), (9, "dev")))  # pyright: ignore[reportArgumentType]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(config.model)
    method = config.methods[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = BertModel.from_pretrained(config.model)
        model = torch.nn.ModuleDict({"encoder": encoder})
        model["head"] = torch.nn.Linear(16, len(train.classes))
    adapt(
        model,
        2,
        method="lora" if method == "flora" else method,
        layers=[-1],
        seed=seed,
        trainable=("head",),
    )

    def logits(text: str) -> torch.Tensor:
        tokens = torch.tensor([tokenizer(text, truncation=True, max_length=12)["input_ids"]])
        return model["head"](model["encoder"](input_ids=tokens)[0].mean(1))

    def losses(data: TextDataset, chosen: Any) -> torch.Tensor:
        labels = data.require_labels()
        return torch.stack(
            [
                functional.cross_entropy(logits(data.texts[i]), torch.tensor([labels[i]]))
                for i in chosen
            ]
        )

    layers = [m for m in model.modules() if type(m).__name__ == "LoRALinear"]
    if method == "flora":  # B stays 0 and its gradient is that of G Aᵀ
        for layer in layers:
            layer.project.requires_grad_(False)
        dense = [layer.base.weight for layer in layers]
        rest = list(model["head"].parameters())
        for layer in layers:
            layer.expand.requires_grad_(False)
            layer.base.weight.requires_grad_(True)
        optimizer = torch.optim.AdamW([*dense, *rest], lr=0.02, weight_decay=0.0)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    rng = np.random.default_rng(seed)
    step = 0
    for _ in range(2):
        order = rng.permutation(rows)
        for start in range(0, len(order), 4):
            optimizer.zero_grad()
            losses(train, order[start : start + 4]).mean().backward()
            if method == "flora":
                for layer in layers:
                    a = layer.projection.matrix(step)
                    layer.base.weight.grad = layer.base.weight.grad @ a.T @ a
            optimizer.step()
            step += 1
    with torch.no_grad():
        return (
            -losses(train, range(20)).double().numpy(),
            -losses(dev, range(9)).double().numpy(),
        )


def test_the_frozen_blocks_run_once_for_all_shadows(
    bert: Callable[[float], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of hidden states that go through block 0 do not grow with the shadows."""
    from transformers.models.bert.modeling_bert import BertLayer

    seen: list[int] = []
    plain = BertLayer.forward

    def counted(self: Any, hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(len(hidden))
        return plain(self, hidden, *args, **options)

    monkeypatch.setattr(BertLayer, "forward", counted)
    config = AssessConfig(model=bert(0.0), methods=("lora",), **{**SMALL, "last_layers": 1})
    rows = []
    for count in (1, 3):
        seen.clear()
        train_shadows(config, tmp_path / str(count), count=count)
        rows.append(sum(seen))
    # Of a further shadow only the last of three blocks runs: two epochs of about 10 records, and
    # 29 to be scored. One more fill would be 2 × 29 rows of the blocks below.
    assert (rows[1] - rows[0]) / 2 == pytest.approx(2 * 10 + 29, abs=10)


def test_a_killed_run_goes_on_and_a_larger_one_adds(tmp_path: Path) -> None:
    """Nothing is trained twice, and the bits are those of a run in one go."""
    straight = train_shadows(Toy(), tmp_path / "straight", count=5, seed=2)
    folder = tmp_path / "out"
    killed = Toy(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        train_shadows(killed, folder, count=4, seed=2)
    assert len(list((folder / "finished").iterdir())) == 2
    assert not (folder / "shadows.npz").exists()
    resumed = Toy()
    four = train_shadows(resumed, folder, count=4, seed=2)
    assert len(resumed.calls) == 2
    assert list((folder / "finished").iterdir()) == []
    assert same(four, straight.first(4))
    more = Toy()
    with torch.random.fork_rng():
        torch.manual_seed(99)  # what else goes on in a process does not matter
        assert same(train_shadows(more, folder, count=5, seed=2), straight)
    assert len(more.calls) == 1
    none = Toy()
    assert same(train_shadows(none, folder, count=3, seed=2), straight.first(3))
    assert none.calls == []
    assert same(Shadows.load(folder / "shadows.npz"), straight)


def test_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while writing leaves what was there."""
    folder = tmp_path / "out"
    before = train_shadows(Toy(), folder, count=2)

    def crash(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", crash)
    with pytest.raises(OSError, match="disk full"):
        train_shadows(Toy(), folder, count=3)
    monkeypatch.undo()
    assert same(Shadows.load(folder / "shadows.npz"), before)
    assert same(train_shadows(Toy(), folder, count=2), before)


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    train_shadows(Toy(), folder, count=1)
    for fit, seed in ((Toy(name="other"), 0), (Toy(records=31), 0), (Toy(), 1)):
        with pytest.raises(FolderInUseError, match="shadows of another training"):
            train_shadows(fit, folder, count=1, seed=seed)
    (folder / "config.json").write_text("{")
    with pytest.raises(FolderInUseError, match="shadows of another training"):
        train_shadows(Toy(), folder, count=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FolderInUseError, match="not empty"):
        train_shadows(Toy(), tmp_path / "full", count=1)
    with pytest.raises(FolderInUseError, match="is a file"):
        train_shadows(Toy(), tmp_path / "full" / "notes.txt", count=1)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    folder, other = tmp_path / "out", tmp_path / "other"
    train_shadows(Toy(), folder, count=2)
    train_shadows(Toy(), other, count=2, seed=9)
    joined = folder / "shadows.npz"
    whole = joined.read_bytes()
    joined.write_bytes((other / "shadows.npz").read_bytes())
    with pytest.raises(StorageError, match="do not belong together"):
        train_shadows(Toy(), folder, count=2)
    joined.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match=r"shadows\.npz is damaged"):
        train_shadows(Toy(), folder, count=2)
    np.savez(joined, seeds=np.array([1]))
    with pytest.raises(StorageError, match="has no array reference_log_probs"):
        Shadows.load(joined)
    with pytest.raises(StorageError, match="There is no file"):
        Shadows.load(folder / "nothing.npz")
    # One more of a population of another size, which only a fit that lies can return.
    joined.write_bytes(whole)
    with pytest.raises(StorageError, match="do not belong together"):
        train_shadows(Toy(population=6), folder, count=3)


@pytest.mark.parametrize(
    "answer",
    [
        (np.zeros(29), np.zeros(5)),
        (np.full(30, 0.1), np.zeros(5)),
        (np.full(30, math.nan), np.zeros(5)),
        (np.full(30, -math.inf), np.zeros(5)),
        (np.zeros((30, 1)), np.zeros(5)),
        (np.zeros(30), np.zeros(0)),
        (np.zeros(30), np.ones(5)),
    ],
)
def test_a_fit_must_return_log_probabilities(answer: Any, tmp_path: Path) -> None:
    class Wrong(Toy):
        def __call__(self, seed: int, rows: Any) -> tuple[Any, Any]:
            return answer

    with pytest.raises(ValueError, match="fit must return ln p of the"):
        train_shadows(Wrong(), tmp_path / "out", count=1)
    assert list((tmp_path / "out" / "finished").iterdir()) == []


def test_bad_arguments(tmp_path: Path) -> None:
    for wrong, error in (({"count": 0}, ValueError), ({"seed": -1}, ValueError)):
        with pytest.raises(error, match="must be at least"):
            train_shadows(Toy(), tmp_path / "out", **wrong)
    with pytest.raises(TypeError, match="count must be an integer"):
        train_shadows(Toy(), tmp_path / "out", count=2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="methods must name the one"):
        train_shadows(AssessConfig(**SMALL), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_population_is_outside_of_the_records() -> None:
    """One shared text is enough, and the message shows it."""
    data = tickets(20, seed=0)
    config = AssessConfig(methods=("lora",), **SMALL)
    with pytest.raises(DataError, match=f"1 examples.*{data.texts[19][:20]}"):
        AdapterFit(config, data, data.select([19]))
    other = tickets(9, seed=0, split="dev")
    assert AdapterFit(config, data, other).records == 20


def test_fingerprints_tell_trainings_and_data_apart() -> None:
    data, dev = tickets(20, seed=0), tickets(9, seed=0, split="dev")
    config = AssessConfig(methods=("lora",), **SMALL)
    fits = [
        AdapterFit(config, data, dev),
        AdapterFit(AssessConfig(methods=("flora",), **SMALL), data, dev),
        AdapterFit(AssessConfig(methods=("lora",), **{**SMALL, "rank": 3}), data, dev),
        AdapterFit(config, data.select(range(19)), dev),
        AdapterFit(config, data, dev.select(range(8))),
    ]
    assert len({fit.fingerprint() for fit in fits}) == 5
    assert json.dumps(fits[0].fingerprint())


def test_the_noise_of_private_shadows_does_not_tell_how_many_were_in(
    bert: Callable[[float], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The standard deviation of a step is the same for 7 and for 13 members; q·n would tell."""
    seen = []

    def watched(*args: Any, **options: Any) -> Any:
        private = make_private(*args, **options)
        seen.append((private.noise_std, private.sample_rate, len(args[2].dataset)))
        return private

    monkeypatch.setattr("lora_privacy.assess.private.make_private", watched)
    config = AssessConfig(
        model=bert(0.0), methods=("dp-lora-fa",), private_batch_size=10, delta=1e-2, **SMALL
    )
    fit = AdapterFit(config, tickets(20, seed=0), tickets(9, seed=0, split="dev"))
    assert fit.plan is not None
    for members in (7, 13):
        fit(1, np.arange(members))
    assert [members for _, _, members in seen] == [7, 13]
    assert len({std for std, _, _ in seen}) == 1
    assert {rate for _, rate, _ in seen} == {0.5}
    expected = config.max_grad_norm * fit.plan.noise_multiplier / (0.5 * 10)
    assert seen[0][0] == pytest.approx(expected, rel=2e-3)
