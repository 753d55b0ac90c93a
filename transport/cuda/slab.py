"""Staging memory of a GPU's transfers: slabs on the device, each with the block ids and the checksum sample of the move that is in it.

A move is gathered into one slab and sent from there, or received into one and scattered from there, so that one send does for thousands of
scattered blocks, and so that no peer ever writes to a block, nor reads one. In a slab a block has every head of the model once, in the
model's order, whatever the ranks on either side: each side knows only its own degree, gathers from those that together hold all heads,
and scatters to everyone that holds them.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from polymux.kernels.choice import implementation
from polymux.transport.cuda.region import DeviceGrid, DeviceRegion, as_tensor
from polymux.transport.errors import CudaError, OutOfMemory
from polymux.transport.head_slices import first_holders, heads_of
from polymux.transport.protocol import MAX_MOVE_BLOCKS, MAX_MOVE_BYTES
from polymux.transport.units import BLOCK_SIZE, MIB

PER_EDGE = 2  # while one is on the wire the other is filled; no edge may have more, for a dead peer keeps its own until the abort
_WORD_BYTES = 8
_ALL_HEADS = slice(None)


class Lane:
    """A stream of low priority, and torch's operations on it. Where the device is a stand-in of host memory they are done at once."""

    def __init__(self, region: DeviceRegion) -> None:
        self.stream = region.runtime.stream()
        self._runtime = region.runtime
        self._external: torch.cuda.Stream | None = None
        if region.device.type == "cuda":
            self._external = torch.cuda.ExternalStream(self.stream, device=region.device)  # type: ignore[no-untyped-call]

    @contextmanager
    def on(self) -> Iterator[None]:
        if self._external is None:
            yield
            return
        with torch.cuda.stream(self._external):
            yield

    def close(self) -> None:
        self._runtime.destroy_stream(self.stream)


