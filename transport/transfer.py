"""Who owns which block at each moment of a transfer: the books of both sides, pure, without sockets, clocks or threads.

Decode side, per transfer:  GRANTED -> FILLING -> committed
                               \\          \\--> QUARANTINED -> released
                                \\-------------/
Prefill side, per order:    ORDERED -> PUSHING -> COMMITTED or FAILED -> released        (released from any state)

A block of the decode side's region is in at most one live transfer, whatever the layouts; a committed or released one is in none.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from polymux.transport.errors import GrantViolation, LayoutMismatch, Overloaded, StaleEpoch, TransferError
from polymux.transport.kv_types import OrderRef
from polymux.transport.messages import KVLayout, Prefill
from polymux.transport.protocol import Commit, Move
from polymux.transport.units import Epoch, SequenceId, TransferId, WorkerId, unpack_ids


class Coverage:
    """Which (layer, block) cells of a transfer are claimed, and how many are still missing; each may be claimed, and then marked, once."""

    def __init__(self, num_layers: int, num_blocks: int) -> None:
        self.num_layers = num_layers
        self.num_blocks = num_blocks
        self.num_missing = num_layers * num_blocks
        self._cells = [bytearray(num_blocks) for _ in range(num_layers)]

    def check(self, layer_lo: int, layer_hi: int, first_block: int, count: int) -> None:
        """Raise GrantViolation unless these cells exist and nobody has claimed one."""
        if not 0 <= layer_lo < layer_hi <= self.num_layers:
            raise GrantViolation(f"layers [{layer_lo}, {layer_hi}) of {self.num_layers}")
        if first_block < 0 or count < 1 or first_block + count > self.num_blocks:
            raise GrantViolation(f"{count} blocks from number {first_block} exceed the grant of {self.num_blocks}")
        for layer in range(layer_lo, layer_hi):
            again = self._cells[layer].find(1, first_block, first_block + count)
            if again >= 0:
                raise GrantViolation(f"layer {layer} of block number {again} comes a second time")

    def claim(self, layer_lo: int, layer_hi: int, first_block: int, count: int) -> None:
        """After `check`: these are on their way. The same bytes said twice would else count twice, and hide others that never came."""
        for layer in range(layer_lo, layer_hi):
            self._cells[layer][first_block : first_block + count] = b"\1" * count

    def mark(self, layer_lo: int, layer_hi: int, first_block: int, count: int) -> None:
        """These, checked and claimed by one caller, are done."""
        self.claim(layer_lo, layer_hi, first_block, count)
        self.num_missing -= (layer_hi - layer_lo) * count


Ranges = NDArray[np.int64]  # [n, 2]: first byte and the one past the last, sorted


class Spans:
    """Byte ranges in use, none overlapping."""

    def __init__(self) -> None:
        self._starts: NDArray[np.int64] = np.empty(0, np.int64)
        self._ends: NDArray[np.int64] = np.empty(0, np.int64)

    def add(self, ranges: Ranges) -> None:
        """All or nothing; the ranges do not overlap each other. Raises GrantViolation when one overlaps a range in use."""
        at = np.searchsorted(self._starts, ranges[:, 0], side="right")
        ends_before = np.concatenate([[0], self._ends])[at]
        starts_after = np.append(self._starts, np.iinfo(np.int64).max)[at]
        overlaps = np.flatnonzero((ends_before > ranges[:, 0]) | (starts_after < ranges[:, 1]))
        if len(overlaps):
            start, end = ranges[overlaps[0]]
            raise GrantViolation(f"bytes [{start}, {end}) overlap another live grant")
        self._starts = np.insert(self._starts, at, ranges[:, 0])
        self._ends = np.insert(self._ends, at, ranges[:, 1])

    def remove(self, ranges: Ranges) -> None:
        at = np.searchsorted(self._starts, ranges[:, 0])
        assert (self._starts[at] == ranges[:, 0]).all() and (self._ends[at] == ranges[:, 1]).all()
        self._starts = np.delete(self._starts, at)
        self._ends = np.delete(self._ends, at)

    @property
    def num_bytes(self) -> int:
        return int((self._ends - self._starts).sum())


def ranges_of(block_ids: Sequence[int], layout: KVLayout, region_bytes: int) -> Ranges:
    """The byte ranges of distinct blocks, neighbours merged. Raises GrantViolation for no blocks, a duplicate, or one out of range."""
    if not len(block_ids):
        raise GrantViolation("the grant names no blocks; every prompt needs at least one")
    ids = np.sort(np.asarray(block_ids, np.int64))
    num_blocks = region_bytes // layout.block_bytes
    if ids[0] < 0 or ids[-1] >= num_blocks:
        bad = ids[0] if ids[0] < 0 else ids[-1]
        raise GrantViolation(f"block {bad} is outside the {num_blocks} blocks of {layout.block_bytes} bytes in the region")
    steps = np.diff(ids)
    twice = np.flatnonzero(steps == 0)
    if len(twice):
        raise GrantViolation(f"block {ids[twice[0]]} is granted twice")
    breaks = np.flatnonzero(steps != 1)
    starts, ends = ids[np.concatenate([[0], breaks + 1])], ids[np.append(breaks, len(ids) - 1)] + 1
    ranges: Ranges = np.stack([starts, ends], axis=1) * layout.block_bytes
    return ranges


class SinkState(enum.Enum):
    GRANTED = "granted"
    FILLING = "filling"
    COMMITTED = "committed"
    QUARANTINED = "quarantined"
    RELEASED = "released"


@dataclass(slots=True, eq=False)
class SinkTransfer:
    """One transfer in the decode side's books."""

    edge: int
    transfer_id: TransferId
    sequence_id: SequenceId
    layout: KVLayout
    block_ids: list[int]
    source_epoch: Epoch
    target_epoch: Epoch
    ranges: Ranges
    coverage: Coverage
    state: SinkState = SinkState.GRANTED
    began_s: float | None = None  # when its first move came

    @property
    def num_bytes(self) -> int:
        return len(self.block_ids) * self.layout.block_bytes

    @property
    def is_live(self) -> bool:
        """May still be committed."""
        return self.state in (SinkState.GRANTED, SinkState.FILLING)


