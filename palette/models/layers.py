"""Layers shared by the networks.

Parameter names and shapes are the published ones, so old weights load with no renaming. Every
normalisation goes through ``palette.ops.group_norm_silu``, every attention through
``palette.ops.attention`` and seeded dropout through ``palette.ops.dropout``; all keep the memory
format of their input, and so does every other layer here: a channels-last input stays channels-last
to the end of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from palette.models.noise_level import EMBEDDINGS
from palette.ops import attention, dropout, group_norm_silu

AttentionOrder = Literal["legacy", "new"]
AttentionKind = Literal["global", "local", "dilated", "resblocks", "none"]


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm, optional FiLM and SiLU in one operation (``palette.ops.group_norm_silu``)."""

    def __init__(self, channels: int, groups: int = 32, *, silu: bool = True) -> None:
        if channels % groups:
            raise ValueError(
                f"channels: GroupNorm with {groups} groups met {channels} channels; "
                f"every level needs a multiple of {groups}"
            )
        super().__init__(groups, channels)
        self.silu = silu

    def forward(
        self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Input [N, C, H, W]; ``scale`` and ``shift`` [N, C] act as norm * (1 + scale) + shift."""
        return group_norm_silu(
            input, self.weight, self.bias, self.num_groups, self.eps, scale, shift, self.silu
        )


def add_to(residual: Tensor, conv: nn.Module, x: Tensor) -> Tensor:
    """``residual`` + conv(x), in one operation where the layer has one (``packed.PackedConv``)."""
    plus: Callable[[Tensor, Tensor], Tensor] | None = getattr(conv, "plus", None)
    y: Tensor = residual + conv(x) if plus is None else plus(x, residual)
    return y


class PointwiseConv(nn.Conv1d):
    """The published 1x1 Conv1d (weight [O, I, 1]), applied to [N, C, H, W] as it lies in memory."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight.unsqueeze(-1), self.bias)


class Dropout(nn.Module):
    """Dropout whose mask is a function of (seed, layer) where seeds are given.

    The mask (``palette.ops.dropout``) depends neither on the batch around an image nor on the
    number of processes. Without seeds it is PyTorch's own dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout: {p} is not in [0, 1)")
        self.p = p
        self.layer = 0

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], seeds int64 [N]."""
        if not self.training or self.p == 0:
            return x
        if seeds is None:
            return F.dropout(x, self.p)
        return dropout(x, seeds, self.p, self.layer)


def number_dropouts(network: nn.Module) -> None:
    """Give each dropout layer its own number, in the order of ``network.modules()``."""
    layers = (module for module in network.modules() if isinstance(module, Dropout))
    for number, layer in enumerate(layers):
        layer.layer = number


def resamples(conv: nn.Module | None) -> bool:
    """Whether a convolution enlarges its input itself (``subpixel``)."""
    return bool(getattr(conv, "resamples", False))


class Upsample(nn.Module):
    """Nearest neighbour x2, then a 3x3 convolution where ``convolve``."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if convolve else None

    def forward(self, x: Tensor) -> Tensor:
        if not resamples(self.conv):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2 where ``convolve``, else the mean of 2x2."""

    def __init__(self, channels: int, convolve: bool) -> None:
        super().__init__()
        self.op: nn.Module = (
            nn.Conv2d(channels, channels, 3, stride=2, padding=1) if convolve else nn.AvgPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.op(x)
        return y


class ResBlock(nn.Module):
    """Residual block of guided-diffusion (upstream layout: in_layers, emb_layers, out_layers).

    ``resample`` changes the resolution between the first activation and the first convolution,
    and on the skip path. ``dilation`` spreads the taps of both 3x3 convolutions. ``emb_layers``
    belongs to the block but runs in the network's ``embed``, which lays the results of all blocks
    side by side; ``columns`` are this block's. The Identity entries hold the places that SiLU has
    in the published numbering.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_channels: int,
        *,
        dropout: float,
        scale_shift: bool,
        resample: Literal["up", "down"] | None = None,
        dilation: int = 1,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.checkpoint = checkpoint
        self.in_layers = nn.Sequential(
            GroupNormSiLU(channels),
            nn.Identity(),
            nn.Conv2d(channels, out_channels, 3, padding=dilation, dilation=dilation),
        )
        width = 2 * out_channels if scale_shift else out_channels
        self.emb_layers = nn.Sequential(nn.Identity(), nn.Linear(embedding_channels, width))
        self.columns = slice(0, width)
        self.out_layers = nn.Sequential(
            GroupNormSiLU(out_channels),
            nn.Identity(),
            Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=dilation, dilation=dilation),
        )
        self.skip_connection: nn.Module = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )
        self.resample: nn.Module | None = None
        if resample is not None:
            layer = Upsample if resample == "up" else Downsample
            self.resample = layer(channels, convolve=False)

    def forward(self, x: Tensor, embedding: Tensor, seeds: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], embedding [N, E] from the network's ``embed``, seeds int64 [N]."""
        return maybe_recompute(self.checkpoint, self._forward, x, embedding, seeds)

    def _forward(self, x: Tensor, embedding: Tensor, seeds: Tensor | None) -> Tensor:
        norm, _, conv = self.in_layers
        h = norm(x)
        if self.resample is not None:
            x = self.resample(x)
            if not resamples(conv):
                h = self.resample(h)
        h = conv(h)
        film = embedding[:, self.columns]  # [N, 2C] or [N, C]
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = film.chunk(2, dim=1)
            h = norm(h, scale, shift)
        else:
            h = norm(h + film[:, :, None, None].to(h.dtype))
        return add_to(self.skip_connection(x), conv, dropout(h, seeds))


class Attention(nn.Module):
    """What every attention layer says of itself; see ``describe_attention``."""

    window: tuple[int, int] | None = None  # height and width of what it sees, None: everything

    def __init__(self, channels: int, heads: int, level: int) -> None:
        super().__init__()
        self.channels = channels
        self.heads = heads
        self.level = level  # the feature map has been halved so many times


class AttentionBlock(Attention):
    """Self-attention over all positions of a feature map, with a residual (guided-diffusion).

    With ``window`` (height, width), within windows of that size; see ``windowed_attention``.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        order: AttentionOrder,
        *,
        level: int,
        window: tuple[int, int] | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(channels, heads, level)
        self.window = window
        if order not in ("legacy", "new"):
            raise ValueError(f"attention_order: {order!r} is neither 'legacy' nor 'new'")
        self.order = order
        self.checkpoint = checkpoint
        self.norm = GroupNormSiLU(channels, silu=False)
        self.qkv = PointwiseConv(channels, 3 * channels)
        self.proj_out = PointwiseConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, H, W]."""
        return maybe_recompute(self.checkpoint, self._forward, x)

    def _forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x))
        if self.window is None:
            h = attention(qkv, self.heads, self.order)
        else:
            h = windowed_attention(qkv, self.heads, self.order, self.window)
        return add_to(x, self.proj_out, h)


