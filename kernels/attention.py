"""palette::attention in Triton (palette/ops/attention.py), on the packed qkv where it lies.

One program per (block of queries, head, sample) walks over the keys with a running maximum (Milakov
and Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691). The backward computes the weights again
from the log-sum-exp, once walking over keys for dq and once walking over queries for dk and dv:
every sum in a fixed order, without atomics. Scores and sums are float32; half formats round the
weights, and their gradients, to half for the tensor cores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from palette.ops import _layout
from palette.ops.attention import differentiate, refuse, save

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def tile(values, row, column, rows, columns, row_stride, column_stride):
    """[ROWS, COLUMNS] of a matrix by strides, zero outside of it."""
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
    return tl.load(values + at, mask=mask, other=0.0)


@triton.jit
def put(values, result, row, column, rows, columns, row_stride, column_stride):
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
    tl.store(values + at, result.to(values.dtype.element_ty), mask=mask)


@triton.jit
def place(tokens, heads, BLOCK: tl.constexpr):
    """(sample, head, tokens [BLOCK] of the block) of a program."""
    blocks = tl.cdiv(tokens, BLOCK)
    program = tl.program_id(0)
    token = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    head = (program // blocks % heads).to(tl.int64)
    sample = (program // blocks // heads).to(tl.int64)
    return sample, head, token


@triton.jit
def product(a, b):
    """a b, summed in float32; float32 factors are not cut to tf32."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def forward_kernel(
    qkv,  # [N, 3C, T] by strides
    out,  # [N, C, T] by strides
    lse,  # [N, heads, T] float32
    heads,
    tokens,
    size,  # channels of a head
    scale,
    head_step,  # channels of qkv from a head to the next
    part_step,  # channels of qkv from q to k and from k to v
    qkv_n,
    qkv_c,
    qkv_t,
    out_n,
    out_c,
    out_t,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,  # size, rounded up
):
    sample, head, query = place(tokens, heads, QUERIES)
    channel = tl.arange(0, WIDTH)
    base = qkv + sample * qkv_n + head * head_step * qkv_c
    q = tile(base, query, channel, tokens, size, qkv_t, qkv_c)
    factor = scale * LOG2_E  # exp(x) = 2^(x log2 e)
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, tokens, KEYS):
        key = start + tl.arange(0, KEYS)
        k = tile(base + part_step * qkv_c, key, channel, tokens, size, qkv_t, qkv_c)
        v = tile(base + 2 * part_step * qkv_c, key, channel, tokens, size, qkv_t, qkv_c)
        scores = product(q, tl.trans(k)) * factor
        scores = tl.where(key[None, :] < tokens, scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp2(highest - now)
        weights = tl.exp2(scores - now[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None] + product(weights.to(v.dtype), v)
        highest = now
    base = out + sample * out_n + head * size * out_c
    put(base, mixed / total[:, None], query, channel, tokens, size, out_t, out_c)
    at = lse + (sample * heads + head) * tokens + query
    tl.store(at, (highest + tl.log2(total)) / LOG2_E, mask=query < tokens)


@triton.jit
def slopes(q, k, v, grad, lse, delta, factor, scale, key, tokens):
    """The weights [QUERIES, KEYS] and the gradients of the unscaled scores."""
    scores = product(q, tl.trans(k)) * factor
    weights = tl.exp2(scores - (lse * LOG2_E)[:, None])
    weights = tl.where(key[None, :] < tokens, weights, 0.0)
    through = product(grad, tl.trans(v))
    return weights, weights * (through - delta[:, None]) * scale


@triton.jit
def query_kernel(
    grad,  # [N, C, T] by strides
    qkv,  # [N, 3C, T] by strides
    out,  # [N, C, T] by strides
    lse,  # [N, heads, T] float32
    grad_qkv,  # [N, 3C, T] by strides
    heads,
    tokens,
    size,
    scale,
    head_step,
    part_step,
    grad_n,
    grad_c,
    grad_t,
    qkv_n,
    qkv_c,
    qkv_t,
    out_n,
    out_c,
    out_t,
    into_n,
    into_c,
    into_t,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dq of a block of queries."""
    sample, head, query = place(tokens, heads, QUERIES)
    channel = tl.arange(0, WIDTH)
    base = qkv + sample * qkv_n + head * head_step * qkv_c
    q = tile(base, query, channel, tokens, size, qkv_t, qkv_c)
    to = grad + sample * grad_n + head * size * grad_c
    g = tile(to, query, channel, tokens, size, grad_t, grad_c)
    to = out + sample * out_n + head * size * out_c
    o = tile(to, query, channel, tokens, size, out_t, out_c)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    at = lse + (sample * heads + head) * tokens + query
    norm = tl.load(at, mask=query < tokens, other=0.0)
    dq = tl.zeros((QUERIES, WIDTH), tl.float32)
    for start in range(0, tokens, KEYS):
        key = start + tl.arange(0, KEYS)
        k = tile(base + part_step * qkv_c, key, channel, tokens, size, qkv_t, qkv_c)
        v = tile(base + 2 * part_step * qkv_c, key, channel, tokens, size, qkv_t, qkv_c)
        _, slope = slopes(q, k, v, g, norm, delta, scale * LOG2_E, scale, key, tokens)
        dq += product(slope.to(k.dtype), k)
    to = grad_qkv + sample * into_n + head * head_step * into_c
    put(to, dq, query, channel, tokens, size, into_t, into_c)


@triton.jit
def key_kernel(
    grad,  # [N, C, T] by strides
    qkv,  # [N, 3C, T] by strides
    out,  # [N, C, T] by strides
    lse,  # [N, heads, T] float32
    grad_qkv,  # [N, 3C, T] by strides
    heads,
    tokens,
    size,
    scale,
    head_step,
    part_step,
    grad_n,
    grad_c,
    grad_t,
    qkv_n,
    qkv_c,
    qkv_t,
    out_n,
    out_c,
    out_t,
    into_n,
    into_c,
    into_t,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dk and dv of a block of keys."""
    sample, head, key = place(tokens, heads, KEYS)
    channel = tl.arange(0, WIDTH)
    base = qkv + sample * qkv_n + head * head_step * qkv_c
    k = tile(base + part_step * qkv_c, key, channel, tokens, size, qkv_t, qkv_c)
    v = tile(base + 2 * part_step * qkv_c, key, channel, tokens, size, qkv_t, qkv_c)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    for start in range(0, tokens, QUERIES):
        query = start + tl.arange(0, QUERIES)
        q = tile(base, query, channel, tokens, size, qkv_t, qkv_c)
        of = grad + sample * grad_n + head * size * grad_c
        g = tile(of, query, channel, tokens, size, grad_t, grad_c)
        of = out + sample * out_n + head * size * out_c
        o = tile(of, query, channel, tokens, size, out_t, out_c)
        delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
        at = lse + (sample * heads + head) * tokens + query
        norm = tl.load(at, mask=query < tokens, other=0.0)
        # rows beyond the last query are zero in q, g and o: they add nothing
        weights, slope = slopes(q, k, v, g, norm, delta, scale * LOG2_E, scale, key, tokens)
        dv += product(tl.trans(weights.to(g.dtype)), g)
        dk += product(tl.trans(slope.to(q.dtype)), q)
    to = grad_qkv + sample * into_n + (head * head_step + part_step) * into_c
    put(to, dk, key, channel, tokens, size, into_t, into_c)
    put(to + part_step * into_c, dv, key, channel, tokens, size, into_t, into_c)


def _tokens(x: Tensor) -> Tensor:
    """x [N, C, ...] as [N, C, T], a view wherever one stride serves all tokens."""
    return x.flatten(2)


def _steps(qkv: Tensor, heads: int, order: str) -> tuple[int, int]:
    """Channels from a head to the next, and from q to k to v."""
    c = qkv.shape[1] // 3
    return (3 * (c // heads), c // heads) if order == "legacy" else (c // heads, c)


def _tiles(tokens: int, size: int, element: int) -> dict[str, int]:
    """Tiles as large as shared memory holds several of. Not measured yet."""
    width = max(16, triton.next_power_of_2(size))
    row = width * element  # bytes
    largest = 64 if row <= 128 else 32 if row <= 512 else 16
    side = min(largest, max(16, triton.next_power_of_2(tokens)))
    return {"QUERIES": side, "KEYS": side, "WIDTH": width, "num_warps": 4}


@triton_op("palette::attention_triton", mutates_args=())
def attention_triton(qkv: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor]:
    """The arguments and the results of palette::attention."""
    n, width = qkv.shape[:2]
    out = _layout.empty_like(qkv, width // 3)
    rows, into = _tokens(qkv), _tokens(out)
    tokens, size = rows.shape[2], width // (3 * heads)
    lse = qkv.new_empty((n, heads, tokens), dtype=torch.float32)
    if qkv.numel() == 0:
        return out, lse
    tiles = _tiles(tokens, size, qkv.element_size())
    wrap_triton(forward_kernel)[(triton.cdiv(tokens, tiles["QUERIES"]) * heads * n,)](
        rows, into, lse, heads, tokens, size, size**-0.5, *_steps(qkv, heads, order),
        *rows.stride(), *into.stride(), **tiles,
    )  # fmt: skip
    return out, lse


@triton_op("palette::attention_backward_triton", mutates_args=())
def attention_backward_triton(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, order: str
) -> Tensor:
    """The arguments and the result of palette::attention_backward."""
    grad_qkv = _layout.empty_like(qkv)
    if qkv.numel() == 0:
        return grad_qkv
    rows, into = _tokens(qkv), _tokens(grad_qkv)
    given, made = _tokens(_layout.dense_like(grad, qkv)), _tokens(out)
    n, width, tokens = rows.shape
    size = width // (3 * heads)
    tiles = _tiles(tokens, size, qkv.element_size())
    for kernel, block in ((query_kernel, tiles["QUERIES"]), (key_kernel, tiles["KEYS"])):
        wrap_triton(kernel)[(triton.cdiv(tokens, block) * heads * n,)](
            given, rows, made, lse.contiguous(), into, heads, tokens, size, size**-0.5,
            *_steps(qkv, heads, order), *given.stride(), *rows.stride(), *made.stride(),
            *into.stride(), **tiles,
        )  # fmt: skip
    return grad_qkv


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    return differentiate(torch.ops.palette.attention_backward_triton, ctx, grad)


attention_triton.register_autograd(_differentiate, setup_context=save)
attention_backward_triton.register_autograd(refuse)
