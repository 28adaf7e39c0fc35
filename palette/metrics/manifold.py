"""Precision and recall: how much of one set lies inside the region that the other one covers.

Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models":
the region is the union of balls around each feature vector that reach to its k-th neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS = 3  # k of the paper

_BLOCK = 512  # rows compared with everything at once: 50 MB for 12,000 others
_PART = 1024  # rows in float64 at once
_EQUAL = 1e-12  # squared distances below this part of the squared lengths are rounding
_TIE = 1e-10  # a point on the edge of a ball is inside, to rounding


class PrecisionRecall(NamedTuple):
    """Parts of samples that look real, and of real images that samples can look like, in [0, 1]."""

    precision: float
    recall: float


def precision_recall(
    samples: Tensor, reference: Tensor, *, neighbours: int = NEIGHBOURS
) -> PrecisionRecall:
    """Of features [M, D] of samples and [N, D] of real images, compared in float64.

    Raises:
        ValueError: a set has not more than ``neighbours`` rows, or the numbers of features differ.
    """
    for name, rows in (("samples", samples), ("reference", reference)):
        if rows.ndim != 2 or len(rows) <= neighbours:
            raise ValueError(
                f"{name} must have more than {neighbours} rows of features, got {list(rows.shape)}"
            )
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"samples have {samples.shape[1]} features, reference has {reference.shape[1]}"
        )
    return PrecisionRecall(
        precision=_covered(samples, reference, neighbours),
        recall=_covered(reference, samples, neighbours),
    )


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    """Part of ``points`` that lies in a ball around any of ``centres``."""
    radii = _radii(centres, neighbours)
    inside = sum(
        int((distances <= radii * (1 + _TIE)).any(1).sum())
        for _, distances in _distances(points, centres)
    )
    return inside / len(points)


def _radii(rows: Tensor, neighbours: int) -> Tensor:
    """Squared distance [N] of every row to its ``neighbours``-th nearest other row."""
    found = []
    for start, distances in _distances(rows, rows):
        own = torch.arange(len(distances))
        distances[own, own + start] = torch.inf
        found.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(found)


def _distances(rows: Tensor, others: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Squared distances [block, N] of blocks of rows to all others, and where the block starts."""
    others_squared = _squared_lengths(others)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].to(torch.float64)
        lengths = block.square().sum(1, keepdim=True) + others_squared
        squared = torch.empty_like(lengths)
        for first in range(0, len(others), _PART):
            part = slice(first, first + _PART)
            squared[:, part] = block @ others[part].to(torch.float64).T
        squared.mul_(-2).add_(lengths)
        yield start, squared.masked_fill_(squared < _EQUAL * lengths, 0.0)


def _squared_lengths(rows: Tensor) -> Tensor:
    parts = [part.to(torch.float64).square().sum(1) for part in torch.split(rows, _PART)]
    return torch.cat(parts)
