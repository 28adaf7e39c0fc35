"""From a config to the objects it describes: network, schedule, device, precision."""

from __future__ import annotations

import torch
from torch import nn

from palette.config import Config
from palette.diffusion.schedule import Array, Schedule, published, spaced
from palette.models.sr3 import SR3UNet
from palette.models.unet import UNet

CHANNELS = 3  # of condition and target each: grey pictures are repeated, so tasks can be mixed
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_network(config: Config) -> nn.Module:
    """The network that ``config.model`` describes, freshly initialised, on the CPU in float32."""
    model = config.model
    if model.kind == "sr3":
        return SR3UNet(
            image_size=image_size(config),
            in_channels=2 * CHANNELS,
            out_channels=CHANNELS,
            channels=model.channels,
            channel_mults=model.channel_mults,
            res_blocks=model.res_blocks,
            attention_resolutions=model.attention_resolutions,
            dropout=model.dropout,
            norm_groups=model.norm_groups,
            noise_level_embedding=model.noise_level_embedding,
            embedding=model.embedding,
        )
    return UNet(
        image_size=image_size(config),
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        channels=model.channels,
        channel_mults=model.channel_mults,
        res_blocks=model.res_blocks,
        attention_resolutions=model.attention_resolutions,
        dropout=model.dropout,
        heads=model.heads,
        head_channels=model.head_channels,
        heads_upsample=model.heads_upsample,
        attention_order=model.attention_order,
        scale_shift=model.scale_shift,
        resblock_updown=model.resblock_updown,
        conv_resample=model.conv_resample,
        checkpoint=model.checkpoint,
        embedding=model.embedding,
        num_classes=model.num_classes,
    )


def build_schedule(config: Config) -> Schedule:
    """The noise schedule that ``config.schedule`` describes."""
    chosen = config.schedule
    return Schedule.from_name(
        chosen.name, chosen.steps, chosen.start, chosen.end, chosen.cosine_offset
    )


def image_size(config: Config) -> tuple[int, int]:
    """Height and width that the network is trained at."""
    size = config.data.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resolve_device(name: str = "auto") -> torch.device:
    """The device called ``name``; ``auto`` is the first CUDA device where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype the network runs in: ``auto`` is a half type where the hardware is fast at it."""
    if precision != "auto":
        return _DTYPES[precision]
    if device.type == "cuda":
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if modern else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def build_levels(config: Config, steps: int | None = None) -> Array:
    """The noise levels that sampling walks, float64 [S + 1].

    ``steps`` None is the number and the grid of the config. Another number of steps is spaced in
    log-SNR within the trained range: more than half of the published grid lies below it.
    """
    sample = config.sample
    if sample.grid == "published" and steps in (None, sample.steps):
        name = config.schedule.name
        return published(Schedule.from_name(name, sample.steps, sample.start, sample.end))
    return spaced(build_schedule(config), sample.steps if steps is None else steps)
