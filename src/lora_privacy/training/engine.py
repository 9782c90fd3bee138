"""Make a training private: clipped per-sample gradients, noise and accounting in a plain loop.

``make_private`` returns the same model and the same optimizer, with hooks, and a loader of Poisson
batches. A backward pass then leaves nothing in ``.grad``; ``optimizer.step()`` enters the step in
the ledger, puts the clipped and noised gradient there, and moves the weights. Any other optimizer
finds no gradient and moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn

from lora_privacy import _validate
from lora_privacy.dp import Adjacency
from lora_privacy.dp.result import ADJACENCIES
from lora_privacy.errors import LedgerError, UnsupportedTrainingError
from lora_privacy.training import checkpoint
from lora_privacy.training.clipping import ClippingName, Transform, clipping_of
from lora_privacy.training.ledger import Ledger, Mechanism
from lora_privacy.training.methods import Method, prepare, refuse_packing
from lora_privacy.training.privacy import NoiseMultiplier, PrivacyTarget, TargetEpsilon
from lora_privacy.training.private_training import PrivateTraining
from lora_privacy.training.processes import processes_of
from lora_privacy.training.randomness import KeyedRandomness, SystemRandomness, new_key
from lora_privacy.training.recorder import SampleRecorder
from lora_privacy.training.sampling import PoissonLoader, checked_sample_rate

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

__all__ = ["Denoiser", "LossName", "make_private"]

LossName = Literal["per-sample-mean", "per-sample-sum"]

Denoiser = Callable[[str, "Tensor", float], "Tensor"]
"""(name of a parameter, noised gradient, standard deviation of its noise) -> gradient to use.

