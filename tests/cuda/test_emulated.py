"""The CUDA library, host code and kernels, faces the tests of every other backend on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "ops"


# float64 is for CPUs; millions of draws prove the reference, and kernels equal it; one case takes
# a minute; a device refuses no step that is outside the table.
LEFT_OUT = {
    "attention": "not f64 and not 1536x16x16",
    "dropout": "not f64 and not share",
    "group_norm_silu": "not f64 and not gradcheck",
    "noise": "not distribution and not rare_draws",
    "reverse_step": "not outside_the_table",
}


@pytest.mark.parametrize("op", LEFT_OUT)
def test_tests_of_every_backend(bindings, op) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "emulated", "-n0", "-x"]
    # in the place of the CPU library, so under its name
    command += [str(TESTS / f"test_{op}.py"), "-k", f"cpp-on-cpu and {LEFT_OUT[op]}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "PALETTE_EMULATED": str(bindings),
        "EMULATE_ORDER": "2",  # a missing barrier shows
    }
    ran = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout or "[100%]" in ran.stdout
