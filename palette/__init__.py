"""Palette image-to-image diffusion: models, data, training, sampling and fused kernels.

The public names are imported on first use, so ``import palette.ops`` brings in torch and nothing
else of the package.
"""

from __future__ import annotations

import importlib
from typing import Any

from palette import _extension

__version__ = "0.1.0"

_HOMES = {
    "Pipeline": "palette.pipeline",
    "accelerate": "palette.acceleration",
    "decelerate": "palette.acceleration",
    "load": "palette.pipeline",
}

__all__ = ["Pipeline", "__version__", "accelerate", "decelerate", "load"]

_extension.attach_kernels()  # in a checkout; says nothing and does nothing elsewhere


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'palette' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
