"""What the networks have in common: padding, dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from palette.models.layers import (
    Dropout,
    number_dropouts,
    pad_by_reflection,
)
from palette.ops.philox import DROPOUT, uniform


def test_padding_reflects_without_repeating_the_border() -> None:
    x = torch.arange(15.0).reshape(1, 1, 3, 5)
    padded = pad_by_reflection(x, 4)
    assert torch.equal(padded, torch.nn.functional.pad(x, (0, 3, 0, 1), mode="reflect"))
    assert pad_by_reflection(padded, 4) is padded


def test_padding_further_than_the_image_is_wide() -> None:
    row = pad_by_reflection(torch.tensor([0.0, 1.0, 2.0]).reshape(1, 1, 1, 3), 8)
    assert row[0, 0, 0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert torch.equal(row[0, 0, 7], row[0, 0, 0])


def test_dropout_mask_is_the_documented_one() -> None:
    layers = nn.ModuleList([Dropout(0.25), Dropout(0.25)])
    number_dropouts(layers)
    x = torch.ones(2, 3, 4, 5)
    seeds = torch.tensor([3, 2**62 + 1])
    draws = uniform(seeds, (3, 4, 5), stream=DROPOUT, layer=1)
    wanted = (draws >= 0.25) / 0.75
    assert torch.allclose(layers[1](x, seeds), wanted)
    assert not torch.equal(layers[0](x, seeds), layers[1](x, seeds))


def test_dropout_rests_in_evaluation() -> None:
    layer = Dropout(0.5).eval()
    x = torch.ones(1, 1, 2, 2)
    assert layer(x, torch.tensor([1])) is x
    with pytest.raises(ValueError, match=r"^dropout: 1\.5"):
        Dropout(1.5)
