"""TensorBoard and Weights & Biases: the same numbers and pictures, and no way to stop a run."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from palette.config import from_yaml
from palette.training import boards
from palette.training.boards import WANDB_ID, open_boards

ONCE = ("train.steps=6", "train.log_every=2", "train.sample_every=6")


class Fake(ModuleType):
    """What of ``wandb`` is used, written down."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.fails: dict[str, Exception] = {}
        self.hangs = threading.Event()
        self.hangs.set()

    Settings = SimpleNamespace

    def init(self, **settings: Any) -> Fake:
        self._meet("init")
        self.begun.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def Image(self, sheet: Image.Image) -> tuple[str, tuple[int, int]]:  # noqa: N802 - as in wandb
        return "image", sheet.size

    def log(self, record: dict[str, Any]) -> None:
        self._meet("log")
        self.logged.append(record)

    def finish(self) -> None:
        self._meet("finish")
        self.finished += 1

    def _meet(self, name: str) -> None:
        self.hangs.wait()
        if name in self.fails:
            raise self.fails[name]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_both_boards_get_what_the_run_writes(tmp_path: Path, tiny: ModuleType, wandb: Fake) -> None:
    tiny.build(tmp_path, (*ONCE, "run.wandb=pictures")).fit()
    scalars = [record for record in wandb.logged if "samples" in record and "seconds" in record]
    assert scalars == lines(tmp_path)
    assert {"loss", "loss_level_1", "grad_norm", "lr", "samples_per_second"} <= set(scalars[0])
    with Image.open(tmp_path / "samples" / "step_00000006.png") as sheet:
        assert {"step": 6, "grids/samples": ("image", sheet.size)} in wandb.logged
        assert sheet.width == 4 * 98 - 2  # input, sample, raw, truth
    [begun], name = wandb.begun, (tmp_path / WANDB_ID).read_text()
    assert (begun["project"], begun["id"], begun["resume"]) == ("pictures", name, "allow")
    assert begun["config"]["train"]["steps"] == 6
    assert wandb.finished == 1
    tensorboard = EventAccumulator(str(tmp_path / "tensorboard"))
    tensorboard.Reload()
    for key in set(scalars[0]) - {"step"}:
        kept = tensorboard.Scalars(key)
        having = [line for line in scalars if key in line]
        assert [event.step for event in kept] == [line["step"] for line in having]
        assert [event.value for event in kept] == pytest.approx([line[key] for line in having])
    assert [event.step for event in tensorboard.Images("samples")] == [6]


def test_a_run_taken_up_again_is_the_same_run(
    tmp_path: Path, tiny: ModuleType, wandb: Fake
) -> None:
    sets = ("train.sample_every=0", "run.wandb=pictures")
    tiny.build(tmp_path, (*sets, "train.steps=1")).fit()
    tiny.build(tmp_path, (*sets, "train.steps=2")).fit("auto")
    first, second = wandb.begun
    assert first["id"] == second["id"]
    assert [record["step"] for record in wandb.logged] == [1, 2]


@pytest.mark.parametrize("moment", ["init", "log", "finish", "import"])
def test_a_failure_is_one_line_and_the_run_goes_on(
    tmp_path: Path,
    tiny: ModuleType,
    wandb: Fake,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    wandb.fails[moment] = ConnectionError("no route to host\nand more")
    reason = "no route to host"
    if moment == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
        reason = (
            'import of wandb halted; None in sys.modules; pip install "palette-diffusion[wandb]"'
        )
    sets = ("train.steps=2", "train.sample_every=0", "run.wandb=pictures")
    assert tiny.build(tmp_path, sets).fit().name == "step_00000002"
    said = [line for line in capsys.readouterr().out.splitlines() if "Weights & Biases" in line]
    assert said == [f"run.wandb=pictures: not sent to Weights & Biases: {reason}"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_one_that_hangs_is_not_waited_for(
    tmp_path: Path, tiny: ModuleType, wandb: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boards, "FINISH", 0.01)
    monkeypatch.setattr(boards, "_AHEAD", 1)
    wandb.hangs.clear()
    sets = ("train.steps=3", "train.sample_every=0", "run.wandb=pictures")
    tiny.build(tmp_path, sets).fit()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    [thread] = [each for each in threading.enumerate() if each.name == "wandb"]
    assert thread.daemon
    wandb.hangs.set()


def test_nothing_unless_asked(tmp_path: Path, tiny: ModuleType, wandb: Fake) -> None:
    config = from_yaml(tiny.OPTIONS, overrides=[f"run.dir={tmp_path}", "run.tensorboard=false"])
    assert open_boards(config, 0, print) == []
    assert wandb.begun == []
    assert list(tmp_path.iterdir()) == []


def test_without_tensorboard(
    tmp_path: Path, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = from_yaml(tiny.OPTIONS, overrides=[f"run.dir={tmp_path}"])
    assert open_boards(config, 0, print) == []
