"""KV block manager: blocks of several shapes cut from the slabs of one memory, an arena or the node's host tier.

Block `i` of a layout lies at byte `i * block_bytes` of that memory, so one tensor view of the whole serves every block of that
layout; a slab brings those ids that lie wholly inside it. A block that is out has as many holders as took it, and an idle manager has
none out. A *cached* block whose last holder has gone stays as it is, idle, until somebody wants its room: it is never in the way.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from polymux.transport.errors import ConfigError, NoFreeBlocks
from polymux.transport.messages import KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def kv_view(memory: Tensor, layout: KVLayout) -> Tensor:
    """One rank's memory, uint8 [nbytes], as the blocks of a layout: `[N, layer, 2, kv_head, slot, head_dim]`."""
    num_blocks = memory.numel() // layout.block_bytes
    flat = memory[: num_blocks * layout.block_bytes].view(TORCH_DTYPES[layout.dtype])
    return flat.view(num_blocks, layout.num_layers, 2, layout.rank_kv_heads, layout.block_size, layout.head_dim)


class SlabSource(Protocol):
    """One memory that is cut into slabs of equal size, whole ones of which are lent to the pools over it."""

    @property
    def memory(self) -> Tensor:
        """All of it, uint8 [nbytes]."""

    @property
    def nbytes(self) -> int: ...

    @property
    def slab_bytes(self) -> int: ...

    def take_slab(self) -> int | None:
        """A free slab's number; None when there is none, which may change at any time."""

    def return_slab(self, slab: int) -> None: ...

    @property
    def num_free_slabs(self) -> int:
        """How many `take_slab` would give now."""

    @property
    def max_kv_slabs(self) -> int:
        """How many it could give at best: the bound on what can ever fit."""

    def check(self) -> None:
        """Assert that its books are whole."""


class Reclaimer(Protocol):
    """Whoever knows which cached blocks are worth least."""

    def reclaim(self, pool: BlockPool, num_blocks: int) -> None:
        """Uncache idle blocks, of this pool or whole slabs of others, until `pool` can allocate so many; or as far as that goes."""


@dataclass(slots=True)
class Siblings:
    """What the pools over one memory share."""

    pools: dict[KVLayout, BlockPool] = field(default_factory=dict)  # replaced, never changed: one is added while the engine thread counts
    reclaimer: Reclaimer | None = None


