"""Moves between two regions that this process can both address: the decode side copies, once, into the granted blocks.

Shared by `local` and `shm`. The peer never writes here, so a frozen or late one cannot hit blocks that were re-used. A long copy is cut
in slices, between which the reactor serves its other sockets.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from polymux.transport.errors import PolymuxError
from polymux.transport.head_slices import plan_heads
from polymux.transport.kv_backend import DeviceEvent, Landing
from polymux.transport.protocol import Commit, Move
from polymux.transport.region import BlockGrid, Grid, drop_pages, grids_over
from polymux.transport.transfer import SinkTransfer
from polymux.transport.units import MIB, TransferId, unpack_ids

_SLICE_BYTES = 2 * MIB  # about 0.3 ms


def copy_blocks(source: BlockGrid, target: BlockGrid, src_ids: Sequence[int], dst_ids: Sequence[int], layers: range) -> Iterator[None]:
    """Copy layers of scattered blocks; yields every `_SLICE_BYTES` or so. Neighbours on both sides become one copy.

    Sorted by source block, since a prefill worker's neighbours were mostly allocated together. Nothing is allocated but the index arrays.
    """
    if source.layout.num_ranks > 1 or target.layout.num_ranks > 1:
        yield from _copy_heads(source, target, src_ids, dst_ids, layers)
        return
    src, dst = np.asarray(src_ids), np.asarray(dst_ids)
    if source.address == target.address:  # one region: a block that is already in place is handed over as it is
        is_elsewhere = src != dst
        src, dst = src[is_elsewhere], dst[is_elsewhere]
    order = np.argsort(src, kind="stable")
    src, dst = src[order], dst[order]
    breaks = np.flatnonzero((np.diff(src) != 1) | (np.diff(dst) != 1)) + 1
    starts = [0, *breaks.tolist(), len(src)]
    lo, hi = layers.start, layers.stop
    per_slice = max(_SLICE_BYTES // (len(layers) * source.layout.layer_bytes), 1)
    from_s, from_d = src.tolist(), dst.tolist()
    room = per_slice
    for start, end in pairwise(starts):
        while start < end:
            count = min(end - start, room)
            s, d = from_s[start], from_d[start]
            target.array[d : d + count, lo:hi] = source.array[s : s + count, lo:hi]
            start += count
            room -= count
            if not room:
                room = per_slice
                yield


def _copy_heads(source: BlockGrid, target: BlockGrid, src_ids: Sequence[int], dst_ids: Sequence[int], layers: range) -> Iterator[None]:
    """As `copy_blocks`, between ranks: block by block, each rank's heads from whoever holds them."""
    lo, hi = layers.start, layers.stop
    parts = []
    for part in plan_heads(source.layout, target.layout):
        here, there = part.source_head, part.target_head
        heads = source.ranks[part.source_rank].heads[:, lo:hi, :, here : here + part.num_heads]
        parts.append((target.ranks[part.target_rank].heads[:, lo:hi, :, there : there + part.num_heads], heads))
    per_slice = max(_SLICE_BYTES // (len(layers) * target.layout.num_ranks * target.layout.layer_bytes), 1)
    for number, (src, dst) in enumerate(zip(src_ids, dst_ids, strict=True), 1):
        for to, heads in parts:
            to[dst] = heads[src]
        if number % per_slice == 0:
            yield


class PullReceiver:
    """The decode side. `source`: the memory of each of the peer's ranks.

    `is_fenced` and `release` are the backend's: how the source's fence is seen, and how its memory is let go.

    `max_mapped_bytes` bounds how much of a mapped peer's memory counts as this process's own.
    """

    def __init__(
        self,
        name: str,
        loop: asyncio.AbstractEventLoop,
        landing: Landing,
        source: Sequence[memoryview],
        is_fenced: Callable[[], bool],
        release: Callable[[], None],
        max_mapped_bytes: int | None = None,
    ) -> None:
        self.name = name
        self.is_fenced = is_fenced
        self._loop = loop
        self._landing = landing
        self._grids = grids_over(source)
        self._release = release
        self._queue: deque[Move | Commit] = deque()
        self._copy: tuple[SinkTransfer, Move, Iterator[None]] | None = None
        self._source = tuple(source)
        self._max_mapped_bytes = max_mapped_bytes
        self._num_mapped_bytes = 0  # at most, since pages were last dropped
        self._is_running = False
        self._is_closed = False

    def take(self, item: Move | Commit) -> None:
        self._queue.append(item)
        if not self._is_running:
            self._is_running = True
            self._run()

    def abandon(self, transfer_id: TransferId) -> bool:
        if self._copy is not None and self._copy[0].transfer_id == transfer_id:
            self._copy = None
        return True

    def is_writing(self, transfer_id: TransferId) -> bool:
        return False

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._queue.clear()
            self._copy = None
            self._grids.close()
            self._source = ()
            self._release()

    def _run(self) -> None:
        """One slice, or all that needs no copying."""
        try:
            while not self._is_closed and (self._copy is not None or self._queue):
                if self._copy is None:
                    self._begin(self._queue.popleft())
                elif self._advance():
                    self._loop.call_soon(self._run)
                    return
        except PolymuxError as error:
            self._landing.broken(error)
        self._is_running = False

    def _begin(self, item: Move | Commit) -> None:
        if isinstance(item, Commit):
            self._landing.commit(item)
            return
        transfer = self._landing.admit(item)
        if transfer is None:
            return
        source = self._grids.of_model(transfer.layout)
        src_ids = unpack_ids(item.src_block_ids)
        source.check(src_ids)
        target = self._landing.target(transfer)
        assert isinstance(target, BlockGrid)
        dst_ids = transfer.block_ids[item.first_block : item.first_block + len(src_ids)]
        layers = range(item.layer_lo, item.layer_hi)
        self._copy = (transfer, item, copy_blocks(source, target, src_ids, dst_ids, layers))

    def _advance(self) -> bool:
        """Copy a slice; False when that was the last."""
        assert self._copy is not None
        transfer, move, slices = self._copy
        if next(slices, slices) is None:
            return True
        self._copy = None
        self._landing.landed(transfer, move)
        self._num_mapped_bytes += move.num_bytes
        if self._max_mapped_bytes is not None and self._num_mapped_bytes > self._max_mapped_bytes:
            self._num_mapped_bytes = 0
            for memory in self._source:
                drop_pages(memory)
        return False


class PullSender:
    """The prefill side: says what is ready, and leaves the reading to the peer. `fence` is the backend's."""

    def __init__(self, send: Callable[[Move | Commit], object], fence: Callable[[], None]) -> None:
        self._send = send
        self._fence = fence
        self._next_seq = 0

    def send_move(self, move: Move, source: Grid, ready: DeviceEvent | None) -> None:
        self._send(replace(move, seq=self._next_seq))
        self._next_seq += 1

    def send_commit(self, commit: Commit) -> None:
        self._send(commit)

    def forget(self, transfer_id: TransferId, then: Callable[[], None]) -> None:
        then()  # the sink has said that it reads no more

    def close(self, then: Callable[[], None]) -> None:
        self._fence()
        then()
