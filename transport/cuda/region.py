"""A worker's memory region on a GPU, and the grid of KV blocks that lies over it: what `region.py` is for host memory.

The region is one allocation of its own, made past torch's caching allocator, so that a worker on the same host can map all of it by
one handle, and so that nothing else is ever on it. Block `i` of a layout is where it is in a host region: bytes mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polymux.transport.cuda.runtime import CudaRuntime
from polymux.transport.errors import ConfigError
from polymux.transport.messages import KVLayout
from polymux.transport.protocol import DeviceTerms
from polymux.transport.region import Grids, Region, check_ids

if TYPE_CHECKING:
    from polymux.transport.cuda.mover import Mover
    from polymux.transport.kv_cuda_ipc import Rings


def as_tensor(address: int, nbytes: int, device: torch.device) -> Tensor:
    """Device memory that somebody else owns, as bytes, under the device that its reader works on."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, nbytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class DeviceRegion:
    """`nbytes` of memory on one GPU, which torch sees as `tensor` (uint8). Its contents are undefined at first.

    `mover` is the thread that makes all transfers of this GPU, begun when it is first asked for. The region outlives its views.
    """

    def __init__(self, runtime: CudaRuntime, index: int, nbytes: int, device: torch.device, nccl_path: str | None = None) -> None:
        if nbytes <= 0:
            raise ConfigError(f"a region of {nbytes} bytes cannot hold anything; give it at least one KV block")
        self.runtime = runtime
        self.index = index
        self.nbytes = nbytes
        self.device = device
        self.uuid = runtime.uuid(index)
        runtime.set_device(index)
        self.address = runtime.malloc(nbytes)
        self.tensor = as_tensor(self.address, nbytes, device)
        self._nccl_path = nccl_path
        self._mover: Mover | None = None
        self._rings: Rings | None = None

    @classmethod
    def create(cls, nbytes: int, index: int = 0) -> DeviceRegion:
        """On the GPU that is number `index` in this process. Raises OSError without CUDA, CudaError without so much memory."""
        return cls(CudaRuntime.load(), index, nbytes, torch.device("cuda", index))

    def grids(self, followers: Sequence[Region] = ()) -> Grids[DeviceGrid]:
        """Raises ConfigError for an instance of several ranks: their memories are on as many GPUs."""
        if followers:
            raise ConfigError("KV of an instance of several ranks cannot move between GPUs; give its pool tensor_parallel: 1")
        return Grids(partial(DeviceGrid, self.tensor))

    @property
    def mover(self) -> Mover:
        """Not thread-safe: asked for when a worker is put together."""
        if self._mover is None:
            from polymux.transport.cuda.mover import Mover

            self._mover = Mover(self, nccl_path=self._nccl_path)
        return self._mover

    @property
    def rings(self) -> Rings:
        """The events of its edges as a source."""
        if self._rings is None:
            from polymux.transport.kv_cuda_ipc import Rings

            self._rings = Rings(self)
        return self._rings

    def terms(self) -> DeviceTerms:
        """What a peer needs to know to choose how to reach it."""
        mover = self.mover
        return DeviceTerms(uuid=self.uuid, nccl_version=mover.nccl.version if mover.nccl else 0, no_nccl=mover.no_nccl)

    def close(self) -> None:
        """Stop the mover and give the memory back, unless the device may still write to it. May be called twice."""
        mover, self._mover = self._mover, None
        is_quiet = mover.close() if mover is not None else True
        if self._rings is not None:
            self._rings.close()
            self._rings = None
        if self.address and is_quiet:
            self.tensor = torch.empty(0, dtype=torch.uint8)
            self.runtime.set_device(self.index)
            self.runtime.free(self.address)
            self.address = 0


class DeviceGrid:
    """The blocks of one layout over device memory: `rows[block, layer]` is one contiguous row of the widest integers that fit."""

    def __init__(self, memory: Tensor, layout: KVLayout) -> None:
        self.layout = layout
        self.num_blocks = memory.nbytes // layout.block_bytes
        self.address = memory.data_ptr()
        self.memory = memory[: self.num_blocks * layout.block_bytes]
        item = next(n for n in (8, 4, 2, 1) if layout.layer_bytes % n == 0)
        dtype = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[item]
        self.rows = self.memory.view(dtype).view(self.num_blocks, layout.num_layers, layout.layer_bytes // item)

    def check(self, block_ids: Sequence[int]) -> None:
        """Raise GrantViolation unless every id is a block of this grid."""
        check_ids(block_ids, self.num_blocks, self.layout)
