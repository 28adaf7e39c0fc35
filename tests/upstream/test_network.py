"""The published ``Network``: its numbers, its interface, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palette.upstream import Network

CASES = ("palette_inpainting", "palette_colorization")
UNET: dict[str, Any] = {
    "image_size": 16,
    "in_channel": 6,
    "inner_channel": 32,
    "out_channel": 3,
    "res_blocks": 1,
    "attn_res": [2],
    "channel_mults": [1, 2],
}
SCHEDULES: dict[str, Any] = {
    "train": {"schedule": "linear", "n_timestep": 50, "linear_start": 1e-4, "linear_end": 0.1},
    "test": {"schedule": "linear", "n_timestep": 6, "linear_start": 1e-4, "linear_end": 0.9},
}


def small(**options: Any) -> Network:
    return Network({**UNET, **options}, SCHEDULES, "guided_diffusion")


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_training_equals_the_published_code(case: str, golden: Any, fill_by_name: Any) -> None:
    numbers = golden(case)
    network = Network(**numbers["config"]).eval()
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert list(shapes.items()) == list(numbers["state_shapes"].items())
    fill_by_name(network)
    network.set_loss(F.mse_loss)
    network.set_new_noise_schedule(phase="train")
    assert torch.equal(network.gammas, numbers["train_gammas_table"])

    gammas = numbers["train_gamma"]
    noisy = network.q_sample(numbers["y_0"], gammas[:, :, None, None], numbers["train_noise"])
    assert torch.equal(noisy, numbers["train_y_noisy"])
    loss = network(
        numbers["y_0"],
        numbers["y_cond"],
        numbers.get("mask"),
        numbers["train_noise"],
        gammas=gammas,
    )
    loss.backward()
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    assert loss.item() == pytest.approx(numbers["train_loss"].item(), rel=1e-5)
    assert float(torch.stack(norms).norm()) == pytest.approx(
        float(numbers["train_grad_norm"]), rel=1e-5
    )


@pytest.mark.parametrize("case", CASES)
def test_restoration_equals_the_published_code(case: str, golden: Any, fill_by_name: Any) -> None:
    numbers = golden(case)
    network = Network(**numbers["config"]).eval()
    fill_by_name(network)
    network.set_new_noise_schedule(phase="test")
    for name, table in numbers.items():
        if name.startswith("test_"):
            assert torch.equal(network.get_buffer(name.removeprefix("test_")), table), name

    known: dict[str, Any] = {}
    if "mask" in numbers:
        known = {"y_t": numbers["y_cond"], "y_0": numbers["y_0"], "mask": numbers["mask"]}
    image, frames = network.restoration(
        numbers["y_cond"], **known, sample_num=4, noises=numbers["restore_noise"]
    )
    assert_near(image, numbers["restore_y"])
    assert_near(frames, numbers["restore_frames"])
    if "mask" in numbers:
        outside = numbers["mask"].expand_as(image) == 0
        assert torch.equal(image[outside], numbers["y_0"][outside])


def test_restoration_is_the_loop_of_p_sample() -> None:
    """The same seed of PyTorch gives the image of the step-by-step methods."""
    network = small().eval()
    network.set_new_noise_schedule(phase="test")
    y_cond = torch.randn(2, 3, 16, 16)
    torch.manual_seed(3)
    image, frames = network.restoration(y_cond, sample_num=3)

    torch.manual_seed(3)
    y = torch.randn_like(y_cond)
    wanted = [y]
    for i in reversed(range(6)):
        y = network.p_sample(y, torch.full((2,), i), y_cond=y_cond)
        if i % 2 == 0:
            wanted.append(y)
    assert_near(image, y)
    assert_near(frames, torch.cat(wanted))


def test_restoration_leaves_its_inputs_alone() -> None:
    network = small().eval()
    network.set_new_noise_schedule(phase="test")
    y_cond = torch.randn(1, 3, 16, 16)
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)  # as the published data sets give it
    mask[..., 4:12, 4:12] = 1
    before = y_cond.clone()
    image, frames = network.restoration(y_cond, y_t=y_cond, y_0=y_cond, mask=mask, sample_num=2)
    assert torch.equal(y_cond, before)
    assert torch.equal(frames[:1], before)
    assert torch.equal(image[..., :4, :], before[..., :4, :])


def test_forward_draws_levels_of_the_training_schedule() -> None:
    network = small().eval()
    network.set_loss(F.mse_loss)
    network.set_new_noise_schedule()
    seen = []
    network.denoise_fn.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    y_0 = torch.randn(64, 3, 8, 8)
    network(y_0, torch.randn_like(y_0))
    assert seen[0].shape == (64, 1)
    assert network.gammas[-1] <= seen[0].min() < seen[0].max() <= network.gammas[0]


def test_loads_weights_saved_with_any_schedule() -> None:
    trained = small()
    trained.set_new_noise_schedule(phase="train")
    network = small()
    network.load_state_dict(trained.state_dict())
    network.set_new_noise_schedule(phase="test")
    own = network.gammas.clone()
    network.load_state_dict(trained.state_dict())
    weights_only = {k: v for k, v in trained.state_dict().items() if k.startswith("denoise_fn.")}
    network.load_state_dict(weights_only)
    assert torch.equal(network.gammas, own)
    with pytest.raises(RuntimeError, match=r"denoise_fn\.out\.2\.bias"):
        network.load_state_dict({k: v for k, v in weights_only.items() if k[-10:] != "out.2.bias"})


def test_half_precision_weights_keep_the_schedule_exact() -> None:
    network = small().eval()
    network.set_new_noise_schedule(phase="test")
    y_cond = torch.randn(1, 3, 16, 16)
    noises = torch.randn(6, 1, 3, 16, 16)
    exact, _ = network.restoration(y_cond, sample_num=1, noises=noises)
    half, _ = network.to(torch.bfloat16).restoration(y_cond, sample_num=1, noises=noises)
    assert half.dtype == torch.float32
    assert_near(half, exact, 0.1)


@pytest.mark.parametrize(
    "init_type", ["kaiming", "normal", "xavier", "xavier_uniform", "orthogonal", "none"]
)
def test_init_weights(init_type: str) -> None:
    network = Network(UNET, SCHEDULES, "guided_diffusion", init_type=init_type, gain=0.02)
    network.init_weights()
    for layer in network.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            assert layer.weight.any()  # the zero-initialised outputs are overwritten, as published
            assert layer.bias is None or not layer.bias.any()
        elif isinstance(layer, nn.GroupNorm):
            assert bool((layer.weight == 1).all())
    conv = network.denoise_fn.get_submodule("input_blocks.1.0.in_layers.2")
    fan_in = 32 * 9
    wanted = {"kaiming": (2 / fan_in) ** 0.5, "normal": 0.02, "xavier": 0.02 / fan_in**0.5}
    if init_type in wanted:
        assert conv.weight.std().item() == pytest.approx(wanted[init_type], rel=0.05)


def test_published_attention_factors() -> None:
    def levels(module: str, **options: Any) -> list[str]:
        network = Network({**UNET, **options}, SCHEDULES, module)
        return [line.split(":")[0] for line in network.denoise_fn.attention_layers]

    assert levels("guided_diffusion", attn_res=[16]) == ["middle_block.1"]
    assert levels("guided_diffusion", attn_res=[1, 16])[0] == "input_blocks.1.1"
    assert levels("guided_diffusion", image_size=[17, 40])[0] == "input_blocks.3.1"
    assert levels("sr3", attn_res=8)[0] == "downs.3.attn"
    assert levels("sr3", attn_res=[4]) == ["mid.0.attn"]


def test_the_copy_for_ema_is_independent() -> None:
    network = small()
    network.set_new_noise_schedule(phase="test")
    ema = copy.deepcopy(network)
    ema.set_new_noise_schedule(phase="train")
    assert (network.num_timesteps, ema.num_timesteps) == (6, 50)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"^module_name: 'ddpm'"):
        Network(UNET, SCHEDULES, "ddpm")
    with pytest.raises(ValueError, match=r"^unet\.num_head_channels: unknown"):
        Network({**UNET, "num_head_channels": 8}, SCHEDULES, "sr3")
    with pytest.raises(ValueError, match=r"^unet\.attn_res: missing"):
        Network({k: v for k, v in UNET.items() if k != "attn_res"}, SCHEDULES, "guided_diffusion")
    with pytest.raises(ValueError, match=r"^init_type: 'he'"):
        Network(UNET, SCHEDULES, init_type="he")
    network = small().eval()
    y = torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"^noise schedule: not set"):
        network.restoration(y)
    with pytest.raises(ValueError, match=r"^loss_fn: not set"):
        network(y, y)
    with pytest.raises(ValueError, match=r"^beta_schedule\.debug: missing; there is train, test"):
        network.set_new_noise_schedule(phase="debug")
    network.set_new_noise_schedule(phase="test")
    with pytest.raises(ValueError, match=r"^sample_num: 6"):
        network.restoration(y, sample_num=6)
    with pytest.raises(ValueError, match=r"^y_0: needed with mask"):
        network.restoration(y, mask=torch.ones(1, 1, 16, 16), sample_num=1)
    for count, word in ((5, "fewer"), (7, "more")):
        with pytest.raises(ValueError, match=f"^noises: {word}"):
            network.restoration(y, sample_num=1, noises=torch.randn(count, *y.shape))
