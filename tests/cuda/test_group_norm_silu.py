"""What only raw launches show: guard bands, misaligned pointers, order of execution, addresses.

The numbers themselves are held against float64 in test_emulated.py.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import palette.ops  # noqa: F401  its modules are found in sys.modules

MODULE = sys.modules["palette.ops.group_norm_silu"]
TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
GUARD = 64  # elements on either side of a buffer, a multiple of every alignment


class Parameter(ctypes.Structure):
    """``Parameter`` of csrc/cuda/vector.cuh."""

    _fields_ = (("data", ctypes.c_void_p), ("row_stride", ctypes.c_int64), ("type", ctypes.c_int32))

    @classmethod
    def of(cls, value: Tensor | None) -> Parameter:
        if value is None:
            return cls(None, 0, 0)
        return cls(value.data_ptr(), value.stride(0) if value.dim() == 2 else 0, TYPES[value.dtype])


class Problem(ctypes.Structure):
    """``GroupNorm`` of csrc/cuda/group_norm_silu.cuh."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("samples", "channels", "spatial", "groups")),
        *((name, ctypes.c_int32) for name in ("type", "channels_last", "silu")),
        ("eps", ctypes.c_float),
        *((name, Parameter) for name in ("weight", "bias", "scale", "shift")),
    )


class Guarded:
    """A buffer between two guard bands, ``offset`` elements past a 16-byte boundary."""

    def __init__(self, values: Tensor, offset: int = 0) -> None:
        self.whole = torch.full((values.numel() + 2 * GUARD + 8,), 3.25, dtype=values.dtype)
        start = (-self.whole.data_ptr() // values.element_size()) % 16 + GUARD + offset
        self.inside = self.whole[start : start + values.numel()]
        self.inside.copy_(values.reshape(-1))
        self.start = start

    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.inside.data_ptr())

    def check(self) -> None:
        after = self.start + self.inside.numel()
        assert (self.whole[: self.start] == 3.25).all(), "written before the buffer"
        assert (self.whole[after:] == 3.25).all(), "written behind the buffer"


@pytest.fixture
def library(kernels) -> Iterator[ctypes.CDLL]:
    loaded = ctypes.CDLL(str(kernels))
    loaded.palette_cuda_group_norm_silu_scratch.restype = ctypes.c_int64
    yield loaded
    loaded.emulate_order(0)
    loaded.emulate_edges(0)


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """x, grad [N, C, spatial] and parameters."""
    n, c, _ = shape
    g = torch.Generator().manual_seed(0)
    made = {
        "x": torch.randn(shape, generator=g),
        "grad": torch.randn(shape, generator=g),
        "weight": 1 + 0.3 * torch.randn(c, generator=g),
        "bias": 0.3 * torch.randn(c, generator=g),
        "scale": 0.3 * torch.randn(n, c, generator=g),
        "shift": 0.3 * torch.randn(n, c, generator=g),
    }
    return {name: value.to(dtype) for name, value in made.items()}


def launch(
    library: ctypes.CDLL, given: dict[str, Tensor], groups: int, rows: bool, offset: int = 0
) -> dict[str, Tensor]:
    """Forward and backward on guarded buffers, everything that is written poisoned with NaN."""
    x = given["x"]
    n, c, spatial = x.shape
    films = [Parameter.of(given[name]) for name in ("weight", "bias", "scale", "shift")]
    problem = Problem(n, c, spatial, groups, TYPES[x.dtype], rows, True, 1e-5, *films)
    size = library.palette_cuda_group_norm_silu_scratch(ctypes.byref(problem))

    def laid_out(value: Tensor) -> Tensor:
        return value.transpose(1, 2).contiguous() if rows else value

    def nan(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=dtype)

    buffers = {
        "x": Guarded(laid_out(x), offset),
        "grad": Guarded(laid_out(given["grad"]), offset),
        "y": Guarded(nan(x.numel()), offset),
        "grad_x": Guarded(nan(x.numel()), offset),
        "mean": Guarded(nan(n * groups, dtype=torch.float32)),
        "rstd": Guarded(nan(n * groups, dtype=torch.float32)),
        "scratch": Guarded(nan(size, dtype=torch.float32)),
    }
    grads = {name: nan(*given[name].shape) for name in ("weight", "bias", "scale", "shift")}
    pointers = {name: buffer.pointer() for name, buffer in buffers.items()}
    status = library.palette_cuda_group_norm_silu(
        ctypes.byref(problem),
        *(pointers[name] for name in ("x", "y", "mean", "rstd", "scratch")),
        None,
    )
    assert status == 0
    buffers["scratch"].inside.fill_(float("nan"))
    status = library.palette_cuda_group_norm_silu_backward(
        ctypes.byref(problem),
        *(pointers[name] for name in ("grad", "x", "mean", "rstd", "grad_x")),
        (Parameter * 4)(*(Parameter.of(each) for each in grads.values())),
        pointers["scratch"],
        None,
    )
    assert status == 0
    for buffer in buffers.values():
        buffer.check()
    assert torch.equal(buffers["x"].inside, laid_out(x).reshape(-1)), "x was changed"
    results = {name: buffers[name].inside.clone() for name in ("y", "grad_x", "mean", "rstd")}
    for name in ("y", "grad_x"):
        shaped = results[name].view(n, spatial, c).transpose(1, 2) if rows else results[name]
        results[name] = shaped.reshape(x.shape)
    return {**results, **grads}


