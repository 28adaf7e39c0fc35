"""Mixed precision with weights that are rounded once a step and not at each of their uses.

Weights are float32 and trained as such; convolutions and linear layers compute on copies of them in
bfloat16 or float16, whose gradients are added up in float32 (Micikevicius et al. 2018,
arXiv:1710.03740). Autocast does the rest, and has few weights left to round. All roundings are
those of autocast, but for convolutions behind an enlargement: on a CPU those compute from
the small picture, on sums of weights, which are rounded once too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palette.models.layers import PointwiseConv
from palette.models.subpixel import (
    enlarging_convs,
    interleave,
    interleave_gradient,
    subpixel_weight,
    subpixel_weight_gradient,
)

_FEW = 512
"""Positions of a batch (N * H * W) up to which oneDNN, which splits the sum over them between
threads, takes longer for the gradient of a weight than one matrix product does."""


class MixedPrecision:
    """A network to train in ``dtype``, beside the one whose float32 weights are trained.

    Args:
        network: in float32, on its device.
        dtype: what convolutions and linear layers compute in.
        half_gradients: leave gradients in ``dtype`` with the copies, until ``collect`` is called
            after a step's only backward pass: a sum of several would be rounded each time.

    Attributes:
        network: what to call and to differentiate: like the network given and with its very
            parameters, or itself where ``dtype`` is float32.
    """

    def __init__(
        self, network: nn.Module, dtype: torch.dtype, *, half_gradients: bool = False
    ) -> None:
        self.network = network
        self._copies: dict[Tensor, Tensor] = {}
        self._fresh = False
        self._enlarging: list[_Enlarging] = []
        if dtype is torch.float32:
            return
        shared = [*network.parameters(), *network.buffers()]
        self.network = copy.deepcopy(network, {id(each): each for each in shared})
        for parent, name, conv in enlarging_convs(self.network):
            if conv.weight.device.type == "cpu":  # on a GPU nobody has measured it
                self._enlarging.append(_Enlarging(conv, dtype))
                setattr(parent, name, self._enlarging[-1])
        for parent in list(self.network.modules()):
            for name, layer in parent.named_children():
                if _is_lowered(layer):
                    lowered = _Lowered(layer, dtype)
                    setattr(parent, name, lowered)
                    self._copies |= dict(lowered.pairs())
        if half_gradients:
            for weight, copied in self._copies.items():
                weight.grad_dtype = dtype
                copied.requires_grad_(weight.requires_grad)

    def copies(self) -> Mapping[Tensor, Tensor]:
        """Weights and their copies, for those whose copy is the weight itself in ``dtype``."""
        return self._copies

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the weights to their copies: once before the forward passes of a step."""
        if self._copies and not self._fresh:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))
        self._fresh = False
        for layer in self._enlarging:
            layer.refresh()

    def collect(self) -> None:
        """Hand gradients that were left with the copies to their weights."""
        for weight, copied in self._copies.items():
            if copied.requires_grad:
                weight.grad, copied.grad = copied.grad, None

    def rounded(self) -> None:
        """Leave ``copies`` out of the next refresh: they have been rounded already."""
        self._fresh = True


def _is_lowered(layer: nn.Module) -> bool:
    """Autocast has the rest: dilated convolutions."""
    if type(layer) is nn.Conv2d:
        return layer.dilation == (1, 1)
    return type(layer) in (PointwiseConv, nn.Linear)


class _Lowered(nn.Module):
    """A convolution or linear layer that computes on copies of its weight and bias."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, layer.weight)
        self.bias = cast(nn.Parameter | None, layer.bias)
        # Not buffers: DistributedDataParallel would broadcast them before every forward pass.
        self._weight = self.weight.detach().to(dtype)
        self._bias = None if self.bias is None else self.bias.detach().to(dtype)
        self._geometry = _geometry(layer)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter and its copy."""
        yield self.weight, self._weight
        if self.bias is not None and self._bias is not None:
            yield self.bias, self._bias

    def forward(self, input: Tensor) -> Tensor:
        """As the layer itself, in the dtype of the copies."""
        x = input.to(self._weight.dtype)
        weight, *rest = (_copied(*pair) for pair in self.pairs())
        bias = rest[0] if rest else None
        if self._geometry is None:
            return F.linear(x, weight, bias)
        kernel = weight if weight.dim() == 4 else weight.unsqueeze(-1)
        return _convolve(x, kernel, bias, *self._geometry)


