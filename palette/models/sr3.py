"""The SR3 U-Net with the published parameter names (Saharia et al. 2021; Palette's "sr3" module).

Differs from ``unet.UNet`` in that the noise level is added between the two convolutions of a
residual block instead of scaling, resampling is a layer of its own, attention has one head, and
the second middle block does not attend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from palette.models.layers import (
    Attention,
    Dropout,
    GroupNormSiLU,
    Upsample,
    add_to,
    attention_levels,
    channels_last,
    check_sizes,
    describe_attention,
    number_dropouts,
    pad_by_reflection,
    pair,
    round_up,
)
from palette.models.noise_level import Embedding, noise_level, sinusoids
from palette.ops import attention


class SR3UNet(nn.Module):
    """U-Net of SR3; called like ``unet.UNet``, but it knows no labels.

    Args:
        image_size: pixels, n or (height, width), of the training images. Only the attention
            layers depend on it; any size runs.
        in_channels: channels of condition and noisy image together.
        out_channels: channels of the prediction.
        channels: width of the first level and of the noise-level embedding.
        channel_mults: width of each level in units of ``channels``.
        res_blocks: residual blocks a level on the way down (one more on the way up).
        attention_resolutions: pixels of the shorter side of the feature maps that attend, at
            ``image_size``. The first middle block always attends.
        dropout: probability, before the second convolution of each residual block.
        norm_groups: groups of every GroupNorm.
        noise_level_embedding: tell the network the noise level at all.
        embedding: what it is told; "gamma" in Palette, "sqrt_gamma" in the SR3 repository.

    ``attention_layers`` lists the layers that attend, with their resolution at ``image_size``.
    Weights are stored channels-last.

    Raises:
        ValueError: an argument is out of range, or no feature map has a wanted resolution.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int] = 128,
        in_channels: int = 6,
        out_channels: int = 3,
        channels: int = 32,
        channel_mults: Sequence[int] = (1, 2, 4, 8, 8),
        res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (8,),
        dropout: float = 0.0,
        norm_groups: int = 32,
        noise_level_embedding: bool = True,
        embedding: Embedding = "gamma",
    ) -> None:
        super().__init__()
        check_sizes(channels, channel_mults, res_blocks, embedding)
        self.channels = channels
        self.embedding: Embedding = embedding
        self.multiple = 2 ** (len(channel_mults) - 1)
        widths = [channels * mult for mult in channel_mults]
        size = pair(image_size, "image_size")
        padded = round_up(size, self.multiple)
        resolutions = [min(padded) >> level for level in range(len(widths))]
        parts = _Parts(
            level_channels=channels if noise_level_embedding else None,
            dropout=dropout,
            groups=norm_groups,
            attending=attention_levels(resolutions, attention_resolutions, size),
        )
        self.noise_level_mlp: nn.Sequential | None = None
        if noise_level_embedding:
            self.noise_level_mlp = nn.Sequential(
                nn.Identity(),  # the published numbering counts the sinusoids
                nn.Linear(channels, 4 * channels),
                nn.SiLU(),
                nn.Linear(4 * channels, channels),
            )
        self.downs, skips = _down_path(parts, in_channels, widths, res_blocks, channels)
        last = len(widths) - 1
        middle = [parts.block(widths[-1], widths[-1], last, attend=a) for a in (True, False)]
        self.mid = nn.ModuleList(middle)
        self.ups = _up_path(parts, skips, widths, res_blocks)
        self.final_conv = ConvBlock(widths[0], out_channels, norm_groups)
        self.attention_layers = describe_attention(self, padded)
        end = 0
        for block in self._attending_blocks():
            res = block.res_block
            res.columns = slice(end, end + res.columns.stop)
            end = res.columns.stop
        number_dropouts(self)
        channels_last(self)

    def forward(
        self,
        x: Tensor,
        gamma: Tensor,
        label: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Predict from x [N, C, H, W] at noise level gamma [N] or [N, 1], in (0, 1].

        ``seeds``: int64 [N], makes dropout a function of (seed, layer). Any H and W: sizes that
        the network cannot halve are padded by reflection and cropped. Output
        [N, out_channels, H, W] in the dtype the network computed in.
        """
        return self.body(x, self.embed(gamma, label), seeds)

    def embed(self, gamma: Tensor, label: Tensor | None = None) -> Tensor:
        """All that follows from the noise level alone: a row [N, E] for ``body``.

        It holds every block's shift, so a sampler, which knows its noise levels, leaves the whole
        embedding out of its loop. [N, 0] where the network is not told the noise level.
        """
        if label is not None:
            raise ValueError("label: this network has no classes; leave the label out")
        if self.noise_level_mlp is None:
            return gamma.new_empty(gamma.shape[0], 0)
        cosines, sines = sinusoids(noise_level(gamma, self.embedding), self.channels)
        h = self.noise_level_mlp(torch.cat([sines, cosines], dim=1).to(self.dtype))
        shifts = [block.res_block.noise_func for block in self._attending_blocks()]
        return torch.cat([shift(h) for shift in shifts if shift is not None], dim=1)

    def body(self, x: Tensor, embedding: Tensor, seeds: Tensor | None = None) -> Tensor:
        """The network after ``embed``: x [N, C, H, W], embedding [N, E]."""
        height, width = x.shape[2:]
        h = pad_by_reflection(x.to(self.dtype), self.multiple)
        h = h.contiguous(memory_format=torch.channels_last)
        skips = []
        for layer in self.downs:
            h = layer(h, embedding, seeds) if isinstance(layer, AttendingBlock) else layer(h)
            skips.append(h)
        for layer in self.mid:
            h = layer(h, embedding, seeds)
        for layer in self.ups:
            if isinstance(layer, AttendingBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), embedding, seeds)
            else:
                h = layer(h)
        y: Tensor = self.final_conv(h)
        return y[:, :, :height, :width]

    def units(self) -> list[list[nn.Module]]:
        """Groups of layers that run together, and none of whose weights another group uses.

        A block's ``noise_func`` runs in ``embed``, long before the block.
        """
        shifts = [block.res_block.noise_func for block in self._attending_blocks()]
        projections: list[nn.Module] = [shift for shift in shifts if shift is not None]
        blocks = [[layer] for layer in (*self.downs, *self.mid, *self.ups)]
        return [projections, *blocks] if projections else blocks

    def _attending_blocks(self) -> Iterator[AttendingBlock]:
        for layer in (*self.downs, *self.mid, *self.ups):
            if isinstance(layer, AttendingBlock):
                yield layer

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, to which inputs are converted."""
        dtype: torch.dtype = next(self.final_conv.parameters()).dtype
        return dtype


class Halve(nn.Module):
    """A 3x3 convolution of stride 2 (the published name of its weights is conv, not op)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class ConvBlock(nn.Module):
    """GroupNorm, SiLU, dropout, 3x3 convolution."""

    def __init__(self, channels: int, out_channels: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = nn.Sequential(
            GroupNormSiLU(channels, groups),
            nn.Identity(),  # the published numbering counts SiLU
            Dropout(dropout),
            nn.Conv2d(channels, out_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        norm, _, dropout, conv = self.block
        y: Tensor = conv(dropout(norm(x), seeds))
        return y


class LevelShift(nn.Module):
    """A linear function of the noise level's embedding, a shift for every channel."""

    def __init__(self, level_channels: int, channels: int) -> None:
        super().__init__()
        self.noise_func = nn.Sequential(nn.Linear(level_channels, channels))

    def forward(self, embedding: Tensor) -> Tensor:
        shift: Tensor = self.noise_func(embedding)
        return shift


class ResBlock(nn.Module):
    """Two ConvBlocks with the noise level added between them, and a skip connection.

    ``noise_func`` belongs to the block but runs in the network's ``embed``, which lays the results
    of all blocks side by side; ``columns`` are this block's.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        level_channels: int | None,
        groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.noise_func = LevelShift(level_channels, out_channels) if level_channels else None
        self.columns = slice(0, out_channels)
        self.block1 = ConvBlock(channels, out_channels, groups)
        self.block2 = ConvBlock(out_channels, out_channels, groups, dropout)
        self.res_conv: nn.Module = (
            nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor, seeds: Tensor | None = None) -> Tensor:
        h = self.block1(x)
        if self.noise_func is not None:
            h = h + embedding[:, self.columns, None, None].to(h.dtype)
        y: Tensor = self.block2(h, seeds) + self.res_conv(x)
        return y


class SelfAttention(Attention):
    """Self-attention with one head over all positions, with a residual."""

    def __init__(self, channels: int, groups: int, level: int) -> None:
        super().__init__(channels, heads=1, level=level)
        self.norm = GroupNormSiLU(channels, groups, silu=False)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return add_to(x, self.out, attention(self.qkv(self.norm(x)), self.heads, "new"))


class AttendingBlock(nn.Module):
    """A ResBlock, and self-attention behind it where given."""

    def __init__(self, res_block: ResBlock, attn: SelfAttention | None) -> None:
        super().__init__()
        self.res_block = res_block
        self.attn = attn

    def forward(self, x: Tensor, embedding: Tensor, seeds: Tensor | None = None) -> Tensor:
        y: Tensor = self.res_block(x, embedding, seeds)
        if self.attn is not None:
            y = self.attn(y)
        return y


@dataclass(frozen=True)
class _Parts:
    """Makes the blocks of one network from its options."""

    level_channels: int | None
    dropout: float
    groups: int
    attending: list[int]

    def block(
        self, width: int, out_width: int, level: int, *, attend: bool | None = None
    ) -> AttendingBlock:
        attend = level in self.attending if attend is None else attend
        return AttendingBlock(
            ResBlock(width, out_width, self.level_channels, self.groups, self.dropout),
            SelfAttention(out_width, self.groups, level) if attend else None,
        )


def _down_path(
    parts: _Parts, in_channels: int, widths: list[int], res_blocks: int, width: int
) -> tuple[nn.ModuleList, list[int]]:
    """Layers on the way down, and the number of channels that each of them leaves as a skip."""
    layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1)]
    skips = [width]
    for level, out_width in enumerate(widths):
        for _ in range(res_blocks):
            layers.append(parts.block(width, out_width, level))
            width = out_width
            skips.append(width)
        if level < len(widths) - 1:
            layers.append(Halve(width))
            skips.append(width)
    return nn.ModuleList(layers), skips


def _up_path(parts: _Parts, skips: list[int], widths: list[int], res_blocks: int) -> nn.ModuleList:
    """Layers on the way up, which take the skips in reverse order."""
    layers: list[nn.Module] = []
    width = widths[-1]
    for level in reversed(range(len(widths))):
        for _ in range(res_blocks + 1):
            layers.append(parts.block(width + skips.pop(), widths[level], level))
            width = widths[level]
        if level > 0:
            layers.append(Upsample(width, convolve=True))
    return nn.ModuleList(layers)
