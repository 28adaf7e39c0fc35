"""Schedules against the published tables, and the grids made from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from palette import ops
from palette.diffusion import schedule as schedules
from palette.diffusion.schedule import Schedule, betas, published, spaced

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = ("linear", "quad", "warmup10", "warmup50", "const", "jsd", "cosine")


@pytest.mark.parametrize("name", PUBLISHED)
def test_betas_equal_the_published_ones(name: str) -> None:
    golden = np.load(GOLDEN / "beta_schedules.npz")[name]
    assert np.array_equal(betas(name, 50, 1e-4, 0.09), golden)


def test_quadratic_is_quad_and_sigmoid_is_a_symmetric_ramp() -> None:
    assert np.array_equal(betas("quadratic", 30), betas("quad", 30))
    values = betas("sigmoid", 1001, 1e-4, 0.02)
    np.testing.assert_allclose(values + values[::-1], 1e-4 + 0.02, rtol=1e-12)
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose(values[[0, -1]], [1e-4, 0.02], rtol=0.5)


@pytest.mark.parametrize("file", ["palette_inpainting", "palette_colorization"])
def test_buffers_equal_the_published_tables_to_the_bit(file: str) -> None:
    golden = np.load(GOLDEN / f"{file}.npz")
    phases = json.loads(str(golden["config"]))["beta_schedule"]
    tables = {}
    for phase, options in phases.items():
        ends = (options.get("linear_start", 1e-6), options.get("linear_end", 1e-2))
        tables[phase] = Schedule.from_name(options["schedule"], options["n_timestep"], *ends)
    assert np.array_equal(tables["train"].buffers()["gammas"].numpy(), golden["train_gammas_table"])
    buffers = tables["test"].buffers()
    assert len(buffers) == 6
    for name, table in buffers.items():
        assert table.dtype == torch.float32
        assert np.array_equal(table.numpy(), golden[f"test_{name}"]), name


def test_published_gammas_at_full_length() -> None:
    train = Schedule.from_name("linear", 2000, 1e-6, 0.01).gammas
    test = Schedule.from_name("linear", 1000, 1e-4, 0.09).gammas
    np.testing.assert_allclose(train[[0, 1000, -1]], [0.999999, 0.08137463, 4.3859782e-5], 2e-7)
    np.testing.assert_allclose(
        test[[0, 100, 250, 500, -1]],
        [0.9999, 0.62752490, 0.05668294, 1.0174287e-5, 6.604e-21],
        rtol=2e-4,
    )


def test_published_levels_and_the_half_below_the_trained_range() -> None:
    train = Schedule.from_name("linear", 2000, 1e-6, 0.01)
    test = Schedule.from_name("linear", 1000, 1e-4, 0.09)
    levels = published(test)
    assert levels.shape == (1001,)
    assert levels[-1] == 1.0
    assert np.array_equal(levels[:-1], test.gammas[::-1])
    alive = published(test, lowest=train.range[0])
    assert len(levels) - len(alive) == 532
    assert np.array_equal(alive, levels[532:])
    with pytest.raises(ValueError, match="lowest is 1"):
        published(test, lowest=1.0)


@pytest.mark.parametrize("name", [*PUBLISHED, "sigmoid"])
@pytest.mark.parametrize("steps", [1, 2, 25, 1000])
def test_spaced_levels_are_uniform_in_log_snr_inside_the_trained_range(
    name: str, steps: int
) -> None:
    schedule = Schedule.from_name(name, 2000)
    low, high = schedule.range
    levels = spaced(schedule, steps)
    assert levels.shape == (steps + 1,)
    assert levels[0] == pytest.approx(low, rel=1e-12)
    assert levels[-1] == 1.0
    assert levels[:-1].min() >= low
    assert levels[:-1].max() <= high
    assert (np.diff(levels) > 0).all()
    log_snr = np.log(levels[:-1] / (1 - levels[:-1]))
    widths = np.diff(log_snr)
    np.testing.assert_allclose(widths, widths.mean() if steps > 1 else 0, rtol=1e-6)


def test_spaced_levels_may_go_up_to_the_last_one_trained() -> None:
    schedule = Schedule.from_name("linear", 2000)
    assert spaced(schedule, 9)[-2] == pytest.approx(0.9999)
    assert spaced(schedule, 9, highest=1.0)[-2] == pytest.approx(schedule.range[1], rel=1e-12)
    with pytest.raises(ValueError, match="highest is 1e-06, expected a level above"):
        spaced(schedule, 9, highest=1e-6)


def test_draws_are_uniform_in_gamma_between_neighbouring_steps() -> None:
    schedule = Schedule.from_name("linear", 10, 0.01, 0.3)
    table = schedule.buffers()["gammas"]
    count = 20_000
    draws = ops.philox.uniform(torch.arange(count), (2,), stream=4)
    gamma = schedule.draw(draws[:, 0], draws[:, 1])
    assert gamma.dtype == torch.float32
    assert gamma.shape == (count,)
    assert table[-1] <= gamma.min()
    assert gamma.max() <= table[0]
    # every one of the T - 1 intervals is as likely as the others, and uniform inside
    interval = (gamma[:, None] <= table).sum(1).clamp(1, 9)
    counts = torch.bincount(interval, minlength=10)[1:]
    assert (counts - count / 9).abs().max() < 5 * (count / 9) ** 0.5
    place = (gamma - table[interval - 1]) / (table[interval] - table[interval - 1])
    assert (place.mean() - 0.5).abs() < 0.02
    assert (place.std() - 12**-0.5).abs() < 0.01


def test_draws_at_the_ends_of_the_uniform_numbers() -> None:
    schedule = Schedule.from_name("linear", 10, 0.01, 0.3)
    table = schedule.buffers()["gammas"]
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(schedule.draw(ends, torch.zeros(2)), table[[0, 8]])
    assert torch.equal(schedule.draw(ends, torch.ones(2)), table[[1, 9]])
    silent = Schedule.from_name("jsd", 10)
    assert silent.gammas[-1] == 0.0
    assert (silent.draw(torch.ones(2), ends) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("liner", 10), "schedule name is 'liner', expected one of linear"),
        (("linear", 1), "steps is 1"),
        (("linear", 10, 0.0, 0.1), "start is 0.0"),
        (("linear", 10, 0.2, 0.1), "start is 0.2 and end is 0.1"),
        (("linear", 10, 1e-4, 1.0), "end is 1.0"),
        (("linear", 10, float("nan"), 0.1), "start is nan"),
        (("const", 10, 1e-4, -0.1), "end is -0.1"),
        (("cosine", 10, 1e-4, 0.1, 0.0), "cosine_offset is 0.0"),
    ],
)
def test_mistakes_are_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        betas(*arguments)


def test_only_what_a_schedule_uses_is_checked() -> None:
    assert betas("cosine", 10, -1.0, 7.0).shape == (10,)
    assert betas("jsd", 10, -1.0, 7.0).shape == (10,)
    assert betas("const", 10, -1.0, 0.1).shape == (10,)


@pytest.mark.parametrize(
    "gammas", [[0.5], [0.5, 0.6], [1.0, 0.5], [0.5, -0.1], [0.5, float("nan")]]
)
def test_gammas_that_are_no_schedule(gammas: list[float]) -> None:
    with pytest.raises(ValueError, match="gammas"):
        Schedule(np.array(gammas))
    with pytest.raises(ValueError, match="steps is 0"):
        spaced(Schedule.from_name("linear", 10), 0)


def test_every_name_is_listed() -> None:
    assert set(schedules.SCHEDULES) == {*PUBLISHED, "quadratic", "sigmoid"}
