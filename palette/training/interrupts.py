"""SIGTERM and Ctrl-C as a request to finish the step, save and leave; twice leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """While entered, remembers the first SIGTERM or SIGINT instead of acting on it.

    Attributes:
        signal: its number; 0 while there was none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # only it may install handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
