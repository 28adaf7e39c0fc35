"""Image files of every kind in, tensors in [-1, 1] out, and back.

What a file holds is made plain before anything else sees it: upright, 8 bits, grey or RGB. What
cannot be read, or would not fit into memory, is refused in one line that names the file.
"""

from __future__ import annotations

import functools
import io
import os
import stat
import threading
import warnings
from collections.abc import Sequence
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from palette.data.paths import printable

MAX_PIXELS = 2**27  # 134 megapixels, 0.5 GB once decoded; every phone's usual size lies below

# Formats that Pillow decodes by itself, and how their files are usually named. The others are left
# out on purpose: EPS starts a program.
_ENDINGS = {
    "JPEG": ".jpg",
    "MPO": ".jpg",  # what Pillow calls a JPEG with further pictures behind it
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "DIB": ".dib",
    "GIF": ".gif",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "TGA": ".tga",
    "JPEG2000": ".jp2",
    "AVIF": ".avif",
}

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_ORIENTED_BY = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

_WHITE = (255, 255, 255)

_pillow_limit = threading.Lock()


class UnreadableImage(ValueError):  # noqa: N818 - the name is part of the interface
    """A file that is no image, is damaged or too large; the message is one line with its name."""


def read(
    path: str | os.PathLike[str],
    *,
    max_pixels: int = MAX_PIXELS,
    at_least: tuple[int, int] | None = None,
    background: tuple[int, int, int] = _WHITE,
) -> Image.Image:
    """The picture in a file: mode "L" or "RGB", 8 bits, upright, first frame of an animation.

    ``max_pixels``: larger pictures are refused by their header, before anything is decoded.
    ``at_least`` (height, width): the picture may come back smaller than the file, by a whole
    factor, but with no side below these (a JPEG is then decoded at reduced scale, much faster).
    ``background``: what shows through transparent pixels.

    Raises UnreadableImage.
    """
    name = printable(path)
    _check_file(path, name)
    try:
        with open(path, "rb") as file:
            return _decoded(file, name, max_pixels, at_least, background)
    except OSError as error:
        raise UnreadableImage(f"{name}: damaged image: {_one_line(error)}") from error


