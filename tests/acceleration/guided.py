"""A U-Net as guided-diffusion and its descendants write it: somebody else's code, for the tests.

Written from the public description: GroupNorm in float32 (32 groups, here fewer), an own SiLU
where old releases had none, residual blocks with in_layers, emb_layers and out_layers, attention
in both head orders, recomputation around both kinds of block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class SiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


def normalization(channels: int) -> nn.Module:
    return GroupNorm32(8, channels)


class Resample(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if self.factor > 1:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2)


class EmbedSequential(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class ResBlock(nn.Module):
    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool = False,
        factor: float = 1,
        activation: type[nn.Module] = SiLU,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm
        self.in_layers = nn.Sequential(
            normalization(channels), activation(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.updown = factor != 1
        self.h_upd = Resample(factor) if self.updown else nn.Identity()
        self.x_upd = Resample(factor) if self.updown else nn.Identity()
        width = 2 * out_channels if use_scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(SiLU(), nn.Linear(emb_channels, width))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            activation(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        nn.init.zeros_(self.out_layers[-1].weight)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.updown:
            in_rest, in_conv = self.in_layers[:-1], self.in_layers[-1]
            h = in_conv(self.h_upd(in_rest(x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = out_rest(out_norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class QKVAttentionLegacy(nn.Module):
    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, width, length = qkv.shape
        ch = width // (3 * self.n_heads)
        return qkv.reshape(n * self.n_heads, 3 * ch, length).split(ch, dim=1)

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = self.split(qkv)
        scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(qkv.shape[0], -1, qkv.shape[2])


class QKVAttention(QKVAttentionLegacy):
    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, _, length = qkv.shape
        parts = qkv.chunk(3, dim=1)
        return tuple(part.reshape(n * self.n_heads, -1, length) for part in parts)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, heads: int, new_order: bool, use_checkpoint: bool) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = QKVAttention(heads) if new_order else QKVAttentionLegacy(heads)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_checkpoint:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        n, c, *spatial = x.shape
        x = x.reshape(n, c, -1)
        h = self.proj_out(self.attention(self.qkv(self.norm(x))))
        return (x + h).reshape(n, c, *spatial)


class UNetModel(nn.Module):
    """Two levels, one residual block each way, attention on the lower one."""

    def __init__(
        self,
        *,
        scale_shift: bool = True,
        updown: bool = True,
        new_order: bool = False,
        dropout: float = 0.0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        wide, deep, emb = 16, 32, 24

        def res(channels: int, out_channels: int, factor: float = 1) -> ResBlock:
            return ResBlock(
                channels, emb, dropout, out_channels, scale_shift, use_checkpoint, factor
            )

        def resampled(channels: int, factor: float) -> nn.Module:
            return res(channels, channels, factor) if updown else Resample(factor)

        self.time_embed = nn.Sequential(nn.Linear(16, emb), SiLU(), nn.Linear(emb, emb))
        attend = AttentionBlock(deep, 4, new_order, use_checkpoint)
        self.input_blocks = nn.ModuleList(
            [
                EmbedSequential(nn.Conv2d(3, wide, 3, padding=1)),
                EmbedSequential(res(wide, wide)),
                EmbedSequential(resampled(wide, 0.5)),
            ]
        )
        self.middle_block = EmbedSequential(res(wide, deep), attend, res(deep, deep))
        self.output_blocks = nn.ModuleList(
            [
                EmbedSequential(res(deep + wide, wide), resampled(wide, 2)),
                EmbedSequential(res(wide + wide, wide)),
            ]
        )
        self.out = nn.Sequential(normalization(wide), SiLU(), nn.Conv2d(wide, 3, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(8) / 8)
        angles = timesteps[:, None].float() * frequencies[None]
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1).type(x.dtype))
        skips = []
        h = x
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block, skip in zip(self.output_blocks, (skips[2], skips[1]), strict=True):
            h = block(torch.cat([h, skip], dim=1), emb)
        return self.out(h.type(x.dtype))
