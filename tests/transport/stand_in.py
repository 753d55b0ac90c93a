"""The stand-in of a GPU for tests: a real shared library with the names of libcudart and libnccl, compiled from `stand_in.c`.

Everything above the two typed layers is the code that runs on GPUs; only torch's own operations, which gather and scatter, see host memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from polymux.transport.cuda.region import DeviceRegion, MappedRegion
from polymux.transport.cuda.runtime import CudaRuntime

SOURCE = Path(__file__).with_suffix(".c")
NEVER = 2**62  # for the knobs that count


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def library() -> str:
    """Its path; compiled once for each version of the source. Raises RuntimeError without a compiler."""
    cc = compiler()
    if cc is None:
        raise RuntimeError("no C compiler")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"polymux-stand-in-{os.getuid()}-{digest}.so")
    if not path.exists():
        made = path.with_suffix(f".{os.getpid()}")
        subprocess.run([cc, "-O1", "-shared", "-fPIC", "-pthread", "-o", str(made), str(SOURCE)], check=True, timeout=60)
        made.replace(path)
    return str(path)


def region(nbytes: int, nccl_path: str | None = None) -> DeviceRegion:
    path = library()
    return DeviceRegion.allocate(CudaRuntime.load(path), 0, nbytes, torch.device("cpu"), nccl_path or path)


class OtherRank(MappedRegion):
    """What a process of another rank would have, taken and mapped by this one."""

    def __init__(self, first: DeviceRegion) -> None:
        self._taken = first.runtime.malloc(first.nbytes)
        super().__init__(first.runtime, first.index, first.runtime.memory_handle(self._taken), first.nbytes, first.device)

    def close(self) -> None:
        super().close()
        taken, self._taken = self._taken, 0
        if taken:
            self._runtime.free(taken)


def turn(**knobs: int) -> None:
    """Set knobs of this process's stand-in."""
    loaded = ctypes.CDLL(library())
    for name, value in knobs.items():
        assert loaded.stand_in_set(name.encode(), ctypes.c_long(value)) == 0, name


def count(name: str) -> int:
    """`operations`, `comms` (not yet aborted) or `maps` (of other processes' memory and events)."""
    loaded = ctypes.CDLL(library())
    loaded.stand_in_count.restype = ctypes.c_long
    return int(loaded.stand_in_count(name.encode()))


RESTED = {
    "init_hangs": 0,
    "abort_hangs": 0,
    "hang_after": NEVER,
    "fail_after": NEVER,
    "late_us": 0,
    "damage_after": NEVER,
    "peer_hangs": 0,
    "work_us": 0,
    "opens_own": 1,
    "version": 22907,
    "devices": 1,
    "sticky": 0,
}