class _Enlarging(nn.Module):
    """A convolution right behind an enlargement, on a copy of its weight for the small picture."""

    resamples = True

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._weight = subpixel_weight(layer.weight).to(dtype)
        self._bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def refresh(self) -> None:
        """Sum up and round the weight, and round the bias, to their copies."""
        subpixel_weight(self.weight, out=self._weight)
        if self.bias is not None and self._bias is not None:
            self._bias.copy_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """[N, I, H, W] -> [N, O, 2H, 2W] in the dtype of the copies."""
        x = input.to(self._weight.dtype)
        weight: Tensor = _Summed.apply(self.weight, self._weight)  # type: ignore[no-untyped-call]
        bias = None
        if self.bias is not None and self._bias is not None:
            bias = _copied(self.bias, self._bias).repeat(4)
        four = _convolve(x, weight, bias, (1, 1), (1, 1))
        y: Tensor = _Interleaved.apply(four)  # type: ignore[no-untyped-call]
        return y


class _Interleaved(torch.autograd.Function):
    """``interleave`` with a gradient that is one pass as well."""

    @staticmethod
    def forward(ctx: Any, four: Tensor) -> Tensor:
        return interleave(four)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return interleave_gradient(grad)


def _geometry(layer: nn.Module) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Stride and padding of a convolution; None for a linear layer."""
    if isinstance(layer, nn.Linear):
        return None
    if isinstance(layer, PointwiseConv):
        return (1, 1), (0, 0)
    conv = cast(nn.Conv2d, layer)
    return cast(tuple[int, int], conv.stride), cast(tuple[int, int], conv.padding)


def _copied(weight: Tensor, low: Tensor) -> Tensor:
    if low.requires_grad:
        return low
    copied: Tensor = _Copied.apply(weight, low)  # type: ignore[no-untyped-call]
    return copied


class _Copied(torch.autograd.Function):
    """The copy of a weight, as a function of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, low: Tensor) -> Tensor:
        return low.view_as(low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None  # autograd converts it to what the weight's gradient is kept in


class _Summed(_Copied):
    """The copy of an enlarging convolution's weight, in sums for the small picture."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return subpixel_weight_gradient(grad), None


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> Tensor:
    """``F.conv2d`` by whichever has the faster gradient for the size of x [N, C, H, W]."""
    few = x.shape[0] * x.shape[2] * x.shape[3] <= _FEW
    if few and x.device.type == "cpu" and stride == (1, 1) and weight.requires_grad:
        y: Tensor = _Convolution.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, padding
        )
        return y
    return F.conv2d(x, weight, bias, stride, padding)


class _Convolution(torch.autograd.Function):
    """A convolution of stride 1 whose weight's gradient is one matrix product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, 1, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        dx = None
        if for_x:
            geometry = (1, 1), ctx.padding, (1, 1), False, (0, 0), 1
            wanted = [True, False, False]
            dx, _, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, wanted)
        dweight = _weight_gradient(x, grad, weight, ctx.padding) if for_weight else None
        dbias = grad.sum((0, 2, 3)) if for_bias else None
        return dx, dweight, dbias, None


def _weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """[O, C, kH, kW] channels-last: the product of grad [N, O, H', W'] and the patches of x."""
    out_channels, channels, height, width = weight.shape
    rows = grad.permute(0, 2, 3, 1).reshape(-1, out_channels)
    edges = (0, 0, padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(x.permute(0, 2, 3, 1), edges).contiguous()  # [N, H, W, C]
    patches = padded.unfold(1, height, 1).unfold(2, width, 1)  # [N, H', W', C, kH, kW]
    columns = patches.permute(0, 1, 2, 4, 5, 3).reshape(len(rows), -1)
    return (rows.t() @ columns).view(out_channels, height, width, channels).permute(0, 3, 1, 2)
