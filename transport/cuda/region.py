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
from polymux.transport.kv_backend import DeviceEvent
from polymux.transport.messages import ITEM_BYTES, KVLayout
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
    """Memory on one GPU, which torch sees as `tensor` (uint8), and what makes it one end of KV migration.

    It is an allocation of its own, or a handle would expose more than it. `mover` is the thread that makes all transfers of this
    GPU, begun when it is first asked for. The region outlives its views.
    """

    def __init__(self, runtime: CudaRuntime, index: int, tensor: Tensor, *, is_owned: bool, nccl_path: str | None = None) -> None:
        self.runtime = runtime
        self.index = index
        self.tensor = tensor
        self.nbytes = tensor.nbytes
        self.address = tensor.data_ptr()
        self.device = tensor.device
        self.uuid = runtime.uuid(index)
        self._is_owned = is_owned
        self._nccl_path = nccl_path
        self._mover: Mover | None = None
        self._rings: Rings | None = None

    @classmethod
    def create(cls, nbytes: int, index: int = 0) -> DeviceRegion:
        """New memory on GPU number `index` of this process, contents undefined. Raises OSError without CUDA, CudaError without room."""
        return cls.allocate(CudaRuntime.load(), index, nbytes, torch.device("cuda", index))

    @classmethod
    def allocate(cls, runtime: CudaRuntime, index: int, nbytes: int, device: torch.device, nccl_path: str | None = None) -> DeviceRegion:
        """`device` is how torch sees it."""
        if nbytes <= 0:
            raise ConfigError(f"a region of {nbytes} bytes cannot hold anything; give it at least one KV block")
        runtime.set_device(index)
        return cls(runtime, index, as_tensor(runtime.malloc(nbytes), nbytes, device), is_owned=True, nccl_path=nccl_path)

    @classmethod
    def over(cls, tensor: Tensor) -> DeviceRegion:
        """Memory that somebody else took, from the first byte to the last of one allocation, and gives back after `close`."""
        return cls(CudaRuntime.load(), tensor.device.index or 0, tensor, is_owned=False)

    def mark(self) -> DeviceEvent | None:
        """All that the calling thread has given this GPU to do until now. None where the device is a stand-in of host memory."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

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
        address, self.address = self.address, 0
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if address and is_quiet and self._is_owned:
            self.runtime.set_device(self.index)
            self.runtime.free(address)


class DeviceGrid:
    """The blocks of one layout over device memory: `kv[block, layer, k|v, kv_head, slot, head_dim]`, as integers of the items' size."""

    def __init__(self, memory: Tensor, layout: KVLayout) -> None:
        self.layout = layout
        self.num_blocks = memory.nbytes // layout.block_bytes
        item = {4: torch.int32, 2: torch.int16}[ITEM_BYTES[layout.dtype]]
        shape = (self.num_blocks, layout.num_layers, 2, layout.rank_kv_heads, layout.block_size, layout.head_dim)
        self.kv = memory[: self.num_blocks * layout.block_bytes].view(item).view(shape)

    def check(self, block_ids: Sequence[int]) -> None:
        """Raise GrantViolation unless every id is a block of this grid."""
        check_ids(block_ids, self.num_blocks, self.layout)
