"""AdamW on channels-last weights: right whatever layout its moments came in."""

from __future__ import annotations

import copy

import torch
from torch import nn

from palette.config import Train
from palette.training.optimizer import adam
from palette.training.sharding import load_optimizer


def _weights() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    conv = torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last)
    return {name: nn.Parameter(each) for name, each in (("a", conv), ("b", torch.randn(5, 3)))}


def _gradients(weights: dict[str, nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for weight in weights.values():
        weight.grad = torch.randn_like(weight)


def test_moments_of_another_layout_are_taken_as_numbers() -> None:
    train = Train(lr=0.1, weight_decay=0.01)
    ours, theirs = _weights(), _weights()
    optimizer = adam(ours, train)
    reference = torch.optim.AdamW(list(theirs.values()), lr=0.1, weight_decay=0.01, fused=False)
    _gradients(theirs, 1)
    reference.step()
    state = copy.deepcopy(reference.state_dict())
    for moments in state["state"].values():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = moments[name].contiguous()  # as published states have them
    with torch.no_grad():
        for name in ours:
            ours[name].copy_(theirs[name])
    load_optimizer(optimizer, {**optimizer.state_dict(), "state": state["state"]}, ours)
    for seed in (2, 3):
        for weights, each in ((ours, optimizer), (theirs, reference)):
            _gradients(weights, seed)
            each.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
        assert ours[name].stride() == theirs[name].stride()


def test_a_resumed_run_has_the_options_asked_for() -> None:
    weights = _weights()
    optimizer = adam(weights, Train(weight_decay=0.0, betas=[0.9, 0.999]))
    _gradients(weights, 1)
    optimizer.step()
    again = adam(weights, Train(weight_decay=0.1, betas=[0.8, 0.99]))
    load_optimizer(again, optimizer.state_dict(), weights)
    (group,) = again.param_groups
    assert group["weight_decay"] == 0.1
    assert group["betas"] == (0.8, 0.99)
    for number, moments in optimizer.state_dict()["state"].items():
        assert torch.equal(again.state_dict()["state"][number]["exp_avg"], moments["exp_avg"])
