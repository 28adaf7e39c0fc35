"""The emulation itself: right kernels run right, and each kind of fault is noticed."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RIGHT, NO_BARRIER, MISSED_BARRIER, MISALIGNED, WARP_SUM = range(5)

RUN = """
import ctypes, sys
import numpy as np
values, out = np.arange(256, dtype=np.float32), np.zeros(256, dtype=np.float32)
ctypes.CDLL(sys.argv[1]).run(int(sys.argv[2]), values.ctypes.data_as(ctypes.c_void_p),
                             out.ctypes.data_as(ctypes.c_void_p))
"""


def run(library: Path, which: int, order: int) -> np.ndarray:
    values = np.arange(192, dtype=np.float32)
    out = np.full(192, np.nan, dtype=np.float32)
    loaded = ctypes.CDLL(str(library))
    loaded.emulate_order(order)
    loaded.run(which, *(each.ctypes.data_as(ctypes.c_void_p) for each in (values, out)))
    return out


@pytest.mark.parametrize("order", [0, 1, 2])
def test_barrier_and_shared_memory(broken, order) -> None:
    wanted = np.arange(192).reshape(3, 64)[:, ::-1].reshape(-1)
    assert np.array_equal(run(broken, RIGHT, order), wanted)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_warp_exchange(broken, order) -> None:
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    wanted = np.repeat(values.sum(1), 32)
    assert np.array_equal(run(broken, WARP_SUM, order)[:64], wanted)


def test_missing_barrier_depends_on_the_order(broken) -> None:
    results = [run(broken, NO_BARRIER, order) for order in (0, 1)]
    assert not np.array_equal(*results)


@pytest.mark.parametrize(
    ("which", "message"),
    [(MISSED_BARRIER, "a barrier that others never reach"), (MISALIGNED, "misaligned address")],
)
def test_fault_ends_the_process(broken, which, message) -> None:
    command = [sys.executable, "-c", RUN, str(broken), str(which)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode != 0
    assert message in ran.stderr
