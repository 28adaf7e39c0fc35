"""Batches ready for the trainer, from any number of worker processes, with bad pictures counted."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator

import torch

from palette.data.dataset import Batch, Batches, TaskDataset, UnreadableImages, collate

_LOG = logging.getLogger(__name__)

LIMIT = 0.01  # share of unreadable pictures at which a run stops
_FEW = 3  # so many are needed in any case: one of ten is no reason to stop
_SHOWN = 20  # names in the message
_FROM_WORKER = "Caught "  # so PyTorch begins the traceback that it makes of a worker's error


class Loader:
    """Iterates over the batches of a dataset.

    ``workers`` processes load ahead, with 0 the calling process loads; the batches are the same.
    ``skipped`` maps each picture or mask that could not be read to the reason. Iterating raises
    UnreadableImages when more than 1 % of the pictures cannot be read: of all of them, or, well
    beyond chance and with the masks, of those tried so far. What a worker raises arrives as it was
    raised there, when it is a ValueError.
    """

    def __init__(
        self, dataset: TaskDataset, batches: Batches, *, workers: int = 0, pin_memory: bool = False
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self.skipped: dict[str, str] = {}
        self._length = len(dataset)
        self._tried = self._failed = 0
        self._waited, self._since = 0.0, time.perf_counter()
        self._loader = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else a number of the global generator would be used up
            worker_init_fn=_leave_signals_to_parent if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        try:
            for batch in self._timed():
                self._count(batch)
                yield batch
        except ValueError as error:
            if not str(error).startswith(_FROM_WORKER):
                raise
            message = str(error).splitlines()[-1].partition(": ")[2]  # behind the name of the type
            raise type(error)(message) from None

    def waiting(self) -> float:
        """Share (0 to 1) of the time since the last call that was spent waiting for a batch."""
        now = time.perf_counter()
        share = self._waited / max(now - self._since, 1e-9)
        self._waited, self._since = 0.0, now
        return share

    def _timed(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            began = time.perf_counter()
            batch: Batch | None = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def _count(self, batch: Batch) -> None:
        for name, reason in batch["skipped"]:
            if name not in self.skipped:
                _LOG.warning("skipped %s", reason)
            self.skipped[name] = reason
        self._failed += len(batch["skipped"])
        self._tried += len(batch["name"]) + len(batch["skipped"])
        expected = LIMIT * self._tried
        surely = self._failed > expected + 4 * math.sqrt(expected)
        pictures = sum(name != reason for name, reason in self.skipped.items())
        if len(self.skipped) >= _FEW and (surely or pictures > LIMIT * self._length):
            reasons = list(self.skipped.values())
            more = f" and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
            raise UnreadableImages(
                f"{len(reasons)} images cannot be read, above {LIMIT:.0%} of those tried "
                f"({self._tried}): {'; '.join(reasons[:_SHOWN])}{more}"
            )


def _leave_signals_to_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, and torchrun and systemd send SIGTERM to whole
    groups; the parent alone should answer, and still needs its next batch to end a step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
