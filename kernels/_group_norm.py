"""What the kernels of group_norm_silu and of its backward share: how a tensor is cut up among
programs, and the coefficients of a channel.

Every pass cuts a sample into slabs of positions and tiles of channels, one program each, many more
than there are groups, so that a GPU is busy at batch 1. The same kernels serve both layouts: a tile
[POSITIONS, CHANNELS] is wide in whichever dimension is contiguous. The cut does not depend on the
batch: a sample gives the same bits alone and in a batch. Offsets are 64-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Not measured yet: elements of a tile, its longest run in the contiguous dimension (a warp's
# 16-byte accesses to half formats), and how many programs a sample should be cut into (two for each
# of the 132 multiprocessors of an H200), in slabs of at most MOST_TILES tiles.
TILE = 4096
MOST_CHANNELS = 64
MOST_POSITIONS = 256
PROGRAMS = 264
MOST_TILES = 16
WARPS = 8
FOLD = 1024  # partial results that a fold holds at a time


class Plan(NamedTuple):
    """How a sample is cut up."""

    positions: int  # of a tile
    channels: int  # of a tile
    tiles: int  # of a slab
    slabs: int
    columns: int  # tiles side by side


def plan_of(channels: int, spatial: int, channels_last: bool) -> Plan:
    if channels_last:
        across = min(MOST_CHANNELS, triton.next_power_of_2(channels))
        along = TILE // across
    else:
        along = min(MOST_POSITIONS, triton.next_power_of_2(spatial))
        across = min(TILE // along, triton.next_power_of_2(channels))
    columns = triton.cdiv(channels, across)
    rows = triton.cdiv(spatial, along)
    tiles = max(1, min(MOST_TILES, rows * columns // PROGRAMS))
    return Plan(along, across, tiles, triton.cdiv(rows, tiles), columns)


def parameters(
    weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | int | None, ...]:
    """The parameters as the kernels take them, then the row strides of scale and shift."""

    def dense(value: Tensor | None) -> Tensor | None:
        return value if value is None or value.stride(-1) == 1 else value.contiguous()

    given = [dense(each) for each in (weight, bias, scale, shift)]
    return (*given, *(0 if each is None else each.stride(0) for each in given[2:]))


def positions(x: Tensor) -> Tensor:
    """x [N, C, ...] as [N, C, S], a view wherever one stride serves all of S."""
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


@triton.jit
def place(
    program, channels, tiles, slabs, columns, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    """(sample, slab, first position [POSITIONS, 1], channel [1, CHANNELS]) of a program."""
    channel = (program % columns) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    slab = program // columns % slabs
    sample = (program // columns // slabs).to(tl.int64)
    first = slab.to(tl.int64) * tiles * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    return sample, slab, first, channel.to(tl.int64)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def read(values, row, channel, row_stride, mask, ABSENT: tl.constexpr):
    """float32 [..., CHANNELS] of a parameter [C] (row_stride 0) or [N, C], or ABSENT."""
    if values is None:
        return tl.full(channel.shape, ABSENT, tl.float32)
    else:
        return tl.load(values + row * row_stride + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def affine(weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, mask):
    """gain and offset of z = (x - mean) * rstd * gain + offset."""
    film = 1.0 + read(scale, sample, channel, scale_stride, mask, 0.0)
    gain = read(weight, sample, channel, 0, mask, 1.0) * film
    offset = read(bias, sample, channel, 0, mask, 0.0) * film
    return gain, offset + read(shift, sample, channel, shift_stride, mask, 0.0)


@triton.jit
def normal(mean, rstd, groups, channels, sample, channel, mask):
    """mean and rstd of each channel's group."""
    group = sample * groups + channel // (channels // groups)
    return tl.load(mean + group, mask=mask, other=0.0), tl.load(rstd + group, mask=mask, other=0.0)
