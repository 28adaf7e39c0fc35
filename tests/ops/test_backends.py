"""The choice of a backend: precedence, reasons, errors, and that torch.compile sees it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from palette import ops
from palette.ops import _backends

HEAVY = ("triton", "skimage", "matplotlib", "omegaconf", "tensorboard", "PIL", "scipy", "yaml")


@pytest.fixture
def environment(monkeypatch) -> Iterator[pytest.MonkeyPatch]:
    """An environment to change; the choice of backends is as before afterwards."""
    yield monkeypatch
    monkeypatch.undo()
    _backends.survey()


def chosen(op: str = "noise", device: str = "cpu") -> str:
    return _backends.choose(op, device)


def test_every_backend_is_there_or_has_a_reason() -> None:
    assert {"attention", "dropout", "group_norm_silu", "noise", "reverse_step"} <= set(ops.names())
    for op in ops.names():
        here, absent = ops.backends(op), ops.absences(op)
        assert here[0] == "reference"
        assert not set(here) & set(absent)
        assert {"reference", "cpp", "cuda", "triton"} <= set(here) | set(absent)
        assert all(reason for reason in absent.values())
        for device in ("cpu", "cuda", "mps"):
            assert ops.default(op, device) in here
        assert ops.default(op, "mps") == "reference"


def test_unknown_op() -> None:
    for function in (ops.backends, ops.absences):
        with pytest.raises(ValueError, match="op is 'conv', wanted one of adamw, attention"):
            function("conv")
    with pytest.raises(ValueError, match="op is 'conv'"):
        ops.default("conv", "cpu")


def test_use_comes_before_the_environment_and_the_table(environment) -> None:
    environment.delenv("PALETTE_BACKEND", raising=False)
    _backends.survey()
    table = ops.default("attention", "cpu")
    assert chosen("attention") == table
    assert table in ops.backends("attention")
    environment.setenv("PALETTE_BACKEND", "reference")
    _backends.survey()
    assert chosen("attention") == "reference"
    assert ops.default("attention", "cpu") == table
    with ops.use("sdpa"):
        assert chosen("attention") == "sdpa"
        with ops.use("reference"):
            assert chosen("attention") == "reference"
        assert chosen("attention") == "sdpa"
    with pytest.raises(KeyError), ops.use("sdpa"):
        raise KeyError
    assert chosen("attention") == "reference"


def test_ops_and_devices_without_it_keep_their_default() -> None:
    with ops.use("sdpa"):
        assert chosen("noise") == ops.default("noise", "cpu")
        assert chosen("attention", "cuda") == "sdpa"
    if "cpp" in ops.backends("noise"):
        with ops.use("cpp"):
            assert chosen("noise", "cuda") == ops.default("noise", "cuda")
            assert chosen("reverse_step") == ops.default("reverse_step", "cpu")


def test_a_backend_that_is_not_there_is_refused(environment) -> None:
    with pytest.raises(ValueError, match="backend is 'cudnn', wanted one of reference, cpp"):
        ops.use("cudnn").__enter__()
    absent = {name for op in ops.names() for name in ops.absences(op)}
    missing = absent - {name for op in ops.names() for name in ops.backends(op)}
    for name in missing:
        with pytest.raises(ValueError, match=f"backend is '{name}', which no op has here: .+"):
            ops.use(name).__enter__()
    environment.setenv("PALETTE_BACKEND", "fast")
    with pytest.raises(ValueError, match="PALETTE_BACKEND is 'fast', wanted one of reference"):
        _backends.survey()


def test_import_brings_torch_and_nothing_heavy() -> None:
    code = f"import palette.ops, sys; print([m for m in {HEAVY} if m in sys.modules])"
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    with_torch = subprocess.run(
        [sys.executable, "-c", code.replace("palette.ops", "torch")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout == with_torch.stdout


def step_of_a_network(x, weight, qkv, seeds, table, step, state):
    """Every op once, as a sampler's step would call them."""
    h = ops.group_norm_silu(x, weight, None, 4)
    h = h + ops.attention(qkv, 2, "legacy")
    h = ops.dropout(h, seeds, 0.3, 2)
    z = ops.noise(seeds, step, x.shape[1:])
    ops.reverse_step(state, h + z, table, step, seeds=seeds)
    return h


def inputs(size: int = 4) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, size, size, generator=g).contiguous(memory_format=torch.channels_last)
    qkv = torch.randn(2, 24, size, size, generator=g)
    table = torch.tensor([[1.1, -0.4, 0.3, 0.7, 0.0, 0.2]])
    state = torch.randn(2, 8, size, size, generator=g)
    return [x, torch.ones(8), qkv, torch.tensor([1, 2]), table, torch.tensor(0), state]


def test_compiled_whole_and_again_when_the_backend_changes() -> None:
    """fullgraph=True allows no graph break; the graph holds the chosen backend's calls."""
    graphs = []

    def keep(module: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append({str(node.target).removesuffix(".default") for node in module.graph.nodes})
        return module

    torch._dynamo.reset()
    compiled = torch.compile(step_of_a_network, backend=keep, fullgraph=True)
    for backend in ("reference", None, "reference"):
        with ops.use(backend) if backend else torch.no_grad():
            arguments, plain = inputs(), inputs()
            result, wanted = compiled(*arguments), step_of_a_network(*plain)
        assert torch.equal(result, wanted)
        assert torch.equal(arguments[-1], plain[-1])
    by_default = {op for op in ops.names() if ops.default(op, "cpu") not in ("reference", "sdpa")}
    assert not any("palette" in target for target in graphs[0])
    for op in by_default - {"adamw"}:  # whose place is after a network
        assert f"palette.{op}" in graphs[1]
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend) -> None:
    """With the result, the state and the gradients, and with sizes that change."""
    torch._dynamo.reset()

    def loss(x, weight, qkv):
        h = ops.group_norm_silu(x, weight, None, 4) + ops.attention(qkv, 2, "legacy")
        return (h * h).sum()

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=backend != "inductor")
    for size in (4, 6) if backend != "inductor" else (4,):
        gradients = []
        for function in (compiled, loss):
            leaves = [each.requires_grad_() for each in inputs(size)[:3]]
            function(*leaves).backward()
            gradients.append([each.grad for each in leaves])
        for ours, wanted in zip(*gradients, strict=True):
            assert ours.stride() == wanted.stride()
            assert torch.allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    step = torch.compile(step_of_a_network, backend=backend, fullgraph=True)
    arguments, plain = inputs(), inputs()
    with torch.no_grad():
        result, wanted = step(*arguments), step_of_a_network(*plain)
    assert torch.allclose(result, wanted, rtol=1e-5, atol=1e-5)
    assert torch.allclose(arguments[-1], plain[-1], rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
