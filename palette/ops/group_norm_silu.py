"""GroupNorm with optional FiLM and optional SiLU in one op.

y = silu(norm(x) * (1 + scale) + shift), computed in float32 (float64 for float64) and rounded once.
GroupNorm as in Wu and He, arXiv:1803.08494; FiLM and SiLU in the order of the guided-diffusion
U-Net's residual block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from palette.ops import _backends, _checks, _layout
from palette.ops._registration import direct, register

BACKENDS = ("reference", "cpp", "cuda", "triton")


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """GroupNorm of x, then ``* (1 + scale) + shift`` where given, then SiLU where ``silu``.

    Args:
        x: [N, C, ...] float32, bfloat16, float16 or float64, any strides.
        weight, bias: [C], in x's dtype or float32; None stands for 1 and 0.
        groups: number of groups; divides C.
        eps: added to the (biased) variance inside the square root.
        scale, shift: [N, C], in x's dtype or float32; None stands for 0.

    Returns:
        y [N, C, ...] in x's dtype, also under autocast; channels-last where x is, else contiguous.

    Raises:
        TypeError: an argument is no tensor or has a dtype that the op does not take.
        ValueError: a shape or a device does not fit, or ``groups`` does not divide C.
    """
    if type(groups) is int and type(eps) is float and type(silu) is bool:
        try:
            if _backends.in_cpp("group_norm_silu", x):
                y: Tensor = _DIRECT(x, weight, bias, groups, eps, scale, shift, silu)[0]
                return y
        except Exception:  # it knows that something does not fit, and not how to say it
            _check(x, weight, bias, groups, eps, scale, shift, silu)
            raise
    arguments = (x, weight, bias, groups, eps, scale, shift, silu)
    _check(*arguments)
    backend = _backends.choose("group_norm_silu", x.device.type)
    # kernels for GPUs know no float64
    if backend == "reference" or (backend in ("cuda", "triton") and x.dtype == torch.float64):
        return reference(*arguments)
    if backend == "triton":
        y = _backends.in_triton(torch.ops.palette.group_norm_silu_triton, *arguments)[0]
    else:
        y = torch.ops.palette.group_norm_silu(*arguments)[0]
    return y


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """The op in plain differentiable PyTorch: what every backend is held against."""
    y = torch.group_norm(_plain(x), groups, eps=eps)
    return _finish(y, x, weight, bias, scale, shift, silu)


def _plain(x: Tensor) -> Tensor:
    """x contiguous, in the dtype to compute in.

    On channels-last tensors torch's CPU kernel takes the variance as E[x^2] - E[x]^2, which has no
    digits left where the mean is far from zero; its contiguous one does not.
    """
    return x.to(_layout.wide(x.dtype)).contiguous()


def _finish(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> Tensor:
    """Everything after the normalisation, then x's dtype and layout."""

    def spread(value: Tensor) -> Tensor:  # [C] or [N, C], to go with x [N, C, ...]
        return value.to(y.dtype).reshape(value.shape + (1,) * (x.dim() - 2))

    if weight is not None:
        y = y * spread(weight)
    if bias is not None:
        y = y + spread(bias)
    if scale is not None:
        y = y * (1 + spread(scale))
    if shift is not None:
        y = y + spread(shift)
    if silu:
        y = F.silu(y)
    return _layout.dense_like(y.to(x.dtype), x)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> None:
    op = "group_norm_silu"
    _checks.tensor(op, "x", x)
    _checks.dtype(op, "x", x, _checks.FLOATING)
    if x.dim() < 2:
        raise ValueError(f"{op}: x has shape {list(x.shape)}, wanted [N, C, ...]")
    n, c = x.shape[:2]
    _checks.integer(op, "groups", groups)
    if groups < 1 or c % groups != 0:
        raise ValueError(f"{op}: groups is {groups}, wanted a divisor of x's {c} channels")
    _checks.number(op, "eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps is {eps}, wanted a finite number >= 0")
    if not isinstance(silu, bool):
        raise TypeError(f"{op}: silu is {_checks.described(silu)}, wanted True or False")
    if weight is not None:
        _check_parameter("weight", weight, x, (c,), "x's channels")
    if bias is not None:
        _check_parameter("bias", bias, x, (c,), "x's channels")
        if weight is not None:
            _checks.dtype(op, "bias, beside weight,", bias, (weight.dtype,))
    if scale is not None:
        _check_parameter("scale", scale, x, (n, c), "x's samples and channels")
    if shift is not None:
        _check_parameter("shift", shift, x, (n, c), "x's samples and channels")
        if scale is not None:
            _checks.dtype(op, "shift, beside scale,", shift, (scale.dtype,))


