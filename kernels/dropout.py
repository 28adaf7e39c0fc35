"""palette::dropout in Triton (palette/ops/dropout.py): the mask is made in registers, never stored.

Contiguous, the four words of a counter are neighbours. Channels-last, the counters of one row
belong to neighbouring channels, and their words to four pixels; that wants a number of pixels that
four divides, and other images take the contiguous way through copies.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from palette.kernels.noise import philox, uniform
from torch import Tensor
from torch.library import triton_op, wrap_triton

from palette.ops import _layout
from palette.ops.dropout import differentiate, save

BLOCK = 256  # counters of one program
CHANNELS = 64  # at most: beside each other in a channels-last program

STREAM: tl.constexpr = tl.constexpr(3)  # of dropout, palette/ops/philox.py


@triton.jit
def words(seed, counter, layer):
    """The four words of each counter [...] int64."""
    zero = counter.to(tl.uint32) * 0
    k0 = seed.to(tl.uint32) + zero
    k1 = (seed >> 32).to(tl.uint32) + zero
    # layer may arrive as a constant, which knows no conversion
    layer = tl.full((), layer, tl.int64).to(tl.uint32) + zero
    return philox(counter.to(tl.uint32), zero, zero + STREAM, layer, k0, k1)


@triton.jit
def keep(x, y, at, word, p, scale, mask):
    """y = scale * x where the number of the word reaches p, else 0; at the offsets ``at``."""
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * scale
    values = tl.where(uniform(word) >= p, values, 0.0)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def run_kernel(x, y, seeds, p, scale, layer, elements, BLOCK: tl.constexpr):
    """x and y are [N, elements], dense."""
    blocks = tl.cdiv(elements, 4 * BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    counter = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = words(tl.load(seeds + n), counter, layer)
    word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK, 4))
    element = counter[:, None] * 4 + tl.arange(0, 4)[None, :]
    keep(x, y, n * elements + element, word, p, scale, element < elements)


@triton.jit
def rows_kernel(
    x, y, seeds, p, scale, layer, channels, plane, QUADS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """x and y are [N, 4 * plane, channels], dense."""
    across = tl.cdiv(channels, CHANNELS)
    down = tl.cdiv(plane, QUADS)
    program = tl.program_id(0)
    n = (program // across // down).to(tl.int64)
    channel = ((program % across) * CHANNELS + tl.arange(0, CHANNELS))[None, :].to(tl.int64)
    quad = (program // across % down).to(tl.int64) * QUADS + tl.arange(0, QUADS)[:, None]
    mask = (quad < plane) & (channel < channels)
    w0, w1, w2, w3 = words(tl.load(seeds + n), channel * plane + quad, layer)
    at = (n * plane + quad) * 4 * channels + channel
    keep(x, y, at, w0, p, scale, mask)
    keep(x, y, at + channels, w1, p, scale, mask)
    keep(x, y, at + 2 * channels, w2, p, scale, mask)
    keep(x, y, at + 3 * channels, w3, p, scale, mask)


@triton_op("palette::dropout_triton", mutates_args=())
def dropout_triton(x: Tensor, seeds: Tensor, p: float, layer: int) -> Tensor:
    """The arguments and the result of palette::dropout."""
    if x.numel() == 0:
        return _layout.empty_like(x)
    n, c = x.shape[:2]
    pixels = x.shape[2:].numel()
    shared = (seeds.contiguous(), p, 1 / (1 - p), layer)
    if _layout.channels_last(x) and pixels % 4 == 0:
        y = _layout.empty_like(x)
        width = min(triton.next_power_of_2(c), CHANNELS)
        quads = BLOCK // width
        grid = (n * triton.cdiv(c, width) * triton.cdiv(pixels // 4, quads),)
        wrap_triton(rows_kernel)[grid](
            _layout.dense_like(x, x), y, *shared, c, pixels // 4, QUADS=quads, CHANNELS=width
        )
        return y
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    wrap_triton(run_kernel)[(n * triton.cdiv(c * pixels, 4 * BLOCK),)](
        x.contiguous(), y, *shared, c * pixels, BLOCK=BLOCK
    )
    return _layout.dense_like(y, x)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return differentiate(torch.ops.palette.dropout_triton, ctx, grad)


dropout_triton.register_autograd(_differentiate, setup_context=save)
