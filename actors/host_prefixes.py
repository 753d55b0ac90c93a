"""The prefix cache's second level: blocks that left the arena, in the node's host tier, until somebody wants that room too.

Found by the 128-bit digest of their whole prefix (`prefix.extend`). Copies are made where they are wanted, in the engine's thread: a block
is microseconds of memmove, and its bytes are about to be overwritten, or waited for. Blocks here are idle, so this worker's swaps take
their room at once; a slab is leased for them only while half of the tier is free, and they recycle their own when it is not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from polymux.actors.copier import CopyBlocks, copy_blocks
from polymux.actors.host_tier import HostTier
from polymux.actors.kv_blocks import BlockPool
from polymux.transport.errors import NoFreeBlocks
from polymux.transport.head_slices import sharded
from polymux.transport.messages import KVLayout


class HostPrefixes:
    """Of one worker. The engine thread owns it."""

    def __init__(self, tier: HostTier, copy: CopyBlocks = copy_blocks) -> None:
        self._tier = tier
        self._copy = copy
        self._lines: dict[KVLayout, OrderedDict[bytes, int]] = {}  # by layout here, block ids by digest, used longest ago first
        self._digests: dict[KVLayout, dict[int, bytes]] = {}  # the other way round
        tier.blocks.reclaim_from(self)

    def has(self, layout: KVLayout, digest: bytes) -> bool:
        return digest in self._lines.get(sharded(layout, 1), ())

    def put(self, device: BlockPool, block_id: int, digest: bytes) -> None:
        """Keep a copy of a device block that leaves, if there is room or something older to give up for it."""
        host = self._tier.pool(device.layout)
        if host is None:
            return
        line = self._lines.setdefault(host.layout, OrderedDict())
        if digest in line:
            line.move_to_end(digest)
            return
        if host.num_held_free == host.num_idle and self._tier.num_free_slabs * 2 < self._tier.max_kv_slabs:
            oldest = next(iter(line), None)
            if oldest is None or not host.is_idle(line[oldest]):
                return
            self._forget(host, oldest)
        try:
            copy = host.allocate(1)
        except NoFreeBlocks:  # another worker was faster
            return
        for _ in self._copy(device.kv, [block_id], host.kv, copy):
            pass
        host.cache(copy[0])
        line[digest] = copy[0]
        self._digests.setdefault(host.layout, {})[copy[0]] = digest
        host.free(copy)

    def load(self, device: BlockPool, digests: list[bytes]) -> list[int]:
        """New device blocks with the bytes of all these, which are here; none when the device has no room for them."""
        host = self._tier.pool(device.layout)
        assert host is not None
        line = self._lines[host.layout]
        for digest in reversed(digests):
            line.move_to_end(digest)
        host_ids = [line[digest] for digest in digests]
        host.share(host_ids)  # so that what leaves the device for this does not push them out
        try:
            block_ids = device.allocate(len(host_ids))
            for _ in self._copy(host.kv, host_ids, device.kv, block_ids):
                pass
        except NoFreeBlocks:
            return []
        finally:
            host.free(host_ids)
        return block_ids

    def reclaim(self, pool: BlockPool, num_blocks: int) -> None:
        """Give up the oldest blocks of this layout, then whole slabs of others, until so many can be allocated."""
        line = self._lines.get(pool.layout, OrderedDict[bytes, int]())
        for digest in [digest for digest, block_id in line.items() if pool.is_idle(block_id)]:
            if pool.num_ready >= num_blocks:
                return
            self._forget(pool, digest)
        for layout, other in self._tier.blocks.pools.items():
            for slab in other.idle_slabs if other is not pool else ():
                if pool.num_ready >= num_blocks:
                    return
                for block_id in other.ids_of(slab):
                    if (found := self._digests.get(layout, {}).get(block_id)) is not None:
                        self._forget(other, found)

    def newest(self) -> Iterator[bytes]:
        """Digests, those used last first, layout after layout."""
        for line in self._lines.values():
            yield from reversed(line)

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self._lines.values()))

    def _forget(self, host: BlockPool, digest: bytes) -> None:
        block_id = self._lines[host.layout].pop(digest)
        del self._digests[host.layout][block_id]
        host.uncache([block_id])

    def check(self) -> None:
        """Assert that lines and pools say the same."""
        for layout, pool in self._tier.blocks.pools.items():
            line = self._lines.get(layout, OrderedDict[bytes, int]())
            assert pool.cached_ids == set(line.values()) and len(set(line.values())) == len(line)
            assert {block_id: digest for digest, block_id in line.items()} == self._digests.get(layout, {})
