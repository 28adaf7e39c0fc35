"""Weights of other programs: recognised, renamed, and every misfit named."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palette.models.sr3 import SR3UNet
from palette.models.unet import UNet
from palette.upstream import (
    Network,
    convert_state_dict,
    convert_training_state,
    recognise,
)

UNET: dict[str, Any] = {
    "image_size": 16,
    "in_channel": 6,
    "inner_channel": 32,
    "out_channel": 3,
    "res_blocks": 1,
    "attn_res": [2],
    "channel_mults": [1, 2],
}
SCHEDULES = {"train": {"schedule": "linear", "n_timestep": 20}}


def network(module: str = "guided_diffusion") -> Network:
    return Network(UNET, SCHEDULES, module)


@pytest.fixture
def saved() -> dict[str, Tensor]:
    """A published checkpoint of the small network."""
    trained = network()
    trained.init_weights()
    trained.set_new_noise_schedule(phase="train")
    return dict(trained.state_dict())


def guided(classes: int | None = None, variance: bool = True) -> dict[str, Tensor]:
    """A guided-diffusion checkpoint: its names, 3 input channels, learned variance, labels."""
    unet = UNet(
        image_size=16,
        in_channels=3,
        out_channels=6 if variance else 3,
        channels=32,
        channel_mults=(1, 2),
        res_blocks=1,
        attention_resolutions=(8,),
        zero_init=False,
    )
    state = {k.replace("cond_embed", "time_embed"): v for k, v in unet.state_dict().items()}
    if classes is not None:
        state["label_emb.weight"] = torch.randn(classes, 128)
    return state


def palette_unet(**options: Any) -> UNet:
    return UNet(
        image_size=16,
        in_channels=6,
        out_channels=3,
        channels=32,
        channel_mults=(1, 2),
        res_blocks=1,
        attention_resolutions=(8,),
        **options,
    )


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("ema", [False, True])
def test_published_checkpoints(saved: dict[str, Tensor], prefix: str, ema: bool) -> None:
    state = {prefix + k: v for k, v in saved.items() if not ema or k.startswith("denoise_fn.")}
    target = network().denoise_fn
    converted = convert_state_dict(state, target.state_dict())
    assert (converted.format, converted.embedding) == ("palette", "gamma")
    assert len(converted.dropped) == (0 if ema else 6)
    assert not converted.changes
    target.load_state_dict(converted.weights)
    weights = target.state_dict()
    assert all(torch.equal(v, saved[f"denoise_fn.{k}"]) for k, v in weights.items())


def test_published_checkpoint_of_the_full_shape(published_shapes: Any) -> None:
    """0 missing and 0 unexpected among the 326 tensors of the published network."""
    lines = published_shapes("state_dict_published_256")
    state: dict[str, Any] = {f"denoise_fn.{k}": torch.zeros(()).expand(s) for k, s in lines}
    state |= {name: torch.zeros(2000) for name in ("gammas", "sqrt_recip_gammas")}
    with torch.device("meta"):
        unet = Network(
            {**UNET, "inner_channel": 64, "res_blocks": 2, "channel_mults": [1, 2, 4, 8]}
            | {"attn_res": [16], "num_head_channels": 32, "image_size": 256},
            SCHEDULES,
            "guided_diffusion",
        ).denoise_fn
    converted = convert_state_dict(state, unet.state_dict())
    assert [(k, tuple(v.shape)) for k, v in converted.weights.items()] == lines


def test_sr3_repository() -> None:
    trained = network("sr3")
    state = dict(trained.state_dict()) | {
        name: torch.zeros(20) for name in ("betas", "alphas_cumprod", "posterior_variance")
    }
    target = SR3UNet(image_size=16, channel_mults=(1, 2), res_blocks=1, attention_resolutions=())
    converted = convert_state_dict(state, target.state_dict())
    assert (converted.format, converted.embedding) == ("sr3", "sqrt_gamma")
    assert converted.dropped == ["betas", "alphas_cumprod", "posterior_variance"]
    target.load_state_dict(converted.weights)


def test_guided_diffusion_as_it_is() -> None:
    """An unconditional network of ours computes what guided-diffusion does at its time step."""
    state = guided(variance=False)
    target = palette_unet(embedding="timestep")
    target.input_blocks[0][0] = nn.Conv2d(3, 32, 3, padding=1)
    converted = convert_state_dict(state, target.state_dict())
    assert (converted.format, converted.embedding) == ("guided_diffusion", "timestep")
    assert not converted.changes
    target.load_state_dict(converted.weights)
    assert torch.equal(target.cond_embed[0].weight, state["time_embed.0.weight"])


def test_guided_diffusion_with_condition_variance_and_labels() -> None:
    state = guided(classes=10)
    target = palette_unet(embedding="timestep", num_classes=10).eval()
    converted = convert_state_dict(state, target.state_dict())
    assert len(converted.changes) == 4
    target.load_state_dict(converted.weights)
    assert torch.equal(target.out[2].weight, state["out.2.weight"][:3])
    assert not target.input_blocks[0][0].weight[:, :3].any()
    assert torch.equal(target.input_blocks[0][0].weight[:, 3:], state["input_blocks.0.0.weight"])
    assert not target.label_emb.weight[10].any()

    noisy = torch.randn(1, 3, 16, 16)
    gamma, label = torch.tensor([0.5]), torch.tensor([3])
    with torch.no_grad():
        blind = [
            target(torch.cat([condition, noisy], dim=1), gamma, label)
            for condition in (torch.zeros_like(noisy), torch.randn_like(noisy))
        ]
    assert torch.allclose(*blind, atol=1e-5)


def test_our_own_weights_under_their_own_names() -> None:
    unet = palette_unet()
    converted = convert_state_dict(unet.state_dict(), unet.state_dict())
    assert (converted.format, converted.embedding) == ("unet", None)


def test_half_precision_files_become_the_networks_dtype(saved: dict[str, Tensor]) -> None:
    half = {key: value.half() for key, value in saved.items()}
    converted = convert_state_dict(half, network().denoise_fn.state_dict())
    assert {value.dtype for value in converted.weights.values()} == {torch.float32}


KEY = "denoise_fn.middle_block.1.qkv.weight"
BARE = "middle_block.1.qkv.weight"


def _without(state: dict[str, Any]) -> None:
    del state[KEY]


def _with(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        state[key] = value(state[KEY]) if callable(value) else value

    return damage


def _renamed(state: dict[str, Any]) -> None:
    state[KEY + "s"] = state.pop(KEY)


def _not_a_number(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[0, 0, 0] = float("nan")
    return weight


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without, rf"1 missing: {BARE}"),
        (_renamed, rf"1 missing: {BARE}; 1 unexpected: {BARE}s"),
        (_with("denoise_fn.extra.weight", torch.ones(1)), r"1 unexpected: extra\.weight"),
        (_with("stray", torch.ones(1)), r"1 unexpected: stray"),
        (_with(KEY, lambda w: w[:1]), rf"1 unfit: {BARE} is 1x64x1, expected 192x64x1"),
        (_with(KEY, lambda w: w.unsqueeze(-1)), rf"{BARE} is 192x64x1x1, expected 192x64x1"),
        (_with(KEY, lambda w: w.sum()), rf"{BARE} is a scalar, expected 192x64x1"),
        (_with(KEY, lambda w: w.long()), rf"{BARE} is torch\.int64"),
        (_with(KEY, lambda w: w.to_sparse()), rf"{BARE} is torch\.float32 torch\.sparse_coo"),
        (_with(KEY, _not_a_number), rf"{BARE} holds values that are not finite"),
        (_with(KEY, [1.0]), rf"{BARE} is a list, expected a tensor"),
        (_with("module." + KEY, lambda w: w), rf"{KEY} is there twice"),
    ],
)
def test_damaged_copies_name_the_key(
    saved: dict[str, Any], damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        convert_state_dict(saved, network().denoise_fn.state_dict())
    assert "\n" not in str(caught.value)


def test_every_fault_is_named_at_once(saved: dict[str, Any]) -> None:
    del saved["denoise_fn.out.2.bias"], saved["denoise_fn.out.2.weight"]
    saved["denoise_fn.more"] = torch.ones(1)
    saved[KEY] = saved[KEY][:3]
    message = r"2 missing: out\.2\.weight, out\.2\.bias; 1 unexpected: more; 1 unfit: middle"
    with pytest.raises(ValueError, match=message):
        convert_state_dict(saved, network().denoise_fn.state_dict())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "it holds nothing"),
        ({"features.0.weight": torch.ones(1)}, r"it holds features\.0\.weight"),
        ({"epoch": 1, "iter": 2, "schedulers": [], "optimizers": []}, "a training state"),
    ],
)
def test_other_files_are_refused(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recognise(state)


def training_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the published code saves after a step, and the network's parameters."""
    trained = network()
    optimizer = torch.optim.Adam(trained.parameters(), lr=5e-5)
    trained.denoise_fn(torch.randn(1, 6, 16, 16), torch.tensor([[0.5]])).sum().backward()
    optimizer.step()
    state = {
        "epoch": 200,
        "iter": 930_000,
        "schedulers": [],
        "optimizers": [optimizer.state_dict()],
    }
    return state, dict(trained.denoise_fn.named_parameters())


