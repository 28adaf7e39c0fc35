"""The log of a run: exact numbers, cut back to a step, silent where it should be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from palette.training.logging import RunLog, cut_back


def test_numbers_survive_to_the_last_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [0.1 + 0.2, math.pi, 5e-324, 1.7976931348623157e308, None]
    log = RunLog(tmp_path, 0, 10)
    for step, value in enumerate(values):
        log.metrics({"step": step, "loss": value}, f"loss {value}")
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == values
    assert capsys.readouterr().out.splitlines()[1] == f"step 1: loss {math.pi}"


def test_cut_back_drops_later_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_back(path, 3)
    assert not path.exists()
    lines = [json.dumps({"step": step, "loss": step / 3}) for step in range(1, 6)]
    path.write_text("\n".join([*lines[:3], "[1]", '{"a": 1}', *lines[3:], '{"step": 2, "lo']))
    cut_back(path, 3)
    assert path.read_text().splitlines() == lines[:3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_opening_at_a_step_cuts_back(tmp_path: Path) -> None:
    for start in (0, 2):
        log = RunLog(tmp_path, start, 10)
        for step in range(start + 1, 5):
            log.metrics({"step": step, "loss": float(start)}, "")
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 0.0 if step < 3 else 2.0} for step in range(1, 5)]


def test_other_processes_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run", 0, 10, active=False)
    log.metrics({"step": 1}, "x")
    log.say("x")
    log.skipped(1, ["x"])
    log.picture(1, Image.new("RGB", (4, 4)))
    log.advance()
    log.flush()
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_progress_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    log = RunLog(tmp_path, 3, 10)
    log.metrics({"step": 4, "loss": 1.0}, "loss 1.0")
    log.advance()
    log.say("hello")
    log.close()
    shown = capsys.readouterr()
    assert "4/10" in shown.err
    assert "hello" in shown.err
    assert shown.out == ""
