"""``audit``: numbers of the library from files of scores and of shadows, mistakes on one line."""

import doctest
import json
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner, Result

from lora_privacy.assess.auditing import AuditConfig, Game, Scores, audit
from lora_privacy.audit import (
    attack_p,
    attack_r,
    auc,
    epsilon_clopper_pearson,
    epsilon_one_run_scores,
    lira,
    rmia,
    tpr_at_fpr,
)
from lora_privacy.cli import app

HOWTO = Path(__file__).parents[1] / "docs" / "howto-audit.md"
DELTA = ["--delta", "1e-5"]


def call(file: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["audit", str(file), *options])


def scores_of(seed: int, n: int = 1000, gap: float = 2.0) -> tuple[Any, Any]:
    """Scores of a fair coin a record: N(gap, 1) and N(0, 1)."""
    rng = np.random.default_rng(seed)
    members = rng.random(n) < 0.5
    return rng.standard_normal(n) + gap * members, members


def game_of(seed: int, n: int = 400, references: int = 8, gap: float = 3.0) -> dict[str, Any]:
    """φ = centre + gap · IN + N(0, 1) for a target and references; a population of 60."""
    rng = np.random.default_rng(seed)
    members = rng.random((references + 1, n)) < 0.5
    phi = rng.normal(0, 2, n) + gap * members + rng.standard_normal(members.shape)
    population = rng.normal(0, 2, 60) + rng.standard_normal((references + 1, 60))
    log_p, population_log_p = (-np.logaddexp(0, -x) for x in (phi, population))
    return {
        "target_log_probs": log_p[0],
        "target_members": members[0],
        "population_log_probs": population_log_p[0],
        "reference_log_probs": log_p[1:],
        "reference_members": members[1:],
        "population_reference_log_probs": population_log_p[1:],
    }


def as_csv(file: Path, scores: npt.ArrayLike, members: npt.ArrayLike) -> Path:
    lines = [
        f"{s!r},{int(m)}"
        for s, m in zip(np.asarray(scores).tolist(), np.asarray(members).tolist(), strict=True)
    ]
    file.write_text("\n".join(["score,member", *lines]) + "\n")
    return file


def as_npz(file: Path, **arrays: Any) -> Path:
    np.savez(file, **arrays)
    return file


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    return as_csv(tmp_path / "scores.csv", *scores_of(1))


