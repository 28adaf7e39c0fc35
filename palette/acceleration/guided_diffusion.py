"""The blocks of guided-diffusion's U-Net, as they and their many descendants are written.

Known by the names of their layers (in_layers, emb_layers, out_layers; norm, qkv, attention,
proj_out), wherever the class comes from, then tried out. Dhariwal and Nichol 2021; the published
Palette code has the same blocks.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from palette.acceleration.exchange import Fused, Swap, verified
from palette.acceleration.norms import is_group_norm, is_silu, normalise
from palette.ops import attention


class FusedResBlock(Fused):
    """ResBlock whose second norm takes scale and shift, or that resamples after its first one.

    The other kind of ResBlock calls its sequences of layers whole, so those are what changes.
    """

    in_layers: nn.Sequential
    emb_layers: nn.Sequential
    out_layers: nn.Sequential
    skip_connection: nn.Module
    h_upd: nn.Module
    x_upd: nn.Module
    updown: bool
    use_scale_shift_norm: bool

    def fits(self, x: Tensor, emb: Tensor, *args: Any, **kwargs: Any) -> bool:
        return not (args or kwargs) and emb.dim() == 2

    def fused(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [N, C, H, W], emb [N, E] -> [N, C', H', W']."""
        if self.updown:
            norm, _, convolution = self.in_layers
            h = convolution(self.h_upd(normalise(norm, x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        film = self.emb_layers(emb).type(h.dtype)
        if self.use_scale_shift_norm:
            norm, _, *rest = self.out_layers
            scale, shift = film.chunk(2, dim=1)
            h = normalise(norm, h, scale, shift)
            for layer in rest:
                h = layer(h)
        else:
            h = self.out_layers(h + film[:, :, None, None])
        y: Tensor = self.skip_connection(x) + h
        return y


class _FusedQKV(Fused):
    """QKVAttention: attention on the packed output [N, 3C, T] of a convolution."""

    order: ClassVar[str]
    n_heads: int

    def fits(self, qkv: Tensor, *args: Any, **kwargs: Any) -> bool:
        return not (args or kwargs) and qkv.dim() == 3

    def fused(self, qkv: Tensor) -> Tensor:
        return attention(qkv, self.n_heads, self.order)


class LegacyQKV(_FusedQKV):
    """The order (head, q | k | v, channel)."""

    order = "legacy"


class NewQKV(_FusedQKV):
    """The order (q | k | v, head, channel)."""

    order = "new"


class _FusedAttentionBlock(Fused):
    """AttentionBlock: norm, qkv, attention and projection on the feature map as it lies."""

    order: ClassVar[str]
    norm: nn.GroupNorm
    qkv: nn.Conv1d
    attention: Any
    proj_out: nn.Conv1d

    def fits(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        return not (args or kwargs) and x.dim() == 4

    def fused(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C, H, W]."""
        qkv = _pointwise(self.qkv, normalise(self.norm, x, silu=False))
        return x + _pointwise(self.proj_out, attention(qkv, self.attention.n_heads, self.order))


class LegacyAttentionBlock(_FusedAttentionBlock):
    """The order (head, q | k | v, channel)."""

    order = "legacy"


class NewAttentionBlock(_FusedAttentionBlock):
    """The order (q | k | v, head, channel)."""

    order = "new"


def _pointwise(convolution: nn.Conv1d, x: Tensor) -> Tensor:
    """A 1x1 convolution of x [N, C, H, W] with the weight [O, I, 1] of a Conv1d."""
    return F.conv2d(x, convolution.weight.unsqueeze(-1), convolution.bias)


def match(module: nn.Module) -> Swap | str | None:
    """A swap for a block of guided-diffusion; why it stays; None for anything else."""
    children = module._modules
    if {"in_layers", "emb_layers", "out_layers", "skip_connection"} <= children.keys():
        return _match_res_block(module)
    if {"norm", "qkv", "attention", "proj_out"} <= children.keys():
        return _match_attention_block(module)
    if not children and not module._parameters and type(vars(module).get("n_heads")) is int:
        return _match_qkv(module)
    return None


def _method(module: nn.Module) -> str:
    """Where the block's computation is: ``forward`` may only decide whether to recompute it."""
    return "_forward" if callable(getattr(type(module), "_forward", None)) else "forward"


def _match_res_block(block: Any) -> Swap | str | None:
    film = getattr(block, "use_scale_shift_norm", None)
    updown = getattr(block, "updown", None)
    if not isinstance(film, bool) or not isinstance(updown, bool):
        return "it has no use_scale_shift_norm and updown"
    if not (film or updown):
        return None
    sequences = (["in_layers"] if updown else []) + (["out_layers"] if film else [])
    parts: dict[str, type[nn.Module]] = {}
    for name in sequences:
        layers = getattr(block, name)
        if type(layers) is not nn.Sequential or len(layers) < 3:
            return f"{name} is no sequence of norm, activation and more"
        if not is_group_norm(layers[0]) or not is_silu(layers[1]):
            kinds = " and ".join(type(layer).__name__ for layer in (layers[0], layers[1]))
            return f"{name} begins with {kinds}, not GroupNorm and SiLU"
        parts |= {f"{name}.0": type(layers[0]), f"{name}.1": type(layers[1])}
    linear = next(
        (each for each in block.emb_layers.modules() if isinstance(each, nn.Linear)), None
    )
    norm = next(
        (each for each in block.in_layers.modules() if isinstance(each, nn.GroupNorm)), None
    )
    if linear is None or norm is None:
        return "its in_layers or emb_layers are unknown"
    what = "ResBlock: GroupNorm + SiLU" + (" with scale and shift" if film else ", resampled")
    swap = Swap(FusedResBlock, what, parts, _method(block))
    return verified(block, swap, (2, norm.num_channels, 4, 6), (2, linear.in_features))


def _match_attention_block(block: Any) -> Swap | str | None:
    if not is_group_norm(block.norm):
        return f"its norm is {type(block.norm).__name__}, not GroupNorm"
    for name in ("qkv", "proj_out"):
        layer = getattr(block, name)
        if type(layer) is not nn.Conv1d or layer.kernel_size != (1,):
            return f"its {name} is no 1x1 Conv1d"
    if type(getattr(block.attention, "n_heads", None)) is not int:
        return "its attention has no n_heads"
    parts = {name: type(block._modules[name]) for name in ("norm", "qkv", "attention", "proj_out")}
    swaps = [
        Swap(
            kind, f"AttentionBlock: GroupNorm, attention, {kind.order} order", parts, _method(block)
        )
        for kind in (LegacyAttentionBlock, NewAttentionBlock)
    ]
    return _first(block, swaps, (2, block.norm.num_channels, 4, 6))


def _match_qkv(module: Any) -> Swap | str:
    swaps = [Swap(kind, f"QKVAttention, {kind.order} order", {}) for kind in (LegacyQKV, NewQKV)]
    return _first(module, swaps, (2, 3 * 8 * module.n_heads, 24))


def _first(module: nn.Module, swaps: list[Swap], shape: tuple[int, ...]) -> Swap | str:
    """The first swap that does what the module does; otherwise why the last one does not."""
    found: Swap | str = ""
    for swap in swaps:
        found = verified(module, swap, shape)
        if isinstance(found, Swap):
            break
    return found
