"""Convolutions for inference on a CPU: weights laid out once as oneDNN wants them.

Without it every call of a convolution puts its weight into oneDNN's order again, and every residual
is an addition of its own. PyTorch's operators for it are private (``torch.ops.mkldnn``, used by
inductor's freezing), so ``available`` tries them, and the plain layers serve where they fail.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palette.models.layers import PointwiseConv
from palette.models.subpixel import enlarging_convs, interleave, subpixel_weight


class PackedConv(nn.Module):
    """A convolution whose weight [O, I, kH, kW] is kept in oneDNN's order; inference only.

    The order depends on the size of the picture: it is that of the last size met, and never of the
    batch, whose company would else show in the last bits.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int]
    ) -> None:
        super().__init__()
        self._plain, self._bias = weight, bias
        self._geometry = list(padding), list(stride), [1, 1], 1
        self._size: torch.Size | None = None
        self._packed = weight

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, I, H, W] -> [N, O, H', W'], in the weight's dtype, which is also input's."""
        x = self._prepared(input)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, self._bias, *self._geometry, "none", [], ""
        )
        return y

    def plus(self, input: Tensor, residual: Tensor) -> Tensor:
        """``residual`` [N, O, H', W'] + forward(input), rounded once."""
        x = self._prepared(input)
        other = residual.contiguous(memory_format=torch.channels_last)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, self._packed, self._bias, *self._geometry, "add", None, None, [], None
        )
        return y

    def _prepared(self, input: Tensor) -> Tensor:
        size = input.shape[1:]
        if self._size != size:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(
                self._plain, *self._geometry, [1, *size]
            )
            self._size = size
        return input.contiguous(memory_format=torch.channels_last)


class SubpixelConv(nn.Module):
    """A 3x3 convolution of the nearest neighbour x2, computed from the small picture."""

    resamples = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        four = None if bias is None else bias.repeat(4)
        self.conv = PackedConv(subpixel_weight(weight), four, (1, 1), (1, 1))

    def forward(self, input: Tensor) -> Tensor:
        """Input [N, I, H, W] -> [N, O, 2H, 2W]."""
        four: Tensor = self.conv(input)
        return interleave(four)


def pack(network: nn.Module) -> nn.Module:
    """A copy of ``network`` for inference on a CPU, or the network itself where that cannot be had.

    The copy shares all parameters with the network but those of its convolutions, which are taken
    as they are now: pack again after a change. It is for input of the weights' own dtype.
    """
    tensors = [*network.parameters(), *network.buffers()]
    if not available() or any(each.device.type != "cpu" for each in tensors):
        return network
    packed = copy.deepcopy(network, {id(each): each for each in tensors})
    for parent, name, conv in enlarging_convs(packed):
        if _packable(conv):
            setattr(parent, name, _subpixel(conv))
    for parent in list(packed.modules()):
        for name, layer in parent.named_children():
            if _packable(layer):
                setattr(parent, name, _packed(layer))
    return packed


def _packable(layer: nn.Module) -> bool:
    """Convolutions of exactly the kinds that the networks have, without hooks."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if type(layer) is nn.Conv2d:
        plain = (
            layer.groups == 1
            and layer.dilation == (1, 1)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )
    else:
        plain = type(layer) is PointwiseConv
    return plain and cast(Tensor, layer.weight).dtype in (torch.float32, torch.bfloat16)


def _packed(layer: nn.Module) -> PackedConv:
    bias = None if layer.bias is None else cast(Tensor, layer.bias).detach()
    if isinstance(layer, PointwiseConv):
        return PackedConv(layer.weight.detach().unsqueeze(-1), bias, (1, 1), (0, 0))
    conv = cast(nn.Conv2d, layer)
    padding = cast(tuple[int, int], conv.padding)
    return PackedConv(conv.weight.detach(), bias, conv.stride, padding)


def _subpixel(layer: nn.Module) -> SubpixelConv:
    conv = cast(nn.Conv2d, layer)
    return SubpixelConv(conv.weight.detach(), None if conv.bias is None else conv.bias.detach())


@functools.cache
def available() -> bool:
    """Whether this PyTorch has the operators, with the meaning they are used for."""
    x = torch.linspace(-1, 1, 128).reshape(1, 2, 8, 8).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.linspace(-1, 1, 36).reshape(2, 2, 3, 3), torch.ones(2)
    wanted = F.conv2d(x, weight, bias, padding=1)
    with torch.no_grad():
        try:
            conv = PackedConv(weight, bias, (1, 1), (1, 1))
            return torch.allclose(conv(x), wanted, atol=1e-4) and torch.allclose(
                conv.plus(x, x), x + wanted, atol=1e-4
            )
        except Exception:  # a private operator may be gone, or want other arguments
            return False
