"""``train -c`` and ``test -c`` of published configs, from folders of pictures to results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from palette import checkpoint as checkpoints
from palette import config as our_configs
from palette.build import build_network
from palette.cli import main
from palette.upstream import Network, read_run, to_config

NAMES = (
    "inpainting_celebahq",
    "inpainting_places2",
    "uncropping_places2",
    "colorization_mirflickr25k",
)


def draw(folder: Path, count: int, mode: str = "RGB") -> None:
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(count)
    for index in range(count):
        shape = (20, 24, 3) if mode == "RGB" else (20, 24)
        pixels = numbers.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:05d}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures, alone and in colour and grey with their lists."""
    folder = tmp_path_factory.mktemp("pictures")
    draw(folder / "plain", 12)
    draw(folder / "pairs" / "color", 12)
    draw(folder / "pairs" / "gray", 12, "L")
    for name in ("train", "test"):
        (folder / "pairs" / f"{name}.flist").write_text("".join(f"{i}\n" for i in range(12)))
    return folder


@pytest.fixture
def write(configs: ModuleType, pictures: Path, tmp_path: Path) -> Any:
    """Write one of the published configs, changed by ``change(config)``; returns its path."""

    def make(name: str = NAMES[0], change: Any = lambda config: None) -> Path:
        data = pictures / ("pairs" if name.startswith("color") else "plain")
        config = configs.build(name, data, data, tmp_path / "experiments")
        change(config)
        return Path(configs.write(tmp_path / f"{name}.json", config))

    return make


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_train_then_test(name: str, write: Any, tmp_path: Path, capsys: Any) -> None:
    def short(config: dict[str, Any]) -> None:
        config["train"] |= {"n_epoch": 2, "val_epoch": 1, "save_checkpoint_epoch": 1}

    file = write(name, short)
    assert main(["train", "-c", str(file), "-p", "train", "-P", "21012", "--debug"]) == 0
    assert "-P 21012: not used" in capsys.readouterr().err
    run = tmp_path / "experiments" / f"train_{name}"
    # 12 pictures, 2 held out, 10 make 3 whole batches of 3.
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation_mae" in line] == [3, 6]
    assert [path.name for path in checkpoints.steps(run)] == ["step_00000006", "step_00000003"]

    assert main(["test", "-c", str(file), str(run), "--debug"]) == 0
    printed = capsys.readouterr().out.splitlines()
    results = tmp_path / "experiments" / f"test_{name}" / "results" / "test" / "0"
    assert printed[-1] == str(results)
    scores = json.loads((results / "scores.json").read_text())
    assert printed[-2].startswith(f"MAE {scores['mae']:.6f} (")
    kinds = (
        ["GT", "Out", "Process"] if name.startswith("color") else ["GT", "Mask", "Out", "Process"]
    )
    wanted = sorted(f"{kind}_{index:05d}.png" for kind in kinds for index in range(12))
    assert sorted(path.name for path in results.glob("*.png")) == wanted
    truth, out = (
        np.asarray(Image.open(results / f"{kind}_00003.png"), float) for kind in ("GT", "Out")
    )
    assert abs(truth - out).mean() / 127.5 == pytest.approx(scores["images"]["00003"], abs=0.01)
    # The metrics are those of the files beside them.
    found = scores["metrics"]["scores"]
    whole = abs(_all(results, "GT") - _all(results, "Out")).mean()
    assert found["mae"]["value"] == pytest.approx(whole, rel=1e-9)
    assert found["fid_random"]["images"] == 12
    assert "NOT Inception" in (results / "scores.txt").read_text()
    assert any(line.startswith("PSNR, mean over images") for line in printed)
    assert main(["evaluate", "--samples", str(results), "--truth", str(results)]) == 0
    shown = capsys.readouterr().out
    assert f"{found['fid_random']['value']:.6g}" in shown
    more = ["--limit", "2", "--output", str(tmp_path / "evaluation")]
    assert main(["evaluate", str(run), "-c", str(file), *more]) == 0
    assert len(list((tmp_path / "evaluation" / "samples").iterdir())) == 2
    with Image.open(results / "Process_00003.png") as process:
        # The start and 3 snapshots (6 steps, every second), two in a row.
        assert process.size == (2 * 18 + 2, 2 * 18 + 2)
    if not name.startswith("color"):
        mask = np.asarray(Image.open(results / "Mask_00003.png"))
        known = (mask != 255).any(axis=2)
        assert (truth[known] == out[known]).all()


def _all(results: Path, kind: str) -> Any:
    return np.stack(
        [np.asarray(Image.open(path), float) for path in sorted(results.glob(f"{kind}_*.png"))]
    )


