"""The published configs as a module that tests can ask for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def configs() -> ModuleType:
    path = Path(__file__).with_name("published_configs.py")
    spec = importlib.util.spec_from_file_location("published_configs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
