"""What was released, written down before any of it can leave the process.

A line a step. A run that is killed after the line was written has paid for the step, also where
its result was lost; one that is killed before has released nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from lora_privacy import _validate
from lora_privacy.dp import (
    Adjacency,
    AttestedLedger,
    PldAccountant,
    ProjectedGaussian,
    ProjectionAttestation,
    SampledGaussian,
)
from lora_privacy.errors import FolderInUseError, LedgerError

__all__ = ["Ledger", "Mechanism", "Release"]

_FORMAT = "lora-privacy ledger"
_VERSION = 1
_STEP_FIELDS = {
    "run",
    "step",
    "noise_multiplier",
    "sample_rate",
    "sum_digest",
    "attestation",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """What a step of a training means for an accountant.

    Attributes:
        adjacency: Neighbouring relation of the bound.
        layers: ``(in_features, rank)`` of every layer when each step projects the noised gradient
            by a fresh A; None for the plain sampled Gaussian.
    """

    adjacency: Adjacency
    layers: tuple[tuple[int, int], ...] | None = None

    def event(self, noise_multiplier: float, sample_rate: float) -> Any:  # noqa: ANN401
        """One step as an event of ``lora_privacy.dp``."""
        if self.layers is None:
            return SampledGaussian(noise_multiplier, sample_rate)
        return ProjectedGaussian(
            layers=self.layers, noise_multiplier=noise_multiplier, sample_rate=sample_rate
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One step.

    Attributes:
        run: Which randomness it was drawn from; the same run and step is the same release.
        step: Steps of the training before it.
        noise_multiplier: z = σ/C.
        sample_rate: q.
        sum_digest: Keyed digest of the sums that the noise of a stored key covers; None where the
            noise cannot be drawn again.
        attestation: What the optimizer states of its projection; None where there is none.
    """

    run: str
    step: int
    noise_multiplier: float
    sample_rate: float
    sum_digest: str | None = None
    attestation: ProjectionAttestation | None = None


