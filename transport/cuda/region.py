"""A worker's memory region on a GPU, and the grid of KV blocks that lies over it: what `region.py` is for host memory.

The region is one allocation of its own, made past torch's caching allocator, so that a worker on the same host can map all of it by
one handle, and so that nothing else is ever on it. Block `i` of a layout is where it is in a host region: bytes mean the same everywhere.

Of an instance each rank has such memory in a process of its own, which rank 0 maps (`MappedRegion`) and hands on to who wants to read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polymux.transport.cuda.runtime import CudaRuntime
from polymux.transport.errors import ConfigError, CudaError
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
    def over(cls, tensor: Tensor, runtime: CudaRuntime | None = None) -> DeviceRegion:
        """Memory that somebody else took, from the first byte to the last of one allocation, and gives back after `close`."""
        return cls(runtime or CudaRuntime.load(), tensor.device.index or 0, tensor, is_owned=False)

    def mark(self) -> DeviceEvent | None:
        """All that the calling thread has given this GPU to do until now. None where the device is a stand-in of host memory."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def grids(self, followers: Sequence[Region | MappedRegion] = ()) -> Grids[DeviceGrid]:
        """`followers`: what an instance's other ranks have, mapped here."""
        mapped = [follower for follower in followers if isinstance(follower, MappedRegion)]
        if len(mapped) < len(followers):
            raise ConfigError("the first rank of an instance is on a GPU and another is not; give all the same device")
        return device_grids([self.tensor, *(follower.tensor for follower in mapped)])

    def handles(self, followers: Sequence[Region | MappedRegion] = ()) -> list[bytes]:
        """What another process needs to map this memory, and that of each other rank."""
        self.runtime.set_device(self.index)
        own = self.runtime.memory_handle(self.address)
        return [own, *(follower.handle for follower in followers if isinstance(follower, MappedRegion))]

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


class MappedRegion:
    """What another process has on a GPU of this host, readable and writable here under peer access; `tensor` is of this process's device.

    `handle` is the owner's: memory that was mapped cannot be exported again, but who is given the handle can map it too. To give memory
    back while another process maps it is undefined: so this is closed first, when the owner is to end, and not at all once it was killed.
    """

    def __init__(self, runtime: CudaRuntime, index: int, handle: bytes, nbytes: int, device: torch.device) -> None:
        """Raises CudaError where this GPU (`index`, for torch `device`) does not reach the other one, or the owner is gone."""
        self._runtime = runtime
        self._index = index
        self.handle = handle
        self.nbytes = nbytes
        runtime.set_device(index)
        self.address = runtime.open_memory(handle)
        self.tensor = as_tensor(self.address, nbytes, device)

    def close(self) -> None:
        """Nothing may be copied to or from it any more. May be called twice."""
        address, self.address = self.address, 0
        self.tensor = torch.empty(0, dtype=torch.uint8)
        if address:
            with suppress(CudaError):  # its owner may be dead
                self._runtime.set_device(self._index)
                self._runtime.close_memory(address)


class DeviceGrid:
    """The blocks of one layout over device memory: `kv[block, layer, k|v, kv_head, slot, head_dim]`, as integers of the items' size.

    `others`: the memories of an instance's other ranks, as large as the first.
    """

    def __init__(self, memory: Tensor, layout: KVLayout, others: Sequence[Tensor] = ()) -> None:
        if others and len(others) + 1 != layout.num_ranks:
            raise ConfigError(f"{len(others) + 1} ranks' memories cannot hold KV blocks of {layout.num_ranks} ranks")
        self.layout = layout
        self.ranks: tuple[DeviceGrid, ...] = (self, *(DeviceGrid(other, layout) for other in others))
        self.num_blocks = memory.nbytes // layout.block_bytes
        item = {4: torch.int32, 2: torch.int16}[ITEM_BYTES[layout.dtype]]
        shape = (self.num_blocks, layout.num_layers, 2, layout.rank_kv_heads, layout.block_size, layout.head_dim)
        self.kv = memory[: self.num_blocks * layout.block_bytes].view(item).view(shape)

    def check(self, block_ids: Sequence[int]) -> None:
        """Raise GrantViolation unless every id is a block of this grid."""
        check_ids(block_ids, self.num_blocks, self.layout)


def device_grids(memories: Sequence[Tensor]) -> Grids[DeviceGrid]:
    """Of one device memory, or of that of each rank."""
    return Grids(lambda layout: DeviceGrid(memories[0], layout, memories[1:]), len(memories))
