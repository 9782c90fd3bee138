"""Calibration: every answer is certified, checked by a peer's accountant, and nearly the least."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import privacy_loss_distribution as peer_pld
from dp_accounting.rdp import rdp_privacy_accountant as peer_rdp

from lora_privacy.dp import (
    Accountant,
    Calibration,
    GaussianEvent,
    PldAccountant,
    PrivacyBound,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
    calibrate,
    calibrate_rank,
    calibrate_steps,
    calibration,
)
from lora_privacy.dp.calibration import _round_up
from lora_privacy.errors import CalibrationError, UnsupportedEventError

# (ε, δ, steps, sampling rate)
TARGETS = [(2.0, 1e-5, 1000, 0.01), (8.0, 1e-6, 100, 0.1), (0.5, 1e-8, 1, 1.0)]


def peer_pld_epsilon(z: float, p: float, steps: int, delta: float) -> float:
    """dp-accounting's ε from privacy-loss distributions, pessimistic by less than 1e-3 of it."""
    one = peer_pld.from_gaussian_mechanism(z, sampling_prob=p, value_discretization_interval=1e-3)
    return one.self_compose(steps).get_epsilon_for_delta(delta)


def peer_rdp_epsilon(z: float, p: float, steps: int, delta: float) -> float:
    """dp-accounting's ε from Rényi divergences, on a dense grid of orders."""
    orders = [1 + 1.02**k / 50 for k in range(400)]
    accountant = peer_rdp.RdpAccountant(orders)
    one = PoissonSampledDpEvent(p, GaussianDpEvent(z)) if p < 1 else GaussianDpEvent(z)
    return accountant.compose(SelfComposedDpEvent(one, steps)).get_epsilon(delta)


@pytest.mark.parametrize(
    ("accountant", "peer"),
    [(RdpAccountant(), peer_rdp_epsilon), (PldAccountant(), peer_pld_epsilon)],
    ids=["rdp", "pld"],
)
@pytest.mark.parametrize(("epsilon", "delta", "steps", "rate"), TARGETS)
def test_the_noise_meets_the_target_and_two_percent_less_does_not(
    accountant: Accountant,
    peer: Callable[[float, float, int, float], float],
    epsilon: float,
    delta: float,
    steps: int,
    rate: float,
) -> None:
    """Oracle: dp-accounting. Its PLD at z is under the target, its like accountant at 0.98 z not.

    The tolerance that the search claims, 1e-4 of z, is checked with our own accountant.
    """

    def event_of(z: float) -> SampledGaussian:
        return SampledGaussian(z, rate)

    found = calibrate(event_of, epsilon=epsilon, delta=delta, steps=steps, accountant=accountant)
    z = found.value
    assert found.bound.epsilon <= epsilon
    assert peer_pld_epsilon(z, rate, steps, delta) <= 1.001 * epsilon
    assert peer(0.98 * z, rate, steps, delta) > 1.001 * epsilon
    again = accountant.compose(event_of(z), steps).epsilon(delta)
    assert again == found.bound, "the certificate must be about the value returned"
    if isinstance(accountant, RdpAccountant):  # a grid is not monotone to four digits
        less = accountant.compose(event_of(z * (1 - 1.2e-4)), steps)
        assert less.epsilon(delta).epsilon > epsilon
    assert float(f"{z:.5g}") == z


@pytest.mark.parametrize(
    ("accountant", "peer"),
    [(RdpAccountant(), peer_rdp_epsilon), (PldAccountant(), peer_pld_epsilon)],
    ids=["rdp", "pld"],
)
@pytest.mark.parametrize(("epsilon", "delta", "rate"), [(2.0, 1e-5, 0.01), (8.0, 1e-6, 0.1)])
def test_three_percent_more_steps_miss_the_target(
    accountant: Accountant,
    peer: Callable[[float, float, int, float], float],
    epsilon: float,
    delta: float,
    rate: float,
) -> None:
    """Oracle: dp-accounting, as above. By our own accountant one step more misses it."""
    event = SampledGaussian(1.0, rate)
    found = calibrate_steps(event, epsilon=epsilon, delta=delta, accountant=accountant)
    steps = found.value
    assert isinstance(steps, int)
    assert found.bound == accountant.compose(event, steps).epsilon(delta)
    assert accountant.compose(event, steps + 1).epsilon(delta).epsilon > epsilon
    assert peer_pld_epsilon(1.0, rate, steps, delta) <= 1.001 * epsilon
    assert peer(1.0, rate, math.ceil(1.03 * steps), delta) > 1.001 * epsilon


