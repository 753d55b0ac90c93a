"""A GPU as a worker's device: the arena is one allocation; weights and KV come and go on streams beside the compute stream.

    compute   the steps, in order; waits per layer for weights that are on their way
    weights   images, host to device
    out, in   KV blocks, device to host and back

A copy waits for an event of the compute stream at which its target was given up, or its source was complete. What a copy has brought is
computed with once the host has seen its end, but for weights: there the compute stream waits by itself.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from polymux.actors.copier import longest_run, runs
from polymux.actors.gpu.graphs import CudaGraphs, Graphs
from polymux.actors.gpu.pinned import PinnedMaps
from polymux.actors.gpu.runtime import Event, Runtime, Stream, TorchRuntime
from polymux.actors.gpu.target import ImageTarget
from polymux.actors.parallel.collectives import Collectives, Meeting
from polymux.actors.parallel.nccl_collectives import join_by_nccl, load_nccl
from polymux.transport.cuda.region import DeviceRegion as MigratingRegion
from polymux.transport.cuda.region import MappedRegion
from polymux.transport.cuda.runtime import CudaRuntime
from polymux.transport.errors import ConfigError, CudaError
from polymux.transport.rank_messages import RankMemory
from polymux.transport.region import Region
from polymux.transport.units import MIB

MOVE_BYTES = 64 * MIB  # of weights that move to a place which they overlap, at a time
KEEP_IMAGES_S = 300.0  # pinned; to pin an image again takes about as long as to copy it


class DeviceRegion(Region):
    """Memory that the host cannot touch: `buffer` is empty and there is no descriptor."""

    def __init__(self, memory: Tensor) -> None:
        super().__init__(memoryview(b""), None)
        self.nbytes = memory.nbytes
        self.memory = memory

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    def close(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)


class _Mark:
    def __init__(self, event: Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()


class _Download:
    def __init__(self, values: tuple[Tensor, ...], event: Event) -> None:
        self._values = values
        self._event = event

    def wait(self) -> tuple[Tensor, ...]:
        self._event.synchronize()
        return self._values


class CudaDevice:
    """The GPU that this process sees first."""

    is_async = True
    load_drag = 0.0  # a copy engine does it, and takes a hundredth of the memory's bandwidth
    keep_images_s = KEEP_IMAGES_S

    def __init__(self, runtime: Runtime | None = None, graphs: Graphs | None = None, cuda: CudaRuntime | None = None) -> None:
        """Raises ConfigError where there is none. `cuda`: in place of torch's own, which is loaded when other processes come in."""
        self._runtime: Runtime = runtime or TorchRuntime()
        self.torch_device = self._runtime.device
        self.pinned = PinnedMaps(self._runtime)
        self.graphs: Graphs | None = graphs or CudaGraphs()
        self._weights, self._out, self._in = (self._runtime.stream() for _ in range(3))
        self._cuda = cuda
        self._own: set[int] = set()  # where the regions' memory begins, and that of other ranks
        self._is_closed = False

    def enter(self) -> None:
        self._runtime.enter()

    def create(self, nbytes: int) -> Region:
        region = DeviceRegion(self._runtime.allocate(nbytes))
        self._own.add(region.address)
        return region

    def tensor(self, region: Region) -> Tensor:
        assert isinstance(region, DeviceRegion)
        return region.memory

    def migrating(self, region: Region) -> Region | MigratingRegion:
        return MigratingRegion.over(self.tensor(region), self._cuda)

    def use_for_weights(self, region: Region, nbytes: int) -> None:
        return

    def target(self, region: Region, offset: int, nbytes: int) -> ImageTarget:
        return ImageTarget(self.tensor(region)[offset : offset + nbytes], self._runtime, self._weights, self.pinned)

    def forget_image(self, image: memoryview) -> None:
        self.pinned.forget(image)

    def move(self, region: Region, source: int, target: int, nbytes: int) -> None:
        """Through a buffer where the ranges overlap, from the end that is not overwritten before it was read."""
        memory, compute = self.tensor(region), self._runtime.compute
        if abs(target - source) >= nbytes:
            compute.copy(memory[target : target + nbytes], memory[source : source + nbytes])
            return
        between = torch.empty(min(nbytes, MOVE_BYTES), dtype=torch.uint8, device=memory.device)
        starts = range(0, nbytes, MOVE_BYTES)
        for start in starts if target < source else reversed(starts):
            size = min(MOVE_BYTES, nbytes - start)
            compute.copy(between[:size], memory[source + start : source + start + size])
            compute.copy(memory[target + start : target + start + size], between[:size])

    def copy_blocks(
        self, source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]
    ) -> Generator[None, None, None]:
        return self._copy_blocks(source, source_ids, target, target_ids, self._runtime.compute.record())

    def _copy_blocks(
        self, source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int], after: Event
    ) -> Generator[None, None, None]:
        is_out = source.untyped_storage().data_ptr() in self._own
        stream, host = (self._out, target) if is_out else (self._in, source)
        number = self.pinned.use_tensor(host)
        under_way: list[Event] = []
        try:
            stream.wait(after)
            for from_id, to_id, count in runs(source_ids, target_ids, longest_run(source, target)):
                self._copy_run(stream, number, _bytes(source, from_id, count), _bytes(target, to_id, count), is_out=is_out)
                under_way.append(stream.record())
                if len(under_way) > 2:
                    under_way.pop(0).synchronize()
                yield
        finally:
            for event in under_way:
                event.synchronize()
            self.pinned.release(number)

    def _copy_run(self, stream: Stream, number: int, source: Tensor, target: Tensor, *, is_out: bool) -> None:
        host, device, at = (target, source, 0) if is_out else (source, target, 0)
        for piece in self.pinned.pieces(number, host.data_ptr(), host.nbytes):
            part = device[at : at + len(piece)]
            stream.copy(*((piece, part) if is_out else (part, piece)))
            at += len(piece)

    def upload(self, values: NDArray[Any]) -> Tensor:
        """Through pinned memory that torch keeps until the copy was made."""
        return self._runtime.pin(torch.from_numpy(values)).to(self.torch_device, non_blocking=True)

    def download(self, *values: Tensor) -> _Download:
        found = tuple(self._runtime.pinned_like(value) for value in values)
        for target, value in zip(found, values, strict=True):
            target.copy_(value, non_blocking=True)
        return _Download(found, self._runtime.compute.record())

    def mark(self) -> _Mark:
        return _Mark(self._runtime.compute.record())

    def lend(self, region: Region) -> RankMemory:
        cuda = self._cuda or CudaRuntime.load()
        cuda.set_device(self._index)
        return RankMemory(gpu=cuda.uuid(self._index), handle=cuda.memory_handle(self.tensor(region).data_ptr()))

    def borrow(self, memory: RankMemory, nbytes: int) -> MappedRegion:
        cuda = self._cuda or CudaRuntime.load()
        try:
            mapped = MappedRegion(cuda, self._index, memory.handle, nbytes, self.torch_device)
        except CudaError as error:
            raise ConfigError(
                f"{cuda.uuid(self._index)} cannot map the arena of a rank on {memory.gpu}: {error}; ranks need GPUs that reach each other"
            ) from error
        self._own.add(mapped.address)
        return mapped

    @property
    def _index(self) -> int:
        return self.torch_device.index or 0

    def meeting_place(self, folder: Path) -> bytes:
        return load_nccl().unique_id()

    def join(self, meeting: Meeting) -> Collectives:
        return join_by_nccl(meeting, self.torch_device)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._runtime.synchronize()
            if self.graphs is not None:
                self.graphs.clear()
            self.pinned.close()


def _bytes(kv: Tensor, first: int, count: int) -> Tensor:
    return kv[first : first + count].view(-1).view(torch.uint8)
