"""The script that measures quality against evaluations, on a network that has learned nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from palette import checkpoint
from palette import config as configs
from palette.build import build_network

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quality.py"
TINY = """
model: {channels: 32, channel_mults: [1, 1], res_blocks: 1, attention_resolutions: [4]}
task: {mask: center}
data: {image_size: 8, validation: 4}
train: {precision: float32}
"""
# Of 260 steps of the published kind the first fall below the range of a training of 2000.
ARGUMENTS = ["--crops", "2", "--batch", "3", "--draws", "2", "--evaluations", "2", "25"]
ARGUMENTS += ["--reuse", "2", "--published", "260"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    config = configs.from_yaml(TINY)
    torch.manual_seed(0)
    network = build_network(config)
    with torch.no_grad():  # the zero-initialised output would make every answer the same
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return checkpoint.export(path, network.state_dict(), configs.to_yaml(config), {})


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quality"]


def test_a_table_a_plot_and_rows_that_are_kept(script, model, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(model), "--output", str(out), *ARGUMENTS]
    assert script.main(arguments) == 0
    found = json.loads((out / "quality.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert len(rows) == 2 + 5 * 2 + 1
    assert "random-conv" in found["features"]
    assert (out / "quality.png").stat().st_size > 10_000
    with Image.open(out / "quality_samples.png") as samples:
        assert samples.size == (2 * 8 * 4, 2 * 8 * 5)  # 4 crops; truth, reference, three solvers
    assert (out / "quality.md").read_text() in capsys.readouterr().out

    below = found["below_the_trained_range"]
    whole, shortened = rows["ddpm-260-published"], rows[f"ddpm-{260 - below['left_out']}-trained"]
    assert 0 < below["left_out"] < 100
    assert shortened["from"] == whole["name"]
    assert whole["more"] == 0
    # The same noise: next to the distance of another sample the rest is nothing.
    assert 0 < below["apart"] < 0.05 * below["another_sample"]

    cached, plain = rows["dpmpp_2m-25-reuse2"], rows["dpmpp_2m-25"]
    assert cached["cost"] == pytest.approx(13 + 12 * found["shallow_share"])
    assert 0.1 < found["shallow_share"] < 0.9
    assert cached["from"] == plain["name"]
    assert cached["apart"] > 0
    assert plain["error"] > 1

    files = sorted(out.glob("rows-*/*.npz"))
    assert len(files) == len(rows)
    files[3].unlink()
    assert script.main(arguments) == 0
    again = capsys.readouterr().out
    assert again.count("…") == 1
    assert files[3].stem in again
    for row in json.loads((out / "quality.json").read_text())["rows"]:
        assert {**row, "ms": 0} == {**rows[row["name"]], "ms": 0}


def test_mistakes_are_one_line(script, model, tmp_path, capsys):
    for arguments in ([tmp_path / "none"], [model, "--crops", "1"]):
        assert script.main([*map(str, arguments), "--output", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("quality: ")
        assert said.count("\n") == 1


def test_more_crops_than_were_held_out_are_refused(script, model, tmp_path, capsys):
    arguments = [str(model), "--output", str(tmp_path), "--crops", "5"]
    assert script.main(arguments) == 2
    assert "--crops 5: wants at most the 4 that the run held out" in capsys.readouterr().err
