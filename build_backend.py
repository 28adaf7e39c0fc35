"""PEP 517 build backend: setuptools, plus torch's headers when the environment has no torch.

Build isolation hides the torch of the environment being installed into, and naming torch in
``build-system.requires`` would download it again for everybody. So torch is asked for here, and
only where none is found; any release's headers are good, because the compiled code uses torch's
stable ABI.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 (hooks that the installer looks up by name)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)


class Torch(NamedTuple):
    root: Path  # the package's directory, with include/ and lib/ in it
    version: str  # "2.13.0+cpu"


def _site_packages() -> Iterator[str]:
    """Where the environment being installed into may keep torch, nearest first."""
    yield from sys.path
    yield sysconfig.get_path("platlib")
    prefixes = [sys.prefix]
    if "VIRTUAL_ENV" in os.environ:  # the real environment, where isolation is a venv of its own
        prefixes.append(os.environ["VIRTUAL_ENV"])
    for prefix in prefixes:
        places = {"base": prefix, "platbase": prefix}
        yield sysconfig.get_path("platlib", vars=places)
        settings = Path(prefix, "pyvenv.cfg")
        if settings.is_file() and re.search(
            r"include-system-site-packages\s*=\s*true", settings.read_text(encoding="utf-8")
        ):
            base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
            yield sysconfig.get_path("platlib", vars=base)
    yield site.getusersitepackages()


def find_torch() -> Torch | None:
    """The nearest torch that has the stable ABI we compile for, without importing it."""
    for place in _site_packages():
        found = importlib.machinery.PathFinder.find_spec("torch", [place])
        if found is None or found.origin is None:
            continue
        root = Path(found.origin).parent
        version = root / "version.py"
        match = version.is_file() and re.search(
            r"__version__ = '((\d+)\.(\d+)[^']*)'", version.read_text(encoding="utf-8")
        )
        if match and (int(match[2]), int(match[3])) >= OLDEST_TORCH:
            return Torch(root, match[1])
    return None


def _torch_requirement() -> list[str]:
    if os.environ.get("PALETTE_NO_EXT") == "1" or find_torch():
        return []
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in pins if line.startswith("torch==")]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()
