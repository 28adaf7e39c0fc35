"""What a run reports: ``metrics.jsonl``, image grids, boards, and a line or bar to look at.

Only the first process of a run has a log that writes; the others have one that does nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from tqdm import tqdm

from palette.training.boards import Board

METRICS = "metrics.jsonl"
SESSIONS = "sessions.jsonl"


class RunLog:
    """The log of one run directory, opened at a step.

    Args:
        directory: the run directory; made where missing.
        step: what was recorded after this step is cut off, so that a run taken up again writes
            each step once.
        total: steps of the whole run, for the progress bar.
        active: False gives a log that writes and shows nothing.

    Attributes:
        boards: get the same scalars and grids.
    """

    def __init__(self, directory: Path, step: int, total: int, *, active: bool = True) -> None:
        self.directory = directory
        self.active = active
        self.boards: list[Board] = []
        self._bar: Any = None
        if not active:
            return
        directory.mkdir(parents=True, exist_ok=True)
        cut_back(directory / METRICS, step)
        self._file = (directory / METRICS).open("a", encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def metrics(self, record: dict[str, Any], shown: str) -> None:
        """Append one line, with floats in full precision, and show ``shown``."""
        if not self.active:
            return
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for board in self.boards:
            board.scalars(record)
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        else:
            print(f"step {record['step']}: {shown}", flush=True)

    def session(self, step: int, facts: dict[str, Any]) -> None:
        """Append when, by which command and on what the run was started or taken up again."""
        if not self.active:
            return
        started = {"started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
        program = Path(sys.argv[0])
        name = "palette" if program.name in ("__main__.py", "palette") else str(program)
        command = shlex.join([name, *sys.argv[1:]])
        record = {**started, "step": step, "command": command, **facts}
        with (self.directory / SESSIONS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def advance(self) -> None:
        """Another step is done."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, flush=True)

    def skipped(self, step: int, names: list[str]) -> None:
        """Name the samples of a step that was not applied, here and in ``skipped.jsonl``."""
        if not self.active:
            return
        with (self.directory / "skipped.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "names": names}) + "\n")
        self.say(f"step {step}: not finite, not applied; samples: {', '.join(names[:4])}")

    def picture(self, step: int, sheet: PILImage.Image, kind: str = "samples") -> Path:
        """Write ``<kind>/step_<step>.png`` and show it on the boards."""
        path = self.directory / kind / f"step_{step:08d}.png"
        if self.active:
            path.parent.mkdir(exist_ok=True)
            sheet.save(path)
            for board in self.boards:
                board.picture(kind, sheet, step)
        return path

    def flush(self) -> None:
        """Bring the metrics to the disk: they must not be older than the next checkpoint."""
        if self.active:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close files and bar."""
        if self._bar is not None:
            self._bar.close()
        for board in self.boards:
            board.close()
        if self.active:
            self._file.close()


def cut_back(path: Path, step: int) -> None:
    """Drop what a ``metrics.jsonl`` holds beyond a step, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            beyond = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            continue
        if not beyond:
            kept.append(f"{line}\n")
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
