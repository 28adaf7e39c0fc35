"""The CUDA kernels of csrc/cuda, compiled as C++ and run on the CPU through emulate.h.

As a pytest plugin (``-p emulated`` with this folder on PYTHONPATH) it puts them in the place of the
CPU implementations, so that a run of tests/ops faces them with the tests of every other backend.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palette.ops import _backends, _layout

ROOT = Path(__file__).resolve().parents[2]
TYPES = {None: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

# -ffp-contract=off: what the kernels round separately stays so. A misaligned vector access, a shift
# or an index out of range ends the process.
FLAGS = "-x c++ -std=c++20 -O2 -g1 -fPIC -shared -Wall -Wextra -Werror"
FLAGS += " -Wno-unknown-pragmas -Wno-clobbered"
FLAGS += " -ffp-contract=off -fno-gnu-unique -fsanitize=undefined -fno-sanitize-recover=all"
FLAGS += " -fno-strict-aliasing -DPALETTE_EMULATE"


@functools.cache
def library(op: str) -> ctypes.CDLL:
    """csrc/cuda/<op>.cu, compiled for this process."""
    source = ROOT / "csrc/cuda" / f"{op}.cu"
    target = Path(tempfile.mkdtemp(prefix="palette-emulated-")) / f"{op}.so"
    header = ["-I", str(ROOT / "csrc"), "-include", str(ROOT / "tests/cuda/emulate.h")]
    subprocess.run(["g++", *FLAGS.split(), *header, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Parameter(ctypes.Structure):
    """``Parameter`` of csrc/cuda/vector.cuh."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )

    @classmethod
    def of(cls, value: Tensor | None) -> Parameter:
        if value is None:
            return cls(None, 0, 0)
        return cls(value.data_ptr(), value.stride(0) if value.dim() == 2 else 0, TYPES[value.dtype])


class GroupNorm(ctypes.Structure):
    """``GroupNorm`` of csrc/cuda/group_norm_silu.cuh."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("samples", "channels", "spatial", "groups")),
        *((name, ctypes.c_int32) for name in ("type", "channels_last", "silu")),
        ("eps", ctypes.c_float),
        *((name, Parameter) for name in ("weight", "bias", "scale", "shift")),
    )


def problem(
    x: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> GroupNorm:
    """The problem as the host half of csrc/cuda/group_norm_silu.cu states it."""
    parameters = [Parameter.of(each) for each in (weight, bias, scale, shift)]
    return GroupNorm(
        *x.shape[:2], x.shape[2:].numel(), groups, TYPES[x.dtype],
        _layout.channels_last(x), silu, eps, *parameters,
    )  # fmt: skip


def scratch(stated: GroupNorm) -> Tensor:
    count = library("group_norm_silu").palette_cuda_group_norm_silu_scratch
    count.restype = ctypes.c_int64
    return torch.full((count(ctypes.byref(stated)),), float("nan"))


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """palette::group_norm_silu by the emulated kernels."""
    stated = problem(x, groups, eps, silu, weight, bias, scale, shift)
    y = _layout.empty_like(x)
    mean, rstd = torch.full((2, x.shape[0], groups), float("nan"))
    dense, floats = _layout.dense_like(x, x), scratch(stated)
    if x.numel() > 0:
        status = library("group_norm_silu").palette_cuda_group_norm_silu(
            ctypes.byref(stated), pointer(dense), pointer(y), pointer(mean), pointer(rstd),
            pointer(floats), None,
        )  # fmt: skip
        assert status == 0
    return y, mean.clone(), rstd.clone()


def group_norm_silu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """palette::group_norm_silu_backward by the emulated kernels."""
    stated = problem(x, groups, 0.0, silu, weight, bias, scale, shift)
    n, c = x.shape[:2]
    parameter = torch.float32 if weight is None else weight.dtype
    results = [
        torch.full((c,), float("nan"), dtype=parameter),
        torch.full((c,), float("nan"), dtype=parameter),
        torch.empty(0) if scale is None else torch.full((n, c), float("nan"), dtype=scale.dtype),
        torch.empty(0) if shift is None else torch.full((n, c), float("nan"), dtype=shift.dtype),
    ]
    grad_x = _layout.empty_like(x)
    if x.numel() == 0:
        return grad_x, *(each.zero_() for each in results)
    written = (Parameter * 4)(*(Parameter.of(each if each.numel() else None) for each in results))
    slopes, dense, floats = _layout.dense_like(grad, x), _layout.dense_like(x, x), scratch(stated)
    status = library("group_norm_silu").palette_cuda_group_norm_silu_backward(
        ctypes.byref(stated), pointer(slopes), pointer(dense), pointer(mean), pointer(rstd),
        pointer(grad_x), written, pointer(floats), None,
    )  # fmt: skip
    assert status == 0
    return grad_x, *results


def noise(seeds: Tensor, step: Tensor, shape: list[int], stream: int, layer: int) -> Tensor:
    """palette::noise by the emulated kernel."""
    out = torch.full((seeds.numel(), *shape), float("nan"))
    seeds, step = seeds.contiguous(), step.contiguous()
    status = library("noise").palette_cuda_noise(
        pointer(seeds), pointer(step),
        ctypes.c_int64(0 if step.numel() == 1 else 1), pointer(out),
        ctypes.c_int64(seeds.numel()), ctypes.c_int64(torch.Size(shape).numel()),
        ctypes.c_int64(stream), ctypes.c_int64(layer), None,
    )  # fmt: skip
    assert status == 0
    return out


EMULATED = {
    "group_norm_silu": group_norm_silu,
    "group_norm_silu_backward": group_norm_silu_backward,
    "noise": noise,
}
_library = torch.library.Library("palette", "IMPL")


def pytest_configure() -> None:
    """Register the emulated kernels for CPU tensors, over what is compiled there."""
    for name, function in EMULATED.items():
        _library.impl(name, _with_float64(name, function), "CPU", allow_override=True)
    _backends.survey()


def _with_float64(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """float64 goes to the reference, as on a GPU."""
    op = name.removesuffix("_backward")
    forward, backward = (
        getattr(sys.modules[f"palette.ops.{op}"], each, None) for each in ("_forward", "_backward")
    )
    reference = backward if name.endswith("_backward") else forward

    def dispatch(first: Tensor, *rest: Any) -> Any:
        return (reference if first.dtype == torch.float64 else function)(first, *rest)

    return dispatch
