"""First weights of a network, where they are to be those of the published trainer."""

from __future__ import annotations

import torch
from torch import nn

INIT_TYPES = ("kaiming", "normal", "xavier", "xavier_uniform", "orthogonal", "none")


def initialise(network: nn.Module, kind: str = "kaiming", gain: float = 0.02) -> None:
    """Initialise every convolution and linear layer as the published trainer does.

    It overwrites the zero-initialised output layers too, as published; biases become 0 and norms
    keep 1 and 0. ``kind`` is one of INIT_TYPES ("none": PyTorch's own), ``gain`` of normal, xavier
    and orthogonal.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            _initialise(layer, kind, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def _initialise(layer: nn.Conv1d | nn.Conv2d | nn.Linear, kind: str, gain: float) -> None:
    if kind == "none":
        layer.reset_parameters()
        return
    # Ours lie channels-last; drawn in the published order they are the same for the same seed.
    weight = torch.empty_like(layer.weight, memory_format=torch.contiguous_format)
    if kind == "kaiming":
        nn.init.kaiming_normal_(weight, a=0, mode="fan_in")
    elif kind == "normal":
        nn.init.normal_(weight, 0.0, gain)
    elif kind == "xavier":
        nn.init.xavier_normal_(weight, gain=gain)
    elif kind == "xavier_uniform":
        nn.init.xavier_uniform_(weight)
    else:
        nn.init.orthogonal_(weight, gain=gain)
    layer.weight.copy_(weight)
