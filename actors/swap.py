"""Swapping: the blocks of preempted sequences go to the host tier and come back, while other sequences compute.

Blocks leave from a sequence's end, only as many as somebody needs, so a sequence that was swapped out may keep its first blocks on the
device (`block_ids`) and have the rest on the host (`host_ids`). At every moment a block is a pool's, a sequence's, or a copy's:

    RUNNING ──▶ SWAPPING_OUT ──▶ SWAPPED ──▶ SWAPPING_IN ──▶ RUNNING       a failed copy leads to WAITING: all is computed again
                     ▲              │
                     └── more of it ┘

A sequence that ends in the middle of a copy leaves the copy's blocks to it; they go back when the copy has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from polymux.actors.copier import Copied, Copier
from polymux.actors.engine import Engine
from polymux.actors.host_tier import HostTier
from polymux.actors.kv_blocks import BlockPool
from polymux.actors.meter import Meter
from polymux.actors.sequence import Phase, Sequence
from polymux.disagg.swap import SwapView, pays
from polymux.transport.errors import NoFreeBlocks, Overloaded
from polymux.transport.head_slices import sharded
from polymux.transport.messages import KVLayout, SpanKind


@dataclass(slots=True, eq=False)
class _Copy:
    """Blocks on their way; `sequence` None once it has ended."""

    sequence: Sequence | None
    is_out: bool
    device: BlockPool
    device_ids: list[int]
    host: BlockPool
    host_ids: list[int]


class Swapper:
    """The books of one decode worker's swaps. The engine thread's; without a tier it swaps nothing.

    `on_back` is told of each sequence that can step again.
    """

    def __init__(
        self,
        engine: Engine,
        meter: Meter,
        tier: HostTier | None = None,
        copier: Copier | None = None,
        on_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._meter = meter
        self._tier = tier
        self._copier = copier
        self._on_back = on_back
        self._copies: dict[Sequence, _Copy] = {}
        self._orphans: set[_Copy] = set()  # whose sequences have ended

    def swap_out(self, sequence: Sequence, num_blocks: int) -> bool:
        """Send the last `num_blocks` that it has on the device to the host. False when that does not pay or cannot be: nothing was done."""
        num_blocks = min(num_blocks, len(sequence.block_ids))
        host = self._tier.pool(sequence.spec.kv) if self._tier is not None else None
        if host is None or self._copier is None or not num_blocks or not self._pays(sequence, num_blocks, host):
            return False
        try:
            host_ids = host.allocate(num_blocks)
        except NoFreeBlocks:  # another worker was faster
            return False
        cut = len(sequence.block_ids) - num_blocks
        copy = _Copy(sequence, True, self._engine.pool(sequence.spec.model), sequence.block_ids[cut:], host, host_ids)
        if not self._submit(copy):
            host.free(host_ids)
            return False
        del sequence.block_ids[cut:]
        sequence.phase = Phase.SWAPPING_OUT
        return True

    def swap_in(self, sequence: Sequence) -> bool:
        """Bring it back whole; the caller has seen that the device has room. False when the copier is full: it stays SWAPPED."""
        assert sequence.phase is Phase.SWAPPED and self._tier is not None
        device, host = self._engine.pool(sequence.spec.model), self._tier.pool(sequence.spec.kv)
        assert host is not None
        device_ids = device.allocate(len(sequence.host_ids))
        if not self._submit(_Copy(sequence, False, device, device_ids, host, sequence.host_ids)):
            device.free(device_ids)
            return False
        sequence.host_ids = []
        sequence.phase = Phase.SWAPPING_IN
        return True

    def release(self, sequence: Sequence) -> None:
        """It has ended, or is computed again: all that is its own goes back now, and a copy's when the copy ends."""
        self._engine.pool(sequence.spec.model).free(sequence.block_ids)
        if sequence.host_ids:
            host = self._tier.pool(sequence.spec.kv) if self._tier is not None else None
            assert host is not None
            host.free(sequence.host_ids)
        sequence.block_ids, sequence.host_ids = [], []
        if (copy := self._copies.pop(sequence, None)) is not None:
            copy.sequence = None
            self._orphans.add(copy)

    def num_coming(self, layout: KVLayout) -> int:
        """Device blocks of a layout that copies under way will set free."""
        return sum(len(copy.device_ids) for copy in self._under_way if copy.is_out and copy.device.layout == layout)

    @property
    def is_leaving(self) -> bool:
        """A copy to the host is under way; its end wakes the engine."""
        return any(copy.is_out for copy in self._under_way)

    @property
    def _under_way(self) -> list[_Copy]:
        return [*self._copies.values(), *self._orphans]

    def _pays(self, sequence: Sequence, num_blocks: int, host: BlockPool) -> bool:
        block_bytes = host.layout.block_bytes
        view = SwapView(
            num_bytes=num_blocks * block_bytes,
            free_host_bytes=host.num_free * block_bytes,
            copy_s=self._meter.predict_swap_s(num_blocks * block_bytes),
            recompute_s=self._meter.predict_prefill_s(sequence.spec.model, [(0, sequence.num_tokens)]),
        )
        return pays(view)

    def _submit(self, copy: _Copy) -> bool:
        assert self._copier is not None and copy.sequence is not None
        device, host = (copy.device.kv, copy.device_ids), (copy.host.kv, copy.host_ids)
        source, target = (device, host) if copy.is_out else (host, device)
        try:
            self._copier.submit(*source, *target, lambda copied: self._ended(copy, copied))
        except Overloaded:
            return False
        self._copies[copy.sequence] = copy
        return True

    def _ended(self, copy: _Copy, copied: Copied) -> None:
        """Exactly one side keeps its blocks: the target when the copy is good and wanted, else neither."""
        sequence = copy.sequence
        is_good = copied.error is None and sequence is not None
        if copy.is_out or not is_good:
            copy.device.free(copy.device_ids)
        if not copy.is_out or not is_good:
            copy.host.free(copy.host_ids)
        if sequence is None:
            self._orphans.discard(copy)
            return
        del self._copies[sequence]
        if copied.error is not None:
            self._meter.swap_failed()
            self.release(sequence)
            sequence.phase = Phase.WAITING
            return
        kind = SpanKind.SWAP_OUT if copy.is_out else SpanKind.SWAP_IN
        self._meter.swapped(kind, sequence.spec.model, copied)
        if copy.is_out:
            sequence.host_ids = copy.host_ids + sequence.host_ids
            sequence.phase = Phase.SWAPPED
        else:
            sequence.block_ids += copy.device_ids
            sequence.phase = Phase.RUNNING
            self._on_back()

    def check(self, sequences: Collection[Sequence]) -> None:
        """Assert that no host block is held twice by sequences and copies, and that each is out."""
        held: list[tuple[KVLayout, int]] = [(sharded(s.spec.kv, 1), block_id) for s in sequences for block_id in s.host_ids]
        held += [(copy.host.layout, block_id) for copy in self._under_way for block_id in copy.host_ids]
        assert len(held) == len(set(held)), "a host block has two owners"
        if self._tier is not None:
            self._tier.blocks.check()
            assert len(held) <= self._tier.blocks.num_out, "a host block is free and owned"
        for sequence in sequences:
            assert not sequence.host_ids or sequence.phase in (Phase.SWAPPED, Phase.SWAPPING_OUT), sequence.phase
            assert (sequence in self._copies) == (sequence.phase in (Phase.SWAPPING_OUT, Phase.SWAPPING_IN))
