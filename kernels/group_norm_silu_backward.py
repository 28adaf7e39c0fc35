"""palette::group_norm_silu_backward in Triton: two passes over x and the gradient.

With z = (x - mean) * rstd * gain + offset and dz = grad * silu'(z), the first pass gathers
P = sum dz and Q = sum dz * (x - mean) * rstd per sample and channel; the fold makes the gradients
of scale and shift and, per group, the means c1 = mean(gain * dz * x^) and c2 = mean(gain * dz); the
second pass writes grad_x = rstd * (gain * dz - c2 - x^ * c1). z is computed again from x.
"""

from __future__ import annotations

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
    read,
    sigmoid,
)
from torch import Tensor
from torch.library import triton_op, wrap_triton

from palette.ops import _layout


@triton.jit
def slope_at(grad, deviation, slope, offset, SILU: tl.constexpr):
    """dz = grad * silu'(z)."""
    dz = grad
    if SILU:
        z = deviation * slope + offset
        gate = sigmoid(z)
        dz = grad * gate * (1.0 + z * (1.0 - gate))
    return dz


@triton.jit
def sums_kernel(
    grad,  # [N, C, S] by strides
    x,  # [N, C, S] by strides
    mean,  # [N, G] float32
    rstd,  # [N, G] float32
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    partials,  # [N, slabs, 2, C] float32: P and Q
    channels,
    spatial,
    groups,
    grad_n,
    grad_c,
    grad_s,
    x_n,
    x_c,
    x_s,
    tiles,
    slabs,
    columns,
    SILU: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    sample, slab, first, channel = place(
        tl.program_id(0), channels, tiles, slabs, columns, POSITIONS, CHANNELS
    )
    fits = channel < channels
    gain, offset = affine(
        weight, bias, scale, shift, scale_stride, shift_stride, sample, channel, fits
    )
    centre, inverse = normal(mean, rstd, groups, channels, sample, channel, fits)
    p = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    q = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for tile in range(tiles):
        position = first + tile * POSITIONS
        mask = (position < spatial) & fits
        at = x + sample * x_n + position * x_s + channel * x_c
        beside = grad + sample * grad_n + position * grad_s + channel * grad_c
        deviation = tl.load(at, mask=mask, other=0.0).to(tl.float32) - centre
        given = tl.load(beside, mask=mask, other=0.0).to(tl.float32)
        dz = slope_at(given, deviation, inverse * gain, offset, SILU)
        dz = tl.where(mask, dz, 0.0)
        p += dz
        q += tl.where(mask, dz * deviation, 0.0)
    flat = tl.reshape(channel, (CHANNELS,))
    out = partials + (sample * slabs + slab) * 2 * channels + flat
    tl.store(out, tl.sum(p, axis=0), mask=flat < channels)
    total = tl.sum(q, axis=0) * tl.reshape(inverse, (CHANNELS,))
    tl.store(out + channels, total, mask=flat < channels)


@triton.jit
def fold_sums_kernel(
    partials,  # [N, slabs, 2, C] float32
    rstd,  # [N, G] float32
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    totals,  # [N, 2, C] float32: P and Q of a sample
    corrections,  # [N, G, 2] float32: rstd * c1 and rstd * c2
    grad_scale,
    grad_shift,
    channels,
    spatial,
    groups,
    slabs,
    ROWS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """One program per (sample, group)."""
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    members = channels // groups
    member = tl.arange(0, MEMBERS)
    fits = member < members
    channel = (program % groups).to(tl.int64) * members + member
    p = tl.zeros((ROWS, MEMBERS), tl.float32)
    q = tl.zeros((ROWS, MEMBERS), tl.float32)
    for start in range(0, slabs, ROWS):
        slab = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (slab < slabs) & fits[None, :]
        at = partials + (sample * slabs + slab) * 2 * channels + channel[None, :]
        p += tl.load(at, mask=mask, other=0.0)
        q += tl.load(at + channels, mask=mask, other=0.0)
    p = tl.sum(p, axis=0)
    q = tl.sum(q, axis=0)
    at = totals + sample * 2 * channels + channel
    tl.store(at, p, mask=fits)
    tl.store(at + channels, q, mask=fits)
    w = read(weight, sample, channel, 0, fits, 1.0)
    b = read(bias, sample, channel, 0, fits, 0.0)
    gain = w * (1.0 + read(scale, sample, channel, scale_stride, fits, 0.0))
    if grad_scale is not None:
        to = grad_scale + sample * channels + channel
        tl.store(to, (w * q + b * p).to(grad_scale.dtype.element_ty), mask=fits)
    if grad_shift is not None:
        to = grad_shift + sample * channels + channel
        tl.store(to, p.to(grad_shift.dtype.element_ty), mask=fits)
    share = tl.load(rstd + program) / (1.0 * members * spatial)
    tl.store(corrections + 2 * program, tl.sum(tl.where(fits, gain * q, 0.0), axis=0) * share)
    tl.store(corrections + 2 * program + 1, tl.sum(tl.where(fits, gain * p, 0.0), axis=0) * share)


@triton.jit
def parameter_gradients_kernel(
    totals,  # [N, 2, C] float32
    scale,
    scale_stride,
    grad_weight,  # [C]
    grad_bias,  # [C]
    samples,
    channels,
    BLOCK: tl.constexpr,
):
    """The samples in their order."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    fits = channel < channels
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for n in range(samples):
        sample = tl.full((), n, tl.int64)
        film = 1.0 + read(scale, sample, channel, scale_stride, fits, 0.0)
        at = totals + sample * 2 * channels + channel
        dbias += film * tl.load(at, mask=fits, other=0.0)
        dweight += film * tl.load(at + channels, mask=fits, other=0.0)
    tl.store(grad_weight + channel, dweight.to(grad_weight.dtype.element_ty), mask=fits)
    tl.store(grad_bias + channel, dbias.to(grad_bias.dtype.element_ty), mask=fits)


@triton.jit
def gradient_kernel(
    grad,  # [N, C, S] by strides
    x,  # [N, C, S] by strides
    grad_x,  # [N, C, S] by strides
    mean,  # [N, G] float32
    rstd,  # [N, G] float32
    corrections,  # [N, G, 2] float32
    weight,
    bias,
    scale,
    shift,
    scale_stride,
    shift_stride,
    channels,
    spatial,
    groups,
    grad_n,
    grad_c,
    grad_s,
    x_n,
    x_c,
    x_s,
    out_n,
    out_c,
    out_s,
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
    centre, inverse = normal(mean, rstd, groups, channels, sample, channel, fits)
    correction = corrections + 2 * (sample * groups + channel // (channels // groups))
    tilt = tl.load(correction, mask=fits, other=0.0) * inverse
    level = tl.load(correction + 1, mask=fits, other=0.0)
    slope = inverse * gain
    for tile in range(tiles):
        position = first + tile * POSITIONS
        mask = (position < spatial) & fits
        at = x + sample * x_n + position * x_s + channel * x_c
        beside = grad + sample * grad_n + position * grad_s + channel * grad_c
        deviation = tl.load(at, mask=mask, other=0.0).to(tl.float32) - centre
        given = tl.load(beside, mask=mask, other=0.0).to(tl.float32)
        dz = slope_at(given, deviation, slope, offset, SILU)
        dx = slope * dz - deviation * tilt - level
        to = grad_x + sample * out_n + position * out_s + channel * out_c
        tl.store(to, dx.to(grad_x.dtype.element_ty), mask=mask)


@triton_op("palette::group_norm_silu_backward_triton", mutates_args=())
def group_norm_silu_backward_triton(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The arguments and the results of palette::group_norm_silu_backward."""
    n, c = x.shape[:2]
    parameter = torch.float32 if weight is None else weight.dtype

    def film(value: Tensor | None) -> Tensor:
        shape, dtype = ((0,), torch.float32) if value is None else ((n, c), value.dtype)
        return x.new_empty(shape, dtype=dtype)

    grad_x = _layout.empty_like(x)
    grad_weight = x.new_empty((c,), dtype=parameter)
    grad_bias = x.new_empty((c,), dtype=parameter)
    grad_scale, grad_shift = film(scale), film(shift)
    if x.numel() == 0:
        return (
            grad_x,
            grad_weight.zero_(),
            grad_bias.zero_(),
            grad_scale.zero_(),
            grad_shift.zero_(),
        )
    given, rows, out = positions(_layout.dense_like(grad, x)), positions(x), positions(grad_x)
    spatial = rows.shape[2]
    plan = plan_of(c, spatial, _layout.channels_last(x))
    partials = x.new_empty((n, plan.slabs, 2, c), dtype=torch.float32)
    totals = x.new_empty((n, 2, c), dtype=torch.float32)
    corrections = x.new_empty((n, groups, 2), dtype=torch.float32)
    films = parameters(weight, bias, scale, shift)
    cut = (plan.tiles, plan.slabs, plan.columns)
    shape = {"POSITIONS": plan.positions, "CHANNELS": plan.channels, "num_warps": WARPS}
    grid = (n * plan.slabs * plan.columns,)
    members = triton.next_power_of_2(c // groups)
    wrap_triton(sums_kernel)[grid](
        given, rows, mean, rstd, *films, partials, c, spatial, groups, *given.stride(),
        *rows.stride(), *cut, SILU=silu, **shape,
    )  # fmt: skip
    wrap_triton(fold_sums_kernel)[(n * groups,)](
        partials, rstd, *films, totals, corrections, None if scale is None else grad_scale,
        None if shift is None else grad_shift, c, spatial, groups, plan.slabs,
        ROWS=max(1, FOLD // members), MEMBERS=members,
    )  # fmt: skip
    wrap_triton(parameter_gradients_kernel)[(triton.cdiv(c, FOLD),)](
        totals, films[2], films[4], grad_weight, grad_bias, n, c, BLOCK=FOLD
    )
    wrap_triton(gradient_kernel)[grid](
        given, rows, out, mean, rstd, corrections, *films, c, spatial, groups, *given.stride(),
        *rows.stride(), *out.stride(), *cut, SILU=silu, **shape,
    )  # fmt: skip
    return grad_x, grad_weight, grad_bias, grad_scale, grad_shift