def exact(given: dict[str, Tensor], groups: int) -> dict[str, Tensor]:
    """y and the gradients by the reference in float64."""
    wide = {name: value.double().requires_grad_() for name, value in given.items()}
    y = MODULE.reference(
        wide["x"], wide["weight"], wide["bias"], groups, 1e-5, wide["scale"], wide["shift"]
    )
    y.backward(wide["grad"].detach())
    names = ("weight", "bias", "scale", "shift")
    return {"y": y.detach(), "grad_x": wide["x"].grad, **{name: wide[name].grad for name in names}}


def distance(value: Tensor, wanted: Tensor) -> float:
    return ((value.double() - wanted).norm() / wanted.norm()).item()


# more than one slab, an odd number of channels per group, the last slab short, a lone tile column
SHAPES = [((2, 64, 299), 32, True), ((2, 24, 1031), 3, False), ((2, 272, 41), 17, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "groups", "rows"), SHAPES)
def test_misaligned_pointers_and_guard_bands(library, shape, groups, rows, dtype) -> None:
    given = inputs(shape, dtype)
    wanted = exact(given, groups)
    limit = 2e-6 if dtype == torch.float32 else 6e-4
    for offset in (0, 1, 3):
        results = launch(library, given, groups, rows, offset)
        for name, value in wanted.items():
            assert distance(results[name], value) < 5 * limit, (offset, name)


@pytest.mark.parametrize(("shape", "groups", "rows"), SHAPES)
def test_same_bits_in_any_order_of_threads_and_blocks(library, shape, groups, rows) -> None:
    given = inputs(shape, torch.bfloat16)
    results = []
    for order in (0, 1, 2):
        library.emulate_order(order)
        results.append(launch(library, given, groups, rows))
    for name, value in results[0].items():
        assert all(torch.equal(value, other[name]) for other in results[1:]), name


def _sparse(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are touched."""
    bytes_ = mmap.mmap(-1, elements * torch.empty((), dtype=dtype).element_size())
    return torch.frombuffer(bytes_, dtype=dtype)


@pytest.mark.parametrize("rows", [True, False])
def test_addresses_beyond_2_to_the_31(library, rows) -> None:
    """Only the first and the last blocks run; the last sample lies behind element 2^31."""
    c, spatial, groups = 64, 64, 32
    n = 2**31 // (c * spatial) + 2
    x, y, grad, grad_x = (_sparse(n * c * spatial, torch.bfloat16) for _ in range(4))
    last = inputs((1, c, spatial), torch.bfloat16)
    for buffer, values in ((x, last["x"]), (grad, last["grad"])):
        laid_out = values.transpose(1, 2) if rows else values
        buffer[-c * spatial :] = laid_out.reshape(-1)

    problem = Problem(n, c, spatial, groups, TYPES[x.dtype], rows, True, 1e-5)
    size = library.palette_cuda_group_norm_silu_scratch(ctypes.byref(problem))
    scratch, mean, rstd = (_sparse(each, torch.float32) for each in (size, n * groups, n * groups))

    def pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(each.data_ptr()) for each in tensors]

    library.emulate_edges(64)
    launched = library.palette_cuda_group_norm_silu(
        ctypes.byref(problem), *pointers(x, y, mean, rstd, scratch), None
    )
    assert launched == 0
    launched = library.palette_cuda_group_norm_silu_backward(
        ctypes.byref(problem), *pointers(grad, x, mean, rstd, grad_x), (Parameter * 4)(),
        *pointers(scratch), None,
    )  # fmt: skip
    assert launched == 0

    wide = last["x"].double().requires_grad_()
    wanted = MODULE.reference(wide, None, None, groups)
    wanted.backward(last["grad"].double())
    for buffer, value in ((y, wanted.detach()), (grad_x, wide.grad)):
        found = buffer[-c * spatial :]
        found = found.view(1, spatial, c).transpose(1, 2) if rows else found.view(1, c, spatial)
        assert distance(found, value) < 4e-3
