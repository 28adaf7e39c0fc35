"""Where the scalars and image grids of a run are shown: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import secrets
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image as PILImage

from palette.config import Config

WANDB_ID = "wandb.id"
"""File of a run directory with the id by which Weights & Biases knows the run."""
FINISH = 20.0  # seconds that a finished training waits for the last uploads
_CONNECT = 30.0  # seconds until Weights & Biases counts as out of reach
_AHEAD = 1000  # lines and pictures kept for it; what comes while it is full is left out


class Board(Protocol):
    """Takes in what ``metrics.jsonl`` and the folders of pictures get."""

    def scalars(self, record: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``: ``step``, and numbers or None by name."""

    def picture(self, kind: str, sheet: PILImage.Image, step: int) -> None:
        """A grid of images; ``kind`` is its folder."""

    def close(self) -> None:
        """Nothing comes any more."""


def open_boards(config: Config, step: int, say: Callable[[str], None]) -> list[Board]:
    """The boards that ``run.tensorboard`` and ``run.wandb`` ask for, as far as they are installed.

    Args:
        config: of the run; Weights & Biases shows it.
        step: what TensorBoard holds beyond it is dropped.
        say: told in one line why Weights & Biases gets nothing.
    """
    directory = Path(config.run.dir)
    boards: list[Board | None] = []
    if config.run.tensorboard:
        boards.append(_tensorboard(directory / "tensorboard", step))
    if config.run.wandb:
        boards.append(_wandb(config, directory, say))
    return [board for board in boards if board is not None]


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def scalars(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, record["step"])

    def picture(self, kind: str, sheet: PILImage.Image, step: int) -> None:
        self._writer.add_image(kind, np.asarray(sheet), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, fed by a thread: the training neither waits for a network nor
    ends with it. ``WANDB_MODE=offline`` and its other variables work as always.

    Args:
        wandb: the module.
        settings: arguments of ``wandb.init``.
        say: told in one line when it fails; nothing is sent after that.
    """

    def __init__(self, wandb: Any, settings: dict[str, Any], say: Callable[[str], None]) -> None:
        self._wandb, self._settings, self._say = wandb, settings, say
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._send, name="wandb", daemon=True)
        self._thread.start()

    def scalars(self, record: Mapping[str, Any]) -> None:
        self._put({name: value for name, value in record.items() if value is not None})

    def picture(self, kind: str, sheet: PILImage.Image, step: int) -> None:
        self._put({"step": step, f"grids/{kind}": sheet})

    def close(self) -> None:
        self._put(None, wait=FINISH)
        self._thread.join(FINISH)

    def _put(self, record: dict[str, Any] | None, wait: float = 0.0) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._waiting.put(record, block=wait > 0, timeout=wait)

    def _send(self) -> None:
        try:
            options = self._wandb.Settings(console="off", init_timeout=_CONNECT)
            run = self._wandb.init(**self._settings, settings=options)
            # A run taken up again repeats steps, which the counter of wandb would not allow.
            run.define_metric("*", step_metric="step")
            while (record := self._waiting.get()) is not None:
                run.log({name: self._shown(value) for name, value in record.items()})
            run.finish()
        except Exception as error:  # of any kind, and no reason to stop a training
            self._say(_unavailable(self._settings["project"], error))

    def _shown(self, value: Any) -> Any:
        return self._wandb.Image(value) if isinstance(value, PILImage.Image) else value


def _tensorboard(directory: Path, step: int) -> Board | None:
    """None where TensorBoard is absent or broken."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter
    except Exception:  # a broken installation raises all sorts of errors, and is no reason to stop
        return None
    return TensorBoard(SummaryWriter(str(directory), purge_step=step + 1))


def _wandb(config: Config, directory: Path, say: Callable[[str], None]) -> Board | None:
    """None where Weights & Biases is absent or broken."""
    try:
        import wandb
    except Exception as error:  # as above
        say(_unavailable(config.run.wandb, error))
        return None
    known = directory / WANDB_ID
    if not known.exists():
        known.write_text(secrets.token_hex(8), encoding="utf-8")
    settings = {
        "project": config.run.wandb,
        "name": directory.name,
        "id": known.read_text(encoding="utf-8").strip(),
        "resume": "allow",
        "dir": str(directory),
        "config": dataclasses.asdict(config),
    }
    return WeightsAndBiases(wandb, settings, say)


def _unavailable(project: str, error: Exception) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    missing = isinstance(error, ImportError)
    remedy = '; pip install "palette-diffusion[wandb]"' if missing else ""
    return f"run.wandb={project}: not sent to Weights & Biases: {reason}{remedy}"
