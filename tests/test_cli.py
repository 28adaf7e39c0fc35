"""The command line from training to a written picture, and one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from palette.cli import main

TINY = """
run: {dir: RUN}
model: {channels: 32, channel_mults: [1, 2], res_blocks: 1, attention_resolutions: [8]}
task: {name: inpaint, mask: center}
data: {image_size: 16, batch_size: 4, validation: 4, samples_per_epoch: 64}
train: {steps: 4, save_every: 2, log_every: 1, sample_every: 2, precision: float32}
sample: {steps: 2, count: 2}
summary: {crops: 3, samples: 2}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory trained through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    config = folder / "tiny.yaml"
    config.write_text(TINY.replace("RUN", str(folder / "run")))
    assert main(["train", "-c", str(config), "--debug"]) == 0
    return folder / "run"


@pytest.fixture
def photo(tmp_path) -> tuple[Path, Path]:
    """A photograph and its mask."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    hole = np.zeros((90, 120), np.uint8)
    hole[20:60, 30:70] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(hole).save(tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


def test_a_run_leaves_everything_it_promises(run):
    for name in ("grid.png", "strip.png", "process.gif", "loss.png", "summary.md"):
        assert (run / name).stat().st_size > 0, name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert [line["step"] for line in losses] == [1, 2, 3, 4]
    assert {"step", "loss", "samples", "lr", "seconds"} <= losses[0].keys()
    summary = json.loads((run / "summary.json").read_text())
    assert len(summary["quality"]) == 4
    assert summary["speed"]["fused, float32"]["largest difference"] < 0.1


def test_sample_fills_the_hole_and_nothing_else(run, photo, tmp_path, capsys):
    picture, mask = photo
    arguments = ["sample", str(run), "--input", str(picture), "--mask", str(mask)]
    arguments += ["--output", str(tmp_path / "out"), "--steps", "2", "--seed", "7", "--reuse", "2"]
    assert main(arguments) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == tmp_path / "out" / "photo.png"
    with Image.open(written) as result:
        record = json.loads(result.text["palette"])
        after = np.asarray(result.convert("RGB"))
    before, hole = np.asarray(Image.open(picture)), np.asarray(Image.open(mask))
    assert (after[hole == 0] == before[hole == 0]).all()
    assert (after[hole > 0] != before[hole > 0]).any()
    assert record["seed"] == 7
    assert record["steps"] == 2
    assert record["reuse"] == 2
    assert len(record["weights"]) >= 12


def test_sample_takes_folders_and_several_samples(run, photo, tmp_path, capsys):
    picture, mask = photo
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.png").write_bytes(picture.read_bytes())
    inputs = [str(tmp_path / "one"), str(tmp_path / "two")]
    arguments = ["sample", str(run), "--input", *inputs, "--mask", str(mask), "--steps", "1"]
    assert main([*arguments, "--output", str(tmp_path / "out"), "-n", "2"]) == 0
    written = [Path(line).name for line in capsys.readouterr().out.split()]
    assert written == ["same_0.png", "same_1.png", "same~2_0.png", "same~2_1.png"]


def _config(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("RUN", str(tmp_path / "run")))
    return ["train", "-c", str(path)]


def _folder(tmp_path: Path, files: dict[str, bytes]) -> list[str]:
    (tmp_path / "images").mkdir()
    for name, content in files.items():
        (tmp_path / "images" / name).write_bytes(content)
    chosen = ["--set", "data.source=folder", f"data.path={tmp_path / 'images'}"]
    return [*_config(tmp_path, TINY), *chosen]


MISTAKES = {
    "unknown key": (lambda p: _config(p, "data: {bacth_size: 3}"), 2, "batch_size"),
    "wrong type": (lambda p: _config(p, "train: {steps: many}"), 2, "train.steps"),
    "negative number": (lambda p: _config(p, "train: {lr: -1}"), 2, "train.lr"),
    "broken YAML": (lambda p: _config(p, "train: {steps: 3"), 2, "config.yaml"),
    "missing config": (lambda p: ["train", "-c", str(p / "no.yaml")], 2, "no.yaml"),
    "no config": (lambda p: ["train"], 2, "-c CONFIG"),
    "missing folder": (
        lambda p: [*_config(p, TINY), "--set", "data.source=folder", f"data.path={p / 'no'}"],
        2,
        "no such folder",
    ),
    "empty folder": (lambda p: _folder(p, {}), 2, "no image"),
    "corrupt images": (
        lambda p: _folder(p, {f"{i}.jpg": b"\xff\xd8\xffnothing" for i in range(12)}),
        1,
        "images tried can be read",
    ),
    "no such model": (
        lambda p: ["sample", str(p / "no"), "--input", "a.png", "--output", str(p)],
        1,
        "no such checkpoint",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_the_right_exit_code(name, tmp_path, capsys):
    arguments, code, words = MISTAKES[name]
    assert main(arguments(tmp_path)) == code
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("palette: ")
    assert message.count("\n") == 1


def test_a_run_is_not_overwritten(run, capsys):
    config = run.parent / "tiny.yaml"
    assert main(["train", "-c", str(config)]) == 2
    assert "--resume" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named(run, photo, tmp_path, capsys):
    newest = sorted((run / "checkpoints").iterdir())[-1]
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in newest.iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "ema.safetensors":
            content[len(content) // 2] ^= 1
        (copy / file.name).write_bytes(content)
    arguments = ["sample", str(copy), "--input", str(photo[0]), "--mask", str(photo[1])]
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert "ema.safetensors" in message
    assert message.count("\n") == 1


def test_dry_run_prints_the_config_and_writes_nothing(tmp_path, capsys):
    arguments = _config(tmp_path, TINY)
    assert main([*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "image_size: 16" in printed
    assert "8x8" in printed
    assert not (tmp_path / "run").exists()


def test_info_names_every_op_and_the_reason_of_each_absence(capsys):
    from palette import ops

    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["ops"]) == set(ops.names())
    for row in found["ops"].values():
        assert "reference" in row["available"]
        assert all(reason for reason in row["absent"].values())
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
