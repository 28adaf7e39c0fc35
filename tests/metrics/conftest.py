"""Several processes, played by threads."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest


@pytest.fixture
def in_processes() -> Callable[..., list[Any]]:
    """Run ``work(rank, gather)`` in threads that gather pickled values, as processes would."""

    def in_processes(
        size: int, work: Callable[[int, Callable[[Any], list[Any]]], Any]
    ) -> list[Any]:
        barrier, box = threading.Barrier(size), [b""] * size

        def gather_of(rank: int) -> Callable[[Any], list[Any]]:
            def gather(value: Any) -> list[Any]:
                box[rank] = pickle.dumps(value)
                barrier.wait()
                values = [pickle.loads(part) for part in box]
                barrier.wait()
                return values

            return gather

        def run(rank: int) -> Any:
            try:
                return work(rank, gather_of(rank))
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(run, range(size)))

    return in_processes
