"""The Triton kernels without a GPU: their ops' tests again, in Triton's interpreter.

In processes of their own: Triton reads TRITON_INTERPRET when a kernel is defined. Shape functions
cannot run in there, and are tested on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from palette import ops

DECLARED = [op for op in ops.names() if "triton" in sys.modules[f"palette.ops.{op}"].BACKENDS]


# Half a million draws prove the reference; a kernel is held to it number by number. The interpreter
# has one thread.
LEFT_OUT = {
    "dropout": " and not share and not threads",
    "noise": " and not distribution and not rare_draws",
}


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreted run itself"
)
@pytest.mark.parametrize("op", DECLARED)
def test_in_the_interpreter(op) -> None:
    file = Path(__file__).with_name(f"test_{op}.py")
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n0",
            "-k",
            "triton-on-cpu" + LEFT_OUT.get(op, ""),
            file,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
