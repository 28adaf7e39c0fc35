"""How the C library hands memory to a training on a CPU."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGE = 2**30


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where its C library is glibc.

    Otherwise large tensors, and what is free at the end of the heap after a step, go back to the
    system, and the next step waits for their pages to be cleared again, one by one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
