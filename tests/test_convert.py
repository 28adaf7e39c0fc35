"""Anybody's checkpoint becomes one file of ours, or the key at fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import palette
from palette import checkpoint as checkpoints
from palette import config as configs
from palette.cli import main
from palette.models.unet import UNet
from palette.upstream import Network

UNET: dict[str, Any] = {
    "image_size": 16,
    "in_channel": 6,
    "inner_channel": 32,
    "out_channel": 3,
    "res_blocks": 1,
    "attn_res": [16],
    "channel_mults": [1, 2],
}
SCHEDULES = {"train": {"schedule": "linear", "n_timestep": 20}}
KEY = "denoise_fn.middle_block.1.qkv.weight"
BARE = "middle_block.1.qkv.weight"


def convert(*arguments: str | Path) -> int:
    return main(["convert", *map(str, arguments)])


def test_the_full_published_checkpoint(
    tmp_path: Path, published_shapes: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """All 326 tensors and the six schedules of the published network, 62.6 million parameters."""
    lines = published_shapes("state_dict_published_256")
    state = {f"denoise_fn.{k}": torch.zeros(s, dtype=torch.float16) for k, s in lines}
    state |= {
        name: torch.zeros(2000)
        for name in (
            "gammas",
            "sqrt_recip_gammas",
            "sqrt_recipm1_gammas",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
        )
    }
    torch.save(state, tmp_path / "200_Network.pth")
    out = tmp_path / "out.safetensors"
    assert convert(tmp_path / "200_Network.pth", out) == 0
    printed = capsys.readouterr().out
    assert "palette, 326 tensors, 62,641,347 parameters" in printed
    assert "0 missing, 0 unexpected" in printed
    assert "dropped: gammas, sqrt_recip_gammas" in printed
    assert "assumed, for want of --config: images of 256 pixels" in printed
    written, metadata = checkpoints.load_safetensors(out)
    assert {(k, tuple(v.shape)) for k, v in written.items()} == set(lines)
    config = configs.from_yaml(metadata["palette.config"])
    assert (config.model.attention_resolutions, config.model.head_channels) == ([], 32)
    assert (config.model.embedding, config.sample.steps) == ("gamma", 1000)


@pytest.fixture
def saved() -> dict[str, Any]:
    """A published checkpoint of a small network."""
    network = Network(UNET, SCHEDULES, "guided_diffusion")
    network.set_new_noise_schedule(phase="train")
    return dict(network.state_dict())


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        state[key] = value(state[KEY]) if callable(value) else value

    return damage


def _infinite(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[0, 0, 0] = float("inf")
    return weight


def _rename(state: dict[str, Any]) -> None:
    state[KEY + "s"] = state.pop(KEY)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing": (lambda state: state.pop(KEY), f"1 missing: {BARE}"),
    "renamed": (_rename, f"1 missing: {BARE}; 1 unexpected: {BARE}s"),
    "unexpected": (_set("denoise_fn.extra", torch.ones(1)), "1 unexpected: extra"),
    "no prefix": (_set("stray", torch.ones(1)), "1 unexpected: stray"),
    "cut": (_set(KEY, lambda w: w[:1]), f"{BARE} is 1x64x1, expected 192x64x1"),
    "another dimension": (_set(KEY, lambda w: w.unsqueeze(-1)), f"{BARE} is 192x64x1x1"),
    "integers": (_set(KEY, lambda w: w.long()), f"{BARE} is torch.int64"),
    "infinite": (_set(KEY, _infinite), f"{BARE} holds values that are not finite"),
    "a list": (_set(KEY, [1.0]), f"{BARE} is a list, expected a tensor"),
    "twice": (_set(f"module.{KEY}", lambda w: w), f"{KEY} is there twice"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_copy_is_refused_with_its_key(
    name: str, saved: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGES[name]
    damage(saved)
    torch.save(saved, tmp_path / "bad.pth")
    config = write_config(tmp_path)
    assert convert(tmp_path / "bad.pth", tmp_path / "out.safetensors", "--config", config) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()


def write_config(folder: Path, kind: str = "unet") -> Path:
    """Options of ours for the small network."""
    path = folder / "ours.yaml"
    attending = [16] if kind == "sr3" else []
    path.write_text(
        f"model: {{kind: {kind}, channels: 32, channel_mults: [1, 2], res_blocks: 1,"
        f" attention_resolutions: {attending}, attention_order: legacy, head_channels: null}}\n"
        "data: {image_size: 16}\nsample: {steps: 2}\n"
    )
    return path


def test_what_is_written_opens_and_samples(saved: dict[str, Any], tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "5_Network_ema.pth")
    out = tmp_path / "out.safetensors"
    assert convert(tmp_path / "5", out, "--config", write_config(tmp_path)) == 0
    model = palette.load(out, device="cpu")
    assert (model.config.model.embedding, model.config.train.precision) == ("gamma", "float32")
    weights = model.network.state_dict()
    assert all(torch.equal(v, saved[f"denoise_fn.{k}"]) for k, v in weights.items())
    known, mask = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    assert model.complete(known, mask, torch.tensor([1])).isfinite().all()
    again = tmp_path / "again.safetensors"  # a file of ours is one of ours again
    assert convert(out, again) == 0
    assert palette.load(again, device="cpu").config == model.config


def test_what_would_say_nothing_is_refused(
    saved: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published, config = tmp_path / "5_Network.pth", write_config(tmp_path)
    torch.save(saved, published)
    ours, out = tmp_path / "ours.safetensors", tmp_path / "out.safetensors"
    assert convert(published, ours, "--config", config) == 0
    for source, arguments, words in (
        (ours, ("--config", config), f"--config: found {config}; {ours} is of ours"),
        (ours, ("--image-size", "256"), f"--image-size: found 256; {ours} is of ours"),
        (published, ("--config", config, "--image-size", "8"), f"--image-size: found 8; {config}"),
        (published, ("--config", config, "--weights", "raw"), f"--weights: found raw; {published}"),
    ):
        capsys.readouterr()
        assert convert(source, out, *arguments) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
        assert not out.exists()
    with pytest.raises(ValueError, match=r"--weights: found swa; .*5_Network\.pth holds"):
        palette.load(published, config, weights="swa")


def test_sr3_and_guided_diffusion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sr3 = dict(Network(UNET, SCHEDULES, "sr3").state_dict()) | {"betas": torch.zeros(20)}
    torch.save(sr3, tmp_path / "I10_E1_gen.pth")
    out = tmp_path / "out.safetensors"
    assert convert(tmp_path / "I10_E1_gen.pth", out) == 2
    assert "sr3 weights do not show their options; give --config" in capsys.readouterr().err
    config = write_config(tmp_path, "sr3")
    assert convert(tmp_path / "I10_E1_gen.pth", out, "--config", config) == 0
    assert palette.load(out, device="cpu").config.model.embedding == "sqrt_gamma"

    unet = UNet(
        image_size=64,
        in_channels=3,
        out_channels=6,
        channels=64,
        channel_mults=(1, 1),
        res_blocks=1,
        attention_resolutions=(32,),
        head_channels=64,
    )
    guided = {k.replace("cond_embed", "time_embed"): v for k, v in unet.state_dict().items()}
    torch.save(guided, tmp_path / "model.pt")
    capsys.readouterr()
    assert convert(tmp_path / "model.pt", out, "--image-size", "64") == 0
    printed = capsys.readouterr().out
    assert "adapted: out.2.weight: 3 channels of learned variance left out" in printed
    assert "0 missing, 0 unexpected" in printed
    model = palette.load(out, device="cpu").config.model
    assert (model.embedding, model.attention_resolutions, model.head_channels) == (
        "timestep",
        [32],
        64,
    )


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "other.pth")
    out = tmp_path / "out.safetensors"
    for source, target, code, words in (
        ("text.pth", out, 1, "text.pth: "),
        ("list.pth", out, 1, "holds a list, not named weights"),
        ("other.pth", out, 1, "it holds features.0.weight"),
        ("none.pth", out, 1, "No such file"),
        ("none", out, 1, "no such checkpoint"),
        ("list.pth", tmp_path / "out.pth", 2, "must end in .safetensors"),
    ):
        assert convert(tmp_path / source, target) == code, source
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


def test_a_published_script(
    tmp_path: Path, golden: Any, fill_by_name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script for the published code, its import changed, gives the published numbers."""
    numbers = golden("palette_inpainting")
    network = Network(**numbers["config"])
    fill_by_name(network)
    network.set_new_noise_schedule(phase="train")
    torch.save(network.state_dict(), tmp_path / "200_Network.pth")
    (tmp_path / "config.json").write_text(json.dumps(numbers["config"]))
    torch.save({k: numbers[k] for k in ("y_cond", "y_0", "mask")}, tmp_path / "input.pt")
    draws = iter(numbers["restore_noise"])  # what the published code drew, in its order
    monkeypatch.setattr(torch, "randn_like", lambda tensor: next(draws).to(tensor))
    monkeypatch.chdir(tmp_path)
    script: dict[str, Any] = {}
    exec(SCRIPT, script)
    for name, wanted in (("output", "restore_y"), ("visuals", "restore_frames")):
        found, expected = script[name], numbers[wanted]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


SCRIPT = """
import json

import torch

from palette.upstream import Network  # was: from models.network import Network

with open("config.json") as file:
    arguments = json.load(file)
device = torch.device("cpu")
model = Network(**arguments)
state = torch.load("200_Network.pth", map_location=device)
model.load_state_dict(state, strict=True)
model.to(device)
model.set_new_noise_schedule(device, phase="test")
model.eval()
batch = torch.load("input.pt")
cond, gt, mask = (batch[name].to(device) for name in ("y_cond", "y_0", "mask"))
with torch.no_grad():
    output, visuals = model.restoration(cond, y_t=cond, y_0=gt, mask=mask, sample_num=4)
"""
