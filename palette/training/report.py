"""``palette report RUN``: one self-contained page of a training run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palette import _html as page
from palette import checkpoint as checkpoints
from palette import config as configs
from palette._album import Album
from palette._charts import Line, line_chart
from palette._html import Html
from palette.checkpoint import Checkpoint, CheckpointError
from palette.config import Config, ConfigError
from palette.data.paths import printable
from palette.training.levels import LEVELS, PREFIX
from palette.training.logging import METRICS, SESSIONS
from palette.training.pictures import smoothed

PAGE = "report.html"
SHEETS = 12
"""Grids of samples shown, evenly chosen over the run, the first and the last among them."""

_SINGLE = {
    "validation_mae": ("Validation error [levels of 255]", False),
    "grad_norm": ("Gradient norm", True),
    "lr": ("Learning rate", False),
    "samples_per_second": ("Samples per second", False),
    "data_wait": ("Share of time waiting for data", False),
}
_CHARTED = {"step", "loss", "validation_loss", "samples", "seconds", *_SINGLE}

Records = list[dict[str, Any]]


def write(run: Path) -> Path:
    """Write ``report.html`` into a run directory; it needs no other file and no network.

    Args:
        run: as ``palette train`` writes it, also while it is running.

    Returns:
        The path of the page.

    Raises:
        ValueError: it is no run directory.
    """
    if not (run / METRICS).is_file() and not checkpoints.steps(run):
        raise ValueError(
            f"{printable(run)}: no run; wanted is a directory that palette train wrote, "
            f"with {METRICS} or checkpoints in it"
        )
    records = _records(run / METRICS)
    found, problem = _checkpoint(run)
    sheets = _spread(sorted((run / "samples").glob("step_*.png")), SHEETS)
    final = [path for path in (run / "grid.png", run / "strip.png") if path.is_file()]
    album = Album(len(sheets) + len(final), side=1000)
    charts = _charts(records)
    sections = [
        _heading(run, records, found),
        page.section("Curves", page.tag("div", *charts, class_="charts") if charts else ""),
        _samples(album, sheets),
        _summary(run, album, final),
        _checkpoints(run, found, problem),
        _configuration(found),
        _environment(_records(run / SESSIONS)),
    ]
    foot = f"This file holds everything it shows and asks for nothing else; {album.remark()}"
    title = f"Run: {printable(run.resolve().name)}"
    return page.write_page(run / PAGE, title, *sections, page.tag("footer", foot))


def _records(path: Path) -> Records:
    """Objects of a file of JSON lines; the last one may have been cut off."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _checkpoint(run: Path) -> tuple[Checkpoint | None, str]:
    """The newest checkpoint whose every file is good, without its weights, or why none is."""
    try:
        return checkpoints.latest(run, (), whole=True), ""
    except CheckpointError as error:
        return None, str(error)


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    last = len(paths) - 1
    if last < count:
        return list(paths)
    return [paths[round(place * last / (count - 1))] for place in range(count)]


def _heading(run: Path, records: Records, found: Checkpoint | None) -> Html:
    title = page.tag("h1", f"Run: {printable(run.resolve().name)}")
    facts = []
    trained = [record for record in records if _is_number(record.get("step"))]
    if trained:
        last = trained[-1]
        facts.append(f"step {last['step']}")
        if _is_number(last.get("samples")):
            facts.append(f"{last['samples']:,} samples")
        if _is_number(last.get("seconds")):
            facts.append(_duration(last["seconds"]))
    if found is not None:
        facts.append(f"checkpoint {found.path.name}, SHA-256 {found.digest}…")
    return page.join([title, page.tag("p", "\u00a0· ".join(facts), class_="soft")])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{value} {unit}" for value, unit in parts if value) or "0 s"


def _charts(records: Records) -> list[Html]:
    until = max((float(r["step"]) for r in records if _is_number(r.get("step"))), default=0.0)
    loss = _points(records, "loss")
    lines = [
        Line("each line of the log", loss, faint=True),
        Line("running mean", smoothed(_known(loss))),
        Line("validation", _points(records, "validation_loss"), dots=True),
    ]
    charts = [line_chart("Loss", [line for line in lines if line.points], until=until, log=True)]
    names = list(dict.fromkeys(name for record in records for name in record))
    levels = [name for name in names if name.startswith(PREFIX)]
    charts.append(
        line_chart(
            "Loss by noise level, running means",
            [Line(_level(name), smoothed(_known(_points(records, name)))) for name in levels],
            until=until,
            log=True,
        )
    )
    others = {name: (name, False) for name in names if name not in _CHARTED and name not in levels}
    for name, (title, log) in {**_SINGLE, **others}.items():
        points = _points(records, name)
        line = Line("last", points, dots=name.startswith("validation"))
        charts.append(line_chart(title, [line] if points else [], until=until, log=log))
    return [chart for chart in charts if chart]


