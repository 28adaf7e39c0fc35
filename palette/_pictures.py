"""The kinds of pictures and masks that users give, made plain, and results as what was given."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PILImage
from torch import Tensor

from palette.data import images, masks, region
from palette.data.canvas import Rectangle, windows
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
    if isinstance(mask, str) and masks.is_name(mask):
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


def extended(picture: Picture, box: Rectangle) -> tuple[Picture, region.Mask]:
    """The part of a picture that a rectangle shows, and as hole what lies outside of the picture.

    Values of arrays and tensors stay. Raises ValueError when all of it or nothing lies inside.
    """
    plain = picture if isinstance(picture, (Tensor, np.ndarray)) else open_picture(picture)
    height, width = size_of(plain)
    left, top, right, bottom = box
    inside = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise ValueError(f"rectangle: {box} shows nothing of the picture of {width}x{height}")
    if inside == box:
        raise ValueError(f"rectangle: {box} does not go beyond the picture of {width}x{height}")
    rows, columns = slice(inside[1], inside[3]), slice(inside[0], inside[2])
    there = (slice(inside[1] - top, inside[3] - top), slice(inside[0] - left, inside[2] - left))
    hole = np.ones((bottom - top, right - left), dtype=np.uint8)
    hole[there] = 0
    if isinstance(plain, Tensor):
        canvas = plain.new_zeros(plain.shape[0], *hole.shape)
        canvas[:, there[0], there[1]] = plain[:, rows, columns]
        return canvas, hole
    if isinstance(plain, np.ndarray):
        array = np.zeros((*hole.shape, *plain.shape[2:]), dtype=plain.dtype)
        array[there] = plain[rows, columns]
        return array, hole
    return plain.crop(box), hole


def size_of(picture: PILImage.Image | npt.NDArray[np.uint8] | Tensor) -> tuple[int, int]:
    """Height and width."""
    if isinstance(picture, PILImage.Image):
        return picture.height, picture.width
    shape = picture.shape[-2:] if isinstance(picture, Tensor) else picture.shape[:2]
    return shape[0], shape[1]


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


def widened(
    picture: PILImage.Image,
    width: int,
    window: int,
    paint: Callable[[PILImage.Image, region.Mask, int], PILImage.Image],
) -> PILImage.Image:
    """A picture grown to ``width`` by pieces of ``window``; see ``canvas.windows``.

    ``paint(canvas, hole, i)`` fills the i-th of them.
    """
    for index, (side, seen, new) in enumerate(windows(picture.width, width, window)):
        size, height = picture.width, picture.height
        start = size - seen if side == "right" else 0
        part = picture.crop((start, 0, start + seen, height))
        box = (0, 0, seen + new, height) if side == "right" else (-new, 0, seen, height)
        canvas, hole = extended(part, box)
        wider = PILImage.new("RGB", (size + new, height))
        wider.paste(picture, (0 if side == "right" else new, 0))
        wider.paste(paint(open_picture(canvas), hole, index), (start, 0))
        picture = wider
    return picture


def recolour(picture: PILImage.Image, painted: PILImage.Image) -> PILImage.Image:
    """The brightness of ``picture`` with the colours of ``painted``, which may be smaller."""
    luma = picture.convert("YCbCr").getchannel(0)
    colours = painted.resize(picture.size, PILImage.Resampling.BICUBIC).convert("YCbCr")
    return PILImage.merge("YCbCr", (luma, *colours.split()[1:])).convert("RGB")
