"""Saving: whole or not there, whenever the process ends and whatever the disk does."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from palette import _durable
from palette import checkpoint as checkpoints
from palette.checkpoint import CheckpointError


def state(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    conv = torch.randn(4, 3, 3, 3, generator=draw).to(memory_format=torch.channels_last)
    return {
        "conv.weight": conv,
        "half": torch.randn(5, generator=draw).bfloat16(),
        "count": torch.tensor(step),
    }


def save(run: Path, step: int) -> Path:
    return checkpoints.save(
        run,
        step,
        model=state(step),
        ema=state(step + 1000),
        trainer={"step": step, "window": [0.1, 1e-300], "optimizer": {"m": state(step)["half"]}},
        config_yaml="run:\n  dir: runs/x\n",
        meta={"samples": 4 * step},
    )


def leftovers(run: Path) -> list[str]:
    return [path.name for path in (run / "checkpoints").iterdir() if "tmp" in path.name]


@pytest.mark.parametrize("kills", [50, pytest.param(200, marks=pytest.mark.soak)])
def test_kill_while_saving_loses_at_most_one_interval(tmp_path: Path, kills: int) -> None:
    """A child saves in a loop and is killed at a random time, again and again."""
    draw, step = random.Random(2), 0
    for _ in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for number in range(step + 1, step + 10_000):
                    save(tmp_path, number)
                    checkpoints.prune(tmp_path, 2)
                    os.write(writer, struct.pack("q", number))
            os._exit(1)
        os.close(writer)
        first = os.read(reader, 8)  # so that there is always something to kill in the middle of
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done = first
        while block := os.read(reader, 8):
            done = block
        os.close(reader)
        acknowledged = struct.unpack("q", done)[0]
        found = checkpoints.latest(tmp_path)
        assert acknowledged <= found.step <= acknowledged + 1
        assert found.skipped == ()
        step = found.step
    save(tmp_path, step + 1)
    assert leftovers(tmp_path) == []
    assert len(checkpoints.steps(tmp_path)) >= 2


class Crash(BaseException):
    """Stands for the process ending here."""


@pytest.mark.parametrize("fault", [OSError(errno.EIO, "Input/output error"), Crash()])
def test_a_fault_at_every_call_leaves_a_loadable_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    save(tmp_path, 1)
    calls, limit = 0, 10**6

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > limit:
                raise fault
            return function(*arguments, **options)

        return wrapped

    for owner, name in (
        (checkpoints, "save_file"),
        (torch, "save"),
        (Path, "mkdir"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (Path, "rename"),
        (os, "fsync"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    save(tmp_path, 2)
    sites = calls
    assert sites > 12
    for index in range(sites):
        shutil.rmtree(tmp_path / "checkpoints" / "step_00000002", ignore_errors=True)
        calls, limit = 0, index
        with contextlib.suppress(CheckpointError, Crash, OSError):
            save(tmp_path, 2)
        limit = 10**6
        found = checkpoints.latest(tmp_path)
        assert found.skipped == ()
        assert found.step in (1, 2)


SITES = (  # all through which saving, exporting and pruning touch the disk
    (checkpoints, "save_file"),
    (torch, "save"),
    (Path, "mkdir"),
    (Path, "write_text"),
    (Path, "write_bytes"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "unlink"),
    (os, "fsync"),
    (shutil, "rmtree"),
)


def save_in_a_child(run: Path, end_at: int) -> int:
    """Save, prune and export in a fork that ends at the so-manieth moment, before or after a call
    that touches the disk; its exit code, or the number of moments where it came to its end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        moments = 0

        def moment() -> None:
            nonlocal moments
            if moments == end_at:
                os._exit(9)
            moments += 1

        def ending(function: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                moment()
                result = function(*arguments, **options)
                moment()
                return result

            return wrapped

        with contextlib.suppress(BaseException):
            for owner, name in SITES:
                setattr(owner, name, ending(getattr(owner, name)))
            save(run, 3)
            checkpoints.prune(run, 2)
            checkpoints.export(run / "model.safetensors", state(3), "", {"step": 3})
            os.write(writer, struct.pack("q", moments))
            os._exit(0)
        os._exit(1)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    written = os.read(reader, 8)
    os.close(reader)
    return struct.unpack("q", written)[0] if written else -code


def test_ending_before_and_after_every_call_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    before = tmp_path / "before"
    for step in (1, 2):
        save(before, step)
    checkpoints.export(before / "model.safetensors", state(2), "", {"step": 2})

    def begin() -> Path:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(before, run)
        return run

    moments = save_in_a_child(begin(), -1)
    assert moments > 40
    loadable = 0
    for index in range(moments):
        run = begin()
        assert save_in_a_child(run, index) == -9
        found = checkpoints.latest(run)
        exported = checkpoints.load(run / "model.safetensors").step
        steps = [int(path.name[-1]) for path in checkpoints.steps(run)]
        loadable += found.skipped == () and found.step in (2, 3) and exported in (2, 3)
        assert len(steps) >= 2
        if index % 8 == 0:
            save(run, 4)
            assert leftovers(run) == []
    print(f"{moments} moments, {loadable} with a loadable checkpoint and model")
    assert loadable == moments


def test_replacing_a_step_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    save(tmp_path, 10)
    assert checkpoints.latest(tmp_path).step == 10
    removed = checkpoints.prune(tmp_path, 2)
    assert [path.name for path in removed] == ["step_00000002", "step_00000001"]
    assert [path.name for path in checkpoints.steps(tmp_path)] == ["step_00000010", "step_00000003"]
    with pytest.raises(ValueError, match="keep must be at least 2"):
        checkpoints.prune(tmp_path, 1)
    moved = checkpoints.set_aside(tmp_path, 3)
    assert [path.name for path in moved] == ["step_00000010.aside"]
    assert checkpoints.latest(tmp_path).step == 3
    assert leftovers(tmp_path) == []


def test_prune_goes_on_when_one_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    remove = _durable.remove

    def stubborn(path: Path) -> None:
        if path.name == "step_00000002":
            raise OSError(errno.EBUSY, "Device or resource busy")
        remove(path)

    monkeypatch.setattr(checkpoints, "remove", stubborn)
    with pytest.warns(UserWarning, match="step_00000002: old checkpoint not removed"):
        assert [path.name for path in checkpoints.prune(tmp_path, 2)] == ["step_00000001"]


@pytest.mark.parametrize("limit", [0, 300, 700, 1500, 4000])
def test_disk_full(tmp_path: Path, limit: int) -> None:
    save(tmp_path, 1)
    whole = {"w": torch.randn(1000)}
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save(tmp_path, 2, model=whole, ema=whole, trainer=whole, config_yaml="")
        with pytest.raises(CheckpointError):
            checkpoints.export(tmp_path / "model.safetensors", whole, "", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    message = str(caught.value)
    assert str(tmp_path / "checkpoints" / "step_00000002") in message
    assert "bytes free" in message
    assert "earlier checkpoints are untouched" in message
    assert [path.name for path in checkpoints.steps(tmp_path)] == ["step_00000001"]
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "model.safetensors").exists()
    assert checkpoints.latest(tmp_path).step == 1


def test_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path, 1)
    (tmp_path / "checkpoints").unlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CheckpointError, match=r"Read-only file system \(\d+ bytes free\)"):
        save(tmp_path, 1)


