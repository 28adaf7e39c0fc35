"""The guided-diffusion U-Net with the published parameter names (Dhariwal & Nichol 2021).

It is the network of the public Palette code as well as of the paper's recipe; which of the two is
a matter of arguments. Layout: input convolution; per level ``res_blocks`` residual blocks, then a
downsampling; a middle of ResBlock, attention, ResBlock; per level ``res_blocks + 1`` residual
blocks, each fed with the running features and one skip concatenated, then an upsampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palette.models.layers import (
    AttentionBlock,
    AttentionKind,
    AttentionOrder,
    ConditionedSequential,
    Downsample,
    Dropout,
    GroupNormSiLU,
    ResBlock,
    Upsample,
    attention_levels,
    channels_last,
    check_sizes,
    describe_attention,
    number_dropouts,
    number_of_heads,
    pad_by_reflection,
    pair,
    round_up,
)
from palette.models.noise_level import Embedding, noise_level, sinusoids


class UNet(nn.Module):
    """U-Net from a noisy image (concatenated behind its condition) and a noise level to a picture.

    Args:
        image_size: pixels, n or (height, width), of the training images. Only the attention
            layers depend on it; any size runs.
        in_channels: channels of condition and noisy image together.
        out_channels: channels of the prediction.
        channels: width of the first level; the noise-level embedding has four times as many.
        channel_mults: width of each level in units of ``channels``; each level but the last halves
            the resolution.
        res_blocks: residual blocks a level on the way down (one more on the way up).
        attention_resolutions: pixels of the shorter side of the feature maps that attend, at
            ``image_size``. The middle block always attends. Empty: only the middle block.
        attention: what these layers are (the ablation of Palette, section 5.5 and table 5):
            "global" attention over the whole feature map, or "local" in windows of half its height
            and width at ``image_size``; in their place "resblocks", residual blocks on the way down
            and in the middle and nothing on the way up, or "dilated", the same blocks with
            dilations 2, 4, ... within a level (DeepLabv3, Chen et al. 2017); or "none".
        dropout: probability, before the second convolution of each residual block.
        embedding_dropout: probability, on the sinusoids of the noise level, before the layers that
            embed them (the 0.1 of quickgrid/pytorch-diffusion).
        heads: attention heads, used where ``head_channels`` is None.
        head_channels: channels of one head.
        heads_upsample: heads on the way up where they differ; used as ``heads`` is.
        attention_order: how the qkv channels are packed: "legacy" (per head q, k, v) or "new".
        scale_shift: the embedding scales and shifts the second norm (FiLM) instead of being added.
        resblock_updown: resample inside residual blocks instead of by plain layers.
        conv_resample: the plain resampling layers have a convolution.
        checkpoint: recompute activations in the backward pass to save memory.
        embedding: how the network is told the noise level; see ``noise_level.noise_level``.
        num_classes: number of labels. Class ``num_classes`` stands for "no label".
        condition_level: the network is told how noisy its condition is.
        zero_init: the last convolution of every residual block, of attention and of the network
            starts at zero, so that each block begins as its skip connection.

    ``attention_layers`` lists the layers that attend, with their resolution at ``image_size``.
    Weights are stored channels-last.

    Raises:
        ValueError: an argument is out of range, or no feature map has a wanted resolution.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        in_channels: int,
        out_channels: int,
        channels: int = 64,
        channel_mults: Sequence[float] = (1, 2, 4, 8),
        res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        attention: AttentionKind = "global",
        dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        heads: int = 1,
        head_channels: int | None = 32,
        heads_upsample: int | None = None,
        attention_order: AttentionOrder = "new",
        scale_shift: bool = True,
        resblock_updown: bool = True,
        conv_resample: bool = True,
        checkpoint: bool = False,
        embedding: Embedding = "log_snr",
        num_classes: int | None = None,
        condition_level: bool = False,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(channels, channel_mults, res_blocks, embedding)
        self.channels = channels
        self.embedding: Embedding = embedding
        self.num_classes = num_classes
        self.condition_level = condition_level
        self.multiple = 2 ** (len(channel_mults) - 1)
        self._outer = res_blocks + 1  # input blocks at full resolution, and as many output blocks
        widths = [int(mult * channels) for mult in channel_mults]
        size = pair(image_size, "image_size")
        padded = round_up(size, self.multiple)
        maps = [(padded[0] >> level, padded[1] >> level) for level in range(len(widths))]
        parts = _Parts(
            embedding_channels=4 * channels,
            dropout=dropout,
            scale_shift=scale_shift,
            checkpoint=checkpoint,
            resblock_updown=resblock_updown,
            conv_resample=conv_resample,
            head_channels=head_channels,
            attention_order=attention_order,
            kind=attention,
            maps=maps,
            attending=attention_levels([min(each) for each in maps], attention_resolutions, size),
        )
        self.cond_embed = _level_embedding(channels)
        if num_classes is not None:
            self.label_emb = _label_embedding(num_classes, 4 * channels)
        if condition_level:
            self.condition_embed = _level_embedding(channels)
        self.input_blocks, skips = _down_path(parts, in_channels, widths, res_blocks, heads)
        self.middle_block = parts.middle(widths[-1], heads, len(widths) - 1)
        self.output_blocks = _up_path(parts, skips, widths, res_blocks, heads_upsample or heads)
        self.out = nn.Sequential(
            GroupNormSiLU(widths[0]),
            nn.Identity(),  # the published numbering counts SiLU
            nn.Conv2d(widths[0], out_channels, 3, padding=1),
        )
        self.embedding_dropout = Dropout(embedding_dropout)  # last: the others keep their numbers
        self.attention_layers = describe_attention(self, padded)
        self._finish(zero_init)

    def _finish(self, zero_init: bool) -> None:
        """What the layers learn of their place in the network, their first values, their layout."""
        end = 0
        for block in self._res_blocks():
            block.columns = slice(end, end + block.columns.stop)
            end = block.columns.stop
        number_dropouts(self)
        if zero_init:
            self._zero_outputs()
        channels_last(self)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, to which inputs are converted."""
        dtype: torch.dtype = next(self.out.parameters()).dtype
        return dtype

    def _res_blocks(self) -> Iterator[ResBlock]:
        for block in (*self.input_blocks, self.middle_block, *self.output_blocks):
            for layer in block:
                if isinstance(layer, ResBlock):
                    yield layer

    def units(self) -> list[list[nn.Module]]:
        """Groups of layers that run together, and none of whose weights another group uses.

        A block's ``emb_layers`` run in ``embed``, long before the block.
        """
        projections: list[nn.Module] = [block.emb_layers for block in self._res_blocks()]
        blocks = (*self.input_blocks, self.middle_block, *self.output_blocks)
        return [projections, *([block] for block in blocks)]

    def _zero_outputs(self) -> None:
        outputs: list[nn.Module] = [self.out[-1]]
        if self.condition_level:
            outputs.append(self.condition_embed[-1])
        for module in self.modules():
            if isinstance(module, ResBlock):
                outputs.append(module.out_layers[-1])
            elif isinstance(module, AttentionBlock):
                outputs.append(module.proj_out)
        for layer in outputs:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        gamma: Tensor,
        label: Tensor | None = None,
        seeds: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """Predict from x [N, C, H, W] at noise level gamma [N] or [N, 1], in (0, 1].

        ``label``: int64 [N], given exactly when the network has classes (``num_classes`` is "no
        label"). ``seeds``: int64 [N], makes dropout a function of (seed, layer). ``level``: the
        noise level [N] of the condition in (0, 1], 1 = clean, given exactly with
        ``condition_level``. Any H and W: sizes that the network cannot halve are padded by
        reflection and cropped. Output [N, out_channels, H, W] in the dtype the network computed in.
        """
        return self.body(x, self.embed(gamma, label, level, seeds), seeds)

    def embed(
        self,
        gamma: Tensor,
        label: Tensor | None = None,
        level: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """All that follows from noise levels and label alone: a row [N, E] for ``body``.

        It holds every block's scale and shift, so a sampler, which knows its noise levels, leaves
        the whole embedding out of its loop. Arguments as in ``forward``.
        """
        if (label is None) != (self.num_classes is None):
            raise ValueError(
                "label: this network has no classes; leave the label out"
                if label is not None
                else f"label: this network has {self.num_classes} classes; give int64 [N], "
                f"where {self.num_classes} stands for no label"
            )
        if (level is not None) != self.condition_level:
            wanted = "give it [N] in (0, 1]" if self.condition_level else "leave it out"
            raise ValueError(f"level: condition_level is {self.condition_level}; {wanted}")
        sinusoids = self.embedding_dropout(self._sinusoids(gamma, self.embedding), seeds)
        h: Tensor = self.cond_embed(sinusoids)
        if label is not None:
            h = h + self.label_emb(label)
        if level is not None:
            h = h + self.condition_embed(self._sinusoids(level, "log_snr"))
        h = F.silu(h)
        return torch.cat([block.emb_layers(h) for block in self._res_blocks()], dim=1)

    def _sinusoids(self, gamma: Tensor, embedding: Embedding) -> Tensor:
        cosines, sines = sinusoids(noise_level(gamma, embedding), self.channels)
        return torch.cat([cosines, sines], dim=1).to(self.dtype)

    def body(self, x: Tensor, embedding: Tensor, seeds: Tensor | None = None) -> Tensor:
        """The network after ``embed``: x [N, C, H, W], embedding [N, E]."""
        skips = self._enter(x, embedding, seeds)
        h = self._inside(skips[-1], embedding, seeds)
        return self._leave(h, skips, embedding, seeds)[:, :, : x.shape[2], : x.shape[3]]

    def whole(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """``body``, and its deep features, which ``shallow`` takes.

        These are what enters the output blocks of the outermost level, [N, C', H', W'], with C'
        the width of the level below and H', W' those of x, padded.
        """
        skips = self._enter(x, embedding)
        deep = self._inside(skips[-1], embedding)
        return self._leave(deep, skips, embedding)[:, :, : x.shape[2], : x.shape[3]], deep

    def shallow(self, x: Tensor, embedding: Tensor, deep: Tensor) -> Tensor:
        """``body`` with ``deep``, of another noise level, for all but the outermost level."""
        skips = self._enter(x, embedding)
        return self._leave(deep, skips, embedding)[:, :, : x.shape[2], : x.shape[3]]

    def _enter(self, x: Tensor, embedding: Tensor, seeds: Tensor | None = None) -> list[Tensor]:
        """The skips of the outermost level, the last of which leads inside."""
        h = pad_by_reflection(x.to(self.dtype), self.multiple)
        h = h.contiguous(memory_format=torch.channels_last)
        skips = []
        for block in list(self.input_blocks)[: self._outer]:
            h = block(h, embedding, seeds)
            skips.append(h)
        return skips

    def _inside(self, h: Tensor, embedding: Tensor, seeds: Tensor | None = None) -> Tensor:
        """All other levels: down, the middle, and up to full resolution again."""
        skips = []
        for block in list(self.input_blocks)[self._outer :]:
            h = block(h, embedding, seeds)
            skips.append(h)
        h = self.middle_block(h, embedding, seeds)
        for block in list(self.output_blocks)[: -self._outer]:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding, seeds)
        return h

    def _leave(
        self, h: Tensor, skips: list[Tensor], embedding: Tensor, seeds: Tensor | None = None
    ) -> Tensor:
        """The output blocks of the outermost level, which take its skips, and what follows."""
        for block in list(self.output_blocks)[-self._outer :]:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding, seeds)
        y: Tensor = self.out(h)
        return y


@dataclass(frozen=True)
class _Parts:
    """Makes the layers of one network from its options."""

    embedding_channels: int
    dropout: float
    scale_shift: bool
    checkpoint: bool
    resblock_updown: bool
    conv_resample: bool
    head_channels: int | None
    attention_order: AttentionOrder
    kind: AttentionKind
    maps: list[tuple[int, int]]
    attending: list[int]

    def block(
        self,
        width: int,
        out_width: int,
        resample: Literal["up", "down"] | None = None,
        dilation: int = 1,
    ) -> ResBlock:
        return ResBlock(
            width,
            out_width,
            self.embedding_channels,
            dropout=self.dropout,
            scale_shift=self.scale_shift,
            resample=resample,
            dilation=dilation,
            checkpoint=self.checkpoint,
        )

    def attention(self, width: int, heads: int, level: int) -> AttentionBlock:
        height, across = self.maps[level]
        return AttentionBlock(
            width,
            number_of_heads(width, heads, self.head_channels),
            self.attention_order,
            level=level,
            window=(-(-height // 2), -(-across // 2)) if self.kind == "local" else None,
            checkpoint=self.checkpoint,
        )

    def mixing(self, width: int, heads: int, level: int, number: int | None) -> list[nn.Module]:
        """Attention or what takes its place: for residual blocks the ``number``-th of the level,
        from 0; None on the way up, where they have none."""
        if self.kind in ("global", "local"):
            return [self.attention(width, heads, level)]
        if self.kind == "none" or number is None:
            return []
        dilation = 1
        if self.kind == "dilated":  # no wider than half of the map, beyond which lies padding
            dilation = min(2 ** (number + 1), max(min(self.maps[level]) // 2, 1))
        return [self.block(width, width, dilation=dilation)]

    def level(
        self, width: int, out_width: int, heads: int, level: int, number: int | None
    ) -> list[nn.Module]:
        """A residual block, and attention behind it where the level attends; see ``mixing``."""
        layers: list[nn.Module] = [self.block(width, out_width)]
        if level in self.attending:
            layers += self.mixing(out_width, heads, level, number)
        return layers

    def middle(self, width: int, heads: int, level: int) -> ConditionedSequential:
        between = self.mixing(width, heads, level, 0)
        return ConditionedSequential(self.block(width, width), *between, self.block(width, width))

    def down(self, width: int) -> nn.Module:
        if self.resblock_updown:
            return self.block(width, width, "down")
        return Downsample(width, self.conv_resample)

    def up(self, width: int) -> nn.Module:
        if self.resblock_updown:
            return self.block(width, width, "up")
        return Upsample(width, self.conv_resample)


def _level_embedding(channels: int) -> nn.Sequential:
    inner, outer = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, 4 * channels)
    return nn.Sequential(inner, nn.SiLU(), outer)


def _label_embedding(num_classes: int, channels: int) -> nn.Embedding:
    if num_classes < 1:
        raise ValueError(f"num_classes: {num_classes} is not a positive number")
    return nn.Embedding(num_classes + 1, channels)


def _down_path(
    parts: _Parts, in_channels: int, widths: list[int], res_blocks: int, heads: int
) -> tuple[nn.ModuleList, list[int]]:
    """Input blocks, and the number of channels that each of them leaves as a skip."""
    width = widths[0]
    blocks = [ConditionedSequential(nn.Conv2d(in_channels, width, 3, padding=1))]
    skips = [width]
    for level, out_width in enumerate(widths):
        for number in range(res_blocks):
            layers = parts.level(width, out_width, heads, level, number)
            blocks.append(ConditionedSequential(*layers))
            width = out_width
            skips.append(width)
        if level < len(widths) - 1:
            blocks.append(ConditionedSequential(parts.down(width)))
            skips.append(width)
    return nn.ModuleList(blocks), skips


def _up_path(
    parts: _Parts, skips: list[int], widths: list[int], res_blocks: int, heads: int
) -> nn.ModuleList:
    """Output blocks, which take the skips in reverse order."""
    blocks = []
    width = widths[-1]
    for level in reversed(range(len(widths))):
        for number in range(res_blocks + 1):
            layers = parts.level(width + skips.pop(), widths[level], heads, level, None)
            width = widths[level]
            if level > 0 and number == res_blocks:
                layers.append(parts.up(width))
            blocks.append(ConditionedSequential(*layers))
    return nn.ModuleList(blocks)
