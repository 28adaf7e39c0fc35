"""Beyond the border of a picture: how far to go on, and in which pieces to get there.

A rectangle is (left, top, right, bottom) in pixels of the picture, whose own is (0, 0, W, H); what
lies outside that is to be painted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

Rectangle = tuple[int, int, int, int]

SIDES = ("left", "right", "top", "bottom", "all")
_FOUR = (math.sqrt(2) - 1) / 2  # on each side, so that half of the result is new, as in training


def beyond(size: tuple[int, int], side: str, by: float | None = None) -> Rectangle:
    """The rectangle that goes on beyond ``side`` of a picture of ``size`` (height, width).

    ``by`` is how far, as share of the picture's height or width, on each side. By default half of
    the result is new, as the paper trains (Saharia et al. 2022, section on uncropping).
    Raises ValueError for an unknown side and a share that is not above 0.
    """
    if side not in SIDES:
        raise ValueError(f"side: found '{side}', wants one of {', '.join(SIDES)}")
    share = by if by is not None else _FOUR if side == "all" else 1.0
    if not share > 0:
        raise ValueError(f"by: found {share}, wants a number above 0")
    height, width = size
    rows, columns = max(round(height * share), 1), max(round(width * share), 1)
    left, top = -columns * (side in ("left", "all")), -rows * (side in ("top", "all"))
    right, bottom = columns * (side in ("right", "all")), rows * (side in ("bottom", "all"))
    return left, top, width + right, height + bottom


def windows(width: int, wanted: int, window: int) -> Iterator[tuple[str, int, int]]:
    """Pieces by which a picture of ``width`` grows to the width ``wanted``, both ways in turn.

    Yields the side, how many known columns there the network should see, and how many new ones it
    is to paint, at most half of ``window``.
    """
    ahead = {"right": (wanted - width + 1) // 2, "left": (wanted - width) // 2}
    while any(ahead.values()):
        for side in ahead:
            new = min(ahead[side], max(window // 2, 1))
            if new:
                yield side, min(window - new, width), new
                ahead[side] -= new
                width += new