def in_a_child(action: Callable[[], object]) -> str:
    """The message of the CheckpointError that ``action`` ends with in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
        except CheckpointError as error:
            os.write(writer, str(error).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read().decode()


def test_a_folder_of_someone_else(tmp_path: Path) -> None:
    """Without the right to write, as any user but root."""
    tmp_path.parent.parent.chmod(0o755)
    tmp_path.parent.chmod(0o755)
    save(tmp_path, 1)
    places = (tmp_path / "checkpoints", tmp_path)
    for place in places:
        place.chmod(0o555)

    def as_nobody() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        save(tmp_path, 2)

    message = in_a_child(as_nobody)
    for place in places:
        place.chmod(0o755)
    assert "cannot be written: Permission denied" in message
    assert "bytes free" in message
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000001"]
    assert checkpoints.latest(tmp_path).skipped == ()


@pytest.mark.soak
def test_a_small_disk_that_fills_up(tmp_path: Path) -> None:
    """A file system of one megabyte; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        save(disk, 1)
        whole = {"w": torch.zeros(100_000)}
        with pytest.raises(CheckpointError, match="No space left on device") as full:
            checkpoints.save(disk, 2, model=whole, ema=whole, trainer=whole, config_yaml="")
        free = re.search(r"(\d+) bytes free", str(full.value))
        assert free is not None
        assert int(free[1]) < 400_000
        assert os.listdir(disk / "checkpoints") == ["step_00000001"]
        assert checkpoints.latest(disk).step == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)
