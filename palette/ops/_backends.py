"""Which implementation of an op runs: what exists here, why the rest does not, and the choice.

A choice made with ``use`` comes before the environment variable PALETTE_BACKEND, which comes before
the table of defaults below.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from palette import _extension

_T = TypeVar("_T")

NAMES = ("reference", "cpp", "cuda", "triton", "sdpa")

_PLAIN = (Tensor, nn.Parameter)  # no subclass, whose calls go to itself

# Triton reads the variable when a kernel is defined, so it cannot change later either.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Fastest first, per device type; the first one available is the default, and any device type that
# is not listed gets the reference. CPU: benchmarks/results/2026-11-30-cpu-epyc/ops.json, in which
# cpp is the fastest of these in every row. CUDA: not measured yet, the order is a guess.
DEFAULTS: dict[str, dict[str, tuple[str, ...]]] = {
    "adamw": {"cpu": ("cpp", "reference"), "cuda": ("reference",)},
    "attention": {"cpu": ("cpp", "sdpa", "reference"), "cuda": ("sdpa", "reference")},
    "dropout": {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    "group_norm_silu": {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    "noise": {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
    "reverse_step": {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")},
}


class _State:
    """Class attributes, because torch.compile guards them: a ContextVar breaks the graph and a
    threading.local would be baked in."""

    forced: str | None = None
    in_cpp: frozenset[str] = frozenset()  # the ops whose compiled implementation a CPU uses now


_declared: dict[str, tuple[str, ...]] = {}
_available: dict[str, tuple[str, ...]] = {}
_absent: dict[str, dict[str, str]] = {}
_defaults: dict[str, dict[str, str]] = {}


def declare(op: str, implemented: tuple[str, ...]) -> None:
    """Called by each op's module: the backends that have been written for it."""
    _declared[op] = implemented


def survey() -> None:
    """Find out which of the declared backends exist here; called once, after the libraries load.

    Raises:
        ValueError: PALETTE_BACKEND names a backend that no op has here.
    """
    for op, implemented in _declared.items():
        names = [each for each in NAMES if each != "sdpa" or "sdpa" in implemented]
        reasons = {each: _reason(op, each, implemented) for each in names}
        _available[op] = tuple(each for each in names if reasons[each] is None)
        _absent[op] = {each: why for each, why in reasons.items() if why is not None}
        _defaults[op] = {
            device: next(each for each in order if each in _available[op])
            for device, order in DEFAULTS[op].items()
        }
    forced = os.environ.get("PALETTE_BACKEND") or None
    if forced is not None:
        _require(forced, "PALETTE_BACKEND")
    _force(forced)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _import_kernels(op for op in _declared if choose(op, device) == "triton")


def names() -> list[str]:
    """The names of all ops."""
    return sorted(_declared)


def backends(op: str) -> list[str]:
    """The backends of ``op`` that exist on this machine.

    Raises:
        ValueError: there is no such op.
    """
    return list(_known(op, _available))


def absences(op: str) -> dict[str, str]:
    """The backends of ``op`` that do not exist on this machine, each with the reason."""
    return dict(_known(op, _absent))


def default(op: str, device_type: str) -> str:
    """The backend used for ``op`` on "cpu", "cuda", ... where nothing is forced."""
    return _known(op, _defaults).get(device_type, "reference")


def choose(op: str, device_type: str) -> str:
    """The backend to use now: the forced one where it serves the op and the device."""
    if forward_ad._current_level >= 0:
        # Inside torch.func.jvp and dual levels torch would drop a registered op's tangent silently.
        return "reference"
    return _chosen(op, device_type, _State.forced)


def _chosen(op: str, device_type: str, forced: str | None) -> str:
    if forced is not None and forced in _available[op] and _serves(forced, device_type):
        return forced
    return _defaults[op].get(device_type, "reference")


def _force(backend: str | None) -> None:
    _State.forced = backend
    _State.in_cpp = frozenset(op for op in _declared if _chosen(op, "cpu", backend) == "cpp")


def in_cpp(op: str, tensor: Tensor) -> bool:
    """Whether the compiled CPU op comes next, which checks its arguments itself.

    False in a graph that is being traced, so that it is never called there with what it would
    refuse. Asked before every call, and little else: Python that has left the caches since the call
    before costs as much as the op on a small picture.
    """
    return (
        not is_dynamo_compiling()
        and op in _State.in_cpp
        and type(tensor) in _PLAIN
        and tensor.is_cpu
        and forward_ad._current_level < 0
    )


def in_triton(op: Callable[..., Any], tensor: Tensor, *others: Any) -> Any:
    """``op(tensor, *others)`` on the GPU of ``tensor``: Triton launches on the current one.

    The gradients need no such care, autograd calls them on the GPU of what they belong to; and in a
    graph the compiler sets the device.
    """
    if torch.compiler.is_compiling():
        return op(tensor, *others)
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]
        return op(tensor, *others)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force ``backend`` inside the block, for the whole process.

    Ops that do not have it here, and tensors on devices that it does not serve, keep their default.

    Raises:
        ValueError: no op has that backend on this machine.
    """
    _require(backend, "backend")
    if backend == "triton":
        _import_kernels(op for op, available in _available.items() if backend in available)
    previous = _State.forced
    _force(backend)
    try:
        yield
    finally:
        _force(previous)


def _import_kernels(names: Iterable[str]) -> None:
    """Triton kernels register their ops when imported: before the first call, not in a trace."""
    for op in names:
        importlib.import_module(f"palette.kernels.{op}")


def _serves(backend: str, device_type: str) -> bool:
    if backend == "cpp":
        return device_type == "cpu"
    if backend == "cuda":
        return device_type == "cuda"
    if backend == "triton":
        return device_type == "cuda" or (device_type == "cpu" and _INTERPRETED)
    return True


def _known(op: str, table: Mapping[str, _T]) -> _T:
    if op not in table:
        raise ValueError(f"op is '{op}', wanted one of {', '.join(sorted(table))}")
    return table[op]


def _require(backend: str, name: str) -> None:
    if any(backend in available for available in _available.values()):
        return
    if backend not in NAMES:
        raise ValueError(f"{name} is '{backend}', wanted one of {', '.join(NAMES)}")
    reasons = sorted({absent[backend] for absent in _absent.values() if backend in absent})
    raise ValueError(f"{name} is '{backend}', which no op has here: {'; '.join(reasons)}")


def _reason(op: str, backend: str, implemented: tuple[str, ...]) -> str | None:
    """Why ``backend`` of ``op`` is absent here; None where it is present."""
    if backend not in implemented:
        return "not written yet"
    if backend in ("reference", "sdpa"):
        return None
    if backend == "triton":
        return _triton_reason(op)
    key = {"cpp": "CPU", "cuda": "CUDA"}[backend]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"palette::{op}", key):
        return None
    status = _extension.status()
    return str(status.get(backend) or f"the compiled library has no {op}")


def _triton_reason(op: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and not _INTERPRETED:
        return "no CUDA device"
    if importlib.util.find_spec(f"palette.kernels.{op}") is None:
        return f"palette.kernels.{op} is not installed"
    return None
