"""Host memory that the GPU copies from and to at full speed: mapped by others, pinned here chunk by chunk when it is first used.

Pinning takes about as long as copying once, so a chunk at a time lets the first copies start at once, and what is never used is never
pinned. A copy that crosses from one chunk into the next is two copies: the driver takes no range that was registered in parts. Chunks
begin where pages do, since pages are what is pinned, and none of them twice. Where memory cannot be pinned at all it is copied from as it
is, which is slower and nothing else.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from polymux.actors.gpu.runtime import Runtime
from polymux.transport.errors import PolymuxError
from polymux.transport.units import MIB

log = logging.getLogger("polymux.gpu")

CHUNK_BYTES = 32 * MIB


@dataclass(slots=True, eq=False)
class _Map:
    owner: object  # keeps the memory mapped while a page of it is pinned
    begin: int
    end: int
    read_only: bool
    chunks: dict[int, range] = field(default_factory=dict)  # addresses of each pinned one, by number
    num_users: int = 0
    is_forgotten: bool = False


class PinnedMaps:
    """Thread-safe. A map that was used stays pinned until it is forgotten and nobody copies from it."""

    def __init__(self, runtime: Runtime, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._runtime = runtime
        self._chunk_bytes = chunk_bytes
        self._maps: dict[int, _Map] = {}  # by where they begin
        self._lock = threading.Lock()
        self._refused: set[bool] = set()  # read-only memory, or other, that cannot be pinned: said once

    def use_buffer(self, data: memoryview) -> int:
        """The map that these bytes are part of, read-only ones; `release` it after the last copy. What `data` was cut from is kept."""
        whole = memoryview(data.obj)
        return self._use(data.obj, address_of(whole), whole.nbytes, read_only=data.readonly)

    def use_tensor(self, tensor: Tensor) -> int:
        """As `use_buffer`, for a view of mapped memory that can be written."""
        storage = tensor.untyped_storage()
        return self._use(storage, storage.data_ptr(), storage.nbytes(), read_only=False)

    def release(self, number: int) -> None:
        with self._lock:
            found = self._maps[number]
            found.num_users -= 1
            self._drop_if_unused(found)

    def forget(self, data: memoryview) -> None:
        """Nobody begins to copy from the map that these bytes are part of: it need not stay pinned."""
        begin = address_of(memoryview(data.obj))
        with self._lock:
            if (found := self._maps.get(begin)) is not None and found.owner is data.obj:
                found.is_forgotten = True
                self._drop_if_unused(found)

    def pieces(self, number: int, address: int, nbytes: int) -> Iterator[Tensor]:
        """The bytes at `address` of a map in use, pinned where that can be, in pieces that can each be copied at once."""
        with self._lock:
            found = self._maps[number]
        assert found.begin <= address and address + nbytes <= found.end
        end, first = address + nbytes, self._first(found)
        while address < end:
            chunk = (address - first) // self._chunk_bytes
            stop = min(end, first + (chunk + 1) * self._chunk_bytes)
            self._pin(found, chunk)
            yield tensor_at(address, stop - address)
            address = stop

    def close(self) -> None:
        """Unpin everything. No copy may be under way."""
        with self._lock:
            for found in list(self._maps.values()):
                self._unpin(found)
            self._maps.clear()

    @property
    def num_pinned_bytes(self) -> int:
        with self._lock:
            return sum(len(chunk) for found in self._maps.values() for chunk in found.chunks.values())

    def _first(self, found: _Map) -> int:
        """Where the first chunk would begin: where the first page does, or a part of it that divides the chunks."""
        return found.begin - found.begin % math.gcd(self._chunk_bytes, mmap.PAGESIZE)

    def _use(self, owner: object, begin: int, nbytes: int, *, read_only: bool) -> int:
        with self._lock:
            found = self._maps.get(begin)
            if found is None:  # the owner of an older one at this place would still be mapped here
                found = self._maps[begin] = _Map(owner, begin, begin + nbytes, read_only)
            found.num_users += 1
            found.is_forgotten = False
            return begin

    def _pin(self, found: _Map, chunk: int) -> None:
        with self._lock:
            if chunk in found.chunks or found.read_only in self._refused:
                return
            at = self._first(found) + chunk * self._chunk_bytes
            part = range(max(at, found.begin), min(at + self._chunk_bytes, found.end))
            try:
                self._runtime.register(part.start, len(part), read_only=found.read_only)
            except PolymuxError as error:
                self._refused.add(found.read_only)
                log.warning("memory.not_pinned is_read_only=%s reason=%s", found.read_only, error)
                return
            found.chunks[chunk] = part

    def _drop_if_unused(self, found: _Map) -> None:
        if found.is_forgotten and not found.num_users:
            self._unpin(found)
            del self._maps[found.begin]

    def _unpin(self, found: _Map) -> None:
        while found.chunks:
            self._runtime.unregister(found.chunks.popitem()[1].start)


def address_of(data: memoryview) -> int:
    return int(np.frombuffer(data, dtype=np.uint8).ctypes.data)


def tensor_at(address: int, nbytes: int) -> Tensor:
    """uint8 [nbytes] over memory that the caller keeps mapped; read-only memory must only be read."""
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
