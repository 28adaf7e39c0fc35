"""A network run on overlapping tiles of an image that is larger than it was trained for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Tiled(nn.Module):
    """Evaluates ``network`` in tiles and blends their predictions into one.

    State and noise of a sampler stay global, so neighbouring tiles agree where they overlap after
    every step, and no seam can grow (Bar-Tal et al. 2023, "MultiDiffusion"). In an overlap each
    tile counts the less the nearer its edge.

    Args:
        network: with ``embed(gamma, ...)`` and ``body(x, embedding)`` as ``unet.UNet`` has them.
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
        rows, row_weights = _cuts(x.shape[2], self.tile[0], x)
        columns, column_weights = _cuts(x.shape[3], self.tile[1], x)
        if len(rows) * len(columns) == 1:
            whole: Tensor = self.network.body(x, embedding)
            return whole
        total: Tensor | None = None
        for row, across in zip(rows, row_weights, strict=True):
            for column, along in zip(columns, column_weights, strict=True):
                part: Tensor = self.network.body(x[:, :, row, column], embedding).float()
                if total is None:
                    total = part.new_zeros(*part.shape[:2], *x.shape[2:])
                total[:, :, row, column] += part * (across[:, None] * along)
        assert total is not None
        return total


def _cuts(length: int, tile: int, like: Tensor) -> tuple[list[slice], list[Tensor]]:
    """Where the tiles of one side lie, and the weight of each of their pixels; weights sum to 1."""
    tile = min(tile, length)
    step = max(tile - max(tile // 4, 1), 1)
    count = 1 + -(-(length - tile) // step)
    starts = [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]
    place = torch.arange(tile, device=like.device, dtype=torch.float32)
    ramp = (torch.minimum(place, tile - 1 - place) + 1) ** 2  # so that a tile begins unnoticed
    slices = [slice(start, start + tile) for start in starts]
    total = torch.zeros(length, device=like.device)
    for piece in slices:
        total[piece] += ramp
    return slices, [ramp / total[piece] for piece in slices]