@dataclass(slots=True)
class _EdgeBooks:
    source_id: WorkerId
    source_epoch: Epoch
    transfers: dict[TransferId, SinkTransfer] = field(default_factory=dict)
    num_bytes: int = 0
    next_seq: int = 0
    num_stale: int = 0


class SinkLedger:
    """All grants of one decode worker: credits by edge, ranges by region."""

    def __init__(self, region_bytes: int, epoch: Epoch, *, max_transfers: int, max_bytes: int) -> None:
        self._region_bytes = region_bytes
        self._epoch = epoch
        self._max_transfers = max_transfers
        self._max_bytes = max_bytes
        self._spans = Spans()
        self._edges: dict[int, _EdgeBooks] = {}

    def open_edge(self, edge: int, source_id: WorkerId, source_epoch: Epoch) -> None:
        self._edges[edge] = _EdgeBooks(source_id, source_epoch)

    def close_edge(self, edge: int) -> None:
        """After its last transfer was released."""
        assert not self._edges[edge].transfers
        del self._edges[edge]

    def grant(self, edge: int, prefill: Prefill, layout: KVLayout) -> SinkTransfer:
        """Book an order. Raises LayoutMismatch, StaleEpoch, GrantViolation or Overloaded, and then nothing is booked."""
        books, grant = self._edges[edge], prefill.grant
        if grant.layout_hash != layout.layout_hash:
            raise LayoutMismatch(f"the grant says layout {grant.layout_hash}, the model's is {layout.layout_hash}")
        if (grant.source_epoch, grant.target_epoch) != (books.source_epoch, self._epoch):
            raise StaleEpoch(
                f"the grant joins epochs {grant.source_epoch} and {grant.target_epoch}, the edge {books.source_epoch} and {self._epoch}"
            )
        if grant.transfer_id in books.transfers:
            raise GrantViolation(f"transfer {grant.transfer_id} is outstanding already; take ids from next_transfer_id")
        block_ids = unpack_ids(grant.block_ids)
        ranges = ranges_of(block_ids, layout, self._region_bytes)
        num_bytes = len(block_ids) * layout.block_bytes
        if len(books.transfers) >= self._max_transfers or books.num_bytes + num_bytes > self._max_bytes:
            raise Overloaded(f"{len(books.transfers)} transfers of {books.num_bytes} bytes are outstanding with {books.source_id}")
        self._spans.add(ranges)
        coverage = Coverage(layout.num_layers, len(block_ids))
        transfer = SinkTransfer(
            edge,
            grant.transfer_id,
            prefill.sequence_id,
            layout,
            block_ids,
            grant.source_epoch,
            grant.target_epoch,
            ranges,
            coverage,
        )
        books.transfers[grant.transfer_id] = transfer
        books.num_bytes += num_bytes
        return transfer

    def admit(self, edge: int, move: Move) -> SinkTransfer | None:
        """The transfer into which this move may be copied now; None for one that has ended, or a move seen before: drop it.

        Raises StaleEpoch or GrantViolation: nothing that this edge says can be trusted any more.
        """
        books = self._edges[edge]
        if move.seq != books.next_seq:
            if move.seq < books.next_seq:
                books.num_stale += 1
                return None
            raise GrantViolation(f"move {move.seq} came where {books.next_seq} was due: moves were lost")
        books.next_seq += 1
        if (move.source_epoch, move.target_epoch) != (books.source_epoch, self._epoch):
            raise StaleEpoch(
                f"a move between epochs {move.source_epoch} and {move.target_epoch}, the edge joins {books.source_epoch} and {self._epoch}"
            )
        transfer = books.transfers.get(move.transfer_id)
        if transfer is None or not transfer.is_live:
            books.num_stale += 1
            return None
        _check_move(transfer, move)
        transfer.coverage.claim(move.layer_lo, move.layer_hi, move.first_block, len(move.src_block_ids) // 4)
        transfer.state = SinkState.FILLING
        return transfer

    def land(self, transfer: SinkTransfer, move: Move) -> None:
        """The move's bytes are in place."""
        assert transfer.state is SinkState.FILLING
        transfer.coverage.mark(move.layer_lo, move.layer_hi, move.first_block, len(move.src_block_ids) // 4)

    def commit(self, edge: int, commit: Commit) -> SinkTransfer | None:
        """Make a transfer's blocks readable; they leave the books. None when it had ended.

        Raises StaleEpoch, LayoutMismatch, GrantViolation or TransferError: this transfer must fail.
        """
        books = self._edges[edge]
        transfer = books.transfers.get(commit.transfer_id)
        if transfer is None or not transfer.is_live:
            books.num_stale += 1
            return None
        _check_commit(transfer, commit, books.source_id)
        transfer.state = SinkState.COMMITTED
        self._forget(transfer)
        return transfer

    def fail(self, transfer: SinkTransfer) -> bool:
        """Quarantine a live transfer's blocks. False when it had ended."""
        if not transfer.is_live:
            return False
        transfer.state = SinkState.QUARANTINED
        return True

    def quiesce(self, transfer: SinkTransfer) -> None:
        """Nobody writes any more: the blocks leave the books."""
        assert transfer.state is SinkState.QUARANTINED
        transfer.state = SinkState.RELEASED
        self._forget(transfer)

    def find(self, edge: int, transfer_id: TransferId) -> SinkTransfer | None:
        books = self._edges.get(edge)
        return books.transfers.get(transfer_id) if books else None

    def transfers(self, edge: int) -> list[SinkTransfer]:
        books = self._edges.get(edge)
        return list(books.transfers.values()) if books else []

    def bytes_outstanding(self, edge: int) -> int:
        books = self._edges.get(edge)
        return books.num_bytes if books else 0

    def num_stale(self, edge: int) -> int:
        books = self._edges.get(edge)
        return books.num_stale if books else 0

    def _forget(self, transfer: SinkTransfer) -> None:
        books = self._edges[transfer.edge]
        del books.transfers[transfer.transfer_id]
        books.num_bytes -= transfer.num_bytes
        self._spans.remove(transfer.ranges)

    def check(self) -> None:
        """Assert that the books agree with each other."""
        held = [t for books in self._edges.values() for t in books.transfers.values()]
        assert all(t.is_live or t.state is SinkState.QUARANTINED for t in held)
        assert self._spans.num_bytes == sum(t.num_bytes for t in held)
        for books in self._edges.values():
            assert books.num_bytes == sum(t.num_bytes for t in books.transfers.values()) <= self._max_bytes
            assert len(books.transfers) <= self._max_transfers


def _check_move(transfer: SinkTransfer, move: Move) -> None:
    count, layers = len(move.src_block_ids) // 4, move.layer_hi - move.layer_lo
    transfer.coverage.check(move.layer_lo, move.layer_hi, move.first_block, count)
    num_bytes = count * layers * transfer.layout.moved_layer_bytes
    if move.num_bytes != num_bytes or not 0 <= move.num_checked_blocks <= count:
        raise GrantViolation(f"a move of {move.num_bytes} bytes for {count} blocks of {layers} layers, which are {num_bytes}")


def _check_commit(transfer: SinkTransfer, commit: Commit, source_id: WorkerId) -> None:
    if (commit.source_epoch, commit.target_epoch) != (transfer.source_epoch, transfer.target_epoch):
        said_epochs, booked_epochs = (commit.source_epoch, commit.target_epoch), (transfer.source_epoch, transfer.target_epoch)
        raise StaleEpoch(f"the commit joins epochs {said_epochs}, the grant {booked_epochs}")
    if commit.layout_hash != transfer.layout.layout_hash:
        raise LayoutMismatch(f"the commit says layout {commit.layout_hash}, the grant {transfer.layout.layout_hash}")
    said = (commit.source_id, commit.sequence_id, commit.num_layers, commit.num_blocks, commit.prefilled.sequence_id)
    booked = (source_id, transfer.sequence_id, transfer.layout.num_layers, len(transfer.block_ids), transfer.sequence_id)
    if said != booked:
        raise GrantViolation(f"the commit is for {said}, the grant for {booked}")
    if transfer.coverage.num_missing:
        raise TransferError(f"the commit came with {transfer.coverage.num_missing} layers of blocks missing")


class SourceState(enum.Enum):
    ORDERED = "ordered"
    PUSHING = "pushing"
    COMMITTED = "committed"  # by us; the sink has not confirmed
    FAILED = "failed"  # by us; the sink has not confirmed
    RELEASED = "released"


@dataclass(slots=True, eq=False)
class SourceOrder:
    """One order in the prefill side's books. Its pushed source blocks are pinned until RELEASED."""

    ref: OrderRef
    prefill: Prefill
    num_blocks: int
    state: SourceState = SourceState.ORDERED
    layout: KVLayout | None = None
    coverage: Coverage | None = None

    @property
    def is_active(self) -> bool:
        """The engine still works on it."""
        return self.state in (SourceState.ORDERED, SourceState.PUSHING)

    def accept(self, layout: KVLayout) -> None:
        """Raises LayoutMismatch when the grant is for another layout."""
        if layout.layout_hash != self.prefill.grant.layout_hash:
            raise LayoutMismatch(
                f"model {self.prefill.model} has layout {layout.layout_hash} here, the grant says {self.prefill.grant.layout_hash}: "
                "do both workers serve the same checkpoint?"
            )
        self.layout = layout
        self.coverage = Coverage(layout.num_layers, self.num_blocks)
        self.state = SourceState.PUSHING

    def push(self, layer_lo: int, layer_hi: int, src_block_ids: Sequence[int], first_block: int, region_bytes: int) -> None:
        """Book a push. Raises GrantViolation for what lies outside the order or the region, or was pushed before."""
        if self.layout is None or self.coverage is None:
            raise GrantViolation("accept the order, with its layout, before the first push")
        num_blocks = region_bytes // self.layout.block_bytes
        if min(src_block_ids) < 0 or max(src_block_ids) >= num_blocks:
            raise GrantViolation(f"source blocks {min(src_block_ids)}..{max(src_block_ids)} exceed the region's {num_blocks}")
        self.coverage.check(layer_lo, layer_hi, first_block, len(src_block_ids))
        self.coverage.mark(layer_lo, layer_hi, first_block, len(src_block_ids))

    def commit(self) -> None:
        """Raises GrantViolation when something has not been pushed."""
        if self.coverage is None or self.coverage.num_missing:
            missing = self.coverage.num_missing if self.coverage else "all"
            raise GrantViolation(f"commit with {missing} layers of blocks not pushed")
        self.state = SourceState.COMMITTED
