"""A 3x3 convolution of a picture enlarged x2 by the nearest neighbour, without the large picture.

Each of the four pixels that a pixel becomes sees two by two neighbours of it, with sums of the 3x3
weights: 16 products in place of 36 (Shi et al. 2016, arXiv:1609.07009). One convolution gives all
four, one behind the other in the channels and on a grid one larger than the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from palette.models.layers import ResBlock, Upsample


def enlarging_convs(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Conv2d]]:
    """Convolutions right behind an enlargement: the module that holds each, its name there, and it.

    One that says ``resamples`` may stand in their place, and gets the small picture.
    """
    for layer in list(network.modules()):
        parent: nn.Module
        if isinstance(layer, ResBlock) and isinstance(layer.resample, Upsample):
            parent, name = layer.in_layers, str(len(layer.in_layers) - 1)
        elif isinstance(layer, Upsample) and layer.conv is not None:
            parent, name = layer, "conv"
        else:
            continue
        conv = getattr(parent, name)
        if type(conv) is nn.Conv2d and conv.kernel_size == (3, 3) and conv.dilation == (1, 1):
            yield parent, name, conv


@torch.no_grad()
def subpixel_weight(weight: Tensor, out: Tensor | None = None) -> Tensor:
    """[O, I, 3, 3] -> [4 O, I, 2, 2] channels-last, by way of float32; ``out`` is filled in.

    Autograd does not see it: ``subpixel_weight_gradient`` is its gradient.
    """
    wide = weight.to(torch.float32).permute(0, 2, 3, 1)
    out_channels, _, _, channels = wide.shape
    if out is None:
        out = weight.new_empty(4 * out_channels, 2, 2, channels).permute(0, 3, 1, 2)
    four = out.permute(0, 2, 3, 1).view(2, 2, out_channels, 2, 2, channels)
    tall = wide.new_empty(2, out_channels, 2, 3, channels)
    _pair(wide.unbind(1), tall[0].unbind(1), tall[1].unbind(1))
    _pair(tall.unbind(3), four[:, 0].unbind(3), four[:, 1].unbind(3))
    return out


def _pair(taps: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Kernels of two for the pixels of a pair: the first sees tap 0 in the pixel before and the
    others in its own, the second sees taps 0 and 1 in its own."""
    first[0].copy_(taps[0])
    torch.add(taps[1], taps[2], out=first[1])
    torch.add(taps[0], taps[1], out=second[0])
    second[1].copy_(taps[2])


def subpixel_weight_gradient(grad: Tensor) -> Tensor:
    """Of ``subpixel_weight``: [4 O, I, 2, 2] -> float32 [O, I, 3, 3] channels-last."""
    out_channels, channels = grad.shape[0] // 4, grad.shape[1]
    four = grad.permute(0, 2, 3, 1).reshape(2, 2, out_channels, 2, 2, channels)
    tall = torch.empty(2, out_channels, 2, 3, channels, device=grad.device)
    _pair_gradient(four[:, 0].unbind(3), four[:, 1].unbind(3), tall.unbind(3))
    result = torch.empty(out_channels, 3, 3, channels, device=grad.device)
    _pair_gradient(tall[0].unbind(1), tall[1].unbind(1), result.unbind(1))
    return result.permute(0, 3, 1, 2)


def _pair_gradient(
    first: Sequence[Tensor], second: Sequence[Tensor], taps: Sequence[Tensor]
) -> None:
    """Of ``_pair``; sums in the dtype of ``taps``."""
    for tap, one, other in (
        (taps[0], first[0], second[0]),
        (taps[1], first[1], second[0]),
        (taps[2], first[1], second[1]),
    ):
        if one.dtype == tap.dtype:
            torch.add(one, other, out=tap)
        else:
            tap.copy_(one).add_(other)


def interleave(four: Tensor) -> Tensor:
    """What a convolution with ``subpixel_weight``, padded by 1, gives -> the large picture.

    [N, 4 O, H+1, W+1] -> [N, O, 2H, 2W] channels-last.
    """
    n, channels, height, width = four.shape
    size = n, 2 * (height - 1), 2 * (width - 1), channels // 4
    y: Tensor = four.new_empty(size).permute(0, 3, 1, 2)
    for small, large in _places(four, y):
        large.copy_(small)
    return y


def interleave_gradient(grad: Tensor) -> Tensor:
    """Of ``interleave``: [N, O, 2H, 2W] -> [N, 4 O, H+1, W+1] channels-last."""
    n, channels, height, width = grad.shape
    four: Tensor = grad.new_zeros((n, height // 2 + 1, width // 2 + 1, 4 * channels))
    four = four.permute(0, 3, 1, 2)
    for small, large in _places(four, grad):
        small.copy_(large)
    return four


def _places(four: Tensor, large: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The four parts as they lie in the small grids and in the large picture."""
    height, width = large.shape[2] // 2, large.shape[3] // 2
    for k, part in enumerate(four.chunk(4, dim=1)):
        row, column = divmod(k, 2)
        inner = part[:, :, row : row + height, column : column + width]
        yield inner, large[:, :, row::2, column::2]
