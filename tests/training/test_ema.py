"""The average of the weights, against the formula in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from palette.config import Train
from palette.training.ema import EMA, Further, Mean


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


def test_the_equal_mean_is_the_mean_of_the_weights_it_saw() -> None:
    trained = network()
    mean = Mean(trained)
    seen = []
    for _ in range(7):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.randn_like(parameter))
        mean.update()
        seen.append([parameter.detach().double() for parameter in trained.parameters()])
    for average, values in zip(mean.network.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(average.double(), sum(values) / 7, rtol=1e-5, atol=1e-6)


def test_further_averages_begin_when_they_should_and_are_restored() -> None:
    trained = network()
    options = Train(ema_decays=[0.5, 0.999], swa_start=2)
    further = Further(trained, options)
    assert set(further.states()) == {"0.5", "0.999"}
    for step in range(4):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(1)
        further.update(step)
        assert set(further.states()) == {"0.5", "0.999", *(("swa",) if step >= 2 else ())}
    assert further.updates() == {"0.5": 4, "0.999": 4, "swa": 2}
    swa = further.states()["swa"]["0.weight"]
    torch.testing.assert_close(swa, trained.state_dict()["0.weight"] - 0.5)
    again = Further(network(), Train(ema_decays=[0.5, 0.9], swa_start=2))
    again.load(further.states(), further.updates(), trained.state_dict())
    assert again.updates() == {"0.5": 4, "0.9": 0, "swa": 2}
    assert torch.equal(again.states()["swa"]["0.weight"], swa)
    assert torch.equal(again.states()["0.9"]["0.weight"], trained.state_dict()["0.weight"])


def test_an_average_that_has_not_begun_is_restored_too() -> None:
    """Killed between the start and its first update, it still holds the weights of the start."""
    trained, options = network(), Train(ema_decays=[0.9], ema_warmup=False)
    further = Further(trained, options)
    first = trained.state_dict()["0.weight"].clone()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    again = Further(network(), options)
    again.load(further.states(), further.updates(), trained.state_dict())
    assert torch.equal(again.states()["0.9"]["0.weight"], first)


def test_decays_near_to_one_have_names_of_their_own() -> None:
    decays = [0.9999, 0.9999999, 0.99999999]
    further = Further(network(), Train(ema_decays=decays))
    further.update(0)
    assert list(further.states()) == ["0.9999", "0.9999999", "0.99999999"]
