"""What every accountant must do, whatever its theory. Inherit, and give ``accountant``."""

import dataclasses
import json
import math

import numpy as np
import pytest

from lora_privacy.dp import GaussianEvent, PrivacyBound
from lora_privacy.errors import UnsupportedEventError


@dataclasses.dataclass(frozen=True)
class StrangeEvent:
    """An event that no accountant has a proof for."""

    noise_multiplier: float = 1.0
    sample_rate: float = 1.0


class AccountantContract:
    """Tests on ``self.accountant``, an empty accountant."""

    accountant = None

    def test_empty_costs_nothing(self) -> None:
        assert self.accountant.epsilon(1e-5).epsilon == 0
        assert self.accountant.delta(0.0).delta < 1e-300

    def test_every_release_stays_in_the_ledger(self) -> None:
        one = self.accountant.compose(GaussianEvent(2.0))
        two = one.compose(GaussianEvent(2.0))
        other = one.compose(GaussianEvent(5.0), 3)
        assert self.accountant.epsilon(1e-5).epsilon < one.epsilon(1e-5).epsilon
        assert one.epsilon(1e-5).epsilon < two.epsilon(1e-5).epsilon
        assert one.epsilon(1e-5).epsilon < other.epsilon(1e-5).epsilon
        assert two == self.accountant.compose(GaussianEvent(2.0), 2)
        assert self.accountant.events == (), "compose must not change the accountant"

    def test_counts_add_up_whatever_their_type(self) -> None:
        """A ledger with one event twice, or with counts that would wrap around at 256."""
        event = GaussianEvent(30.0)
        twice = dataclasses.replace(self.accountant, events=((event, 200), (event, 100)))
        small = dataclasses.replace(self.accountant, events=((event, np.uint8(200)),))
        assert twice == small.compose(event, 100) == self.accountant.compose(event, 300)
        assert twice.compose(event) == self.accountant.compose(event, 301)

    def test_no_proof_no_number(self) -> None:
        with pytest.raises(UnsupportedEventError, match="no proof for StrangeEvent"):
            self.accountant.compose(StrangeEvent())
        with pytest.raises(UnsupportedEventError, match="no proof for StrangeEvent"):
            dataclasses.replace(self.accountant, events=((StrangeEvent(), 1),))

    @pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan])
    def test_refuses_a_delta_out_of_range(self, delta: float) -> None:
        with pytest.raises(ValueError, match="delta must lie in"):
            self.accountant.compose(GaussianEvent(1.0)).epsilon(delta)

    @pytest.mark.parametrize("epsilon", [-1.0, math.inf, math.nan])
    def test_refuses_an_epsilon_out_of_range(self, epsilon: float) -> None:
        with pytest.raises(ValueError, match="epsilon must be finite"):
            self.accountant.compose(GaussianEvent(1.0)).delta(epsilon)

    @pytest.mark.parametrize(
        ("count", "error"),
        [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)],
    )
    def test_refuses_a_count_that_is_none(self, count: object, error: type[Exception]) -> None:
        with pytest.raises(error, match="count must be"):
            self.accountant.compose(GaussianEvent(1.0), count)

    def test_a_bound_can_be_quoted(self) -> None:
        bound = self.accountant.compose(GaussianEvent(1.0)).epsilon(1e-5)
        assert isinstance(bound, PrivacyBound)
        assert json.loads(json.dumps(bound.to_dict()))["kind"] == "guarantee"
        for needed in ("early stopping", "floating point", bound.adjacency, bound.unit):
            assert needed in str(bound)
