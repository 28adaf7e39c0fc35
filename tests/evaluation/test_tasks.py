"""Every task from training to its scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from palette.cli import main

TINY = """
run: {dir: RUN}
model: {channels: 32, channel_mults: [1, 1], res_blocks: 1, attention_resolutions: [8]}
data: {image_size: 16, batch_size: 2, validation: 2, samples_per_epoch: 64}
train: {steps: 1, sample_every: 0, precision: float32}
sample: {steps: 2}
"""


def evaluated(tmp_path: Path, training: list[str], scoring: list[str]) -> tuple[dict, dict]:
    """Plan and scores of a model trained for a step."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("RUN", str(tmp_path / "run")))
    assert main(["train", "-c", str(config), "--debug", "--set", *training]) == 0
    more = ["--set", *scoring] if scoring else []
    output = tmp_path / "out"
    arguments = ["--output", str(output), "--samples-per-input", "2", "--debug", *more]
    assert main(["evaluate", str(tmp_path / "run"), *arguments]) == 0
    files = (output / name for name in ("evaluation.json", "scores.json"))
    plan, scores = (json.loads(file.read_text()) for file in files)
    assert (output / "index.html").exists()
    assert len(list((output / "samples").iterdir())) == 4
    return plan, scores


@pytest.mark.parametrize(
    ("training", "scoring", "table"),
    [
        (["task.name=uncrop"], ["task.mask=right"], "T3"),
        (["task.name=restore_jpeg"], ["task.quality=10"], "T4"),
        (["task.name=upscale", "task.augmentation=0.5"], [], None),
        (["task.name=mixture"], [], None),
        (["task.name=mixture"], ["task.name=colorize"], "T1"),
        (
            ["task.name=mixture", "task.tasks=[inpaint,upscale]", "task.augmentation=0.5"],
            ["task.name=inpaint", "task.mask=center"],
            "T9",
        ),
    ],
)
def test_every_task_is_scored(tmp_path, training, scoring, table):
    plan, scores = evaluated(tmp_path, training, scoring)
    assert f"task.name={plan['task']}" in (*training, *scoring)
    assert plan["paired"]
    assert scores["scores"]["psnr"]["images"] == 4
    assert (scores["paper"] or {"table": None})["table"] == table


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_with_classes_is_scored_by_them(classifier, tmp_path):
    for name in ("cat/young", "dog"):
        folder = tmp_path / "classes" / name
        folder.mkdir(parents=True)
        for number in range(3):
            noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{number}.png")
    data = ["data.source=classes", f"data.path={tmp_path / 'classes'}", "model.num_classes=2"]
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("RUN", str(tmp_path / "run")))
    assert main(["train", "-c", str(config), "--debug", "--set", *data]) == 0
    output = ["--output", str(tmp_path / "out"), "--limit", "1"]
    labels = ["--labels", "folders", "--classifier", classifier(0, 2)]
    assert main(["evaluate", str(tmp_path / "run"), *output, *labels, "--debug"]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert scores["ca"]["value"] == 100


def test_what_is_made_from_nothing_has_no_truth_of_its_own(tmp_path):
    for name in ("cat", "dog"):
        folder = tmp_path / "classes" / name
        folder.mkdir(parents=True)
        for number in range(6):
            noise = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{name}{number}.png")
    training = ["task.name=generate", "model.num_classes=2", "data.source=classes"]
    training += [f"data.path={tmp_path / 'classes'}", "sample.guidance=2"]
    plan, scores = evaluated(tmp_path, training, [])
    assert not plan["paired"]
    assert plan["pictures"] == ["truth"]
    assert plan["guidance"] == 2
    assert scores["scores"]["fid_random"]["images"] == 4
    assert "psnr" not in scores["scores"]
    assert "no truth was given" in scores["absent"]["psnr"]
