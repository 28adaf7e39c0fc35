"""Inception score (IS) and classification accuracy (CA), from a classifier's probabilities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SPLITS = 10  # as Salimans et al. 2016, "Improved Techniques for Training GANs"


class ClassScore(NamedTuple):
    """Mean and standard deviation over the splits, and the score of all images together."""

    mean: float
    deviation: float
    whole: float
    splits: int


class InceptionScore:
    """exp of the mean Kullback-Leibler divergence of p(y|x) from p(y), streaming and mergeable.

    Image i belongs to split i modulo ``splits``, whatever process sees it and when; splits without
    an image do not count. The score of few images is far too low: it cannot exceed their number.
    """

    def __init__(self, classes: int, splits: int = SPLITS) -> None:
        self.classes, self.splits = classes, splits
        self._sums = torch.zeros(splits, classes, dtype=torch.float64)
        self._information = torch.zeros(splits, dtype=torch.float64)  # sum of p log p
        self._counts = torch.zeros(splits, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Images seen."""
        return int(self._counts.sum())

    def update(self, probabilities: Tensor, indices: Tensor) -> None:
        """Add p(y|x) [N, classes] of the images with numbers ``indices`` [N].

        Raises ValueError for anything but rows of probabilities.
        """
        p = check_probabilities(probabilities, self.classes)
        split = indices.to("cpu", torch.int64) % self.splits
        self._sums.index_add_(0, split, p)
        self._information.index_add_(0, split, torch.special.xlogy(p, p).sum(1))
        self._counts.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))

    def merge(self, other: InceptionScore) -> None:
        """Add all images that ``other`` saw."""
        if (other.classes, other.splits) != (self.classes, self.splits):
            raise ValueError(
                f"other has {other.classes} classes in {other.splits} splits, "
                f"this has {self.classes} in {self.splits}"
            )
        self._sums += other._sums
        self._information += other._information
        self._counts += other._counts

    def compute(self) -> ClassScore:
        """The score. Raises ValueError without images."""
        if not self.count:
            raise ValueError("no images")
        used = self._counts > 0
        scores = _score(self._sums[used], self._information[used], self._counts[used])
        whole = _score(*(t.sum(0, keepdim=True) for t in self._state()))
        return ClassScore(
            float(scores.mean()),
            float(scores.std(correction=0)),
            float(whole),
            int(used.sum()),
        )

    def _state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._sums, self._information, self._counts


def check_probabilities(probabilities: Tensor, classes: int) -> Tensor:
    """Rows [N, classes] that are probabilities, as float64 on the CPU, summing to 1 exactly enough.

    Raises ValueError when they are not.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] != classes:
        raise ValueError(
            f"probabilities must have shape [N, {classes}], got {list(probabilities.shape)}"
        )
    p = probabilities.detach().to("cpu", torch.float64)
    total = p.sum(1, keepdim=True)
    if not bool((p >= 0).all()) or not bool((total - 1).abs().max() < 1e-3):
        raise ValueError("probabilities must not be negative and sum to 1 in each row")
    return p / total


def hits(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1.0 where the label [N] is the likeliest of the classes [N, classes], else 0.0; float64 [N].

    Raises ValueError for a label that is no class.
    """
    classes = probabilities.shape[1]
    labels = labels.to("cpu", torch.int64)
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(f"labels must lie in 0..{classes - 1}, got {int(wrong[0])}")
    return (probabilities.cpu().argmax(1) == labels).to(torch.float64)


def _score(sums: Tensor, information: Tensor, counts: Tensor) -> Tensor:
    """[S] scores from sums of p [S, C], of p log p [S] and counts [S]."""
    mean = sums / counts[:, None]
    divergence = information / counts - torch.special.xlogy(mean, mean).sum(1)
    scores: Tensor = divergence.clamp_min(0).exp()
    return scores
