"""What a worker computes on, behind one door: where its memory lies, how bytes get there, and what is done after what.

A device has a queue of its own: work that is handed to it is done later, in the order in which it was handed over. On a CPU the queue is
always empty, since everything is done when the call returns; what orders work costs nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from polymux.actors.copier import copy_blocks
from polymux.actors.parallel.collectives import Collectives, GlooCollectives, Meeting
from polymux.actors.weights.huge_pages import use_huge_pages
from polymux.actors.weights.load import HostTarget, Target
from polymux.transport.bulk_copy import copy_bytes
from polymux.transport.cuda.region import DeviceRegion, MappedRegion
from polymux.transport.errors import ConfigError
from polymux.transport.image_maps import KEEP_S
from polymux.transport.rank_messages import RankMemory
from polymux.transport.region import Region

if TYPE_CHECKING:
    from polymux.actors.gpu.graphs import Graphs

DEVICES = ("cpu", "cuda")


class Mark(Protocol):
    """A point in the queue of a device."""

    def wait(self) -> None:
        """Return once everything before it is done."""


class Download(Protocol):
    """Values on their way to the host."""

    def wait(self) -> tuple[Tensor, ...]:
        """Them, on the CPU."""


class Device(Protocol):
    """One per worker. The engine thread calls everything here but what says otherwise."""

    torch_device: torch.device
    is_async: bool  # results of a step are there later than its launch
    load_drag: float  # by how much more a step takes while weights are loaded beside it
    keep_images_s: float  # how long a weight image stays mapped after it was loaded
    graphs: Graphs | None  # what runs its decode steps, where steps are planned; None: they are called as they come

    def enter(self) -> None:
        """The calling thread drives the engine from now on: its tensor operations go to the device's queue."""

    def create(self, nbytes: int) -> Region:
        """All the memory that the arena will have, zeroed or not."""

    def tensor(self, region: Region) -> Tensor:
        """The region's bytes, uint8 [nbytes]."""

    def migrating(self, region: Region) -> Region | DeviceRegion:
        """The same memory as an end of KV migration; if it is another object, it is closed before the region is."""

    def use_for_weights(self, region: Region, nbytes: int) -> None:
        """The first `nbytes` of a region will hold nothing but weights; before any are there."""

    def target(self, region: Region, offset: int, nbytes: int) -> Target:
        """Where a weight image goes. What was handed to the queue before this call may still use these bytes; the image waits for it."""

    def forget_image(self, image: memoryview) -> None:
        """A mapped image is let go. From any thread."""

    def move(self, region: Region, source: int, target: int, nbytes: int) -> None:
        """Copy bytes within a region; the two ranges may overlap. In the queue's order."""

    def copy_blocks(
        self, source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]
    ) -> Generator[None, None, None]:
        """As `copier.copy_blocks`, after all that is in the queue at this call. Iterated by any one thread; all is copied at its end."""

    def upload(self, values: NDArray[Any]) -> Tensor:
        """Values for what is handed over from now on, of which the host keeps no view. Nothing is waited for."""

    def download(self, *values: Tensor) -> Download:
        """Values as they are at this point of the queue. Nothing is waited for yet."""

    def mark(self) -> Mark:
        """The end of the queue as it is now."""

    def lend(self, region: Region) -> RankMemory | None:
        """What rank 0 needs to map the arena of another rank, which computes here. None: the region has a descriptor for that."""

    def borrow(self, memory: RankMemory, nbytes: int) -> MappedRegion:
        """Map it: `copy_blocks` takes it for this device's own. Raises PolymuxError where it cannot be reached."""

    def meeting_place(self, folder: Path) -> bytes:
        """Where the ranks of an instance, whose rank 0 this is, can meet. `folder` is theirs alone, and on this host."""

    def join(self, meeting: Meeting) -> Collectives:
        """Meet the other ranks, which compute on devices of this kind. Returns when all have come. Raises RankLost."""

    def close(self) -> None:
        """Wait for the queue, and give everything back but the regions, which have their own `close`. May be called twice."""


class _Done:
    def wait(self) -> None:
        return


class _Here:
    def __init__(self, values: tuple[Tensor, ...]) -> None:
        self._values = values

    def wait(self) -> tuple[Tensor, ...]:
        return self._values


class CpuDevice:
    """Host memory, shared with the node's other workers, and the calling thread as its queue."""

    torch_device = torch.device("cpu")
    is_async = False
    load_drag = 1.0  # a copy takes a core, and the steps have them all; bench/validate.py measures about this
    keep_images_s = KEEP_S
    graphs: Graphs | None = None

    def enter(self) -> None:
        return

    def create(self, nbytes: int) -> Region:
        return Region.create(nbytes)

    def tensor(self, region: Region) -> Tensor:
        return torch.frombuffer(region.buffer, dtype=torch.uint8)

    def migrating(self, region: Region) -> Region | DeviceRegion:
        return region

    def use_for_weights(self, region: Region, nbytes: int) -> None:
        if region.fd is not None:
            use_huge_pages(self.tensor(region)[:nbytes])  # no KV goes there, so no other process reads it

    def target(self, region: Region, offset: int, nbytes: int) -> Target:
        return HostTarget(region.buffer[offset : offset + nbytes])

    def forget_image(self, image: memoryview) -> None:
        return

    def move(self, region: Region, source: int, target: int, nbytes: int) -> None:
        copy_bytes(region.buffer[target : target + nbytes], region.buffer[source : source + nbytes])

    def copy_blocks(
        self, source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]
    ) -> Generator[None, None, None]:
        return copy_blocks(source, source_ids, target, target_ids)

    def upload(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values)

    def download(self, *values: Tensor) -> Download:
        return _Here(values)

    def mark(self) -> Mark:
        return _Done()

    def lend(self, region: Region) -> RankMemory | None:
        return None

    def borrow(self, memory: RankMemory, nbytes: int) -> MappedRegion:
        raise ConfigError(f"a rank computes on {memory.gpu} and rank 0 on a CPU; give all ranks of an instance one kind of device")

    def meeting_place(self, folder: Path) -> bytes:
        return str(folder / "rendezvous").encode()

    def join(self, meeting: Meeting) -> Collectives:
        return GlooCollectives(meeting)

    def close(self) -> None:
        return


def open_device(name: str) -> Device:
    """The device that a worker's settings name. Raises ConfigError where this process has no such one."""
    opened: dict[str, Callable[[], Device]] = {"cpu": CpuDevice, "cuda": _open_cuda}
    if name not in opened:
        raise ConfigError(f"device={name!r} is not one of {', '.join(DEVICES)}")
    return opened[name]()


def _open_cuda() -> Device:
    from polymux.actors.gpu.device import CudaDevice

    return CudaDevice()
