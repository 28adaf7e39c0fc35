"""Self-attention on the packed output of a qkv convolution, without layout shuffles around it.

The two published orders of the 3C channels (guided-diffusion's QKVAttentionLegacy and
QKVAttention): "legacy" is (head, q|k|v, channel), "new" is (q|k|v, head, channel). Scores are
scaled by (C / heads)^(-1/2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from palette.ops import _backends, _checks, _layout
from palette.ops._registration import direct, register

BACKENDS = ("reference", "cpp", "cuda", "triton", "sdpa")


def attention(qkv: Tensor, heads: int, order: str) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for every sample and head.

    Args:
        qkv: [N, 3C, H, W] or [N, 3C, T] float32, bfloat16, float16 or float64, any strides.
        heads: number of heads; divides C, and D = C / heads.
        order: "legacy" or "new", the order of the 3C channels.

    Returns:
        [N, C, H, W] or [N, C, T] in qkv's dtype, also under autocast; channels-last where qkv is,
        else contiguous.

    Raises:
        TypeError: qkv is no tensor or has a dtype that the op does not take.
        ValueError: a shape does not fit, or ``order`` is neither of the two.
    """
    if type(heads) is int:
        try:
            if _backends.in_cpp("attention", qkv):
                out: Tensor = _DIRECT(qkv, heads, order)[0]
                return out
        except Exception:  # it knows that something does not fit, and not how to say it
            _check(qkv, heads, order)
            raise
    _check(qkv, heads, order)
    backend = _backends.choose("attention", qkv.device.type)
    # kernels for GPUs know no float64
    if backend == "reference" or (backend in ("cuda", "triton") and qkv.dtype == torch.float64):
        return reference(qkv, heads, order)
    if backend == "sdpa":
        return sdpa(qkv, heads, order)
    if backend == "triton":
        out = _backends.in_triton(torch.ops.palette.attention_triton, qkv, heads, order)[0]
    else:
        out = torch.ops.palette.attention(qkv, heads, order)[0]
    return out


def reference(qkv: Tensor, heads: int, order: str) -> Tensor:
    """The op in plain differentiable PyTorch: what every backend is held against."""
    # Autocast would round the two products to half precision.
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = _unpack(qkv.to(_layout.wide(qkv.dtype)), heads, order)
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return _pack(weights @ v, qkv)


def sdpa(qkv: Tensor, heads: int, order: str) -> Tensor:
    """The op by torch's scaled_dot_product_attention on views of qkv."""
    # Its fused kernels for GPUs want the numbers of a token side by side.
    packed = _layout.dense(qkv, channels_last=True) if qkv.is_cuda else qkv
    with torch.autocast(qkv.device.type, enabled=False):
        return _pack(F.scaled_dot_product_attention(*_unpack(packed, heads, order)), qkv)


def _unpack(qkv: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [N, heads, T, D], views of a dense qkv."""
    n, channels = qkv.shape[:2]
    t, d = qkv.shape[2:].numel(), channels // (3 * heads)
    if order == "legacy":
        q, k, v = qkv.reshape(n, heads, 3, d, t).unbind(2)
    else:
        q, k, v = qkv.reshape(n, 3, heads, d, t).unbind(1)
    return q.transpose(-1, -2), k.transpose(-1, -2), v.transpose(-1, -2)


def _pack(out: Tensor, qkv: Tensor) -> Tensor:
    """out [N, heads, T, D] as [N, C, ...] in qkv's dtype and layout."""
    n, heads, t, d = out.shape
    out = out.to(qkv.dtype).transpose(-1, -2).reshape(n, heads * d, t)
    return _layout.dense_like(out.reshape(n, heads * d, *qkv.shape[2:]), qkv)


def _check(qkv: Tensor, heads: int, order: str) -> None:
    op = "attention"
    _checks.tensor(op, "qkv", qkv)
    _checks.dtype(op, "qkv", qkv, _checks.FLOATING)
    if qkv.dim() not in (3, 4):
        raise ValueError(
            f"{op}: qkv has shape {list(qkv.shape)}, wanted [N, 3C, H, W] or [N, 3C, T]"
        )
    if order not in ("legacy", "new"):
        raise ValueError(f"{op}: order is {_checks.described(order)}, wanted 'legacy' or 'new'")
    _checks.integer(op, "heads", heads)
    if heads < 1 or qkv.shape[1] == 0 or qkv.shape[1] % (3 * heads) != 0:
        raise ValueError(
            f"{op}: qkv has shape {list(qkv.shape)}, wanted a multiple of 3 * heads = {3 * heads}"
            " channels"
        )


def _forward(qkv: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor]:
    """``reference`` together with the log-sum-exp [N, heads, T] that the backward pass needs."""
    q, k, v = _unpack(qkv.to(_layout.wide(qkv.dtype)), heads, order)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    lse = torch.logsumexp(scores, dim=-1)
    return _pack(torch.softmax(scores, dim=-1) @ v, qkv), lse


def _backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, order: str
) -> Tensor:
    """The gradient for qkv, with the weights recomputed from the log-sum-exp."""
    q, k, v = _unpack(qkv.to(lse.dtype), heads, order)
    n, _, t, d = q.shape

    def by_head(value: Tensor) -> Tensor:  # [N, C, ...] -> [N, heads, T, D]
        return value.to(lse.dtype).reshape(n, heads, d, t).transpose(-1, -2)

    g, o = by_head(grad), by_head(out)
    scale = d**-0.5
    weights = torch.exp(q @ k.transpose(-1, -2) * scale - lse.unsqueeze(-1))
    slope = weights * (g @ v.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale
    grads = (slope @ k, slope.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g)
    packed = torch.stack([each.transpose(-1, -2) for each in grads], 2 if order == "legacy" else 1)
    return _layout.dense_like(packed.reshape(qkv.shape).to(qkv.dtype), qkv)


def _fake(qkv: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor]:
    n, c = qkv.shape[:2]
    lse = qkv.new_empty((n, heads, qkv.shape[2:].numel()), dtype=_layout.wide(qkv.dtype))
    return _layout.empty_like(qkv, c // 3), lse


def _fake_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, order: str
) -> Tensor:
    return _layout.empty_like(qkv)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.heads, ctx.order = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    return differentiate(torch.ops.palette.attention_backward, ctx, grad)


def differentiate(backward: Callable[..., Any], ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    """The gradients of the arguments, by the op ``backward`` on what ``save`` kept."""
    if grad is None:
        return None, None, None
    return backward(grad, *ctx.saved_tensors, ctx.heads, ctx.order), None, None


def refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        'attention: the compiled op has no second derivative; palette.ops.use("reference") has one'
    )


register(
    "attention(Tensor qkv, int heads, str order) -> (Tensor, Tensor)",
    _forward,
    _fake,
    gradient=_differentiate,
    save=save,
)
register(
    "attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, int heads, str order)"
    " -> Tensor",
    _backward,
    _fake_backward,
    gradient=refuse,
)
_DIRECT_BACKWARD = direct(torch.ops.palette.attention_backward.default, refuse)
_DIRECT = direct(
    torch.ops.palette.attention.default,
    lambda ctx, grad, *_: differentiate(_DIRECT_BACKWARD, ctx, grad),
    save,
)
_backends.declare("attention", BACKENDS)
