"""Mutation testing of ``noise`` and ``dp``: break a line, and see a test fail (make mutation).

    OMP_NUM_THREADS=1 python benchmarks/mutation.py [--mutants 400] [--seed N] [--fresh | --again]

Cosmic Ray lists the places where an operator applies and writes the changed source; a sample of
them is drawn by seed. A mutant's suite is the tests and doctests of the two packages that run its
statement, the fastest first, up to 10 s in all. It is killed if one of them fails or its time is
up, and survives if all pass or none runs it. All is done in a copy of the tree, which ``--fresh``
takes anew; tests are timed, and coverage measured, once a copy. Each result is a line of
reports/mutation.jsonl at once, and a rerun goes on from there. ``--again`` takes a fresh copy and
runs those of the seed that survived. Which changes are made: _mutants.py. What was found:
docs/testing.md.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import fcntl
import hashlib
import importlib
import itertools
import json
import os
import py_compile
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coverage
import pytest

from _mutants import Place, changed, difference, places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "reports" / "mutation.jsonl"
FOLDER = ROOT / "reports" / "mutation"
TREE = FOLDER / "tree"
SEED = 20240917
PACKAGES = ("src/lora_privacy/noise", "src/lora_privacy/dp")
SUITES = ["tests/noise", "tests/dp", *PACKAGES]
SUITE_SECONDS = 10.0
MEMORY = 16 << 30  # a changed size must not bring the machine down
# Imported once, before any child is forked.
HEAVY = ["numpy", "scipy.stats", "scipy.optimize", "scipy.integrate", "mpmath", "hypothesis"]
HEAVY += ["torch", "opacus", "dp_accounting.pld.privacy_loss_distribution", "dp_accounting.rdp"]

ALIVE = ("survived", "no test")


class Watch:
    """Plugin of pytest: seconds of each test with its fixtures, what failed, and contexts."""

    def __init__(self, cov: coverage.Coverage | None = None) -> None:
        self.cov, self.seconds, self.failed = cov, dict[str, float](), list[str]()

    # ruff: noqa: D102
    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if self.cov:
            self.cov.switch_context(item.nodeid)
        start = time.process_time()
        result = yield
        self.seconds[item.nodeid] = time.process_time() - start
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(f"import of {report.nodeid}")


def forked(job: Callable[[], object], cpu: float) -> tuple[str, Any]:
    """How a child process that runs ``job`` ends, within ``cpu`` seconds, and what it returns."""
    answer = FOLDER / "answer"
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.dup2(os.open(FOLDER / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
            os.dup2(1, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 1))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.chdir(TREE)
            sys.path.insert(0, str(TREE / "src"))
            os.environ["PYTHONPATH"] = str(TREE / "src")
            answer.write_text(json.dumps(job()), encoding="utf-8")
        finally:
            os._exit(0)
    deadline = time.monotonic() + 30 * cpu
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    with suppress(ProcessLookupError):  # what it has started itself
        os.killpg(pid, signal.SIGKILL)
    if answer.exists():
        return "done", json.loads(answer.read_text(encoding="utf-8"))
    late = os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) in (signal.SIGXCPU, signal.SIGKILL)
    return ("timeout" if late else "crash"), None


def run(tests: list[str], watch: Watch, *options: str) -> Watch:
    plain = ["-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *options]
    code = pytest.main([*plain, *tests], plugins=[watch])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not watch.failed:
        watch.failed.append(f"pytest: {code}")
    return watch


def prepare() -> None:
    """Copy the tree, time each test, and keep which lines and branches it runs."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, TREE / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("docs", "pyproject.toml"):
        (TREE / name).symlink_to(ROOT / name)
    # By hash and not by time: a change in the same second and of the same size must be seen.
    by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(TREE / "src", quiet=1, invalidation_mode=by_hash)

    def measure() -> dict[str, object]:
        data = str(FOLDER / "coverage")
        cov = coverage.Coverage(data, branch=True, config_file=False, source=PACKAGES)
        cov.start()
        watch = run(SUITES, Watch(cov))
        cov.stop()
        cov.save()
        with (FOLDER / "coverage.txt").open("w") as file:
            cov.report(file=file, show_missing=True)
            for package in PACKAGES:
                print(package, round(cov.report(include=f"{package}/*"), 2), "%", file=file)
        return {"seconds": watch.seconds, "failed": watch.failed}

    how, found = forked(measure, 3600)
    if how != "done" or found["failed"]:
        sys.exit(f"the suites must pass before a change: {how}, {found and found['failed']}")
    (FOLDER / "tests.json").write_text(json.dumps(found["seconds"]), encoding="utf-8")


