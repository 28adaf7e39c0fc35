"""Runs the shared cases through every backend of this machine, with poisoned memory."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from palette import ops


def _load_cases():
    """cases.py beside this file: with --import-mode=importlib it is on no import path."""
    path = Path(__file__).with_name("cases.py")
    spec = importlib.util.spec_from_file_location("palette_op_cases", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _repair_the_interpreter() -> None:
    """Triton's interpreter multiplies the bits of bfloat16 numbers: widen them before a product."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    multiply = InterpreterBuilder.create_dot

    def widened(factor: TensorHandle) -> TensorHandle:
        if factor.dtype.scalar != tl.bfloat16:
            return factor
        return TensorHandle((factor.data.astype("uint32") << 16).view("float32"), tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def _poison_the_heap() -> None:
    """Fill what malloc gives with bytes 0x7f (3.4e38 as float32 and bfloat16, NaN as float16).

    The compiled ops allocate results through torch's stable ABI, which knows no deterministic mode,
    and scratch memory with new. glibc only; ``make asan`` has another heap.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        perturb, complement = -6, 0x80
        ctypes.CDLL(None).mallopt(perturb, complement)


# Triton has wheels for Linux only.
collect_ignore = [] if importlib.util.find_spec("triton") else ["test_triton.py"]
_CASES = _load_cases()
if _CASES.INTERPRETED:
    _repair_the_interpreter()
_poison_the_heap()
_LISTS = {
    "norm_case": _CASES.NORM_CASES,
    "attention_case": _CASES.ATTENTION_CASES,
    "drop_case": _CASES.DROP_CASES,
    "noise_case": _CASES.NOISE_CASES,
    "step_case": _CASES.STEP_CASES,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadgroup one process has all tests that want much of a GPU's memory."""
    for item in items:
        if "2_to_the_31" in item.name:
            item.add_marker(pytest.mark.xdist_group("memory"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, cases in _LISTS.items():
        if name in metafunc.fixturenames:
            chosen = _CASES.for_interpreter(cases) if _CASES.INTERPRETED else cases
            metafunc.parametrize(name, chosen, ids=str)
    if "place" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition("test_")[2]
        places = _CASES.places(op)
        metafunc.parametrize("place", places, ids=["-on-".join(each) for each in places])
    if "compiled" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition("test_")[2]
        places = [each for each in _CASES.places(op) if each[0] in ("cpp", "cuda")]
        ids = ["-on-".join(each) for each in places]
        metafunc.parametrize("compiled", [device for _, device in places], ids=ids)


@pytest.fixture
def cases():
    """The module cases.py."""
    return _CASES


@pytest.fixture
def within():
    """``within(value, exact, dtype, factor, name)``: fails where value is too far from exact."""
    return _CASES.within


@pytest.fixture
def device(place: tuple[str, str]) -> Iterator[str]:
    """The device of a (backend, device) pair, with the backend forced."""
    backend, name = place
    with ops.use(backend):
        yield name


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Fill all memory that torch allocates uninitialised with NaN (integers with their largest)."""
    before = torch.are_deterministic_algorithms_enabled()
    # torch.use_deterministic_algorithms imports inductor first: two seconds in every process
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch._C._set_deterministic_algorithms(before)
