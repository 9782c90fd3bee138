"""The whole job on tiny models that the test makes: no network, no packaged model."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from lora_privacy.assess import AssessConfig, Assessment, assess, plots
from lora_privacy.assess import run as run_module
from lora_privacy.cli import app
from lora_privacy.data import tickets
from lora_privacy.dp import PldAccountant, ProjectedGaussian, SampledGaussian
from lora_privacy.errors import DataError, FolderInUseError, NoTargetError

SMALL = {
    "train_size": 24,
    "dev_size": 12,
    "epochs": 2,
    "batch_size": 8,
    "rank": 4,
    "probe_every": 2,
    "noise_draws": 60,
    "dynamics_steps": 3,
    "max_length": 24,
    "private_batch_size": 12,
    "references": 4,
    "secrets": 3,
    "alternatives": 10,
    "update_games": 20,
}
PLAIN = ("lora", "lora-fa", "flora")
# For tests of what has no part in attacks.
NO_ATTACKS = {**SMALL, "references": 0, "secrets": 0, "update_games": 0}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for text in tickets(200, seed=0).texts for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A 3-block BERT of random weights in a folder."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = _tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A 2-block GPT-2, whose linear maps are Conv1D."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = _tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
        ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Drawing takes most of a tiny run; tests/assess/test_report.py looks at the figures."""
    if "command" not in request.node.name:
        monkeypatch.setattr(plots, "draw_all", lambda _: {})


@pytest.mark.parametrize("last_layers", [None, 1])
def test_all_methods_and_what_each_must_show(
    bert: str, tmp_path: Path, last_layers: int | None
) -> None:
    config = AssessConfig(model=bert, methods=PLAIN, last_layers=last_layers, **NO_ATTACKS)
    state = torch.random.get_rng_state()
    result = assess(config, tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), state)
    lora, lora_fa, flora = result.methods
    assert [m.method for m in result.methods] == ["lora", "lora-fa", "flora"]
    assert result.missing == ()
    for method in result.methods:
        assert method.curve.steps == 6
        assert len(method.layers) == 2 * (last_layers or 3)
        assert all(layer.steps == 3 for layer in method.layers)
        assert method.proved.epsilon == math.inf
        assert "no noise was added" in method.proved.reason
        assert {layer.matrix_tv for layer in method.layers} == {1.0}
    assert all(moved > 0 for moved in lora.drift.values())
    assert not lora_fa.drift
    assert not flora.drift
    # With A fixed, or fresh and known, plain SGD follows the linear story to rounding, which for
    # FLoRA is that of weights far larger than their change; a stale A would be off by a factor.
    assert max(layer.disagreement for layer in lora_fa.dynamics) < 1e-5
    assert max(layer.disagreement for layer in flora.dynamics) < 0.02
    assert max(layer.disagreement for layer in lora.dynamics) > 1e-7
    for layer in lora.dynamics:
        assert layer.drift <= layer.drift_bound * (1 + 1e-5)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [m["method"] for m in saved["methods"]] == ["lora", "lora-fa", "flora"]
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


def test_private_methods_and_what_attacks_get(bert: str, tmp_path: Path) -> None:
    """Every kind of row; what is proved, against an accountant that is fed by hand."""
    methods = ("full", "lora", "dp-sgd+scaling", "dp-lora+denoise", "dp-lora-fa", "dp-flora")
    config = AssessConfig(
        model=bert, methods=methods, last_layers=1, epsilon=3.0, delta=1e-3, **SMALL
    )
    result = assess(config, tmp_path / "out")
    rows = {row.method: row for row in result.methods}
    assert list(rows) == list(methods)
    included = result.train.examples  # the secrets whose coins came up are records too
    assert 24 <= included <= 27
    rate = 12 / included
    steps = 2 * round(1 / rate)
    for name, row in rows.items():
        assert row.secrets is not None
        assert len(row.secrets.scores) == 3
        assert row.membership is not None
        assert row.membership.records == 24
        assert row.membership.references == 4
        if "+scaling" in name:  # the game does not model it
            assert row.update is None
        else:
            assert row.update is not None
            assert row.update.method == name.split("+")[0]
        assert row.price is not None
        assert row.price.bound(1e-3).epsilon <= 3.0
        if name.startswith("dp-"):
            assert row.noise == row.price
            assert (row.noise.sample_rate, row.noise.steps) == (rate, steps)
            assert row.curve.steps == steps
            assert row.implied is None
            assert not row.layers
            assert bool(row.spectra) == ("+scaling" not in name)
            layers = [(16, 4)] * 2 + [(16, 4)]  # query, value, head
            event = (
                ProjectedGaussian(layers, row.noise.noise_multiplier, rate)
                if name == "dp-flora"
                else SampledGaussian(row.noise.noise_multiplier, rate)
            )
            expected = PldAccountant().compose(event, steps).epsilon(1e-3).epsilon
            assert row.proved.epsilon == expected
            assert 2.9 < expected <= 3.0
            assert any("Poisson" in text for text in row.proved.assumptions)
        else:
            assert row.proved.epsilon == math.inf
            assert row.noise is None
    assert rows["full"].implied is None
    assert rows["lora"].implied is not None
    assert rows["full"].trained_parameters == 2 * 16 * 16 + 8 * 17
    assert rows["dp-flora"].trained_parameters == 2 * 16 * 16 + 8 * 16
    # A projection buys: the same ε at less noise.
    assert rows["dp-flora"].noise.noise_multiplier < rows["dp-sgd+scaling"].noise.noise_multiplier
    read = Assessment.load(tmp_path / "out")
    assert read == result
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    data["methods"][2]["proved"]["epsilon"] = 0.1  # never read
    (tmp_path / "out" / "report.json").write_text(json.dumps(data))
    assert Assessment.load(tmp_path / "out") == result