class Suites:
    """Which tests to run for a change, from the coverage of the unchanged source."""

    def __init__(self) -> None:
        self.seconds = json.loads((FOLDER / "tests.json").read_text(encoding="utf-8"))
        self._data = coverage.CoverageData(FOLDER / "coverage")
        self._data.read()
        self._paths = [path for p in PACKAGES for path in sorted((TREE / p).glob("*.py"))]

    def of(self, place: Place) -> list[str]:
        """Tests that run the statement, the fastest first, up to ``SUITE_SECONDS``."""
        tests = self._of(place) & self.seconds.keys()
        ranked = sorted(tests, key=lambda test: (self.seconds[test], test))
        total = itertools.accumulate(self.seconds[test] for test in ranked)
        return [test for test, sum_ in zip(ranked, total, strict=True) if sum_ <= SUITE_SECONDS]

    def _of(self, place: Place) -> set[str]:
        path = TREE / place.path
        node, first, last = statement(path, place.line)
        found = self._running(path, range(first, last + 1))
        if found - {""}:
            return found
        # It runs on import only, or never: who calls the function, or reads the name?
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= self._running(path, range(first, (node.end_lineno or last) + 1))
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            word = re.compile(rf"\b(?:{'|'.join(names)})\b")
            for other in self._paths:
                lines = enumerate(other.read_text(encoding="utf-8").splitlines(), 1)
                found |= self._running(other, [i for i, line in lines if word.search(line)])
        if found == {""}:
            found |= self._running(path, range(1, 10_000))
        return found

    def _running(self, path: Path, lines: range | list[int]) -> set[str]:
        contexts = self._data.contexts_by_lineno(str(path))
        return {test for line in lines for test in contexts.get(line, ())}


def statement(path: Path, line: int) -> tuple[ast.AST, int, int]:
    """Innermost statement at ``line``, its first line, and its last or that of its head."""
    best: tuple[ast.AST, int, int] | None = None
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            marks = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(mark.lineno for mark in marks)])
            last = node.end_lineno or node.lineno
            if first <= line <= last and (best is None or first >= best[1]):
                body = getattr(node, "body", [])
                head = max(first, body[0].lineno - 1) if body else last
                best = node, first, head
    if best is None:
        sys.exit(f"no statement at {path}:{line}")
    return best


def verdict(place: Place, source: str, suites: Suites) -> dict[str, object]:
    """What became of one change, and the test that failed."""
    tests = suites.of(place)
    if not tests:
        return {"status": "no test"}
    path = TREE / place.path
    before = path.read_text(encoding="utf-8")
    start = time.monotonic()
    try:
        path.write_text(source, encoding="utf-8")
        how, failed = forked(lambda: run(tests, Watch(), "-x").failed, 10 + 2 * SUITE_SECONDS)
    finally:
        path.write_text(before, encoding="utf-8")
    status = ("killed" if failed else "survived") if how == "done" else how
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "by": failed, "tests": len(tests), "seconds": seconds}


def summarise(latest: dict[str, dict[str, Any]]) -> None:
    """Print a table by module, and what survived."""
    alive = [r for r in latest.values() if r["status"] in ALIVE]
    print(f"\n{'module':<40} {'mutants':>7} {'killed':>6} {'timeout':>7} {'alive':>5} {'rate':>6}")
    for module in [*sorted({r["path"] for r in latest.values()}), ""]:
        count = Counter(r["status"] for r in latest.values() if r["path"].startswith(module))
        total, left = count.total(), sum(count[status] for status in ALIVE)
        name = module.removeprefix("src/lora_privacy/") or "all"
        killed = total - left - count["timeout"]
        rate = f"{1 - left / total:.1%}"
        print(f"{name:<40} {total:>7} {killed:>6} {count['timeout']:>7} {left:>5} {rate:>6}")
    for r in sorted(alive, key=lambda r: (r["path"], r["line"])):
        print(f"\n{r['path']}:{r['line']} ({r['status']})\n  - {r['before']}\n  + {r['after']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=400)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--fresh", action="store_true", help="take a new copy of the tree")
    parser.add_argument("--again", action="store_true", help="run survivors on a new copy")
    options = parser.parse_args()
    RECORDS.parent.mkdir(exist_ok=True)
    lock = RECORDS.with_suffix(".lock").open("w")  # two runs would change each other's source
    fcntl.flock(lock, fcntl.LOCK_EX)
    for name in HEAVY:
        importlib.import_module(name)
    if options.fresh or options.again or not (FOLDER / "tests.json").exists():
        prepare()
    sys.dont_write_bytecode = True
    files = [path for p in ("src", "tests") for path in sorted((TREE / p).rglob("*.py"))]
    tree = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    drawn = [r for r in map(json.loads, lines) if r["seed"] == options.seed]
    latest = {r["key"]: r for r in drawn}
    if drawn and drawn[0]["tree"] != tree and not options.again:
        sys.exit("this seed was drawn from another copy: take another --seed, or --again")
    found = [
        place
        for p in PACKAGES
        for f in sorted((TREE / p).glob("*.py"))
        for place in places(TREE, f)
    ]
    random.Random(options.seed).shuffle(found)
    if options.again:
        found = [p for p in found if p.key in latest and latest[p.key]["status"] in ALIVE]
    suites, count = Suites(), 0
    for place in found:
        if count == options.mutants:
            break
        if place.key in latest and not options.again:
            count += 1
            continue
        if (source := changed(TREE, place)) is None:
            continue
        count += 1
        record: dict[str, Any] = {"seed": options.seed, "tree": tree, "key": place.key}
        record |= {"path": place.path, "line": place.line}
        record |= difference((TREE / place.path).read_text(encoding="utf-8"), source)
        record |= verdict(place, source, suites)
        with RECORDS.open("a", encoding="utf-8") as file:
            print(json.dumps(record, ensure_ascii=False), file=file)
        latest[place.key] = record
        print(f"{count} {record['status']}: {place.path}:{place.line} {record['after']}")
    if latest:
        summarise(latest)


if __name__ == "__main__":
    main()
