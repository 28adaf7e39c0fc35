"""Somebody else's network, and how two networks are compared."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn


def _load() -> ModuleType:
    """guided.py beside this file: with --import-mode=importlib it is on no import path."""
    spec = importlib.util.spec_from_file_location(
        "somebody_elses_guided", Path(__file__).with_name("guided.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def guided() -> ModuleType:
    """The module ``guided`` beside this file."""
    return _load()


@pytest.fixture
def fill() -> Callable[[nn.Module], nn.Module]:
    """Give every parameter random values (many layers begin at zero) and return the module."""

    def fill(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
                parameter.normal_(generator=generator).mul_(fan_in**-0.5)
        return module

    return fill


@pytest.fixture
def close() -> Callable[[Tensor, Tensor], bool]:
    """Whether two float32 results are equal to rounding."""

    def close(a: Tensor, b: Tensor) -> bool:
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        return bool((a - b).abs().max() <= 2e-5 * b.abs().max())

    return close


@pytest.fixture
def gradients() -> Callable[..., dict[str, Tensor]]:
    """Gradients of the mean square of the output, by parameter, and the input's as "input"."""

    def gradients(network: nn.Module, x: Tensor, *rest: object) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        network.zero_grad()
        torch.manual_seed(3)  # for dropout
        output = network(x, *rest)
        (output if isinstance(output, Tensor) else output.sample).square().mean().backward()
        found = {name: each.grad for name, each in network.named_parameters()}
        assert x.grad is not None
        return {"input": x.grad, **{n: g.clone() for n, g in found.items() if g is not None}}

    return gradients
