"""Numbers of single images, kept by the image's number: for means that any order leaves alike."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class PerImage:
    """Columns of one number per image. Means are correctly rounded sums: the same to the last bit.

    Memory: about 100 bytes a number.
    """

    def __init__(self) -> None:
        self._columns: dict[str, dict[int, float]] = {}

    def add(self, column: str, indices: Iterable[int] | Tensor, values: Tensor) -> None:
        """Note ``values`` [N] of the images ``indices`` [N].

        Raises ValueError when an image has a value already: it would count twice.
        """
        numbers = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        self._note(column, zip(numbers, values.to(torch.float64).tolist(), strict=True))

    def merge(self, other: PerImage) -> None:
        """Add all that ``other`` has."""
        for column, values in other._columns.items():
            self._note(column, values.items())

    def __contains__(self, column: str) -> bool:
        return column in self._columns

    def column(self, column: str) -> dict[int, float]:
        """Image number to value, ascending; empty when nothing was noted."""
        return dict(sorted(self._columns.get(column, {}).items()))

    def count(self, column: str) -> int:
        """How many images have a value."""
        return len(self._columns.get(column, {}))

    def sum(self, column: str) -> float:
        """Correctly rounded sum."""
        return math.fsum(self._columns[column].values())

    def mean(self, column: str) -> float:
        """Correctly rounded sum by the number of images."""
        return self.sum(column) / len(self._columns[column])

    def deviation(self, column: str) -> float:
        """Standard deviation over the images (of the population); NaN where a value is infinite."""
        mean = self.mean(column)
        if not math.isfinite(mean):
            return math.nan
        values = self._columns[column].values()
        return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))

    def _note(self, column: str, pairs: Iterable[tuple[int, float]]) -> None:
        known = self._columns.setdefault(column, {})
        for number, value in pairs:
            if number in known:
                raise ValueError(f"image {number} was scored twice ({column})")
            known[number] = value
