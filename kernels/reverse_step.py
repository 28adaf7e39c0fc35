"""palette::reverse_step in Triton (palette/ops/reverse_step.py): a solver's step in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from palette.kernels.noise import normals
from torch import Tensor
from torch.library import triton_op, wrap_triton

BLOCK = 128  # counters of one program, four elements each


@triton.jit
def rounded(product, zero):
    """The product, rounded: Triton would fuse it with the sum that follows.

    ``zero`` is 0, which the compiler cannot know.
    """
    return (product.to(tl.int32, bitcast=True) ^ zero).to(tl.float32, bitcast=True)


@triton.jit
def fetch(values, sample, channel, position, n, c, p, mask):
    """float32 [BLOCK, 4] of a tensor [N, C, H * W] by strides."""
    at = values + sample * n + channel * c + position * p
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def put(values, sample, channel, position, n, c, p, result, mask):
    at = values + sample * n + channel * c + position * p
    tl.store(at, result.to(values.dtype.element_ty), mask=mask)


@triton.jit
def reverse_step_kernel(
    state, output, noise, history, known, mask, slot,  # [N, C, H * W] by strides
    table,  # [S, 6] float32: a, b, c1, c2, c3, sigma
    step,  # int64, one or [N]
    seeds,  # [N] int64, or None
    step_stride, channels, plane, zero,
    state_n, state_c, state_p,
    output_n, output_c, output_p,
    noise_n, noise_c, noise_p,
    history_n, history_c, history_p,
    known_n, known_c, known_p,
    mask_n, mask_c, mask_p,
    slot_n, slot_c, slot_p,
    BLOCK: tl.constexpr,
):  # fmt: skip
    elements = channels * plane
    blocks = tl.cdiv(elements, 4 * BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    quad = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    element = quad[:, None] * 4 + tl.arange(0, 4)[None, :]
    fits = element < elements
    c = element // plane
    p = element % plane

    now = tl.load(step + n * step_stride)
    row = table + now * 6
    y = fetch(state, n, c, p, state_n, state_c, state_p, fits)
    guess = fetch(output, n, c, p, output_n, output_c, output_p, fits)
    x0 = rounded(tl.load(row) * y, zero) + rounded(tl.load(row + 1) * guess, zero)
    # comparisons, because minimum and maximum drop NaN
    x0 = tl.where(x0 < -1.0, -1.0, tl.where(x0 > 1.0, 1.0, x0))
    y = rounded(tl.load(row + 2) * x0, zero) + rounded(tl.load(row + 3) * y, zero)
    if history is not None:
        before = fetch(history, n, c, p, history_n, history_c, history_p, fits)
        y = y + rounded(tl.load(row + 4) * before, zero)
        put(history, n, c, p, history_n, history_c, history_p, x0, fits)
    if seeds is not None:
        z0, z1, z2, z3 = normals(tl.load(seeds + n), quad, now + 1, now * 0, now * 0)
        z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK, 4))
        y = y + rounded(tl.load(row + 5) * z, zero)
    elif noise is not None:
        z = fetch(noise, n, c, p, noise_n, noise_c, noise_p, fits)
        y = y + rounded(tl.load(row + 5) * z, zero)
    if mask is not None:
        hole = fetch(mask, n, c, p, mask_n, mask_c, mask_p, fits)
        outside = fetch(known, n, c, p, known_n, known_c, known_p, fits)
        y = rounded(outside * (1.0 - hole), zero) + rounded(hole * y, zero)
    put(state, n, c, p, state_n, state_c, state_p, y, fits)
    if slot is not None:
        put(slot, n, c, p, slot_n, slot_c, slot_p, y, fits)


def _has_one_position_stride(x: Tensor) -> bool:
    h, w = x.shape[2:]
    return h == 1 or w == 1 or x.stride(2) == w * x.stride(3)


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of x [N, C, H * W]."""
    if x is None:
        return 0, 0, 0
    return x.stride(0), x.stride(1), x.stride(3) if x.shape[3] > 1 else x.stride(2)


@triton_op("palette::reverse_step_triton", mutates_args={"state", "history", "slot"})
def reverse_step_triton(
    state: Tensor,
    output: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    history: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    slot: Tensor | None,
) -> None:
    """The arguments of palette::reverse_step."""
    if state.numel() == 0:
        return

    def used(value: Tensor | None) -> Tensor | None:
        """The tensor, or a copy without gaps between its rows."""
        if value is None:
            return None
        value = value.expand(state.shape)
        return value if _has_one_position_stride(value) else value.contiguous()

    tensors = [used(each) for each in (state, output, noise, history, known, mask, slot)]
    strides = [stride for each in tensors for stride in _strides(each)]
    n, c, h, w = state.shape
    wrap_triton(reverse_step_kernel)[(n * triton.cdiv(c * h * w, 4 * BLOCK),)](
        *tensors,
        table.contiguous(),
        step.contiguous(),
        None if seeds is None else seeds.contiguous(),
        0 if step.dim() == 0 else 1,
        c,
        h * w,
        0,
        *strides,
        BLOCK=BLOCK,
    )
    for original, worked_on in ((state, tensors[0]), (history, tensors[3]), (slot, tensors[6])):
        if worked_on is not None and not _has_one_position_stride(original):
            original.copy_(worked_on)