def test_scores_of_independent_runs(csv_file: Path, tmp_path: Path) -> None:
    """The library's numbers, from CSV and from npz alike; the area also by scikit-learn."""
    scores, members = scores_of(1)
    done = call(csv_file, *DELTA, "--threat-model", "black box", "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    (row,) = answer["attacks"]
    assert row["attack"] == "scores"
    assert row["auc"]["value"] == pytest.approx(roc_auc_score(members, scores), rel=1e-12)
    area, tpr = auc(scores, members), tpr_at_fpr(scores, members, fpr=0.01)
    for found, expected in ((row["auc"], area), (row["tpr"], tpr)):
        assert (found["low"], found["high"]) == (expected.low, expected.high)
        assert found["threat_model"] == "black box"
    bound = epsilon_clopper_pearson(
        scores,
        members,
        delta=1e-5,
        significance=0.05,
        threat_model="black box",
        selection="bonferroni",
    )
    assert answer["epsilon"]["epsilon"] == bound.epsilon > 1
    assert answer["epsilon"]["kind"] == "evidence, a lower bound"
    assert any("Clopper, C. J." in text for text in answer["epsilon"]["citations"])
    file = as_npz(tmp_path / "scores.npz", scores=scores, members=members)
    assert call(file, *DELTA, "--threat-model", "black box", "--json").output == done.output


def test_the_table_says_the_same_and_what_it_rests_on(csv_file: Path) -> None:
    done = call(csv_file, *DELTA, "--threat-model", "white box", "--significance", "0.1")
    assert done.exit_code == 0, done.output
    scores, members = scores_of(1)
    bound = epsilon_clopper_pearson(
        scores,
        members,
        delta=1e-5,
        significance=0.1,
        threat_model="white box",
        selection="bonferroni",
    )
    assert done.output.endswith(f"\n\n{bound}\n")
    value = f"{roc_auc_score(members, scores):.4g}"
    assert f"| attack | AUC | TPR at FPR 0.01 |\n| --- | --- | --- |\n| scores | {value} in [" in (
        done.output
    )
    assert "hold together at confidence 0.9, on 1000 records" in done.output
    for start in ("Threat model: white box.", "Assumes: the members' scores", "Sources: "):
        assert f"\n{start}" in done.output


def test_one_run_and_its_guesses(csv_file: Path) -> None:
    """Half of the records when none are named; several numbers pay for each other."""
    scores, members = scores_of(1)
    for options, guesses in (
        ([], 500),
        (["--guesses", "100"], 100),
        (["--guesses", "100", "--guesses", "300"], (100, 300)),
    ):
        done = call(csv_file, *DELTA, "--one-run", *options, "--json")
        assert done.exit_code == 0, done.output
        found = json.loads(done.output)["epsilon"]
        expected = epsilon_one_run_scores(
            scores, members, guesses=guesses, delta=1e-5, significance=0.05
        )
        assert found["epsilon"] == expected.epsilon > 0.5
        assert any("fair coin of its own" in text for text in found["assumptions"])
        assert "Steinke" in found["citations"][0]


def test_options_reach_the_bound(csv_file: Path) -> None:
    scores, members = scores_of(1)
    options = ["--selection", "split", "--adjacency", "replace", "--fpr", "0.05", "--json"]
    answer = json.loads(call(csv_file, "--delta", "0", *options).output)
    seed = int(answer["epsilon"]["method"].partition("(seed ")[2].rstrip(")"))
    expected = epsilon_clopper_pearson(
        scores, members, delta=0.0, significance=0.05, selection="split", seed=seed
    )
    assert answer["epsilon"]["epsilon"] == expected.epsilon
    assert answer["epsilon"]["adjacency"] == "replace"
    assert answer["epsilon"]["threat_model"] == "not stated"
    assert answer["attacks"][0]["tpr"]["quantity"] == "TPR at FPR 0.05"


def test_shadows_and_a_target(tmp_path: Path) -> None:
    """Four attacks by the library on the records that have both kinds of references.

    ε is the best of four one-run bounds, each at a quarter of the significance. At the whole of it
    the best is larger: that would be unpaid.
    """
    arrays = game_of(3)
    done = call(as_npz(tmp_path / "game.npz", **arrays), *DELTA, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.output)
    members = arrays["reference_members"]
    kept = [i for i in range(400) if 0 < members[:, i].sum() < 8]
    assert 0 < answer["records_left_out"] == 400 - len(kept) < 20
    own, references = arrays["target_log_probs"][kept], arrays["reference_log_probs"][:, kept]
    population = arrays["population_log_probs"]
    both = {"reference_log_probs": references, "reference_members": members[:, kept]}
    scores = {
        "attack-P": attack_p(losses=-own, population_losses=-population),
        "attack-R": attack_r(
            losses=-own, reference_losses=-references, reference_members=members[:, kept]
        ),
        "LiRA": lira(log_probs=own, mode="online", **both),
        "RMIA": rmia(
            log_probs=own,
            population_log_probs=population,
            population_reference_log_probs=arrays["population_reference_log_probs"],
            mode="online",
            **both,
        ),
    }
    truth = arrays["target_members"][kept]
    papers = ("Ye, Jiayuan", "Ye, Jiayuan", "Carlini", "Zarifzadeh")
    for row, (name, values), paper in zip(answer["attacks"], scores.items(), papers, strict=True):
        assert row["attack"] == name
        assert row["auc"]["value"] == pytest.approx(roc_auc_score(truth, values), rel=1e-12)
        assert row["auc"]["low"] == auc(values, truth, significance=0.05 / 4).low
        assert row["auc"]["citations"][-1].startswith(paper)
        assert "cannot show a false positive rate of 0.01" in row["tpr"]["reason"]

    def best(significance: float) -> dict[str, float]:
        return {
            name: epsilon_one_run_scores(
                values, truth, guesses=len(kept) // 2, delta=1e-5, significance=significance
            ).epsilon
            for name, values in scores.items()
        }

    found = answer["epsilon"]
    quarter = best(0.05 / 4)
    assert found["epsilon"] == max(quarter.values()) < max(best(0.05).values())
    winner = max(quarter, key=lambda name: quarter[name])
    assert found["observed"].startswith(f"{winner}: ")
    assert (found["attempts"], found["significance"]) == (4, 0.05)
    assert "8 reference models" in found["threat_model"]
    assert found["citations"][-1].startswith(papers[list(scores).index(winner)])

    text = call(tmp_path / "game.npz", *DELTA).output
    assert "| RMIA | " in text
    assert f"Left out: {answer['records_left_out']} records" in text
    assert "No TPR: " in text
    assert "Carlini" in text
    assert "ε ≥ " in text


def test_a_shadow_plays_the_target(tmp_path: Path) -> None:
    """The same as if its arrays were those of a target, and the rest the references."""
    arrays = game_of(4, n=100, references=6)
    played = {
        "reference_log_probs": "target_log_probs",
        "reference_members": "target_members",
        "population_reference_log_probs": "population_log_probs",
    }
    joined = {
        "seeds": np.arange(7),
        "fingerprint": "abc",
        **{
            name: np.insert(arrays[name], 2, arrays[target], axis=0)
            for name, target in played.items()
        },
    }
    file = as_npz(tmp_path / "shadows.npz", **joined)
    done = call(file, *DELTA, "--target", "2", "--json")
    assert done.exit_code == 0, done.output
    game = call(as_npz(tmp_path / "game.npz", **arrays), *DELTA, "--json")
    assert done.output == game.output
    assert call(file, *DELTA, "--target", "1", "--json").output != game.output


def test_a_false_claim_is_rare_where_nothing_leaks() -> None:
    """60 games without leakage, ε = 0: at 5 % at most 11 false claims, at level 1e-4.

    With the target among its own references, which says who is in, there are more.
    """
    allowed = int(stats.binom.isf(1e-4, 60, 0.05))

    def claims(cheat: bool) -> int:
        count = 0
        for seed in range(60):
            arrays = game_of(1000 + seed, n=80, references=5, gap=0.0)
            if cheat:
                arrays["reference_log_probs"][0] = arrays["target_log_probs"]
                arrays["reference_members"][0] = arrays["target_members"]
                arrays["population_reference_log_probs"][0] = arrays["population_log_probs"]
            report = audit(Game(**arrays), AuditConfig(delta=0.0, guesses=(40,)))
            assert not isinstance(report.epsilon, str)
            count += report.epsilon.epsilon > 0
        return count

    assert allowed == 11
    assert claims(cheat=False) <= allowed < claims(cheat=True)


def test_too_little_to_show_is_no_number(tmp_path: Path) -> None:
    """Eight records: the area has an interval, all else says how many it takes."""
    file = as_csv(tmp_path / "few.csv", np.arange(8.0), np.arange(8) > 3)
    done = call(file, *DELTA)
    assert done.exit_code == 0, done.output
    assert "| scores | 1 in [" in done.output
    assert "| none |" in done.output
    assert "No TPR: 4 non-members cannot show" in done.output
    assert "No lower bound on ε: 4 members and 4 non-members" in done.output
    answer = json.loads(call(file, *DELTA, "--json").output)
    assert "are enough to show something" in answer["epsilon"]["reason"]


def test_coins_that_are_not_fair_prove_nothing() -> None:
    """A thousand records of which a tenth is in are no toss: the theorem does not apply."""
    scores, _ = scores_of(1)
    report = audit(Scores(scores, np.arange(1000) < 100), AuditConfig(delta=1e-5, one_run=True))
    assert "no toss of fair coins" in str(report.epsilon)


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """A byte order mark, other columns, words, line ends of Windows, an infinite score."""
    file = tmp_path / "s.csv"
    lines = ["id,member,score", *(f"{i},{'TRUE' if i % 2 else ' false'},{i}" for i in range(39))]
    file.write_bytes("\r\n".join([*lines, "39,1,inf"]).encode("utf-8-sig"))
    done = call(file, *DELTA, "--json")
    assert done.exit_code == 0, done.output
    members = np.arange(40) % 2 == 1
    scores = np.append(np.arange(39.0), np.inf)
    assert json.loads(done.output)["attacks"][0]["auc"]["value"] == auc(scores, members).value


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    """A pickle that would write a file, as an array and as the file itself."""
    trace = tmp_path / "trace"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (trace,))

    objects = np.empty(2, dtype=object)
    objects[:] = [Bomb(), Bomb()]
    np.savez(tmp_path / "a.npz", scores=objects, members=np.array([True, False]))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Bomb()))
    for name in ("a", "b"):
        done = call(tmp_path / f"{name}.npz", *DELTA)
        assert done.exit_code == 2
        assert "no .npz of plain arrays" in done.output
        assert done.output.count("\n") == 1
    assert not trace.exists()


