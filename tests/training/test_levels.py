from __future__ import annotations

import pytest
import torch

from palette.diffusion.schedule import Schedule
from palette.ops import philox
from palette.training.levels import LevelLosses


@pytest.fixture
def schedule() -> Schedule:
    return Schedule.from_name("linear", 2000)


def test_every_level_is_a_quarter_of_the_draws(schedule: Schedule) -> None:
    draws = philox.uniform(torch.arange(20_000), (2,), stream=philox.NOISE_LEVEL)
    gamma = schedule.draw(draws[:, 0], draws[:, 1])
    losses = LevelLosses(schedule)
    sums = losses.of(torch.ones(20_000), gamma)
    assert sums[0].tolist() == sums[1].tolist()
    assert sums[1].sum() == 20_000
    assert all(abs(count - 5000) < 300 for count in sums[1].tolist())


def test_means_are_of_all_that_was_added_since_the_last_call(schedule: Schedule) -> None:
    losses = LevelLosses(schedule)
    least, most = schedule.range[1], schedule.range[0]
    gamma = torch.tensor([least, most, most], dtype=torch.float32)
    assert losses.take() == {}
    losses.add(losses.of(torch.tensor([0.5, 1.0, 2.0]), gamma))
    losses.add(losses.of(torch.tensor([1.5]), gamma[:1]))
    assert losses.take() == {"loss_level_1": 1.0, "loss_level_4": 1.5}
    assert losses.take() == {}
