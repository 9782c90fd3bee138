"""The paper: its numbers against results and oracles, its citations against its sources."""

import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from scipy import integrate, optimize, special, stats

from lora_privacy.references import REFERENCES, bibtex

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "paper"

pytestmark = pytest.mark.skipif(
    not PAPER.exists(), reason="paper/ is not part of this installation"
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper_numbers", PAPER / "paper_numbers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def numbers(script: ModuleType) -> dict[str, str]:
    return script.numbers()


def value(text: str) -> float:
    """The first number of a printed text."""
    return float(re.findall(r"[-−]?[\d.,]+", text)[0].replace("−", "-").replace(",", ""))


# The text


def test_paper_is_its_template_with_the_numbers(
    script: ModuleType, numbers: dict[str, str]
) -> None:
    """The script writes the same page again; one altered number is seen."""
    template, page = read("paper/paper.in.md"), read("paper/paper.md")
    assert script.render(template, numbers) == page
    for name, text in numbers.items():
        assert script.render(template, numbers | {name: text + "1"}) != page, f"unused: {name}"


def bare_numbers(template: str) -> list[str]:
    """Digits of the text that no name stands for; header, keys, files, χ² and SST-2 may."""
    text = template.split("---\n", 2)[2]
    text = re.sub(r"\{\{[^}]*\}\}|@[\w-]+|\]\([^)]*\)|\\chi\^2|SST-2", "", text)
    return re.findall(r"\S*\d\S*", text)


def test_no_number_of_the_template_is_written_by_hand() -> None:
    assert bare_numbers(read("paper/paper.in.md")) == []
    assert bare_numbers("---\na: 1\n---\n{{rank 8}} $\\chi^2$ [@b-2022] but 0.041.") == ["0.041."]


def test_length(script: ModuleType) -> None:
    """Under 1,000 words with table and captions; the count is right on a text counted by hand."""
    assert 750 <= script.words(read("paper/paper.md")) < 1_000
    text = "---\ntitle: x y\n---\n# One two\n\nthree [@a; @b-1] *four* – 5.\n\n| six | – |\n"
    assert script.words(text + "\n![seven eight](a_b.png)\n") == 8


def test_latex_knows_every_letter() -> None:
    """LaTeX stops at a bare Greek letter, ∞ or minus; formulas say them."""
    page = read("paper/paper.md").split("---\n", 2)[2]
    assert set(re.findall(r"[^\x00-\x7f]", page)) <= set("–±éü")


def test_figure_exists() -> None:
    [figure] = re.findall(r"^!\[.*\]\((.*)\)$", read("paper/paper.md"), re.MULTILINE)
    assert (PAPER / figure).exists()


# The bibliography


def entries() -> dict[str, str]:
    parts = re.split(r"\n\n(?=@)", read("paper/paper.bib").strip())
    return {re.findall(r"^@\w+\{([\w-]+),", part)[0]: part for part in parts}


def test_every_citation_has_its_entry_and_every_entry_is_cited() -> None:
    cited = set(re.findall(r"@([\w-]+)", read("paper/paper.md")))
    assert cited == set(entries())
    assert len(cited) > 8


def test_entries_of_the_library_are_its_own() -> None:
    known = [key for key in entries() if key in REFERENCES]
    assert len(known) > 5
    for key in known:
        assert entries()[key] == bibtex(key)


# The numbers: exact ones against oracles, measured ones against the pages that report them


def test_distance_of_an_entry(script: ModuleType, numbers: dict[str, str]) -> None:
    """Oracle: half the integral of |Bessel density − φ|, by quadrature; the printed digits."""
    r = script.RANK
    order = (r - 1) / 2

    def difference(x: float) -> float:
        z = r * x
        bessel = (z / 2) ** order * special.kv(order, z) * r / math.sqrt(math.pi)
        return abs(bessel / special.gamma(r / 2) - stats.norm.pdf(x, scale=1 / math.sqrt(r)))

    half, _ = integrate.quad(difference, 1e-9, 6.0, limit=500)
    assert f"{half:.3f}" == numbers["entry distance"]


def test_distance_of_a_row(script: ModuleType, numbers: dict[str, str]) -> None:
    """Oracle: the noised row along q and its energy across it, on a plain grid in two dimensions.

    Along q the entry is S ~ χ²(r)/r against N(1, 2/r); across it the energy is S χ²(m−1) against
    χ²(m−1).
    """
    r, m = script.RANK, script.INPUTS
    s, w = np.linspace(1e-4, 6.0, 3_000)[:, None], np.linspace(1e-2, 5.0 * m, 4_000)[None, :]
    across = stats.chi2(m - 1)
    noised = stats.gamma.pdf(s, r / 2, scale=2 / r) * across.pdf(w / s) / s
    gaussian = stats.norm.pdf(s, 1, math.sqrt(2 / r)) * across.pdf(w)
    cell = float(s[1, 0] - s[0, 0]) * float(w[0, 1] - w[0, 0])
    below = stats.norm.cdf(0, 1, math.sqrt(2 / r))  # where S cannot lie
    distance = 0.5 * (float(np.abs(noised - gaussian).sum()) * cell + float(below))
    assert f"{distance:.3f}" == numbers["row distance"]


def gaussian_delta(epsilon: float, mu: float | np.ndarray) -> Any:
    """δ of a Gaussian shift μ (Balle & Wang 2018, Theorem 8)."""
    upper = stats.norm.cdf(mu / 2 - epsilon / mu)
    return upper - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)


