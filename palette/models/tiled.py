"""A network run on overlapping tiles of an image that is larger than it was trained for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Tiled(nn.Module):
    """Evaluates ``network`` in tiles and blends their predictions into one.

    State and noise of a sampler stay global, so neighbouring tiles agree where they overlap after
    every step, and no seam can grow (Bar-Tal et al. 2023, "MultiDiffusion"). In an overlap each
    tile counts the less the nearer its edge.

    Args:
        network: with ``embed(gamma, ...)`` and ``body(x, embedding)`` as ``unet.UNet`` has them,
            and to reuse deep features ``whole`` and ``shallow`` too.
        tile: height and width of a tile, in pixels; a smaller image is one tile.

    Neighbours overlap by a quarter of a tile or more.
    """

    def __init__(self, network: nn.Module, tile: tuple[int, int]) -> None:
        super().__init__()
        self.network: Any = network
        self.tile = tile

    @property
    def num_classes(self) -> int | None:
        """Classes of the network; also the label that stands for none."""
        classes: int | None = getattr(self.network, "num_classes", None)
        return classes

    def embed(self, gamma: Tensor, *arguments: Tensor | None, **options: Tensor | None) -> Tensor:
        """The network's own."""
        rows: Tensor = self.network.embed(gamma, *arguments, **options)
        return rows

    def body(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Predict from x [N, C, H, W] and embedding [N, E]; [N, out_channels, H, W]."""
        return self._blend(x, [self.network.body(part, embedding) for part in self._tiles(x)])

    def whole(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``body``, and the deep features of every tile."""
        parts = [self.network.whole(part, embedding) for part in self._tiles(x)]
        return self._blend(x, [part for part, _ in parts]), [deep for _, deep in parts]

    def shallow(self, x: Tensor, embedding: Tensor, deep: list[Tensor]) -> Tensor:
        """``body`` with the deep features that ``whole`` returned."""
        tiles = zip(self._tiles(x), deep, strict=True)
        return self._blend(x, [self.network.shallow(part, embedding, own) for part, own in tiles])

    def _tiles(self, x: Tensor) -> Iterator[Tensor]:
        for row in _cuts(x.shape[2], self.tile[0]):
            for column in _cuts(x.shape[3], self.tile[1]):
                yield x[:, :, row, column]

    def _blend(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Predictions for the tiles of x as one of all x; float32 where there are several."""
        if len(parts) == 1:
            return parts[0]
        rows, columns = _cuts(x.shape[2], self.tile[0]), _cuts(x.shape[3], self.tile[1])
        across, along = _weights(rows, x), _weights(columns, x)
        total = parts[0].new_zeros((*parts[0].shape[:2], *x.shape[2:]), dtype=torch.float32)
        for number, part in enumerate(parts):
            i, j = divmod(number, len(columns))
            weight = across[i][:, None] * along[j]
            total[:, :, rows[i], columns[j]] += part.float() * weight
        return total


def _cuts(length: int, tile: int) -> list[slice]:
    """Where the tiles of one side lie."""
    tile = min(tile, length)
    step = max(tile - max(tile // 4, 1), 1)
    count = 1 + -(-(length - tile) // step)
    starts = [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]
    return [slice(start, start + tile) for start in starts]


def _weights(cuts: list[slice], like: Tensor) -> list[Tensor]:
    """The weight of each pixel of each tile of one side; those of a place sum to 1."""
    tile = cuts[0].stop - cuts[0].start
    place = torch.arange(tile, device=like.device, dtype=torch.float32)
    ramp = (torch.minimum(place, tile - 1 - place) + 1) ** 2  # so that a tile begins unnoticed
    total = torch.zeros(cuts[-1].stop, device=like.device)
    for cut in cuts:
        total[cut] += ramp
    return [ramp / total[cut] for cut in cuts]
