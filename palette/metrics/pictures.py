"""The one form in which pictures are scored: uint8 [N, 3, H, W]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Images [N, 1 or 3, H, W] in [-1, 1] as uint8 [N, 3, H, W], exactly as they are saved.

    Values outside are clamped, values that are not numbers become black, grey is repeated.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            f"images must be float [N, 1 or 3, H, W] in [-1, 1], got {describe(images)}"
        )
    levels = images.detach().to(torch.float32).add(1.0).mul(127.5)
    pixels = levels.nan_to_num(nan=0.0).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1)


def check_pictures(pictures: Tensor, name: str) -> None:
    """Raise ValueError for anything but uint8 [N, 3, H, W] with N, H, W >= 1."""
    right = pictures.dtype == torch.uint8 and pictures.ndim == 4 and pictures.shape[1] == 3
    if not right or pictures.numel() == 0:
        raise ValueError(
            f"{name} must be uint8 [N, 3, H, W], got {describe(pictures)}; "
            "palette.metrics.pictures.to_uint8 makes them from [-1, 1]"
        )


def check_pairs(first: Tensor, second: Tensor) -> None:
    """Raise ValueError unless both are pictures of the same shape."""
    check_pictures(first, "samples")
    check_pictures(second, "truth")
    if first.shape != second.shape:
        raise ValueError(f"truth has shape {list(second.shape)}, samples have {list(first.shape)}")


def describe(tensor: Tensor) -> str:
    """Type and shape in a few letters."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