def test_our_config(write: Any, pictures: Path, tmp_path: Path, capsys: Any) -> None:
    text = (
        f"run: {{dir: {tmp_path / 'run'}}}\n"
        "model: {channels: 32, channel_mults: [1, 2], res_blocks: 1, attention_resolutions: []}\n"
        f"data: {{source: folder, path: {pictures / 'plain'}, image_size: 16, batch_size: 4,"
        " validation: 3, validation_pictures: 3}\n"
        "train: {steps: 2, sample_every: 0, precision: float32}\nsample: {steps: 2}\n"
    )
    (tmp_path / "ours.yaml").write_text(text)
    config = ["-c", str(tmp_path / "ours.yaml")]
    assert main(["train", *config, "-b", "2", "--debug"]) == 0
    assert metrics(tmp_path / "run")[-1]["samples"] == 4
    assert main(["test", *config, "--steps", "1", "--weights", "raw", "--debug"]) == 0
    results = tmp_path / "run" / "results" / "test" / "0"
    assert len(list(results.glob("Out_*.png"))) == 3
    assert main(["train", *config, "-d"]) == 2
    assert "-d is for published configs" in capsys.readouterr().err


def test_everything_it_says_is_honoured(write: Any) -> None:
    def change(config: dict[str, Any]) -> None:
        training = config["datasets"]["train"]
        training["which_dataset"]["args"]["data_len"] = 11
        training["dataloader"]["validation_split"] = 0.2
        training["dataloader"]["args"]["shuffle"] = False
        config["model"]["which_model"]["args"]["ema_scheduler"] = {
            "ema_start": 10,
            "ema_iter": 6,
            "ema_decay": 0.9,
        }
        config["train"] |= {"n_epoch": 4, "n_iter": 1000, "val_epoch": 1, "log_iter": 7}
        config["finetune_norm"] = True

    file = write(change=change)
    config, settings = read_run(file, batch_size=4)
    assert settings is not None
    assert (config.data.limit, config.data.validation_pictures) == (11, 2)
    assert (config.data.shuffle, config.data.drop_last, config.data.fit) == (False, True, "squash")
    assert (config.data.flip, config.data.batch_size) == (False, 4)
    # 9 pictures are 2 whole batches of 4.
    assert (config.train.steps, config.train.sample_every, config.train.save_every) == (8, 2, 20)
    # Published after samples 12, 24 … : above 10 and multiples of 6, seen in fours.
    assert (config.train.ema_start, config.train.ema_every) == (2, 3)
    assert (config.train.ema_warmup, config.train.normalise_loss) == (False, False)
    assert (config.model.init, config.train.norms_only) == ("kaiming", True)
    debugged, _ = read_run(file, debug=True, overrides=["train.lr=1e-3"])
    assert (debugged.data.limit, debugged.data.validation_pictures) == (8, 1)
    assert (debugged.train.save_every, debugged.train.lr) == (2, 1e-3)
    two, _ = read_run(file, gpus=2)
    assert two.data.batch_size == 6
    assert read_run(file, "test")[0].task.mask == "center"