def test_the_default_accountant_is_the_tight_one() -> None:
    """Plain Gaussians are then solved in closed form."""
    found = calibrate(GaussianEvent, epsilon=1.0, delta=1e-5, steps=1)
    assert found.bound == PldAccountant().compose(GaussianEvent(found.value)).epsilon(1e-5)


def test_a_rank_is_the_largest_that_meets_or_the_largest_allowed() -> None:
    """On a family whose ε grows with the rank: Gaussian noise that falls with it."""

    def event_of(rank: int) -> GaussianEvent:
        return GaussianEvent(20 / math.sqrt(rank))

    def epsilon_at(rank: int) -> float:
        return RdpAccountant().compose(event_of(rank), 10).epsilon(1e-5).epsilon

    target = {"epsilon": 2.0, "delta": 1e-5, "steps": 10, "accountant": RdpAccountant()}
    found = calibrate_rank(event_of, max_rank=4096, **target)
    assert epsilon_at(found.value) <= 2.0 < epsilon_at(found.value + 1)
    assert calibrate_rank(event_of, max_rank=3, **target).value == 3
    with pytest.raises(CalibrationError, match="Rank 1 already misses the target"):
        calibrate_rank(lambda _: GaussianEvent(0.1), max_rank=4, **target)


def test_a_projection_is_calibrated_down_to_what_its_worst_record_needs() -> None:
    """Pin of theory: a rank-one record at (768, 8), z = 1, δ = 1e-5 costs .440478 exactly.

    So no z below 1 can be certified for that ε, and the sound bound for all records needs less
    than 1 % more.
    """

    def event_of(z: float) -> ProjectedGaussian:
        return ProjectedGaussian(layers=((768, 8),), noise_multiplier=z)

    found = calibrate(event_of, epsilon=0.440478, delta=1e-5, steps=1)
    assert 1.0 <= found.value < 1.01
    assert found.bound == PldAccountant().compose(event_of(found.value)).epsilon(1e-5)
    rank = calibrate_rank(
        lambda rank: ProjectedGaussian(layers=((768, rank),), noise_multiplier=found.value),
        epsilon=0.440478,
        delta=1e-5,
        steps=1,
        max_rank=768,
    )
    assert rank.value == 8


def test_what_is_spent_already_counts() -> None:
    """The search spends what is left, under the accountant's own adjacency."""
    half = RdpAccountant().compose(GaussianEvent(3.0))
    target = {"epsilon": 2.0, "delta": 1e-5, "steps": 10}
    fresh = calibrate(GaussianEvent, accountant=RdpAccountant(), **target)
    after = calibrate(GaussianEvent, accountant=half, **target)
    assert after.value > fresh.value
    assert after.bound == half.compose(GaussianEvent(after.value), 10).epsilon(1e-5)
    exchanged = calibrate(GaussianEvent, accountant=RdpAccountant("replace"), **target)
    assert exchanged.bound.adjacency == "replace"
    assert exchanged.value == pytest.approx(2 * fresh.value, rel=2e-4, abs=0)
    with pytest.raises(CalibrationError, match="nothing is left"):
        calibrate(GaussianEvent, accountant=half.compose(GaussianEvent(0.5)), **target)


def test_targets_out_of_reach_say_why() -> None:
    """Both ends, for noise and for steps; the ε at the end is in the message."""

    def sampled(z: float) -> SampledGaussian:
        return SampledGaussian(z, 0.01)

    with pytest.raises(CalibrationError, match=r"up to 1e\+06 .* ε = 0\.00\d+ .* not 1e-07"):
        calibrate(GaussianEvent, epsilon=1e-7, delta=1e-9, steps=10**6)
    with pytest.raises(CalibrationError, match=r"noise multiplier of 0\.01"):
        calibrate(sampled, epsilon=1e9, delta=1e-5, steps=1)
    with pytest.raises(CalibrationError, match=r"One release of .* misses the target"):
        calibrate_steps(GaussianEvent(0.1), epsilon=1.0, delta=1e-5)
    with pytest.raises(CalibrationError, match="the number of steps is not what limits"):
        calibrate_steps(GaussianEvent(1e6), epsilon=1.0, delta=1e-5)
    # e^1500 is beyond what the Rényi accountant holds: no ε at all, with its reason.
    with pytest.raises(CalibrationError, match="no ε is proved at δ"):
        calibrate_steps(GaussianEvent(1e-160), epsilon=1.0, delta=1e-5, accountant=RdpAccountant())


