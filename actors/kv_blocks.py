"""KV block manager: blocks of several shapes cut from the slabs of one memory, an arena or the node's host tier.

Block `i` of a layout lies at byte `i * block_bytes` of that memory, so one tensor view of the whole serves every block of that
layout; a slab brings those ids that lie wholly inside it. Ids are never shared between owners, and an idle manager has none out.
"""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from polymux.transport.errors import ConfigError, NoFreeBlocks
from polymux.transport.messages import KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


class BlockPool:
    """The blocks of one layout. Lowest ids first, so that neighbours in a sequence tend to be neighbours in memory."""

    def __init__(self, source: SlabSource, layout: KVLayout) -> None:
        if layout.block_bytes * 2 > source.slab_bytes:
            raise ConfigError(
                f"a KV block of {layout.block_bytes} bytes needs slabs of at least {2 * layout.block_bytes}, "
                f"and these are {source.slab_bytes}; raise arena_bytes or engine.slab_bytes"
            )
        self.layout = layout
        self._source = source
        self._free: list[int] = []  # a heap
        self._used_in: dict[int, int] = {}  # slab -> blocks out
        self._out: set[int] = set()

    @property
    def kv(self) -> Tensor:
        """`[N, layer, 2, kv_head, slot, head_dim]`, a view of the whole memory; only the ids handed out may be touched."""
        layout, source = self.layout, self._source
        num_blocks = source.nbytes // layout.block_bytes
        flat = source.memory[: num_blocks * layout.block_bytes].view(TORCH_DTYPES[layout.dtype])
        return flat.view(num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)

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
        """Blocks that `allocate` can give at this moment, free slabs counted at their least."""
        return len(self._free) + self._source.num_free_slabs * self.blocks_per_slab

    @property
    def num_out(self) -> int:
        return len(self._out)

    @property
    def max_blocks(self) -> int:
        """What the memory can hold of this layout when no other model uses it."""
        return self._source.max_kv_slabs * self.blocks_per_slab

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` ids, all or none. Raises NoFreeBlocks."""
        while len(self._free) < num_blocks:
            slab = self._source.take_slab()
            if slab is None:
                self._return_empty_slabs()
                raise NoFreeBlocks(f"{num_blocks} KV blocks wanted, {len(self._free)} free; a sequence must end first")
            self._used_in[slab] = 0
            for block_id in self.ids_of(slab):
                heapq.heappush(self._free, block_id)
        ids = [heapq.heappop(self._free) for _ in range(num_blocks)]
        for block_id in ids:
            self._used_in[self._slab_of(block_id)] += 1
        self._out.update(ids)
        return ids

    def free(self, ids: Iterable[int]) -> None:
        """Give ids back; slabs that become empty return to where they came from. Raises KeyError for an id that is not out."""
        for block_id in ids:
            self._out.remove(block_id)
            self._used_in[self._slab_of(block_id)] -= 1
            heapq.heappush(self._free, block_id)
        self._return_empty_slabs()

    def _slab_of(self, block_id: int) -> int:
        return block_id * self.layout.block_bytes // self._source.slab_bytes

    def _return_empty_slabs(self) -> None:
        empty = [slab for slab, used in self._used_in.items() if used == 0]
        if not empty:
            return
        gone = {block_id for slab in empty for block_id in self.ids_of(slab)}
        self._free = [block_id for block_id in self._free if block_id not in gone]
        heapq.heapify(self._free)
        for slab in empty:
            del self._used_in[slab]
            self._source.return_slab(slab)

    def check(self) -> None:
        """Assert that every id of every held slab is either free or out, and counted once."""
        held = {block_id for slab in self._used_in for block_id in self.ids_of(slab)}
        assert len(self._free) == len(set(self._free)), "a block is free twice"
        assert held == set(self._free) | self._out, "a block is neither free nor out"
        assert not set(self._free) & self._out, "a block is both free and out"
        assert sum(self._used_in.values()) == len(self._out)


class BlockManager:
    """One pool per layout over one memory: models of equal layout share one."""

    def __init__(self, source: SlabSource) -> None:
        self._source = source
        self._pools: dict[KVLayout, BlockPool] = {}  # replaced, never changed: a model is added while the engine thread counts
        self._lock = threading.Lock()

    def pool(self, layout: KVLayout) -> BlockPool:
        """From any thread; all else is the engine's. Raises ConfigError when its slabs are too small for the layout's blocks."""
        if layout not in self._pools:
            with self._lock:
                if layout not in self._pools:
                    self._pools = {**self._pools, layout: BlockPool(self._source, layout)}
        return self._pools[layout]

    @property
    def num_out(self) -> int:
        return sum(pool.num_out for pool in self._pools.values())

    @property
    def num_free_bytes(self) -> int:
        num_slabs = self._source.num_free_slabs
        held = sum((pool.num_free - num_slabs * pool.blocks_per_slab) * layout.block_bytes for layout, pool in self._pools.items())
        return held + num_slabs * self._source.slab_bytes

    def check(self) -> None:
        self._source.check()
        for pool in self._pools.values():
            pool.check()
