"""The tiny training run that the tests of this folder share, and how to run it in two processes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module ``tiny_run`` beside this file."""
    return _beside("tiny_run")


@pytest.fixture(scope="session")
def two() -> ModuleType:
    """The module ``two_processes`` beside this file."""
    return _beside("two_processes")


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
