"""Bars on the terminal of the first process, and nowhere else."""

from __future__ import annotations

import io

import pytest

from palette.evaluation.progress import Bars


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("error", "active", "shown"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
)
def test_a_bar_for_each_kind_of_work(monkeypatch, error, active, shown):
    monkeypatch.setattr("sys.stderr", error)
    bars = Bars(active=active)
    for what in ("drawing", "samples"):
        for done in (1, 2, 4):
            bars(what, done, 4)
    bars.close()
    text = error.getvalue()
    assert ("drawing: 100%" in text) == shown
    assert ("samples: 100%" in text) == shown
    assert ("4/4" in text) == shown
