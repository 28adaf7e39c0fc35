"""Killed inside a step and taken up again: every task, precision and number of workers, to the bit.

Each run is killed from within, between the optimizer's step and that of the average, so that the
machine's speed decides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from palette import _durable
from palette import checkpoint as checkpoints
from palette.cli import main

SETS = ("train.steps=6", "train.save_every=2", "train.sample_every=0", "train.keep=100")
TASKS = {
    "inpaint": ("task.mask=free_form",),
    "uncrop": ("task.name=uncrop", "task.mask=auto"),
    "colorize": ("task.name=colorize", "task.mask=auto"),
    "restore_jpeg": ("task.name=restore_jpeg", "task.mask=auto"),
    "upscale": ("task.name=upscale", "task.mask=auto"),
    "generate": ("task.name=generate", "task.mask=auto"),
    "mixture": ("task.name=mixture", "task.tasks=[inpaint,colorize]", "task.mask=auto"),
}
HOW = {
    "float32": (),
    "bfloat16": ("train.precision=bfloat16",),
    "accumulated": ("train.accumulate=2",),
    "scaled": (),
}
EACH = [
    ("inpaint", "bfloat16", 2),
    ("uncrop", "scaled", 0),
    ("colorize", "accumulated", 0),
    *((task, "float32", 0) for task in ("restore_jpeg", "upscale", "generate", "mixture")),
]
ALL = [(task, how, workers) for task in TASKS for how in HOW for workers in (0, 2, 4)]


def start(tiny: Any, run: Path, case: tuple[str, str, int]) -> Any:
    task, how, workers = case
    sets = (*SETS, *TASKS[task], *HOW[how], f"data.workers={workers}")
    trainer = tiny.build(run, sets)
    if how == "scaled":  # so that it grows between two checkpoints
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return trainer


def in_a_child(action: Callable[[], object]) -> int:
    """Run ``action`` in a fork of this process; its exit code, negative for a signal's."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_in(trainer: Any, step: int) -> None:
    """Train; SIGKILL comes in the middle of a step."""
    update = trainer.ema.update

    def last(**but: Any) -> None:
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        update(**but)

    trainer.ema.update = last
    trainer.fit()


def left(run: Path) -> tuple[Any, ...]:
    """Losses to the last bit, hashes of all weights, and the bytes of the rest."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = checkpoints.latest(run)
    files = found.meta["files"]
    trainer = {key: value for key, value in found.trainer.items() if key != "seconds"}
    return (
        [(line["step"], float(line["loss"]).hex()) for line in lines],
        [files[f"{name}.safetensors"]["sha256"] for name in ("model", "ema")],
        repr(as_bytes(trainer)),
    )


def as_bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: as_bytes(inner) for key, inner in value.items()}
    return [as_bytes(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    "cases", [EACH, pytest.param(ALL, marks=pytest.mark.soak)], ids=["each", "all"]
)
def test_killed_in_any_step_of_any_task(tmp_path: Path, tiny: Any, cases: list[Any]) -> None:
    draw, different = random.Random(0), []
    for number, case in enumerate(cases):
        straight, run = tmp_path / f"{number}" / "straight", tmp_path / f"{number}" / "run"
        start(tiny, straight, case).fit()
        step = draw.randrange(1, 7)
        trainer = start(tiny, run, case)
        assert in_a_child(lambda: kill_in(trainer, step)) == -signal.SIGKILL  # noqa: B023
        assert checkpoints.steps(run) or step <= 2
        start(tiny, run, case).fit("auto")
        if left(run) != left(straight):
            different.append((case, step))
    print(f"{len(cases)} resumes, {len(different)} differ")
    assert different == []


def test_the_scaler_goes_on_in_the_middle_of_its_interval(tmp_path: Path, tiny: Any) -> None:
    case = ("inpaint", "scaled", 0)
    trainer = start(tiny, tmp_path, case)
    assert in_a_child(lambda: kill_in(trainer, 6)) == -signal.SIGKILL
    saved = checkpoints.latest(tmp_path)
    assert saved.step == 4
    trainer = start(tiny, tmp_path, case)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=5)
    trainer._restore(saved)
    state = trainer.scaler.state_dict()
    assert state == saved.trainer["scaler"]
    assert (state["scale"], state["growth_interval"], state["_growth_tracker"]) == (2.0**11, 3, 1)


def test_an_overflow_halves_the_scale_and_applies_nothing(tmp_path: Path, tiny: Any) -> None:
    trainer = start(tiny, tmp_path, ("inpaint", "scaled", 0))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)
    weights: list[Any] = []
    trainer.dataset.disturb = lambda *_: weights.append(as_bytes(trainer.network.state_dict()))
    trainer.fit()
    weights.append(as_bytes(trainer.network.state_dict()))
    applied = sum(before != after for before, after in itertools.pairwise(weights))
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    skipped = len(lines)
    assert skipped > 0
    assert applied + skipped == 6
    assert applied == trainer.ema.updates
    assert trainer.scaler.get_scale() == 2.0 ** (127 - skipped)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Path:
    """A run to which nothing happens."""
    run: Path = tmp_path_factory.mktemp("straight")
    start(tiny, run, ("inpaint", "float32", 0)).fit()
    return run


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("forward", signal.SIGTERM, 143),
        ("save", signal.SIGINT, 130),
        pytest.param("forward", signal.SIGINT, 130, marks=pytest.mark.soak),
        pytest.param("save", signal.SIGTERM, 143, marks=pytest.mark.soak),
    ],
)
def test_signals_in_other_moments(
    tmp_path: Path,
    tiny: Any,
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    number: int,
    code: int,
) -> None:
    case, run = ("inpaint", "float32", 0), tmp_path / "run"
    trainer = start(tiny, run, case)
    sent: list[int] = []

    def send(*_: Any) -> None:
        if trainer.step == 4 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    if moment == "forward":
        trainer.network.register_forward_pre_hook(send)
    else:
        flush = _durable.flush
        monkeypatch.setattr(checkpoints, "flush", lambda path: (send(), flush(path)))
    with pytest.raises(SystemExit) as caught:
        trainer.fit()
    assert caught.value.code == code
    assert checkpoints.latest(run).step == 5
    start(tiny, run, case).fit("auto")
    assert left(run) == left(straight)


def test_a_full_disk_ends_the_run_in_one_line(
    tmp_path: Path, tiny: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the command line, at the second checkpoint; then there is room again."""
    config, run = tmp_path / "tiny.yaml", tmp_path / "run"
    config.write_text(tiny.OPTIONS)
    command = ["train", "-c", str(config), "--resume", "auto", "--set", f"run.dir={run}", *SETS]
    command += ["summary.crops=0", "data.samples_per_epoch=30"]
    assert main([*command, "train.steps=3"]) == 0
    before = left(run)
    capfd.readouterr()

    def train_in_little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        os._exit(main(command))

    assert in_a_child(train_in_little_room) == 1
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert str(run / "checkpoints" / "step_00000004") in error
    assert os.strerror(errno.EFBIG) in error
    assert "bytes free" in error
    assert sorted(os.listdir(run / "checkpoints")) == ["step_00000002", "step_00000003"]
    assert checkpoints.latest(run).skipped == ()
    assert left(run)[1:] == before[1:]
    assert main(command) == 0
    assert [step for step, _ in left(run)[0]] == list(range(1, 7))
