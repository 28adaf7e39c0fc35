"""The paper's figures as data, and its experiments by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from palette import config as configs
from palette.cli import main
from palette.data.tasks import TASKS
from palette.evaluation import paper
from palette.evaluation.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_or_says_what_is_missing(name, capsys):
    preset = PRESETS[name]
    code = main(["evaluate", "--preset", name, "--dry-run"])
    shown = capsys.readouterr()
    tasks = {
        override.partition("=")[2]
        for override in (*preset.training, *preset.evaluation)
        if override.startswith("task.name=")
    }
    if tasks <= TASKS.keys():
        assert code == 0
        assert f"* {preset.method}: " in shown.out
        trained = configs.from_sections({}, overrides=preset.training)
        assert trained.data.image_size == 256
        assert trained.run.dir == f"runs/{preset.model}"
    else:
        assert code == 2
        assert shown.err.count("\n") == 1
        assert any(task in shown.err for task in tasks)


def test_a_preset_scores_by_the_papers_protocol(capsys):
    assert main(["evaluate", "--preset", "inpaint-imagenet-20-30", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "mask: free_form_20_30",
        "path: lists/imagenet_ctest10k.txt",
        "the first 10000",
        "solver: ddpm",
        "steps: 1000",
        "end: 0.09",
        "FID 5.2, IS 208.6, CA [%] 72.6, PD 27.4",
    ):
        assert line in shown, line
    arguments = ["evaluate", "--preset", "colorize-regression", "--dry-run"]
    assert main([*arguments, "--limit", "7", "--set", "data.path=mine.txt"]) == 0
    shown = capsys.readouterr().out
    for line in ("prediction: regression", "steps: 1", "the first 7", "path: mine.txt"):
        assert line in shown, line


def test_a_regression_is_not_asked_for_steps(tmp_path, capsys):
    arguments = ["evaluate", "--preset", "colorize-regression", "--dry-run"]
    assert main([*arguments, "--set", "sample.steps=25"]) == 2
    assert "sample.steps must be 1 with model.prediction=regression" in capsys.readouterr().err


def test_training_by_preset_takes_overrides(tmp_path, capsys):
    small = [
        f"run.dir={tmp_path / 'run'}",
        "model.channels=32",
        "model.channel_mults=[1,1]",
        "model.head_channels=32",
        "data.source=photos",
        "data.image_size=16",
    ]
    assert main(["train", "--preset", "colorize-l1", "--dry-run", "--set", *small]) == 0
    shown = capsys.readouterr().out
    assert "loss: l1" in shown
    assert "steps: 1000000" in shown
    assert "channels: 32" in shown
    assert main(["train", "--preset", "no"]) == 2
    assert "--preset no: unknown; there are colorize-5k, " in capsys.readouterr().err


def test_a_regression_from_training_to_scores(tmp_path):
    photos = ["data.source=photos", "data.validation=3"]
    small = [
        f"run.dir={tmp_path / 'run'}",
        "model.channels=32",
        "model.channel_mults=[1,1]",
        "model.res_blocks=1",
        "model.head_channels=32",
        "data.image_size=16",
        "data.batch_size=4",
        "data.workers=0",
        "train.steps=2",
        "train.sample_every=2",
    ]
    preset = ["--preset", "colorize-regression"]
    assert main(["train", *preset, "--set", *small, *photos]) == 0
    output = tmp_path / "out"
    arguments = ["evaluate", str(tmp_path / "run"), *preset, "--output", str(output)]
    assert main([*arguments, "--samples-per-input", "2", "--set", *photos]) == 0
    plan = json.loads((output / "evaluation.json").read_text())
    assert plan["steps"] == 1
    assert plan["task"] == "colorize"
    found = json.loads((output / "scores.json").read_text())
    assert found["paper"]["table"] == "T1"
    # one answer, whatever the seed
    assert found["scores"]["diversity_ms_ssim"]["value"] == 1
    assert found["scores"]["diversity_lpips_random"]["value"] == 0


def test_the_papers_figures():
    assert paper.TABLES["colorize"].palette.values == {
        "fid": 15.78,
        "is": 200.8,
        "ca": 72.5,
        "pd": 46.2,
        "fool": 47.80,
    }
    assert paper.TABLES["uncrop-places"].palette.values == {"fid": 3.53, "pd": 103.3}
    assert paper.TABLES["attention"].palette.values == {"fid": 7.4, "is": 164.8, "pd": 67.1}
    for table in paper.TABLES.values():
        methods = [row.method for row in table.rows]
        assert len(set(methods)) == len(methods)
        for row in table.rows:
            assert row.values.keys() <= paper.METRICS.keys()
        original = table.rows[-1]
        if original.method == "original images" and table.key != "uncrop-top50":
            assert original.values["pd"] == 0
            assert all(original.values["fid"] <= row.values["fid"] for row in table.rows)
    assert {preset.method for preset in PRESETS.values()} >= {"Regression", "Palette (L1)"}


def test_the_setting_nearest_to_a_task():
    assert paper.nearest("inpaint", {"mask": "center"}).key == "inpaint-center"
    assert paper.nearest("inpaint", {"mask": "free_form_10_20"}).key == "inpaint-10-20"
    assert paper.nearest("uncrop", {"mask": "uncrop"}).key == "uncrop"
    assert paper.nearest("restore_jpeg", {"quality": 20}).key == "restore_jpeg-20"
    assert paper.nearest("restore_jpeg", {"quality": None}).key == "restore_jpeg-5"
    assert paper.nearest("paired", {}) is None


def test_the_readme_shows_the_papers_figures():
    text = (Path(__file__).parents[2] / "README.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    shown = {row[0].strip(" `"): row[2:] for row in rows if row[0].strip(" `") in PRESETS}
    assert len(shown) >= 15
    for name, cells in shown.items():
        preset = PRESETS[name]
        values = next(r.values for r in preset.figures.rows if r.method == preset.method)
        for metric, cell in zip(("fid", "is", "ca", "pd"), cells, strict=True):
            figure = cell.partition("/")[0].strip()
            assert figure == (f"{values[metric]:g}" if metric in values else "")
