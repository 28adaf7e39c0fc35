"""The options of a U-Net from its weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from palette.models.unet import UNet
from palette.upstream import infer_unet

SMALL: dict[str, Any] = {
    "image_size": (16, 24),
    "in_channels": 3,
    "out_channels": 6,
    "channels": 32,
    "channel_mults": [1, 2, 2],
    "res_blocks": 2,
    "attention_resolutions": [8],
    "head_channels": 16,
    "attention_order": "legacy",
    "scale_shift": True,
    "resblock_updown": True,
    "conv_resample": True,
    "num_classes": None,
}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resblock_updown": False, "scale_shift": False},
        {"resblock_updown": False, "conv_resample": False, "num_classes": 5},
        {"res_blocks": 1, "attention_resolutions": [16, 4]},
        {"channel_mults": [2], "attention_resolutions": []},
        {"channels": 64, "channel_mults": [0.5, 1], "head_channels": None},
    ],
)
def test_every_option_that_shows_is_found(options: dict[str, Any]) -> None:
    wanted = SMALL | options
    with torch.device("meta"):
        weights = UNet(**wanted).state_dict()
    found = infer_unet(weights, (16, 24), head_channels=wanted["head_channels"])
    assert found == wanted


def test_guided_diffusion_names_and_labels() -> None:
    with torch.device("meta"):
        weights = UNet(**SMALL | {"num_classes": 9}).state_dict()
    guided = {key.replace("cond_embed", "time_embed"): value for key, value in weights.items()}
    assert infer_unet(guided, (16, 24), head_channels=16)["num_classes"] == 10


def test_other_weights_are_refused() -> None:
    for weights in (
        {},
        {"downs.0.weight": torch.ones(1)},
        {"input_blocks.0.0.weight": torch.ones(1)},
    ):
        with pytest.raises(ValueError, match=r"^weights: not those of a guided-diffusion U-Net"):
            infer_unet(weights, 16)
