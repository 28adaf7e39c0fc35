"""The Triton kernels where there is no GPU, beside the tests of their ops (test_interpreted.py).

What is particular to them in Triton's interpreter; and without the interpreter their shape
functions, tracing and compilation to machine code.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from functorch.compile import nop
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from palette.ops import _backends

HERE = Path(__file__).resolve().parent
HOMES = {  # of each op, a module of palette.kernels
    "attention": "attention",
    "attention_backward": "attention",
    "dropout": "dropout",
    "group_norm_silu": "group_norm_silu",
    "group_norm_silu_backward": "group_norm_silu_backward",
    "noise": "noise",
    "reverse_step": "reverse_step",
}


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    for name in HOMES.values():
        importlib.import_module(f"palette.kernels.{name}")


def test_what_is_particular_to_triton() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-x", str(HERE / "interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def calls(dtype: torch.dtype = torch.bfloat16, channels_last: bool = True) -> dict[str, tuple]:
    """Arguments of every op, on any device that is the default one."""
    x = torch.empty(2, 64, 12, 10, dtype=dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    weight, film = torch.empty(64), torch.empty(2, 128, dtype=dtype)
    statistics = torch.empty(2, 32)
    scale, shift = film[:, :64], film[:, 64:]
    seeds, step = torch.empty(2, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    state, output, slot = torch.empty(2, 3, 8, 8), x[:, :3, :8, :8], x[:, 8:11, :8, :8]
    qkv = torch.empty(2, 192, 16, 16, dtype=dtype)  # two heads of 32
    if channels_last:
        qkv = qkv.contiguous(memory_format=torch.channels_last)
    return {
        "attention": (qkv, 2, "legacy"),
        "attention_backward": (
            qkv[:, :64], qkv, qkv[:, :64], torch.empty(2, 2, 256), 2, "legacy",
        ),
        "dropout": (x, seeds, 0.2, 3),
        "group_norm_silu": (x, weight, weight, 32, 1e-5, scale, shift, True),
        "group_norm_silu_backward": (
            x, x, statistics, statistics, weight, weight, 32, scale, shift, True,
        ),
        "noise": (seeds, step, [3, 5, 7], 0, 0),
        "reverse_step": (
            state, output, torch.empty(9, 6), step, seeds, None, state, state, state[:, :1], slot,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("op", [op for op in calls() if op != "reverse_step"])
def test_shapes_equal_those_of_the_op(op, channels_last) -> None:
    with FakeTensorMode():
        arguments = calls(channels_last=channels_last)[op]
        made = getattr(torch.ops.palette, f"{op}_triton")(*arguments)
        wanted = getattr(torch.ops.palette, op)(*arguments)
    if isinstance(made, Tensor):
        made, wanted = (made,), (wanted,)
    for one, other in zip(made, wanted, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()


@pytest.mark.parametrize("op", calls())
def test_schema_equals_that_of_the_op(op) -> None:
    def signature(name: str) -> list[tuple[str, str]]:
        schema = getattr(torch.ops.palette, name).default._schema
        return [(each.name, str(each.type)) for each in schema.arguments]

    assert signature(f"{op}_triton") == signature(op)


class TracedError(Exception):
    """Ends a compilation once the graph is there: nothing here could run it."""


def test_tracing_sees_the_kernels() -> None:
    """torch.compile traces through the ops, forward and backward, down to the kernels."""
    graphs = []

    def stop(joint: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        graphs.append(str(joint.graph))
        raise TracedError

    backend = aot_autograd(fw_compiler=nop, partition_fn=stop)

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def run(x: Tensor, weight: Tensor) -> Tensor:
        op = torch.ops.palette.group_norm_silu_triton
        return op(x, weight, weight, 32, 1e-5, None, None, True)[0]

    x, weight = torch.zeros(2, 64, 12, 10, requires_grad=True), torch.zeros(64, requires_grad=True)
    with pytest.raises(BackendCompilerFailed, match="TracedError"):
        run(x, weight)
    assert len(graphs) == 1
    kernels = graphs[0].count("torch.ops.higher_order.triton_kernel_wrapper_functional")
    assert kernels == 3 + 4, graphs[0]


@pytest.mark.parametrize(("op", "kernels"), [("attention", 3), ("noise", 1), ("reverse_step", 1)])
def test_tracing_sees_every_kernel(op, kernels) -> None:
    """The same of the other ops: forward and backward where there is one."""
    graphs = []

    def stop(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Any:
        graphs.append(str(graph.graph))
        raise TracedError

    backend = aot_autograd(fw_compiler=stop, partition_fn=stop)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def run(*arguments: Any) -> Any:
        return getattr(torch.ops.palette, f"{op}_triton")(*arguments)

    given = calls(torch.float32)[op]
    first, *rest = (each.clone() if isinstance(each, Tensor) else each for each in given)
    if op == "attention":
        first.requires_grad_()
    with pytest.raises(BackendCompilerFailed, match="TracedError"):
        run(first, *rest)
    assert len(graphs) == 1
    assert graphs[0].count("torch.ops.higher_order.triton_kernel_wrapper_functional") == kernels


class Recorder:
    """Stands for a kernel: notes the arguments of its launch."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple, dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 2**31 for size in grid)
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


def compiled(kernel: Any, args: tuple, kwargs: dict[str, Any], capability: int) -> Any:
    """The kernel compiled as its first launch would."""
    options = {name: kwargs.pop(name) for name in ("num_warps",) if name in kwargs}
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif parameter.is_constexpr or value is None or value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(80, torch.float16), (90, torch.bfloat16), (100, torch.float32)],
)
def test_compiles_to_machine_code(monkeypatch, tmp_path, capability, dtype) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches: list[tuple[Any, tuple, dict[str, Any]]] = []
    with torch.device("meta"):
        arguments = calls(dtype)
    for op, home in HOMES.items():
        module = sys.modules[f"palette.kernels.{home}"]
        monkeypatch.setattr(module, "wrap_triton", lambda kernel: Recorder(kernel, launches))
        getattr(module, f"{op}_triton")._abstract_fn(*arguments[op])
    x, *rest = arguments["dropout"]  # whose kernel depends on the layout
    sys.modules["palette.kernels.dropout"].dropout_triton._abstract_fn(x.contiguous(), *rest)
    assert len({kernel for kernel, *_ in launches}) == 14
    for kernel, args, kwargs in launches:
        assert compiled(kernel, args, dict(kwargs), capability).asm["cubin"]


def test_reverse_step_rounds_every_product(monkeypatch, tmp_path) -> None:
    """No multiply-add in machine code: the reference rounds products and sums one by one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches: list[tuple[Any, tuple, dict[str, Any]]] = []
    module = sys.modules["palette.kernels.reverse_step"]
    monkeypatch.setattr(module, "wrap_triton", lambda kernel: Recorder(kernel, launches))
    with torch.device("meta"):
        state, output, table, step, _, _, history, known, mask, slot = calls()["reverse_step"]
    for noise in (None, state):  # Philox and Box-Muller may fuse what they like
        module.reverse_step_triton._abstract_fn(
            state, output, table, step, None, noise, history, known, mask, slot
        )
    for kernel, args, kwargs in launches:
        assert "fma" not in compiled(kernel, args, dict(kwargs), 90).asm["ptx"]


def test_triton_needs_a_gpu_or_the_interpreter() -> None:
    if not torch.cuda.is_available():
        assert _backends.absences("noise")["triton"] == "no CUDA device"
