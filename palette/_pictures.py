"""The kinds of pictures and masks that users give, made plain, and results as what was given."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image as PILImage
from torch import Tensor

from palette.data import images, masks, region
from palette.data.canvas import Rectangle, windows
from palette.data.order import Draws

Array: TypeAlias = npt.NDArray[Any]
Picture: TypeAlias = "PILImage.Image | str | os.PathLike[str] | Array | Tensor"

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow turns colour to grey


def open_picture(picture: Picture) -> PILImage.Image:
    """Any kind of picture as mode "RGB", made plain as :func:`images.standard` does with a file.

    An array is uint8 or uint16, [H, W] or [H, W, 1, 3 or 4], a tensor [1 or 3, H, W] in [-1, 1].
    Raises UnreadableImage, and ValueError for other arrays and tensors.
    """
    if isinstance(picture, Tensor):
        return images.to_image(picture).convert("RGB")
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture)
    if not isinstance(picture, PILImage.Image):
        return images.read(picture).convert("RGB")
    try:
        return images.standard(picture).convert("RGB")
    except ValueError as error:
        raise ValueError(f"image: {error}") from None


def open_mask(mask: Picture, picture: PILImage.Image, seed: int) -> region.Mask:
    """The hole [H, W] in a picture: where the mask is brighter than the middle grey.

    Colours count by luma, and transparent pixels as black. White is 1 in a tensor, and in an array
    where nothing is larger; else 255, or 65535 of uint16. A name such as "center" is drawn with
    the seed. Raises UnreadableImage, and ValueError for a mask of another size or shape.
    """
    size = (picture.height, picture.width)
    if isinstance(mask, str) and masks.is_name(mask):
        return masks.find_mask(mask)(*size, Draws(seed))
    if isinstance(mask, (str, os.PathLike)):
        hole = masks.load_mask(mask)
    elif isinstance(mask, (Tensor, np.ndarray)):
        hole = _hole(mask)
    else:
        hole = masks.hole_in(mask)
    if hole.shape != size:
        raise ValueError(
            f"mask: its size {hole.shape[1]}x{hole.shape[0]} is not the image's {size[1]}x{size[0]}"
        )
    return hole


def _from_array(array: Array) -> PILImage.Image:
    _check_array(array)
    pixels = array[..., 0] if array.shape[2:] == (1,) else array
    if pixels.dtype.itemsize == 2:
        pixels = np.rint(pixels / 257).astype(np.uint8)  # 65535 is white
    return PILImage.fromarray(pixels)


def _check_array(array: Array) -> None:
    integers = array.dtype.kind == "u" and array.dtype.itemsize <= 2
    if not integers or array.ndim not in (2, 3) or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(
            f"image: found an array of {array.dtype} {list(array.shape)}, wants uint8 or uint16, "
            "[H, W] or [H, W, 1, 3 or 4]"
        )


def _hole(mask: Array | Tensor) -> region.Mask:
    levels = _channels_last(mask) if isinstance(mask, Tensor) else mask
    channels = levels.shape[2:]
    if levels.dtype.kind not in "buif" or channels not in ((), (1,), (3,), (4,)) or levels.ndim < 2:
        raise ValueError(
            f"mask: found {mask.dtype} {list(mask.shape)}, wants numbers, in an array [H, W] or "
            "[H, W, 1, 3 or 4], in a tensor [H, W] or [1 or 3, H, W]"
        )
    white = 65535 if levels.dtype == np.uint16 else 255
    if isinstance(mask, Tensor) or levels.max(initial=0) <= 1:
        white = 1
    if channels == (1,):
        levels = levels[..., 0]
    elif channels:
        cover = levels[..., 3] / white if channels == (4,) else 1
        levels = levels[..., :3] @ _LUMA * cover
    return (levels > white / 2).astype(np.uint8)


def _channels_last(mask: Tensor) -> Array:
    while mask.ndim > 3 and mask.shape[0] == 1:
        mask = mask[0]
    planes = mask.detach().cpu().float()
    return (planes.movedim(0, -1) if mask.ndim == 3 else planes).numpy()


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


def size_of(picture: PILImage.Image | Array | Tensor) -> tuple[int, int]:
    """Height and width. Raises ValueError for an array that is no picture."""
    if isinstance(picture, PILImage.Image):
        return picture.height, picture.width
    if isinstance(picture, Tensor):
        return picture.shape[-2], picture.shape[-1]
    _check_array(picture)
    return picture.shape[0], picture.shape[1]


def like(
    source: Picture, result: PILImage.Image, hole: region.Mask | None = None
) -> PILImage.Image | Array | Tensor:
    """The result as what was given; known values of a tensor are not rounded to 8 bits."""
    if isinstance(source, Tensor):
        filled = images.to_tensor(result, source.shape[0]).to(source)
        if hole is None:
            return filled
        return torch.where(torch.from_numpy(hole).to(source.device).bool(), filled, source)
    if isinstance(source, np.ndarray):
        return np.asarray(result)
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