class BlockPool:
    """The blocks of one layout. Lowest ids first, so that neighbours in a sequence tend to be neighbours in memory."""

    def __init__(self, source: SlabSource, layout: KVLayout, siblings: Siblings | None = None) -> None:
        if layout.block_bytes * 2 > source.slab_bytes:
            raise ConfigError(
                f"a KV block of {layout.block_bytes} bytes needs slabs of at least {2 * layout.block_bytes}, "
                f"and these are {source.slab_bytes}; raise arena_bytes or engine.slab_bytes"
            )
        self.layout = layout
        self._source = source
        self._siblings = siblings or Siblings()
        self._free: list[int] = []  # a heap
        self._used_in: dict[int, int] = {}  # slab -> blocks out
        self._idle_in: dict[int, int] = {}  # slab -> idle blocks, those with none left out
        self._holders: dict[int, int] = {}  # block out -> how many hold it
        self._cached: set[int] = set()  # out or idle
        self._idle_slabs: set[int] = set()  # with idle blocks and none out: another layout may have them
        self._num_idle = 0
        self._is_gathering = False  # slabs may be empty for a moment

    @property
    def kv(self) -> Tensor:
        """`[N, layer, 2, kv_head, slot, head_dim]`, a view of the whole memory; only the ids handed out may be touched."""
        return kv_view(self._source.memory, self.layout)

    @property
    def slabs(self) -> list[int]:
        """The slabs that it holds at present."""
        return list(self._used_in)

    def ids_of(self, slab: int) -> range:
        """The block ids wholly inside a slab."""
        size, block = self._source.slab_bytes, self.layout.block_bytes
        return range(-(-slab * size // block), (slab + 1) * size // block)

    @property
    def blocks_per_slab(self) -> int:
        """At least this many: a slab begins at a multiple of the gcd, so its first whole block is at most `block - gcd` bytes in."""
        slab, block = self._source.slab_bytes, self.layout.block_bytes
        return (slab - block + math.gcd(slab, block)) // block

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give at this moment, idle ones among them; slabs of others are counted at their least."""
        beside = sum(len(pool._idle_slabs) for pool in self._siblings.pools.values() if pool is not self)
        return self.num_ready + self._num_idle + beside * self.blocks_per_slab

    @property
    def num_ready(self) -> int:
        """Those of them for which no idle block has to go."""
        return len(self._free) + self._source.num_free_slabs * self.blocks_per_slab

    @property
    def num_held_free(self) -> int:
        """Those of them in slabs that are this pool's already."""
        return len(self._free) + self._num_idle

    @property
    def num_out(self) -> int:
        return len(self._holders)

    @property
    def num_idle(self) -> int:
        """Cached blocks that nobody holds."""
        return self._num_idle

    @property
    def max_blocks(self) -> int:
        """What the memory can hold of this layout when no other model uses it."""
        return self._source.max_kv_slabs * self.blocks_per_slab

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` ids, all or none, with one holder each. Raises NoFreeBlocks."""
        self._gather(num_blocks)
        if len(self._free) < num_blocks and self._siblings.reclaimer is not None:
            self._siblings.reclaimer.reclaim(self, num_blocks)
            self._gather(num_blocks)
        if len(self._free) < num_blocks:
            self._return_empty_slabs()
            raise NoFreeBlocks(f"{num_blocks} KV blocks wanted, {len(self._free)} free; a sequence must end first")
        ids = [heapq.heappop(self._free) for _ in range(num_blocks)]
        for block_id in ids:
            self._hold(block_id)
        return ids

    def share(self, ids: Iterable[int]) -> None:
        """One holder more for blocks that are out or idle; each will be freed once more. Raises KeyError for others, and shares none."""
        ids = list(ids)
        for block_id in ids:
            if block_id not in self._holders and block_id not in self._cached:
                raise KeyError(block_id)
        for block_id in ids:
            if block_id in self._holders:
                self._holders[block_id] += 1
            else:
                self._count_idle(self.slab_of(block_id), -1)
                self._hold(block_id)

    def free(self, ids: Iterable[int]) -> None:
        """One holder less for each; slabs that become empty return to where they came from. Raises KeyError for an id that is not out."""
        for block_id in ids:
            self._holders[block_id] -= 1
            if self._holders[block_id]:
                continue
            del self._holders[block_id]
            slab = self.slab_of(block_id)
            self._used_in[slab] -= 1
            if block_id in self._cached:
                self._count_idle(slab, 1)
            else:
                heapq.heappush(self._free, block_id)
                self._note(slab)
        self._return_empty_slabs()

    def cache(self, block_id: int) -> None:
        """Keep this block's bytes after its last holder has gone. Raises KeyError for a block that is not out."""
        if block_id not in self._holders:
            raise KeyError(block_id)
        self._cached.add(block_id)

    def uncache(self, ids: Iterable[int]) -> None:
        """Keep them no longer: idle ones are free at once, held ones when their holders go. Raises KeyError for one not cached."""
        for block_id in ids:
            self._cached.remove(block_id)
            if block_id not in self._holders:
                self._count_idle(self.slab_of(block_id), -1)
                heapq.heappush(self._free, block_id)
        self._return_empty_slabs()

    @property
    def cached_ids(self) -> frozenset[int]:
        return frozenset(self._cached)

    def is_idle(self, block_id: int) -> bool:
        return block_id in self._cached and block_id not in self._holders

    def slab_of(self, block_id: int) -> int:
        return block_id * self.layout.block_bytes // self._source.slab_bytes

    @property
    def idle_slabs(self) -> frozenset[int]:
        """Slabs that would be empty without their idle blocks."""
        return frozenset(self._idle_slabs)

    def _gather(self, num_blocks: int) -> None:
        """Take free slabs for so many free blocks, if there are enough. The source may have our idle blocks reclaimed meanwhile."""
        self._is_gathering = True
        try:
            while len(self._free) < num_blocks and (slab := self._source.take_slab()) is not None:
                self._used_in[slab] = self._idle_in[slab] = 0
                for block_id in self.ids_of(slab):
                    heapq.heappush(self._free, block_id)
        finally:
            self._is_gathering = False

    def _hold(self, block_id: int) -> None:
        slab = self.slab_of(block_id)
        self._holders[block_id] = 1
        self._used_in[slab] += 1
        self._note(slab)

    def _count_idle(self, slab: int, change: int) -> None:
        self._idle_in[slab] += change
        self._num_idle += change
        self._note(slab)

    def _note(self, slab: int) -> None:
        """Keep `_idle_slabs` what it says."""
        if self._idle_in[slab] and not self._used_in[slab]:
            self._idle_slabs.add(slab)
        else:
            self._idle_slabs.discard(slab)

    def _return_empty_slabs(self) -> None:
        empty = [slab for slab, used in self._used_in.items() if not used and not self._idle_in[slab]]
        if not empty or self._is_gathering:
            return
        gone = {block_id for slab in empty for block_id in self.ids_of(slab)}
        self._free = [block_id for block_id in self._free if block_id not in gone]
        heapq.heapify(self._free)
        for slab in empty:
            del self._used_in[slab], self._idle_in[slab]
            self._source.return_slab(slab)

    def check(self) -> None:
        """Assert that every id of every held slab is free, out or idle, and counted once."""
        held = {block_id for slab in self._used_in for block_id in self.ids_of(slab)}
        free, out, idle = set(self._free), set(self._holders), self._cached - self._holders.keys()
        assert len(self._free) == len(free), "a block is free twice"
        assert held == free | out | idle, "a block is neither free nor out nor idle"
        assert len(held) == len(free) + len(out) + len(idle), "a block is free and out, or free and idle"
        assert all(count > 0 for count in self._holders.values())
        assert sum(self._used_in.values()) == len(out)
        assert self._idle_in == {slab: sum(block_id in idle for block_id in self.ids_of(slab)) for slab in self._used_in}
        assert self._num_idle == len(idle)
        assert self._idle_slabs == {slab for slab, count in self._idle_in.items() if count and not self._used_in[slab]}


class BlockManager:
    """One pool per layout over one memory: models of equal layout share one."""

    def __init__(self, source: SlabSource) -> None:
        self._source = source
        self._siblings = Siblings()
        self._lock = threading.Lock()

    def pool(self, layout: KVLayout) -> BlockPool:
        """From any thread; all else is the engine's. Raises ConfigError when its slabs are too small for the layout's blocks."""
        if layout not in self._pools:
            with self._lock:
                if layout not in self._pools:
                    self._siblings.pools = {**self._pools, layout: BlockPool(self._source, layout, self._siblings)}
        return self._pools[layout]

    @property
    def pools(self) -> Mapping[KVLayout, BlockPool]:
        return self._pools

    @property
    def _pools(self) -> dict[KVLayout, BlockPool]:
        return self._siblings.pools

    def reclaim_from(self, reclaimer: Reclaimer) -> None:
        """Whom to ask when idle blocks must go."""
        self._siblings.reclaimer = reclaimer

    @property
    def num_out(self) -> int:
        return sum(pool.num_out for pool in self._pools.values())

    @property
    def num_idle_slab_bytes(self) -> int:
        """Bytes of the slabs that hold nothing but idle blocks."""
        return sum(len(pool.idle_slabs) for pool in self._pools.values()) * self._source.slab_bytes

    @property
    def num_free_bytes(self) -> int:
        held = sum(pool.num_held_free * layout.block_bytes for layout, pool in self._pools.items())
        return held + self._source.num_free_slabs * self._source.slab_bytes

    @property
    def num_used_bytes(self) -> int:
        """Of blocks that somebody holds."""
        return sum(pool.num_out * layout.block_bytes for layout, pool in self._pools.items())

    def check(self) -> None:
        self._source.check()
        for pool in self._pools.values():
            pool.check()