def test_only_norms_are_trained(write: Any, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["finetune_norm"] = True
        config["train"]["n_epoch"] = 1

    sets = ["--set", "train.steps=1"]
    assert main(["train", "-c", str(write(change=change)), *sets, "--debug"]) == 0
    found = checkpoints.latest(tmp_path / "experiments" / f"finetune_{NAMES[0]}")
    changed = {
        name for name, weight in found.model.items() if not torch.equal(weight, found.ema[name])
    }
    network = build_network(our_configs.from_yaml(found.config))
    norms = {
        f"{name}.{part}"
        for name, layer in network.named_modules()
        if isinstance(layer, nn.GroupNorm)
        for part in ("weight", "bias")
    }
    assert changed
    assert changed <= norms


def publish(prefix: Path, config: dict[str, Any], steps: int) -> Network:
    """What the published code leaves after some steps: weights, average and training state."""
    network = Network(**config["model"]["which_networks"][0]["args"])
    network.init_weights()
    torch.save(network.state_dict(), f"{prefix}_Network_ema.pth")
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        network.denoise_fn(torch.randn(1, 6, 16, 16), torch.rand(1, 1)).square().mean().backward()
        optimizer.step()
    network.set_new_noise_schedule(phase="train")
    torch.save(network.state_dict(), f"{prefix}_Network.pth")
    state = {
        "epoch": 2,
        "iter": 3 * steps + 4,
        "schedulers": [],
        "optimizers": [optimizer.state_dict()],
    }
    torch.save(state, f"{prefix}.state")
    return network


def test_a_published_run_goes_on(
    write: Any, tmp_path: Path, configs: ModuleType, capsys: Any
) -> None:
    prefix = tmp_path / "2"
    kept: dict[str, Any] = {}

    def change(config: dict[str, Any]) -> None:
        config["path"]["resume_state"] = str(prefix)
        config["train"] |= {"n_epoch": 3, "save_checkpoint_epoch": 100, "val_epoch": 100}
        kept.update(config)

    file = write(change=change)
    network = publish(prefix, kept, 6)
    run = tmp_path / "experiments" / f"train_{NAMES[0]}"
    sets = ["--set", "train.lr=1e-30"]  # so that the weights stay and the counters move
    assert main(["train", "-c", str(file), *sets, "--resume", "auto", "--debug"]) == 0
    assert f"continued from {prefix}" in capsys.readouterr().out
    found = checkpoints.latest(run)
    assert (found.step, found.meta["samples"]) == (9, 27)  # from step 6, after 2 epochs of 9
    for name, weight in network.denoise_fn.state_dict().items():
        assert torch.equal(found.model[name], weight)
    states = found.trainer["optimizer"]["state"]
    assert {int(slot["step"]) for slot in states.values()} == {9}
    average = torch.load(f"{prefix}_Network_ema.pth")["denoise_fn.input_blocks.0.0.weight"]
    mean = found.ema["input_blocks.0.0.weight"]
    raw = network.denoise_fn.input_blocks[0][0].weight
    decay = 0.9999**3
    assert torch.allclose(mean, decay * average + (1 - decay) * raw, atol=1e-7)

    # The averaged weights are tested; --resume auto goes on with ours.
    assert main(["train", "-c", str(file), "--resume", "auto", "--debug"]) == 0
    assert "continued from " + str(run) in capsys.readouterr().out
    assert main(["test", "-c", str(file), "--debug"]) == 0
    scores = json.loads(
        (tmp_path / f"experiments/test_{NAMES[0]}/results/test/0/scores.json").read_text()
    )
    assert scores["model"] == f"{prefix}_Network_ema.pth"
    output = tmp_path / "evaluation"
    arguments = ["evaluate", str(prefix), "-c", str(file), "--limit", "2", "--output", str(output)]
    assert main([*arguments, "--debug"]) == 0
    plan = json.loads((output / "evaluation.json").read_text())
    assert plan["checkpoint"] == f"{prefix}_Network_ema.pth"
    capsys.readouterr()
    assert main([*arguments, "--weights", "swa"]) == 1
    assert "2: a published checkpoint has no swa weights" in capsys.readouterr().err
    assert main(arguments[:2]) == 2
    assert "-c CONFIG is needed with this checkpoint" in capsys.readouterr().err


def _without_mean(state: dict[str, Any]) -> dict[str, Any]:
    adam = copy.deepcopy(state["optimizers"][0])
    del adam["state"][0]["exp_avg"]
    return dict(adam)


def test_what_is_missing_is_named(write: Any, tmp_path: Path, capsys: Any) -> None:
    prefix = tmp_path / "9"
    kept: dict[str, Any] = {}

    def change(config: dict[str, Any]) -> None:
        config["path"]["resume_state"] = str(prefix)
        config["train"]["n_epoch"] = 1
        kept.update(config)

    file = write(change=change)
    assert main(["train", "-c", str(file)]) == 1
    assert "9_Network.pth: No such file" in capsys.readouterr().err
    publish(prefix, kept, 1)
    state = torch.load(f"{prefix}.state")
    for damaged, words in (
        ([state], "9.state: holds a list, not a training state"),
        (
            {**state, "optimizers": [_without_mean(state)]},
            "9.state: optimizers: exp_avg of cond_embed",
        ),
    ):
        torch.save(damaged, f"{prefix}.state")
        assert main(["train", "-c", str(file)]) == 1
        assert words in capsys.readouterr().err
    Path(f"{prefix}.state").unlink()
    Path(f"{prefix}_Network_ema.pth").unlink()
    assert main(["train", "-c", str(file), "--set", "train.steps=1", "--debug"]) == 0
    said = capsys.readouterr().out
    assert "9.state: missing; only the weights are taken" in said
    assert "9_Network_ema.pth: missing; the average begins at the weights" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "-p", "test"], "-p test: this is train; say palette test -c"),
        (["test"], "path.resume_state: missing"),
        (["test", "none"], "none: no such checkpoint"),
        (["train", "-b", "100"], "data.drop_last leaves no batch"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, write: Any, capsys: Any) -> None:
    assert main([arguments[0], "-c", str(write()), *arguments[1:]]) in (1, 2)
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_unknown_loader_arguments_are_refused(write: Any, capsys: Any) -> None:
    def change(config: dict[str, Any]) -> None:
        config["datasets"]["train"]["dataloader"]["args"]["timeout"] = 3

    assert main(["train", "-c", str(write(change=change))]) == 2
    assert "datasets.train.dataloader.args.timeout: not supported" in capsys.readouterr().err


def test_the_full_networks_are_the_published_ones(
    configs: ModuleType, tmp_path: Path, published_shapes: Any
) -> None:
    """All four configs, unshrunken, describe the published 62,641,347 parameters."""
    wanted = published_shapes("state_dict_published_256")
    for name in NAMES:
        full = {"inner_channel": 64, "channel_mults": [1, 2, 4, 8], "res_blocks": 2}
        config = configs.build(name, tmp_path, tmp_path, tmp_path, image_size=256, **full)
        side = 224 if name.startswith("color") else 256
        config["datasets"]["train"]["which_dataset"]["args"]["image_size"] = [side, side]
        with torch.device("meta"):
            network = build_network(our_configs.from_sections(to_config(config)))
        assert [(k, tuple(v.shape)) for k, v in network.state_dict().items()] == wanted
