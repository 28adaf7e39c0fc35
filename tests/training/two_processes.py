"""Two processes that train together, forked from the test: torchrun without its seconds."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import Callable

from palette.training.distributed import World, world

TIMEOUT = 60.0


def in_two(action: Callable[[World], object]) -> list[int]:
    """Run ``action`` in a world of two; the exit codes, negative for a signal's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [os.fork() or _be(rank, port, action) for rank in range(2)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _be(rank: int, port: int, action: Callable[[World], object]) -> int:
    """Become a rank; never returns."""
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {**names, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    with contextlib.suppress(BaseException):
        try:
            with world("cpu", TIMEOUT) as here:
                action(here)
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
    os._exit(code)
