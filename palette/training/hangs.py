"""When processes stop answering each other: the run ends, and says which one and at which step.

A collective that times out, or whose peer died, only says that something did. So whoever finds
out says that it is still there; who has not said so a moment later is the one that was waited for.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from palette.training.distributed import World

GRACE = 2.0  # seconds for all who wait to say so: they began to wait at nearly the same time
POLL = 1.0  # seconds between two looks of a process at whether another gave up
_GAVE_UP = "gave_up"


class ProcessLost(RuntimeError):  # noqa: N818 - it says what happened
    """Another process of the run hangs or has died; what was saved stays."""


@contextmanager
def naming_the_lost(world: World, step: Callable[[], int]) -> Iterator[None]:
    """Within the block, a process that hangs or dies ends all, with its rank and step named.

    The others raise. The one that hangs writes where it does to stderr, and ends with exit code 1.

    Args:
        world: all processes; with one, or without a store, nothing is done.
        step: the step that this process is in.

    Raises:
        ProcessLost: a collective failed here, because others did not answer.
    """
    store = world.store
    if store is None:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, world, step, over), daemon=True)
    watcher.start()
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_collective(error):
            raise
        raise ProcessLost(_message(store, world, step(), error)) from error
    finally:
        over.set()
        watcher.join()


def _is_of_a_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _message(store: Store, world: World, step: int, error: RuntimeError) -> str:
    silent = []
    try:
        store.set(f"waiting_{world.rank}", str(step))
        store.set(_GAVE_UP, str(world.rank))
        time.sleep(GRACE)
        silent = [rank for rank in range(world.size) if not store.check([f"waiting_{rank}"])]
    except RuntimeError:
        pass  # the store went with the process that kept it
    who = f"rank {', '.join(map(str, silent))}" if silent else "another process"
    reason = " ".join(str(error).split())
    return (
        f"rank {world.rank}: after step {step} {who} hangs or has died; start the same command "
        f"again with --resume auto ({reason})"
    )


def _watch(store: Store, world: World, step: Callable[[], int], over: threading.Event) -> None:
    """End this process when another gave up and this one does not find out by itself."""
    try:
        while not over.wait(POLL):
            if store.check([_GAVE_UP]):
                break
        if over.wait(2 * GRACE) or store.check([f"waiting_{world.rank}"]):
            return
    except RuntimeError:  # the store went with the process that kept it; torchrun ends this one
        return
    print(f"rank {world.rank}: hangs after step {step()}, here:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.__stderr__ or 2)
    os._exit(1)
