"""Shadow models: the same training on many random halves, and how likely each finds each record.

Membership attacks compare a target model to such references. One file of arrays comes out, which
``lora_privacy.audit`` and ``lora-privacy audit`` take.
"""

from __future__ import annotations

import json
import threading
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import joblib
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from lora_privacy import _validate
from lora_privacy.assess.adapter_fit import AdapterFit, forget_prefix
from lora_privacy.assess.config import AssessConfig, json_hash
from lora_privacy.assess.files import read_arrays, write_arrays, write_json
from lora_privacy.assess.setup import load_data
from lora_privacy.errors import FolderInUseError, StorageError

__all__ = ["ShadowFit", "Shadows", "coins_of", "complete_shadows", "train_shadows"]

Array: TypeAlias = npt.NDArray[np.float64]
Mask: TypeAlias = npt.NDArray[np.bool_]
Numbers: TypeAlias = npt.NDArray[np.int64]

_JOINED, _STAMP, _FINISHED = "shadows.npz", "config.json", "finished"
_COINS, _MODEL = 0, 1  # the random streams of one shadow
# Dropout and new heads draw from torch's global generator: threads of one process take turns.
_TURN = threading.Lock()


class ShadowFit(Protocol):
    """One way of training, which shadows repeat; pickled for backends of several processes."""

    @property
    def records(self) -> int:
        """N, the number of records that may be trained on."""
        ...

    def fingerprint(self) -> str:
        """A text that is the same for the same training on the same records, and for no other."""
        ...

    def __call__(self, seed: int, rows: Numbers) -> tuple[npt.ArrayLike, npt.ArrayLike]:
        """Train from scratch on the records at ``rows``, an increasing array, perhaps empty.

        torch's global generator is seeded with ``seed`` and put back afterwards; all other
        randomness must come from ``seed`` too.

        Returns:
            ln p under the model, at most 0, of every record, (N,), and of a population outside
            the records, (Z,): of the true label, or the mean over the tokens of a text.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shadows:
    """What R shadow models say of N records and a population of Z; names are those of attacks.

    Attributes:
        reference_log_probs: ln p of each record under each shadow, (R, N), at most 0.
        reference_members: Whether its coin put the record into that training set, bool (R, N).
        population_reference_log_probs: ln p of the population, (R, Z); none of it was in any
            training set.
        seeds: Seed of each training, (R,).
        fingerprint: Of the training, the records and the seed of all coins.
    """

    reference_log_probs: Array
    reference_members: Mask
    population_reference_log_probs: Array
    seeds: Numbers
    fingerprint: str

    def arrays(self) -> dict[str, Any]:
        """What attacks take beside the target model's own: the first three fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)[:3]}

    def first(self, count: int) -> Shadows:
        """The first ``count`` of the shadows."""
        parts = {field.name: getattr(self, field.name)[:count] for field in fields(self)[:-1]}
        return replace(self, **parts)

    def save(self, path: str | Path) -> None:
        """Write all fields as one ``.npz``, whole or not at all."""
        write_arrays(
            Path(path), {**self.arrays(), "seeds": self.seeds, "fingerprint": self.fingerprint}
        )

    @classmethod
    def load(cls, path: str | Path) -> Shadows:
        """Read what ``save`` wrote; StorageError if the file is missing, damaged or another."""
        found = read_arrays(Path(path), tuple(field.name for field in fields(cls)))
        return cls(**{**found, "fingerprint": str(found["fingerprint"])})


def train_shadows(
    fit: AssessConfig | ShadowFit,
    folder: str | Path,
    *,
    count: int = 16,
    seed: int = 0,
    n_jobs: int | None = None,
) -> Shadows:
    """Train ``count`` shadow models, each on the records that its own fair coins put in.

    A shadow depends on ``fit``, ``seed`` and its number alone: neither backend, ``n_jobs``,
    ``count`` nor an interruption changes a bit of it, on one machine. Each finished one is a file
    until ``folder/shadows.npz`` holds them all. The same call goes on where a killed one stopped,
    and one with a larger ``count`` adds to what is there.

    Processes are joblib's: name them with ``n_jobs``, and another backend with
    ``joblib.parallel_config``. torch uses one thread in each; threads of one process take turns.

    Args:
        fit: The training. An ``AssessConfig`` stands for its one method on its training data,
            with the held-out data as the population.
        folder: Made if absent.
        count: R, at least 1.
        seed: Of all coins and trainings. Who knows it knows every training set.
        n_jobs: As ``joblib.Parallel`` takes it.

    Raises:
        FolderInUseError: ``folder`` holds something else, or shadows of other settings.
        StorageError: A file of finished shadows is damaged or another's.
        DataError: The data cannot be used; the message says why.
        ValueError: An argument is out of range, or ``fit`` returned no log-probabilities.
        NonFiniteError: A training diverged.
    """
    try:
        return complete_shadows(fit, folder, count=count, seed=seed, n_jobs=n_jobs)
    finally:
        forget_prefix()


