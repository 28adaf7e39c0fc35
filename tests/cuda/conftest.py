"""Compiles the CUDA library for the CPU, once for all tests of this folder."""

from __future__ import annotations

import importlib.util
import shutil
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
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of csrc/cuda, for raw launches."""
    sources = sorted((HERE.parents[1] / "csrc/cuda").glob("*.cu"))
    return _module().kernels(sources, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="session")
def bindings(kernels: Path) -> Path:
    """The same with csrc/ops.cpp, for torch."""
    return _module().bindings(kernels)


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of broken.cu."""
    return _module().kernels([HERE / "broken.cu"], tmp_path_factory.mktemp("broken"))
