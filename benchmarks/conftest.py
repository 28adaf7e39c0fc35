"""What the comparisons share: interleaved medians, the machine's facts, one table at the end."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import proven
import pytest
import torch

from palette import ops
from palette.info import machine

Timings = dict[str, float]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """None: what is measured has the machine to itself."""
    return 0


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_HEAD_START = 2_000_000  # cycles of a GPU, about a millisecond
_MOST = 40 if DEVICE == "cuda" else 200  # calls of a contestant; a GPU's times scatter less

# What nobody would pick instead.
_NO_ALTERNATIVE = ("copy", "floor", "reference", "accelerated", "ours")

_UNITS = {"ms": 1e3, "MB": 1e-6}
_tables: dict[str, list[dict[str, Any]]] = {}


@pytest.fixture(scope="session")
def device() -> str:
    """Where everything is measured: the GPU where there is one."""
    return DEVICE


def interleaved(
    contestants: dict[str, Callable[[], object]],
    seconds: float = 0.12,
    before: Callable[[], object] = lambda: None,
    least: int = 5,
) -> Timings:
    """Median seconds of each function, about ``seconds`` for each and ``least`` calls.

    The reference by itself, since its many large intermediates would empty the caches for whoever
    comes next; all others in turn, in another order each time, since who comes after whom decides
    what is in the caches. ``before`` runs before each call and is not timed: what leaves the input
    as the layer before would.
    """
    if "reference" in contestants and len(contestants) > 1:
        others = {name: each for name, each in contestants.items() if name != "reference"}
        alone = {"reference": contestants["reference"]}
        return interleaved(alone, seconds, before, least) | interleaved(
            others, seconds, before, least
        )
    for function in contestants.values():
        for _ in range(3 if DEVICE == "cuda" else 1):
            function()
    once = max(_timed(function) for function in contestants.values())
    rounds = min(max(int(seconds / once), least), _MOST)
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order, shuffle = list(contestants), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            before()
            samples[name].append(_timed(contestants[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def _timed(function: Callable[[], object]) -> float:
    """Seconds of one call; on a GPU those of its kernels, with none of its data in the cache."""
    if DEVICE == "cuda":
        return _timed_on_gpu(function)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _timed_on_gpu(function: Callable[[], object]) -> float:
    torch.empty(2**28, dtype=torch.uint8, device=DEVICE).zero_()
    torch.cuda._sleep(_HEAD_START)  # the host launches what is measured before the first of it runs
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@pytest.fixture(autouse=True)
def _proven(request: pytest.FixtureRequest) -> None:
    """No figure for an op whose own tests fail; one that several ops share needs them all."""
    op = request.module.__name__.rpartition("bench_")[2]
    for name in [op] if op in ops.names() else ops.names():
        failure = proven.failure(name, request.config.cache)
        if failure:
            pytest.fail(f"{name} fails its own tests, so no time is printed: {failure}", False)


@pytest.fixture(name="interleaved")
def _interleaved() -> Callable[..., Timings]:
    return interleaved


@pytest.fixture
def row() -> Callable[..., None]:
    """``row(table, shape, count, seconds, megabytes)`` adds a line to a table printed at the end,
    and written at once where PALETTE_RESULTS names a folder.

    ``seconds`` names at least "eager" and "ours", and "copy" where there is a plain copy;
    ``megabytes`` is what has to be read and written once. With ``unit`` "MB" they are bytes.
    """

    def add(
        table: str,
        shape: str,
        count: int,
        seconds: Timings,
        megabytes: float | None = None,
        unit: str = "ms",
    ) -> None:
        columns: dict[str, Any] = {"shape": shape, "count": count}
        if megabytes is not None:
            columns["MB"] = megabytes
        columns |= {f"{name} {unit}": value * _UNITS[unit] for name, value in seconds.items()}
        _tables.setdefault(table, []).append(_with_ratios(columns))
        _write()

    return add


@pytest.fixture
def line() -> Callable[[str, dict[str, Any]], None]:
    """``line(table, columns)`` adds a line, as it is, to a table printed at the end."""

    def add(table: str, columns: dict[str, Any]) -> None:
        _tables.setdefault(table, []).append(columns)
        _write()

    return add


@pytest.fixture
def forced() -> Callable[..., dict[str, Callable[[], object]]]:
    """``forced(op, call)``: the call on each backend of ``op`` that is not the default here."""

    def make(op: str, call: Callable[[], object]) -> dict[str, Callable[[], object]]:
        def by(backend: str) -> Callable[[], object]:
            def run() -> object:
                with ops.use(backend):
                    return call()

            return run

        names = [name for name in ops.backends(op) if name != ops.default(op, DEVICE)]
        return {name: by(name) for name in names if not (name == "cpp" and DEVICE == "cuda")}

    return make


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tables, with a line of sums."""
    if not _tables:
        return
    terminalreporter.write_line(", ".join(f"{key} {value}" for key, value in machine().items()))
    for name, rows in _tables.items():
        terminalreporter.section(name)
        for line in _lines(_with_sums(rows)):
            terminalreporter.write_line(line)


def _write() -> None:
    """What there is so far, so that a run that is stopped leaves it."""
    folder = os.environ.get("PALETTE_RESULTS")
    if folder:
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        tables = {name: _with_sums(rows) for name, rows in _tables.items()}
        written = {"machine": machine(), "tables": tables}
        (target / "tables.json").write_text(json.dumps(written, indent=1))


def _with_sums(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and their sum where they are shapes of one op or network."""
    return [*rows, _sums(rows)] if "count" in rows[0] else rows


def _sums(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds and bytes summed with each row's count; ratios are those of the sums."""
    sums: dict[str, Any] = {"shape": "sum", "count": sum(row["count"] for row in rows)}
    for key in (key for key in rows[0] if key == "MB" or key.endswith((" ms", " MB"))):
        if any(key not in row for row in rows):
            continue  # a contestant that took part in some rows only
        sums[key] = sum(row[key] * row["count"] for row in rows)
    return _with_ratios(sums)


def _with_ratios(columns: dict[str, Any]) -> dict[str, Any]:
    """Columns plus eager PyTorch and the best alternative over ours, and our share of the copy."""
    times = {key[:-3]: value for key, value in columns.items() if key.endswith((" ms", " MB"))}
    ours = times["ours"]
    columns["eager/ours"] = times["eager"] / ours
    others = {name: value for name, value in times.items() if name not in _NO_ALTERNATIVE}
    best = min(others, key=lambda name: others[name])
    columns["best/ours"] = others[best] / ours
    columns["best"] = best
    if "copy" in times:
        columns["of copy"] = times["copy"] / ours
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