class Ledger:
    """Every release of a training, in memory and, once it has a path, in a file.

    Args:
        mechanism: What all steps are.
        path: File to continue or to begin; None keeps the ledger in memory.

    Raises:
        LedgerError: The file is damaged or of another mechanism.
        FolderInUseError: Another process writes to it.
    """

    def __init__(self, mechanism: Mechanism, path: str | Path | None = None) -> None:
        self.mechanism = mechanism
        self._releases: dict[tuple[str, int], Release] = {}
        self._counts: dict[tuple[float, float], int] = {}
        self._reached: dict[str, int] = {}
        self._attested = None if mechanism.layers is None else AttestedLedger(mechanism.layers)
        self._file: IO[str] | None = None
        self.path: Path | None = None
        if path is not None:
            self.attach(path)

    def __len__(self) -> int:
        """Releases so far."""
        return len(self._releases)

    def __iter__(self) -> Iterator[Release]:
        return iter(self._releases.values())

    def find(self, run: str, step: int) -> Release | None:
        """The release of ``step`` in ``run``; None if there was none."""
        return self._releases.get((run, step))

    def reached(self, run: str) -> int:
        """One more than the last step released in ``run``; 0 if there is none."""
        return self._reached.get(run, 0)

    @property
    def seed_known(self) -> bool:
        """Whether the noise of some release can be drawn again from a stored key."""
        return any(release.sum_digest is not None for release in self)

    def digest(self, count: int) -> str:
        """Hash of the first ``count`` releases."""
        found = hashlib.sha256(json.dumps(self._header()).encode())
        for release in itertools.islice(self, count):
            found.update(json.dumps(_to_plain(release)).encode() + b"\n")
        return found.hexdigest()

    def accountant(self) -> PldAccountant:
        """An accountant that has paid for every release."""
        found = PldAccountant(self.mechanism.adjacency)
        for (noise_multiplier, sample_rate), count in self._counts.items():
            found = found.compose(self.mechanism.event(noise_multiplier, sample_rate), count)
        return found

    def charge(self, release: Release) -> None:
        """Enter ``release``; on return it is on disk, if the ledger has a path.

        A release that was entered before, drawn again from the same randomness, costs nothing.

        Raises:
            LedgerError: The same run and step were released otherwise, or the file cannot be
                written; the release then counts in memory, and is written with the next one.
            AttestationError: A projection is not attested to be fresh.
        """
        key = (release.run, release.step)
        if key in self._releases:
            if self._same(self._releases[key], release):
                self._write()  # a full disk may have kept its line back
                return
            raise LedgerError(
                f"Step {release.step} of this run was released before, of another sum or with "
                "other parameters: the data, the settings or the machine differ. One noise must "
                "not cover two sums; begin a new training."
            )
        self._enter(release)
        self._write(_to_plain(release))

    def attach(self, path: str | Path) -> None:
        """Continue the file at ``path`` or begin it with all that is entered so far.

        Raises:
            LedgerError: It is damaged, of another mechanism, or holds steps while this ledger
                does too.
            FolderInUseError: Another process writes to it.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file, path)
            file.seek(0)
            text = file.read()
            if not text.endswith("\n"):
                # A line that was cut off is of a step that never moved a weight.
                text = text[: text.rfind("\n") + 1]
                file.truncate(len(text.encode("utf-8")))
            if text:
                if self._releases:
                    raise LedgerError(f"{path} holds another ledger; choose another path.")
                self._read(path, text)
            else:
                _write(file, path, self._header(), *(_to_plain(release) for release in self))
        except BaseException:
            file.close()
            raise
        self.close()
        self._file, self.path = file, path

    def close(self) -> None:
        """Give the file back; later steps are kept in memory only."""
        if self._file is not None:
            self._file.close()
        self._file = self.path = None

    def _write(self, *lines: dict[str, Any]) -> None:
        if self._file is not None and self.path is not None:
            _write(self._file, self.path, *lines)

    def _enter(self, release: Release) -> None:
        z, q = float(release.noise_multiplier), float(release.sample_rate)
        if self._attested is not None:
            self._attested.charge(release.attestation, noise_multiplier=z, sample_rate=q)
        else:
            SampledGaussian(z, q)  # refuses what no accountant could hold
        self._releases[release.run, release.step] = release
        self._counts[z, q] = self._counts.get((z, q), 0) + 1
        self._reached[release.run] = max(self.reached(release.run), release.step + 1)

    @staticmethod
    def _same(old: Release, new: Release) -> bool:
        if (old.noise_multiplier, old.sample_rate, old.sum_digest) != (
            new.noise_multiplier,
            new.sample_rate,
            new.sum_digest,
        ):
            return False
        if old.attestation is None or new.attestation is None:
            return old.attestation is new.attestation
        return (old.attestation.seed_digest, old.attestation.matrix_digest) == (
            new.attestation.seed_digest,
            new.attestation.matrix_digest,
        )

    def _header(self) -> dict[str, Any]:
        layers = self.mechanism.layers
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "adjacency": self.mechanism.adjacency,
            "layers": None if layers is None else [list(layer) for layer in layers],
        }

    def _read(self, path: Path, text: str) -> None:
        header, *lines = text.splitlines()
        try:
            found = json.loads(header)
        except json.JSONDecodeError:
            found = None
        if found != self._header():
            raise LedgerError(
                f"{path} is no ledger of this mechanism: it begins with {header[:200]!r}, wanted "
                f"{json.dumps(self._header())}."
            )
        for number, line in enumerate(lines, start=2):
            try:
                self._enter(_from_plain(json.loads(line)))
            except Exception as error:
                raise LedgerError(f"Line {number} of {path} is damaged: {error}") from error


def _write(file: IO[str], path: Path, *lines: dict[str, Any]) -> None:
    """Append ``lines``, and what an earlier failure kept in the buffer, down to the disk."""
    try:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be written: {error.strerror}. No weight moved; make room, and go on "
            "from the last checkpoint."
        ) from error


def _to_plain(release: Release) -> dict[str, Any]:
    return asdict(release)


def _from_plain(data: dict[str, Any]) -> Release:
    if set(data) != _STEP_FIELDS or not isinstance(data["run"], str):
        raise ValueError(f"expected the fields {sorted(_STEP_FIELDS)}")
    attestation = data["attestation"]
    if attestation is not None:
        layers = tuple(tuple(layer) for layer in attestation["layers"])
        attestation = ProjectionAttestation(**{**attestation, "layers": layers})
    return Release(
        run=data["run"],
        step=_validate.integer("step", data["step"], 0),
        sum_digest=data["sum_digest"],
        noise_multiplier=data["noise_multiplier"],
        sample_rate=data["sample_rate"],
        attestation=attestation,
    )


def _lock(file: IO[str], path: Path) -> None:
    """Keep other processes out; the lock goes with the process."""
    with suppress(ImportError):  # a system without it has no lock
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FolderInUseError(
                f"Another process writes to {path}; give every run a ledger of its own."
            ) from None
