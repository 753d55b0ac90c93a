"""Huge pages under the part of an arena that only ever holds weights.

A decode step streams every weight once, and with 4 KiB pages a tenth of that time goes into address translation. Shared memory gets no
huge pages on most systems, and weights need no sharing: their range is remapped to private memory, which does.
"""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # Linux's numbers on every architecture that torch runs on


def use_huge_pages(memory: Tensor) -> int:
    """Put private memory in huge pages under `memory`, whole huge pages of it, whatever was mapped there; its content becomes zero.

    Returns how many bytes were remapped: 0 where the system refuses, which then costs speed and nothing else. Another process that maps
    the same shared memory no longer sees what is written here.
    """
    first = -(-memory.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    nbytes = (memory.data_ptr() + memory.nbytes - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if nbytes <= 0 or advice is None:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE
    if libc.mmap(first, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != first:
        return 0
    libc.madvise(first, nbytes, advice)
    return nbytes
