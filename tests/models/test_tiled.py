"""A network in tiles: exact where it can be, and without a seam."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from palette.models.tiled import Tiled


class Pointwise(nn.Module):
    """Looks at one pixel at a time, so that tiles change nothing; counts what it is shown."""

    num_classes = 7

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[int, int]] = []

    def embed(self, gamma: Tensor, label: Tensor | None = None) -> Tensor:
        return gamma[:, None]

    def body(self, x: Tensor, embedding: Tensor) -> Tensor:
        self.shown.append((x.shape[2], x.shape[3]))
        return x[:, :2] * embedding[:, :, None, None]


class Tilewise(Pointwise):
    """Answers with one number for all it sees: the worst case of tiles that disagree."""

    def body(self, x: Tensor, embedding: Tensor) -> Tensor:
        return x[:, :2].mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:])


@pytest.mark.parametrize("size", [(5, 3), (16, 16), (17, 16), (40, 61), (16, 100)])
def test_tiles_cover_everything_once(size: tuple[int, int]) -> None:
    network = Pointwise()
    tiled = Tiled(network, (16, 16))
    x, row = torch.randn(2, 3, *size), tiled.embed(torch.tensor([0.5, 2.0]))
    assert torch.allclose(
        tiled.body(x, row), x[:, :2] * torch.tensor([0.5, 2.0])[:, None, None, None]
    )
    assert set(network.shown) == {(min(size[0], 16), min(size[1], 16))}
    assert tiled.num_classes == 7


def test_tiles_that_disagree_leave_no_seam() -> None:
    x = torch.linspace(-1, 1, 200).expand(1, 3, 32, 200)
    blended = Tiled(Tilewise(), (32, 32)).body(x, torch.ones(1, 1))[0, 0, 0]
    steps = blended.diff().abs()
    apart = 2 * 24 / 199  # between neighbouring tiles, which overlap by 8 pixels
    assert steps.max() < apart / 4
    assert blended[0] < -0.8
    assert blended[-1] > 0.8