def complete_shadows(
    fit: AssessConfig | ShadowFit,
    folder: str | Path,
    *,
    count: int,
    seed: int,
    n_jobs: int | None,
) -> Shadows:
    """``train_shadows``, but the frozen prefix is kept for other methods on the same records."""
    count = _validate.integer("count", count, 1)
    seed = _validate.integer("seed", seed, 0)
    if isinstance(fit, AssessConfig):
        data = load_data(replace(fit, secrets=0))
        fit = AdapterFit(fit, data.train, data.dev)
    folder = Path(folder)
    stamp = {"fit": fit.fingerprint(), "records": fit.records, "seed": seed}
    _take(folder, stamp)
    joined, fingerprint = folder / _JOINED, json_hash(stamp)
    done = [Shadows.load(joined)] if joined.exists() else []
    had = len(done[0].seeds) if done else 0
    files = [folder / _FINISHED / f"{i:05d}.npz" for i in range(count)]
    missing = [i for i in range(had, count) if not files[i].exists()]
    with warnings.catch_warnings():
        # joblib replaces a worker whose memory has grown, and warns; no shadow is lost by it.
        warnings.filterwarnings("ignore", "A worker stopped", UserWarning)
        # The next is handed out when one is finished, so that the bar is right but for n_jobs.
        joblib.Parallel(n_jobs=n_jobs, pre_dispatch="n_jobs")(
            joblib.delayed(_train_one)(fit, seed, i, files[i], fingerprint)
            for i in tqdm(missing, desc="shadows", unit="shadow", disable=not missing)
        )
    shadows = _join([*done, *map(Shadows.load, files[had:])], folder, seed, fingerprint)
    if had < count:
        shadows.save(joined)
    for file in files:
        file.unlink(missing_ok=True)
    return shadows.first(count)


def coins_of(seed: int, number: int, records: int) -> Mask:
    """Who is in the training set of shadow ``number``: a fair coin a record, bool (records,)."""
    return _stream(seed, number, _COINS).integers(0, 2, records).astype(np.bool_)


def _stream(seed: int, number: int, what: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number, what)))


def _model_seed(seed: int, number: int) -> int:
    """31 bits: what torch's generator on the CPU and ``transformers.set_seed`` both take."""
    return int(_stream(seed, number, _MODEL).integers(2**31))


def _train_one(fit: ShadowFit, seed: int, number: int, file: Path, fingerprint: str) -> None:
    """Train one shadow and write its file; runs in a worker."""
    members, model_seed = coins_of(seed, number, fit.records), _model_seed(seed, number)
    with _TURN, torch.random.fork_rng():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums over several threads round otherwise
        try:
            torch.manual_seed(model_seed)
            records, population = fit(model_seed, np.flatnonzero(members))
        finally:
            torch.set_num_threads(threads)
    Shadows(
        reference_log_probs=_checked("records", records, fit.records),
        reference_members=members[None],
        population_reference_log_probs=_checked("population", population, None),
        seeds=np.array([model_seed]),
        fingerprint=fingerprint,
    ).save(file)


def _checked(what: str, log_probs: npt.ArrayLike, size: int | None) -> Array:
    array = np.asarray(log_probs, dtype=np.float64)
    right = array.ndim == 1 and array.size and size in (None, array.size)
    if not right or not np.all((array <= 0) & np.isfinite(array)):
        raise ValueError(
            f"fit must return ln p of the {what}, finite and at most 0, of shape "
            f"({'at least 1' if size is None else size},), got shape {array.shape}."
        )
    return array[None]


def _take(folder: Path, stamp: dict[str, Any]) -> None:
    """Stamp an empty folder, or see that its stamp is this one.

    Without a lock: two runs of one stamp write the same bytes, and each file whole.
    """
    if folder.exists() and not folder.is_dir():
        raise FolderInUseError(f"{folder} is a file; name a folder for the shadows.")
    file = folder / _STAMP
    if file.exists():
        try:
            same = json.loads(file.read_text(encoding="utf-8")) == stamp
        except ValueError:
            same = False
        if not same:
            raise FolderInUseError(
                f"{folder} holds shadows of another training, other records or another seed; "
                "choose another folder, or delete this one."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise FolderInUseError(f"{folder} is not empty; choose another folder for the shadows.")
    (folder / _FINISHED).mkdir(parents=True, exist_ok=True)
    write_json(file, stamp)


def _join(parts: list[Shadows], folder: Path, seed: int, fingerprint: str) -> Shadows:
    names = [field.name for field in fields(Shadows)[:-1]]
    try:
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(x, name) for x in parts]) for name in names
        }
    except ValueError:  # populations of different sizes, or arrays of another shape
        arrays = {"seeds": np.empty(0)}
    expected = [_model_seed(seed, i) for i in range(len(arrays["seeds"]))]
    same = {part.fingerprint for part in parts} == {fingerprint}
    if not same or len(arrays) < len(names) or not np.array_equal(arrays["seeds"], expected):
        raise StorageError(
            f"{folder} holds shadow files that do not belong together; delete the folder."
        )
    return Shadows(**arrays, fingerprint=fingerprint)
