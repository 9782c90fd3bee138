"""Checkpoints to go on from, and releases to give away. Safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_privacy import _validate
from lora_privacy.core import FLoRALinear, LoRALinear, save_flora, save_peft
from lora_privacy.errors import LedgerError, StorageError
from lora_privacy.training.randomness import KEY_BYTES

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_privacy.dp import PrivacyBound
    from lora_privacy.training.ledger import Ledger

__all__ = ["LEDGER", "PRIVATE", "STATE", "SavedState", "load", "release", "save"]

STATE = "training_state.safetensors"
LEDGER = "ledger.jsonl"
PRIVATE = "private"
BOUND = "privacy.json"
_KEY = "key.hex"
_PEFT_PREFIX = "base_model.model."
_FORMAT = "lora-privacy training"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """What a checkpoint says beside its tensors.

    Attributes:
        noise_multiplier: z.
        budget: Steps that the target pays for, in all; None without a target.
        step: Steps taken.
        charged: Releases in the ledger then.
        profiled: Whether something was recorded before its noise.
        key: Key of the randomness of a deterministic training.
        generator: State of torch's global generator, which dropout draws from, in such a training.
    """

    noise_multiplier: float
    budget: int | None
    step: int
    charged: int
    profiled: bool
    key: bytes | None
    generator: Tensor | None


def save(
    folder: Path,
    *,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    facts: dict[str, Any],
    key: bytes | None,
) -> Path:
    """Write a checkpoint; the file with the tensors is replaced in one move.

    Args:
        folder: Made if absent.
        optimizer: Its state goes along.
        parameters: Path -> trained parameter.
        facts: What ``load`` compares and returns.
        key: Key of the randomness, for a deterministic training; it goes into ``private``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if key is not None:
        private = folder / PRIVATE
        private.mkdir(mode=0o700, exist_ok=True)
        _write_private(private / _KEY, key.hex())
        state: dict[str, Tensor] = {"state": torch.get_rng_state()}
        # By step, so that a crash leaves the one that fits the state.
        _write(_generator(folder, facts["step"]), state, {})
    tensors = {f"weight.{path}": parameter.detach() for path, parameter in parameters.items()}
    groups: list[dict[str, Any]] = []
    state_dict = optimizer.state_dict()
    numbers: dict[str, dict[str, Any]] = {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value.detach()
            else:
                numbers.setdefault(str(index), {})[name] = value
    for group in state_dict["param_groups"]:
        groups.append({name: _plain(name, value) for name, value in group.items()})
    _write(
        folder / STATE,
        tensors,
        {**facts, "format": _FORMAT, "version": _VERSION, "groups": groups, "numbers": numbers},
    )
    for old in (folder / PRIVATE).glob("generator-*.safetensors"):
        if old != _generator(folder, facts["step"]):
            old.unlink()
    return folder


def load(
    folder: Path,
    *,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    settings: dict[str, Any],
    ledger: Ledger,
    deterministic: bool,
) -> SavedState:
    """Put a checkpoint into the parameters and the optimizer, **in place**.

    Nothing is changed when an error is raised.

    Raises:
        StorageError: The file is missing, damaged, of other settings or of another model.
        LedgerError: ``ledger`` does not begin with the steps of the checkpoint.
    """
    try:
        return _load(folder, optimizer, parameters, settings, ledger, deterministic)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StorageError(
            f"{folder / STATE} is damaged ({type(error).__name__}: {error}); go on from another "
            "checkpoint."
        ) from error


def _load(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    settings: dict[str, Any],
    ledger: Ledger,
    deterministic: bool,
) -> SavedState:
    path = folder / STATE
    tensors, facts = _read(path)
    if facts.get("format") != _FORMAT or facts.get("version") != _VERSION:
        raise StorageError(f"{path} is no checkpoint of a private training.")
    saved = facts["settings"]
    wanted = json.loads(json.dumps(settings))
    differing = [key for key in wanted if saved.get(key) != wanted[key]]
    if differing:
        key = differing[0]
        raise StorageError(
            f"The checkpoint in {folder} is of a training with {key} = {saved.get(key)!r}, this "
            f"one has {wanted[key]!r}. Resume with the same arguments, or begin anew."
        )
    step = _validate.integer("step", facts["step"], 0)
    _validate.positive("noise_multiplier", facts["noise_multiplier"])
    if facts["budget"] is not None:
        _validate.integer("budget", facts["budget"], 0)
    charged = _validate.integer("charged", facts["charged"], 0)
    found = SavedState(
        key=_key(folder) if deterministic else None,
        generator=_read(_generator(folder, step))[0]["state"] if deterministic else None,
        noise_multiplier=float(facts["noise_multiplier"]),
        budget=facts["budget"],
        step=step,
        charged=charged,
        profiled=bool(facts["profiled"]),
    )
    if len(ledger) < charged or ledger.digest(charged) != facts["ledger"]:
        raise LedgerError(
            f"{ledger.path} does not begin with the {charged} steps that were taken when "
            f"{folder} was saved: it is the ledger of another training, or has lost steps."
        )
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    if {k: tuple(v.shape) for k, v in weights.items()} != {
        k: tuple(p.shape) for k, p in parameters.items()
    }:
        raise StorageError(
            f"The checkpoint in {folder} has other trained parameters than the model: "
            f"{sorted(set(weights) ^ set(parameters))[:5] or 'other shapes'}."
        )
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise StorageError(f"{name!r} in {path} holds NaN or infinity.")
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    for index, entries in facts["numbers"].items():
        state.setdefault(int(index), {}).update(entries)
    try:
        optimizer.load_state_dict({"state": state, "param_groups": facts["groups"]})
    except ValueError as error:
        raise StorageError(f"The optimizer is not the one of {folder}: {error}") from error
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return found


def release(
    folder: Path, *, model: nn.Module, parameters: dict[str, nn.Parameter], bound: PrivacyBound
) -> Path:
    """Write the trained weights and the bound, and nothing private.

    LoRA adapters of either library come in peft's format, FLoRA as ``save_flora`` stores it,
    anything else, or what peft's format leaves out, as ``trained.safetensors``.

    Raises:
        ValueError: The folder is a checkpoint.
    """
    for name in (PRIVATE, STATE, LEDGER):
        if (folder / name).exists():
            raise ValueError(
                f"{folder} holds {name} of a checkpoint, which must not leave the machine; "
                "release into a folder of its own."
            )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(bound.to_dict(), indent=2, ensure_ascii=False) + "\n"
    _replace(folder / BOUND, text.encode("utf-8"))
    kinds = {type(module) for module in model.modules()}
    if FLoRALinear in kinds:
        save_flora(model, folder)
    elif LoRALinear in kinds:
        save_peft(model, folder)
    else:
        left = dict(parameters)
        if hasattr(model, "peft_config"):
            left = _release_peft(folder, model, left)
        if left:
            tensors = {path: parameter.detach() for path, parameter in left.items()}
            _write(folder / "trained.safetensors", tensors, {})
    return folder


def _release_peft(
    folder: Path, model: nn.Module, parameters: dict[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Write the active adapter; return the trained parameters that peft's format leaves out."""
    peft = cast("Any", model)
    if hasattr(peft, "active_adapter"):
        name = peft.active_adapter
        # The other adapters were not trained under the bound; and the hub is not asked for the
        # size of an embedding.
        peft.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        inside = folder if name == "default" else folder / name
    else:  # transformers' add_adapter
        (name,), inside = peft.active_adapters(), folder
        peft.save_pretrained(str(folder))
    with safe_open(str(inside / "adapter_model.safetensors"), framework="pt") as file:
        written = {key.removeprefix(_PEFT_PREFIX) for key in file.keys()}  # noqa: SIM118

    def plain(path: str) -> str:
        path = path.removeprefix(_PEFT_PREFIX).replace(f".modules_to_save.{name}", "")
        return path.replace(f".{name}.", ".")

    return {path: value for path, value in parameters.items() if plain(path) not in written}


def _key(folder: Path) -> bytes:
    path = folder / PRIVATE / _KEY
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} holds no key: {error}.") from error
    if len(key) != KEY_BYTES:
        raise StorageError(f"{path} must hold {KEY_BYTES} bytes, got {len(key)}.")
    return key


def _generator(folder: Path, step: int) -> Path:
    return folder / PRIVATE / f"generator-{step}.safetensors"


def _plain(name: str, value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, torch.Tensor):
        value = value.item()  # a learning rate may be a tensor
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise StorageError(
            f"The optimizer's {name} = {value!r} cannot be stored as JSON, and nothing is pickled."
        ) from None


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    # safetensors refuses tensors that share or skip memory.
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    temporary = path.with_name(path.name + ".part")
    try:
        save_file(whole, str(temporary), metadata={"facts": json.dumps(facts)})
        _sync_and_move(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written, and is as it was: {error}") from error


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    _sync_and_move(temporary, path)


def _write_private(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    _sync_and_move(temporary, path)


def _sync_and_move(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {})["facts"])
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from error
