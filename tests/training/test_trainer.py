"""The trainer: exact resume, signals, bad batches, accumulation, several processes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from palette import checkpoint as checkpoints
from palette.checkpoint import CheckpointError
from palette.config import ConfigError
from palette.training.trainer import MAX_BAD_STEPS, RunExists, TrainingFailed
from palette.training.validation import Scores

SCRIPT = Path(__file__).with_name("tiny_run.py")
ROOT = Path(__file__).parents[2]


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(run: Path) -> list[tuple[int, str, str]]:
    """Step, kind and value to the last bit of every loss and score recorded."""
    names = ("loss", "loss_level_1", "loss_level_4", "validation_loss", "validation_mae")
    return [
        (line["step"], name, float(line[name]).hex())
        for line in metrics(run)
        for name in names
        if name in line
    ]


def contents(run: Path) -> dict[str, Any]:
    """What must be equal after two runs: hashes of weights, optimizer, counters."""
    found = checkpoints.latest(run)
    files = found.meta["files"]
    trainer = {key: value for key, value in found.trainer.items() if key != "seconds"}
    return {
        **{name: facts for name, facts in files.items() if name.endswith(".safetensors")},
        "trainer": repr(_hashable(trainer)),
    }


def _hashable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _hashable(inner) for key, inner in value.items()}
    return [_hashable(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def spawn(run: Path, resume: str, *overrides: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), str(run), resume, *overrides]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def wait_for_lines(run: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(12000):
        if process.poll() is not None:
            raise AssertionError(f"the run ended with {process.returncode}")
        with contextlib.suppress(FileNotFoundError):
            if (run / "metrics.jsonl").read_text().count('"loss"') >= count:
                return
        time.sleep(0.01)
    raise AssertionError(f"not {count} lines in time")


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.accumulate=2", "train.log_every=3"),
        ("train.ema_decays=[0.5]", "train.swa_start=6", "train.lr_schedule=exponential"),
        ("train.precision=bfloat16", "data.workers=2"),
    ],
)
def test_killed_and_resumed_equals_never_killed(
    tmp_path: Path, tiny: ModuleType, overrides: tuple[str, ...]
) -> None:
    tiny.build(tmp_path / "straight", overrides).fit()
    run = tmp_path / "killed"
    process = spawn(run, "-", "train.steps=100000", "train.keep=100000", *overrides)
    wait_for_lines(run, 3 if "train.log_every=3" in overrides else 9, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in checkpoints.steps(run):  # on a busy machine the kill may come late
        if path.name > "step_00000008":
            checkpoints.remove(path)
    assert metrics(run)[-1]["step"] > 8
    tiny.build(run, overrides).fit("auto")
    assert losses(run) == losses(tmp_path / "straight")
    assert contents(run) == contents(tmp_path / "straight")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(
    tmp_path: Path, tiny: ModuleType, number: int, code: int
) -> None:
    sets = ("train.log_every=3",)  # step 5 lies between two lines of metrics
    tiny.build(tmp_path / "straight", sets).fit()
    trainer = tiny.build(tmp_path / "run", sets)
    before = signal.getsignal(number)
    # SIGTERM while a training sample is read; SIGINT while a validation sample is.
    if number == signal.SIGTERM:
        source, at = trainer.dataset, (0, 19)
    else:
        source, at = trainer.validation.dataset, (0, 5)
    source.disturb = lambda keys, entries: at in keys and os.kill(os.getpid(), number)
    with pytest.raises(SystemExit) as caught:
        trainer.fit()
    assert caught.value.code == code
    assert signal.getsignal(number) is before
    step = 5 if number == signal.SIGTERM else 6
    assert checkpoints.latest(tmp_path / "run").step == step
    tiny.build(tmp_path / "run", sets).fit("auto")
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert contents(tmp_path / "run") == contents(tmp_path / "straight")


def test_a_second_signal_leaves_at_once(tmp_path: Path, tiny: ModuleType) -> None:
    child = os.fork()
    if child == 0:
        trainer = tiny.build(tmp_path)
        twice = (signal.SIGTERM, signal.SIGINT)
        trainer.dataset.disturb = lambda *_: [os.kill(os.getpid(), number) for number in twice]
        with contextlib.suppress(BaseException):
            trainer.fit()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert checkpoints.steps(tmp_path) == []


def test_an_existing_run_is_not_overwritten(tmp_path: Path, tiny: ModuleType) -> None:
    short = ("train.steps=2", "train.sample_every=0")
    tiny.build(tmp_path / "a", short).fit()
    before = contents(tmp_path / "a")
    with pytest.raises(RunExists, match=r"holds a run already; continue it with --resume auto"):
        tiny.build(tmp_path / "a", short).fit()
    tiny.build(tmp_path / "b", short).fit("auto")  # nothing there: starts
    with pytest.raises(RunExists):
        tiny.build(tmp_path / "a", short).fit(str(tmp_path / "b"))
    assert tiny.build(tmp_path / "a", short).fit("auto").name == "step_00000002"
    assert contents(tmp_path / "a") == before
    more = ("train.steps=4", "train.sample_every=0")
    last = tiny.build(tmp_path / "c", more).fit(str(tmp_path / "b"))  # another run's model
    assert last == tmp_path / "c" / "checkpoints" / "step_00000004"
    assert [line["step"] for line in metrics(tmp_path / "c")] == [3, 4]
    with pytest.raises(ConfigError, match=r"continued with another model.channels: 32 -> 64"):
        tiny.build(tmp_path / "a", (*more, "model.channels=64")).fit("auto")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        tiny.build(tmp_path / "d", more).fit(str(tmp_path / "none"))
    exported = tmp_path / "m.safetensors"
    model = checkpoints.load(tmp_path / "a")
    checkpoints.export(exported, model.ema, model.config, {"step": 2})
    with pytest.raises(ConfigError, match="has only weights"):
        tiny.build(tmp_path / "d", more).fit(str(exported))


def test_a_damaged_newest_checkpoint_costs_one_interval(
    tmp_path: Path, tiny: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.build(tmp_path / "straight").fit()
    run = tmp_path / "run"
    tiny.build(run).fit()
    path = run / "checkpoints" / "step_00000012" / "trainer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    tiny.build(run).fit("auto")
    assert "skipped" in (said := capsys.readouterr().out)
    assert f"{path}: damaged: size is" in said
    assert losses(run) == losses(tmp_path / "straight")
    assert contents(run) == contents(tmp_path / "straight")
    assert (run / "checkpoints" / "step_00000012.aside").is_dir()


def test_not_a_number_is_not_applied(tmp_path: Path, tiny: ModuleType) -> None:
    trainer = tiny.build(tmp_path, ("train.steps=3", "train.accumulate=2"))
    states: list[Any] = []

    def disturb(keys: Any, entries: Any) -> None:
        states.append(_hashable(trainer.network.state_dict()))
        if (0, 4) in keys:  # the second batch
            entries[3]["target"] = torch.full_like(entries[3]["target"], float("nan"))
            entries[3]["name"] = "bad.png"

    trainer.dataset.disturb = disturb
    trainer.fit()
    states.append(_hashable(trainer.network.state_dict()))
    first, second, third, last = states
    assert first != second
    assert second == third
    assert third != last
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["loss"] is None
    skipped = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert skipped == {"step": 2, "names": ["bad.png"]}
    assert trainer.ema.updates == 2


def test_too_many_bad_steps_stop_the_run(tmp_path: Path, tiny: ModuleType) -> None:
    trainer = tiny.build(tmp_path, ("train.steps=100", "train.sample_every=0"))

    def disturb(keys: Any, entries: Any) -> None:
        entries[0]["condition"] = torch.full_like(entries[0]["condition"], float("inf"))

    trainer.dataset.disturb = disturb
    with pytest.raises(TrainingFailed, match=f"in {MAX_BAD_STEPS} steps in a row, last at step"):
        trainer.fit()


def test_accumulation_is_the_same_step(tmp_path: Path, tiny: ModuleType) -> None:
    sets = ("train.steps=4", "train.sample_every=0", "model.dropout=0.2")
    tiny.build(tmp_path / "whole", sets).fit()
    tiny.build(tmp_path / "parts", (*sets, "train.accumulate=4")).fit()
    whole = [line["loss"] for line in metrics(tmp_path / "whole")]
    parts = [line["loss"] for line in metrics(tmp_path / "parts")]
    assert parts == pytest.approx(whole, rel=1e-5)


# In bfloat16 each process rounds the gradients of its own half of the batch.
@pytest.mark.parametrize(("precision", "near"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_two_processes_give_the_losses_of_one(
    tmp_path: Path, tiny: ModuleType, precision: str, near: float
) -> None:
    sets = ("train.steps=6", "model.dropout=0.2", "data.batch_size=4")
    sets += (f"train.precision={precision}",)
    tiny.build(tmp_path / "one", sets).fit()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(SCRIPT), str(tmp_path / "two"), "-", *sets, "train.accumulate=2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("loss", "loss_level_1", "loss_level_4", "validation_loss", "validation_mae"):
        one = [line[name] for line in metrics(tmp_path / "one") if name in line]
        two = [line[name] for line in metrics(tmp_path / "two") if name in line]
        assert two == pytest.approx(one, rel=near)
    assert len(checkpoints.latest(tmp_path / "two").trainer["rng"]) == 2


def test_shares_that_do_not_divide_are_refused(tmp_path: Path, tiny: ModuleType) -> None:
    three = tiny.World(0, 3, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"batch_size=4 must be a multiple of 3, .*3 processes"):
        tiny.build(tmp_path, (), three)
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        tiny.build(tmp_path, ("train.precision=float16",))


def test_what_a_run_leaves_behind(tmp_path: Path, tiny: ModuleType) -> None:
    seen: list[tuple[int, list[str]]] = []
    trainer = tiny.build(tmp_path, ("train.save_every=3", "train.keep=3"))
    trainer.on_samples = lambda step, columns: seen.append((step, list(columns)))
    assert trainer.fit() == tmp_path / "checkpoints" / "step_00000012"
    assert seen == [(step, ["input", "sample", "raw", "truth"]) for step in (6, 12)]
    kept = [path.name for path in checkpoints.steps(tmp_path)]
    assert kept == ["step_00000012", "step_00000009", "step_00000006"]
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["step_00000006.png", "step_00000012.png"]
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    training = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 13))
    assert [line["samples"] for line in training] == list(range(4, 49, 4))
    assert [line["lr"] for line in training[:4]] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert all(line["seconds"] > 0 for line in metrics(tmp_path))
    assert all(0 < line["data_wait"] < 1 for line in training)
    assert checkpoints.latest(tmp_path).meta["samples"] == 48


def test_the_average_begins_and_moves_when_it_should(tmp_path: Path, tiny: ModuleType) -> None:
    sets = ("train.steps=9", "train.sample_every=0", "train.ema_start=4", "train.ema_every=2")
    trainer = tiny.build(tmp_path, sets)
    first = _hashable(trainer.ema.network.state_dict())
    seen: list[int] = []
    update = trainer.ema.update
    trainer.ema.update = lambda **but: (seen.append(trainer.step + 1), update(**but))
    trainer.fit()
    assert seen == [6, 8]
    assert _hashable(trainer.ema.network.state_dict()) != first


def test_samples_are_weighted_by_their_signal(tmp_path: Path, tiny: ModuleType) -> None:
    """Of predicted noise a high limit leaves every weight at 1, and a low one few above 0."""
    first = []
    for limit in ("null", "1e9", "1e-9"):
        sets = ("train.steps=1", "train.sample_every=0", f"train.min_snr={limit}")
        tiny.build(tmp_path / limit, sets).fit()
        first.append(metrics(tmp_path / limit)[0]["loss"])
    assert first[1] == first[0]
    assert first[2] < 0.01 * first[0]


def test_an_epoch_of_whole_batches(tmp_path: Path, tiny: ModuleType) -> None:
    sets = ("train.steps=8", "train.sample_every=0", "data.drop_last=true")
    trainer = tiny.build(tmp_path, sets)  # 30 pictures, 7 batches of 4
    keys: list[Any] = []
    trainer.dataset.disturb = lambda found, entries: keys.extend(found)
    trainer.fit()
    assert keys[:28] == [(0, position) for position in range(28)]
    assert keys[28:] == [(1, position) for position in range(4)]
    with pytest.raises(ConfigError, match="drop_last leaves no batch"):
        tiny.build(tmp_path / "b", ("data.drop_last=true", "data.batch_size=40"))


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("aot_eager", "unet"),
        pytest.param("inductor", "unet", marks=pytest.mark.soak),
        pytest.param("inductor", "sr3", marks=pytest.mark.soak),
    ],
)
def test_compiled_it_is_the_same_run(
    tmp_path: Path, tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str, kind: str
) -> None:
    """With dropout, recomputed activations and accumulation; and it is taken up to the bit."""
    sets = (f"model.kind={kind}", "model.channel_mults=[1]", "model.attention_resolutions=[]")
    sets += ("model.checkpoint=true", "train.accumulate=2", "train.sample_every=2")
    sets += ("train.steps=4", "train.save_every=2", "model.dropout=0.2")
    compile_with = functools.partial(torch.compile, backend=backend)
    monkeypatch.setattr(torch, "compile", compile_with)
    torch._dynamo.reset()
    eager = tiny.build(tmp_path / "eager", sets)
    eager.fit()
    sets = (*sets, "train.compile=true")
    straight = tiny.build(tmp_path / "straight", sets)
    straight.fit()
    tiny.build(tmp_path / "run", (*sets, "train.steps=2")).fit()
    tiny.build(tmp_path / "run", sets).fit("auto")
    for name in ("loss", "validation_loss"):
        expected, found = (
            [line[name] for line in metrics(tmp_path / run) if name in line]
            for run in ("eager", "straight")
        )
        assert found == pytest.approx(expected, rel=1e-4)
    assert list(straight.network.state_dict()) == list(eager.network.state_dict())
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert contents(tmp_path / "run") == contents(tmp_path / "straight")


def test_compiled_and_sharded_is_refused(tmp_path: Path, tiny: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"train\.compile goes with train\.parallel=ddp"):
        tiny.build(tmp_path, ("train.compile=true", "train.parallel=fsdp"))


def test_a_run_begun_from_another_has_a_checkpoint_at_once(
    tmp_path: Path, tiny: ModuleType
) -> None:
    """So that it can be killed at any moment, and ends well where there is nothing left to do."""
    last = tiny.build(tmp_path / "a", ("train.steps=3",)).fit()
    found = tiny.build(tmp_path / "b", ("train.steps=3",)).fit(str(last))
    assert found == tmp_path / "b" / "checkpoints" / "step_00000003"
    assert contents(tmp_path / "b") == contents(tmp_path / "a")


def test_a_checkpoint_without_a_scaler_is_continued_with_one(
    tmp_path: Path, tiny: ModuleType
) -> None:
    tiny.build(tmp_path, ("train.steps=3",)).fit()
    trainer = tiny.build(tmp_path, ("train.steps=4",))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.fit("auto")
    assert contents(tmp_path)["trainer"]
    assert checkpoints.latest(tmp_path).trainer["scaler"]["scale"] == 2.0


def test_a_validation_that_is_not_finite_is_written_as_none() -> None:
    found = Scores(float("nan"), float("inf"), {}).metrics()
    assert found == {"validation_loss": None, "validation_mae": None}
    assert Scores(1.0, None, {}).metrics() == {"validation_loss": 1.0}
