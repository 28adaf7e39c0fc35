"""The published code's training loss and reverse process, on the networks it was recorded with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palette.diffusion.objective import loss
from palette.diffusion.sampler import Sampler
from palette.diffusion.schedule import Schedule, published
from palette.models.sr3 import SR3UNet
from palette.models.unet import UNet

FILES = ("palette_inpainting", "palette_colorization")


def make_network(name: str, fill_by_name: Any) -> nn.Module:
    options: dict[str, Any] = {"image_size": 16, "channel_mults": (1, 2), "channels": 32}
    if name == "palette_inpainting":  # attn_res [2] is a downsample factor: the maps of 8 pixels
        network: nn.Module = UNet(
            **options,
            in_channels=6,
            out_channels=3,
            res_blocks=1,
            attention_resolutions=(8,),
            head_channels=16,
            attention_order="legacy",
            embedding="gamma",
        )
    else:
        network = SR3UNet(**options, norm_groups=16, attention_resolutions=(8,), res_blocks=1)
    fill_by_name(nn.ModuleDict({"denoise_fn": network}))
    return network.eval()


def make_schedule(options: dict[str, Any]) -> Schedule:
    ends = (options.get("linear_start", 1e-6), options.get("linear_end", 1e-2))
    return Schedule.from_name(options["schedule"], options["n_timestep"], *ends)


def given(numbers: dict[str, Any]) -> dict[str, Any]:
    """Keywords of the reverse process as the published trainer calls it."""
    draws = list(numbers["restore_noise"])
    if "mask" in numbers:
        start = numbers["y_cond"]
        return {"initial": start, "noises": draws, "known": numbers["y_0"], "mask": numbers["mask"]}
    return {"initial": draws[0], "noises": draws[1:]}


@pytest.mark.parametrize("name", FILES)
def test_training_loss_and_gradient(name: str, golden: Any, fill_by_name: Any) -> None:
    numbers = golden(name)
    network = make_network(name, fill_by_name)
    inputs: list[Tensor] = []
    network.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    batch = {"target": numbers["y_0"], "condition": numbers["y_cond"]}
    if "mask" in numbers:
        batch["mask"] = numbers["mask"]
    result = loss(
        network,
        make_schedule(numbers["config"]["beta_schedule"]["train"]),
        batch,
        None,
        normalise=False,
        noise=numbers["train_noise"],
        gamma=numbers["train_gamma"][:, 0],
    )
    result.total.backward()
    mask = numbers.get("mask", torch.ones(1))
    noisy = mask * numbers["train_y_noisy"] + (1 - mask) * numbers["y_0"]
    assert torch.equal(inputs[0][:, :3], numbers["y_cond"])
    torch.testing.assert_close(inputs[0][:, 3:], noisy, rtol=0, atol=2.4e-7)
    assert result.total.item() == pytest.approx(float(numbers["train_loss"]), rel=1e-5)
    norms = torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None])
    assert norms.norm().item() == pytest.approx(float(numbers["train_grad_norm"]), rel=1e-4)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("batch_size", [None, 1])
def test_reverse_process(name: str, batch_size: int | None, golden: Any, fill_by_name: Any) -> None:
    numbers = golden(name)
    network = make_network(name, fill_by_name)
    schedule = make_schedule(numbers["config"]["beta_schedule"]["test"])
    sampler = Sampler(network, published(schedule), solver="ddpm")
    states: list[Tensor] = []
    result = sampler.sample(
        numbers["y_cond"],
        seeds=[0, 1],
        **given(numbers),
        batch_size=batch_size,
        preview="state",
        on_step=lambda i, state: states.append(state.clone()),
    )
    torch.testing.assert_close(result, numbers["restore_y"], rtol=0, atol=2e-5)
    if batch_size is None:  # the published snapshots: the start, then every third of 12 steps
        snapshots = [given(numbers)["initial"], *states[2::3]]
        torch.testing.assert_close(
            torch.cat(snapshots), numbers["restore_frames"], rtol=0, atol=2e-5
        )


def test_masked_pixels_are_the_known_ones_to_the_bit(golden: Any, fill_by_name: Any) -> None:
    numbers = golden("palette_inpainting")
    network = make_network("palette_inpainting", fill_by_name)
    schedule = make_schedule(numbers["config"]["beta_schedule"]["test"])
    sampler = Sampler(network, published(schedule), solver="ddpm")
    result = sampler.sample(numbers["y_cond"], seeds=[0, 1], **given(numbers))
    known = (numbers["mask"] == 0).expand_as(result)
    assert torch.equal(result[known], numbers["y_0"][known])
