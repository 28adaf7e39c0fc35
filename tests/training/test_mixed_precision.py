"""Copies of the weights in low precision: the numbers of autocast, gradients in float32."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palette.models.layers import PointwiseConv
from palette.models.subpixel import subpixel_weight
from palette.models.unet import UNet
from palette.training import mixed_precision
from palette.training.mixed_precision import MixedPrecision


def _network(size: int = 16, *, resblock_updown: bool = True, checkpoint: bool = False) -> UNet:
    torch.manual_seed(0)
    network = UNet(
        image_size=size,
        in_channels=6,
        out_channels=3,
        channels=32,
        channel_mults=(1, 2),
        res_blocks=1,
        attention_resolutions=(size // 2,),
        dropout=0.1,
        resblock_updown=resblock_updown,
        checkpoint=checkpoint,
        zero_init=False,
    )
    return network.to(memory_format=torch.channels_last).train()


def _loss(network: nn.Module, size: int = 16) -> Tensor:
    x = torch.linspace(-1, 1, 4 * 6 * size * size).reshape(4, 6, size, size).sin()
    gamma, seeds = torch.linspace(0.1, 0.9, 4), torch.arange(4)
    output: Tensor = network(x, gamma, None, seeds)
    return output.float().square().mean()


def _train(network: nn.Module, weights: list[nn.Parameter], mixed: MixedPrecision | None) -> list:
    """Losses of three steps, and all gradients of the last."""
    optimizer, losses = torch.optim.AdamW(weights, lr=1e-3), []
    for _ in range(3):
        optimizer.zero_grad()
        if mixed is not None:
            mixed.refresh()
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(network)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(weight.grad for weight in weights)]


@pytest.mark.parametrize("options", [{}, {"resblock_updown": False, "checkpoint": True}], ids=str)
def test_training_is_that_of_autocast_in_every_bit(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    # PyTorch's own convolutions everywhere
    monkeypatch.setattr(mixed_precision, "_FEW", 0)
    monkeypatch.setattr(mixed_precision, "enlarging_convs", lambda network: ())
    plain, network = _network(**options), _network(**options)
    mixed = MixedPrecision(network, torch.bfloat16)
    wanted = _train(plain, list(plain.parameters()), None)
    found = _train(mixed.network, list(network.parameters()), mixed)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_parameters_stay_those_of_the_network_given() -> None:
    network = _network()
    mixed = MixedPrecision(network, torch.bfloat16)
    given, called = dict(network.named_parameters()), dict(mixed.network.named_parameters())
    assert given.keys() == called.keys()
    assert all(given[name] is called[name] for name in given)
    assert network.state_dict().keys() == mixed.network.state_dict().keys()
    lowered = (nn.Conv2d, PointwiseConv, nn.Linear)
    assert not any(isinstance(layer, lowered) for layer in mixed.network.modules())
    assert any(isinstance(layer, lowered) for layer in network.modules())
    assert MixedPrecision(network, torch.float32).network is network


def test_copies_are_weights_rounded_once() -> None:
    network = _network()
    mixed = MixedPrecision(network, torch.bfloat16)
    with torch.no_grad():
        for weight in network.parameters():
            weight.mul_(1.003).add_(1e-3)
    stale = [copy.clone() for copy in mixed.copies().values()]
    mixed.refresh()
    layers = [
        layer
        for layer in network.modules()
        if isinstance(layer, (nn.Conv2d, PointwiseConv, nn.Linear))
    ]
    assert len(mixed.copies()) == 2 * (len(layers) - len(mixed._enlarging))
    for weight, copied in mixed.copies().items():
        assert torch.equal(copied, weight.to(torch.bfloat16))
        assert copied.stride() == weight.stride()
    fresh = list(mixed.copies().values())
    assert not all(torch.equal(a, b) for a, b in zip(stale, fresh, strict=True))
    (enlarging,) = mixed._enlarging
    assert torch.equal(enlarging._weight, subpixel_weight(enlarging.weight).to(torch.bfloat16))
    assert torch.equal(enlarging._bias, enlarging.bias.to(torch.bfloat16))


def test_copies_that_somebody_else_has_rounded_are_left_alone_once() -> None:
    network = _network()
    mixed = MixedPrecision(network, torch.bfloat16)
    (weight, copied), *_ = mixed.copies().items()
    with torch.no_grad():
        copied.zero_()
    mixed.rounded()
    mixed.refresh()
    assert not copied.any()
    mixed.refresh()
    assert torch.equal(copied, weight.bfloat16())


def test_gradients_in_half_are_those_before_they_are_widened() -> None:
    found = []
    for half in (False, True):
        network = _network()
        mixed = MixedPrecision(network, torch.bfloat16, half_gradients=half)
        mixed.refresh()
        with torch.autocast("cpu", torch.bfloat16):
            _loss(mixed.network).backward()
        mixed.collect()
        assert all(copied.grad is None for copied in mixed.copies().values())
        assert {weight.grad.dtype for weight in mixed.copies()} == {
            torch.bfloat16 if half else torch.float32
        }
        found.append([weight.grad for weight in network.parameters()])
    for wide, half in zip(*found, strict=True):
        assert torch.equal(wide, half.float())


@pytest.mark.parametrize("updown", [True, False])
def test_enlarging_from_the_small_picture_rounds_no_worse_than_autocast(updown: bool) -> None:
    """Loss and gradients against float32: as near as those of autocast, which rounds as often."""
    network = _network(resblock_updown=updown)
    mixed = MixedPrecision(network, torch.bfloat16)
    assert len(mixed._enlarging) == 1
    mixed.refresh()
    weights = list(network.parameters())
    exact = torch.autograd.grad(_loss(network), weights)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = torch.autograd.grad(_loss(network), weights)
        ours = torch.autograd.grad(_loss(mixed.network), weights)

    def error(found: Sequence[Tensor]) -> float:
        return float(sum((a - b).square().sum() for a, b in zip(found, exact, strict=True))) ** 0.5

    assert error(theirs) > 0
    assert error(ours) < 1.1 * error(theirs)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 16, 3, 3)], ids=str)
def test_gradients_of_a_convolution_on_few_positions(
    shape: tuple[int, ...], padding: int, kernel: int
) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight = torch.randn(4, shape[1], kernel, kernel, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    values = [value.requires_grad_() for value in (x, weight, bias)]
    y = mixed_precision._convolve(*values, (1, 1), (padding, padding))
    assert type(y.grad_fn).__name__ == "_ConvolutionBackward"
    wanted = F.conv2d(*values, 1, padding)
    assert torch.equal(y, wanted)
    grad = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(each, values, grad) for each in (y, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert ours[1].is_contiguous(memory_format=torch.channels_last)


def test_few_positions_round_no_worse() -> None:
    """Against float64 the matrix product is as near as oneDNN is, which also rounds once."""
    torch.manual_seed(2)
    x, grad = (torch.randn(4, 64, 8, 8).bfloat16() for _ in range(2))
    weight = torch.randn(64, 64, 3, 3).bfloat16().requires_grad_()

    def gradient(y: Tensor) -> Tensor:
        return torch.autograd.grad(y, weight, grad.to(y.dtype))[0].double()

    ours = gradient(mixed_precision._convolve(x, weight, None, (1, 1), (1, 1)))
    theirs = gradient(F.conv2d(x, weight, padding=1))
    wide = weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(F.conv2d(x.double(), wide, padding=1), wide, grad.double())[0]
    assert (ours - exact).norm() <= 1.05 * (theirs - exact).norm()


def test_a_part_of_the_weights_and_scaled_float16() -> None:
    """As with ``train.norms_only`` and ``train.precision=float16``."""
    network = _network()
    reference = copy.deepcopy(network)
    frozen = network.input_blocks[0][0].weight.requires_grad_(False)
    mixed = MixedPrecision(network, torch.float16)
    mixed.refresh()
    with torch.autocast("cpu", torch.float16):
        loss = _loss(mixed.network)
    (2.0**10 * loss).backward()
    _loss(reference).backward()
    assert frozen.grad is None
    wanted = dict(reference.named_parameters())
    # A bias before a norm has no gradient but rounding errors, so the measure is the largest one.
    largest = max(weight.grad.norm() for weight in wanted.values())
    for name, weight in network.named_parameters():
        if weight is not frozen:
            assert weight.grad is not None, name
            assert weight.grad.dtype == torch.float32
            error = (weight.grad / 2.0**10 - wanted[name].grad).norm()
            assert error < 0.02 * wanted[name].grad.norm() + 1e-3 * largest, name


def test_dilated_convolutions_are_left_to_autocast() -> None:
    options = {"image_size": 16, "in_channels": 6, "out_channels": 3, "channels": 32}
    options |= {"channel_mults": (1, 2), "res_blocks": 1, "attention_resolutions": (8,)}
    torch.manual_seed(0)
    network = UNet(**options, attention="dilated", zero_init=False)
    assert any(conv.dilation != (1, 1) for conv in _convolutions(network))
    mixed = MixedPrecision(network, torch.bfloat16)
    assert all(conv.dilation != (1, 1) for conv in _convolutions(mixed.network))
    with torch.autocast("cpu", torch.bfloat16):
        _loss(mixed.network).backward()
    assert all(weight.grad is not None for weight in network.parameters())


def _convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