def test_epsilon_of_noise_alone(script: ModuleType, numbers: dict[str, str]) -> None:
    """Oracle: the exact Gaussian profile; the printed ε is above it by one digit."""
    mu = math.sqrt(script.STEPS) / script.NOISE
    exact = optimize.brentq(lambda e: gaussian_delta(e, mu) - script.DELTA, 1, 200, xtol=1e-9)
    assert 0 <= value(numbers["plain epsilon"]) - exact < 0.011


def test_epsilon_of_a_fresh_projection(script: ModuleType, numbers: dict[str, str]) -> None:
    """Between a gradient's exact ε and the Rényi bound, neither by the library.

    Below: the rank-one gradient, whose shift keeps β ~ Beta(r/2, (m−r)/2) at each step; 10⁵ draws
    give its δ to 2 %. Above: Kummer's function by mpmath at orders 2 to 40, with the conversion
    of Canonne, Kamath & Steinke 2020. An ε of 4.4 must be refused.
    """
    r, m, steps = script.RANK, script.INPUTS, script.STEPS
    epsilon = value(numbers["fresh epsilon"])
    rng = np.random.default_rng(20261128)
    mu = np.sqrt(rng.beta(r / 2, (m - r) / 2, (100_000, steps)).sum(axis=1)) / script.NOISE
    assert gaussian_delta(epsilon, mu).mean() < script.DELTA < gaussian_delta(4.4, mu).mean()

    def renyi(a: int) -> float:
        mgf = mp.hyp1f1(mp.mpf(r) / 2, mp.mpf(m) / 2, a * (a - 1) / (2 * script.NOISE**2))
        paid = steps * float(mp.log(mgf)) / (a - 1)
        return paid + math.log1p(-1 / a) - math.log(script.DELTA * a) / (a - 1)

    assert epsilon < min(map(renyi, range(2, 40)))


def found(page: str, pattern: str) -> float:
    """The one number that ``pattern`` finds on a page."""
    [text] = set(re.findall(pattern, read(f"docs/{page}.md")))
    return value(text)


REPORTED = {
    "published ratio": ("reproduction/p1-noise", r"\| 4,096 \| ([\d.]+) \| 0\.0456"),
    "simulated distance": ("reproduction/p1-noise", r"\| 4,096 \| .* ([\d.]+) ± [\d.]+ \|"),
    "exact rejected": ("reproduction/p1-noise", r"is rejected at (\d+) of 96 entries;"),
    "gaussian rejected": ("reproduction/p1-noise", r"is rejected at (\d+) of 96\."),
    "least reading": ("reproduction/p1-noise", r"between ([\d.]+) and ∞"),
    "printed epsilon": (
        "reproduction/p2-vector-projection",
        r"0\.5 \| 400 .* ([\d.]+) \| 0\.0415",
    ),
    "printed delta": ("reproduction/p2-vector-projection", r"δ = ([\d.]+) at r = 400, ρ = .5"),
    "noised auc": ("results-attacks", r"\| 1 \| 4\.38 \| ([\d.]+) "),
    "noised limit": ("results-attacks", r"\| 1 \| 4\.38 \| .* \| ([\d.]+) \|"),
    "noised epsilon": ("results-attacks", r"\| 1 \| (4\.38) \| "),
    "attack low": ("results-attacks", r"the rest of the batch \| 8 \| 1\.000 \[([\d.]+), 1\]"),
    "text accuracy": ("results", r"dp-lora \| ([\d.]+) % ± 0\.6 \(83\.9"),
}


@pytest.mark.parametrize("name", REPORTED)
def test_measured_numbers_are_those_of_their_pages(name: str, numbers: dict[str, str]) -> None:
    """The page's tables were made by other code; they differ by one unit of the last digit."""
    page, pattern = REPORTED[name]
    shown = re.findall(r"[−\d.,]+", numbers[name])[0]
    unit = 10.0 ** -len(shown.partition(".")[2])
    assert abs(value(numbers[name]) - found(page, pattern)) <= unit * (1 + 1e-9)


