"""Features that are kept whole, a bounded number: for metrics that compare image with image."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from palette.ops import philox

KEPT = 12_000
"""Default bound: more than the 10,950 images of the paper's largest test set (places10k)."""

_SEED = 0x4B455054  # fixed: which images are kept is a function of their numbers alone

Array = npt.NDArray[np.generic]
Ints = npt.NDArray[np.int64]


class Kept:
    """The features of at most ``limit`` images, always the same ones.

    Every image has a random priority that follows from its number; those with the lowest are kept.
    So the choice depends neither on order nor on batches nor on which process saw an image.
    """

    def __init__(self, dim: int, limit: int = KEPT) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.dim, self.limit = dim, limit
        self._heap: list[tuple[int, int, int]] = []  # -priority, -index, place in _rows
        self._rows: Array = np.empty((0, dim), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def nbytes(self) -> int:
        """Memory held by features."""
        return self._rows.nbytes

    @property
    def indices(self) -> Ints:
        """Numbers of the images kept, ascending."""
        return np.sort(np.array([-index for _, index, _ in self._heap], dtype=np.int64))

    @property
    def rows(self) -> Tensor:
        """[len, D] features in order of image numbers, in the precision they came in."""
        places = {-index: place for _, index, place in self._heap}
        return torch.from_numpy(self._rows[[places[index] for index in sorted(places)]])

    def update(self, rows: Tensor, indices: Tensor) -> None:
        """Offer ``rows`` [N, D] of the images with numbers ``indices`` [N]."""
        values = rows.detach().cpu().numpy()
        for value, index, priority in zip(
            values, indices.tolist(), _priorities(indices).tolist(), strict=True
        ):
            self._offer(value, (-priority, -index))

    def merge(self, other: Kept) -> None:
        """Offer everything that ``other`` kept."""
        if (other.dim, other.limit) != (self.dim, self.limit):
            raise ValueError(
                f"other keeps {other.limit} x {other.dim} features, this {self.limit} x {self.dim}"
            )
        for priority, index, place in sorted(other._heap, reverse=True):
            self._offer(other._rows[place], (priority, index))

    def ranks(self) -> list[tuple[int, int]]:
        """(priority, number) of every image kept; low ones are kept before high ones."""
        return [(-priority, -index) for priority, index, _ in self._heap]

    def drop_above(self, bound: tuple[int, int]) -> None:
        """Forget the images that rank behind ``bound``."""
        staying = [entry for entry in self._heap if (-entry[0], -entry[1]) <= bound]
        self._rows = self._rows[[place for _, _, place in staying]]
        self._heap = [(entry[0], entry[1], place) for place, entry in enumerate(staying)]
        heapq.heapify(self._heap)

    def _offer(self, row: Array, rank: tuple[int, int]) -> None:
        place = len(self._heap)
        if place < self.limit:
            self._make_room(row.dtype)
            heapq.heappush(self._heap, (*rank, place))
        elif rank > self._heap[0][:2]:
            place = self._heap[0][2]
            heapq.heapreplace(self._heap, (*rank, place))
        else:
            return
        self._rows[place] = row

    def _make_room(self, dtype: np.dtype[np.generic]) -> None:
        size = len(self._rows)
        kind = np.promote_types(self._rows.dtype, dtype) if size else dtype
        if len(self._heap) == size or self._rows.dtype != kind:
            wanted = min(max(2 * len(self._heap), 64), self.limit)
            grown = np.empty((max(wanted, size), self.dim), dtype=kind)
            grown[:size] = self._rows
            self._rows = grown


def _priorities(indices: Tensor) -> Tensor:
    """Random numbers int64 [N] in [0, 2^62) of image numbers [N]."""
    index = indices.to("cpu", torch.int64)
    zero = torch.zeros_like(index)
    counter = (index & 0xFFFFFFFF, (index >> 32) & 0xFFFFFFFF, zero, zero)
    high, low, _, _ = philox.philox4x32(counter, (zero + _SEED, zero))
    return ((high >> 2) << 32) | low
