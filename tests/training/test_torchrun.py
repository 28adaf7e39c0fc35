"""Several processes under torchrun: killed, hanging, given bad numbers, of another count."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from palette import checkpoint as checkpoints

SCRIPT = Path(__file__).with_name("tiny_run.py")
ROOT = Path(__file__).parents[2]
SETS = ("model.dropout=0.2", "train.keep=100", "train.sample_every=0", "train.warmup=0")


class Ended(NamedTuple):
    code: int
    errors: str
    seconds: float


def torchrun(
    run: Path,
    *overrides: str,
    processes: int = 2,
    restarts: int = 0,
    resume: str = "auto",
    **more: str,
) -> Ended:
    """Train in so many processes; SEEN goes to ``<run>-seen``."""
    seen = run.with_name(f"{run.name}-seen")
    seen.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"SEEN": str(seen), **more}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command += ["--monitor-interval=0.2", str(SCRIPT), str(run), resume, *SETS, *overrides]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert not [each for each in psutil.process_iter(["cmdline"]) if _is_of(each, run)], "orphans"
    return Ended(done.returncode, done.stderr, time.monotonic() - began)


def _is_of(process: psutil.Process, run: Path) -> bool:
    return str(run) in (process.info["cmdline"] or [])


def seen(run: Path) -> list[list[Any]]:
    """Attempt, step, rank, samples and weights of every batch, in order."""
    found = []
    for path in run.with_name(f"{run.name}-seen").iterdir():
        for line in path.read_text().splitlines():
            attempt, step, keys, weights = json.loads(line)
            found.append([attempt, step, int(path.stem), keys, weights])
    return sorted(found)


def losses(run: Path) -> list[tuple[int, str]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], float(line["loss"]).hex()) for line in lines]


def weights(run: Path) -> list[str]:
    files = checkpoints.latest(run).meta["files"]
    return [files[f"{name}.safetensors"]["sha256"] for name in ("model", "ema")]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps of two processes to which nothing happens."""
    run = tmp_path_factory.mktemp("torchrun") / "straight"
    ended = torchrun(run)
    assert ended.code == 0, ended.errors[-3000:]
    return run


CASES = [(0, 6)] + [
    pytest.param(rank, step, marks=pytest.mark.soak)
    for rank, step in ((1, 6), (0, 2), (1, 2), (0, 11), (1, 11))
]


@pytest.mark.parametrize(("rank", "step"), CASES)
def test_a_killed_process_is_started_again_and_all_is_the_same(
    tmp_path: Path, straight: Path, rank: int, step: int
) -> None:
    run = tmp_path / "run"
    ended = torchrun(run, restarts=3, FAULTS=f"kill:{rank}:{step}")
    print(f"rank {rank} killed after step {step}: {ended.seconds:.1f} s in all")
    assert ended.code == 0, ended.errors[-3000:]
    assert losses(run) == losses(straight)
    assert weights(run) == weights(straight)
    attempts = {attempt for attempt, *_ in seen(run)}
    assert attempts == {0, 1}
    again = [batch[1:] for batch in seen(run) if batch[0] == 1]
    assert again == [batch[1:] for batch in seen(straight) if batch[1] >= step // 4 * 4]


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.soak)])
def test_saved_by_two_and_resumed_by_others_in_the_same_order(
    tmp_path: Path, straight: Path, tiny: Any, processes: int
) -> None:
    """To the end of the second epoch of 30 samples, from a checkpoint in its beginning."""
    run = tmp_path / "run"
    shutil.copytree(straight / "checkpoints", run / "checkpoints")
    shutil.copy(straight / "metrics.jsonl", run)
    sets, resume = ("train.steps=15",), str(run / "checkpoints" / "step_00000008")
    before = [key for _, step, _, keys, _ in seen(straight) if step < 8 for key in keys]
    if processes == 1:
        after: list[Any] = []
        trainer = tiny.build(run, (*SETS, *sets))
        trainer.dataset.disturb = lambda keys, entries: after.extend(map(list, keys))
        trainer.fit(resume)
    else:
        ended = torchrun(run, *sets, processes=processes, resume=resume)
        assert ended.code == 0, ended.errors[-3000:]
        after = [key for *_, keys, _ in seen(run) for key in keys]
    assert before + after == [[epoch, position] for epoch in (0, 1) for position in range(30)]
    for (step, loss), (same, other) in zip(losses(run), losses(straight), strict=False):
        assert step == same
        assert float.fromhex(loss) == pytest.approx(float.fromhex(other), rel=1e-4)


@pytest.mark.parametrize("timeout", [10, pytest.param(20, marks=pytest.mark.soak)])
def test_bad_numbers_on_one_rank_and_then_a_hang(tmp_path: Path, timeout: int) -> None:
    run = tmp_path / "run"
    ended = torchrun(run, FAULTS="nan:1:2 hang:1:5", TIMEOUT=str(timeout))
    print(f"a hang with a timeout of {timeout} s: ended after {ended.seconds:.1f} s")
    assert ended.code == 1
    assert re.search(r"rank 0: after step 5 rank 1 hangs or has died; start the same", ended.errors)
    assert "rank 1: hangs after step 5, here:" in ended.errors
    assert re.search(r'tiny_run\.py", line \d+ in disturb', ended.errors)
    hashes = [[line[4] for line in seen(run) if line[1] == step] for step in range(6)]
    assert all(first == second for first, second in hashes)
    assert len({first for first, _ in hashes}) == 5
    assert hashes[2] == hashes[3]  # what had the bad numbers was applied by neither
    skipped = json.loads((run / "skipped.jsonl").read_text())
    assert skipped["step"] == 3
    assert len(skipped["names"]) == 1
    assert checkpoints.latest(run).trainer["ema_updates"] == 3
