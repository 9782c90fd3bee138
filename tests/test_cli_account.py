"""``account`` and ``calibrate``: numbers of the library, JSON and table, mistakes on one line."""

import doctest
import json
import re
import shlex
from pathlib import Path

import pytest
from opacus.accountants import registry
from PIL import Image
from typer.testing import CliRunner, Result

from lora_privacy.assess.privacy_plots import write_figure
from lora_privacy.cli import app
from lora_privacy.dp import (
    GaussianEvent,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    privacy_curve,
)

HOWTO = Path(__file__).parents[1] / "docs" / "howto-account.md"
RUN = ["--noise-multiplier", "1", "--sample-rate", "0.01", "--steps", "1000"]
TARGET = ["--epsilon", "2", "--delta", "1e-5", "--accountant", "rdp"]


def call(command: str, *options: str) -> Result:
    return CliRunner().invoke(app, [command, *options])


def test_account_prints_the_bound_of_the_library() -> None:
    done = call("account", *RUN, "--delta", "1e-5", "--accountant", "rdp", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    bound = RdpAccountant().compose(SampledGaussian(1.0, 0.01), 1000).epsilon(1e-5)
    assert answer["bound"]["epsilon"] == bound.epsilon
    for part in (answer["bound"], answer["curve"]):
        assert part["kind"] == "guarantee"
        assert part["adjacency"] == "add-remove"
        assert part["unit"] == "one training example"
        assert part["method"] == "rdp"
        assert any("each release has its own Poisson" in text for text in part["assumptions"])
        assert "Mironov, Ilya (2017), IEEE CSF 2017, arXiv:1702.07476" in part["citations"]
        assert any("early stopping" in caveat for caveat in part["caveats"])


def test_the_table_says_the_same_and_what_it_rests_on() -> None:
    done = call("account", *RUN, "--delta", "1e-5", "--accountant", "rdp")
    assert done.exit_code == 0, done.output
    assert "| ε, at most | 2.10133 nats |" in done.output
    assert "| δ, at most | 1e-05 |" in done.output
    assert "| neighbours | add-remove of one training example |" in done.output
    assert "1,000 × Gaussian noise, noise multiplier 1, sampling rate 0.01" in done.output
    for start in ("Assumes: ", "Sources: ", "Not covered: "):
        assert f"\n{start}" in done.output


def test_the_release_is_the_one_accounted_to_the_last_digit() -> None:
    """In words and as numbers; six digits would name another release."""
    noise, rate = "1.0000049", "0.010000049"
    run = ["--sample-rate", rate, "--steps", "10", "--accountant", "rdp", "--json"]
    asked = call("account", "--noise-multiplier", noise, "--delta", "1e-5", *run)
    answer = json.loads(asked.output)
    assert f"noise multiplier {noise}, sampling rate {rate}" in answer["release"]
    assert (answer["noise_multiplier"], answer["sample_rate"]) == (float(noise), float(rate))
    assert answer["layers"] == []

    shapes = ["--projected", "768:8", "--projected", "512:4"]
    asked = call("account", "--noise-multiplier", noise, "--delta", "1e-5", *shapes, *run)
    assert json.loads(asked.output)["layers"] == [[768, 8], [512, 4]]

    found = json.loads(call("calibrate", *TARGET, *run[:4], "--json").output)
    assert found["noise_multiplier"] == found["value"]
    assert f"noise multiplier {found['value']!r}," in found["release"]


def test_what_is_printed_as_at_most_is_not_below_it() -> None:
    """Six digits, rounded up; TPR and advantage are those of the curve in the JSON."""
    options = [*RUN, "--delta", "1e-5", "--accountant", "rdp"]
    table = call("account", *options).output
    curve = json.loads(call("account", *options, "--json").output)["curve"]
    printed = [
        float(row.split(" | ")[1].split()[0].strip("|")) for row in table.splitlines()[7:10]
    ]
    exact = [row["bound"] for row in curve["true_positive_rate_at_most"][:2]]
    for shown, value in zip(printed, [*exact, curve["advantage_at_most"]], strict=True):
        assert value <= shown <= value * (1 + 1e-5)


def test_a_batch_size_is_a_sampling_rate() -> None:
    """And δ at an ε is the other way round."""
    sizes = ["--batch-size", "64", "--dataset-size", "6400", "--accountant", "rdp", "--json"]
    done = call("account", "--noise-multiplier", "1", "--steps", "10", "--epsilon", "1", *sizes)
    assert done.exit_code == 0, done.output
    expected = RdpAccountant().compose(SampledGaussian(1.0, 0.01), 10).delta(1.0)
    assert json.loads(done.output)["bound"]["delta"] == expected.delta


def test_replacing_a_record_costs_what_half_the_noise_costs() -> None:
    """Without sampling, which is the only case with a proof."""
    plain = ["--noise-multiplier", "4", "--steps", "3", "--sample-rate", "1", "--delta", "1e-5"]
    done = call("account", *plain, "--adjacency", "replace", "--accountant", "rdp", "--json")
    assert done.exit_code == 0, done.output
    bound = json.loads(done.output)["bound"]
    assert bound["adjacency"] == "replace"
    half = RdpAccountant().compose(GaussianEvent(2.0), 3).epsilon(1e-5).epsilon
    assert bound["epsilon"] == pytest.approx(half, rel=1e-9, abs=0)


def test_no_bound_is_no_number() -> None:
    hopeless = ["--noise-multiplier", "1e-160", "--sample-rate", "1", "--steps", "1"]
    done = call("account", *hopeless, "--delta", "1e-5", "--accountant", "rdp")
    assert done.exit_code == 0, done.output
    assert "| ε, at most | none |" in done.output
    assert "No guarantee: the Rényi divergence is beyond double precision" in done.output


def test_the_plot_is_written(tmp_path: Path) -> None:
    file = tmp_path / "curves.png"
    done = call("account", *RUN, "--delta", "1e-5", "--plot", str(file))
    assert done.exit_code == 0, done.output
    assert f"plot: {file}" in done.output
    with Image.open(file) as image:
        assert image.width > 1000


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_the_same_numbers_give_the_same_file(tmp_path: Path, ending: str) -> None:
    """And other numbers another one."""
    accountant = RdpAccountant().compose(GaussianEvent(2.0))
    curve = privacy_curve(accountant, points=9)
    marks = [accountant.epsilon(delta) for delta in (1e-5, 1e-5, 1e-6)]
    files = [tmp_path / f"{i}.{ending}" for i in range(3)]
    for file, mark in zip(files, marks, strict=True):
        write_figure(file, curve, mark)
    first, second, third = (file.read_bytes() for file in files)
    assert first == second != third


@pytest.mark.parametrize(
    ("options", "quantity", "value"),
    [
        (["--sample-rate", "0.01", "--steps", "1000"], "noise_multiplier", 1.0223),
        (["--sample-rate", "0.01", "--noise-multiplier", "1"], "steps", 881),
    ],
)
def test_what_is_left_out_is_searched(options: list[str], quantity: str, value: float) -> None:
    """The bound in the answer is about the value in the answer."""
    done = call("calibrate", *TARGET, *options, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    assert (answer["quantity"], answer["value"]) == (quantity, value)
    noise, steps = (value, 1000) if quantity == "noise_multiplier" else (1.0, value)
    expected = RdpAccountant().compose(SampledGaussian(noise, 0.01), int(steps)).epsilon(1e-5)
    assert answer["bound"]["epsilon"] == expected.epsilon <= 2
    assert answer["steps"] == steps
    assert "Mironov, Ilya (2017), IEEE CSF 2017, arXiv:1702.07476" in answer["bound"]["citations"]

    done = call("calibrate", *TARGET, *options)
    assert done.output.startswith(f"{quantity.replace('_', ' ')} = {value} meets ε ≤ 2.0 at δ")


def test_a_fresh_projection_costs_less_and_says_what_it_assumes() -> None:
    """Pin of theory: 100 fresh steps at (768, 8), z = 1, δ = 1e-5 cost 4.882."""
    run = ["--noise-multiplier", "1", "--sample-rate", "1", "--steps", "100", "--delta", "1e-5"]
    done = call("account", *run, "--projected", "768:8", "--accountant", "rdp", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    assert answer["bound"]["epsilon"] == pytest.approx(4.882, abs=5e-4)
    assert any("A is drawn anew" in text for text in answer["bound"]["assumptions"])
    tighter = json.loads(call("account", *run, "--projected", "768:8", "--json").output)
    assert 4.511 < tighter["bound"]["epsilon"] < 4.882
    assert tighter["bound"]["method"] == "pld"
    assert "fresh projection (768:8)" in answer["release"]


def test_one_rank_for_all_layers_is_searched() -> None:
    """A rank more misses the target, by the library."""
    run = ["--noise-multiplier", "1", "--sample-rate", "1", "--steps", "100"]
    done = call("calibrate", *TARGET, *run, "--projected", "768", "--projected", "512", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    rank = answer["value"]
    assert answer["quantity"] == "rank"
    assert f"(768:{rank}, 512:{rank})" in answer["release"]
    assert answer["layers"] == [[768, rank], [512, rank]]
    assert (answer["noise_multiplier"], answer["sample_rate"]) == (1.0, 1.0)

    def epsilon_at(wanted: int) -> float:
        layers = ((768, wanted), (512, wanted))
        event = ProjectedGaussian(layers=layers, noise_multiplier=1.0)
        return RdpAccountant().compose(event, 100).epsilon(1e-5).epsilon

    assert answer["bound"]["epsilon"] == epsilon_at(rank) <= 2 < epsilon_at(rank + 1)


def test_the_rank_is_at_most_what_the_smallest_layer_has() -> None:
    """Where every rank meets the target; at full rank nothing is projected away."""
    run = ["--noise-multiplier", "1", "--sample-rate", "1", "--steps", "1"]
    loose = ["--epsilon", "50", "--delta", "1e-5", "--accountant", "rdp", "--json"]
    done = call("calibrate", *loose, *run, "--projected", "8", "--projected", "4")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["value"] == 4


SAMPLED = ["--sample-rate", "0.01"]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("account", [*RUN, "--delta", "0"], "delta must lie in (0, 1)"),
        ("account", [*RUN, "--delta", "1"], "delta must lie in (0, 1)"),
        ("account", [*RUN, "--delta", "nan"], "delta must lie in (0, 1)"),
        ("account", [*RUN, "--epsilon", "-1"], "epsilon must be finite"),
        ("account", RUN, "Give --delta, to bound ε"),
        ("account", [*RUN, "--delta", "1e-5", "--epsilon", "1"], "Give --delta, to bound ε"),
        (
            "account",
            ["--noise-multiplier", "0", *RUN[2:], "--delta", "1e-5"],
            "noise_multiplier must be positive",
        ),
        (
            "account",
            ["--noise-multiplier", "-1", *RUN[2:], "--delta", "1e-5"],
            "noise_multiplier must be positive",
        ),
        (
            "account",
            [*RUN[:2], "--sample-rate", "1.5", *RUN[4:], "--delta", "1e-5"],
            "sample_rate must lie in (0, 1]",
        ),
        (
            "account",
            [*RUN[:4], "--steps", "0", "--delta", "1e-5"],
            "steps must be at least 1",
        ),
        (
            "account",
            [*RUN, "--delta", "1e-5", "--adjacency", "replace", "--accountant", "rdp"],
            "no proof for SampledGaussian under adjacency='replace'",
        ),
        ("account", [*RUN, "--delta", "1e-5", "--adjacency", "swap"], "adjacency must be one of"),
        ("account", [*RUN, "--delta", "1e-5", "--accountant", "gdp"], "accountant must be one of"),
        (
            "account",
            [*RUN, "--delta", "1e-5", "--batch-size", "64"],
            "Give --sample-rate, or --batch-size and --dataset-size",
        ),
        (
            "account",
            [*RUN[:2], *RUN[4:], "--delta", "1e-5", "--batch-size", "64"],
            "Give --sample-rate, or --batch-size and --dataset-size",
        ),
        (
            "account",
            [*RUN[:2], *RUN[4:], "--delta", "1e-5", "--batch-size", "9", "--dataset-size", "8"],
            "batch_size must be at most dataset_size = 8",
        ),
        (
            "account",
            [*RUN, "--delta", "1e-5", "--projected", "768"],
            "--projected must be in_features:rank, such as 768:8, got '768'",
        ),
        (
            "account",
            [*RUN, "--delta", "1e-5", "--plot", "curve.gif"],
            "must end in .png, .svg, .pdf",
        ),
        (
            "account",
            [*RUN, "--delta", "1e-5", "--projected", "8:768"],
            "rank must be at most in_features",
        ),
        (
            "calibrate",
            [*TARGET, *SAMPLED, "--steps", "9", "--noise-multiplier", "1", "--projected", "8:2"],
            "--projected must be in_features, such as 768, got '8:2'",
        ),
        ("calibrate", [*TARGET, *SAMPLED], "Leave out exactly one"),
        (
            "calibrate",
            [*TARGET, *SAMPLED, "--steps", "9", "--noise-multiplier", "1"],
            "Leave out exactly one",
        ),
        (
            "calibrate",
            ["--epsilon", "0", "--delta", "1e-5", *SAMPLED, "--steps", "9"],
            "epsilon must be positive",
        ),
        (
            "calibrate",
            ["--epsilon", "1e-8", "--delta", "1e-9", "--sample-rate", "1", "--steps", "1000000"],
            "No noise multiplier up to 1e+06 meets the target",
        ),
    ],
)
def test_mistakes_are_one_line(command: str, options: list[str], message: str) -> None:
    done = call(command, *options)
    assert done.exit_code == 2
    assert done.output.startswith("error: ")
    assert message in done.output
    assert done.output.count("\n") == 1


@pytest.fixture
def page() -> str:
    if not HOWTO.exists():
        pytest.skip("docs/howto-account.md is not part of this installation")
    return HOWTO.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Secure RNG")
def test_examples_of_the_howto_are_true(page: str) -> None:
    """Opacus keeps its accountants in a module, which is left as it was."""
    before = dict(registry._ACCOUNTANTS)
    try:
        result = doctest.testfile(str(HOWTO), module_relative=False)
    finally:
        registry._ACCOUNTANTS.clear()
        registry._ACCOUNTANTS.update(before)
    assert result.attempted == page.count(">>> ")
    assert result.failed == 0


def test_commands_of_the_howto_print_what_it_says(page: str) -> None:
    """Every ``$`` line is run; ``...`` stands for the rest of the output."""
    blocks = re.findall(r"```console\n(.*?)```", page, re.DOTALL)
    commands = [part for block in blocks for part in block.split("$ lora-privacy ")[1:]]
    assert len(commands) == 4
    for command in commands:
        line, _, expected = command.partition("\n")
        done = CliRunner().invoke(app, shlex.split(line))
        assert done.exit_code == 0, done.output
        assert done.output.startswith(expected.removesuffix("...\n")), done.output
