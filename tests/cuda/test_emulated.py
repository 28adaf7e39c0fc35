"""The CUDA library, host code and kernels, faces the tests of every other backend on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "ops"


@pytest.mark.parametrize(
    ("op", "left_out"),
    [
        ("group_norm_silu", "not f64 and not gradcheck"),  # float64 is for CPUs
        ("noise", "not f64"),
    ],
)
def test_tests_of_every_backend(bindings, op, left_out) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "emulated", "-q", "-x"]
    # in the place of the CPU library, so under its name
    command += [str(TESTS / f"test_{op}.py"), "-k", f"cpp-on-cpu and {left_out}"]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PALETTE_EMULATED": str(bindings)}
    ran = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout or "[100%]" in ran.stdout