@dataclasses.dataclass(frozen=True)
class Jittery:
    """An accountant whose ε moves by up to 1 % from value to value, as on a grid."""

    inner: RdpAccountant = dataclasses.field(default_factory=RdpAccountant)
    share: float = 0.0

    def compose(self, event: GaussianEvent, count: int = 1) -> "Jittery":
        share = 0.01 * math.sin(1e7 * event.noise_multiplier) ** 2
        return Jittery(self.inner.compose(event, count), share)

    def epsilon(self, delta: float) -> PrivacyBound:
        bound = self.inner.epsilon(delta)
        return dataclasses.replace(bound, epsilon=bound.epsilon * (1 + self.share))


@pytest.mark.parametrize("epsilon", [0.5, 0.9, 1.1, 2.0, 3.7, 8.0])
def test_an_accountant_that_jitters_still_certifies(epsilon: float) -> None:
    """At six targets, some of which are missed where the value is first rounded."""
    found = calibrate(GaussianEvent, epsilon=epsilon, delta=1e-5, steps=1, accountant=Jittery())
    assert found.bound == Jittery().compose(GaussianEvent(found.value)).epsilon(1e-5)
    exact = calibrate(
        GaussianEvent, epsilon=epsilon, delta=1e-5, steps=1, accountant=RdpAccountant()
    )
    assert exact.value * (1 - 2e-4) <= found.value <= 1.035 * exact.value


def test_a_family_that_is_not_monotone_gives_no_certificate() -> None:
    """An event that turns worse when it is looked at again is caught by the certificate."""
    calls: Iterator[int] = itertools.count()

    def moody(z: float) -> GaussianEvent:
        return GaussianEvent(z if next(calls) < 20 else 0.01)

    with pytest.raises(CalibrationError, match="must not grow with the noise"):
        calibrate(moody, epsilon=1.0, delta=1e-5, steps=1, accountant=RdpAccountant())
    bound = RdpAccountant().compose(GaussianEvent(1.0)).epsilon(1e-5)
    with pytest.raises(ValueError, match="must certify"):
        Calibration(quantity="steps", value=1, target=1.0, bound=bound)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive"),
        ({"epsilon": math.nan}, ValueError, "epsilon must be positive"),
        ({"epsilon": math.inf}, ValueError, "epsilon must be positive"),
        ({"delta": 0.0}, ValueError, "delta must lie in"),
        ({"delta": 1.0}, ValueError, "delta must lie in"),
        ({"delta": math.nan}, ValueError, "delta must lie in"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": 1.5}, TypeError, "steps must be an integer"),
        ({"accountant": RdpAccountant("replace")}, UnsupportedEventError, "no proof for Sampled"),
    ],
)
def test_bad_targets_are_refused(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    """NaN never passes, and an event without a proof stays without one."""
    target = {"epsilon": 1.0, "delta": 1e-5, "steps": 10, **change}
    with pytest.raises(error, match=message):
        calibrate(lambda z: SampledGaussian(z, 0.1), **target)


def test_a_calibration_can_be_quoted() -> None:
    """JSON keeps whole numbers whole; the text holds the value, the target and the bound."""
    found = calibrate_steps(GaussianEvent(10.0), epsilon=1.0, delta=1e-5)
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["quantity"] == "steps"
    assert stored["value"] == found.value
    assert isinstance(stored["value"], int)
    assert stored["bound"]["kind"] == "guarantee"
    assert str(found).startswith(f"steps = {found.value} meets ε ≤ 1.0: (")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 1.0),
        (1.00001, 1.0001),
        (123456.0, 123460.0),
        (0.00123451, 0.0012346),
        (9.99999, 10.0),
    ],
)
def test_noise_is_rounded_up_to_five_digits(value: float, expected: float) -> None:
    """Never below the value that met the target."""
    assert _round_up(value) == expected
    assert _round_up(value) >= value


