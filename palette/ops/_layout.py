"""The memory layout of the ops: channels-last stays channels-last, all else is contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(x: Tensor) -> bool:
    """Whether the channels of x [N, C, ...] lie next to each other in memory.

    True where C > 1, there is more than one position per channel, and the stride of dimension 1 is
    1: a channels-last image, a channel slice of one, or its [N, C, T] view. Decided from sizes and
    strides only, so that shape functions and kernels agree.
    """
    if x.dim() < 3 or x.shape[1] <= 1 or x.stride(1) != 1:
        return False
    positions = 1
    for size in x.shape[2:]:
        positions *= size
    return positions > 1


def empty_like(x: Tensor, channels: int | None = None) -> Tensor:
    """An uninitialised tensor of x's shape (or with other ``channels``), dtype and layout."""
    n, c, *rest = x.shape
    c = c if channels is None else channels
    if channels_last(x):
        return x.new_empty((n, *rest, c)).movedim(-1, 1)
    return x.new_empty((n, c, *rest))


def dense_like(y: Tensor, x: Tensor) -> Tensor:
    """y [N, C', ...] itself where it is dense in x's layout, else a copy that is."""
    return dense(y, channels_last(x))


def dense(y: Tensor, channels_last: bool) -> Tensor:
    """y [N, C', ...] itself where it is dense in that layout, else a copy that is."""
    if channels_last:
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y.contiguous()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an op computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
