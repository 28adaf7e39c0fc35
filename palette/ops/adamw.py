"""One step of AdamW for all weights of a network, in one pass over what it reads and writes.

Gradients are scaled to a norm (Pascanu et al., arXiv:1211.5063), the weights take a step of Adam
(Kingma and Ba, arXiv:1412.6980) with decoupled weight decay (Loshchilov and Hutter,
arXiv:1711.05101), their average takes in the new weights, and copies in a half type are rounded
from them. Each on its own reads and writes all weights once more, and on a CPU memory is what such
a step waits for. There are no kernels for GPUs: training there uses PyTorch's own fused AdamW.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from palette.ops import _backends, _checks
from palette.ops._registration import register

BACKENDS = ("reference", "cpp")

_HALF = (torch.bfloat16, torch.float16)


@torch.no_grad()
def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    limit: float = 0.0,
    take: float = 0.0,
) -> Tensor:
    """Advance ``weights`` by one step, in place; nothing changes where the norm is not finite.

    With g the gradient times min(1, limit / (norm + 1e-6)) and n the new number of steps:
    mean += (1 - beta1) (g - mean), square = beta2 square + (1 - beta2) g^2,
    weight = (1 - lr weight_decay) weight - lr m / (sqrt(s) + eps) with m = mean / (1 - beta1^n) and
    s = square / (1 - beta2^n), average += take (weight - average), copy = weight, rounded.

    Args:
        weights: of any shapes, float32 (or float64, all but the gradients with them).
        grads: one for each weight, of its shape, in its dtype, bfloat16 or float16.
        means, squares: Adam's moments, like the weights.
        steps: [] float32 each, how many steps a weight has taken; goes up by one.
        averages: like the weights, or none at all.
        copies: of the weights' shapes in bfloat16 or float16, empty ([0]) for a weight that has
            none; or none at all.
        lr, betas, eps, weight_decay: of AdamW.
        limit: the norm of all gradients together is scaled down to at most that; 0 for any.
        take: the share of the new weights in the average.

    Returns:
        [] float32, the norm of all gradients together before it was limited.

    Raises:
        TypeError: an argument is no tensor or has a dtype that the op does not take.
        ValueError: a shape, a device or a number of tensors does not fit.
    """
    tensors = (weights, grads, means, squares, steps, averages, copies)
    numbers = (lr, *betas, eps, weight_decay, limit, take)
    # What does not fit is named below, and other layouts are for the reference.
    with contextlib.suppress(Exception):
        on_cpu = bool(weights) and all(each.is_cpu for each in weights)
        if on_cpu and _backends.in_cpp("adamw", weights[0]):
            norm: Tensor = _OP(*map(list, tensors), *numbers)
            return norm
    _check(*tensors)
    return reference(*tensors, *numbers)


@torch.no_grad()
def reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    limit: float,
    take: float,
) -> Tensor:
    """The op in plain PyTorch: what every backend is held against, in any layout."""
    if not weights:
        return torch.zeros(())
    squared = [
        grad.to(weight.dtype).square().sum(dtype=torch.float64)
        for grad, weight in zip(grads, weights, strict=True)
    ]
    norm = torch.stack(squared).sum().sqrt()
    result = norm.float()
    if not result.isfinite():
        return result
    scale = min(1.0, limit / (norm.item() + 1e-6)) if limit > 0 else 1.0
    for i, weight in enumerate(weights):
        grad = grads[i].to(weight.dtype) * scale
        steps[i].add_(1)
        count = steps[i].item()
        means[i].lerp_(grad, 1 - beta1)
        squares[i].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        spread = squares[i].sqrt().div_(math.sqrt(1 - beta2**count)).add_(eps)
        weight.mul_(1 - lr * weight_decay)
        weight.addcdiv_(means[i], spread, value=-lr / (1 - beta1**count))
        if averages:
            averages[i].lerp_(weight, take)
        if copies and copies[i].numel():
            copies[i].copy_(weight)
    return result


def _check(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
) -> None:
    op = "adamw"
    lists = {"grads": grads, "means": means, "squares": squares, "steps": steps}
    lists |= {"averages": averages} if averages else {}
    lists |= {"copies": copies} if copies else {}
    for name, tensors in lists.items():
        if len(tensors) != len(weights):
            raise ValueError(
                f"{op}: {name} has {len(tensors)} tensors, wanted {len(weights)} (one per weight)"
            )
    for i, weight in enumerate(weights):
        _checks.tensor(op, f"weights[{i}]", weight)
        _checks.dtype(op, f"weights[{i}]", weight, (torch.float32, torch.float64))
        for name, tensors in lists.items():
            value, place = tensors[i], f"{name}[{i}]"
            _checks.tensor(op, place, value)
            if name == "steps":
                _checks.dtype(op, place, value, (torch.float32,))
                _checks.shape(op, place, value, (), "a number of steps")
                continue
            own = () if name == "copies" else (weight.dtype,)
            half = _HALF if name in ("grads", "copies") else ()
            _checks.dtype(op, place, value, (*own, *half))
            if name != "copies" or value.numel():
                _checks.shape(op, place, value, weight.shape, "the weight's shape")
            _checks.device(op, place, value, weight.device, f"weights[{i}]")


def _fake(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor],
    copies: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    limit: float,
    take: float,
) -> Tensor:
    return weights[0].new_empty((), dtype=torch.float32)


register(
    "adamw(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] means, Tensor(c!)[] squares,"
    " Tensor(d!)[] steps, Tensor(e!)[] averages, Tensor(f!)[] copies, float lr, float beta1,"
    " float beta2, float eps, float weight_decay, float limit, float take) -> Tensor",
    reference,
    _fake,
)
_OP = torch.ops.palette.adamw.default
_backends.declare("adamw", BACKENDS)