def test_training_state_by_parameter_name() -> None:
    state, parameters = training_state()
    slots = state["optimizers"][0]["state"]
    last = slots[list(parameters).index("out.2.weight")]
    last["step"] = 1  # as older releases of PyTorch kept it
    found = convert_training_state(state, parameters)
    assert (found.epoch, found.iteration, found.options["lr"]) == (200, 930_000, 5e-5)
    assert found.moments.keys() == parameters.keys()
    moments = found.moments["out.2.weight"]
    assert torch.equal(moments["exp_avg"], last["exp_avg"])
    assert torch.equal(moments["step"], torch.tensor(1.0))

    fewer = dict(list(parameters.items())[1:])
    with pytest.raises(ValueError, match=r"^optimizers: of a network with \d+ parameters"):
        convert_training_state(state, fewer)
    swapped = dict(reversed(parameters.items()))
    with pytest.raises(ValueError, match=r"^optimizers: exp_avg of out\.2\.bias"):
        convert_training_state(state, swapped)
    with pytest.raises(ValueError, match=r"no epoch, iter, optimizers"):
        convert_training_state({}, parameters)
    with pytest.raises(ValueError, match=r"^optimizers: not the state of one Adam"):
        convert_training_state({**state, "optimizers": []}, parameters)


SLOTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no mean": (lambda slot: slot.pop("exp_avg"), "exp_avg of {} is missing"),
    "no square": (lambda slot: slot.pop("exp_avg_sq"), "exp_avg_sq of {} is missing"),
    "no step": (lambda slot: slot.pop("step"), "step of {} is None, expected a whole number"),
    "a list": (
        lambda slot: slot.update(exp_avg=[1.0]),
        "exp_avg of {} is a list, expected a tensor",
    ),
    "integers": (
        lambda slot: slot.update(exp_avg=slot["exp_avg"].long()),
        "exp_avg of {} is torch.int64",
    ),
    "cut": (
        lambda slot: slot.update(exp_avg_sq=slot["exp_avg_sq"][:1]),
        "exp_avg_sq of {} is 1x6x3x3, expected 32x6x3x3",
    ),
    "infinite": (
        lambda slot: slot.update(exp_avg=slot["exp_avg"] / 0),
        "exp_avg of {} holds values that are not finite",
    ),
    "a word": (lambda slot: slot.update(step="many"), "step of {} is 'many'"),
    "below 0": (lambda slot: slot.update(step=-1), "step of {} is -1"),
    "endless": (lambda slot: slot.update(step=float("inf")), "step of {} is inf"),
    "several": (lambda slot: slot.update(step=torch.ones(2, 2)), "step of {} is tensor([[1., 1.],"),
}


@pytest.mark.parametrize("name", SLOTS)
def test_a_damaged_training_state_names_part_and_parameter(name: str) -> None:
    damage, words = SLOTS[name]
    state, parameters = training_state()
    first = "input_blocks.0.0.weight"
    damage(state["optimizers"][0]["state"][list(parameters).index(first)])
    message = "optimizers: " + words.format(first)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        convert_training_state(state, parameters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["epoch", "iter"])
@pytest.mark.parametrize("value", [None, -1, float("inf"), torch.ones(3), "x"])
def test_counts_of_a_training_state_are_counts(key: str, value: Any) -> None:
    state, parameters = training_state()
    with pytest.raises(ValueError, match=f"^{key} is .*, expected a whole number, at least 0$"):
        convert_training_state({**state, key: value}, parameters)
