"""Finds and loads the compiled libraries and kernels/, and says how to build what is missing.

An installed package has everything beside this file. In a checkout the Triton kernels lie in
``../kernels``, and the compiled libraries may lie in the installed distribution: Python started
from the repository's root imports these sources, not the installed ones.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

# A library's file name without suffix -> the half of csrc/ in it, which is its backend's name.
LIBRARIES = {"_ops_cpu": "cpp", "_ops_cuda": "cuda"}

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parent
_CHECKOUT = (_ROOT / "csrc" / "ops.cpp").is_file() and (_ROOT / "setup.py").is_file()


@dataclass(frozen=True)
class Half:
    """What became of one compiled half: its library when loaded, else why it is absent."""

    library: Path | None
    absence: str  # "" when loaded


def fingerprint(root: Path, half: str) -> str:
    """Hash of the sources that one compiled library is built from.

    Args:
        root: the repository.
        half: ``cpp`` or ``cuda``.
    """
    csrc = root / "csrc"
    folder = csrc / {"cpp": "cpu", "cuda": "cuda"}[half]
    files = [csrc / "ops.cpp", *csrc.glob("*.h"), *folder.rglob("*.*")]
    digest = hashlib.sha256()
    for file in sorted(files):
        if file.suffix in {".h", ".cuh", ".cpp", ".cu"}:
            digest.update(file.relative_to(csrc).as_posix().encode() + b"\0")
            digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def built_from(library: Path) -> str:
    """The fingerprint that the build left in a library, read without loading it."""
    found = re.search(rb"palette-sources:([0-9a-f]{16})", library.read_bytes())
    return found[1].decode() if found else ""


def attach_kernels() -> None:
    """In a checkout, make ``palette.kernels`` a namespace over ``../kernels``."""
    if not _CHECKOUT or (_HERE / "kernels").is_dir() or "palette.kernels" in sys.modules:
        return
    spec = importlib.machinery.ModuleSpec("palette.kernels", None, is_package=True)
    spec.submodule_search_locations = [str(_ROOT / "kernels")]
    namespace = importlib.util.module_from_spec(spec)
    sys.modules["palette.kernels"] = namespace
    vars(sys.modules["palette"])["kernels"] = namespace


def _places() -> list[Path]:
    """Directories that may hold the compiled files, the one beside the sources first."""
    if not _CHECKOUT:
        return [_HERE]
    installed = [Path(entry or ".").resolve() / "palette" for entry in sys.path]
    return [_HERE, *(place for place in dict.fromkeys(installed) if place != _HERE)]


def _choose(found: list[Path], half: str) -> tuple[Path | None, str]:
    """The library to load, or None and why there is none."""
    if not _CHECKOUT:
        return found[0], ""
    mine = fingerprint(_ROOT, half)
    for file in found:
        if built_from(file) == mine:
            return file, ""
    if found[0].parent == _HERE:
        # Built in this tree, by whoever edits these sources: they are told, and go on.
        warnings.warn(
            f'{found[0]} is older than its sources; build again with "make build"',
            RuntimeWarning,
            stacklevel=5,
        )
        return found[0], ""
    return None, (
        f"{found[0]} was built from other sources than {_ROOT / 'csrc'}; "
        'run "pip install ." again in the repository'
    )


def _load_half(stem: str) -> Half:
    import torch

    half = LIBRARIES[stem]
    found = [file for place in _places() if (file := place / f"{stem}.so").is_file()]
    if not found:
        return Half(None, _why_not_built(half))
    if half == "cuda" and not torch.cuda.is_available():
        return Half(None, "compiled, but torch sees no CUDA device here")
    library, absence = _choose(found, half)
    if library is None:
        return Half(None, absence)
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except OSError as error:
        return Half(None, f"{library} does not load: {error}")
    return Half(library, "")


def _why_not_built(half: str) -> str:
    facts = build_facts()
    if half == "cuda" and facts:
        return facts["cuda_absence"] or "its library is missing"
    return "nothing was compiled: no C++ compiler at installation, or PALETTE_NO_EXT=1"


@functools.cache
def load() -> dict[str, Half]:
    """Load what was compiled and fits this machine, once; warn once when the CPU half is missing.

    Returns:
        ``{"cpp": Half, "cuda": Half}``.
    """
    halves = {half: _load_half(stem) for stem, half in LIBRARIES.items()}
    if halves["cpp"].library is None:
        warnings.warn(
            f"palette runs on its slower reference ops ({halves['cpp'].absence}). "
            'Install a C++ compiler and run "pip install ." again.',
            RuntimeWarning,
            stacklevel=2,
        )
    return halves


@functools.cache
def _build_module() -> ModuleType | None:
    """palette._build, from wherever the compiled files are."""
    for place in _places():
        finder = importlib.machinery.PathFinder.find_spec("palette._build", [str(place)])
        if finder is not None and finder.loader is not None:
            module = importlib.util.module_from_spec(finder)
            finder.loader.exec_module(module)
            return module
    return None


def build_facts() -> dict[str, str]:
    """What was compiled, with what: compiler, torch, torch_target, nvcc, cuda_architectures,
    cuda_absence. Empty where nothing was compiled."""
    module = _build_module()
    return dict(module.facts()) if module is not None else {}


def instruction_sets() -> list[str]:
    """Vector instruction sets of this processor, as the compiled kernels ask for them."""
    module = _build_module()
    return list(module.instruction_sets()) if module is not None else []


def status() -> dict[str, str]:
    """Why each compiled half is absent: ``{"cpp": reason, "cuda": reason}``, "" where loaded."""
    return {half: found.absence for half, found in load().items()}
