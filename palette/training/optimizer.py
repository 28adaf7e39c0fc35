"""What is trained, and by which optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from palette.config import Train


def trained(network: nn.Module, train: Train) -> dict[str, nn.Parameter]:
    """The parameters to be trained, by name; the others need no gradients any more."""
    if train.norms_only:
        network.requires_grad_(False)
        for layer in network.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.requires_grad_(True)
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def adam(parameters: Mapping[str, nn.Parameter], train: Train) -> torch.optim.AdamW:
    """AdamW as ``train`` says; without weight decay it is the Adam of the published code."""
    return _AdamW(
        list(parameters.values()),
        lr=train.lr,
        betas=(train.betas[0], train.betas[1]),
        weight_decay=train.weight_decay,
        fused=True,
    )


class _AdamW(torch.optim.AdamW):
    """AdamW for channels-last weights on a CPU.

    PyTorch's fused kernel goes through weight, gradient and moments as they lie in memory, and yet
    makes a contiguous copy of each gradient, which it never reads (FusedAdamKernel.cpp, PyTorch
    2.13) and which takes as long as the rest.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        any_complex = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists[:4]:  # weights, gradients and both moments
            tensors[:] = [_rows(value) for value in tensors]
        return bool(any_complex)


def _rows(value: Tensor) -> Tensor:
    """A channels-last tensor on a CPU as a contiguous view [O, kH, kW, I], any other as it is."""
    if (
        value.device.type == "cpu"
        and value.dim() == 4
        and not value.is_contiguous()
        and value.is_contiguous(memory_format=torch.channels_last)
    ):
        return value.permute(0, 2, 3, 1)
    return value
