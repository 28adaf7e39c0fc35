"""One op, one name, in every room: no declared backend without its file, no file undeclared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from palette import ops

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "cpp": ("csrc/cpu", "*.cpp"),
    "cuda": ("csrc/cuda", "*.cu"),
    "triton": ("kernels", "*.py"),
}
# A file compiled for one instruction set or architecture belongs to the op in front of the suffix.
SUFFIXES = ("_avx2", "_avx512", "_sm90a", "_backward")


def declared(op: str) -> tuple[str, ...]:
    return sys.modules[f"palette.ops.{op}"].BACKENDS


@pytest.mark.parametrize("op", ops.names())
def test_every_op_has_its_rooms(op) -> None:
    for file in (f"palette/ops/{op}.py", f"tests/ops/test_{op}.py", f"benchmarks/bench_{op}.py"):
        assert (ROOT / file).is_file(), f"{op} has no {file}"
    assert declared(op)[0] == "reference"
    for backend in declared(op):
        if backend in ROOMS:
            folder, pattern = ROOMS[backend]
            file = f"{folder}/{op}{pattern[1:]}"
            assert (ROOT / file).is_file(), f"{op} declares {backend}, but there is no {file}"


@pytest.mark.parametrize("backend", ROOMS)
def test_every_file_is_declared(backend) -> None:
    folder, pattern = ROOMS[backend]
    for file in (ROOT / folder).glob(pattern):
        op = file.stem
        for suffix in SUFFIXES:
            op = op.removesuffix(suffix)
        if file.stem.startswith("_"):
            continue  # shared by several ops
        assert op in ops.names(), f"{file.relative_to(ROOT)} belongs to no op"
        assert backend in declared(op), f"{file.relative_to(ROOT)} exists, {op} does not declare it"


def test_every_module_of_an_op_is_an_op() -> None:
    modules = {path.stem for path in (ROOT / "palette" / "ops").glob("*.py")}
    assert {name for name in modules if not name.startswith("_")} - {"philox"} == set(ops.names())
    assert set(ops.names()) <= set(ops.__all__)
