"""palette::group_norm_silu in Triton (palette/ops/group_norm_silu.py): two passes over x.

Partial results of the first pass go to memory and are folded by a small kernel in a fixed order,
without atomics (_group_norm.py says how a tensor is cut up).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from palette.kernels._group_norm import (
    FOLD,
    WARPS,
    affine,
    normal,
    parameters,
    place,
    plan_of,
    positions,
    sigmoid,
)
from palette.kernels.group_norm_silu_backward import group_norm_silu_backward_triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from palette.ops import _layout
from palette.ops.group_norm_silu import differentiate, refuse, save


@triton.jit
def moments_kernel(
    x,  # [N, C, S] by strides
    partials,  # [N, slabs, 2, C] float32: mean and sum of squared deviations
    channels,
    spatial,
    x_n,
    x_c,
    x_s,
    tiles,
    slabs,
    columns,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, slab, first, channel = place(
        tl.program_id(0), channels, tiles, slabs, columns, POSITIONS, CHANNELS
    )
    count = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    mean = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    m2 = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for tile in range(tiles):
        position = first + tile * POSITIONS
        mask = (position < spatial) & (channel < channels)
        at = x + sample * x_n + position * x_s + channel * x_c
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        # Welford's update in every place of the tile; the division is one for the whole tile
        deviation = tl.where(mask, values - mean, 0.0)
        mean += deviation * (1.0 / (tile + 1.0))
        m2 += tl.where(mask, deviation * (values - mean), 0.0)
        count += mask.to(tl.float32)
    # the places of a channel, merged exactly as Chan's rule does pair by pair
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    centre = tl.sum(count * mean, axis=0) / total
    centre += tl.sum(count * (mean - centre[None, :]), axis=0) / total
    apart = tl.where(count > 0.0, mean - centre[None, :], 0.0)
    spread = tl.sum(m2 + count * apart * apart, axis=0)
    out = partials + (sample * slabs + slab) * 2 * channels + tl.reshape(channel, (CHANNELS,))
    fits = tl.reshape(channel, (CHANNELS,)) < channels
    tl.store(out, centre, mask=fits)
    tl.store(out + channels, spread, mask=fits)


@triton.jit
def fold_moments_kernel(
    partials,  # [N, slabs, 2, C] float32
    mean,  # [N, G] float32
    rstd,  # [N, G] float32
    channels,
    spatial,
    groups,
    eps,
    slabs,
    length,  # positions of a slab
    BLOCK: tl.constexpr,
):
    """One program per (sample, group)."""
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    members = channels // groups
    items = slabs * members
    base = partials + sample * slabs * 2 * channels + (program % groups) * members
    last = spatial - (slabs - 1) * length
    total = 1.0 * members * spatial

    pivot = tl.load(base)
    centre = 0.0
    for start in range(0, items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        slab = item // members
        at = base + slab.to(tl.int64) * 2 * channels + item % members
        count = tl.where(slab < slabs - 1, length, last).to(tl.float32)
        value = tl.load(at, mask=item < items, other=0.0)
        centre += tl.sum(tl.where(item < items, count * (value - pivot), 0.0), axis=0)
    centre = pivot + centre / total
    spread = 0.0
    for start in range(0, items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        slab = item // members
        at = base + slab.to(tl.int64) * 2 * channels + item % members
        count = tl.where(slab < slabs - 1, length, last).to(tl.float32)
        apart = tl.load(at, mask=item < items, other=0.0) - centre
        within = tl.load(at + channels, mask=item < items, other=0.0)
        spread += tl.sum(tl.where(item < items, within + count * apart * apart, 0.0), axis=0)
    tl.store(mean + program, centre)
    tl.store(rstd + program, 1.0 / tl.sqrt_rn(spread / total + eps))


@triton.jit
def apply_kernel(
    x,  # [N, C, S] by strides
    y,  # [N, C, S] by strides
    mean,  # [N, G] float32
    rstd,  # [N, G] float32
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    channels,
    spatial,
    groups,
    x_n,
    x_c,
    x_s,
    y_n,
    y_c,
    y_s,
    tiles,
    slabs,
    columns,
    SILU: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # backwards: what the first pass read last is still in the cache
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, _, first, channel = place(program, channels, tiles, slabs, columns, POSITIONS, CHANNELS)
    fits = channel < channels
    gain, offset = affine(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, fits
    )
    centre, slope = normal(mean, rstd, groups, channels, sample, channel, fits)
    slope = slope * gain
    for tile in range(tiles):
        position = first + tile * POSITIONS
        mask = (position < spatial) & fits
        at = x + sample * x_n + position * x_s + channel * x_c
        values = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        z = (values - centre) * slope + offset
        if SILU:
            z = z * sigmoid(z)
        to = y + sample * y_n + position * y_s + channel * y_c
        tl.store(to, z.to(y.dtype.element_ty), mask=mask)


@triton_op("palette::group_norm_silu_triton", mutates_args=())
def group_norm_silu_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments and the results of palette::group_norm_silu."""
    n, c = x.shape[:2]
    y = _layout.empty_like(x)
    mean = x.new_empty((n, groups), dtype=torch.float32)
    rstd = x.new_empty((n, groups), dtype=torch.float32)
    if x.numel() == 0:
        return y, mean.zero_(), rstd.fill_(float("nan"))
    rows, out = positions(x), positions(y)
    spatial = rows.shape[2]
    plan = plan_of(c, spatial, _layout.channels_last(x))
    partials = x.new_empty((n, plan.slabs, 2, c), dtype=torch.float32)
    cut = (plan.tiles, plan.slabs, plan.columns)
    shape = {"POSITIONS": plan.positions, "CHANNELS": plan.channels, "num_warps": WARPS}
    grid = (n * plan.slabs * plan.columns,)
    wrap_triton(moments_kernel)[grid](rows, partials, c, spatial, *rows.stride(), *cut, **shape)
    wrap_triton(fold_moments_kernel)[(n * groups,)](
        partials,
        mean,
        rstd,
        c,
        spatial,
        groups,
        eps,
        plan.slabs,
        plan.tiles * plan.positions,
        BLOCK=FOLD,
    )
    wrap_triton(apply_kernel)[grid](
        rows,
        out,
        mean,
        rstd,
        *parameters(weight, bias, scale, shift),
        c,
        spatial,
        groups,
        *rows.stride(),
        *out.stride(),
        *cut,
        SILU=silu,
        **shape,
    )
    return y, mean, rstd


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    return differentiate(torch.ops.palette.group_norm_silu_backward_triton, ctx, grad)


group_norm_silu_triton.register_autograd(_differentiate, setup_context=save)
group_norm_silu_backward_triton.register_autograd(refuse)
