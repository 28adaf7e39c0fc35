"""The compiled loops are wide, where a lost target attribute would leave them at baseline, and
right in every instruction set, not only in the one that this processor would choose."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from palette import _extension, ops

# Kernel loops by what their names hold, and the registers that each must work in.
WIDE = {"avx512": "zmm", "avx2": "ymm"}


@pytest.fixture(scope="module")
def registers() -> dict[str, Counter[str]]:
    """For each function of the CPU library: how often each kind of register occurs in it."""
    library = _extension.load()["cpp"].library
    if library is None or shutil.which("objdump") is None:
        pytest.skip("needs the compiled CPU library and objdump")
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", library],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "x86-64" not in text.partition("Disassembly")[0]:
        pytest.skip("another processor's library")
    found: dict[str, Counter[str]] = {}
    for block in re.split(r"\n(?=[0-9a-f]+ <)", text)[1:]:
        head, _, body = block.partition("\n")
        counts = Counter(re.findall(r"%([xyz]mm)", body))
        found[head] = counts + Counter(instructions=body.count("\n"))
    return found


LOOPS = [
    *("fill", "keep", "keep_rows", "apply", "moments", "sums", "input", "advance"),
    *("attend", "attend_backward"),
]


@pytest.mark.parametrize("isa", WIDE)
@pytest.mark.parametrize("loop", LOOPS)
def test_loops_use_wide_registers(registers, isa, loop) -> None:
    """noise: fill; dropout: keep and keep_rows; group_norm_silu: moments and apply; its backward:
    sums and input; reverse_step: advance."""
    name = re.compile(rf"\b{isa}::{loop}(_run)?(<float(, [^>]*)?>)?\(")
    bodies = [counts for head, counts in registers.items() if name.search(head)]
    assert bodies, f"no function of {loop} for {isa}"
    for counts in bodies:
        assert counts[WIDE[isa]] > 20, (loop, isa, counts)


NARROWER = {"baseline": None, "avx2": "avx2", "avx512": "avx512f"}


@pytest.mark.parametrize("isa", NARROWER)
@pytest.mark.parametrize("op", ["adamw", "attention", "reverse_step"])
def test_every_instruction_set_is_right(op, isa) -> None:
    """The op's own tests on its C++ backend, in a process that is told which set to use."""
    if "cpp" not in ops.backends(op):
        return
    if NARROWER[isa] not in (None, *_extension.instruction_sets()):
        return
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-n0",
            "-k",
            "cpp-on-cpu",
            Path(__file__).with_name(f"test_{op}.py"),
        ],
        env={**os.environ, "PALETTE_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
