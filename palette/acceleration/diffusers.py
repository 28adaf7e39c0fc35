"""The blocks of Hugging Face's diffusers that UNet2DModel and its relatives are made of.

Known by name and by what they hold, then tried out; diffusers itself is not imported. Read in
diffusers 0.42 (models/resnet.py, models/attention_processor.py, models/unets).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from palette.acceleration.exchange import Fused, Swap, verified
from palette.acceleration.norms import normalise
from palette.ops import attention

# Owner -> the norm and the activation that its forward calls one after the other.
_PAIRS = {
    "UNet2DModel": ("conv_norm_out", "conv_act"),
    "UNet2DConditionModel": ("conv_norm_out", "conv_act"),
    "SkipUpBlock2D": ("skip_norm", "act"),
    "AttnSkipUpBlock2D": ("skip_norm", "act"),
}
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


def is_from_diffusers(value: object, *names: str) -> bool:
    """Whether the value's class is one of those, defined in diffusers."""
    kind = type(value)
    return kind.__name__ in names and kind.__module__.partition(".")[0] == "diffusers"


class FusedResnetBlock(Fused):
    """ResnetBlock2D: both norms with their SiLU, the second one with the scale and shift of time.

    The block has one activation for image and time embedding, so it is the block that changes.
    """

    norm1: nn.GroupNorm
    norm2: nn.GroupNorm
    conv1: nn.Module
    conv2: nn.Module
    conv_shortcut: nn.Module | None
    dropout: nn.Module
    nonlinearity: nn.Module
    time_emb_proj: nn.Module | None
    time_embedding_norm: str
    skip_time_act: bool
    upsample: Callable[[Tensor], Tensor] | None
    downsample: Callable[[Tensor], Tensor] | None
    output_scale_factor: float

    def fits(
        self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> bool:
        if args or kwargs:
            return False
        if temb is None:
            return self.time_emb_proj is None
        return self.time_emb_proj is not None and temb.dim() == 2

    def fused(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """input_tensor [N, C, H, W], temb [N, E] -> [N, C', H', W']."""
        x = input_tensor
        h = normalise(self.norm1, x)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            if self.upsample is not None and h.shape[0] >= 64:
                # as diffusers does it: nearest upsampling has failed on large channels-last batches
                x, h = x.contiguous(), h.contiguous()
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        scale = shift = None
        if temb is not None and self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
            if self.time_embedding_norm == "scale_shift":
                scale, shift = temb.chunk(2, dim=1)
            else:
                h = h + temb[:, :, None, None]
        h = self.conv2(self.dropout(normalise(self.norm2, h, scale, shift)))
        if self.conv_shortcut is not None:
            # as diffusers does it: gradients of the weights keep the layout that DDP expects
            x = self.conv_shortcut(x.contiguous() if self.training else x)
        return _divided(x + h, self.output_scale_factor)


class FusedAttention(Fused):
    """Self-attention over a feature map, with its norm and without shuffles before the norm."""

    group_norm: nn.GroupNorm
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList
    heads: int
    processor: object
    residual_connection: bool
    rescale_output_factor: float

    def fits(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,  # not used where there is no spatial_norm
        **kwargs: Any,
    ) -> bool:
        return (
            hidden_states.dim() == 4
            and encoder_hidden_states is None
            and attention_mask is None
            and not kwargs
            and is_from_diffusers(self.processor, *_PROCESSORS)
        )

    def fused(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states [N, C, H, W] -> [N, C, H, W]."""
        x = hidden_states
        h = normalise(self.group_norm, x, silu=False).flatten(2).transpose(1, 2)  # [N, T, C]
        qkv = torch.cat([self.to_q(h), self.to_k(h), self.to_v(h)], dim=2)
        h = attention(qkv.transpose(1, 2), self.heads, "new").transpose(1, 2)
        h = self.to_out[1](self.to_out[0](h))
        y: Tensor = h.transpose(1, 2).reshape(x.shape)
        if self.residual_connection:
            y = y + x
        return _divided(y, self.rescale_output_factor)


def _divided(y: Tensor, factor: float) -> Tensor:
    # torch.compile takes a NumPy number, which some blocks have, for a tensor
    if type(factor) in (int, float) and factor == 1:
        return y
    return y / factor


def match(module: nn.Module) -> Swap | str | None:
    """A swap for a block of diffusers; why it stays, where it is one; None for anything else."""
    if is_from_diffusers(module, "ResnetBlock2D"):
        return _match_resnet(module)
    if is_from_diffusers(module, "Attention"):
        return _match_attention(module)
    return None


def _match_resnet(block: Any) -> Swap | str:
    norms = {"norm1": block.norm1, "norm2": block.norm2}
    for name, norm in norms.items():
        if type(norm) is not nn.GroupNorm:
            return f"{name} is {type(norm).__name__}, not GroupNorm"
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"its time_embedding_norm is {block.time_embedding_norm}"
    film = block.time_embedding_norm == "scale_shift"
    swap = Swap(
        FusedResnetBlock,
        "ResnetBlock2D: GroupNorm + SiLU twice" + ", once with scale and shift" * film,
        {**dict.fromkeys(norms, nn.GroupNorm), "nonlinearity": nn.SiLU},
    )
    projection = block.time_emb_proj
    temb = None if projection is None else (2, projection.in_features)
    return verified(block, swap, (2, block.norm1.num_channels, 4, 6), temb)


def _match_attention(block: Any) -> Swap | str:
    if type(block.group_norm) is not nn.GroupNorm:
        return "it has no GroupNorm of its own; torch's scaled_dot_product_attention stays"
    if not is_from_diffusers(block.processor, *_PROCESSORS):
        return f"its processor is {type(block.processor).__name__}"
    swap = Swap(FusedAttention, "Attention: GroupNorm, attention", {"group_norm": nn.GroupNorm})
    return verified(block, swap, (2, block.group_norm.num_channels, 4, 6))


def pair(owner: nn.Module) -> tuple[str, str] | None:
    """Names of the GroupNorm and the SiLU that the owner's forward calls in turn, if any."""
    if not is_from_diffusers(owner, *_PAIRS):
        return None
    names = _PAIRS[type(owner).__name__]
    norm, activation = (owner._modules.get(name) for name in names)
    if type(norm) is nn.GroupNorm and type(activation) is nn.SiLU and _in_turn(owner, *names):
        return names
    return None


def _in_turn(owner: nn.Module, norm: str, activation: str) -> bool:
    """Whether the source of the owner's forward has one call of each, and those in a row."""
    try:
        source = inspect.getsource(type(owner).forward)
    except OSError:
        return False
    if source.count(f"self.{norm}(") != 1 or source.count(f"self.{activation}(") != 1:
        return False
    calls = rf"(\w+) = self\.{norm}\(\w+\)\s+\w+ = self\.{activation}\(\1\)"
    return "forward" not in vars(owner) and re.search(calls, source) is not None
