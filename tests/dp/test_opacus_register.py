"""Accountants inside Opacus, with its own engine and optimizers on tiny models.

``RdpAccountant`` with an event that stands for a projection is enough to test what the accountants
refuse; ``register`` and ``register_projected`` are tested with the real ones.
"""

import copy
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.accountants import RDPAccountant, create_accountant, register_accountant, registry
from opacus.accountants.utils import get_noise_multiplier
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_privacy.dp import (
    GaussianEvent,
    PldAccountant,
    ProjectedGaussian,
    RdpAccountant,
    SampledGaussian,
)
from lora_privacy.dp.attestation import AttestedLedger
from lora_privacy.dp.opacus import (
    ProjectedOpacusAccountant,
    ProjectionAttestation,
    SampledOpacusAccountant,
    chain_step_hook,
    projection_digest,
    register,
    register_projected,
    to_opacus,
)
from lora_privacy.errors import AttestationError, UnsupportedEventError

LAYERS = ((6, 2), (3, 2))
RATE = 0.25


def digest(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def attestation(at: int = 0, /, **changes: object) -> ProjectionAttestation:
    """A statement that passes at step ``at``, but for ``changes``."""
    fields = {
        "step": at,
        "law": "gaussian",
        "layers": LAYERS,
        "seed_digest": digest(f"seed {at}"),
        "matrix_digest": digest(f"matrix {at}"),
        "clipped_whole": True,
        "noised_whole": True,
        "factors_reset": True,
        "all_projected": True,
    }
    return ProjectionAttestation(**{**fields, **changes})


class AttestingOptimizer(DPOptimizer):
    """What an engine with projections adds to Opacus' optimizer; ``says`` is what it attests."""

    says: object = None

    def attest_projection(self) -> object:
        return self.says


def tiny(kind: type[DPOptimizer], seed: int = 0) -> tuple[nn.Module, DPOptimizer]:
    """A linear model under Opacus' hooks, and a noisy optimizer of it."""
    model = GradSampleModule(nn.Linear(6, 3))
    generator = torch.Generator().manual_seed(seed)
    optimizer = kind(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.5,
        max_grad_norm=1.0,
        expected_batch_size=4,
        generator=generator,
    )
    return model, optimizer


def backward(model: nn.Module, rows: int = 4) -> None:
    model(torch.ones(rows, 6)).square().mean().backward()


def stand_in(noise_multiplier: float, sample_rate: float) -> SampledGaussian:
    """Three times the noise, so that the charge can be told from a plain one."""
    return SampledGaussian(3 * noise_multiplier, sample_rate)


def projected() -> ProjectedOpacusAccountant:
    return ProjectedOpacusAccountant("projected", LAYERS, RdpAccountant(), stand_in)


def train(engine: PrivacyEngine) -> None:
    """Two epochs of four Poisson batches at rate 1/4, by Opacus' own means."""
    model = nn.Linear(6, 3)
    data = DataLoader(
        TensorDataset(torch.ones(8, 6)),
        batch_size=2,
        generator=torch.Generator().manual_seed(1),  # it draws the Poisson batches
    )
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=data,
        noise_multiplier=1.5,
        max_grad_norm=1.0,
    )
    for _ in range(2):
        for (batch,) in loader:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            optimizer.step()


pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook", "ignore:Secure RNG")


@pytest.fixture
def pristine() -> Iterator[None]:
    """Opacus keeps its accountants in a module: leave it as it was."""
    before = dict(registry._ACCOUNTANTS)
    yield
    registry._ACCOUNTANTS.clear()
    registry._ACCOUNTANTS.update(before)


# --- accountants of plain runs


def test_an_engine_run_is_charged_step_by_step(pristine: None) -> None:
    """Opacus' engine, loader and optimizer; ε is that of our accountant on the same events."""
    register_accountant("ours", lambda: SampledOpacusAccountant("ours", RdpAccountant()))
    engine = PrivacyEngine(accountant="ours")
    train(engine)
    assert engine.accountant.history == [(1.5, RATE, 8)]
    assert len(engine.accountant) == 8
    expected = RdpAccountant().compose(SampledGaussian(1.5, RATE), 8).epsilon(1e-5)
    assert engine.get_epsilon(1e-5) == expected.epsilon
    assert engine.accountant.bound(1e-5) == expected


