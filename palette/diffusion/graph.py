"""CUDA graphs of work that is the same every time, on tensors that stay where they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

Work = Callable[[], None]


class Graphs:
    """Makes the CUDA graphs of one device that never run at once, and so share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def warm_up(self, work: Work) -> None:
        """Do the work where it will be captured.

        At a first call libraries choose algorithms, compile and allocate, which no graph may hold.
        """
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def capture(self, work: Work) -> Work:
        """The work as one graph, to be replayed on the current stream. It is not done yet.

        Raises RuntimeError where the work is more than launches on this device: a value read back
        by the host, above all.
        """
        graph = torch.cuda.CUDAGraph()
        pool = next((other.pool() for other in self._alive), None)
        # The outer stream context goes back to the caller's stream also when the capture fails.
        # "thread_local": what other threads do (NCCL's watchdog, a loader's pinning) is no part.
        with (
            torch.cuda.stream(self._stream),
            torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"),
        ):
            work()
        self._alive.add(graph)
        return graph.replay


class Repeated:
    """Work done again and again: at first as it is, from the second time on as a graph."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self._warm = False
        self._replay: Work | None = None

    def do(self, work: Work) -> None:
        """Do the work, which must be the same at every call.

        Raises ValueError where it cannot be captured.
        """
        if not self._warm:
            self._graphs.warm_up(work)
            self._warm = True
            return
        if self._replay is None:
            try:
                self._replay = self._graphs.capture(work)
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"graph is True, expected False for a network whose step cannot be captured"
                    f" as a CUDA graph ({reason})"
                ) from error
        self._replay()
