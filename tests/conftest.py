"""Numbers of the published code, the rule by which its test weights follow from their names, and
how long hypothesis searches."""

from __future__ import annotations

import importlib.util
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

# The same examples every time in the suite; many new ones with --hypothesis-profile=soak.
settings.register_profile(
    "suite",
    max_examples=50,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile(
    "soak", settings.get_profile("suite"), max_examples=3000, derandomize=False
)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """Read a golden file: arrays become tensors, JSON texts become objects."""

    def read(name: str) -> dict[str, Any]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {
                key: json.loads(str(value)) if value.dtype.kind == "U" else torch.from_numpy(value)
                for key, value in arrays.items()
            }

    return read


@pytest.fixture(scope="session")
def fill_by_name() -> Callable[[nn.Module], None]:
    """Give every weight the value that belongs to its name."""

    def value(name: str, shape: torch.Size) -> Tensor:
        z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
        if name.endswith("bias"):
            z = 0.1 * z
        elif len(shape) == 1:
            z = 1 + 0.1 * z
        else:
            z = z / np.sqrt(np.prod(shape[1:]))
        return torch.from_numpy(z.astype(np.float32))

    def fill(module: nn.Module) -> None:
        weights = module.state_dict()
        module.load_state_dict({name: value(name, old.shape) for name, old in weights.items()})

    return fill


@pytest.fixture(scope="session")
def published_shapes() -> Callable[[str], list[tuple[str, tuple[int, ...]]]]:
    """Read a list of weight names and shapes, in the order of the published state dict."""

    def read(name: str) -> list[tuple[str, tuple[int, ...]]]:
        lines = (GOLDEN / f"{name}.txt").read_text().splitlines()
        pairs = (line.split() for line in lines)
        return [(key, tuple(int(size) for size in shape.split(","))) for key, shape in pairs]

    return read


@pytest.fixture(scope="session")
def browser_page() -> Iterator[Any]:
    """A page of a headless Chromium without network: see ``browser.py`` beside this file."""
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).with_name("browser.py"))
    assert spec is not None
    assert spec.loader is not None
    browser = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(browser)
    if browser.find() is None:
        pytest.skip(browser.ABSENT)
    with browser.browser() as page:
        yield page
