"""A worker's part of the node's host tier: KV blocks in host memory, in slabs leased as they are needed, of all models together.

The same block pools lie over it as over the arena, on the same grid, so a block there is a block here byte for byte. A block of an
instance of several ranks is whole there: every head once, one rank's share behind the other's (`parallel/host_blocks.py`).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from polymux.actors.kv_blocks import BlockManager, BlockPool
from polymux.transport.errors import ConfigError, PolymuxError
from polymux.transport.head_slices import sharded
from polymux.transport.host_tier import SlabLeases
from polymux.transport.messages import KVLayout
from polymux.transport.weights import fetch_host_tier

log = logging.getLogger("polymux.host_tier")
FETCH_S = 30.0  # the store answers from a thread of its own


class HostTier:
    """A `SlabSource` over leased slabs. The engine thread owns it; the copier's thread only touches blocks that are out."""

    def __init__(self, leases: SlabLeases) -> None:
        self._leases = leases
        self.nbytes = leases.nbytes
        self.slab_bytes = leases.slab_bytes
        self.memory: Tensor = torch.frombuffer(leases.buffer, dtype=torch.uint8)
        self.blocks = BlockManager(self)

    @classmethod
    def attach(cls, store_address: str, token: str) -> HostTier | None:
        """The tier of the store's node; None when it has none, or it cannot be had: a worker serves without it."""
        try:
            opened = fetch_host_tier(store_address, token, FETCH_S)
            return cls(SlabLeases(opened)) if opened is not None else None
        except PolymuxError as error:
            log.warning("host_tier.absent reason=%s", error)
            return None

    def pool(self, layout: KVLayout) -> BlockPool | None:
        """Where whole blocks of this layout go, whatever the ranks it is for; None when the tier's slabs are too small for them."""
        try:
            return self.blocks.pool(sharded(layout, 1))
        except ConfigError:
            return None

    def take_slab(self) -> int | None:
        return self._leases.take()

    def return_slab(self, slab: int) -> None:
        self._leases.give_back(slab)

    @property
    def num_free_slabs(self) -> int:
        return self._leases.num_free

    @property
    def max_kv_slabs(self) -> int:
        return self._leases.num_slabs

    @property
    def num_free_bytes(self) -> int:
        """Host bytes that blocks of this worker could take now; the node's other workers may take them first."""
        return self.blocks.num_free_bytes

    def check(self) -> None:
        """Assert that each leased slab is some pool's, and none is without a lease."""
        held = [slab for pool in self.blocks.pools.values() for slab in pool.slabs]
        assert sorted(held) == sorted(self._leases.held), "a leased slab is no pool's, or two pools'"

    def close(self) -> None:
        """No copy may be under way. Every lease ends."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        self._leases.close()
