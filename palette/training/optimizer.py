"""What is trained, and by which optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

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
    return torch.optim.AdamW(
        list(parameters.values()),
        lr=train.lr,
        betas=(train.betas[0], train.betas[1]),
        weight_decay=train.weight_decay,
        fused=True,
    )
