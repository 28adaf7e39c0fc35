"""Kernel Inception distance (KID): the squared maximum mean discrepancy of two sets of features.

Binkowski, Sutherland, Arbel and Gretton 2018, "Demystifying MMD GANs": unbiased, with the kernel
(x.y / D + 1)^3, as the mean over random subsets.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from palette.ops import philox

SUBSETS, SUBSET_SIZE = 100, 1000  # as the published programs have them

_SEED = 0x4B4944


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets; unbiased, so slightly negative values occur."""

    mean: float
    deviation: float
    subsets: int
    subset_size: int


def kernel_distance(
    first: Tensor, second: Tensor, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> KernelDistance:
    """KID of two sets of features [M, D] and [N, D], in float64.

    Subsets have ``subset_size`` rows, or as many as the smaller set, and are drawn without
    replacement, by numbers that depend on M and N alone. Where both sets are as long as a subset
    there is one subset: everything.

    Raises:
        ValueError: fewer than two rows, or different numbers of features.
    """
    _check(first, second)
    size = min(subset_size, len(first), len(second))
    if len(first) == len(second) == size:
        subsets = 1
    values = [
        _discrepancy(_subset(first, size, number, 0), _subset(second, size, number, 1))
        for number in range(subsets)
    ]
    mean = math.fsum(values) / subsets
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / subsets)
    return KernelDistance(mean, deviation, subsets, size)


def subset(length: int, size: int, number: int, side: int) -> Tensor:
    """Places int64 [size], ascending, of subset ``number`` of the first (0) or second (1) set."""
    if size == length:
        return torch.arange(length)
    words = philox.words(torch.tensor([_SEED]), length, step=number, layer=side)[0]
    return torch.argsort(words, stable=True)[:size].sort().values


def _subset(rows: Tensor, size: int, number: int, side: int) -> Tensor:
    return rows[subset(len(rows), size, number, side)].to(torch.float64)


def _discrepancy(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of [N, D] and [N, D]."""
    n = len(x)
    within = 0.0
    for rows in (x, y):
        gram = _kernel(rows, rows)
        within += float(gram.sum() - gram.diagonal().sum()) / (n * (n - 1))
    return within - 2 * float(_kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)


def _check(first: Tensor, second: Tensor) -> None:
    for name, rows in (("first", first), ("second", second)):
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(
                f"{name} must have at least two rows of features, got {list(rows.shape)}"
            )
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"second has {second.shape[1]} features, first has {first.shape[1]}")
