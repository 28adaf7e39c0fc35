"""How far an evaluation is: bars on the first process's terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many images of this process are done, and of how many."""


class Bars:
    """One bar for each kind of work, one after another; ``active`` False shows nothing."""

    def __init__(self, *, active: bool = True) -> None:
        self._hidden = None if active else True  # None: where the standard error is no terminal
        self._what = ""
        self._bar: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.close()
            self._what = what
            self._bar = tqdm(total=total, desc=what, unit="image", disable=self._hidden)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
