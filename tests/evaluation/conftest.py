"""An evaluation folder with hostile names, and a model of no worth to evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage import data

from palette.cli import main
from palette.metrics.folders import score_folders

INPUTS, COPIES, SIDE = 6, 3, 40
HOSTILE = '</script><img src="https://example.com/x.png" onerror="alert(1)">\udcff\u202e'

TINY = """
run: {dir: RUN}
model: {channels: 32, channel_mults: [1, 1], res_blocks: 1, attention_resolutions: [8]}
task: {name: inpaint, mask: center}
data: {image_size: 16, batch_size: 4, validation: 7, samples_per_epoch: 64}
train: {steps: 4, save_every: 2, log_every: 1, sample_every: 0, precision: float32,
  ema_decays: [0.5], swa_start: 2}
sample: {steps: 2, count: 2}
"""


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs with a hole, their truth, masks and blurred samples, scored."""
    folder = tmp_path_factory.mktemp("evaluation")
    for kind in ("inputs", "truth", "masks", "samples"):
        (folder / kind).mkdir()
    photograph = Image.fromarray(data.astronaut())
    hole = Image.new("L", (SIDE, SIDE))
    hole.paste(255, (10, 10, 30, 30))
    noise = np.random.RandomState(0).randint(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    names = {}
    for i in range(INPUTS):
        truth = photograph.crop((60 * i, 20, 60 * i + 200, 220)).resize((SIDE, SIDE))
        given = truth.copy()
        given.paste(Image.fromarray(noise), mask=hole)
        pictures = {"inputs": given, "truth": truth, "masks": hole}
        for kind, picture in pictures.items():
            picture.save(folder / kind / f"{i:05d}.png")
        for copy in range(COPIES):
            sample = truth.copy()
            sample.paste(truth.filter(ImageFilter.GaussianBlur(1 + copy + i % 3)), mask=hole)
            sample.save(folder / "samples" / f"{i:05d}_{copy}.png")
        names[f"{i:05d}"] = HOSTILE if i == 0 else f"photo_{i}.jpg"
    (folder / "names.json").write_text(json.dumps(names))
    settings = {"task": "inpaint", "checkpoint": "runs/x", "digest": "0123abcd", "seed": 7}
    settings |= {"steps": 25, "solver": "dpmpp_2m", "command": ["palette", "evaluate", "a b"]}
    (folder / "evaluation.json").write_text(json.dumps(settings))
    scores = score_folders(folder / "samples", folder / "truth", masks=folder / "masks")
    found = json.loads(scores.to_json(per_image=True))
    found["paper"] = {
        "table": "T9",
        "setting": "128x128 in the middle of 256x256",
        "data": "ImageNet ctest10k",
        "rows": [{"method": "Palette", "values": {"fid": 6.6, "pd": 59.5}}],
        "differences": [{"what": "images", "here": "6", "paper": "10000"}],
    }
    (folder / "scores.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Its run directory."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = folder / "tiny.yaml"
    config.write_text(TINY.replace("RUN", str(folder / "run")))
    assert main(["train", "-c", str(config), "--debug"]) == 0
    return folder / "run"


class _Always(torch.nn.Module):
    def __init__(self, label: int, classes: int) -> None:
        super().__init__()
        self.answer = torch.nn.Parameter(torch.eye(classes)[label : label + 1])

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.answer.expand(len(pictures), -1)


@pytest.fixture
def classifier(tmp_path: Path) -> Callable[[int, int], str]:
    """File of a classifier that has one answer to every picture: ``classifier(label, classes)``."""

    def classifier(label: int, classes: int) -> str:
        path = tmp_path / f"{label}-of-{classes}.pt"
        torch.jit.save(torch.jit.script(_Always(label, classes)), path)
        return str(path)

    return classifier
