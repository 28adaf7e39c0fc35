"""Deep features used again: which evaluations are whole, in every kind of network and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from palette import ops
from palette.diffusion.sampler import Sampler
from palette.diffusion.schedule import Schedule, spaced
from palette.diffusion.solvers import SOLVERS
from palette.models.packed import pack
from palette.models.sr3 import SR3UNet
from palette.models.tiled import Tiled
from palette.models.unet import UNet

# from gamma = 0.08 on, where an untrained network's rounding is not yet amplified a hundredfold
LEVELS = spaced(Schedule.from_name("linear", 100, 1e-4, 0.05), 7)
# Steps so short that the rounding of a network that learned nothing is not magnified.
CALM = spaced(Schedule.from_name("linear", 100, 1e-4, 0.02), 7)


def make_unet(**options: Any) -> UNet:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "image_size": 8,
        "in_channels": 6,
        "out_channels": 3,
        "channels": 32,
        "channel_mults": (1, 2),
        "res_blocks": 1,
        "attention_resolutions": (),
        "zero_init": False,
    }
    return UNet(**(defaults | options)).eval()


def make_condition(count: int, side: int = 8) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def tiled(network: nn.Module) -> nn.Module:
    return Tiled(network, (8, 8))


@pytest.mark.parametrize("wrap", [lambda network: network, pack, tiled])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channel_mults": (1, 2, 2), "res_blocks": 2, "attention_resolutions": (8, 4)},
        {"channel_mults": (1,)},
        {"resblock_updown": False, "scale_shift": False},
    ],
)
@torch.no_grad()
def test_at_its_own_level_a_shallow_evaluation_is_the_whole_one(
    wrap: Callable[[nn.Module], Any], options: dict[str, Any]
) -> None:
    network, x = wrap(make_unet(**options)), torch.randn(2, 6, 11, 13)
    row, other = network.embed(torch.tensor([0.3, 0.9])), network.embed(torch.tensor([0.2, 0.7]))
    output, deep = network.whole(x, row)
    assert torch.equal(output, network.body(x, row))
    assert torch.equal(network.shallow(x, row, deep), output)
    assert not torch.equal(network.shallow(x, other, deep), network.body(x, other))
    assert not torch.equal(network.shallow(x, other, deep), output)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_the_walk_by_hand_where_each_branch_has_features_of_its_own(guidance: float) -> None:
    network = make_unet(num_classes=4)
    condition, label, null = make_condition(3), torch.tensor([2, 0, 3]), torch.full((3,), 4)
    sampler = Sampler(network, LEVELS, solver="ddim", guidance=guidance, reuse=3)
    result = sampler.sample(condition, seeds=[1, 2, 3], label=label)
    y = ops.noise(torch.tensor([1, 2, 3]), 0, (3, 8, 8))
    deep: dict[str, Tensor] = {}
    for i, (a, b, c1, c2, *_) in enumerate(sampler.table.astype(np.float32).tolist()):
        x, gamma = torch.cat((condition, y), 1), torch.full((3,), LEVELS[i], dtype=torch.float32)
        answers = {}
        for name, labels in (("labelled", label), ("unlabelled", null)):
            row = network.embed(gamma, labels)
            if i in (0, 3, 6):
                answers[name], deep[name] = network.whole(x, row)
            else:
                answers[name] = network.shallow(x, row, deep[name])
        far, near = answers["unlabelled"], answers["labelled"]
        x0 = (a * y + b * (far + guidance * (near - far))).clamp(-1, 1)
        y = c1 * x0 + c2 * y
    torch.testing.assert_close(result, y, rtol=0, atol=1e-4)
    every = Sampler(network, LEVELS, solver="ddim", guidance=guidance)
    assert (every.sample(condition, seeds=[1, 2, 3], label=label) - result).abs().max() > 1e-3


@pytest.mark.parametrize("wrap", [lambda network: network, pack, tiled])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_seed_one_image_and_nothing_left_behind(
    wrap: Callable[[nn.Module], nn.Module], solver: str
) -> None:
    sampler = Sampler(wrap(make_unet()), CALM, solver=solver, reuse=4)  # 7 steps end in between
    condition = make_condition(3, side=12)
    together = sampler.sample(condition, seeds=[4, 5, 6])
    split = sampler.sample(condition, seeds=[4, 5, 6], batch_size=2)
    torch.testing.assert_close(split, together, rtol=0, atol=1e-5)
    for i in range(3):
        alone = sampler.sample(condition[i : i + 1], seeds=[4 + i])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)
    assert torch.equal(sampler.sample(condition, seeds=[4, 5, 6]), together)


@pytest.mark.parametrize(("reuse", "whole"), [(1, 7), (2, 4), (3, 3), (7, 1), (99, 1)])
def test_every_so_many_evaluations_one_is_whole(reuse: int, whole: int) -> None:
    network, calls = make_unet(), {"outer": 0, "middle": 0}

    def count(name: str) -> Callable[..., None]:
        def add(*_: object) -> None:
            calls[name] += 1

        return add

    network.input_blocks[0].register_forward_hook(count("outer"))
    network.middle_block.register_forward_hook(count("middle"))
    Sampler(network, LEVELS, reuse=reuse).sample(make_condition(2), seeds=[1, 2])
    assert calls == {"outer": 7, "middle": whole}


def test_networks_that_cannot_are_refused() -> None:
    sizes = {"channels": 32, "channel_mults": (1, 2), "image_size": 8, "res_blocks": 1}
    sr3 = SR3UNet(in_channels=6, out_channels=3, attention_resolutions=(), **sizes)
    with pytest.raises(ValueError, match="reuse is 3, expected 1: SR3UNet has no deep features"):
        Sampler(sr3, LEVELS, reuse=3)
    with pytest.raises(ValueError, match="reuse is 2, expected 1: Tiled has no deep features"):
        Sampler(Tiled(sr3, (8, 8)), LEVELS, reuse=2)
    Sampler(Tiled(make_unet(), (8, 8)), LEVELS, reuse=2)
    with pytest.raises(ValueError, match="reuse is 2, expected 1: function has no"):
        Sampler(lambda x, gamma: x, LEVELS, reuse=2)
    with pytest.raises(ValueError, match="reuse is 2, expected 1: OptimizedModule has no"):
        Sampler(torch.compile(make_unet(), backend="eager"), LEVELS, reuse=2)
    with pytest.raises(ValueError, match="reuse is 0, expected at least 1"):
        Sampler(make_unet(), LEVELS, reuse=0)
