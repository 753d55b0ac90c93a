"""Rank 0's device as its engine sees it: what it does with its own arena is done with every rank's.

Weights the other ranks load and move themselves, when they are told; KV rank 0 copies to the host and back for all of them.

A load has begun, as far as a switch is concerned, when the first layer is there on every rank. Until then its failure on any of them is the
switch's, and the former model is served on; later each rank waits for its own layers, and one that fails ends the instance.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from polymux.actors.device import Device, Download, Mark
from polymux.actors.parallel.collectives import Collectives, Meeting
from polymux.actors.parallel.host_blocks import shares
from polymux.actors.parallel.leader import Ranks
from polymux.actors.weights.load import Fetch, Load, Target
from polymux.actors.weights.loader import Loader
from polymux.transport.cuda.region import DeviceRegion, MappedRegion
from polymux.transport.image_maps import ImageMaps
from polymux.transport.messages import ModelSpec
from polymux.transport.rank_messages import RankMemory
from polymux.transport.region import Region

T = TypeVar("T")


class RankTarget:
    """Rank 0's own target, with the offset that is the same on every rank."""

    def __init__(self, inner: Target, offset: int) -> None:
        self.offset = offset
        self.is_async = inner.is_async
        self.put, self.read, self.content = inner.put, inner.read, inner.content
        self.order, self.settle = inner.order, inner.settle


class _Checked(Generic[T]):
    """What a wait brings counts if no rank was lost meanwhile: a device is then let go with anything in hand."""

    def __init__(self, wait: Callable[[], T], ranks: Ranks) -> None:
        self._wait, self._ranks = wait, ranks

    def wait(self) -> T:
        found = self._wait()
        self._ranks.check()
        return found


class RankDevice:
    """Rank 0's own device; weights that move on it move on every rank, and a KV block is that of its id on every rank."""

    def __init__(self, inner: Device, ranks: Ranks, region: Region) -> None:
        """`region`: rank 0's arena."""
        self._inner = inner
        self._ranks = ranks
        self._address = inner.tensor(region).data_ptr()
        self.torch_device: torch.device = inner.torch_device
        self.is_async, self.keep_images_s, self.graphs = inner.is_async, inner.keep_images_s, inner.graphs
        self.load_drag = inner.load_drag

    def enter(self) -> None:
        self._inner.enter()

    def create(self, nbytes: int) -> Region:
        return self._inner.create(nbytes)

    def tensor(self, region: Region) -> Tensor:
        return self._inner.tensor(region)

    def migrating(self, region: Region) -> Region | DeviceRegion:
        return self._inner.migrating(region)

    def use_for_weights(self, region: Region, nbytes: int) -> None:
        self._inner.use_for_weights(region, nbytes)

    def target(self, region: Region, offset: int, nbytes: int) -> Target:
        return RankTarget(self._inner.target(region, offset, nbytes), offset)

    def forget_image(self, image: memoryview) -> None:
        self._inner.forget_image(image)

    def move(self, region: Region, source: int, target: int, nbytes: int) -> None:
        self._inner.move(region, source, target, nbytes)
        self._ranks.move(source, target, nbytes)

    def copy_blocks(
        self, source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]
    ) -> Generator[None, None, None]:
        """Between rank 0's arena, which stands for all ranks', and whole blocks on the host.

        In rank 0's queue a step ends with what it gathers from every rank, so what comes behind the step there is behind it everywhere.
        """
        is_out = source.untyped_storage().data_ptr() == self._address
        arena, host = (source, target) if is_out else (target, source)
        others = (memory[: arena.nbytes].view(arena.dtype).view(arena.shape) for memory in self._ranks.memories)
        copies: list[Generator[None, None, None]] = []
        for holders, share in shares([arena, *others], host):
            if is_out:
                copies.append(self._inner.copy_blocks(holders[0], source_ids, share, target_ids))
            else:
                copies += [self._inner.copy_blocks(share, source_ids, holder, target_ids) for holder in holders]
        return _in_turn(copies)

    def upload(self, values: NDArray[Any]) -> Tensor:
        return self._inner.upload(values)

    def download(self, *values: Tensor) -> Download:
        return _Checked(self._inner.download(*values).wait, self._ranks)

    def mark(self) -> Mark:
        return _Checked(self._inner.mark().wait, self._ranks)

    def lend(self, region: Region) -> RankMemory | None:
        return self._inner.lend(region)

    def borrow(self, memory: RankMemory, nbytes: int) -> MappedRegion:
        return self._inner.borrow(memory, nbytes)

    def meeting_place(self, folder: Path) -> bytes:
        return self._inner.meeting_place(folder)

    def join(self, meeting: Meeting) -> Collectives:
        return self._inner.join(meeting)

    def close(self) -> None:
        self._inner.close()


def _in_turn(copies: Sequence[Generator[None, None, None]]) -> Generator[None, None, None]:
    for copy in copies:
        yield from copy


class RankLoader(Loader):
    """Rank 0's own loader, whose loads the other ranks' begin with."""

    def __init__(self, ranks: Ranks, fetch: Fetch, clock: Callable[[], float] = time.monotonic, maps: ImageMaps | None = None) -> None:
        super().__init__(fetch, clock, maps)
        self._ranks = ranks

    def _make(self, spec: ModelSpec, target: Target, *, is_urgent: bool) -> Load:
        assert isinstance(target, RankTarget)
        number = self._ranks.load(spec, target.offset, is_urgent=is_urgent)
        return RankLoad(self._ranks, number, spec, self._fetch, target, self.maps, self._changed, is_urgent=is_urgent, clock=self._clock)

    def hurry(self, load: Load) -> None:
        if not load.is_urgent:
            self._ranks.hurry(load.spec.model)
        super().hurry(load)


class RankLoad(Load):
    """Rank 0's own load, which is waited for together with the others'."""

    def __init__(
        self,
        ranks: Ranks,
        number: int,
        spec: ModelSpec,
        fetch: Fetch,
        target: Target,
        maps: ImageMaps,
        changed: threading.Condition,
        *,
        is_urgent: bool,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(spec, fetch, target, maps, changed, is_urgent=is_urgent, clock=clock)
        self._ranks, self._number = ranks, number
        self._has_seen = False

    @property
    def is_everywhere(self) -> bool:
        return self.is_finished and (self._has_seen or self._ranks.has_seen(self._number))

    def wait(self, num_groups: int | None = None, *, helps: bool = True) -> float:
        """As the base class's, for all ranks."""
        waited_s = super().wait(num_groups, helps=helps)
        if self._has_seen:
            return waited_s
        began_s = self._clock()
        self._ranks.await_load(self._number, self.spec.model)
        self._has_seen = True
        return waited_s + self._clock() - began_s