def _level(name: str) -> str:
    number = name.removeprefix(PREFIX)
    return {"1": "least noise", str(LEVELS): "most noise"}.get(number, f"quarter {number}")


def _known(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None]


def _points(records: Records, name: str) -> list[tuple[float, float | None]]:
    """Steps and values; a value that was not finite is None."""
    return [
        (float(record["step"]), float(record[name]) if record[name] is not None else None)
        for record in records
        if _is_number(record.get("step"))
        and name in record
        and (record[name] is None or _is_number(record[name]))
    ]


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _samples(album: Album, sheets: list[Path]) -> Html:
    figures = [
        album.figure(sheet, f"step {int(sheet.stem.removeprefix('step_')):,}", alt=sheet.stem)
        for sheet in sheets
        if sheet.stem.removeprefix("step_").isdecimal()
    ]
    if not figures:
        return Html("")
    about = "Samples from fixed seeds, by the averaged weights unless it says raw."
    return page.section(
        "Samples over time",
        page.tag("p", about, class_="soft"),
        page.tag("div", *figures, class_="sheets"),
    )


def _summary(run: Path, album: Album, final: list[Path]) -> Html:
    """The pictures and tables that a run with ``summary.crops`` ends with."""
    captions = {"grid.png": "held-out crops", "strip.png": "the reverse process"}
    pictures = [
        page.tag("div", album.figure(path, captions[path.name]), class_="final") for path in final
    ]
    try:
        found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        quality = found["quality"].items()
        speed = [(name, *row.values()) for name, row in found["speed"].items()]
        header = list(next(iter(found["speed"].values())))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, StopIteration):
        return page.section("At the end", *pictures)
    return page.section(
        "At the end",
        *pictures,
        page.table(
            ("", "error in the hole [of 255]"),
            [(name, page.digits(value)) for name, value in quality],
            numbers=1,
        ),
        page.table(
            ("", *header), [tuple(map(page.digits, row)) for row in speed], numbers=len(header)
        ),
    )


def _checkpoints(run: Path, found: Checkpoint | None, problem: str) -> Html:
    kept = ", ".join(path.name for path in reversed(checkpoints.steps(run)))
    skipped = [] if found is None else found.skipped
    return page.section(
        "Checkpoints",
        page.tag("p", kept) if kept else "",
        page.tag("p", problem, class_="warning") if problem else "",
        page.notes(f"skipped: {reason}" for reason in skipped),
    )


def _configuration(found: Checkpoint | None) -> Html:
    if found is None:
        return Html("")
    try:
        config = configs.from_yaml(found.config)
    except ConfigError as error:
        about = page.tag("p", f"Not a config of this version: {error}", class_="warning")
    else:
        changed = _changed(config)
        note = page.tag("p", "What differs from the defaults:", class_="soft")
        about = page.join([note, page.settings(changed)]) if changed else Html("")
    whole = page.folded("The whole configuration", page.tag("pre", found.config))
    return page.section("Configuration", about, whole)


def _changed(config: Config) -> dict[str, Any]:
    """The options that are not at their defaults, by their full keys."""
    known = configs.options()
    values = {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in known}
    return {key: value for key, value in values.items() if value != known[key].default}


def _environment(sessions: Records) -> Html:
    if not sessions:
        return Html("")
    *earlier, last = (page.settings(_condensed(session)) for session in sessions)
    return page.section(
        "Environment",
        last,
        page.folded(f"Earlier starts of this run ({len(earlier)})", *earlier) if earlier else "",
    )


def _condensed(session: dict[str, Any]) -> dict[str, Any]:
    """Of each op the backends that were used, and not why the others were not."""
    found = {key: value for key, value in session.items() if key not in ("ops", "build")}
    for op, row in _mapping(session.get("ops")).items():
        used = _mapping(_mapping(row).get("used"))
        found[op] = ", ".join(f"{backend} on {device}" for device, backend in used.items())
    compiled = _mapping(session.get("build")).items()
    found["compiled"] = ", ".join(f"{name} {value}" for name, value in compiled if value)
    return found


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
