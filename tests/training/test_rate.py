"""The learning rate of every schedule, against values worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import get_args, get_type_hints

import pytest

from palette import config as configs
from palette.config import ConfigError, Train
from palette.training.rate import learning_rate

NAMES = get_args(get_type_hints(Train)["lr_schedule"])


def train(name: str, **options: float) -> Train:
    return Train(lr_schedule=name, lr=1e-3, warmup=4, steps=104, **options)


def rates(options: Train, steps: list[int]) -> list[float]:
    return [learning_rate(step, options) / options.lr for step in steps]


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_warms_up_and_then_never_rises(name: str) -> None:
    options = train(name, lr_end=0.1, lr_every=10)
    assert rates(options, [0, 1, 2, 3, 4]) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    found = rates(options, list(range(4, 200)))
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    assert min(found) == pytest.approx(1.0 if name == "constant" else 0.1)


def test_constant_is_the_rate_itself() -> None:
    assert learning_rate(50, train("constant", lr_end=0.1)) == 1e-3
    assert learning_rate(0, Train()) == Train().lr


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("linear", [0.2 + 0.8 * 0.75, 0.6, 0.2 + 0.8 * 0.01, 0.2, 0.2]),
        ("cosine", [0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.2 + 0.4 * (1 - math.cos(0.01 * math.pi))]),
    ],
)
def test_falls_to_the_end_at_the_last_step(name: str, wanted: list[float]) -> None:
    found = rates(train(name, lr_end=0.2), [29, 54, 103, 104, 1000])
    assert found[: len(wanted)] == pytest.approx(wanted, rel=1e-12)
    assert found[2] > 0.2


def test_decays_by_the_factor() -> None:
    smooth = train("exponential", lr_factor=0.25, lr_every=20)
    assert rates(smooth, [4, 14, 24, 44]) == pytest.approx([1, 0.5, 0.25, 0.0625])
    held = train("step", lr_factor=0.25, lr_every=20, lr_end=0.1)
    assert rates(held, [4, 23, 24, 43, 44, 99]) == pytest.approx([1, 1, 0.25, 0.25, 0.1, 0.1])


def test_warm_up_as_long_as_the_run() -> None:
    for name in NAMES:
        options = Train(lr_schedule=name, lr=1.0, warmup=10, steps=10)
        assert learning_rate(9, options) == 1.0


def test_the_trainer_follows_it(tmp_path: Path, tiny: ModuleType) -> None:
    sets = ("train.steps=6", "train.sample_every=0", "train.lr_schedule=cosine", "train.lr_end=0.1")
    trainer = tiny.build(tmp_path, sets)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    wanted = [learning_rate(step, trainer.config.train) for step in range(6)]
    assert [line["lr"] for line in lines] == wanted
    assert trainer.optimizer.param_groups[0]["lr"] == wanted[-1] < 0.5e-3


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr_schedule must be one of constant, cosine"):
        configs.from_yaml("", overrides=["train.lr_schedule=cosin"])
    with pytest.raises(ConfigError, match=r"train\.lr_end must be a number, at least 0, at most 1"):
        configs.from_yaml("", overrides=["train.lr_end=2"])