class Asked(list):
    """A threshold that is met from ``at`` on, and what was asked of it."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at = at

    def __call__(self, value: float) -> bool:
        self.append(value)
        return value >= self.at


@pytest.mark.parametrize(
    ("at", "start", "factor", "ways", "halvings"),
    [
        (100.0, 1.0, 4.0, [1, 4, 16, 64, 256], 17),  # ln 4 / 2e-5 is 2^16.08
        (1.7, 1.0, 1.25, [1, 1.25, 1.25**3], 15),
        (40.0, 1.0, 1.25, [1, 1.25, 1.25**3, 1.25**7, 4 * 1.25**7, 16 * 1.25**7], 17),
        (0.07, 1.0, 1.25, [1, 0.8, 0.8**3, 0.8**7, 0.8**7 / 4], 17),
        (0.9, 1.0, 4.0, [1, 0.25], 17),
        (2.5e5, 1e9, 4.0, [1e6, 2.5e5, 6.25e4], 17),
        (0.03, 1e-9, 4.0, [0.01, 0.04], 17),
    ],
)
def test_a_noise_is_bracketed_and_bisected(
    at: float, start: float, factor: float, ways: list[float], halvings: int
) -> None:
    """By the factor, which is squared each time up to four; then to 2e-5, each value once."""
    met = Asked(at)
    low, high = calibration._noise_between(met, start, factor, 2e-5)
    assert low < at <= high <= low * (1 + 2e-5)
    assert met[: len(ways)] == pytest.approx(ways, rel=1e-12, abs=0)
    assert len(met) == len(set(met)) <= len(ways) + halvings
    assert {low, high} <= set(met), "both ends were looked at"


def test_a_noise_is_looked_for_between_its_limits() -> None:
    """From 0.01 to a million: all meet, none does, or only the last."""
    always, never, last = Asked(0.0), Asked(math.inf), Asked(1e6)
    assert calibration._noise_between(always, 0.02, 4.0, 1e-2) == (0.0, 0.01)
    assert always == [0.02, 0.01]
    assert calibration._noise_between(always, 0.01, 4.0, 1e-2) == (0.0, 0.01)
    assert calibration._noise_between(never, 5e5, 4.0, 1e-2) == (1e6, math.inf)
    assert never == [5e5, 1e6]
    low, high = calibration._noise_between(last, 5e5, 4.0, 1e-2)
    assert (low < 1e6, high) == (True, 1e6)
    assert calibration.MOST_STEPS == 10**9


@dataclasses.dataclass
class Steps:
    """ε of whole numbers, one for each of them."""

    asked: list[int] = dataclasses.field(default_factory=list)

    def __call__(self, steps: int) -> PrivacyBound:
        self.asked.append(steps)
        bound = RdpAccountant().epsilon(1e-5)
        return dataclasses.replace(bound, epsilon=float(steps))


@pytest.mark.parametrize("start", [1, 2, 7, 30])
def test_the_largest_number_that_meets_is_found(start: int) -> None:
    """Every answer from none to all of 37, with its own bound; each number is looked at once."""
    for answer in range(38):
        prove = Steps()
        found, bound = calibration._largest(prove, answer + 0.5, 37, start)
        assert found == answer
        assert (bound.epsilon if bound else 0) == answer
        assert len(prove.asked) == len(set(prove.asked)) <= 11
        assert prove.asked[0] == start
        assert 1 <= min(prove.asked) <= max(prove.asked) <= 37


@pytest.mark.parametrize(
    ("start", "answer", "asked"),
    [
        (1, 5, [1, 2, 4, 8, 6, 5]),
        (100, 110, [100, 125, 112, 106, 109, 110, 111]),
        (100, 420, [100, 125, 250, 500, 375, 437, 406, 421, 413, 417, 419, 420]),
        (100, 30, [100, 50, 25, 37, 31, 28, 29, 30]),
        (1, 1000, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]),
    ],
)
def test_a_good_first_number_is_tried_with_a_quarter_more(
    start: int, answer: int, asked: list[int]
) -> None:
    """Then twice as many, up to the most, 1000; then halves."""
    prove = Steps()
    assert calibration._largest(prove, answer, 1000, start)[0] == answer
    assert prove.asked == asked


@dataclasses.dataclass(frozen=True)
class Stepwise:
    """An accountant whose ε is 1 from a noise on, and 2 below it; it keeps what it was asked."""

    least: float
    asked: list[float] = dataclasses.field(default_factory=list)
    noise: float = math.inf

    def compose(self, event: GaussianEvent, _count: int = 1) -> "Stepwise":
        return Stepwise(self.least, self.asked, event.noise_multiplier)

    def epsilon(self, delta: float) -> PrivacyBound:
        self.asked.append(self.noise)
        bound = RdpAccountant().epsilon(delta)
        return dataclasses.replace(bound, epsilon=1.0 if self.noise >= self.least else 2.0)


@pytest.mark.parametrize(
    ("least", "tried"), [(1.0, [1.0]), (1.001, [1.0, 1.001]), (1.01, [1.0, 1.001, 1.005, 1.02])]
)
def test_where_the_rounded_noise_misses_a_little_more_is_tried(
    least: float, tried: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousandth, five and twenty of them; after that there is no certificate."""
    monkeypatch.setattr(calibration, "_noise_between", lambda *_: (0.99, 1.0))
    prover = Stepwise(least)
    found = calibrate(GaussianEvent, epsilon=1.5, delta=1e-5, steps=1, accountant=prover)
    assert prover.asked[1:] == pytest.approx(tried, rel=1.1e-4, abs=0)  # five digits, up
    assert found.value == prover.asked[-1]
    with pytest.raises(CalibrationError, match="must not grow with the noise"):
        calibrate(GaussianEvent, epsilon=1.5, delta=1e-5, steps=1, accountant=Stepwise(1.03))


