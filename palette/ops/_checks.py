"""Argument checks shared by the ops; an error names the argument, what it got and what it wants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(op: str, name: str, value: object) -> None:
    """Raise TypeError where ``value`` is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, wanted a tensor")


def dtype(op: str, name: str, value: Tensor, wanted: Sequence[torch.dtype]) -> None:
    """Raise TypeError where the dtype of ``value`` is not among ``wanted``."""
    if value.dtype not in wanted:
        names = " or ".join(str(each).removeprefix("torch.") for each in wanted)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} is {got}, wanted {names}")


def shape(op: str, name: str, value: Tensor, wanted: Sequence[int], meaning: str) -> None:
    """Raise ValueError where the shape of ``value`` is not ``wanted``."""
    if value.shape != tuple(wanted):
        raise ValueError(
            f"{op}: {name} has shape {list(value.shape)}, wanted {list(wanted)} ({meaning})"
        )


def device(op: str, name: str, value: Tensor, like: Tensor, like_name: str) -> None:
    """Raise ValueError where ``value`` is on another device than ``like``."""
    if value.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {value.device}, wanted {like.device} (where {like_name} is)"
        )