It runs after the noise: whatever it computes from its arguments costs no privacy.
"""


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data_loader: DataLoader[Any],
    *,
    method: Method,
    max_grad_norm: float | Mapping[str, float],
    privacy: PrivacyTarget,
    delta: float,
    sample_rate: float | None = None,
    expected_batch_size: float | None = None,
    adjacency: Adjacency = "add-remove",
    physical_batch_size: int | None = None,
    loss: LossName = "per-sample-mean",
    clipping: ClippingName = "flat",
    transform: Transform | None = None,
    denoiser: Denoiser | None = None,
    secure: bool = True,
    deterministic: bool = False,
    ledger: str | Path | None = None,
    resume: str | Path | None = None,
    distributed: bool | None = None,
) -> PrivateTraining:
    """Make a training private, **in place**: the model and the optimizer get hooks.

    The loop stays what it was, with the loader that is returned::

        private = make_private(model, optimizer, loader, method="dp-lora", max_grad_norm=1.0,
                               privacy=TargetEpsilon(8.0, epochs=3), delta=1e-5)
        while private.steps_left():
            for batch in private.data_loader:
                loss_of(model, batch).backward()
                optimizer.step()
        print(private.bound())

    At each step every record takes part with probability q; the gradients of those that do are
    clipped and summed, noise of standard deviation z times the sensitivity is added, and the sum
    is divided by the *expected* batch size q·N. The loss of a batch must be a function of that
    batch alone: a backward pass over other records of the data is not accounted.

    Args:
        model: For ``"dp-lora"`` and ``"dp-lora-fa"`` with LoRA adapters, of ``adapt`` or of peft;
            for ``"dp-flora"`` adapted with ``method="flora"``, with everything that is trained
            among its targets, the head too; for ``"dp-sgd"`` any model.
        optimizer: Holds every trained parameter; ``torch.optim.SGD`` for ``"dp-flora"``.
        data_loader: Gives the data set, the collate function, and, as its batch size, the
            expected one. Its order is replaced by Poisson sampling.
        method: ``"dp-lora"`` trains A and B, ``"dp-lora-fa"`` B only, ``"dp-sgd"`` whatever asks
            for a gradient, all accounted as sampled Gaussians. ``"dp-flora"`` clips and noises the
            full gradient and releases it through an A that is drawn anew at each step, accounted
            as ``ProjectedGaussian``.
        max_grad_norm: Clipping norm C >= 1e-8; with ``clipping="per-layer"`` also one for each
            trained layer.
        privacy: ``NoiseMultiplier(z)``, or ``TargetEpsilon(ε, epochs=…)`` (or ``steps=…``), which
            finds z and ends the training when its steps are taken.
        delta: δ, in (0, 1), of the target and of ``bound()``.
        sample_rate: q; None takes the loader's batch size over the number of records.
        expected_batch_size: What the noised sum is divided by, > 0; None takes q·N. Give it, and
            ``sample_rate``, where N is not public: the noise that a step is seen to have, its
            standard deviation over this number, would tell N.
        adjacency: Under ``"replace"`` a record is exchanged and moves the sum by 2C.
        physical_batch_size: Most records run at once: larger batches come in parts, and
            ``optimizer.step()``, called after each part, moves the weights after the last one.
        loss: Whether the loss that is backpropagated is the mean or the sum over the records of
            the batch. A loss of a language model must average over a record's own tokens.
        clipping: ``"flat"``, ``"per-layer"`` or ``"automatic"``.
        transform: Applied to each sample's gradients before the clip, such as ``RowScaling``.
        denoiser: Applied to each noised gradient.
        secure: Draw noise, sampling and A from the operating system; nothing of it is ever stored.
            False takes faster generators that the operating system seeds.
        deterministic: Draw them from a key that checkpoints hold, so that a resumed run goes on
            bit by bit. Needs ``secure=False``; the bound then says that the key's holder is not
            covered.
        ledger: File that each step is written to before it moves a weight. Steps that it holds
            already are part of the cost. ``save`` before the first step gives a crash something
            to go on from.
        resume: Folder of ``PrivateTraining.save`` to go on from, with the same arguments.
        distributed: Whether the processes of ``torch.distributed`` train this model together.
            Every one is given the same arguments, the plain model (not in
            ``DistributedDataParallel``), the whole data set and, as the loader's batch size, that
            of all of them; ``physical_batch_size`` is its own. Weights start as those of rank 0,
            each process draws from its own share of the records, rank 0 alone writes the ledger
            and draws the noise, one for all. None refuses to guess when several run.

    Raises:
        ValueError: An argument is out of range, or two contradict.
        UnsupportedLayerError: A trained layer has no per-sample gradients here.
        UnsupportedTrainingError: The method does not cover this model, optimizer or loader.
        StaleParameterError: The optimizer holds parameters that the model does not have.
        CalibrationError: The target cannot be met.
        LedgerError, StorageError: The ledger or the checkpoint does not fit.
        ProcessError: Processes that train together differ, or one of them is gone.
    """
    _validate.inside("delta", delta, 0, 1)
    _validate.choice("adjacency", adjacency, ADJACENCIES)
    _validate.choice("loss", loss, get_args(LossName))
    if expected_batch_size is not None:
        _validate.positive("expected_batch_size", expected_batch_size)
    if physical_batch_size is not None:
        physical_batch_size = _validate.integer("physical_batch_size", physical_batch_size, 1)
    if deterministic and secure:
        raise ValueError(
            "deterministic=True keeps the seed of the noise, and whoever holds it is not covered "
            "by the guarantee. Pass secure=False with it to say that this is meant."
        )
    if not isinstance(privacy, NoiseMultiplier | TargetEpsilon):
        raise TypeError(
            "privacy must be NoiseMultiplier(z) or TargetEpsilon(epsilon, steps=… or epochs=…), "
            f"got {privacy!r}."
        )
    processes = processes_of(distributed)
    if deterministic and processes.size > 1:
        raise UnsupportedTrainingError(
            "deterministic=True repeats a run bit by bit in one process only; leave it out with "
            "distributed=True."
        )
    rate = checked_sample_rate(data_loader, sample_rate)
    refuse_packing(data_loader)
    fresh = prepare(model, optimizer, method, transform=transform, clipping=clipping)
    if fresh is not None and denoiser is not None:
        raise UnsupportedTrainingError(
            "method='dp-flora' takes no denoiser: its noise went through A and is not independent "
            "from entry to entry, as denoisers assume."
        )
    recorder = SampleRecorder(model, dense=transform is not None)
    rule = clipping_of(clipping, max_grad_norm, list(recorder.taps))
    mechanism = Mechanism(adjacency=adjacency, layers=fresh.shapes if fresh else None)
    if resume is not None and ledger is None:
        ledger = Path(resume) / checkpoint.LEDGER
    if processes.rank > 0:
        ledger = None  # rank 0 writes; the others follow in memory
    elif resume is not None and not Path(str(ledger)).exists():
        raise LedgerError(
            f"There is no ledger at {ledger}; pass the ledger=… that the training was begun with."
        )
    training = PrivateTraining(
        model=model,
        optimizer=optimizer,
        recorder=recorder,
        clipping=rule,
        fresh=fresh,
        ledger=Ledger(mechanism, ledger),
        method=method,
        delta=float(delta),
        sample_rate=rate,
        expected_batch_size=expected_batch_size or rate * len(cast("Any", data_loader.dataset)),
        loss=loss,
        transform=transform,
        denoiser=denoiser,
        randomness=SystemRandomness() if secure else KeyedRandomness(new_key()),
        deterministic=deterministic,
        processes=processes,
    )
    try:
        training.data_loader = PoissonLoader(
            data_loader, physical_batch_size, training, (processes.rank, processes.size)
        )
        training._join(data_loader)
        if resume is None:
            if any(optimizer.state.values()):
                raise UnsupportedTrainingError(
                    "The optimizer holds state of earlier steps, which were not private and would "
                    "go on moving the weights. Make a new optimizer."
                )
            training._begin(privacy)
        else:
            training._resume(Path(resume), privacy)
        processes.same("what it trains", training._facts())
        groups = optimizer.state_dict()["param_groups"]
        processes.same("the optimizer", [type(optimizer).__name__, *map(repr, groups)])
    except BaseException:
        training.close()  # the ledger's file, for another try
        raise
    training._install()
    return training
