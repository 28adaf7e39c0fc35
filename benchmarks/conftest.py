"""What the comparisons share: interleaved medians, the machine's facts, one table at the end."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

Timings = dict[str, float]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """None: what is measured has the machine to itself."""
    return 0


_tables: dict[str, list[dict[str, Any]]] = {}


def interleaved(contestants: dict[str, Callable[[], object]], seconds: float = 0.12) -> Timings:
    """Median seconds of each function, all of them in turn, about ``seconds`` for each."""
    for function in contestants.values():
        function()
    once = max(_timed(function) for function in contestants.values())
    rounds = min(max(int(seconds / once), 5), 200)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, function in contestants.items():
            samples[name].append(_timed(function))
    return {name: statistics.median(times) for name, times in samples.items()}


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    """What a figure is worth nothing without."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":")[1].strip() if names else processor
    return {
        "date": date.today().isoformat(),
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@pytest.fixture(name="interleaved")
def _interleaved() -> Callable[..., Timings]:
    return interleaved


@pytest.fixture
def row() -> Callable[..., None]:
    """``row(table, shape, count, seconds)`` adds a line to a table printed when all is done.

    ``seconds`` names at least "eager" and "ours", and "copy" where there is a plain copy.
    """

    def add(table: str, shape: str, count: int, seconds: Timings) -> None:
        times = {f"{name} ms": value * 1e3 for name, value in seconds.items()}
        columns = _with_ratios({"shape": shape, "count": count, **times})
        _tables.setdefault(table, []).append(columns)

    return add


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tables, with a line of sums; write them where PALETTE_RESULTS names a folder."""
    if not _tables:
        return
    facts = machine()
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in facts.items()))
    for name, rows in _tables.items():
        terminalreporter.section(name)
        for line in _lines([*rows, _sums(rows)]):
            terminalreporter.write_line(line)
    folder = os.environ.get("PALETTE_RESULTS")
    if folder:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        written = {"machine": facts, "tables": {n: [*r, _sums(r)] for n, r in _tables.items()}}
        (target / "tables.json").write_text(json.dumps(written, indent=1))


def _sums(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds summed with each row's count; ratios are those of the sums."""
    sums: dict[str, Any] = {"shape": "sum", "count": sum(row["count"] for row in rows)}
    for key in (key for key in rows[0] if key.endswith(" ms")):
        sums[key] = sum(row[key] * row["count"] for row in rows)
    return _with_ratios(sums)


def _with_ratios(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns plus the ratio of eager PyTorch to ours, and our share of the copy's speed."""
    ours = columns["ours ms"]
    columns["eager/ours"] = columns["eager ms"] / ours
    if "copy ms" in columns:
        columns["of copy"] = columns["copy ms"] / ours
    return columns


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    names = list(rows[0])
    cells = [names, *([_cell(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