def windowed_attention(
    qkv: Tensor, heads: int, order: AttentionOrder, window: tuple[int, int]
) -> Tensor:
    """``palette.ops.attention`` in windows side by side: a position sees its own window alone.

    qkv [N, 3C, H, W] -> [N, C, H, W], channels-last. The first ``window`` (height, width) lies in
    the upper left corner; where the map ends within one, that one is filled by reflection. The
    blocks of Palette's local self-attention (section 5.5), without the halo that Vaswani et al.
    2021 ("Scaling Local Self-Attention") let each see around it: Palette does not state its width.
    """
    n, _, height, width = qkv.shape
    window = min(window[0], height), min(window[1], width)
    whole = pad_by_reflection(qkv, window).permute(0, 2, 3, 1)
    rows, columns = whole.shape[1] // window[0], whole.shape[2] // window[1]
    grid = whole.reshape(n, rows, window[0], columns, window[1], -1).transpose(2, 3)
    out = attention(grid.flatten(0, 2).permute(0, 3, 1, 2), heads, order).permute(0, 2, 3, 1)
    grid = out.reshape(n, rows, columns, *window, -1).transpose(2, 3)
    return grid.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)[:, :, :height, :width]


class ConditionedSequential(nn.Sequential):
    """Layers in turn; the embedding and the dropout seeds go to those that take them."""

    def forward(  # type: ignore[override]
        self, x: Tensor, embedding: Tensor, seeds: Tensor | None = None
    ) -> Tensor:
        for layer in self:
            x = layer(x, embedding, seeds) if isinstance(layer, ResBlock) else layer(x)
        return x


