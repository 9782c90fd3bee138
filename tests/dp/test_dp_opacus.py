"""The bridge to Opacus: its accountant prints the same ε from the history set here."""

import warnings

import pytest
from opacus.accountants import RDPAccountant as OpacusAccountant

from lora_privacy.dp import (
    GaussianEvent,
    PldAccountant,
    RdpAccountant,
    SampledGaussian,
    implied_privacy,
)
from lora_privacy.dp.opacus import to_opacus
from lora_privacy.errors import UnsupportedEventError

ORDERS = tuple(float(a) for a in OpacusAccountant.DEFAULT_ALPHAS)
RUN = {"batch_size": 64, "dataset_size": 6400, "steps": 50, "delta": 1e-5}


def test_an_accountant_keeps_its_ledger() -> None:
    """Every event with its count; Opacus' ε equals ours on its orders, 1e-9 relative."""
    accountant = RdpAccountant(orders=ORDERS)
    accountant = accountant.compose(SampledGaussian(1.2, 0.02), 400).compose(GaussianEvent(8.0), 3)
    theirs = to_opacus(accountant)
    assert isinstance(theirs, OpacusAccountant)
    assert theirs.history == [(1.2, 0.02, 400), (8.0, 1.0, 3)]
    assert accountant.epsilon(1e-6).epsilon == pytest.approx(
        theirs.get_epsilon(1e-6), rel=1e-9, abs=0
    )


def test_accountants_of_losses_have_a_history_too() -> None:
    """Opacus then accounts it by Rényi divergences: an ε above ours."""
    accountant = PldAccountant().compose(SampledGaussian(1.2, 0.02), 400)
    theirs = to_opacus(accountant)
    assert theirs.history == [(1.2, 0.02, 400)]
    assert theirs.get_epsilon(1e-6) > accountant.epsilon(1e-6).epsilon


def test_a_reading_becomes_a_history() -> None:
    """At rank 1 with one output, coherent, z is large enough for Opacus; 1e-9 relative.

    The reading searches all orders, so it is not above Opacus.
    """
    reading = implied_privacy(layers=[(4, 16)], distortion=0.5, aggregation="coherent", **RUN)
    theirs = to_opacus(reading)
    assert theirs.history == [(reading.noise_multiplier, 0.01, 50)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.get_epsilon(1e-5)
    event = SampledGaussian(reading.noise_multiplier, reading.sample_rate)
    same = RdpAccountant(orders=ORDERS).compose(event, 50).epsilon(1e-5)
    assert same.epsilon == pytest.approx(expected, rel=1e-9, abs=0)
    assert reading.epsilon <= expected * (1 + 1e-5)


def test_nothing_to_set_is_refused() -> None:
    """No noise, an empty ledger, another adjacency, another type."""
    reading = implied_privacy(layers=[(768, 8)], distortion=1.0, **RUN)
    with pytest.raises(UnsupportedEventError, match="no noise for Opacus"):
        to_opacus(reading)
    with pytest.raises(UnsupportedEventError, match="is empty"):
        to_opacus(RdpAccountant())
    with pytest.raises(UnsupportedEventError, match="adding or removing one record"):
        to_opacus(RdpAccountant("replace").compose(GaussianEvent(1.0)))
    bound = RdpAccountant().compose(GaussianEvent(1.0)).epsilon(1e-5)
    with pytest.raises(TypeError, match="must be an ImpliedPrivacy or an accountant"):
        to_opacus(bound)
