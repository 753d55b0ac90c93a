"""A worker's one memory region, and the grid of KV blocks that lies over it.

The region is anonymous shared memory (a memfd), so that a worker on the same host can be handed the descriptor and read the
blocks in place. Block `i` of a layout is `[i * block_bytes, (i + 1) * block_bytes)`, and one layer of it is one contiguous range in
there. Every layout has its own grid over the whole region; which of them a byte serves at a moment is the arena's business.

An instance of several ranks has a region for each, and the ranks' blocks of one id are one block: its grid is the first rank's, with the
others' behind it (`BlockGrid.ranks`).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from polymux.transport.errors import ConfigError, GrantViolation
from polymux.transport.head_slices import first_holders, sharded
from polymux.transport.messages import KVLayout
from polymux.transport.protocol import DeviceTerms

if TYPE_CHECKING:
    from polymux.transport.cuda.region import MappedRegion

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL  # a peer that maps it can never meet SIGBUS


class Region:
    """`nbytes` of zeroed memory, writable through `buffer`.

    `fd` is the memfd behind it, or None for plain memory, which can be a transfer's end but cannot be handed to another process.
    """

    def __init__(self, buffer: memoryview, fd: int | None) -> None:
        self.buffer = buffer
        self.nbytes = buffer.nbytes
        self.fd = fd

    @classmethod
    def create(cls, nbytes: int, *, name: str = "polymux-arena") -> Region:
        """Shared memory of exactly `nbytes`. Pages are taken when first touched."""
        if nbytes <= 0:
            raise ConfigError(f"a region of {nbytes} bytes cannot hold anything; give it at least one KV block")
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(memoryview(mmap.mmap(fd, nbytes)), fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def wrap(cls, buffer: bytearray | memoryview) -> Region:
        """Plain memory as a region: for tests and for a source whose process is the only reader."""
        return cls(memoryview(buffer).cast("B"), None)

    @classmethod
    def adopt(cls, fd: int, nbytes: int) -> Region:
        """Another process's region, writable here too; the descriptor is the region's from now on. Raises ConfigError."""
        try:
            _check_size(fd, nbytes)
            return cls(memoryview(mmap.mmap(fd, nbytes)), fd)
        except BaseException:
            os.close(fd)
            raise

    def terms(self) -> DeviceTerms:
        """What a peer needs to know to choose how to reach it: this is host memory."""
        return DeviceTerms()

    def mark(self) -> None:
        """What is pushed from host memory is final."""

    def grids(self, followers: Sequence[Region | MappedRegion] = ()) -> Grids[BlockGrid]:
        """`followers`: the regions of an instance's other ranks."""
        others = [follower.buffer for follower in followers if isinstance(follower, Region)]
        if len(others) < len(followers):
            raise ConfigError("the first rank of an instance is on a CPU and another is not; give all the same device")
        return grids_over([self.buffer, *others])

    def read_only_fd(self) -> int:
        """A new descriptor through which the memory can be read and not written; the caller closes it."""
        if self.fd is None:
            raise ConfigError("this region is plain memory and has no descriptor; make it with Region.create")
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Give the descriptor up. The memory itself goes when the last view of it does. May be called twice."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.buffer = memoryview(b"")


def map_read_only(fd: int, nbytes: int) -> memoryview:
    """Map a peer's region. Raises ConfigError when the descriptor is smaller than it claims or could shrink under us."""
    _check_size(fd, nbytes)
    return memoryview(mmap.mmap(fd, nbytes, prot=mmap.PROT_READ))


def _check_size(fd: int, nbytes: int) -> None:
    size = os.fstat(fd).st_size
    if size < nbytes or nbytes <= 0:
        raise ConfigError(f"the peer's region is {size} bytes, not the {nbytes} that it announced")
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ConfigError("the peer's region is not sealed against shrinking; make it with Region.create")


def drop_pages(view: memoryview) -> None:
    """Take a mapped peer's pages out of our page table, and so out of our resident size; reading maps them again."""
    if isinstance(view.obj, mmap.mmap):
        view.obj.madvise(mmap.MADV_DONTNEED)


