"""A network of ours with PyTorch's own operations in the place of the fused ones."""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.nn import functional as F

from palette.models.layers import GroupNormSiLU


def unfuse(network: nn.Module) -> None:
    """Give a network of ours PyTorch's own GroupNorm, FiLM and SiLU back, in place."""
    for layer in network.modules():
        if isinstance(layer, GroupNormSiLU):
            layer.forward = functools.partial(_one_by_one, layer)  # type: ignore[method-assign]


def _one_by_one(
    layer: GroupNormSiLU, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    y = F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(y) if layer.silu else y