def rows_of(page: str, start: str) -> list[list[str]]:
    """Cells of the rows of a page's tables that begin with ``start``."""
    lines = read(f"docs/reproduction/{page}.md").splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith(start)]


def test_equal_epsilon_against_the_tables_of_its_page(numbers: dict[str, str]) -> None:
    """The extremes of the differences that the page prints, 0.2 | 16 | fa ± | sgd ±."""
    rows = [row for row in rows_of("p2-accuracy", "| 0.") if len(row) == 4]
    frozen, plain = ([value(row[column]) for row in rows] for column in (2, 3))
    assert len(rows) == value(numbers["head settings"])
    printed = [
        numbers[f"{kind} {end}"] for kind in ("frozen", "plain") for end in ("least", "most")
    ]
    shown = [min(frozen), max(frozen), min(plain), max(plain)]
    assert [value(text) for text in printed] == pytest.approx(shown, abs=1e-9)


def test_leakage_against_the_table_of_its_page(numbers: dict[str, str]) -> None:
    """RMIA's column of the first table; the smallest and the largest rank."""
    table = {
        (row[0], row[1]): row[6] for row in reversed(rows_of("p1-leakage", "| ")) if len(row) == 10
    }
    for rank, name in (("1", "small"), ("64", "large")):
        assert numbers[f"{name} rank"] == rank
        assert table["lora", rank].split(" ± ")[0] == numbers[f"{name} rank auc"]
        assert table["fixed", rank].split(" ± ")[0] == numbers[f"{name} control auc"]


def test_denoising_against_the_tables_of_its_page(numbers: dict[str, str]) -> None:
    """The whole value matrix at ε = 8, and the page's intervals that exclude 0."""
    [row] = [row for row in rows_of("p3-denoising", "| 8") if row[2] == "value, W, 384 × 384"]
    assert (row[5], row[7]) == (numbers["noised cosine"], numbers["restored cosine"])
    shrinkers = ("`frobenius`", "`debias`", "`partial`")
    arms = [row for row in rows_of("p3-denoising", "| ") if len(row) == 13 and row[2] in shrinkers]
    gaps = [
        (sign, *map(float, re.findall(r"\[(-?[\d.]+), (-?[\d.]+)\]", cell)[0]))
        for row in arms
        for sign, cell in zip((-1, -1, 1, 1, 1), row[4::2], strict=True)
    ]
    outside = [sign * low for sign, low, high in gaps if low * high > 0]
    assert len(gaps) == value(numbers["arm intervals"])
    assert sum(gain < 0 for gain in outside) == value(numbers["arm losses"])
    assert sum(gain > 0 for gain in outside) == value(numbers["arm gains"])
    assert "none of its 35 intervals excludes 0" in read("docs/reproduction/p3-denoising.md")
    assert numbers["rerun outside"] == "none"


@pytest.mark.parametrize(
    ("number", "digits", "printed"),
    [(4.3771, 4, "4.378"), (0.76087, 2, "0.77"), (8.0, 4, "8.000"), (91.8173, 4, "91.82")],
)
def test_bounds_are_rounded_up(
    script: ModuleType, number: float, digits: int, printed: str
) -> None:
    up: Callable[[float, int], str] = script.up
    assert up(number, digits) == printed


# The other packages


def sources(package: str) -> dict[str, str]:
    """Python files of an installed package but its tests; nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs {package}, of the dev extra")
    root = Path(spec.submodule_search_locations[0])
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in root.rglob("*.py")
        if "test" not in path.name and "tests" not in path.parts
    }


PARTS = {
    "opacus": ("accountants/rdp.py", "accountants/prv.py", "accountants/gdp.py",
               "grad_sample/conv.py", "grad_sample/embedding.py", "layers/dp_rnn.py",
               "optimizers/fsdpoptimizer_fast_gradient_clipping.py",
               "grad_sample/grad_sample_module_fast_gradient_clipping_tp.py"),
    "dp_accounting": ("rdp/rdp_privacy_accountant.py", "pld/pld_privacy_accountant.py"),
    "peft": ("tuners/lora/layer.py", "tuners/vera/layer.py", "tuners/oft/layer.py"),
}  # fmt: skip
ABSENT = {
    "opacus": r"\baudit|membership|random.projection",
    "dp_accounting": r"\baudit|membership.inference|random.projection",
    "peft": r"differential.priva|\baudit|membership.inference",
}


@pytest.mark.parametrize("package", PARTS)
def test_other_packages_have_and_lack_what_the_table_says(package: str) -> None:
    """Read from their sources; JAX-Privacy is not installed, its column was read by hand."""
    files = sources(package)
    assert set(PARTS[package]) <= set(files)
    hits = [name for name, text in files.items() if re.search(ABSENT[package], text, re.I)]
    assert hits == []
