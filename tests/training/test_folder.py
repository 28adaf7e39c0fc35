"""What the options of small DDPM projects mean as a config."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from palette.build import build_schedule
from palette.training.folder import Plan, configure


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan for 65 pictures, with nothing said that has a default."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(65):
        Image.new("RGB", (4, 4)).save(folder / f"{index}.png")
    return Plan("birds", folder)


def test_defaults_are_those_of_ho_et_al(plan: Plan) -> None:
    config = configure(plan)
    schedule = config.schedule
    assert (schedule.name, schedule.steps) == ("linear", 1000)
    assert (schedule.start, schedule.end) == (1e-4, 0.02)
    assert (config.data.batch_size, config.data.image_size, config.train.lr) == (64, 64, 2e-4)
    assert (config.run.dir, config.task.name) == ("runs/birds", "generate")


def test_an_epoch_sees_every_image(plan: Plan) -> None:
    train = configure(plan).train
    assert (train.steps, train.save_every, train.process_every) == (200, 2, 2)
    train = configure(plan, ["data.batch_size=10", "train.steps=3"]).train
    assert (train.steps, train.save_every, train.process_every) == (3, 7, 7)


@pytest.mark.parametrize("steps", [2, 50, 100, 4000])
def test_any_number_of_timesteps_ends_in_the_same_noise(plan: Plan, steps: int) -> None:
    given = Plan("birds", plan.images, timesteps=steps)
    assert build_schedule(configure(given)).gammas[-1] < 1.5e-3
