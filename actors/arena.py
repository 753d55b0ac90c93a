"""The arena: a worker's device memory, taken once; weights grow from its low end, KV slabs from its high end, and the border moves.

On a CPU worker the "device" is a shared-memory region with a budget, so the same placement, eviction and migration code runs on a laptop.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polymux.actors.device import CpuDevice, Device
from polymux.actors.weights.load import Target
from polymux.transport.errors import ConfigError, OutOfMemory
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB

WEIGHT_ALIGNMENT = 256  # bytes; what the widest vector loads and the packed layouts want
MIN_SLAB_BYTES = 64 * KIB
MAX_SLAB_BYTES = 64 * MIB
SLABS_PER_ARENA = 128  # a slab serves one block shape at a time: few slabs starve the models that come late


@dataclass(frozen=True, slots=True)
class Span:
    """A byte range of the arena."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def default_slab_bytes(arena_bytes: int) -> int:
    """A power of two near `arena_bytes / SLABS_PER_ARENA`, between `MIN_SLAB_BYTES` and `MAX_SLAB_BYTES`."""
    target = max(arena_bytes // SLABS_PER_ARENA, 1)
    return min(max(1 << (target.bit_length() - 1), MIN_SLAB_BYTES), MAX_SLAB_BYTES)


class Arena:
    """Hands out byte ranges of one region. Not thread-safe: the engine thread owns it.

    `weight_reserve_bytes` at the low end are never given to KV, so that a model can always be brought in. Weights may borrow what lies
    beyond while no KV is there, and make way when KV wants it.
    """

    def __init__(self, region: Region, *, weight_reserve_bytes: int, slab_bytes: int | None = None, device: Device | None = None) -> None:
        self.region = region
        self.device = device or CpuDevice()
        self.nbytes = region.nbytes
        self.slab_bytes = slab_bytes or default_slab_bytes(region.nbytes)
        self.num_slabs = region.nbytes // self.slab_bytes
        if self.num_slabs < 2:
            raise ConfigError(f"arena={region.nbytes} bytes holds fewer than two slabs of {self.slab_bytes} bytes; raise arena_bytes")
        if not 0 <= weight_reserve_bytes < region.nbytes:
            raise ConfigError(f"weight reserve of {weight_reserve_bytes} bytes leaves no KV in an arena of {region.nbytes}; lower it")
        self.weight_reserve_bytes = weight_reserve_bytes
        self.memory: Tensor = self.device.tensor(region)
        self.device.use_for_weights(region, weight_reserve_bytes)
        self._weights: list[Span] = []  # sorted by offset
        self._slabs: set[int] = set()  # taken
        self._lowest_kv_slab = -(-weight_reserve_bytes // self.slab_bytes)
        self.kept_end = 0  # weights that end here, or before, cannot make way for KV at present
        self.make_way: Callable[[int], None] | None = None  # called when KV wants what lies from there on; None: weights keep their room

    @property
    def border(self) -> int:
        """Where KV begins at present: the offset of the lowest slab taken."""
        return min(self._slabs) * self.slab_bytes if self._slabs else self.nbytes

    @property
    def weights_end(self) -> int:
        return self._weights[-1].end if self._weights else 0

    @property
    def weight_spans(self) -> tuple[Span, ...]:
        return tuple(self._weights)

    def gaps(self) -> list[Span]:
        """Free ranges where weights may go, in address order; the last ends at the border."""
        found, cursor = [], 0
        for span in [*self._weights, Span(self.border, 0)]:
            if span.offset > cursor:
                found.append(Span(cursor, span.offset - cursor))
            cursor = max(cursor, _aligned(span.end))
        return found

    def place_weights(self, nbytes: int, offset: int) -> Span:
        """Take `[offset, offset + nbytes)`, which `disagg.eviction` found free. Raises OutOfMemory when it is not."""
        span = Span(offset, nbytes)
        if offset % WEIGHT_ALIGNMENT or not any(gap.offset <= offset and span.end <= gap.end for gap in self.gaps()):
            raise OutOfMemory(f"bytes {offset}..{span.end} of the arena are not free for weights")
        bisect.insort(self._weights, span, key=lambda s: s.offset)
        return span

    def free_weights(self, span: Span) -> None:
        self._weights.remove(span)

    def move_weights(self, span: Span, offset: int) -> Span:
        """Copy a range's bytes to `offset`, which may overlap it, and hold them there. Nobody may read or write it meanwhile."""
        self._weights.remove(span)
        try:
            moved = self.place_weights(span.nbytes, offset)
        except OutOfMemory:
            bisect.insort(self._weights, span, key=lambda s: s.offset)
            raise
        self.device.move(self.region, span.offset, moved.offset, span.nbytes)
        return moved

    def target(self, span: Span) -> Target:
        """Where the image goes for which `place_weights` took this range."""
        return self.device.target(self.region, span.offset, span.nbytes)

    def take_slab(self) -> int | None:
        """The highest free slab; weights that borrowed its room make way. None when there is none."""
        slab = self._highest_free_slab()
        if slab is not None and slab * self.slab_bytes < self.weights_end:
            assert self.make_way is not None, "a slab under weights that stay is not free"
            self.make_way(slab * self.slab_bytes)
            slab = self._highest_free_slab()  # another one, when cached KV was worth less than those weights
        if slab is None or slab * self.slab_bytes < self.weights_end:
            return None
        self._slabs.add(slab)
        return slab

    def _highest_free_slab(self) -> int | None:
        return next((slab for slab in range(self.num_slabs - 1, self._lowest_slab - 1, -1) if slab not in self._slabs), None)

    @property
    def _lowest_slab(self) -> int:
        kept_end = self.weights_end if self.make_way is None else self.kept_end
        return max(self._lowest_kv_slab, -(-kept_end // self.slab_bytes))

    def return_slab(self, slab: int) -> None:
        self._slabs.remove(slab)

    @property
    def num_free_slabs(self) -> int:
        """Those under weights that would make way are free."""
        return sum(slab not in self._slabs for slab in range(self._lowest_slab, self.num_slabs))

    @property
    def max_kv_slabs(self) -> int:
        """Slabs that KV could hold if every model but the reserve were gone: the bound on what can ever fit."""
        return self.num_slabs - self._lowest_kv_slab

    def check(self) -> None:
        """Assert that no two ranges overlap and none leaves the region."""
        cursor = 0
        for span in self._weights:
            assert span.offset >= cursor, f"weights overlap at {span}"
            cursor = span.end
        assert cursor <= self.border, f"weights end at {cursor}, past the border at {self.border}"
        assert all(self._lowest_kv_slab <= slab < self.num_slabs for slab in self._slabs)

    def close(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.region.close()


def _aligned(offset: int) -> int:
    return -(-offset // WEIGHT_ALIGNMENT) * WEIGHT_ALIGNMENT
