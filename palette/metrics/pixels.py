"""Differences of pixels: PSNR and mean absolute error, from sums of integers that are exact."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from palette.metrics.pictures import check_pairs, describe


class Errors(NamedTuple):
    """Sums over each image of a batch, float64 [N], every one an exact integer."""

    squared: Tensor  # over all pixels and channels, in levels of 255
    absolute_hole: Tensor  # where the mask is 1
    absolute_known: Tensor  # where it is 0
    values_hole: Tensor  # pixels times channels
    values_known: Tensor


def errors(samples: Tensor, truth: Tensor, mask: Tensor | None = None) -> Errors:
    """Compare uint8 [N, 3, H, W] with uint8 [N, 3, H, W].

    ``mask`` [N, 1, H, W], 1 = hole; without it everything counts as hole.
    Raises ValueError for other shapes or mask values.
    """
    check_pairs(samples, truth)
    hole = torch.ones_like(samples[:, :1]) if mask is None else _checked(mask, samples)
    difference = samples.to(torch.int64) - truth.to(torch.int64)
    absolute = difference.abs().sum(1, keepdim=True)
    inside = hole.to(torch.int64)
    channels, area = samples.shape[1], samples[0, 0].numel()
    pixels = _per_image(inside)
    absolute_hole = _per_image(absolute * inside)
    return Errors(
        squared=_per_image(difference.square()),
        absolute_hole=absolute_hole,
        absolute_known=_per_image(absolute) - absolute_hole,
        values_hole=pixels * channels,
        values_known=(area - pixels) * channels,
    )


def psnr(squared: float, values: int) -> float:
    """Peak signal-to-noise ratio in dB from a sum of squared errors; infinite for equal images."""
    return 10 * math.log10(255**2 * values / squared) if squared else math.inf


def _checked(mask: Tensor, samples: Tensor) -> Tensor:
    wanted = [len(samples), 1, *samples.shape[2:]]
    if list(mask.shape) != wanted:
        raise ValueError(f"mask must have shape {wanted}, got {describe(mask)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("mask must be 1 in the hole and 0 elsewhere, found other values")
    return mask.to(samples.device)


def _per_image(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1).to("cpu", torch.float64)
