"""What SECURITY.md claims, where a machine can look."""

from __future__ import annotations

import ast
import logging
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lora_privacy.training import NoiseMultiplier, PrivateTraining, make_private
from lora_privacy.training import randomness as module
from lora_privacy.training.randomness import KeyedRandomness, SystemRandomness, new_key

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# Modules that unpickle or run what they are given, and calls that do.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "subprocess"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}


def dangers(source: str) -> list[str]:
    """What in ``source`` can run code that came with data."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in CALLS and not (
                name == "torch.load" and given.get("weights_only") == "True"
            ):
                found.append(name)
            if name in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
                found.append(name)
            for word in ("shell", "trust_remote_code", "allow_pickle"):
                found += [word] if given.get(word, "False") != "False" else []
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if key is not None and ast.unparse(key) == "'trust_remote_code'":
                    found += ["trust_remote_code"] if ast.unparse(value) != "False" else []
    return found


def test_nothing_in_the_library_runs_what_it_reads() -> None:
    assert len(SOURCES) > 50
    assert {str(path): dangers(path.read_text("utf-8")) for path in SOURCES} == {
        str(path): [] for path in SOURCES
    }


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from yaml import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "eval(x)",
        "exec(x)",
        "subprocess.run(x, shell=True)",
        "np.load(f)",
        "f(trust_remote_code=True)",
        "{'trust_remote_code': ask}",
        "os.system(x)",
    ],
)
def test_the_check_sees_what_it_looks_for(source: str) -> None:
    assert dangers(source)


NO_NETWORK = """
import importlib, pkgutil, socket, sys

def refuse(*_, **__):
    raise SystemExit("connected to the network")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
import lora_privacy
for found in pkgutil.walk_packages(lora_privacy.__path__, "lora_privacy."):
    importlib.import_module(found.name)
from lora_privacy.data import tickets
assert len(tickets(10, seed=0)) == 10
"""


def test_no_import_connects_to_the_network() -> None:
    """Every module in one process; a script that does connect is seen to."""
    guard = NO_NETWORK.partition("import lora_privacy")[0]
    for script, code in ((NO_NETWORK, 0), (f"{guard}socket.getaddrinfo('localhost', 1)", 1)):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == code, done.stderr


def training(**options: object) -> PrivateTraining:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    data = TensorDataset(torch.ones(12, 4), torch.arange(12) % 2)
    return make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        DataLoader(data, batch_size=6),
        method="dp-sgd",
        max_grad_norm=1.0,
        privacy=NoiseMultiplier(1.0),
        delta=1e-5,
        **options,  # pyright: ignore[reportArgumentType]
    )


def test_the_default_draws_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise and batches ask for its bytes, and equal global seeds do not make them equal."""
    private = training()
    assert isinstance(private.randomness, SystemRandomness)
    private.close()
    asked: list[int] = []
    original = module.os.urandom

    def counted(size: int) -> bytes:
        asked.append(size)
        return original(size)

    monkeypatch.setattr(module.os, "urandom", counted)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  what must have no effect
        random.seed(0)
        draws.append(SystemRandomness().normal(100, "noise", 0))
    assert sum(asked) >= 2 * 2 * 8 * 50  # a radius and an angle for each pair of numbers
    assert not set(draws[0]) & set(draws[1])


def test_no_seed_is_used_twice() -> None:
    """Oracle: 128 bits drawn 10,000 times collide with probability below 2**-100."""
    source = SystemRandomness()
    assert len({source.seed("projection", 0) for _ in range(10_000)}) == 10_000
    assert new_key() != new_key()


def test_a_key_is_in_no_text(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Neither repr, log nor release: the key is in one file of the checkpoint."""
    caplog.set_level(logging.DEBUG)
    key = new_key()
    assert key.hex() not in repr(KeyedRandomness(key))
    assert repr(key) not in repr(KeyedRandomness(key))
    private = training(deterministic=True, secure=False)
    assert isinstance(private.randomness, KeyedRandomness)
    secret = private.randomness.key
    private.save(tmp_path / "checkpoint")
    private.release(tmp_path / "release")
    texts = [caplog.text, repr(private), str(private.bound()), repr(private.randomness)]
    assert not [text for text in texts if secret.hex() in text or repr(secret) in text]
    forms = (secret, secret.hex().encode())
    holders = [
        path.relative_to(tmp_path).as_posix()
        for path in tmp_path.rglob("*")
        if path.is_file() and any(form in path.read_bytes() for form in forms)
    ]
    assert holders == ["checkpoint/private/key.hex"]
    private.close()
