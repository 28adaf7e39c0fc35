"""Which ops pass their own tests here: no figure is printed for one that does not.

    python benchmarks/proven.py     # all of them, and what the networks' layers ask of them

That they passed is remembered in pytest's cache for as long as libraries, kernels, tests, torch and
device stay what they are. On a GPU only what runs on it is asked, by several processes at once.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palette import _extension, ops
from palette.info import machine

ROOT = Path(__file__).resolve().parents[1]
BACKENDS = ("cuda", "triton", "sdpa")  # for GPUs
_PLACES = [f"{name}-{on}cuda" for name in BACKENDS for on in ("on-", "")]  # in the names of tests
_failed: dict[str, bool] = {}


def command(*names: str) -> list[str]:
    """Runs tests/ops/test_<name>.py of each and notes the ops that pass."""
    ran = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-p", "proven"]
    ran += ["-m", "not soak"]
    if torch.cuda.is_available():
        ran += ["-k", " or ".join([*_PLACES, "fuzz"])]
        if importlib.util.find_spec("xdist") is not None:
            ran += ["-n", "12", "--dist", "loadgroup"]
    return [*ran, *(f"tests/ops/test_{name}.py" for name in names)]


def environment() -> dict[str, str]:
    """In which pytest finds this file."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in paths if each)}


def failure(op: str, cache: pytest.Cache | None) -> str:
    """What fails first among the tests of ``op``, "" where nothing does."""
    if torch.cuda.is_available() and not set(BACKENDS) & set(ops.backends(op)):
        return ""  # plain PyTorch
    if cache is not None and cache.get(_key(op), None) == _digest():
        return ""
    return _first_failure(op)


@functools.cache
def _first_failure(op: str) -> str:
    ran = subprocess.run(
        [*command(op), "-x"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    if ran.returncode == 0:
        return ""
    said = (ran.stdout + ran.stderr).splitlines()
    return next((line for line in said if line.startswith(("FAILED", "ERROR"))), said[-1])


def _key(op: str) -> str:
    return f"palette/proven/{op}"


@functools.cache
def _digest() -> str:
    files = [half.library for half in _extension.load().values() if half.library is not None]
    for pattern in ("palette/ops/*.py", "kernels/*.py", "tests/ops/*.py"):
        files += sorted(ROOT.glob(pattern))
    digest = hashlib.sha256(f"{torch.__version__} {machine()['gpu']}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """As a plugin: note for each op whether any of its tests has failed."""
    found = re.search(r"tests/ops/test_(\w+)\.py", report.nodeid)
    if found and found[1] in ops.names() and (report.failed or report.when == "call"):
        _failed[found[1]] = _failed.get(found[1], False) or report.failed


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Remember it, if the run was not stopped."""
    whole = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if not whole or session.config.cache is None or hasattr(session.config, "workerinput"):
        return
    for op, failed in _failed.items():
        session.config.cache.set(_key(op), "" if failed else _digest())


if __name__ == "__main__":
    every = command(*ops.names(), "layer_shapes", "fuzz")
    sys.exit(subprocess.call(every, cwd=ROOT, env=environment()))
