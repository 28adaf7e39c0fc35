"""The CUDA library compiled as C++ and run on the CPU, through emulate.h.

As a pytest plugin (``-p emulated`` with this folder on PYTHONPATH) it puts everything of csrc/cuda,
from the registration in csrc/ops.cpp down to the kernels, in the place of the CPU library, so that
a run of tests/ops faces it with the tests of every other backend (test_emulated.py does that).
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from palette import _extension

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent

# -ffp-contract=off: what the kernels round separately stays so. The sanitizer ends the process at a
# misaligned vector access, an index or a shift out of range, or an overflow of a signed integer.
FLAGS = (
    "-std=c++20 -O1 -g1 -fPIC -fno-gnu-unique -fno-strict-aliasing"
    " -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-clobbered -ffp-contract=off"
    " -fsanitize=undefined -fno-sanitize=vptr -fno-sanitize-recover=all"
    " -DPALETTE_EMULATE -DPALETTE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000"
)


def _compile(source: Path, target: Path) -> Path:
    command = ["g++", *FLAGS.split(), "-isystem", str(TORCH / "include"), f"-I{ROOT / 'csrc'}"]
    command += ["-include", str(ROOT / "tests/cuda/emulate.h"), "-x", "c++", "-c", str(source)]
    subprocess.run([*command, "-o", str(target)], check=True)
    return target


def _link(objects: list[Path], target: Path) -> Path:
    lib = TORCH / "lib"
    flags = ["-fsanitize=undefined", f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu"]
    command = ["g++", "-shared", *map(str, objects), "-o", str(target), *flags]
    subprocess.run([*command, "-Wl,--no-undefined"], check=True)
    return target


def kernels(sources: list[Path], folder: Path) -> Path:
    """A library of CUDA sources, for raw launches."""
    with ThreadPoolExecutor(2) as pool:
        objects = [folder / f"{source.stem}.o" for source in sources]
        list(pool.map(_compile, sources, objects))
    return _link(objects, folder / "kernels.so")


def bindings(kernels: Path) -> Path:
    """A library of csrc/ops.cpp and the kernels built before, for torch: when it is loaded, what
    is registered for CUDA tensors is registered for CPU tensors."""
    source = kernels.with_name("ops.cpp")
    text = (ROOT / "csrc/ops.cpp").read_text()
    source.write_text(text.replace("(palette, CUDA, m)", "(palette, CPU, m)"))
    objects = [*kernels.parent.glob("*.o"), _compile(source, source.with_name("ops.o"))]
    return _link(objects, kernels.with_name("emulated.so"))


def _load() -> dict[str, Any]:
    torch.ops.load_library(os.environ["PALETTE_EMULATED"])
    return {}


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Load the library named by PALETTE_EMULATED in the place of the CPU library."""
    assert "palette.ops" not in sys.modules
    _extension.load = _load
    from palette.ops import _backends

    for op in _backends.names():  # also where there is no CPU library to take the place of
        _backends.declare(op, ("reference", "cpp"))
    _backends.survey()
