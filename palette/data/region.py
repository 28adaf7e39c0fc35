"""The part of a large picture that a small network should look at, and the way back.

A network trained at 256 pixels cannot see a 12-megapixel photograph. The hole with some context
is cut out, brought to the training size, filled, brought back, and only the hole is pasted: every
known pixel of the picture keeps its value.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

Mask = npt.NDArray[np.uint8]

CONTEXT = 2.0  # side of the region over side of the hole; the published centre hole has this ratio


@dataclass(frozen=True)
class Region:
    """A rectangle of a picture, in pixels, and the size [height, width] the network sees it at."""

    left: int
    top: int
    right: int
    bottom: int
    height: int
    width: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        return (self.left, self.top, self.right, self.bottom)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.bottom - self.top, self.right - self.left)

    @property
    def unscaled(self) -> Region:
        """The same part of the picture, to be seen as it is."""
        return replace(self, height=self.shape[0], width=self.shape[1])

    @property
    def shrinks(self) -> bool:
        return (self.height, self.width) != self.shape

    def view(self, image: PILImage.Image) -> PILImage.Image:
        """This part of the picture at the size the network sees, antialiased."""
        part = image.crop(self.box)
        size = (self.width, self.height)
        return part.resize(size, PILImage.Resampling.LANCZOS) if self.shrinks else part


def around_hole(mask: Mask, size: tuple[int, int]) -> Region:
    """The region to show a network of ``size`` [height, width] so that it can fill ``mask``.

    Args:
        mask: [H, W], 1 = hole.
        size: the training size.

    Returns:
        A region with the aspect of ``size``, ``CONTEXT`` times the hole's bounding box, never
        smaller than ``size`` (a small hole is seen at its own scale), cut at the picture's edges.

    Raises:
        ValueError: the mask has no hole.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        raise ValueError("mask: found no hole (every pixel is 0); pixels to fill must be white")
    scale = max(
        1.0,
        CONTEXT * (rows[-1] + 1 - rows[0]) / size[0],
        CONTEXT * (columns[-1] + 1 - columns[0]) / size[1],
    )
    top, bottom = _span(rows[0], rows[-1] + 1, round(size[0] * scale), mask.shape[0])
    left, right = _span(columns[0], columns[-1] + 1, round(size[1] * scale), mask.shape[1])
    # One factor for both sides keeps the picture's aspect where an edge cut the region.
    shrink = max((bottom - top) / size[0], (right - left) / size[1], 1.0)
    height = max(1, round((bottom - top) / shrink))
    width = max(1, round((right - left) / shrink))
    return Region(left, top, right, bottom, height, width)


def whole(picture: tuple[int, int], size: tuple[int, int]) -> Region:
    """All of a picture of (height, width), to be seen by a network of ``size`` [height, width].

    A larger picture shrinks, its aspect kept, until both sides fit; a smaller one stays.
    """
    factor = max(picture[0] / size[0], picture[1] / size[1], 1.0)
    height, width = (max(1, round(side / factor)) for side in picture)
    return Region(0, 0, picture[1], picture[0], height, width)


def _span(first: int, last: int, length: int, limit: int) -> tuple[int, int]:
    """An interval of ``length`` around [first, last), moved, then cut, to lie inside [0, limit)."""
    length = min(length, limit)
    start = min(max((int(first) + int(last) - length) // 2, 0), limit - length)
    return start, start + length


def shrink(image: PILImage.Image, mask: Mask, region: Region) -> tuple[PILImage.Image, Mask]:
    """The region of ``image`` and ``mask`` at the size the network sees.

    A small pixel that any part of the hole touches belongs to the hole, and the box filter reads
    just the pixels it covers, so what lies in the hole never leaks into a known pixel.
    """
    part = image.crop(region.box)
    hole = mask[region.top : region.bottom, region.left : region.right]
    if not region.shrinks:
        return part, hole
    size = (region.width, region.height)
    covered = PILImage.fromarray(hole.astype(np.float32)).resize(size, PILImage.Resampling.BOX)
    return part.resize(size, PILImage.Resampling.BOX), (np.asarray(covered) > 0).astype(np.uint8)


def paste(
    image: PILImage.Image, mask: Mask, region: Region, filled: PILImage.Image
) -> PILImage.Image:
    """A copy of ``image`` whose hole comes from ``filled``, the region as the network left it."""
    if region.shrinks:
        filled = filled.resize(
            (region.right - region.left, region.bottom - region.top), PILImage.Resampling.BICUBIC
        )
    hole = mask[region.top : region.bottom, region.left : region.right]
    result = image.copy()
    result.paste(filled, region.box, PILImage.fromarray(hole * np.uint8(255)))
    return result
