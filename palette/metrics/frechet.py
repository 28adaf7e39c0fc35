"""The Frechet distance between two Gaussians fitted to features (FID), streaming and mergeable.

Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
Equilibrium". Covariances are with n - 1, as in all the published programs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Gaussian:
    """Mean and covariance of rows of features, in float64 and in bounded memory.

    What is kept is not the covariance but a factor of it: F [k, D], k <= D, whose F^T F is the sum
    of (x - mean)(x - mean)^T. Rows wait until there are D of them (256 at least), then a QR
    decomposition folds them in. A factor has the square root of the covariance's condition
    number, so the distance is right to rounding where eigenvalues of a covariance would be noise:
    with fewer rows than features, with features that never vary, with equal images. Order and
    merging change the last digits only, the size of batches nothing at all.

    Memory: three matrices D x D, 100 MB for 2048 features, and twice as much again while folding.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self._capacity = max(dim, 256)
        self._folded = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._factor = torch.zeros(0, dim, dtype=torch.float64)
        self._waiting: list[Tensor] = []

    @property
    def count(self) -> int:
        """Rows seen."""
        return self._folded + sum(len(rows) for rows in self._waiting)

    @property
    def mean(self) -> Tensor:
        """[D] float64."""
        self._fold()
        return self._mean

    @property
    def factor(self) -> Tensor:
        """[k, D] float64 with factor^T factor / (count - 1) the covariance."""
        self._fold()
        return self._factor

    @property
    def trace(self) -> float:
        """Of the covariance; 0 for a single row."""
        return float(self.factor.square().sum()) / max(self.count - 1, 1)

    @property
    def nbytes(self) -> int:
        """Memory held."""
        held = (self._mean, self._factor, *self._waiting)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def update(self, rows: Tensor) -> None:
        """Add ``rows`` [N, D]. Raises ValueError for another shape or values that are not finite.

        A row that is not finite would silently make every later result so.
        """
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"rows must have shape [N, {self.dim}], got {list(rows.shape)}")
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("rows: features that are not finite")
        while len(rows):
            room = self._capacity - sum(len(part) for part in self._waiting)
            part, rows = rows[:room], rows[room:]
            self._waiting.append(part.detach().to("cpu", torch.float64, copy=True))
            if len(part) == room:
                self._fold()

    def merge(self, other: Gaussian) -> None:
        """Add all rows that ``other`` saw; ``other`` keeps what it has."""
        if other.dim != self.dim:
            raise ValueError(f"other has {other.dim} features, this has {self.dim}")
        self._fold()
        self._add(other.count, other.mean, other.factor)

    @classmethod
    def of(cls, count: int, mean: Tensor, factor: Tensor) -> Gaussian:
        """From what another one's properties said."""
        gaussian = cls(len(mean))
        gaussian._add(count, mean.to(torch.float64), factor.to(torch.float64))
        return gaussian

    def _fold(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat(self._waiting)
        self._waiting.clear()
        mean = rows.mean(0)
        self._add(len(rows), mean, rows.sub_(mean))

    def _add(self, count: int, mean: Tensor, factor: Tensor) -> None:
        """Chan, Golub and LeVeque's pairwise update, on factors: one more row links the means."""
        if count == 0:
            return
        total = self._folded + count
        apart = mean - self._mean
        link = math.sqrt(self._folded / total * count) * apart
        stacked = torch.cat([self._factor, factor, link[None]]) if self._folded else factor
        if len(stacked) > self.dim:
            stacked = torch.linalg.qr(stacked, mode="r")[1]
        self._factor = stacked
        self._mean = self._mean + apart * (count / total)
        self._folded = total


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians; FID when the features are Inception's.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2). The last trace is the sum of the singular
    values of F1 F2^T, with F the covariances' factors: no matrix square root of a nearly singular
    product is taken. One image has covariance 0. Never negative.

    Raises:
        ValueError: a set is empty, or they have different numbers of features.
    """
    if first.dim != second.dim:
        raise ValueError(f"second has {second.dim} features, first has {first.dim}")
    for name, gaussian in (("first", first), ("second", second)):
        if gaussian.count == 0:
            raise ValueError(f"{name}: no images")
    product = first.factor @ second.factor.T
    scale = math.sqrt(max(first.count - 1, 1)) * math.sqrt(max(second.count - 1, 1))
    common = float(torch.linalg.svdvals(product).sum()) / scale
    apart = float((first.mean - second.mean).square().sum())
    return max(apart + first.trace + second.trace - 2 * common, 0.0)
