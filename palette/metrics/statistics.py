"""What a set of images looks like to one feature network: all that FID, KID and recall ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from palette.metrics.frechet import Gaussian
from palette.metrics.kept import KEPT, Kept
from palette.metrics.networks import Identity, check_same

Gather = Callable[[Any], list[Any]]
"""Hands over a value of every process, in the order of ranks, as ``World.gather`` does."""


class FeatureStatistics:
    """Features of a set of images, bounded in memory, mergeable, of one network.

    Args:
        identity: the network; statistics of two networks cannot be merged or compared.
        dim: how many features it has.
        keep: how many images' features are kept whole, for KID, precision and recall.
    """

    def __init__(self, identity: Identity, dim: int, keep: int = KEPT) -> None:
        self.identity = identity
        self.gaussian = Gaussian(dim)
        self.kept = Kept(dim, keep)
        self._seen: set[int] = set()

    @property
    def count(self) -> int:
        """Images seen."""
        return len(self._seen)

    def __contains__(self, index: int) -> bool:
        return index in self._seen

    def update(self, values: Tensor, indices: Tensor) -> None:
        """Add features [N, D] of the images with numbers ``indices`` int64 [N].

        Raises ValueError when an image was added before, or a feature is not finite.
        """
        numbers = indices.tolist()
        if len(numbers) != len(values):
            raise ValueError(f"indices: {len(numbers)} numbers for {len(values)} images")
        self._claim(numbers)
        try:
            self.gaussian.update(values)
        except ValueError as error:
            raise ValueError(f"{self.identity}: {error}") from None
        self.kept.update(values, indices)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the images of ``other``.

        Raises ValueError for another network, or an image that both have seen.
        """
        check_same(self.identity, other.identity)
        self._claim(list(other._seen))
        self.gaussian.merge(other.gaussian)
        self.kept.merge(other.kept)

    def gathered(self, gather: Gather) -> FeatureStatistics:
        """The statistics of all processes together, the same on each.

        Only features that stay in the end travel: the processes first agree on which these are.
        """
        ranks = sorted(rank for part in gather(self.kept.ranks()) for rank in part)
        if len(ranks) > self.kept.limit:
            self.kept.drop_above(ranks[self.kept.limit - 1])
        whole = FeatureStatistics(self.identity, self.gaussian.dim, self.kept.limit)
        for part in gather(self):
            whole.merge(part)
        return whole

    def arrays(self) -> dict[str, Any]:
        """Everything but the identity, as NumPy arrays."""
        return {
            "mean": self.gaussian.mean.numpy(),
            "factor": self.gaussian.factor.numpy(),
            "seen": torch.tensor(sorted(self._seen), dtype=torch.int64).numpy(),
            "kept_indices": self.kept.indices,
            "kept_rows": self.kept.rows.numpy(),
        }

    @classmethod
    def from_arrays(
        cls, identity: Identity, keep: int, arrays: dict[str, Any]
    ) -> FeatureStatistics:
        """The inverse of :meth:`arrays`. Raises ValueError when they do not fit together."""
        mean, factor, rows = (
            torch.from_numpy(arrays[name]) for name in ("mean", "factor", "kept_rows")
        )
        seen, indices = (torch.from_numpy(arrays[name]) for name in ("seen", "kept_indices"))
        dim = len(mean)
        fitting = (
            mean.shape == (dim,)
            and factor.ndim == 2
            and factor.shape[1] == dim
            and seen.ndim == 1
            and rows.shape == (min(len(seen), keep), dim)
            and indices.shape == (len(rows),)
        )
        if not fitting:
            raise ValueError("arrays of statistics do not fit together")
        statistics = cls(identity, dim, keep)
        statistics.gaussian = Gaussian.of(len(seen), mean, factor)
        statistics.kept.update(rows, indices)
        statistics._claim(seen.tolist())
        return statistics

    def _claim(self, numbers: list[int]) -> None:
        new = set(numbers)
        again = new & self._seen
        if again or len(new) != len(numbers):
            raise ValueError(
                f"image {min(again) if again else 'numbers'} would count twice: every image needs "
                "a number of its own, on one process only"
            )
        self._seen |= new
