"""The node's host memory for KV, shared by its workers: one memfd of the store's process, cut into slabs that workers lease.

A lease is the kernel's: an open file description lock on byte `slab` of the memfd (fcntl(2), F_OFD_SETLK). Taking and returning one is a
system call of half a microsecond and asks nobody. It holds exactly as long as the worker's own description of the file, which its mapping
keeps open: the slabs of a worker that dies, however it dies, are free once none of its threads could write to them any more, and the
death of the store takes nothing from anybody. The store only hands the descriptor over.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from dataclasses import dataclass

from polymux.transport.errors import ConfigError, PeerLost, WireError
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB

MIN_SLAB_BYTES = 64 * KIB
MAX_SLAB_BYTES = 64 * MIB
SLABS_PER_TIER = 256  # a slab is one worker's and one block shape's at a time
_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid, which must be 0


def default_slab_bytes(tier_bytes: int) -> int:
    """A power of two near `tier_bytes / SLABS_PER_TIER`."""
    target = max(tier_bytes // SLABS_PER_TIER, 1)
    return min(max(1 << (target.bit_length() - 1), MIN_SLAB_BYTES), MAX_SLAB_BYTES)


class TierMemory:
    """The store's side: the memory itself. Pages are taken when first touched."""

    def __init__(self, nbytes: int, slab_bytes: int | None = None) -> None:
        """Raises ConfigError when not one slab fits."""
        self.slab_bytes = slab_bytes or default_slab_bytes(nbytes)
        self.nbytes = nbytes // self.slab_bytes * self.slab_bytes
        if not self.nbytes:
            raise ConfigError(f"store.kv_bytes={nbytes} holds no slab of {self.slab_bytes} bytes; raise it, or set 0 to do without")
        self._region = Region.create(self.nbytes, name="polymux-kv")

    def open(self) -> tuple[int, int]:
        """The slab size and a descriptor to write through, which the caller closes."""
        if self._region.fd is None:
            raise PeerLost("this node's host tier is closed")
        return self.slab_bytes, os.dup(self._region.fd)

    def close(self) -> None:
        """Give the descriptor up; the memory lives on while a worker maps it."""
        self._region.close()


@dataclass(slots=True)
class OpenTier:
    """What a worker was handed. It owns `fd`, whose description others share: `SlabLeases` makes one of its own."""

    fd: int
    nbytes: int
    slab_bytes: int


class SlabLeases:
    """One worker's mapping of the tier, and its leases. Not thread-safe.

    Slabs are only ever written by the one that leases them. `close` gives all of them up, and the memory with them.
    """

    def __init__(self, tier: OpenTier) -> None:
        """Takes `tier.fd` over. Raises WireError when it is no such memory, ConfigError where the kernel has no such locks."""
        try:
            size = os.fstat(tier.fd).st_size
            if size != tier.nbytes or not 0 < tier.slab_bytes <= tier.nbytes or tier.nbytes % tier.slab_bytes:
                raise WireError(f"a host tier of {size} bytes in slabs of {tier.slab_bytes}, and {tier.nbytes} were announced")
            if not fcntl.fcntl(tier.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise WireError("the host tier's memory could shrink under its readers")
            self._fd = os.open(f"/proc/self/fd/{tier.fd}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(tier.fd)
        self.nbytes, self.slab_bytes = tier.nbytes, tier.slab_bytes
        self.num_slabs = tier.nbytes // tier.slab_bytes
        self._held: set[int] = set()
        try:
            self._conflict(0, 1)
            self.buffer = memoryview(mmap.mmap(self._fd, self.nbytes))
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(f"the host tier cannot be used here: {error}; set store.kv_bytes=0 to do without") from error

    @property
    def held(self) -> frozenset[int]:
        return frozenset(self._held)

    def take(self) -> int | None:
        """Lease the lowest free slab; None when there is none, or the tier is closed."""
        start = 0
        while self._fd >= 0 and start < self.num_slabs:
            if start in self._held:
                start += 1
            elif self._lock(fcntl.F_WRLCK, start):
                self._held.add(start)
                return start
            else:
                conflict = self._conflict(start, 1)
                start = conflict[1] if conflict else start + 1  # the whole run of slabs that its owner holds
        return None

    def give_back(self, slab: int) -> None:
        """Raises KeyError for a slab that is not held."""
        self._held.remove(slab)
        if self._fd >= 0:
            self._lock(fcntl.F_UNLCK, slab)

    @property
    def num_free(self) -> int:
        """Slabs that nobody holds at this moment: two system calls for each run of slabs that somebody else does."""
        if self._fd < 0:
            return 0
        others, todo = 0, [(0, self.num_slabs)]
        while todo:
            start, end = todo.pop()
            conflict = self._conflict(start, end - start) if start < end else None
            if conflict is not None:
                low, high = max(conflict[0], start), min(conflict[1], end)
                others += high - low
                todo += [(start, low), (high, end)]
        return self.num_slabs - others - len(self._held)

    def close(self) -> None:
        """No thread may still copy. May be called twice."""
        if self._fd < 0:
            return
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
        self._held.clear()
        self.buffer = memoryview(b"")
        os.close(self._fd)
        self._fd = -1

    def _lock(self, kind: int, slab: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, slab, 1, 0))
        except BlockingIOError:
            return False
        return True

    def _conflict(self, start: int, count: int) -> tuple[int, int] | None:
        """Some run of slabs in `[start, start + count)` that another description holds: first slab and the one past the last."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, count, 0))
        kind, _, low, length, _ = _FLOCK.unpack(answer)
        return None if kind == fcntl.F_UNLCK else (low, low + length)
