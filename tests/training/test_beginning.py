"""Runs that begin with the weights of another: ours, published ones, guided-diffusion's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from palette import checkpoint as checkpoints
from palette import config as configs
from palette.build import build_network
from palette.checkpoint import CheckpointError
from palette.config import Config, ConfigError
from palette.models.unet import UNet
from palette.training.beginning import first_weights

SHORT = ("train.steps=2", "train.sample_every=0")
FIRST, LAST = "input_blocks.0.0.weight", "out.2.weight"


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory, tiny: ModuleType) -> Path:
    """A run of two steps."""
    run = tmp_path_factory.mktemp("donor")
    tiny.build(run, SHORT).fit()
    return run


def config(tiny: ModuleType, *overrides: str) -> Config:
    return configs.from_yaml(tiny.OPTIONS, overrides=["model.dropout=0.1", *overrides])


def unet(**options: Any) -> dict[str, Tensor]:
    """Weights of the tiny network with other ends, none of them zero."""
    torch.manual_seed(1)
    shape: dict[str, Any] = {"image_size": 16, "in_channels": 6, "out_channels": 3, "channels": 32}
    shape |= {"channel_mults": (1, 1), "res_blocks": 1, "attention_resolutions": (8,)}
    return UNet(**{**shape, "head_channels": 32, "zero_init": False, **options}).state_dict()


def published(weights: dict[str, Tensor], path: Path) -> Path:
    torch.save({f"denoise_fn.{name}": value for name, value in weights.items()}, path)
    return path


def guided(weights: dict[str, Tensor], path: Path) -> Path:
    state = {name.replace("cond_embed", "time_embed"): value for name, value in weights.items()}
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["run", "checkpoint", "file"])
def test_a_run_begins_with_the_average_of_ours(
    kind: str, donor: Path, tmp_path: Path, tiny: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    found = checkpoints.latest(donor)
    source = donor if kind == "run" else found.path
    if kind == "file":
        source = checkpoints.export(tmp_path / "m.safetensors", found.ema, found.config, {})
    sets = (*SHORT, f"train.init_from={source}", "train.ema_decays=[0.5]")
    trainer = tiny.build(tmp_path / "run", sets)
    seen: dict[str, Tensor] = {}
    trainer.dataset.disturb = lambda keys, entries: (
        seen or seen.update({n: v.clone() for n, v in trainer.network.state_dict().items()})
    )
    trainer.fit()
    assert all(torch.equal(seen[name], value) for name, value in found.ema.items())
    shown = capsys.readouterr().out
    assert f"{len(seen)} of {len(seen)} tensors taken" in shown
    assert "other options" not in shown
    assert "begun from" in shown
    after = checkpoints.latest(tmp_path / "run")
    assert (after.step, after.trainer["ema_updates"], after.trainer["samples"]) == (2, 2, 8)
    assert not torch.equal(after.model[LAST], seen[LAST])


def test_taken_up_again_it_is_the_run_that_was_not_killed(
    donor: Path, tmp_path: Path, tiny: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = ("train.sample_every=0", f"train.init_from={donor}")
    tiny.build(tmp_path / "straight", ("train.steps=4", *begin)).fit()
    tiny.build(tmp_path / "halves", ("train.steps=2", *begin)).fit()
    capsys.readouterr()
    gone = ("train.steps=4", "train.sample_every=0", "train.init_from=gone")
    tiny.build(tmp_path / "halves", gone).fit("auto")
    assert "continued from" in capsys.readouterr().out
    halves, straight = (checkpoints.latest(tmp_path / run) for run in ("halves", "straight"))
    assert all(torch.equal(halves.model[name], value) for name, value in straight.model.items())
    assert all(torch.equal(halves.ema[name], value) for name, value in straight.ema.items())


def test_more_and_fewer_channels(tmp_path: Path, tiny: ModuleType) -> None:
    """A condition of 3 channels put to a network that had none, taken from one, cut from 5."""
    for channels, task in ((3, "inpaint"), (6, "generate"), (8, "inpaint")):
        wanted = config(tiny, f"task.name={task}")
        given = unet(in_channels=channels)
        path = published(given, tmp_path / "9_Network.pth")
        weights, notes = first_weights(path, wanted, build_network(wanted).state_dict())
        first, known = weights[FIRST], channels - 3
        assert torch.equal(first[:, -3:], given[FIRST][:, known:])
        if channels == 3:
            assert not first[:, :3].any()
            assert f"adapted: {FIRST}: 3 channels of zeros for the condition" in notes
        elif channels == 8:
            assert torch.equal(first[:, :3], given[FIRST][:, :3])
            assert f"adapted: {FIRST}: 2 channels of the condition left out" in notes
        else:
            assert first.shape[1] == 3
        build_network(wanted).load_state_dict(weights)


def test_a_grey_network_becomes_one_of_colours(tmp_path: Path, tiny: ModuleType) -> None:
    wanted, given = config(tiny), unet(in_channels=2, out_channels=1)
    path = published(given, tmp_path / "9_Network.pth")
    weights, notes = first_weights(path, wanted, build_network(wanted).state_dict())
    assert torch.equal(weights[FIRST][:, [0, 3]], given[FIRST])
    assert not weights[FIRST][:, [1, 2, 4, 5]].any()
    assert torch.equal(weights[LAST][:1], given[LAST])
    assert not weights[LAST][1:].any()
    assert f"adapted: {LAST}: 2 channels of zeros for the picture" in notes


def test_the_other_architecture(tmp_path: Path, tiny: ModuleType) -> None:
    wanted = config(tiny, "model.kind=sr3", "task.name=generate", "model.embedding=sqrt_gamma")
    network = build_network(wanted).state_dict()
    given = {name: torch.randn_like(value) for name, value in network.items()}
    given["downs.0.weight"] = torch.randn(32, 4, 3, 3)
    given["final_conv.block.3.weight"] = torch.randn(4, 32, 3, 3)
    given["final_conv.block.3.bias"] = torch.randn(4)
    path = tmp_path / "I10_E1_gen.pth"
    torch.save({**{f"denoise_fn.{n}": v for n, v in given.items()}, "betas": torch.ones(9)}, path)
    weights, notes = first_weights(path, wanted, network)
    assert notes == [
        f"{path}: sr3 weights, {len(network)} of {len(network)} tensors taken",
        "adapted: final_conv.block.3.weight: 1 channel of the picture left out",
        "adapted: final_conv.block.3.bias: 1 channel of the picture left out",
        "adapted: downs.0.weight: 1 channel of the noisy picture left out",
    ]
    assert torch.equal(weights["downs.0.weight"], given["downs.0.weight"][:, :3])
    build_network(wanted).load_state_dict(weights)


def test_the_published_average_is_preferred(tmp_path: Path, tiny: ModuleType) -> None:
    raw, average = unet(), {name: value + 1 for name, value in unet().items()}
    published(raw, tmp_path / "9_Network.pth")
    published(average, tmp_path / "9_Network_ema.pth")
    trainer = tiny.build(tmp_path / "run", (*SHORT, f"train.init_from={tmp_path / '9'}"))
    seen: list[Tensor] = []
    trainer.dataset.disturb = lambda keys, entries: seen.append(trainer.network.out[2].bias.clone())
    trainer.fit()
    assert torch.equal(seen[0], average["out.2.bias"])


def test_guided_diffusion_with_variances_and_its_condition_last(
    tmp_path: Path, tiny: ModuleType
) -> None:
    wanted = config(tiny, "model.embedding=timestep", "model.attention_order=legacy")
    given = unet(out_channels=6)
    path = guided(given, tmp_path / "upsampler.pt")
    weights, notes = first_weights(path, wanted, build_network(wanted).state_dict())
    assert torch.equal(weights[FIRST], given[FIRST][:, [3, 4, 5, 0, 1, 2]])
    assert torch.equal(weights[LAST], given[LAST][:3])
    assert notes[1:] == [
        f"adapted: {LAST}: 3 channels of learned variance left out",
        "adapted: out.2.bias: 3 channels of learned variance left out",
        f"adapted: {FIRST}: the condition moved before the noisy picture",
    ]


def test_what_is_not_taken_is_listed(tmp_path: Path, tiny: ModuleType) -> None:
    wanted = config(tiny, "model.attention_resolutions=[16]", "model.num_classes=4")
    given = {**unet(num_classes=9), "extra.weight": torch.ones(2)}
    network = build_network(wanted).state_dict()
    weights, notes = first_weights(published(given, tmp_path / "9_Network.pth"), wanted, network)
    fresh = next(note for note in notes if note.startswith("not there, begun anew: "))
    unused = next(note for note in notes if note.startswith("not taken: "))
    assert "label_emb.weight" in fresh
    assert "label_emb.weight" in unused
    assert "extra.weight" in unused
    assert notes[-1] == (
        "trained with other options: model.embedding: gamma -> log_snr; "
        "model.attention_order: legacy -> new"
    )
    for name in fresh.split(": ")[1].split(", "):
        assert torch.equal(weights[name], network[name])


def test_other_options_of_ours_are_said(donor: Path, tiny: ModuleType) -> None:
    wanted = config(tiny, "model.prediction=v", "schedule.name=cosine")
    _, notes = first_weights(donor, wanted, build_network(wanted).state_dict())
    assert notes[-1] == (
        "trained with other options: model.prediction: epsilon -> v; "
        "schedule.name: linear -> cosine"
    )


def _wider(state: dict[str, Tensor]) -> None:
    state["middle_block.0.in_layers.2.weight"] = torch.ones(64, 32, 3, 3)


def _other_kernel(state: dict[str, Tensor]) -> None:
    state[FIRST] = torch.ones(32, 3, 5, 5)


def _infinite(state: dict[str, Tensor]) -> None:
    state[LAST][0] = float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_wider, r"middle_block.0.in_layers.2.weight is 64x32x3x3, expected 32x32x3x3"),
        (_other_kernel, rf"{FIRST} is 32x3x5x5, expected 32x6x3x3"),
        (_infinite, rf"{LAST} holds values that are not finite"),
    ],
)
def test_what_cannot_be_adapted_is_named(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path, tiny: ModuleType
) -> None:
    wanted, given = config(tiny), unet()
    change(given)
    path = published(given, tmp_path / "9_Network.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        first_weights(path, wanted, build_network(wanted).state_dict())
    assert str(caught.value).startswith(f"{path}: palette weights cannot be adapted")
    assert "\n" not in str(caught.value)


def test_mistakes(tmp_path: Path, tiny: ModuleType) -> None:
    wanted = config(tiny)
    network = build_network(wanted).state_dict()
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt: holds a list, not named weights"):
        first_weights(tmp_path / "list.pt", wanted, network)
    torch.save({"denoise_fn.other.weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"none is of this network; one is other\.weight"):
        first_weights(tmp_path / "other.pt", wanted, network)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        tiny.build(tmp_path / "run", ("train.init_from=nowhere",)).fit()
    with pytest.raises(ConfigError, match=r"train\.init_from begins .* give one of them"):
        config(tiny, "train.init_from=a", "train.resume_from=b")
