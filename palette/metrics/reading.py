"""Picture files as tensors, a few read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from palette.data import images
from palette.data.masks import load_mask
from palette.data.paths import printable

Size = tuple[int, int]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def prepared(size: Size | None) -> str:
    """What happens to pictures after reading, in words."""
    return "as they are" if size is None else f"central crop, Lanczos to {size[0]}x{size[1]}"


def read_picture(path: str, size: Size | None = None) -> Tensor:
    """uint8 [3, H, W]; with ``size`` (height, width) the central crop, resized.

    Raises UnreadableImage, a ValueError.
    """
    image = images.read(path).convert("RGB")
    if size is not None:
        image = images.resize_crop(image, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_mask(path: str, picture: Tensor, size: Size | None = None) -> Tensor:
    """uint8 [1, H, W], 1 = hole, prepared as the picture [3, H, W] that it belongs to was.

    Raises ValueError when it has not the picture's size.
    """
    mask = load_mask(path)
    if size is not None:
        cropped = images.resize_crop(Image.fromarray(mask * np.uint8(255)), size)
        mask = (np.asarray(cropped) > 127).astype(np.uint8)
    if mask.shape != tuple(picture.shape[1:]):
        found, wanted = (f"{h}x{w}" for h, w in (mask.shape, picture.shape[1:]))
        raise ValueError(f"{printable(path)}: the mask is {found}, its picture {wanted}")
    return torch.from_numpy(mask)[None]


def read_ahead(
    read: Callable[[_Item], _Result], items: Iterable[_Item], *, workers: int = 4, depth: int = 8
) -> Iterator[_Result]:
    """``read`` of every item, in order, with up to ``depth`` of them waiting in memory."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