def _check_parameter(
    name: str, value: Tensor, x: Tensor, wanted: tuple[int, ...], meaning: str
) -> None:
    op = "group_norm_silu"
    _checks.tensor(op, name, value)
    _checks.dtype(op, name, value, (x.dtype, torch.float32))
    _checks.shape(op, name, value, wanted, meaning)
    _checks.device(op, name, value, x.device, "x")


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference`` together with the statistics that the backward pass needs."""
    n, c = x.shape[:2]
    pixels = x.shape[2:].numel()
    y, mean, rstd = torch.native_group_norm(_plain(x), None, None, n, c, pixels, groups, eps)
    return _finish(y, x, weight, bias, scale, shift, silu), mean, rstd


def _backward(
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
    """Gradients for x, weight, bias, scale and shift.

    With x^ the normalised x, gain = weight * (1 + scale) and z the argument of SiLU: two sums per
    (sample, channel), P = sum(dz) and Q = sum(dz * x^), give every parameter's gradient and the two
    means over a group that dx needs.
    """
    n, c = x.shape[:2]
    dtype = mean.dtype
    ones = torch.ones((), dtype=dtype, device=x.device)
    w = ones if weight is None else weight.to(dtype)
    b = 0 * ones if bias is None else bias.to(dtype)
    film = (ones if scale is None else 1 + scale.to(dtype)).expand(n, c)
    gain = w * film  # [N, C]
    offset = b * film if shift is None else b * film + shift.to(dtype)

    grouped = x.to(dtype).reshape(n, groups, -1)
    hat = ((grouped - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).reshape(n, c, -1)
    dz = grad.to(dtype).reshape(n, c, -1)
    if silu:
        z = hat * gain.unsqueeze(-1) + offset.unsqueeze(-1)
        gate = torch.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    p, q = dz.sum(-1), (dz * hat).sum(-1)  # [N, C]

    def group_mean(value: Tensor) -> Tensor:  # [N, C] -> [N, C, 1], equal inside a group
        size = max(grouped.shape[2], 1)
        mean = value.reshape(n, groups, -1).sum(-1, keepdim=True) / size
        return mean.expand(n, groups, c // groups).reshape(n, c, 1)

    scaled = rstd.unsqueeze(-1).expand(n, groups, c // groups).reshape(n, c, 1)
    dx = scaled * (gain.unsqueeze(-1) * dz - hat * group_mean(gain * q) - group_mean(gain * p))
    dx = _layout.dense_like(dx.reshape(x.shape).to(x.dtype), x)
    parameter = mean.dtype if weight is None else weight.dtype
    return (
        dx,
        (film * q).sum(0).to(parameter),
        (film * p).sum(0).to(parameter),
        x.new_empty(0, dtype=torch.float32) if scale is None else (w * q + b * p).to(scale.dtype),
        x.new_empty(0, dtype=torch.float32) if shift is None else p.to(shift.dtype, copy=True),
    )


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # Not only a shape function: a parameter on the device "meta" takes a call in C++ here.
    _check(x, weight, bias, groups, eps, scale, shift, silu)
    statistics = x.new_empty((x.shape[0], groups), dtype=_layout.wide(x.dtype))
    return _layout.empty_like(x), statistics, torch.empty_like(statistics)


def _fake_backward(
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
    n, c = x.shape[:2]
    parameter = mean.dtype if weight is None else weight.dtype

    def film(value: Tensor | None) -> Tensor:
        if value is None:
            return x.new_empty(0, dtype=torch.float32)
        return x.new_empty((n, c), dtype=value.dtype)

    dweight, dbias = x.new_empty(c, dtype=parameter), x.new_empty(c, dtype=parameter)
    return _layout.empty_like(x), dweight, dbias, film(scale), film(shift)


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, groups, _, scale, shift, silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift)
    ctx.groups, ctx.silu = groups, silu


def _differentiate(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    return differentiate(torch.ops.palette.group_norm_silu_backward, ctx, grad)


def differentiate(backward: Callable[..., Any], ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    """The gradients of the arguments, by the op ``backward`` on what ``save`` kept."""
    if grad is None:
        return (None,) * 8
    x, mean, rstd, weight, bias, scale, shift = ctx.saved_tensors
    grads = backward(grad, x, mean, rstd, weight, bias, ctx.groups, scale, shift, ctx.silu)
    dx, dweight, dbias, dscale, dshift = grads
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias.to(bias.dtype),
        None,
        None,
        None if scale is None else dscale,
        None if shift is None else dshift,
        None,
    )


def refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "group_norm_silu: the compiled op has no second derivative;"
        ' palette.ops.use("reference") has one'
    )


register(
    "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, Tensor? scale,"
    " Tensor? shift, bool silu) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    gradient=_differentiate,
    save=save,
)
register(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight,"
    " Tensor? bias, int groups, Tensor? scale, Tensor? shift, bool silu)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    gradient=refuse,
)
_DIRECT_BACKWARD = direct(torch.ops.palette.group_norm_silu_backward.default, refuse)
_DIRECT = direct(
    torch.ops.palette.group_norm_silu.default,
    lambda ctx, grad, *_: differentiate(_DIRECT_BACKWARD, ctx, grad),
    save,
)
_backends.declare("group_norm_silu", BACKENDS)
