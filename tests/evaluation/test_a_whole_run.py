"""What a user does after training, and that each page it leaves can be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palette.cli import main


def test_every_page_of_a_trained_run(
    run: Path, tmp_path: Path, browser_page: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path)]
    assert main(["evaluate", str(run), *output, "--samples-per-input", "2", "--human"]) == 0
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out.splitlines()
    expected = {
        tmp_path / "index.html": ("Scores", 7 * 4 + 6 * 3),  # all samples; strips at the least
        tmp_path / "human.html": ("Which one is the photograph?", 2),
        run / "report.html": ("Curves", 0),
    }
    for path, (words, least) in expected.items():
        assert str(path) in printed
        browser_page.open(path)
        assert browser_page.problems == []
        assert browser_page.asked_for_nothing_else()
        assert words in browser_page.evaluate("document.body.innerText")
        assert browser_page.evaluate("document.images.length") >= least
        assert len(browser_page.screenshot().getcolors(2**24)) > 20
