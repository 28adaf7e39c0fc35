"""Pictures of the process: where they are due, by which weights, and nothing else disturbed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from palette import config as configs
from palette.build import build_network
from palette.config import Config, ConfigError
from palette.training.distributed import World
from palette.training.interrupts import Interrupts
from palette.training.logging import RunLog
from palette.training.process import FRAMES, Process

OPTIONS = """
model: {channels: 32, channel_mults: [1], res_blocks: 1, num_classes: 2}
task: {name: generate}
data: {source: classes, path: nowhere, image_size: 8}
train: {precision: float32, process_every: 2}
sample: {steps: 3, count: 3, guidance: 2}
"""
CPU = torch.device("cpu")


def _process(config: Config, rank: int = 0) -> Process:
    torch.manual_seed(0)
    networks = {"ema": build_network(config).eval(), "raw": build_network(config).train()}
    for network in networks.values():
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.1)
    return Process(config, networks, World(rank, 1, CPU), torch.float32)


def _draw(process: Process, step: int, folder: Path, interrupts: Interrupts) -> bool:
    log = RunLog(folder, 0, 10)
    try:
        return process.draw(step, log, interrupts)
    finally:
        log.close()


def test_draws_when_due_and_the_same_each_time(tmp_path: Path) -> None:
    process = _process(configs.from_yaml(OPTIONS))
    assert not _draw(process, 3, tmp_path / "a", Interrupts())
    assert not (tmp_path / "a" / "process").exists()
    generator = torch.get_rng_state()
    for folder in ("a", "b"):
        assert _draw(process, 4, tmp_path / folder, Interrupts())
    assert torch.get_rng_state().equal(generator)
    assert process.networks["raw"].training
    for name in ("samples/step_00000004.png", "process/step_00000004_raw.gif"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with Image.open(tmp_path / "a" / "samples" / "step_00000004.png") as sheet:
        pixels = np.asarray(sheet)[14:, :]
    averaged, raw = pixels[:, :96], pixels[:, 98:]
    assert (averaged != raw).mean() > 0.02


def test_long_processes_are_shown_in_part(tmp_path: Path) -> None:
    process = _process(configs.from_yaml(OPTIONS, overrides=["sample.steps=60", "sample.count=1"]))
    assert _draw(process, 2, tmp_path, Interrupts())
    with Image.open(tmp_path / "process" / "step_00000002_ema.gif") as gif:
        assert 20 < gif.n_frames <= FRAMES + 10 < 60
    with Image.open(tmp_path / "process" / "step_00000002.png") as plot:
        assert plot.width == 10 * 98 - 2


def test_others_and_the_interrupted_draw_nothing(tmp_path: Path) -> None:
    config = configs.from_yaml(OPTIONS)
    stopped = Interrupts()
    stopped.signal = 15
    assert not _draw(_process(config), 2, tmp_path, stopped)
    assert not _draw(_process(config, rank=1), 2, tmp_path, Interrupts())
    never = dataclasses.replace(config, train=dataclasses.replace(config.train, process_every=0))
    assert not _draw(_process(never), 2, tmp_path, Interrupts())


def test_a_signal_stops_the_drawing(tmp_path: Path) -> None:
    class Later(Interrupts):
        """A signal comes when it has been asked for three times."""

        asked = 0

        @property
        def signal(self) -> int:
            self.asked += 1
            return 15 if self.asked > 3 else 0

        @signal.setter
        def signal(self, number: int) -> None: ...

    stopped = Later()
    assert not _draw(_process(configs.from_yaml(OPTIONS)), 2, tmp_path, stopped)
    assert stopped.asked == 4
    assert not (tmp_path / "process").exists()


def test_only_what_is_generated_has_such_pictures() -> None:
    with pytest.raises(ConfigError, match="process_every must be 0 unless task"):
        configs.from_yaml(OPTIONS, overrides=["task.name=colorize", "model.num_classes=null"])
