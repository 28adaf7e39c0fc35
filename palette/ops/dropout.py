"""Dropout whose mask is a function of (seed, layer): the seeds are kept for the backward pass, not
the mask.

An element is kept where its uniform number reaches p: Philox4x32-10 with the image's 64-bit seed
as key and (element // 4, 0, 3, layer) as counter (``palette.ops.philox``, stream 3). The element
counts in [C, H, W] order of one image, whatever the memory layout, so an image's mask depends
neither on the batch around it nor on the number of processes. Dropout as in Srivastava et al.,
JMLR 15 (2014), with the scale applied in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from palette.ops import _backends, _checks, _layout, philox
from palette.ops._registration import direct, register

BACKENDS = ("reference", "cpp", "cuda", "triton")


def dropout(x: Tensor, seeds: Tensor, p: float, layer: int) -> Tensor:
    """x where it is kept, times 1 / (1 - p); 0 where it is dropped, also in the place of NaN.

    1 / (1 - p) is computed in float64 and rounded to float32, p is compared as float32, and the
    product is one of float32, rounded once to x's dtype. For float64 x the scale and the product
    are float64; the mask is the same for every dtype.

    Args:
        x: [N, C, ...] float32, bfloat16, float16 or float64, any strides, at most 2^34 elements
            per image.
        seeds: [N] int64, one per image, on x's device.
        p: the share to drop, in [0, 1).
        layer: number of the dropout layer, in [0, 2^32).

    Returns:
        [N, C, ...] in x's dtype, also under autocast; channels-last where x is, else contiguous.
        The same bits in every backend. Its gradient is the same dropout of the gradient, in x's
        layout.

    Raises:
        TypeError: an argument is no tensor, no number or has a dtype that the op does not take.
        ValueError: a shape or a device does not fit, or a number is out of range.
    """
    if type(p) is float and type(layer) is int:
        try:
            if _backends.in_cpp("dropout", x):
                y: Tensor = _DIRECT(x, seeds, p, layer)
                return y
        except Exception:  # it knows that something does not fit, and not how to say it
            _check(x, seeds, p, layer)
            raise
    _check(x, seeds, p, layer)
    backend = _backends.choose("dropout", x.device.type)
    # kernels for GPUs know no float64
    if backend == "reference" or (backend in ("cuda", "triton") and x.dtype == torch.float64):
        return reference(x, seeds, p, layer)
    ops = torch.ops.palette
    if backend == "triton":
        y = _backends.in_triton(ops.dropout_triton, x, seeds, p, layer)
    else:
        y = ops.dropout(x, seeds, p, layer)
    return y


def reference(x: Tensor, seeds: Tensor, p: float, layer: int) -> Tensor:
    """The op in plain differentiable PyTorch: what every backend is held against."""
    kept = philox.uniform(seeds, x.shape[1:], stream=philox.DROPOUT, layer=layer) >= p
    y = torch.where(kept, x.to(_layout.wide(x.dtype)) * (1 / (1 - p)), 0.0)
    return _layout.dense_like(y.to(x.dtype), x)


def _check(x: Tensor, seeds: Tensor, p: float, layer: int) -> None:
    op = "dropout"
    _checks.tensor(op, "x", x)
    _checks.dtype(op, "x", x, _checks.FLOATING)
    if x.dim() < 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, wanted [N, C, ...]")
    if x.shape[1:].numel() > 2**34:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, wanted at most 2^34 elements per image"
        )
    _checks.tensor(op, "seeds", seeds)
    _checks.dtype(op, "seeds", seeds, (torch.int64,))
    _checks.shape(op, "seeds", seeds, (x.shape[0],), "one per image of x")
    _checks.device(op, "seeds", seeds, x.device, "x")
    _checks.number(op, "p", p)
    if not 0 <= p < 1:
        raise ValueError(f"{op}: p is {p}, wanted a number in [0, 1)")
    _checks.integer(op, "layer", layer)
    if not 0 <= layer < 2**32:
        raise ValueError(f"{op}: layer is {layer}, wanted a number in [0, 2^32)")


def _fake(x: Tensor, seeds: Tensor, p: float, layer: int) -> Tensor:
    # Not only a shape function: seeds on the device "meta" take a call in C++ here.
    _check(x, seeds, p, layer)
    return _layout.empty_like(x)


def save(ctx: Any, inputs: tuple[Tensor, Tensor, float, int], output: Tensor) -> None:
    x, seeds, ctx.p, ctx.layer = inputs
    ctx.channels_last = _layout.channels_last(x)
    ctx.save_for_backward(seeds)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return differentiate(torch.ops.palette.dropout, ctx, grad)


def differentiate(op: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of the arguments, by the op itself: it is linear in x."""
    (seeds,) = ctx.saved_tensors
    return op(_layout.dense(grad, ctx.channels_last), seeds, ctx.p, ctx.layer), None, None, None


register(
    "dropout(Tensor x, Tensor seeds, float p, int layer) -> Tensor",
    reference,
    _fake,
    gradient=_differentiate,
    save=save,
)
_DIRECT: Callable[..., Any] = direct(
    torch.ops.palette.dropout.default,
    lambda ctx, grad: differentiate(_DIRECT, ctx, grad),
    save,
)
_backends.declare("dropout", BACKENDS)