GAME = game_of(5, n=30, references=4)
PAIR = {"scores": np.arange(4.0), "members": np.array([True, False, True, False])}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.txt", "", "must end in .csv or .npz"),
        ("s.csv", "", "must begin with a line that names score and member, got 'nothing'"),
        ("s.csv", "a,b\n1,2\n", "names score and member, got 'a,b'"),
        ("s.csv", "score,member\n1,1\nx,0\n", "line 3: score must be a number"),
        ("s.csv", "score,member\n1,2\n", "line 2: score must be a number and member one of"),
        ("s.csv", "score,member\n1\n", "line 2: score must be a number"),
        ("s.csv", "score,member\n", "scores must have shape (at least 1), got (0,)"),
        ("s.csv", "score,member\n1,1\nnan,0\n", "scores[1] is NaN"),
        ("s.csv", "score,member\n1,1\n2,1\n", "got 2 of 2"),
        ("s.csv", b"\xff\xfe\x00", "is no table of text"),
        ("s.npz", b"no zip", "is damaged or no .npz"),
        ("s.npz", b"", "is damaged or no .npz"),
        ("s.npz", {"a": np.zeros(3)}, "holds a. Expected a .csv"),
        ("s.npz", {**PAIR, "members": np.array([1, 0, 1, 0])}, "members must be boolean"),
        ("s.npz", {**PAIR, "scores": np.zeros(3)}, "members must have shape (3), got (4,)"),
        ("s.npz", {k: v for k, v in GAME.items() if "target_m" not in k}, "not target_members"),
        ("s.npz", {k: v for k, v in GAME.items() if k[:3] == "ref"}, "Expected a .csv"),
        (
            "s.npz",
            {k: v for k, v in GAME.items() if "reference" in k},
            "holds 4 reference models and no target. Name the one that plays it",
        ),
        (
            "s.npz",
            {k: np.zeros(4) for k in GAME if "reference" in k},
            "a row a reference is expected",
        ),
        (
            "s.npz",
            {**GAME, "target_log_probs": np.zeros(29)},
            "target_log_probs must have shape (30,), got (29,)",
        ),
        (
            "s.npz",
            {**GAME, "reference_log_probs": np.zeros((4, 29))},
            "reference_log_probs must have shape (4, 30), got (4, 29)",
        ),
        (
            "s.npz",
            {**GAME, "reference_members": np.zeros((4, 30))},
            "reference_members must be boolean",
        ),
        (
            "s.npz",
            {**GAME, "reference_members": np.zeros((4, 30), bool)},
            "No record has both a reference that was trained on it",
        ),
        (
            "s.npz",
            {**GAME, "target_log_probs": np.full(30, 0.5)},
            "is positive",
        ),
        (
            "s.npz",
            {**GAME, "population_reference_log_probs": np.zeros((3, 60))},
            "population_reference_log_probs must have shape (4, 60)",
        ),
        ("s.npz", {**GAME, "target_members": np.zeros(30)}, "members must be boolean"),
    ],
)
def test_malformed_files_are_one_line(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    file = tmp_path / name
    if isinstance(content, dict):
        np.savez(file, **content)
    else:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    done = call(file, *DELTA)
    assert done.exit_code == 2, done.output
    assert done.output.startswith("error: ")
    assert message in done.output
    assert done.output.count("\n") == 1


def test_cut_and_forged_archives_are_one_line(tmp_path: Path) -> None:
    """At every eighth length, and with a header that asks for 8 TB."""
    file = as_npz(tmp_path / "s.npz", **PAIR)
    whole = file.read_bytes()
    for size in range(0, len(whole), 8):
        file.write_bytes(whole[:size])
        done = call(file, *DELTA)
        assert done.exit_code == 2, size
        assert done.output.startswith("error: ")
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header = header.ljust(117) + "\n"
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("scores.npy", "members.npy"):
            start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
            archive.writestr(name, start + header.encode())
    done = call(file, *DELTA)
    assert done.exit_code == 2
    assert "is damaged" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--delta", "1"], "delta must lie in [0, 1)"),
        (["--delta", "nan"], "delta must lie in [0, 1)"),
        ([*DELTA, "--significance", "0"], "significance must lie in (0, 1)"),
        ([*DELTA, "--fpr", "1"], "fpr must lie in (0, 1)"),
        ([*DELTA, "--guesses", "9"], "add --one-run"),
        ([*DELTA, "--one-run", "--guesses", "0"], "guesses must be at least 1"),
        ([*DELTA, "--one-run", "--guesses", "1001"], "guesses must be at most 1000"),
        ([*DELTA, "--selection", "best"], "selection must be one of"),
        ([*DELTA, "--adjacency", "swap"], "adjacency must be one of"),
        ([*DELTA, "--target", "0"], "--target is for files of reference models"),
        ([*DELTA, "--threat-model", " "], "threat_model must say"),
    ],
)
def test_mistakes_are_one_line(csv_file: Path, options: list[str], message: str) -> None:
    done = call(csv_file, *options)
    assert done.exit_code == 2, done.output
    assert done.output.startswith("error: ")
    assert message in done.output
    assert done.output.count("\n") == 1


