"""Enlarging convolutions computed from the small picture, against the large one in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from palette.models.subpixel import (
    enlarging_convs,
    interleave,
    interleave_gradient,
    subpixel_weight,
    subpixel_weight_gradient,
)
from palette.models.unet import UNet


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (5, 7)], ids=str)
def test_values_and_gradients_are_those_of_the_large_picture(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    large = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    grad = torch.randn_like(large)
    dx, dweight = torch.autograd.grad(large, (x, weight), grad)

    four_weight = subpixel_weight(weight.detach()).requires_grad_()
    assert four_weight.is_contiguous(memory_format=torch.channels_last)
    four = F.conv2d(x, four_weight, padding=1)
    torch.testing.assert_close(interleave(four), large, rtol=0, atol=2e-5)
    ours = torch.autograd.grad(four, (x, four_weight), interleave_gradient(grad))
    torch.testing.assert_close(ours[0], dx, rtol=0, atol=2e-5)
    torch.testing.assert_close(subpixel_weight_gradient(ours[1]), dweight, rtol=0, atol=5e-5)


def test_both_are_adjoint_to_their_gradients() -> None:
    torch.manual_seed(1)
    weight, four = torch.randn(4, 3, 3, 3).double(), torch.randn(16, 3, 2, 2).double()
    ahead = (subpixel_weight(weight).double() * four).sum()
    back = (weight * subpixel_weight_gradient(four).double()).sum()
    assert ahead.item() == pytest.approx(back.item(), rel=1e-5)
    grid, large = torch.randn(2, 16, 4, 6), torch.randn(2, 4, 6, 10)
    ahead, back = (interleave(grid) * large).sum(), (grid * interleave_gradient(large)).sum()
    assert ahead.item() == pytest.approx(back.item(), rel=1e-5)


def test_sums_are_rounded_once() -> None:
    torch.manual_seed(2)
    weight = torch.randn(8, 4, 3, 3)
    low = torch.empty_like(subpixel_weight(weight), dtype=torch.bfloat16)
    assert subpixel_weight(weight, out=low) is low
    assert torch.equal(low, subpixel_weight(weight).bfloat16())
    grad = torch.randn(32, 4, 2, 2).bfloat16()
    exact = subpixel_weight_gradient(grad.double())
    torch.testing.assert_close(subpixel_weight_gradient(grad), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("updown", [True, False])
def test_a_network_has_one_where_it_enlarges(updown: bool) -> None:
    network = UNet(
        image_size=16,
        in_channels=6,
        out_channels=3,
        channels=32,
        channel_mults=(1, 2, 2),
        res_blocks=1,
        attention_resolutions=(),
        resblock_updown=updown,
    )
    found = list(enlarging_convs(network))
    assert len(found) == 2
    for parent, name, conv in found:
        assert getattr(parent, name) is conv
        assert isinstance(conv, nn.Conv2d)


def test_dilated_convolutions_stay_as_they_are() -> None:
    network = UNet(
        image_size=16,
        in_channels=6,
        out_channels=3,
        channels=32,
        channel_mults=(1, 2),
        res_blocks=1,
        attention_resolutions=(),
    )
    ((_, _, conv),) = enlarging_convs(network)
    conv.dilation = (2, 2)
    assert not list(enlarging_convs(network))
