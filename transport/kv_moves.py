"""From what the engine pushes to what travels: moves of bounded size, some with a checksum, and the commit behind them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from polymux.transport.kv_backend import DeviceEvent
from polymux.transport.messages import Prefilled
from polymux.transport.protocol import MAX_MOVE_BLOCKS, MAX_MOVE_BYTES, Commit, Move
from polymux.transport.region import BlockGrid, Grid, Grids
from polymux.transport.transfer import SourceOrder
from polymux.transport.units import KIB, Epoch, WorkerId, pack_ids

_SAMPLE_BYTES = 256 * KIB  # of a move, where only some moves are checked


@dataclass(slots=True)
class Push:
    order: SourceOrder
    layer_lo: int
    layer_hi: int
    src_block_ids: tuple[int, ...]
    first_block: int
    ready: DeviceEvent | None

    def is_continued_by(self, other: Push) -> bool:
        """The same blocks' next layers."""
        return (self.order, self.layer_hi, self.src_block_ids, self.first_block) == (
            other.order,
            other.layer_lo,
            other.src_block_ids,
            other.first_block,
        )


@dataclass(slots=True)
class PushCommit:
    order: SourceOrder
    prefilled: Prefilled


class MoveMaker:
    """Of one edge. `checksum_every` so many moves one is checked: 1 all of all, 0 none."""

    def __init__(self, worker_id: WorkerId, source_epoch: Epoch, target_epoch: Epoch, grids: Grids[Grid], checksum_every: int) -> None:
        self._worker_id = worker_id
        self._source_epoch = source_epoch
        self._target_epoch = target_epoch
        self._grids = grids
        self._checksum_every = checksum_every
        self._num_moves = 0

    def of(self, push: Push) -> Iterator[tuple[Move, Grid]]:
        """The moves and where their blocks lie; the sender numbers them. In host memory the checksum is there already."""
        assert push.order.layout is not None
        layout, ids = push.order.layout, push.src_block_ids
        most = max(MAX_MOVE_BYTES // layout.moved_layer_bytes, 1)  # layers; of a very large model one block may be too much
        if push.layer_hi - push.layer_lo > most:
            for layer in range(push.layer_lo, push.layer_hi, most):
                yield from self.of(replace(push, layer_lo=layer, layer_hi=min(layer + most, push.layer_hi)))
            return
        row_bytes = (push.layer_hi - push.layer_lo) * layout.moved_layer_bytes
        per_move = min(max(MAX_MOVE_BYTES // row_bytes, 1), MAX_MOVE_BLOCKS)
        grid = self._grids.of(layout)
        for start in range(0, len(ids), per_move):
            some = ids[start : start + per_move]
            num_checked = self._num_checked(len(some), row_bytes)
            crc = _checksum(grid, some[:num_checked], push.layer_lo, push.layer_hi) if isinstance(grid, BlockGrid) else 0
            move = Move(
                seq=0,
                transfer_id=push.order.ref.transfer_id,
                source_epoch=self._source_epoch,
                target_epoch=self._target_epoch,
                layer_lo=push.layer_lo,
                layer_hi=push.layer_hi,
                first_block=push.first_block + start,
                src_block_ids=pack_ids(some),
                num_bytes=len(some) * row_bytes,
                num_checked_blocks=num_checked,
                crc32=crc,
            )
            yield move, grid

    def commit_of(self, push: PushCommit) -> Commit:
        order = push.order
        assert order.layout is not None
        return Commit(
            transfer_id=order.prefill.grant.transfer_id,
            sequence_id=order.prefill.sequence_id,
            source_id=self._worker_id,
            source_epoch=self._source_epoch,
            target_epoch=order.prefill.grant.target_epoch,
            layout_hash=order.layout.layout_hash,
            num_layers=order.layout.num_layers,
            num_blocks=order.num_blocks,
            prefilled=push.prefilled,
        )

    def _num_checked(self, num_blocks: int, row_bytes: int) -> int:
        """Over how many blocks the next move carries a checksum."""
        every = self._checksum_every
        self._num_moves += 1
        if not every or (self._num_moves - 1) % every:
            return 0
        return num_blocks if every == 1 else min(num_blocks, max(_SAMPLE_BYTES // row_bytes, 1))


def _checksum(grid: BlockGrid, block_ids: Sequence[int], layer_lo: int, layer_hi: int) -> int:
    crc = 0
    for block_id in block_ids:
        for view in grid.views(block_id, layer_lo, layer_hi):
            crc = zlib.crc32(view, crc)
    return crc
