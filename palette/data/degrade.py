"""What restoration undoes: JPEG compression and the loss of resolution, on tensors in [-1, 1]."""

from __future__ import annotations

import io
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from palette.data import images
from palette.data.order import Draws

WORST, BEST, _DECAY = 5, 30, 10.0  # JPEG qualities of the paper, and how fast they become rare


def paper_quality(draws: Draws) -> int:
    """A JPEG quality q in 5..30 with probability in proportion to exp(-q / 10).

    So the paper trains (Saharia et al. 2022, appendix on JPEG restoration): mostly the worst.
    """
    weights = [math.exp(-quality / _DECAY) for quality in range(WORST, BEST + 1)]
    left = draws.real() * sum(weights)
    for quality, weight in enumerate(weights, WORST):
        left -= weight
        if left < 0:
            return quality
    return BEST


def jpeg(image: Tensor, quality: int) -> Tensor:
    """The picture [C, H, W] as a JPEG file of ``quality`` (1 to 100) holds it.

    One and three channels are one file (colour at half the resolution, as files have it), any
    other number is a grey file a channel.
    """
    if image.shape[0] not in (1, 3):
        return torch.cat([jpeg(channel[None], quality) for channel in image])
    file = io.BytesIO()
    images.to_image(image).save(file, format="JPEG", quality=quality)
    with Image.open(file, formats=["JPEG"]) as decoded:
        return images.to_tensor(decoded, image.shape[0]).to(image)


def lower(image: Tensor, factor: float) -> Tensor:
    """The picture [C, H, W] at 1/factor of its size: bicubic, antialiased, in 256 levels."""
    size = [max(round(side / factor), 1) for side in image.shape[1:]]
    small = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    return small.add(1).mul(127.5).round().div(127.5).sub(1).clamp(-1, 1)


def enlarge(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The picture [C, H, W] at a larger size (height, width), bicubic: what a network refines."""
    # Antialiasing changes nothing when enlarging, but its kernel is the one that `lower` has.
    return F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)


def blur_with_noise(image: Tensor, noise: Tensor, share: float) -> Tensor:
    """A picture of which ``share`` (in [0, 1), of the variance) is noise; see ``tasks.upscale``."""
    return math.sqrt(1.0 - share) * image + math.sqrt(share) * noise
