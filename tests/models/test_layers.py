"""What the networks have in common: noise levels, padding, dropout."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from palette.models.layers import (
    Dropout,
    noise_level,
    number_dropouts,
    pad_by_reflection,
    sinusoids,
)
from palette.ops.philox import DROPOUT, uniform


def test_log_snr_tells_apart_levels_that_gamma_does_not() -> None:
    """Neighbouring levels of training lie 0.1 or more apart; published ones hardly differ."""
    gamma = torch.tensor([4.4e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 0.999, 0.999999])

    def smallest_step(embedding: str) -> float:
        vectors = torch.cat(sinusoids(noise_level(gamma, embedding), 64), dim=1)
        return float((vectors[1:] - vectors[:-1]).norm(dim=1).min())

    assert smallest_step("gamma") < 1e-3
    assert smallest_step("log_snr") > 1


def test_log_snr_is_finite_and_within_the_range_of_the_sinusoids() -> None:
    level = noise_level(torch.tensor([0.0, 1e-30, 0.5, 1.0]), "log_snr")
    assert level.tolist() == [1000.0, 1000.0, 500.0, 0.0]


def test_published_levels_are_gamma_itself() -> None:
    gamma = torch.tensor([0.25, 1.0])
    assert torch.equal(noise_level(gamma, "gamma"), gamma)
    assert noise_level(gamma, "sqrt_gamma").tolist() == [0.5, 1.0]
    cosines, sines = sinusoids(gamma, 4)  # frequencies 1 and 1/100
    assert torch.allclose(cosines, torch.cos(gamma[:, None] * torch.tensor([1.0, 0.01])))
    assert torch.allclose(sines, torch.sin(gamma[:, None] * torch.tensor([1.0, 0.01])))


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
