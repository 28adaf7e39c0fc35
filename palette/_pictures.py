"""The kinds of pictures and masks that users give, made plain, and results as what was given."""

from __future__ import annotations

import os
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PILImage
from torch import Tensor

from palette.data import images, masks, region
from palette.data.order import Draws

Picture: TypeAlias = "PILImage.Image | str | os.PathLike[str] | npt.NDArray[np.uint8] | Tensor"


def open_picture(picture: Picture) -> PILImage.Image:
    """Any kind of picture as mode "RGB". Raises UnreadableImage."""
    if isinstance(picture, Tensor):
        return images.to_image(picture).convert("RGB")
    if isinstance(picture, np.ndarray):
        return PILImage.fromarray(picture).convert("RGB")
    if isinstance(picture, PILImage.Image):
        return picture.convert("RGB")
    return images.read(picture).convert("RGB")


def open_mask(mask: Picture, picture: PILImage.Image, seed: int) -> region.Mask:
    """The hole [H, W] in a picture; a name such as "center" is drawn with the seed.

    Raises ValueError for a mask of another size.
    """
    size = (picture.height, picture.width)
    if isinstance(mask, str) and not os.path.exists(mask):
        return masks.find_mask(mask)(*size, Draws(seed))
    if isinstance(mask, (str, os.PathLike)):
        hole = masks.load_mask(mask)
    elif isinstance(mask, Tensor):
        hole = (mask.reshape(mask.shape[-2:]).cpu().numpy() > 0.5).astype(np.uint8)
    elif isinstance(mask, np.ndarray):
        hole = (mask > (0.5 if mask.max(initial=0) <= 1 else 127)).astype(np.uint8)
    else:
        hole = (np.asarray(mask.convert("L")) > 127).astype(np.uint8)
    if hole.shape != size:
        raise ValueError(
            f"mask: its size {hole.shape[1]}x{hole.shape[0]} is not the image's {size[1]}x{size[0]}"
        )
    return hole


def like(
    source: Picture, result: PILImage.Image, hole: region.Mask | None = None
) -> PILImage.Image | npt.NDArray[np.uint8] | Tensor:
    """The result as what was given; known values of a tensor are not rounded to 8 bits."""
    if isinstance(source, Tensor):
        filled = images.to_tensor(result, source.shape[0]).to(source)
        if hole is None:
            return filled
        return torch.where(torch.from_numpy(hole).to(source.device).bool(), filled, source)
    if isinstance(source, np.ndarray):
        return cast(npt.NDArray[np.uint8], np.asarray(result))
    return result


def recolour(picture: PILImage.Image, painted: PILImage.Image) -> PILImage.Image:
    """The brightness of ``picture`` with the colours of ``painted``, which may be smaller."""
    luma = picture.convert("YCbCr").getchannel(0)
    colours = painted.resize(picture.size, PILImage.Resampling.BICUBIC).convert("YCbCr")
    return PILImage.merge("YCbCr", (luma, *colours.split()[1:])).convert("RGB")