def this_host() -> str:
    """Equal for two processes under one kernel, which may therefore share memory."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Grid(Protocol):
    """The blocks of one layout over some memory; what else it can do depends on where that memory is."""

    layout: KVLayout
    num_blocks: int

    def check(self, block_ids: Sequence[int]) -> None:
        """Raise GrantViolation unless every id is a block of this grid."""


G = TypeVar("G", bound=Grid, covariant=True)


def check_ids(block_ids: Sequence[int], num_blocks: int, layout: KVLayout) -> None:
    """Raise GrantViolation unless every id is one of so many blocks."""
    for block_id in block_ids:
        if not 0 <= block_id < num_blocks:
            raise GrantViolation(f"block {block_id} is outside the {num_blocks} blocks of {layout.block_bytes} bytes here")


class BlockGrid:
    """The blocks of one layout over a buffer: `array[block, layer]` is one contiguous row of the widest integers that fit.

    `others`: the buffers of an instance's other ranks, as large as the first.
    """

    def __init__(self, buffer: memoryview, layout: KVLayout, others: Sequence[memoryview] = ()) -> None:
        if others and len(others) + 1 != layout.num_ranks:
            raise ConfigError(f"{len(others) + 1} ranks' memories cannot hold KV blocks of {layout.num_ranks} ranks")
        self.layout = layout
        self.ranks: tuple[BlockGrid, ...] = (self, *(BlockGrid(other, layout) for other in others))
        self.num_blocks = buffer.nbytes // layout.block_bytes
        self.buffer = buffer[: self.num_blocks * layout.block_bytes]
        item = next(n for n in (8, 4, 2, 1) if layout.layer_bytes % n == 0)
        flat: NDArray[Any] = np.frombuffer(self.buffer, dtype=f"u{item}")
        self.address = flat.ctypes.data
        self.array = flat.reshape(self.num_blocks, layout.num_layers, layout.layer_bytes // item)
        self.heads = flat.reshape(self.num_blocks, layout.num_layers, 2, layout.rank_kv_heads, layout.head_bytes // item)

    def check(self, block_ids: Sequence[int]) -> None:
        """Raise GrantViolation unless every id is a block of this grid."""
        check_ids(block_ids, self.num_blocks, self.layout)

    def view(self, block_id: int, layer_lo: int, layer_hi: int) -> memoryview:
        """The bytes of layers [layer_lo, layer_hi) of one block, on this rank."""
        start = block_id * self.layout.block_bytes
        return self.buffer[start + layer_lo * self.layout.layer_bytes : start + layer_hi * self.layout.layer_bytes]

    def views(self, block_id: int, layer_lo: int, layer_hi: int) -> Iterator[memoryview]:
        """The same of all ranks, each head of the model once and in its order, as it travels: layer by layer, K then V."""
        if len(self.ranks) == 1:
            yield self.view(block_id, layer_lo, layer_hi)
            return
        layout = self.layout
        side_bytes = layout.rank_kv_heads * layout.head_bytes
        holders = [self.ranks[rank] for rank in first_holders(layout)]
        start = block_id * layout.block_bytes + layer_lo * layout.layer_bytes
        for side in range(2 * (layer_hi - layer_lo)):
            begin = start + side * side_bytes
            for holder in holders:
                yield holder.buffer[begin : begin + side_bytes]

    def spread(self, block_ids: Sequence[int], layer_lo: int, layer_hi: int) -> None:
        """What came through `views` goes to the ranks that hold the same heads."""
        holders = first_holders(self.layout)
        for rank, grid in enumerate(self.ranks):
            if rank not in holders:
                first = self.ranks[max(holder for holder in holders if holder < rank)]
                for block_id in block_ids:
                    grid.array[block_id, layer_lo:layer_hi] = first.array[block_id, layer_lo:layer_hi]


class Grids(Generic[G]):
    """The grids over one memory, or over those of an instance's ranks, made once per layout."""

    def __init__(self, make: Callable[[KVLayout], G], num_ranks: int = 1) -> None:
        self._make: Callable[[KVLayout], G] | None = make
        self._num_ranks = num_ranks
        self._grids: dict[KVLayout, G] = {}

    def of(self, layout: KVLayout) -> G:
        grid = self._grids.get(layout)
        if grid is None:
            assert self._make is not None, "closed"
            grid = self._grids[layout] = self._make(layout)
        return grid

    def of_model(self, layout: KVLayout) -> G:
        """The grid of the same model's blocks as they lie here, whatever the ranks that `layout` is for."""
        return self.of(sharded(layout, self._num_ranks))

    def close(self) -> None:
        """Let go of the memory."""
        self._grids.clear()
        self._make = None


def grids_over(buffers: Sequence[memoryview]) -> Grids[BlockGrid]:
    """Of one host memory, or of that of each rank."""
    return Grids(lambda layout: BlockGrid(buffers[0], layout, buffers[1:]), len(buffers))
