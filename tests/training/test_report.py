from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from palette import checkpoint as checkpoints
from palette.cli import main
from palette.training import report


@pytest.fixture(scope="module")
def run(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped once and taken up again."""
    directory = tmp_path_factory.mktemp("runs") / "<b>mine</b>"
    for steps, resume in ((8, None), (12, "auto")):
        tiny.build(directory, [f"train.steps={steps}"]).fit(resume)
    return directory


def text_of(path: Path) -> str:
    return re.sub(r'src="[^"]*"', "", path.read_text(encoding="utf-8"))


def titles(path: Path) -> list[str]:
    return re.findall(r"<h3>(.*?)</h3>", path.read_text(encoding="utf-8"))


def test_the_page_says_everything_about_the_run(run: Path) -> None:
    path = report.write(run)
    text = text_of(path)
    assert titles(path) == [
        "Loss",
        "Loss by noise level, running means",
        "Validation error [levels of 255]",
        "Gradient norm",
        "Learning rate",
        "Samples per second",
        "Share of time waiting for data",
    ]
    assert "most noise" in text
    assert "step 6<" in text
    assert "step 12<" in text
    digest = checkpoints.open_model(run).digest  # as written pictures have it
    assert digest == checkpoints.file_digest(run / "checkpoints/step_00000012/ema.safetensors")
    assert f"step_00000012, SHA-256 {digest}…" in text
    assert "<dt>model.channels</dt><dd>32</dd>" in text
    assert "attention_order: new" in text  # the whole configuration has the defaults too
    assert "<dt>libraries.torch</dt>" in text
    assert "Earlier starts of this run (1)" in text
    assert "<b>" not in text


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "trainer.pt"])
def test_a_damaged_checkpoint_is_not_the_newest_good_one(
    run: Path, name: str, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path = copy / "checkpoints" / "step_00000012" / name
    path.write_bytes(bytes(path.stat().st_size))
    good = checkpoints.file_digest(copy / "checkpoints/step_00000008/ema.safetensors")
    text = text_of(report.write(copy))
    assert f"checkpoint step_00000008, SHA-256 {good}…" in text
    assert re.search(rf"skipped: \S*step_00000012/{name}: damaged: SHA-256 is", text)


def test_sessions_record_how_a_run_was_started(run: Path) -> None:
    sessions = [json.loads(line) for line in (run / "sessions.jsonl").read_text().splitlines()]
    assert [session["step"] for session in sessions] == [0, 8]
    for session in sessions:
        assert session["processes"] == 1
        assert session["ops"]["noise"]["used"]
        assert session["command"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", session["started"])


def test_every_other_metric_gets_its_chart_and_noise_levels_share_one(tmp_path: Path) -> None:
    lines = [
        {"step": step, "loss": 1 / step, "loss_level_1": 2.0, "loss_level_4": 0.5, "memory": step}
        for step in range(1, 2000)
    ]
    lines[7] |= {"memory": float("inf"), "loss_level_1": "x"}
    for line in lines[600:640]:
        line["loss"] = None
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(f'{text}\n{{"step": 2000, "lo')
    path = report.write(tmp_path)
    assert titles(path) == ["Loss", "Loss by noise level, running means", "memory"]
    page = text_of(path)
    assert "holds no checkpoint" in page
    assert page.count("<polyline") == 6  # the loss is broken where there is none
    assert len(page) < 60_000  # however long the run: some hundred points of each line


def test_a_run_of_nothing_yet_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "Curves" not in text_of(report.write(tmp_path))


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "nothing: no run; wanted is a directory that palette train wrote" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_in_a_browser(run: Path, browser_page: Any, width: int, dark: bool) -> None:
    browser_page.open(report.write(run), width=width, dark=dark)
    assert browser_page.problems == []
    assert browser_page.asked_for_nothing_else()
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = browser_page.evaluate(
        "[...document.querySelectorAll('polyline')].map((one) => one.getBoundingClientRect().width)"
    )
    assert len(boxes) == 12
    assert all(box > width / 6 for box in boxes)
    assert browser_page.evaluate("[...document.images].every((one) => one.naturalWidth > 200)")
    shot = browser_page.screenshot()
    assert len(shot.getcolors(2**24)) > 1000
    corner = sum(shot.getpixel((2, 2))) / 3
    assert corner < 60 if dark else corner > 240