def read_bytes(data: bytes, name: str, *, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The picture in the contents of a file, called ``name`` in messages; see :func:`read`."""
    if not data:
        raise UnreadableImage(f"{name}: empty file")
    return _decoded(io.BytesIO(data), name, MAX_PIXELS, at_least, _WHITE)


def usual_ending(path: str | os.PathLike[str]) -> str:
    """How a file of this picture's format is usually named: ".jpg", ".png" and so on.

    For a picture that :func:`read` takes.
    """
    with open(path, "rb") as file, _open(file, MAX_PIXELS, printable(path)) as image:
        return _ENDINGS[str(image.format)]


def _decoded(
    file: IO[bytes],
    name: str,
    max_pixels: int,
    at_least: tuple[int, int] | None,
    background: tuple[int, int, int],
) -> Image.Image:
    try:
        with _open(file, max_pixels, name) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableImage(_too_large(name, f"{image.width}x{image.height}", max_pixels))
            turned = _orientation(image) >= 5
            if at_least is not None:
                height, width = at_least
                image.draft(None, (height, width) if turned else (width, height))
            plain = standard(image, background=background)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(_too_large(name, "its size", max_pixels)) from None
    except UnidentifiedImageError:
        raise UnreadableImage(f"{name}: not an image of a kind that can be read") from None
    except Exception as error:  # decoders answer hostile bytes with nearly every exception there is
        raise UnreadableImage(f"{name}: damaged image: {_one_line(error)}") from error
    return plain if at_least is None else _reduce(plain, at_least)


def standard(image: Image.Image, *, background: tuple[int, int, int] = _WHITE) -> Image.Image:
    """Any Pillow image as mode "L" or "RGB", 8 bits, upright by its EXIF orientation.

    Transparent pixels show ``background``. 16-bit, 32-bit and float pictures are scaled, never
    clipped: see :func:`_to_eight_bits`. Raises ValueError for pixels that are not finite.
    """
    image.load()  # TIFF turns itself upright in doing so, and forgets its orientation
    orientation = _orientation(image)
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        plain = _to_eight_bits(image)
    elif mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        grey = mode in ("1", "L", "LA", "La") and len(set(background)) == 1
        layer = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        plain = Image.new("RGBA", image.size, (*background, 255))
        plain.alpha_composite(layer)
        plain = plain.convert("L" if grey else "RGB")
    else:
        plain = image.convert("L" if mode in ("1", "L") else "RGB")
    turn = _TRANSPOSE.get(orientation)
    if turn is None:
        return plain
    upright = plain.transpose(turn)
    for key in _ORIENTED_BY:  # else it would be turned again the next time
        upright.info.pop(key, None)
    return upright


def to_tensor(image: Image.Image, channels: int = 3) -> Tensor:
    """Image as float32 [C, H, W] in [-1, 1], value / 127.5 - 1; ``channels`` is 1 or 3."""
    return to_batch([image], channels)[0]


def to_batch(pictures: Sequence[Image.Image], channels: int = 3) -> Tensor:
    """Images of one size as float32 [N, C, H, W] in [-1, 1]; ``channels`` is 1 or 3."""
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    mode = "L" if channels == 1 else "RGB"
    arrays = [
        np.asarray(image if image.mode == mode else image.convert(mode)) for image in pictures
    ]
    pixels = torch.from_numpy(np.stack(arrays))  # [N, H, W, C], or [N, H, W]
    planes = pixels.unsqueeze(1) if channels == 1 else pixels.permute(0, 3, 1, 2)
    scaled = torch.empty(planes.shape, dtype=torch.float32).copy_(planes)
    return scaled.div_(127.5).sub_(1.0)


def to_image(tensor: Tensor) -> Image.Image:
    """Tensor [C, H, W] in [-1, 1], C 1 or 3, as an image; the exact inverse of :func:`to_tensor`.

    Values outside are clamped; values that are not numbers become black.
    """
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ValueError(
            f"tensor must have shape [1 or 3, H, W], got {list(tensor.shape)}; "
            "one image of a batch is batch[i]"
        )
    scaled = tensor.detach().to("cpu", torch.float32).add(1.0).mul(127.5)
    pixels = scaled.nan_to_num(nan=0.0).round().clamp(0, 255).to(torch.uint8)
    if tensor.shape[0] == 1:
        return Image.fromarray(pixels[0].numpy())
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def crop_box(
    full: tuple[int, int],
    size: tuple[int, int],
    *,
    x: float = 0.5,
    y: float = 0.5,
    zoom: float = 1.0,
) -> tuple[float, float, float, float]:
    """Box (left, top, right, bottom) in a picture of ``full`` = (height, width) pixels.

    It has the proportions of ``size`` (height, width) and is the largest such box divided by
    ``zoom`` >= 1; x and y in [0, 1] say where the box lies between the two ends of its room.
    """
    scale = min(full[0] / size[0], full[1] / size[1]) / zoom
    height, width = min(scale * size[0], full[0]), min(scale * size[1], full[1])
    left, top = x * (full[1] - width), y * (full[0] - height)
    return left, top, left + width, top + height


def resize_crop(
    image: Image.Image,
    size: tuple[int, int],
    *,
    x: float = 0.5,
    y: float = 0.5,
    zoom: float = 1.0,
) -> Image.Image:
    """The crop of :func:`crop_box`, resized with antialiasing to ``size`` (height, width)."""
    height, width = size
    if zoom == 1.0 and image.size == (width, height):
        return image
    box = crop_box((image.height, image.width), size, x=x, y=y, zoom=zoom)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def squash(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole image resized to ``size`` (height, width), proportions lost, as upstream does."""
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _check_file(path: str | os.PathLike[str], name: str) -> None:
    """Only regular files are opened: a pipe would block, a device never end."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UnreadableImage(f"{name}: {reason or 'cannot be opened'}") from None
    if stat.S_ISDIR(facts.st_mode):
        raise UnreadableImage(f"{name}: a folder, not an image")
    if not stat.S_ISREG(facts.st_mode):
        raise UnreadableImage(f"{name}: not a regular file")
    if facts.st_size == 0:
        raise UnreadableImage(f"{name}: empty file")


def _open(file: IO[bytes], max_pixels: int, name: str) -> Image.Image:
    """Header of an image. Pillow's own limit, a global, is ours for the moment of opening."""
    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half our limit is where Pillow would begin to warn
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)
        try:
            return Image.open(file, formats=_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = before


@functools.lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _ENDINGS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1
    return value if isinstance(value, int) else 1


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit integer or float pixels as mode "L".

    16-bit pixels are divided by 257. The range of 32-bit and float pixels is told by no file: it is
    0..1 (float only), 0..255 or 0..65535, the first that holds them all, else their own minimum to
    maximum.
    """
    values: npt.NDArray[np.float64] = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite")
    tops: Sequence[float]
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tops = (65535.0,)
    else:
        tops = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
    low, high = float(values.min()), float(values.max())
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        values, top = values - low, (high - low) or 1.0
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def _reduce(image: Image.Image, at_least: tuple[int, int]) -> Image.Image:
    factor = min(image.height // at_least[0], image.width // at_least[1])
    return image.reduce(factor) if factor > 1 else image


def _too_large(name: str, found: str, max_pixels: int) -> str:
    return (
        f"{name}: {found} is above the limit of {max_pixels / 1e6:.0f} megapixels (max_pixels); "
        "make it smaller"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