def test_a_cheap_accountant_scouts_for_the_dear_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1 by fours to 1 %, and then from there by quarters to 2e-5; alone from 1 by fours."""
    asked: list[tuple] = []

    def between(met: Callable, *limits: float) -> tuple[float, float]:
        asked.append(limits)
        assert met(50.0)
        assert not met(0.1)
        return 29.0, 30.0

    monkeypatch.setattr(calibration, "_noise_between", between)
    target = {"epsilon": 1.0, "delta": 1e-5, "steps": 1}
    calibrate(GaussianEvent, accountant=PldAccountant(), **target)
    assert asked == [(1.0, 4.0, 1e-2), (30.0, 1.25, 2e-5)]
    asked.clear()
    calibrate(GaussianEvent, accountant=RdpAccountant(), **target)
    assert asked == [(1.0, 4.0, 2e-5)]


def test_steps_start_where_the_cheap_accountant_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both up to 10⁹; from 1 where the cheap one finds none, or knows no proof."""
    asked: list[tuple] = []
    bound = RdpAccountant().epsilon(1e-5)

    def largest(prove: Callable, *limits: float) -> tuple[int, PrivacyBound]:
        asked.append(limits)
        return scouted[-1] if len(asked) == 1 else (7, prove(7))

    monkeypatch.setattr(calibration, "_largest", largest)
    target = {"epsilon": 1.0, "delta": 1e-5}
    scouted: list[tuple] = []
    for steps, start in ((12, 12), (0, 1), (1, 1)):
        scouted.append((steps, bound if steps else None))
        asked.clear()
        found = calibrate_steps(GaussianEvent(30.0), accountant=PldAccountant(), **target)
        assert asked == [(1.0, 10**9), (1.0, 10**9, start)]
        assert found.value == 7
    asked.clear()
    scouted.append((3, bound))
    calibrate_steps(GaussianEvent(30.0), accountant=RdpAccountant(), **target)
    assert asked == [(1.0, 10**9, 1)]
    limit = dataclasses.replace(bound, epsilon=1.0)
    assert calibration._checked(1.0, 1e-5, SpentAccountant(limit)) is not None
    beyond = dataclasses.replace(bound, epsilon=math.nextafter(1.0, 2.0))
    with pytest.raises(CalibrationError, match="nothing is left"):
        calibration._checked(1.0, 1e-5, SpentAccountant(beyond))


@dataclasses.dataclass
class SpentAccountant:
    """One whose bound is put in."""

    bound: PrivacyBound

    def epsilon(self, _: float) -> PrivacyBound:
        return self.bound