class Slab:
    """Device memory for one move; whoever took it from the pool owns it. `event` is for whatever is done with it last."""

    def __init__(self, region: DeviceRegion) -> None:
        self._runtime = region.runtime
        self.address = self._runtime.malloc(MAX_MOVE_BYTES)
        self.memory = as_tensor(self.address, MAX_MOVE_BYTES, region.device)
        self.event = self._runtime.event()
        self._ids_address = self._runtime.pinned(2 * MAX_MOVE_BLOCKS * _WORD_BYTES)
        self._host_ids = as_tensor(self._ids_address, 2 * MAX_MOVE_BLOCKS * _WORD_BYTES, torch.device("cpu")).view(torch.int64)
        self._ids = torch.empty(2 * MAX_MOVE_BLOCKS, dtype=torch.int64, device=region.device)
        self._samples: list[int] = []  # pinned memory, the last of it in use
        self._sample = torch.empty(0, dtype=torch.uint8)

    def gather(self, grid: DeviceGrid, block_ids: Sequence[int], layers: range) -> None:
        """Blocks' layers, end to end, to the start of the slab. On the present lane."""
        self._gather(grid, self._upload(block_ids, 0), layers)

    def scatter(self, grid: DeviceGrid, block_ids: Sequence[int], layers: range) -> None:
        scatter_blocks = implementation("scatter_blocks", grid.kv.device)
        ids, some = self._upload(block_ids, MAX_MOVE_BLOCKS), slice(layers.start, layers.stop)
        for rank, one in enumerate(grid.ranks):
            scatter_blocks(one.kv, ids, self._part(grid, rank, len(ids), layers), some, _ALL_HEADS)

    def gather_back(self, grid: DeviceGrid, count: int, layers: range) -> None:
        """After `scatter`: the first so many blocks as they lie in the grid now. Their ids are on the device already."""
        self._gather(grid, self._ids[MAX_MOVE_BLOCKS : MAX_MOVE_BLOCKS + count], layers)

    def download(self, nbytes: int) -> None:
        """Begin to bring the first bytes to the host, for `checksum`."""
        if self._sample.nbytes < nbytes:  # what is too small is kept: to free it would wait for the device, and so for a peer
            size = 1 << (nbytes - 1).bit_length()
            self._samples.append(self._runtime.pinned(size))
            self._sample = as_tensor(self._samples[-1], size, torch.device("cpu"))
        self._sample[:nbytes].copy_(self.memory[:nbytes], non_blocking=True)

    def checksum(self, nbytes: int) -> int:
        """Of what was downloaded, once that is done."""
        return zlib.crc32((ctypes.c_char * nbytes).from_address(self._samples[-1])) if nbytes else 0

    def _gather(self, grid: DeviceGrid, ids: Tensor, layers: range) -> None:
        gather_blocks = implementation("gather_blocks", grid.kv.device)
        for rank in first_holders(grid.layout):
            part = self._part(grid, rank, len(ids), layers)
            gather_blocks(grid.ranks[rank].kv, ids, part, slice(layers.start, layers.stop), _ALL_HEADS)

    def _part(self, grid: DeviceGrid, rank: int, count: int, layers: range) -> Tensor:
        """Where a rank's heads are in the slab."""
        layout = grid.layout
        nbytes = count * len(layers) * layout.moved_layer_bytes
        shape = (count, len(layers), 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        heads = heads_of(layout, rank)
        return self.memory[:nbytes].view(grid.kv.dtype).view(shape)[:, :, :, heads.start : heads.stop]

    def _upload(self, block_ids: Sequence[int], at: int) -> Tensor:
        end = at + len(block_ids)
        self._host_ids[at:end] = torch.tensor(block_ids, dtype=torch.int64)
        return self._ids[at:end].copy_(self._host_ids[at:end], non_blocking=True)

    def close(self) -> None:
        """Waits for the device."""
        self.memory = self._ids = self._host_ids = self._sample = torch.empty(0, dtype=torch.uint8)
        for address in (*self._samples, self._ids_address):
            self._runtime.free_pinned(address)
        self._runtime.destroy_event(self.event)
        self._runtime.free(self.address)


def warm_up(device: torch.device) -> None:
    """Have the kernels compiled as every move needs them, and loaded. On the present lane."""
    blocks = torch.zeros(1, 1, 2, 1, BLOCK_SIZE, 64, dtype=torch.int16, device=device)
    slab, first = torch.zeros_like(blocks), torch.zeros(1, dtype=torch.int64, device=device)
    for operation in ("gather_blocks", "scatter_blocks"):
        implementation(operation, device)(blocks, first, slab, slice(0, 1), _ALL_HEADS)


class SlabPool:
    """A fixed number of slabs, shared by all edges; made when the first edge opens, so that nothing is allocated while serving.

    What comes in and what goes out have a pool each: were it one, workers whose slabs all hold what goes to each other would be stuck.
    """

    def __init__(self, region: DeviceRegion, num_slabs: int) -> None:
        self._region = region
        self._num_slabs = num_slabs
        self._all: list[Slab] = []
        self._free: list[Slab] = []

    def prepare(self) -> None:
        """Raises OutOfMemory where the device has no room for them."""
        try:
            while len(self._all) < self._num_slabs:
                slab = Slab(self._region)
                self._all.append(slab)
                self._free.append(slab)
        except CudaError as error:
            raise OutOfMemory(f"no device memory for {self._num_slabs} slabs of {MAX_MOVE_BYTES // MIB} MiB: {error}") from error

    def take(self) -> Slab | None:
        return self._free.pop() if self._free else None

    def give(self, slab: Slab) -> None:
        assert slab not in self._free
        self._free.append(slab)

    @property
    def num_out(self) -> int:
        return len(self._all) - len(self._free)

    def close(self) -> None:
        for slab in self._free:
            slab.close()
        self._free.clear()
        self._all.clear()
