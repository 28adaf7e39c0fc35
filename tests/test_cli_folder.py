"""From a folder to one file and from that to pictures, in the two commands of small projects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import palette
from palette.cli import main

NETWORK = ["model.channels=32", "model.channel_mults=[1]", "model.res_blocks=1"]
FEW = [*NETWORK, "train.precision=float32", "sample.steps=3", "sample.count=2"]
SHORT = ["-t", "100", "-e", "2", "-b", "4", "-i", "8", "-s", "cosine"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures in two class folders."""
    folder = tmp_path_factory.mktemp("folder") / "images"
    noise = np.random.default_rng(0)
    for index in range(7):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    return folder


def _train(images: Path, *more: str, name: str = "birds") -> list[str]:
    return ["train", "--name", name, "--images", str(images), *SHORT, *more, "--set", *FEW]


@pytest.fixture(scope="module")
def trained(images: Path) -> Path:
    """The folder that the command was given in, with the run and the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(images.parent)
        assert main([*_train(images), "train.accumulate=2", "--debug"]) == 0
    return images.parent


def test_every_epoch_leaves_its_pictures_and_a_checkpoint(trained: Path) -> None:
    run = trained / "runs" / "birds"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step_00000002",
        "step_00000004",
    ]
    for step in ("step_00000002", "step_00000004"):
        with Image.open(run / "samples" / f"{step}.png") as samples:
            assert samples.width == 2 * 96 + 2  # averaged and raw weights, side by side
        with Image.open(run / "process" / f"{step}.png") as plot:
            assert plot.width == 3 * 96 + 2 * 2  # every step of three
        for weights in ("raw", "ema"):
            with Image.open(run / "process" / f"{step}_{weights}.gif") as gif:
                assert 1 < gif.n_frames <= 3  # a frame like the one before is not written
                assert gif.width == 2 * 96 + 2
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_the_file_holds_the_averaged_weights_and_the_config(trained: Path) -> None:
    model = palette.load(trained / "birds.safetensors", device="cpu")
    config = model.config
    assert (config.schedule.steps, config.schedule.name) == (100, "cosine")
    assert (config.data.image_size, config.data.batch_size, config.train.steps) == (8, 4, 4)
    averaged = palette.load(trained / "runs" / "birds", device="cpu").network.state_dict()
    for name, weight in model.network.state_dict().items():
        assert weight.equal(averaged[name]), name


def test_predict_writes_what_its_seeds_say(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(trained / "birds.safetensors")
    assert main(["predict", model, "-o", str(tmp_path), "-n", "bird", "-i", "18"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert written == [tmp_path / f"bird_{index:06d}.png" for index in range(18)]
    with Image.open(written[17]) as last:
        assert json.loads(last.text["palette"])["seed"] == 17
        alone = palette.load(model, device="cpu").generate(seed=17)
        assert np.abs(np.asarray(last, int) - np.asarray(alone, int)).max() <= 1


def test_pictures_and_tensorboard_can_be_left_out_and_a_run_taken_up(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = _train(images, "--disable-images", "--disable-tensorboard", "--resume", "auto")
    assert main(quiet) == 0
    assert main(quiet) == 2  # the model is there
    Path("birds.safetensors").unlink()
    assert main(quiet) == 0
    assert Path("birds.safetensors").is_file()
    assert {path.name for path in Path("runs/birds").iterdir()} == {
        "checkpoints",
        "metrics.jsonl",
        "sessions.jsonl",
    }


def test_classes_are_learnt_where_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, colour in (("cold", (20, 20, 220)), ("warm", (220, 20, 20))):
        Path("images", name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (9, 12), colour).save(f"images/{name}/{index}.png")
    command = _train(Path("images"), "--classes", "--disable-images", "--disable-tensorboard")
    learning = ["model.prediction=v", "train.lr=4e-3", "train.ema_decay=0.9", "train.steps=60"]
    assert main([*command, *learning, "--debug"]) == 0
    assert palette.load("birds.safetensors", device="cpu").config.model.num_classes == 2
    drawn = ["predict", "birds.safetensors", "-o", "out"]
    for label, (high, low) in enumerate(((2, 0), (0, 2))):
        assert main([*drawn, "-n", str(label), "--label", str(label)]) == 0
        with Image.open(f"out/{label}_000000.png") as picture:
            mean = np.asarray(picture).mean((0, 1))
            assert json.loads(picture.text["palette"])["label"] == label
        assert mean[high] > mean[low] + 60
    capsys.readouterr()
    assert main([*drawn, "--label", "2"]) == 2
    assert "found 2; the model has classes 0 to 1" in capsys.readouterr().err


MISTAKES = {
    "missing folder": (["--name", "a", "--images", "no"], "no: no such folder"),
    "empty folder": (["--name", "a", "--images", "empty"], "empty: no image"),
    "existing file": (["--name", "there", "--images", "empty"], "there.safetensors: exists"),
    "name that leads elsewhere": (["--name", "a/b", "--images", "empty"], "--name: found 'a/b'"),
    "no class": (["--name", "a", "--images", "empty", "--classes"], "empty: no folder in it"),
    "classes of a config": (["-c", "x.yaml", "--classes"], "--classes: goes with --images"),
    "no name": (["--images", "empty"], "--images: wants --name"),
    "no folder": (["--name", "a"], "--name: goes with --images"),
    "epochs of a config": (["-c", "x.yaml", "-e", "3"], "--epochs: goes with --images"),
    "folder and config": (["-c", "x", "--name", "a", "--images", "empty"], "goes without -c"),
    "schedule": (["--name", "a", "--images", "empty", "-s", "curved"], "schedule.name"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("there.safetensors").touch()
    arguments, words = MISTAKES[name]
    assert main(["train", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not Path("runs").exists()


def test_a_prefix_stays_in_the_folder(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", str(trained / "birds.safetensors"), "-o", str(tmp_path / "out")]
    assert main([*arguments, "-n", "../bird"]) == 2
    assert "--name: found '../bird'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
