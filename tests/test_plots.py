"""Figures of single results hold the numbers of the result, and name their units."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from lora_privacy.audit import roc_curve
from lora_privacy.dp import GaussianEvent, PldAccountant, RdpAccountant, privacy_curve
from lora_privacy.noise import EntryNoise
from lora_privacy.plots import plot_law, plot_profile, plot_roc, plot_trade_off

ACCOUNTANT = PldAccountant().compose(GaussianEvent(2.0))


@pytest.fixture
def ax() -> Axes:
    """Axes of a figure that no window knows."""
    return Figure().add_subplot()


def lines(ax: Axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label -> what is drawn."""
    return {str(line.get_label()): line.get_data() for line in ax.lines}


def test_law_is_drawn_against_the_gaussian_of_its_variance(ax: Axes) -> None:
    """Oracles: scipy's normal density; both curves hold all of their mass but the tails."""
    law = EntryNoise(4, 2.0, 0.5)
    assert plot_law(law, ax) is ax
    (noise, (x, density)), (gaussian, (_, normal)) = lines(ax).items()
    assert noise == "noise of rank 4"
    np.testing.assert_allclose(normal, stats.norm(law.mean(), law.std()).pdf(x), rtol=1e-12)
    for values in (density, normal):
        assert 0.99 < np.trapezoid(values, x) < 1.0001
    between = 0.5 * np.trapezoid(np.abs(density - normal), x)
    assert float(gaussian.removeprefix("Gaussian at total variation ")) == pytest.approx(
        between, rel=0.02, abs=0
    )
    assert "unit" in ax.get_xlabel()
    assert "unit" in ax.get_ylabel()
    assert "not a guarantee" in ax.get_title()


def test_law_of_rank_one_is_drawn_though_it_is_infinite_at_its_centre(ax: Axes) -> None:
    plot_law(EntryNoise(1), ax)
    assert np.all(np.isfinite(lines(ax)["noise of rank 1"][1]))


def test_trade_off_lies_on_the_closed_curve_of_a_gaussian(ax: Axes) -> None:
    """Oracle: Φ(Φ⁻¹(1 - α) - μ) of Dong, Roth and Su, with μ = 1/2."""
    assert plot_trade_off(ACCOUNTANT, ax, "z = 2") is ax
    plot_trade_off(PldAccountant().compose(GaussianEvent(1.0)), ax, "z = 1")
    guess, first, second = lines(ax)
    assert guess == "blind guessing"
    assert first.startswith("z = 2, advantage ≤ 0.197")
    fpr, least = lines(ax)[first]
    expected = stats.norm.cdf(stats.norm.isf(fpr) - 0.5)
    np.testing.assert_allclose(least, expected, rtol=0, atol=1e-9)
    assert np.all(lines(ax)[second][1][:-1] < least[:-1])
    styles = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(styles) == 3


def test_trade_off_takes_a_curve_of_any_accountant(ax: Axes) -> None:
    """Bounds of a curve are below the exact trade-off, and close to it."""
    curve = privacy_curve(RdpAccountant().compose(GaussianEvent(2.0)))
    plot_trade_off(curve, ax)
    fpr, least = list(lines(ax).values())[1]
    exact = stats.norm.cdf(stats.norm.isf(fpr) - 0.5)
    assert np.all(least <= exact + 1e-12)
    assert np.max(exact - least) < 0.1


def test_profile_marks_a_bound(ax: Axes) -> None:
    curve, bound = privacy_curve(ACCOUNTANT, points=9), ACCOUNTANT.epsilon(1e-5)
    assert plot_profile(curve, ax, bound) is ax
    drawn = lines(ax)
    assert len(drawn[f"proved by {curve.method}"][0]) == 9
    marked = next(label for label in drawn if label.endswith("at δ = 1e-05"))
    assert drawn[marked][0] == [bound.epsilon]
    assert ax.get_yscale() == "log"


def test_roc_draws_the_rates_of_an_attack(ax: Axes) -> None:
    """Four scores by hand: rates (0, ½), (½, ½), (½, 1), (1, 1)."""
    curve = roc_curve([4.0, 3.0, 2.0, 1.0], np.array([True, False, True, False]))
    assert plot_roc(curve, ax, "loss") is ax
    fpr, tpr = lines(ax)["loss"]
    assert fpr.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]
    assert tpr.tolist() == [0.0, 0.5, 0.5, 1.0, 1.0]
    assert "not a guarantee" in ax.get_title()
    plot_roc(curve, ax, "again")
    assert list(lines(ax)) == ["blind guessing", "loss", "again"]


def test_without_axes_a_new_figure_is_made() -> None:
    """One that pyplot knows, so that a notebook shows it; nothing is drawn into an older one."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    first, second = plot_law(EntryNoise(8)), plot_law(EntryNoise(8))
    try:
        assert first.figure is not second.figure
        assert pyplot.gcf() is second.figure
    finally:
        pyplot.close("all")
