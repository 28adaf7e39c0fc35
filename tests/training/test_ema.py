"""The average of the weights, against the formula in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from palette.training.ema import EMA


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(2, 2))
    return layers.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9999])
def test_update_is_the_formula(decay: float) -> None:
    trained = network()
    ema = EMA(trained, decay)
    average = {name: value.double() for name, value in trained.named_parameters()}
    for update in range(30):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.randn_like(parameter))
        now = min(decay, (1 + update) / (10 + update))
        assert ema.decay_now() == now
        ema.update()
        for name, value in trained.named_parameters():
            average[name] = now * average[name] + (1 - now) * value.detach().double()
    assert ema.updates == 30
    for name, value in ema.network.named_parameters():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)


def test_buffers_follow_and_the_copy_stands_alone() -> None:
    trained = network()
    ema = EMA(trained, 0.9)
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    trained[1].running_mean.fill_(5.0)
    weight = trained[0].weight.detach().clone()
    ema.update()
    assert ema.network[1].running_mean.tolist() == [5.0] * 4
    assert torch.equal(trained[0].weight, weight)
    assert trained[0].weight.requires_grad
    assert trained.training


def test_restored_average_goes_on_equally() -> None:
    trained = network()
    first, second = EMA(trained, 0.999), EMA(trained, 0.999)
    for _ in range(3):
        with torch.no_grad():
            trained[0].weight.mul_(1.5)
        first.update()
    second.load(copy.deepcopy(first.network.state_dict()), first.updates)
    with torch.no_grad():
        trained[0].weight.mul_(1.5)
    first.update()
    second.update()
    assert torch.equal(first.network[0].weight, second.network[0].weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load({}, 1)


def test_without_warm_up_as_published() -> None:
    trained = network()
    ema = EMA(trained, 0.9, warmup=False)
    before = [value.clone() for value in ema.network.parameters()]
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    assert ema.decay_now() == 0.9
    ema.update()
    for old, new in zip(before, ema.network.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)
