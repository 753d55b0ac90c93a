"""Host tiers without a store."""

from __future__ import annotations

from polymux.actors.host_tier import HostTier
from polymux.transport.host_tier import OpenTier, SlabLeases, TierMemory
from polymux.transport.units import KIB, MIB


def tier_over(memory: TierMemory) -> HostTier:
    slab_bytes, fd = memory.open()
    return HostTier(SlabLeases(OpenTier(fd, memory.nbytes, slab_bytes)))


def tier_of(nbytes: int = 2 * MIB) -> HostTier:
    return tier_over(TierMemory(nbytes, 128 * KIB))