def test_several_batches_in_one_step_are_refused() -> None:
    """Opacus would charge two batches at rate q as one at 2q; a record may be in both."""
    model, optimizer = tiny(DPOptimizer)
    accountant = SampledOpacusAccountant("ours", RdpAccountant())
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
    before = copy.deepcopy(model.state_dict())
    backward(model)
    backward(model)
    with pytest.raises(UnsupportedEventError, match="summed 2 Poisson batches"):
        optimizer.step()
    assert accountant.history == []
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_one_batch_in_physical_parts_is_one_step() -> None:
    """What BatchMemoryManager does: parts are clipped and summed, the last one gets the noise."""
    model, optimizer = tiny(DPOptimizer)
    accountant = SampledOpacusAccountant("ours", RdpAccountant())
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
    for skip in (True, True, False):
        optimizer.zero_grad()
        backward(model)
        optimizer.signal_skip_step(do_skip=skip)
        optimizer.step()
    assert accountant.history == [(1.5, RATE, 1)]


def two_optimizers(engine: PrivacyEngine) -> Iterator[tuple[nn.Module, list[DPOptimizer]]]:
    """An adapter and a head, each with its own ``make_private``, on the batches of one loader."""
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2))
    loader = DataLoader(
        TensorDataset(torch.ones(8, 6)),
        batch_size=2,
        generator=torch.Generator().manual_seed(1),
    )
    optimizers = []
    batches, wrapped = loader, model
    for part in model:
        wrapped, optimizer, batches = engine.make_private(
            module=wrapped,
            optimizer=torch.optim.SGD(part.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=1.5,
            max_grad_norm=1.0,
        )
        optimizers.append(optimizer)
    for (batch,) in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        wrapped(batch).square().sum().backward()
        yield model, optimizers


def test_two_optimizers_on_one_poisson_batch_are_refused(pristine: None) -> None:
    """Both releases hang on one coin of a record: together they are one of norm √2, sampled once.

    At z = 1, q = 1/16, δ = 1e-5, ten such batches cost 4.38; 20 independent samples cost 2.40.
    """
    charged = PldAccountant().compose(SampledGaussian(1.0, 1 / 16), 20).epsilon(1e-5)
    true = PldAccountant().compose(SampledGaussian(0.5**0.5, 1 / 16), 10).epsilon(1e-5)
    assert (charged.epsilon, true.epsilon) == pytest.approx((2.400, 4.383), abs=5e-4)
    register_accountant("ours", lambda: SampledOpacusAccountant("ours", RdpAccountant()))
    engine = PrivacyEngine(accountant="ours")
    model, (adapter, head) = next(two_optimizers(engine))
    adapter.step()
    before = copy.deepcopy(model[1].state_dict())
    with pytest.raises(UnsupportedEventError, match="Put all parameters into one optimizer"):
        head.step()
    assert all(torch.equal(before[key], value) for key, value in model[1].state_dict().items())
    assert engine.accountant.history == [(1.5, RATE, 1)]


def test_a_second_optimizer_is_refused_in_a_projected_run_and_when_the_first_is_gone() -> None:
    """By identity of the first, not by its address, which the second may get."""
    for accountant in (projected(), SampledOpacusAccountant("ours", RdpAccountant())):
        for step in range(3):
            model, optimizer = tiny(AttestingOptimizer)
            optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
            backward(model)
            optimizer.says = attestation(min(step, 1))
            if step == 0:
                optimizer.step()
            else:
                with pytest.raises(UnsupportedEventError, match="one optimizer"):
                    optimizer.step()
            del model, optimizer
        assert len(accountant) == 1


def test_one_optimizer_goes_on_and_another_takes_over_a_saved_state() -> None:
    """Many steps, a second hook of the same accountant, then a new accountant after a restart."""
    accountant = SampledOpacusAccountant("ours", RdpAccountant())
    for _ in range(2):
        model, optimizer = tiny(DPOptimizer)
        for _ in range(2):
            optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
            for _ in range(2):
                optimizer.zero_grad()
                backward(model)
                optimizer.step()
        state = accountant.state_dict()
        accountant = SampledOpacusAccountant("ours", RdpAccountant())
        accountant.load_state_dict(state)
    assert accountant.history == [(1.5, RATE, 8)]


def test_an_empty_history_proves_nothing() -> None:
    """``attach_step_hook`` replaces the accounting hook: noisy steps must not print ε = 0."""
    for accountant in (projected(), SampledOpacusAccountant("ours", RdpAccountant())):
        model, optimizer = tiny(DPOptimizer)
        optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
        optimizer.attach_step_hook(lambda optimizer: None)
        backward(model)
        optimizer.step()
        for ask in (accountant.bound, accountant.get_epsilon):
            with pytest.raises(UnsupportedEventError, match="attach_step_hook replaces it"):
                ask(1e-5)


def test_another_hook_runs_after_the_accounting_one() -> None:
    """It sees the step charged already, and does not run where the step is refused."""
    model, optimizer = tiny(DPOptimizer)
    with pytest.raises(ValueError, match="no step hook to keep"):
        chain_step_hook(optimizer, print)
    accountant = SampledOpacusAccountant("ours", RdpAccountant())
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
    seen: list[tuple[str, int]] = []
    chain_step_hook(optimizer, lambda same: seen.append(("first", len(accountant))))
    chain_step_hook(optimizer, lambda same: seen.append(("second", len(accountant))))
    for _ in range(2):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    assert seen == [("first", 1), ("second", 1), ("first", 2), ("second", 2)]
    assert accountant.history == [(1.5, RATE, 2)]
    optimizer.zero_grad()
    backward(model)
    backward(model)
    with pytest.raises(UnsupportedEventError, match="summed 2 Poisson batches"):
        optimizer.step()
    assert len(seen) == 4


@pytest.mark.parametrize("empty", [RdpAccountant(), PldAccountant()])
def test_the_bound_says_what_the_hook_cannot_see(empty: RdpAccountant | PldAccountant) -> None:
    """Neither the loader nor which batch a step was taken on; sampled projections the same."""
    event = ProjectedGaussian(layers=((6, 2),), noise_multiplier=1.5, sample_rate=RATE)
    said = "each release has its own Poisson sample, independent of all others and secret"
    for one in (SampledGaussian(1.5, RATE), event):
        assert empty.compose(one).epsilon(1e-5).assumptions.count(said) == 1
    mixed = empty.compose(event).compose(SampledGaussian(1.5, RATE)).epsilon(1e-5)
    assert mixed.assumptions.count(said) == 1
    assert not any(
        "Poisson" in one for one in empty.compose(GaussianEvent(1.5)).epsilon(1e-5).assumptions
    )


def test_neighbouring_steps_are_joined_only_when_equal() -> None:
    """The order of the steps survives, as in Opacus."""
    accountant = SampledOpacusAccountant("ours", RdpAccountant())
    for noise in (1.0, 1.0, 2.0, 1.0):
        accountant.step(noise_multiplier=noise, sample_rate=RATE)
    assert accountant.history == [(1.0, RATE, 2), (2.0, RATE, 1), (1.0, RATE, 1)]
    for noise, rate in ((0.0, RATE), (float("nan"), RATE), (1.0, 1.5), (1.0, 0.0)):
        with pytest.raises(ValueError, match="must"):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
    assert len(accountant) == 4
    with pytest.raises(TypeError, match="alphas"):
        accountant.get_epsilon(1e-5, alphas=[2.0])


def test_states_make_the_round_trip_and_foreign_ones_are_refused() -> None:
    """Through JSON too. Nothing is replaced that was charged already."""
    accountant = SampledOpacusAccountant("ours", RdpAccountant())
    accountant.step(noise_multiplier=1.0, sample_rate=RATE)
    state = accountant.state_dict()
    for copied in (state, json.loads(json.dumps(state))):
        fresh = SampledOpacusAccountant("ours", RdpAccountant())
        fresh.load_state_dict(copied)
        assert fresh.history == accountant.history
        assert fresh.get_epsilon(1e-5) == accountant.get_epsilon(1e-5)
    filled: dict[str, Any] = {"other": 1}
    assert accountant.state_dict(filled) is filled
    assert set(filled) == {"other", "history", "mechanism"}

    theirs = create_accountant("rdp")
    theirs.step(noise_multiplier=1.0, sample_rate=RATE)
    foreign = [
        (theirs.state_dict(), "must be of mechanism 'ours', got 'rdp'"),
        ({}, "must be of mechanism"),
        ({"mechanism": "ours"}, "must hold exactly"),
        ({**state, "more": 1}, "must hold exactly"),
        ({**state, "history": [(1.0, 0.5)]}, r"history must hold \(σ, q, steps\)"),
        ({**state, "history": [(0.0, 0.5, 1)]}, "noise_multiplier must be positive"),
        ({**state, "history": [(1.0, 0.5, 0)]}, "steps must be at least 1"),
        ({**state, "history": "none"}, "must be a list"),
    ]
    for broken, message in foreign:
        fresh = SampledOpacusAccountant("ours", RdpAccountant())
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(broken)
        assert fresh.history == []
    with pytest.raises(ValueError, match="charged already"):
        accountant.load_state_dict(state)


def test_opacus_plans_with_it(pristine: None) -> None:
    """``get_noise_multiplier`` ends within its tolerance under the target."""
    register_accountant("ours", lambda: SampledOpacusAccountant("ours", RdpAccountant()))
    noise = get_noise_multiplier(
        target_epsilon=2.0, target_delta=1e-5, sample_rate=0.01, steps=1000, accountant="ours"
    )
    epsilon = RdpAccountant().compose(SampledGaussian(noise, 0.01), 1000).epsilon(1e-5).epsilon
    assert 1.99 <= epsilon <= 2.0


def test_pld_is_registered_once_and_for_all(pristine: None) -> None:
    """Twice is harmless; ε is that of ``PldAccountant``; somebody else's "pld" is left alone."""
    register()
    register()
    accountant = PrivacyEngine(accountant="pld").accountant
    assert type(accountant) is SampledOpacusAccountant
    assert accountant.mechanism() == "pld"
    for _ in range(3):
        accountant.step(noise_multiplier=1.5, sample_rate=RATE)
    expected = PldAccountant().compose(SampledGaussian(1.5, RATE), 3).epsilon(1e-5)
    assert accountant.bound(1e-5) == expected
    noise = get_noise_multiplier(
        target_epsilon=2.0, target_delta=1e-5, sample_rate=0.01, steps=100, accountant="pld"
    )
    planned = PldAccountant().compose(SampledGaussian(noise, 0.01), 100).epsilon(1e-5)
    assert 1.99 <= planned.epsilon <= 2.0

    register_accountant("pld", RDPAccountant, force=True)
    with pytest.raises(ValueError, match="another accountant named 'pld' already: RDPAccountant"):
        register()


# --- accountants of projected runs


def test_attested_steps_are_charged_as_projections() -> None:
    """Two steps with a new A each: the ledger holds them, and ε is that of the projected event."""
    model, optimizer = tiny(AttestingOptimizer)
    accountant = projected()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
    for step in range(2):
        optimizer.zero_grad()
        backward(model)
        optimizer.says = attestation(step, law=("gaussian", "orthonormal")[step])
        optimizer.step()
    assert accountant.history == ((1.5, RATE, 2),)
    assert len(accountant) == 2
    expected = RdpAccountant().compose(SampledGaussian(4.5, RATE), 2).epsilon(1e-5)
    assert accountant.get_epsilon(1e-5) == expected.epsilon
    assert "attested" in accountant.bound(1e-5).assumptions[-1]


def test_a_stock_optimizer_is_refused_before_the_weights_move() -> None:
    """Its steps are plain sampled Gaussians: the projected ε would be far too small."""
    model, optimizer = tiny(DPOptimizer)
    accountant = projected()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
    before = copy.deepcopy(model.state_dict())
    backward(model)
    with pytest.raises(AttestationError, match="DPOptimizer does not attest a projection"):
        optimizer.step()
    assert len(accountant) == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


REFUSED = [
    ({"matrix_digest": digest("matrix 0")}, "A frozen A, or one that is refreshed"),
    ({"seed_digest": digest("seed 0")}, "The seed of A was used at an earlier step"),
    ({"law": "uniform"}, "law 'uniform', whose row space is not uniform"),
    ({"law": "rademacher"}, "law 'rademacher'"),
    ({"law": "unknown"}, "law 'unknown'"),
    ({"layers": ((6, 2),)}, "was registered for"),
    ({"layers": ((6, 2), (3, 1))}, "was registered for"),
    ({"layers": ((6, 2), (3, 2), (3, 2))}, "was registered for"),
    ({"step": 0}, "is for step 0, the next one to charge is 1"),
    ({"step": 2}, "is for step 2, the next one to charge is 1"),
    ({"clipped_whole": False}, "the clip must bound the norm of the whole gradient"),
    ({"noised_whole": False}, "the noise must be added to the whole gradient"),
    ({"factors_reset": False}, "B must be folded"),
    ({"all_projected": False}, "every trained parameter must be projected"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_is_no_fresh_projection_is_refused(change: dict[str, Any], message: str) -> None:
    """After one good step. The weights stay, the ledger stays, and an honest step still passes."""
    model, optimizer = tiny(AttestingOptimizer)
    accountant = projected()
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
    backward(model)
    optimizer.says = attestation(0)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    backward(model)
    optimizer.says = attestation(1, **change)
    with pytest.raises(AttestationError, match=message):
        optimizer.step()
    assert accountant.history == ((1.5, RATE, 1),)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    optimizer.zero_grad()
    backward(model)
    optimizer.says = attestation(1, layers=LAYERS[::-1])  # the order of the layers is free
    optimizer.step()
    assert len(accountant) == 2


def test_a_statement_of_another_type_is_refused() -> None:
    """Nothing, a dictionary, or a subclass that may change its mind."""

    class Moody(ProjectionAttestation):
        pass

    fields = {name: getattr(attestation(), name) for name in attestation().__slots__}
    for says in (None, True, fields, Moody(**fields)):
        model, optimizer = tiny(AttestingOptimizer)
        optimizer.attach_step_hook(projected().get_optimizer_hook_fn(sample_rate=RATE))
        backward(model)
        optimizer.says = says
        with pytest.raises(AttestationError, match="must return a ProjectionAttestation"):
            optimizer.step()


def test_accumulated_batches_are_refused_under_projection_too() -> None:
    model, optimizer = tiny(AttestingOptimizer)
    optimizer.attach_step_hook(projected().get_optimizer_hook_fn(sample_rate=RATE))
    backward(model)
    backward(model)
    optimizer.says = attestation(0)
    with pytest.raises(UnsupportedEventError, match="summed 2 Poisson batches"):
        optimizer.step()


def test_a_bare_step_is_refused() -> None:
    accountant = projected()
    with pytest.raises(AttestationError, match="takes no bare step"):
        accountant.step(noise_multiplier=1.0, sample_rate=RATE)
    assert len(accountant) == 0


def test_a_registered_projection_is_charged_as_one(pristine: None) -> None:
    """Pins of theory: 100 fresh steps at (768, 8), z = 1, δ = 1e-5.

    Above the worst rank-one record's 4.511, below the 4.882 of Rényi divergences; plain: 91.8.
    """
    register_projected("fresh", [(768, 8)])
    register_projected("fresh", ((768, 8),))  # the same again is harmless
    planned = create_accountant("fresh")
    planned.history = [(1.0, 1.0, 100)]
    event = ProjectedGaussian(layers=((768, 8),), noise_multiplier=1.0)
    expected = PldAccountant().compose(event, 100).epsilon(1e-5)
    assert 4.511 < planned.get_epsilon(1e-5) == expected.epsilon < 4.882

    engine = PrivacyEngine(accountant="fresh")
    with pytest.raises(AttestationError, match="DPOptimizer does not attest a projection"):
        train(engine)
    assert len(engine.accountant) == 0

    with pytest.raises(ValueError, match="another accountant named 'fresh'"):
        register_projected("fresh", [(768, 16)])
    with pytest.raises(ValueError, match="another accountant named 'rdp'"):
        register_projected("rdp", [(768, 8)])
    with pytest.raises(ValueError, match="rank must be at most in_features"):
        register_projected("wide", [(8, 768)])


def test_a_projection_is_not_handed_to_opacus_as_a_history() -> None:
    """Opacus would take it for a plain Gaussian."""
    event = ProjectedGaussian(layers=((768, 8),), noise_multiplier=1.0)
    mixed = RdpAccountant().compose(GaussianEvent(2.0)).compose(event)
    with pytest.raises(UnsupportedEventError, match="no history that means ProjectedGaussian"):
        to_opacus(mixed)


def test_a_plan_is_not_a_ledger() -> None:
    """It has an ε that says it is a plan; it cannot be trained on, saved, or mixed with steps."""
    accountant = projected()
    accountant.history = [(1.5, RATE, 10)]
    assert len(accountant) == 0
    expected = RdpAccountant().compose(SampledGaussian(4.5, RATE), 10).epsilon(1e-5)
    assert accountant.get_epsilon(1e-5) == expected.epsilon
    assert "this is a plan" in accountant.bound(1e-5).assumptions[-1]
    with pytest.raises(AttributeError):
        accountant.history.append((1.5, RATE, 10))
    with pytest.raises(AttestationError, match="A plan has no state"):
        accountant.state_dict()

    model, optimizer = tiny(AttestingOptimizer)
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=RATE))
    backward(model)
    optimizer.says = attestation(0)
    with pytest.raises(AttestationError, match="holds a plan"):
        optimizer.step()

    accountant.history = []  # the plan is given up
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    with pytest.raises(AttestationError, match="holds 1 attested steps"):
        accountant.history = [(1.5, RATE, 10)]
    with pytest.raises(AttestationError, match="holds 1 attested steps"):
        accountant.history = []


def attested(steps: int = 3) -> ProjectedOpacusAccountant:
    """An accountant with ``steps`` attested steps."""
    accountant = projected()
    hook = accountant.get_optimizer_hook_fn(sample_rate=RATE)
    model, optimizer = tiny(AttestingOptimizer)
    backward(model)
    for step in range(steps):
        optimizer.says = attestation(step)
        hook(optimizer)
    return accountant


def test_a_ledger_makes_the_round_trip_and_remembers_every_draw() -> None:
    """Through JSON: the steps go on where they stopped, and no seed of before can come back."""
    accountant = attested(3)
    fresh = projected()
    fresh.load_state_dict(json.loads(json.dumps(accountant.state_dict())))
    assert fresh.state_dict() == accountant.state_dict()
    assert fresh.get_epsilon(1e-5) == accountant.get_epsilon(1e-5)
    ledger = AttestedLedger.restored(accountant.state_dict(), LAYERS)
    for change, message in (
        ({"seed_digest": digest("seed 1")}, "seed of A was used"),
        ({"matrix_digest": digest("matrix 1")}, "A frozen A"),
        ({"step": 0}, "next one to charge is 3"),
    ):
        with pytest.raises(AttestationError, match=message):
            ledger.charge(attestation(3, **change), noise_multiplier=1.0, sample_rate=RATE)
    ledger.charge(attestation(3), noise_multiplier=1.0, sample_rate=RATE)
    assert ledger.history == ((1.5, RATE, 3), (1.0, RATE, 1))


def test_foreign_and_damaged_ledgers_are_refused() -> None:
    """A state of another mechanism, of other layers, with a step or a digest missing."""
    state = attested(3).state_dict()
    cases = [
        ({**state, "mechanism": "other"}, "must be of mechanism 'projected', got 'other'"),
        ({key: state[key] for key in ("history", "mechanism")}, "must hold exactly"),
        ({**state, "layers": [(6, 2)]}, "state is of layers"),
        ({**state, "history": [(1.5, RATE, 2)]}, "one digest for each step"),
        ({**state, "history": []}, "one digest for each step"),
        ({**state, "seed_digests": state["seed_digests"][:2]}, "one digest for each step"),
        ({**state, "matrix_digests": [digest(0)] * 3}, "one digest for each step"),
        ({**state, "seed_digests": ["short"] * 3}, "hexadecimal digits"),
    ]
    for broken, message in cases:
        fresh = projected()
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(broken)
        assert len(fresh) == 0
    with pytest.raises(ValueError, match="charged already"):
        attested(1).load_state_dict(state)
    planned = projected()
    planned.history = [(1.5, RATE, 10)]
    with pytest.raises(ValueError, match="charged already"):
        planned.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": -1}, ValueError, "step must be at least 0"),
        ({"step": 0.5}, TypeError, "step must be an integer"),
        ({"layers": ()}, ValueError, "at least one"),
        ({"layers": ((6,),)}, ValueError, r"must hold \(in_features, rank\)"),
        ({"layers": ((6, 0),)}, ValueError, "rank must be at least 1"),
        ({"seed_digest": 12}, TypeError, "hexadecimal text"),
        ({"seed_digest": "ab" * 15}, ValueError, "128 bits"),
        ({"matrix_digest": "XY" * 32}, ValueError, "lower-case hexadecimal"),
        ({"clipped_whole": 1}, TypeError, "must be a bool"),
        ({"all_projected": None}, TypeError, "must be a bool"),
    ],
)
def test_an_attestation_checks_its_fields(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """1 is not True, and a short digest may repeat by accident."""
    with pytest.raises(error, match=message):
        attestation(**change)


def test_the_digest_of_matrices_sees_entries_shape_type_and_order() -> None:
    """So a frozen A has the digest of the step before, and nothing else has."""
    a, b = torch.zeros(2, 6), torch.ones(2, 3)
    same = projection_digest([a, b])
    assert same == projection_digest([a.clone(), b.t().contiguous().t()])
    moved = a.clone()
    moved[1, 5] = 1e-30
    others = [[moved, b], [b, a], [a.reshape(6, 2), b], [a.double(), b], [a], [a.bfloat16(), b]]
    assert same not in {projection_digest(other) for other in others}
