"""Compiles the CUDA library for the CPU, once for all tests of this folder."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def _module():
    if shutil.which("g++") is None:
        pytest.skip("the CUDA sources are compiled with g++, which is not here")
    return _load()


def _load():
    """emulated.py beside this file: with --import-mode=importlib it is on no import path."""
    spec = importlib.util.spec_from_file_location("palette_emulated", HERE / "emulated.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable], Path]:
    """``once(name, build)``: what ``build(folder)`` returns, built by one of pytest's workers."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def build_once(name: str, build: Callable[[Path], Path]) -> Path:
        folder = shared / name
        folder.mkdir(exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
            built = folder / "built"
            if not built.exists():
                built.write_text(str(build(folder)))
            return Path(built.read_text())

    return build_once


@pytest.fixture(scope="session")
def kernels(once) -> Path:
    """The library of csrc/cuda, for raw launches."""
    sources = sorted((HERE.parents[1] / "csrc/cuda").glob("*.cu"))
    return once("emulated", lambda folder: _module().kernels(sources, folder))


@pytest.fixture(scope="session")
def bindings(once, kernels: Path) -> Path:
    """The same with csrc/ops.cpp, for torch."""
    return once("bindings", lambda _: _module().bindings(kernels))


@pytest.fixture(scope="session")
def broken(once) -> Path:
    """The library of broken.cu."""
    return once("broken", lambda folder: _module().kernels([HERE / "broken.cu"], folder))
