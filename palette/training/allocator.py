"""How the C library hands memory to a training on a CPU."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGE = 2**30
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25  # of Linux's mman.h, the latter since 6.1
_PAGE, _HUGE = 2**12, 2**21


def keep_freed_memory() -> None:
    """Let this process keep what it frees, where its C library is glibc.

    Otherwise large tensors, and what is free at the end of the heap after a step, go back to the
    system, and the next step waits for their pages to be cleared again, one by one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def use_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Have the memory of large tensors mapped in pages of 2 MB, where Linux agrees to.

    For what a step walks through from end to end: a processor looks up each small page anew.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None or sys.platform != "linux":
        return
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.nbytes < _HUGE:
            continue
        begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