def test_ctrl_c_in_an_attack_keeps_the_training(bert: str, tmp_path: Path) -> None:
    config = AssessConfig(model=bert, methods=("dp-lora", "lora"), last_layers=1, **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "attack_membership", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            assess(config, tmp_path / "out")
    part = Assessment.load(tmp_path / "out")
    assert part.missing == ("dp-lora (attacks)", "lora (attacks)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_train", None)
        whole = assess(config, tmp_path / "out", resume=True)
    assert whole.missing == ()
    # Not trained again: noise would have made it another model.
    assert whole.methods[0].curve == part.methods[0].curve
    assert whole.methods[0].membership is not None


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_rerun_without_noise_gives_the_same_numbers(bert: str, tmp_path: Path) -> None:
    """The attacks too, and whatever was run before; time and memory are left out."""
    alone = AssessConfig(model=bert, methods=("full", "flora"), last_layers=1, **SMALL)
    beside = replace(alone, methods=("dp-lora", "flora", "full"))
    first = {row.method: row for row in assess(alone, tmp_path / "a").methods}
    again = {row.method: row for row in assess(beside, tmp_path / "b").methods}
    for name, row in first.items():
        other = again[name]
        same = replace(other.curve, wall_seconds=0, cpu_seconds=0, peak_bytes=0)
        assert same == replace(row.curve, wall_seconds=0, cpu_seconds=0, peak_bytes=0)
        assert replace(other, curve=row.curve) == row


def test_a_held_out_set_of_records_is_refused_before_training(bert: str, tmp_path: Path) -> None:
    rows = [f"a{i} b c\t{i % 2}" for i in range(20)]
    (tmp_path / "t.tsv").write_text("\n".join(["text\tlabel", *rows]))
    file = str(tmp_path / "t.tsv")
    config = AssessConfig(model=bert, train=file, dev=file, label_column="label", **SMALL)
    with pytest.raises(DataError, match="no population; name other held-out data"):
        assess(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_secrets_are_refused_among_pairs_of_texts(bert: str, tmp_path: Path) -> None:
    rows = [f"a{i % 5} b\tc{i % 7}\t{i % 2}" for i in range(40)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["one\ttwo\tlabel", *rows]))
    config = AssessConfig(
        model=bert,
        train=str(tmp_path / "pairs.tsv"),
        dev=str(tmp_path / "pairs.tsv"),
        text_columns=("one", "two"),
        label_column="label",
        methods=("lora",),
        **{**NO_ATTACKS, "secrets": 3},
    )
    with pytest.raises(DataError, match="single sentences: ask for no secrets"):
        assess(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cached_prefix_changes_time_not_results(bert: str, tmp_path: Path) -> None:
    """Oracle: the same run without the cache, dropout being off in a BERT whose rates are 0."""
    config = AssessConfig(model=bert, last_layers=1, methods=("lora",), **NO_ATTACKS)
    folder = Path(bert)
    settings = json.loads((folder / "config.json").read_text())
    quiet = tmp_path / "quiet"
    quiet.mkdir()
    for file in folder.iterdir():
        (quiet / file.name).write_bytes(file.read_bytes())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (quiet / "config.json").write_text(json.dumps(settings))
    config = AssessConfig(model=str(quiet), last_layers=1, methods=("lora",), **NO_ATTACKS)
    cached = assess(config, tmp_path / "a").methods[0].curve.losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "frozen_prefix", lambda *_: None)
        plain = assess(config, tmp_path / "b").methods[0].curve.losses
    assert cached == pytest.approx(plain, rel=1e-5)


def test_the_same_seed_gives_the_same_numbers(bert: str, tmp_path: Path) -> None:
    config = AssessConfig(model=bert, methods=("flora",), last_layers=1, **SMALL)
    first, second = (assess(config, tmp_path / name).methods[0] for name in "ab")
    assert first.curve.losses == second.curve.losses
    assert first.layers == second.layers


def test_a_causal_model_with_conv1d(gpt2: str, tmp_path: Path) -> None:
    lines = "\n".join(tickets(40, seed=0).texts)
    (tmp_path / "text.tsv").write_text("text\n" + lines.replace("\t", " ") + "\n")
    config = AssessConfig(
        model=gpt2,
        task="causal-lm",
        train=str(tmp_path / "text.tsv"),
        dev=str(tmp_path / "text.tsv"),
        text_columns=("text",),
        methods=PLAIN,
        **NO_ATTACKS,
    )
    result = assess(config, tmp_path / "out")
    for method in result.methods:
        assert method.curve.scores[-1].accuracy is None
        assert math.isfinite(method.curve.scores[-1].loss)
        assert {(x.out_features, x.in_features) for x in method.layers} == {(48, 16)}
    assert max(layer.disagreement for layer in result.methods[1].dynamics) < 1e-5


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on(bert: str, tmp_path: Path) -> None:
    config = AssessConfig(model=bert, methods=PLAIN, last_layers=1, **NO_ATTACKS)
    calls = []

    def interrupted(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    original = run_module.fine_tune
    # A shell that starts the tests in the background has them ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "fine_tune", interrupted)
            with pytest.raises(KeyboardInterrupt):
                assess(config, tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, handler)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [m["method"] for m in saved["methods"]] == ["lora"]
    assert saved["missing"] == ["lora (attacks)", "lora-fa", "flora"]
    assert (
        "Not finished: lora (attacks), lora-fa, flora"
        in (tmp_path / "out" / "report.html").read_text()
    )
    with pytest.raises(FolderInUseError, match="--resume"):
        assess(config, tmp_path / "out")
    whole = assess(config, tmp_path / "out", resume=True)
    assert whole.missing == ()
    # The finished method was taken up, not run again: its time is the one that was saved.
    assert whole.methods[0].curve.wall_seconds == saved["methods"][0]["curve"]["wall_seconds"]
    straight = assess(config, tmp_path / "straight")
    assert [m.layers for m in straight.methods] == [m.layers for m in whole.methods]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"targets": ("q_proj",)}, NoTargetError, "key, query, value"),
        ({"last_layers": 9}, ValueError, "last_layers must be at most 3"),
        ({"rank": 17, "law": "orthonormal"}, ValueError, "at most in_features = 16"),
        ({"model": "nowhere/at/all"}, DataError, "no folder"),
        ({"train": "missing.tsv", "dev": "missing.tsv"}, DataError, "missing.tsv"),
        ({"task": "causal-lm"}, DataError, "tickets"),
    ],
)
def test_bad_input_is_named(
    bert: str,
    tmp_path: Path,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    config = AssessConfig(**{"model": bert, **NO_ATTACKS, **changes})
    with pytest.raises(error, match=message):
        assess(config, tmp_path / "out")


def test_a_held_out_set_is_asked_for(bert: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\na b,x\nc d,y\n")
    config = AssessConfig(model=bert, train=str(tmp_path / "t.csv"), **SMALL)
    with pytest.raises(DataError, match="--dev"):
        assess(config, tmp_path / "out")


def test_the_command_prints_the_table_and_names_errors(bert: str, tmp_path: Path) -> None:
    options = [
        "--model",
        bert,
        "--train-size",
        "16",
        "--dev-size",
        "8",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--last-layers",
        "1",
        "--noise-draws",
        "20",
        "--dynamics-steps",
        "1",
        "--method",
        "lora-fa",
        "--rank",
        "2",
        "--references",
        "0",
        "--secrets",
        "0",
        "--update-games",
        "0",
    ]
    runner = CliRunner()
    output = str(tmp_path / "out")
    done = runner.invoke(app, ["assess", "--output", output, *options])
    assert done.exit_code == 0, done.output
    assert "| lora-fa |" in done.output
    assert "report.html" in done.output
    saved = (tmp_path / "out" / "report.html").read_text()
    rendered = runner.invoke(app, ["report", output])
    assert rendered.exit_code == 0, rendered.output
    assert (tmp_path / "out" / "report.html").read_text() == saved
    # The settings of a run are a file to run it again from; an option beside it wins.
    file = ["--config", str(tmp_path / "out" / "config.toml"), "--learning-rate", "0.002"]
    second = runner.invoke(app, ["assess", "--output", str(tmp_path / "second"), *file])
    assert second.exit_code == 0, second.output
    config = json.loads((tmp_path / "second" / "report.json").read_text())["config"]
    assert (config["rank"], config["learning_rate"]) == (2, 0.002)
    again = runner.invoke(app, ["assess", "--output", output, *options])
    assert again.exit_code == 2
    assert "error:" in again.output
    assert "Traceback" not in again.output
    for wrong in (["--rank", "0"], ["--method", "qlora"], ["--task", "poetry"]):
        failed = runner.invoke(app, ["assess", "--output", str(tmp_path / "x"), *options, *wrong])
        assert failed.exit_code == 2
        assert "error:" in failed.output
