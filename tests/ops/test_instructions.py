"""The compiled loops are wide: a target attribute that got lost would leave them at baseline."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter

import pytest

from palette import _extension

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


@pytest.mark.parametrize("isa", WIDE)
@pytest.mark.parametrize("loop", ["fill", "apply", "moments", "sums", "input"])
def test_loops_use_wide_registers(registers, isa, loop) -> None:
    """noise: fill; group_norm_silu: moments and apply; its backward: sums and input."""
    name = re.compile(rf"\b({isa}::{loop}(_run)?<float>|{loop}_{isa})\(")
    bodies = [counts for head, counts in registers.items() if name.search(head)]
    assert bodies, f"no function of {loop} for {isa}"
    for counts in bodies:
        assert counts[WIDE[isa]] > 20, (loop, isa, counts)
