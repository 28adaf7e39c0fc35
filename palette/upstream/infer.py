"""What the weights of a guided-diffusion U-Net say of its options, where no config came along."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from palette.models.layers import pair, round_up

_UP_BLOCK = re.compile(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight")
_UP_LAYER = re.compile(r"output_blocks\.\d+\.[12]\.conv\.weight")
_INPUT = re.compile(r"input_blocks\.(\d+)\.")
_OUTPUT = re.compile(r"output_blocks\.(\d+)\.")


def infer_unet(
    weights: Mapping[str, Tensor],
    image_size: int | tuple[int, int],
    *,
    head_channels: int | None = None,
) -> dict[str, Any]:
    """Arguments of ``UNet`` that its weights show, for published and guided-diffusion files alike.

    Args:
        weights: under the names of ``UNet`` or of guided-diffusion, without a prefix.
        image_size: pixels, n or (height, width), of the training images.
        head_channels: channels of an attention head, which no weight shows; None: one head.

    The attention order shows nowhere either; "legacy" is what both programs default to. Channels
    of in- and output are those of the weights.

    Raises:
        ValueError: the names are not those of such a network.
    """
    try:
        return _infer(weights, pair(image_size, "image_size"), head_channels)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"weights: not those of a guided-diffusion U-Net ({error!r})") from None


def _infer(
    weights: Mapping[str, Tensor], image_size: tuple[int, int], head_channels: int | None
) -> dict[str, Any]:
    inputs, outputs = _numbers(weights, _INPUT), _numbers(weights, _OUTPUT)
    up_blocks = sum(bool(_UP_BLOCK.fullmatch(name)) for name in weights)
    up_layers = sum(bool(_UP_LAYER.fullmatch(name)) for name in weights)
    # Downsampling by a mean has no weights and leaves a gap in the numbers of the blocks.
    gaps = max(inputs) + 1 - len(inputs)
    levels = 1 + (up_blocks or up_layers or gaps)
    res_blocks = len(outputs) // levels - 1
    firsts = [1 + level * (res_blocks + 1) for level in range(levels)]
    embed = "cond_embed" if "cond_embed.0.weight" in weights else "time_embed"
    channels = weights[f"{embed}.0.weight"].shape[1]
    widths = [weights[f"input_blocks.{first}.0.in_layers.2.weight"].shape[0] for first in firsts]
    shorter = min(round_up(image_size, 2 ** (levels - 1)))
    labels = weights.get("label_emb.weight")
    return {
        "image_size": image_size,
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "channels": channels,
        "channel_mults": [
            width // channels if width % channels == 0 else width / channels for width in widths
        ],
        "res_blocks": res_blocks,
        "attention_resolutions": [
            shorter >> level
            for level, first in enumerate(firsts)
            if f"input_blocks.{first}.1.qkv.weight" in weights
        ],
        "head_channels": head_channels,
        "attention_order": "legacy",
        "scale_shift": weights["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        "resblock_updown": up_blocks > 0 or levels == 1,
        "conv_resample": up_layers > 0 or up_blocks > 0 or levels == 1,
        # guided-diffusion has no row for "no label"; ours is added when the weights are converted.
        "num_classes": None if labels is None else labels.shape[0] - (embed == "cond_embed"),
    }


def _numbers(weights: Mapping[str, Tensor], pattern: re.Pattern[str]) -> set[int]:
    found = {int(match[1]) for name in weights if (match := pattern.match(name))}
    if not found:
        raise IndexError(pattern.pattern)
    return found
