"""Privacy-loss distributions: oracles are mpmath, the closed Gaussian form and two peers."""

import math

import pytest
from accountant_contract import AccountantContract
from dp_accounting.pld import privacy_loss_distribution as peer

from lora_privacy.dp import GaussianEvent, PldAccountant, SampledGaussian

Ledger = tuple[tuple[float, float, int], ...]


class TestPld(AccountantContract):
    accountant = PldAccountant()


class TestPldReplace(AccountantContract):
    accountant = PldAccountant("replace")


def accountant_of(ledger: Ledger) -> PldAccountant:
    accountant = PldAccountant()
    for z, p, count in ledger:
        accountant = accountant.compose(SampledGaussian(z, p), count)
    return accountant


def dp_accounting_epsilon(ledger: Ledger, delta: float, pessimistic: bool, grid: float) -> float:
    total = None
    for z, p, count in ledger:
        one = peer.from_gaussian_mechanism(
            z,
            sampling_prob=p,
            value_discretization_interval=grid,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        ).self_compose(count)
        total = one if total is None else total.compose(one)
    return total.get_epsilon_for_delta(delta)


HISTORIES = [
    (((1.0, 0.01, 1000),), 1e-5),
    (((0.7, 0.02, 300), (1.5, 0.1, 50), (5.0, 1.0, 3)), 1e-6),
    (((2.0, 0.2, 100),), 1e-8),
]


@pytest.mark.parametrize(("ledger", "delta"), HISTORIES)
def test_interval_meets_dp_accounting(ledger: Ledger, delta: float) -> None:
    """Its optimistic and pessimistic ends on a 1e-4 grid contain the truth, as ours do."""
    low, high = accountant_of(ledger).epsilon_interval(delta)
    assert low <= dp_accounting_epsilon(ledger, delta, True, 1e-4)
    assert high >= dp_accounting_epsilon(ledger, delta, False, 1e-4)
    assert 0 < high - low <= 0.01 * high
    assert accountant_of(ledger).epsilon(delta).method == "pld"
    assert math.isfinite(accountant_of(ledger).compose(GaussianEvent(9.0)).epsilon(delta).epsilon)
