"""palette::noise in Triton: Philox4x32-10 words and Box-Muller normals (palette/ops/noise.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

BLOCK = 256  # counters of one program

TWO_PI: tl.constexpr = tl.constexpr(6.2831854820251465)  # rounded to float32


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 counters [...] and keys (Salmon et al., SC 2011)."""
    for _ in tl.static_range(10):
        a = c0
        b = c2
        c0 = tl.umulhi(b, 0xCD9E8D57) ^ c1 ^ k0
        c2 = tl.umulhi(a, 0xD2511F53) ^ c3 ^ k1
        c1 = b * 0xCD9E8D57
        c3 = a * 0xD2511F53
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """uint32 as float32 in (0, 1]; the product by a power of two is exact."""
    return word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def box_muller(first, second):
    """Two normals from two words."""
    radius = tl.sqrt(-2.0 * tl.log(uniform(first)))
    angle = uniform(second) * TWO_PI
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(seed, quad, step, stream, layer):
    """Elements 4 * quad ... 4 * quad + 3 of an image's noise.

    ``seed`` and ``step`` are scalars int64, ``quad`` is [BLOCK] int64, ``stream`` and ``layer`` are
    scalars; of all but the seed the low 32 bits count.
    """
    zero = quad.to(tl.uint32) * 0
    k0 = seed.to(tl.uint32) + zero
    k1 = (seed >> 32).to(tl.uint32) + zero
    c0, c1, c2, c3 = philox(
        quad.to(tl.uint32),
        step.to(tl.uint32) + zero,
        stream.to(tl.uint32) + zero,
        layer.to(tl.uint32) + zero,
        k0,
        k1,
    )
    z0, z1 = box_muller(c0, c1)
    z2, z3 = box_muller(c2, c3)
    return z0, z1, z2, z3


@triton.jit
def noise_kernel(
    seeds,  # [N] int64
    step,  # int64, one or [N]
    out,  # [N, elements] float32
    step_stride,
    elements,
    stream,
    layer,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(elements, 4 * BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    quad = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # scalars may arrive specialised to constants, which know no conversion
    stream = tl.full((), stream, tl.int64)
    layer = tl.full((), layer, tl.int64)
    now = tl.load(step + image * step_stride)
    z0, z1, z2, z3 = normals(tl.load(seeds + image), quad, now, stream, layer)
    values = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [BLOCK, 2, 2]: z0 z1 | z2 z3
    element = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(
        out + image * elements + element, tl.reshape(values, (BLOCK, 4)), mask=element < elements
    )


@triton_op("palette::noise_triton", mutates_args=())
def noise_triton(
    seeds: Tensor, step: Tensor, shape: Sequence[int], stream: int, layer: int
) -> Tensor:
    """The arguments and the result of palette::noise."""
    out = seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32)
    elements = 1
    for size in shape:
        elements *= size
    if seeds.shape[0] == 0 or elements == 0:
        return out
    wrap_triton(noise_kernel)[(seeds.shape[0] * triton.cdiv(elements, 4 * BLOCK),)](
        seeds.contiguous(),
        step.contiguous(),
        out,
        0 if step.dim() == 0 else 1,
        elements,
        stream,
        layer,
        BLOCK=BLOCK,
    )
    return out