def test_mistakes_about_targets(tmp_path: Path) -> None:
    arrays = game_of(6, n=30, references=4)
    game = as_npz(tmp_path / "g.npz", **arrays)
    assert "leave --target out" in call(game, *DELTA, "--target", "0").output
    done = call(game, *DELTA, "--adjacency", "replace")
    assert "the adjacency of reference models is add-remove" in done.output
    shadows = {name: value for name, value in arrays.items() if "reference" in name}
    file = as_npz(tmp_path / "s.npz", **shadows)
    for target in ("4", "-1"):
        done = call(file, *DELTA, "--target", target)
        assert "--target must lie in 0 … 3" in done.output
        assert done.exit_code == 2
    for missing in ("none.csv", "none.npz"):
        done = call(tmp_path / missing, *DELTA)
        assert done.output.startswith("error: There is no file")


def test_it_needs_no_torch(csv_file: Path) -> None:
    """A subprocess, where torch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = None; from lora_privacy.cli import app; "
        f"app(['audit', {str(csv_file)!r}, '--delta', '1e-5'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ε ≥ " in done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_howto_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example, and every ``$`` line, in a folder where the examples left their files."""
    if not HOWTO.exists():
        pytest.skip("docs/howto-audit.md is not part of this installation")
    monkeypatch.chdir(tmp_path)
    page = HOWTO.read_text(encoding="utf-8")
    result = doctest.testfile(str(HOWTO), module_relative=False)
    assert result.attempted >= 20
    assert result.failed == 0
    (block,) = re.findall(r"```console\n\$ lora-privacy (.*?)```", page, re.DOTALL)
    line, _, expected = block.partition("\n")
    done = CliRunner().invoke(app, shlex.split(line))
    assert done.exit_code == 0, done.output
    assert done.output.startswith(expected.removesuffix("...\n"))
    assert "ε ≥ 2.63419 nats at δ = 1e-05, at confidence 0.95" in done.output
    assert "ε ≥ 2.63419 at δ = 1e-05" in page
    for line in ("audit.npz --delta 1e-5", "shadows/shadows.npz --delta 1e-5 --target 0"):
        assert f"`lora-privacy audit {line}`" in page
        done = CliRunner().invoke(app, ["audit", *line.split()])
        assert done.exit_code == 0, done.output
        assert "| RMIA | " in done.output
