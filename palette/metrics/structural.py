"""Structural similarity (SSIM) and its multi-scale form (MS-SSIM), in float64.

Wang, Bovik, Sheikh and Simoncelli 2004, "Image Quality Assessment: From Error Visibility to
Structural Similarity"; Wang, Simoncelli and Bovik 2003, "Multi-scale structural similarity for
image quality assessment". Gaussian window of 11 pixels, standard deviation 1.5, population
covariances, only where the window lies inside the image; channels are averaged. Every image is
computed alone, so batches do not change its score.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from palette.metrics.pictures import check_pairs

WINDOW = 11

_SIGMA = 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ssim(samples: Tensor, truth: Tensor) -> Tensor:
    """SSIM [N] float64 of uint8 [N, 3, H, W] with uint8 [N, 3, H, W], in [-1, 1].

    Raises ValueError for images with a side below 11 pixels.
    """
    check_pairs(samples, truth)
    check_window(samples)
    return torch.stack(
        [
            _similarity(x.to(torch.float64), y.to(torch.float64))[0].mean()
            for x, y in zip(samples, truth, strict=True)
        ]
    ).cpu()


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """MS-SSIM [N] float64 of uint8 [N, 3, H, W] with uint8 [N, 3, H, W], in [0, 1].

    Five scales, each half of the one before, as TensorFlow computes them (negative contrast terms
    count as 0, odd sides repeat their last pixel). Images with a side of less than 161 pixels have
    as many scales as fit (:func:`scales`), with their weights scaled to the sum 1.
    Raises ValueError for images with a side below 11 pixels.
    """
    check_pairs(first, second)
    check_window(first)
    weights = _weights(scales(first.shape[2], first.shape[3]))
    return torch.stack(
        [
            _multi_scale(x.to(torch.float64), y.to(torch.float64), weights).mean()
            for x, y in zip(first, second, strict=True)
        ]
    ).cpu()


def scales(height: int, width: int) -> int:
    """How many scales of MS-SSIM an image has room for: 5 from 161 pixels on."""
    side, count = min(height, width), 0
    while side >= WINDOW and count < len(_SCALE_WEIGHTS):
        side, count = (side + 1) // 2, count + 1
    return count


def check_window(pictures: Tensor) -> None:
    """Raise ValueError when the window does not fit into the pictures [N, C, H, W]."""
    if min(pictures.shape[2:]) < WINDOW:
        height, width = pictures.shape[2:]
        raise ValueError(f"SSIM wants images of at least {WINDOW}x{WINDOW}, got {height}x{width}")


def _weights(count: int) -> list[float]:
    """As published, where they sum to 1.0001; of fewer scales they sum to 1."""
    used = _SCALE_WEIGHTS[:count]
    total = 1.0 if count == len(_SCALE_WEIGHTS) else math.fsum(used)
    return [weight / total for weight in used]


def _multi_scale(x: Tensor, y: Tensor, weights: list[float]) -> Tensor:
    """[C] from [C, H, W]."""
    result = torch.ones(len(x), dtype=torch.float64, device=x.device)
    for number, weight in enumerate(weights, 1):
        whole, contrast = _similarity(x, y)
        term = whole if number == len(weights) else contrast
        result *= term.clamp_min(0) ** weight
        x, y = _halved(x), _halved(y)
    return result


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Means [C] of SSIM and of its contrast-structure factor over the image [C, H, W]."""
    moments = _blur(torch.stack((x, y, x * x, y * y, x * y)))
    mean_x, mean_y, xx, yy, xy = moments.unbind()
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    contrast = (2 * (xy - product) + _C2) / (xx + yy - squares + _C2)
    whole = (2 * product + _C1) / (squares + _C1) * contrast
    return whole.mean((-2, -1)), contrast.mean((-2, -1))


def _blur(planes: Tensor) -> Tensor:
    """Gaussian mean where the window fits; sums of shifted views: ten times as fast as conv2d."""
    taps = _taps()
    for dim in (-1, -2):
        length = planes.shape[dim] - WINDOW + 1
        blurred = planes.narrow(dim, 0, length) * taps[0]
        for place, tap in enumerate(taps[1:], 1):
            blurred.add_(planes.narrow(dim, place, length), alpha=tap)
        planes = blurred
    return planes


def _taps() -> list[float]:
    half = WINDOW // 2
    heights = [math.exp(-0.5 * (x / _SIGMA) ** 2) for x in range(-half, half + 1)]
    return [height / math.fsum(heights) for height in heights]


def _halved(planes: Tensor) -> Tensor:
    """Means of 2x2 pixels of [C, H, W]; an odd side repeats its last row or column."""
    height, width = planes.shape[-2:]
    return F.avg_pool2d(F.pad(planes, (0, width % 2, 0, height % 2), mode="replicate"), 2)
