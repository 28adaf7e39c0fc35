"""Masks, uint8 [H, W], 1 where the picture is to be filled.

Every mask is a function of (height, width, draws) and works at any size: lengths are those of the
256-pixel original, scaled. The kinds of the published Palette follow its behaviour as measured at
256 pixels (their area in brackets); two follow the recipe of the paper (Saharia et al. 2022,
"Palette: Image-to-Image Diffusion Models", appendix on inpainting and uncropping).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from palette.data import images, paths
from palette.data.order import Draws

MaskArray = npt.NDArray[np.uint8]
Mask = Callable[[int, int, Draws], MaskArray]

_ORIGINAL = 256  # side for which the lengths below are given, in pixels
_THRESHOLD = 127  # brighter than this in a mask file is hole
_BLACK = (0, 0, 0)


def center(height: int, width: int, draws: Draws) -> MaskArray:
    """The middle half of each side [0.25]."""
    return _rectangle(height, width, height // 4, width // 4, height // 2, width // 2)


def box(height: int, width: int, draws: Draws) -> MaskArray:
    """A box of nearly half of each side, anywhere but at the border [0.21, 0.18 to 0.25]."""
    sides = [_box_side(length, draws) for length in (height, width)]
    (top, box_height), (left, box_width) = sides
    return _rectangle(height, width, top, left, box_height, box_width)


def free_form(height: int, width: int, draws: Draws) -> MaskArray:
    """One to three brush strokes [0.154, sd 0.080].

    A stroke walks over 4 to 11 corners, turning back and forth (Yu et al. 2019, "Free-Form Image
    Inpainting with Gated Convolution", algorithm 1).
    """
    mask = Image.new("L", (width, height))
    canvas = ImageDraw.Draw(mask)
    mean_angle, spread = 2 * math.pi / 5, 2 * math.pi / 15
    reach = math.sqrt(2 * height * width) / 8  # of a square: an eighth of the diagonal
    for _ in range(draws.integer(1, 4)):
        corners = draws.integer(4, 12)
        low, high = mean_angle - draws.real(0, spread), mean_angle + draws.real(0, spread)
        x, y = draws.real(0, width), draws.real(0, height)
        stroke = [(x, y)]
        angles = [draws.real(low, high) for _ in range(corners)]
        lengths = reach + reach / 2 * draws.normal(corners)
        for number, (angle, drawn) in enumerate(zip(angles, lengths.tolist(), strict=True)):
            turn = 2 * math.pi - angle if number % 2 == 0 else angle
            length = min(max(drawn, 0.0), 2 * reach)
            x = min(max(x + length * math.cos(turn), 0.0), float(width))
            y = min(max(y + length * math.sin(turn), 0.0), float(height))
            stroke.append((x, y))
        _brush(canvas, stroke, draws.real(11.5, 39.5) * _scale(height, width))
    return _filled(np.array(mask))


def free_form_10_20(height: int, width: int, draws: Draws) -> MaskArray:
    """Brush strokes over 10 to 20 % of the picture, as the paper tests inpainting (its table 9)."""
    return _strokes_within(0.1, 0.2, height, width, draws)


def free_form_20_30(height: int, width: int, draws: Draws) -> MaskArray:
    """Brush strokes over 20 to 30 %."""
    return _strokes_within(0.2, 0.3, height, width, draws)


def free_form_30_40(height: int, width: int, draws: Draws) -> MaskArray:
    """Brush strokes over 30 to 40 %."""
    return _strokes_within(0.3, 0.4, height, width, draws)


def irregular(height: int, width: int, draws: Draws) -> MaskArray:
    """Four to seven walks of thick segments [0.253; always between 0.15 and 0.5]."""
    for _ in range(100):
        mask = _walks(height, width, draws)
        if 0.15 < mask.mean() < 0.5:
            return mask
    return center(height, width, draws)  # sizes of a few pixels cannot meet the condition


def hybrid(height: int, width: int, draws: Draws) -> MaskArray:
    """A box and brush strokes over one another [0.328, 0.20 to 0.57]."""
    return box(height, width, draws) | free_form(height, width, draws)


def paper(height: int, width: int, draws: Draws) -> MaskArray:
    """The paper's inpainting: brush strokes in 60 %, else 1 to 5 boxes over 10 to 40 % in all."""
    if draws.real() < 0.6:
        return free_form(height, width, draws)
    mask = np.zeros((height, width), dtype=np.uint8)
    count = draws.integer(1, 6)
    area = draws.real(0.1, 0.4) / count
    for _ in range(count):
        aspect = 2.0 ** draws.real(-1, 1)
        box_height = min(max(round(height * math.sqrt(area * aspect)), 1), height)
        box_width = min(max(round(width * math.sqrt(area / aspect)), 1), width)
        top = draws.integer(0, height - box_height + 1)
        left = draws.integer(0, width - box_width + 1)
        mask[top : top + box_height, left : left + box_width] = 1
    return mask


def one_direction(height: int, width: int, draws: Draws) -> MaskArray:
    """The left, right, top or bottom half."""
    return (left, right, top, bottom)[draws.integer(0, 4)](height, width, draws)


def left(height: int, width: int, draws: Draws) -> MaskArray:
    """The left half."""
    return _rectangle(height, width, 0, 0, height, max(width // 2, 1))


def right(height: int, width: int, draws: Draws) -> MaskArray:
    """The right half."""
    return _rectangle(height, width, 0, width // 2, height, width)


def top(height: int, width: int, draws: Draws) -> MaskArray:
    """The upper half."""
    return _rectangle(height, width, 0, 0, max(height // 2, 1), width)


def bottom(height: int, width: int, draws: Draws) -> MaskArray:
    """The lower half."""
    return _rectangle(height, width, height // 2, 0, height, width)


def four_sides(height: int, width: int, draws: Draws) -> MaskArray:
    """A border on all four sides, half of the area: what the paper calls uncropping."""
    inner_height, inner_width = (round(side * math.sqrt(0.5)) for side in (height, width))
    hole = np.ones((height, width), dtype=np.uint8)
    top, left = (height - inner_height) // 2, (width - inner_width) // 2
    hole[top : top + inner_height, left : left + inner_width] = 0
    return _filled(hole)


def rectangle(height: int, width: int, draws: Draws) -> MaskArray:
    """A rectangle of half of the area, anywhere: what upstream calls "fourdirection"."""
    box_width = draws.integer((width + 1) // 2, max(width, (width + 1) // 2 + 1))
    box_height = max(height * width // 2 // box_width, 1)
    top = draws.integer(0, max(height - box_height, 0) + 1)
    left = draws.integer(0, max(width - box_width, 0) + 1)
    return _rectangle(height, width, top, left, box_height, box_width)


def uncrop(height: int, width: int, draws: Draws) -> MaskArray:
    """The paper's uncropping: one side or all four, equally likely [0.5]."""
    return (one_direction if draws.real() < 0.5 else four_sides)(height, width, draws)


def uncrop_published(height: int, width: int, draws: Draws) -> MaskArray:
    """Upstream's "hybrid" of uncropping: one side or a rectangle, equally likely [0.5]."""
    return (one_direction if draws.real() < 0.5 else rectangle)(height, width, draws)


MASKS: dict[str, Mask] = {
    mask.__name__: mask
    for mask in (
        center,
        box,
        free_form,
        free_form_10_20,
        free_form_20_30,
        free_form_30_40,
        irregular,
        hybrid,
        paper,
        one_direction,
        left,
        right,
        top,
        bottom,
        four_sides,
        rectangle,
        uncrop,
        uncrop_published,
    )
}


def find_mask(name: str) -> Mask:
    """The mask a config names: one of MASKS, a box, or the path of a mask file or a folder of them.

    A box is "LEFT,TOP,RIGHT,BOTTOM" in shares of width and height: "0.5,0,1,1" is the right half.
    Raises ValueError when it is none of these.
    """
    if name in MASKS:
        return MASKS[name]
    if is_name(name):
        return Box(name)
    if os.path.exists(name):
        return MaskFiles(name)
    raise ValueError(
        f"mask must be one of {', '.join(MASKS)}, LEFT,TOP,RIGHT,BOTTOM in shares, "
        f"a mask file or a folder of them, got '{name}'"
    )


def is_name(text: str) -> bool:
    """Whether a mask is given by name or as a box, not by the path of a file."""
    return text in MASKS or (text.count(",") == 3 and not os.path.exists(text))


class Box:
    """The same rectangle always, from text; see :func:`find_mask`. Raises ValueError."""

    def __init__(self, shares: str) -> None:
        try:
            left, top, right, bottom = (float(share) for share in shares.split(","))
        except ValueError:
            left = top = right = bottom = math.nan
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                f"mask must be LEFT,TOP,RIGHT,BOTTOM with 0 <= LEFT < RIGHT <= 1 and "
                f"0 <= TOP < BOTTOM <= 1, got '{shares}'"
            )
        self._shares = left, top, right, bottom

    def __call__(self, height: int, width: int, draws: Draws) -> MaskArray:
        left, right = (round(self._shares[each] * width) for each in (0, 2))
        top, bottom = (round(self._shares[each] * height) for each in (1, 3))
        return _rectangle(height, width, top, left, bottom - top, right - left)


class MaskFiles:
    """A mask from a file, or one drawn among the files of a folder.

    Raises ValueError when there is no image; calling it raises UnreadableImage for a damaged one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        where = os.fspath(path)
        if os.path.isdir(where):
            self._paths = paths.scan(where)
        else:
            self._paths = paths.Paths.of("", [where])
            load_mask(where)

    def __call__(self, height: int, width: int, draws: Draws) -> MaskArray:
        number = draws.integer(0, len(self._paths))
        mask: MaskArray = _cached_mask(self._paths.path(number), height, width).copy()
        return mask


def load_mask(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> MaskArray:
    """A mask from an image file: 1 where it is brighter than the middle grey, 0 elsewhere.

    So a mask saved as JPEG is as good as one of two values. Transparent pixels count as black.
    With ``size`` (height, width) it is resized by :func:`resize_mask`. Raises UnreadableImage.
    """
    mask = hole_in(images.read(path, background=_BLACK))
    return mask if size is None else resize_mask(mask, size)


def hole_in(image: Image.Image) -> MaskArray:
    """The mask [H, W] in a picture of any mode; see :func:`load_mask`."""
    grey = images.standard(image, background=_BLACK).convert("L")
    return (np.asarray(grey) > _THRESHOLD).astype(np.uint8)


def resize_mask(mask: MaskArray, size: tuple[int, int], *, cautious: bool = False) -> MaskArray:
    """A mask [H, W] at another size (height, width): hole where at least half of a pixel is hole.

    ``cautious``: hole where any part is, so that no known pixel has anything of the hole in it.
    """
    if mask.shape == size:
        return mask
    whole = Image.fromarray((mask != 0).astype(np.float32))
    cover = np.asarray(whole.resize((size[1], size[0]), Image.Resampling.BOX))
    return (cover > 1e-6 if cautious else cover >= 0.5).astype(np.uint8)


@functools.lru_cache(maxsize=256)
def _cached_mask(path: str, height: int, width: int) -> MaskArray:
    return load_mask(path, (height, width))


def _scale(height: int, width: int) -> float:
    return math.sqrt(height * width) / _ORIGINAL


def _rectangle(
    height: int, width: int, top: int, left: int, box_height: int, box_width: int
) -> MaskArray:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[top : top + box_height, left : left + box_width] = 1
    return _filled(mask)


def _filled(mask: MaskArray) -> MaskArray:
    """A mask without any hole, possible at sizes of a few pixels, gets one in the middle."""
    if not mask.any():
        mask[mask.shape[0] // 2, mask.shape[1] // 2] = 1
    return mask


def _strokes_within(low: float, high: float, height: int, width: int, draws: Draws) -> MaskArray:
    """Strokes added until they cover the wanted part of the picture, begun again where too much."""
    for _ in range(100):
        mask = np.zeros((height, width), dtype=np.uint8)
        while mask.mean() < low:
            mask |= free_form(height, width, draws)
        if mask.mean() <= high:
            return mask
    side = math.sqrt((low + high) / 2)  # of a few pixels: a box, as near as it gets
    box_height, box_width = max(round(height * side), 1), max(round(width * side), 1)
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return _rectangle(height, width, top, left, box_height, box_width)


def _box_side(length: int, draws: Draws) -> tuple[int, int]:
    """Start and length of the box along one side: margin 20, largest 128, up to 20 less."""
    largest = max(length * 128 // _ORIGINAL, 1)
    margin = length * 20 // _ORIGINAL
    start = draws.integer(margin, max(length - margin - largest, margin + 1))
    less = draws.integer(0, margin + 1)
    return start + less, largest - less


def _walks(height: int, width: int, draws: Draws) -> MaskArray:
    """One attempt at an irregular mask."""
    mask = Image.new("L", (width, height))
    canvas = ImageDraw.Draw(mask)
    scale = _scale(height, width)
    for walk in range(draws.integer(4, 8)):
        x, y = draws.real(0, width), draws.real(0, height)
        for _ in range(draws.integer(1, 6)):
            angle = 0.01 + draws.integer(0, 4)  # radians
            if walk % 2 == 0:
                angle = 2 * math.pi - angle
            length = draws.real(9.5, 99.5) * scale
            end = (x + length * math.sin(angle), y + length * math.cos(angle))
            # Widths 10 to 39, and one more: OpenCV, with which the areas above were measured,
            # counts the pixels that a line's edges touch.
            _brush(canvas, [(x, y), end], draws.real(10.5, 40.5) * scale)
            x, y = end
    return np.array(mask)


def _brush(
    canvas: ImageDraw.ImageDraw, stroke: list[tuple[float, float]], thickness: float
) -> None:
    """A thick line through the points, with round ends and corners."""
    points = [(int(x), int(y)) for x, y in stroke]
    wide = max(round(thickness), 1)
    canvas.line(points, fill=1, width=wide)
    radius = wide // 2
    for x, y in points:
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