def maybe_recompute(active: bool, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Call ``function``, with its activations recomputed in the backward pass where ``active``.

    PyTorch's checkpoint restores the random state before recomputing, so dropout without seeds
    sees the same mask twice (the published one did not: ``use_checkpoint`` gave wrong gradients).
    """
    if active and torch.is_grad_enabled():
        y: Tensor = recompute(function, *arguments, use_reentrant=False)
        return y
    return function(*arguments)


def channels_last(network: nn.Module) -> None:
    """Store the 2-D convolution weights of a network channels-last, in place."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def attention_levels(
    resolutions: Sequence[int], wanted: Sequence[int], image_size: tuple[int, int]
) -> list[int]:
    """Levels whose feature map has one of the wanted resolutions.

    Raises ValueError when resolutions are wanted and none of them exists in the network.
    """
    levels = [level for level, resolution in enumerate(resolutions) if resolution in wanted]
    if wanted and not levels:
        raise ValueError(
            f"attention_resolutions: no feature map has {', '.join(map(str, wanted))} pixels; at "
            f"image size {image_size[0]}x{image_size[1]} this network has "
            f"{', '.join(map(str, resolutions))}"
        )
    return levels


def number_of_heads(channels: int, heads: int, head_channels: int | None) -> int:
    """Heads of an attention layer: ``channels / head_channels``, or ``heads`` where that is None.

    Raises ValueError when the channels cannot be divided so.
    """
    name, divisor = ("heads", heads) if head_channels is None else ("head_channels", head_channels)
    if divisor < 1 or channels % divisor:
        raise ValueError(f"{name}: {divisor} does not divide the {channels} channels of a level")
    return heads if head_channels is None else channels // head_channels


def describe_attention(network: nn.Module, size: tuple[int, int]) -> list[str]:
    """One line per attention layer, such as "input_blocks.4.1: 16x16, 256 tokens, 4 heads of 32".

    ``size`` is the (height, width) of the first level.
    """
    lines = []
    for name, layer in network.named_modules():
        if isinstance(layer, Attention):
            height, width = size[0] >> layer.level, size[1] >> layer.level
            shown = f"{height}x{width}"
            if layer.window is not None:
                shown += f" in windows of {layer.window[0]}x{layer.window[1]}"
                height, width = layer.window
            heads = "1 head" if layer.heads == 1 else f"{layer.heads} heads"
            lines.append(
                f"{name}: {shown}, {height * width} tokens, "
                f"{heads} of {layer.channels // layer.heads}"
            )
    return lines


def pair(size: int | Sequence[int], name: str) -> tuple[int, int]:
    """A size given as one number or as (height, width), checked to be positive."""
    numbers = (size, size) if isinstance(size, int) else tuple(size)
    if len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(f"{name}: {size} is not a size in pixels; give n or (height, width)")
    return numbers[0], numbers[1]


def round_up(size: tuple[int, int], multiple: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width), each rounded up to a multiple, or to one of its own."""
    rows, columns = pair(multiple, "multiple")
    return -(-size[0] // rows) * rows, -(-size[1] // columns) * columns


def pad_by_reflection(x: Tensor, multiple: int | tuple[int, int]) -> Tensor:
    """x [N, C, H, W] grown at the bottom and the right until H and W are multiples.

    The border pixel is the mirror and is not repeated; where the image is smaller than the padding
    the reflection bounces back and forth, so any size down to 1x1 works.
    """
    height, width = round_up((x.shape[2], x.shape[3]), multiple)
    for dim, size in ((2, height), (3, width)):
        if size > x.shape[dim]:
            x = x.index_select(dim, _reflected(x.shape[dim], size, x.device))
    return x


def _reflected(length: int, size: int, device: torch.device) -> Tensor:
    """Indices 0, 1, ..., length-1, length-2, ..., 1, 0, 1, ... of the given total size."""
    period = max(2 * (length - 1), 1)
    position = torch.arange(size, device=device) % period
    return torch.where(position < length, position, period - position)


def check_sizes(
    channels: int, channel_mults: Sequence[float], res_blocks: int, embedding: str
) -> None:
    """Raise ValueError for arguments of a network that make none."""
    if channels < 2 or channels % 2:
        raise ValueError(f"channels: {channels} is not a positive even number")
    if not channel_mults:
        raise ValueError("channel_mults: empty; give one number per level, such as (1, 2, 4, 8)")
    if res_blocks < 1:
        raise ValueError(f"res_blocks: {res_blocks} is not a positive number")
    if embedding not in EMBEDDINGS:
        raise ValueError(
            f"embedding: {embedding!r} is unknown; choose from {', '.join(EMBEDDINGS)}"
        )
