"""Large copies within one process's memory, at the speed of that memory and with the interpreter's lock released.

A copy past a certain size goes around the cache, which is nearly twice as fast: the target's lines are not read before they are written.
The C library draws that line at a share of the last-level cache, which on a large server is hundreds of megabytes. Processes that copy
weights in pieces lower it with `TUNABLES` in their environment; where nobody did, `piece_bytes` makes the pieces as large as it takes.
From sixteen times that size on glibc reads four pages in turn instead of two, which was 15% faster where it was measured: so the line is
drawn at a 32nd of a piece.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from functools import cache
from pathlib import Path

import numpy as np

from polymux.transport.units import MIB

PIECE_BYTES = 4 * MIB
LONG_PIECE_BYTES = 16 * MIB  # of large images, whose layers are longer still
TUNABLES = {"GLIBC_TUNABLES": f"glibc.cpu.x86_non_temporal_threshold={PIECE_BYTES // 32:#x}"}  # read once, when a process starts
_QUERY_S = 5.0
_MIN_PIECES = 4  # in an image: with fewer, nothing is computed while it loads
_MANY_PIECES = 64  # more than that only cost their bookkeeping

_memmove = ctypes.CDLL(None).memmove
_memmove.restype = ctypes.c_void_p
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copy all of `source` over `target`, of the same length. They may overlap."""
    if target.nbytes != source.nbytes or target.readonly:
        raise ValueError(f"cannot copy {source.nbytes} bytes over {'read-only ' * target.readonly}{target.nbytes}")
    if target.nbytes:
        _memmove(_address(target), _address(source), target.nbytes)


def piece_bytes(nbytes: int) -> int:
    """How much of a stream of `nbytes` to copy at a time: little, so that its start can be used early, unless large pieces copy faster."""
    piece = min(max(PIECE_BYTES, nbytes // _MANY_PIECES), LONG_PIECE_BYTES)
    threshold = around_cache_bytes()
    return threshold if threshold is not None and piece < threshold <= nbytes // _MIN_PIECES else piece


@cache
def around_cache_bytes() -> int | None:
    """From which size on this process copies around the cache, as its dynamic loader says; None where it does not say."""
    try:
        loader = next(path for path in _mapped_files() if re.match(r"ld[-.].*\.so", Path(path).name))
        listed = subprocess.run([loader, "--list-tunables"], capture_output=True, text=True, timeout=_QUERY_S, check=True).stdout
    except (OSError, StopIteration, subprocess.SubprocessError):
        return None
    found = re.search(r"x86_non_temporal_threshold: (0x[0-9a-f]+)", listed)
    return int(found[1], 16) if found else None


def _mapped_files() -> list[str]:
    return [fields[5] for line in Path("/proc/self/maps").read_text().splitlines() if len(fields := line.split(maxsplit=5)) == 6]


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
