"""Argument checks shared by the ops; an error names the argument, what it got and what it wants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(op: str, name: str, value: object) -> None:
    """Raise TypeError where ``value`` is no tensor, or one without strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, wanted a tensor")
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} is a {layout} tensor, wanted a strided one")


def integer(op: str, name: str, value: object) -> None:
    """Raise TypeError where ``value`` is no integer (a symbolic one is, a tensor is not)."""
    if isinstance(value, (int, torch.SymInt)):
        return
    if isinstance(value, Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} is {described(value)}, wanted an integer")


def number(op: str, name: str, value: object) -> None:
    """Raise TypeError where ``value`` is no real number."""
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} is {described(value)}, wanted a number")


def described(value: object) -> str:
    """A wrong value as an error shows it: on one line, and not all of it."""
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__


def writable(op: str, name: str, value: Tensor) -> None:
    """Raise ValueError where several elements of ``value`` share one place in memory."""
    strides = value.stride()
    if 0 in strides and any(n > 1 and s == 0 for n, s in zip(value.shape, strides, strict=True)):
        raise ValueError(
            f"{op}: {name} is an expanded tensor, wanted one with a place for every element"
        )


def dtype(op: str, name: str, value: Tensor, wanted: Sequence[torch.dtype]) -> None:
    """Raise TypeError where the dtype of ``value`` is not among ``wanted``."""
    if value.dtype not in wanted:
        names = " or ".join(str(each).removeprefix("torch.") for each in wanted)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} is {got}, wanted {names}")


def shape(op: str, name: str, value: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError where the shape of ``value`` is not ``wanted``."""
    if value.shape != wanted:
        raise ValueError(
            f"{op}: {name} has shape {list(value.shape)}, wanted {list(wanted)} ({meaning})"
        )


def device(op: str, name: str, value: Tensor, wanted: torch.device, like: str) -> None:
    """Raise ValueError where ``value`` is on another device than the argument ``like``."""
    if value.device != wanted:
        raise ValueError(f"{op}: {name} is on {value.device}, wanted {wanted} (where {like} is)")
