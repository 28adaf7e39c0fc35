"""The fused operations, one file each, and the choice of the backend that runs them."""

from __future__ import annotations

from palette import _extension
from palette.ops import _backends, philox
from palette.ops._backends import absences, backends, choose, default, names, use
from palette.ops.adamw import adamw
from palette.ops.attention import attention
from palette.ops.dropout import dropout
from palette.ops.group_norm_silu import group_norm_silu
from palette.ops.noise import noise
from palette.ops.reverse_step import reverse_step

__all__ = [
    "absences",
    "adamw",
    "attention",
    "backends",
    "choose",
    "default",
    "dropout",
    "group_norm_silu",
    "names",
    "noise",
    "philox",
    "reverse_step",
    "use",
]

_extension.load()
_backends.survey()
