"""The books of transfers under any order of events: source and sink beside a plain model of what they must say."""

from __future__ import annotations

from collections import deque
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from transfer_books import EDGE, LARGE, REGION_BYTES, SMALL, commit, ledger, move, prefill

from polymux.transport.errors import GrantViolation, Overloaded
from polymux.transport.kv_types import OrderRef
from polymux.transport.protocol import Commit, Ended, Failed, Move
from polymux.transport.transfer import SinkState, SinkTransfer, SourceOrder, SourceState

UNIT = SMALL.block_bytes
LAYOUTS = {1: SMALL, 3: LARGE}  # units in a block


class TransferMachine(RuleBasedStateMachine):
    """One edge, a lossless but slow wire each way, two pools of blocks, and every event at any moment.

    The decode pool is kept in units of the smallest block: `owner[unit]` is "free", "sequence" or a transfer id.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_units = REGION_BYTES // UNIT
        self.owner: list[Any] = ["free"] * self.num_units
        self.source_free = 24  # blocks
        self.pinned: dict[int, int] = {}
        self.next_id = 1
        self.connect()

    def connect(self) -> None:
        self.books = ledger(max_transfers=3, max_bytes=20 * UNIT)
        self.orders: dict[int, SourceOrder] = {}
        self.to_source: deque[Any] = deque()
        self.to_sink: deque[Any] = deque()
        self.seq = 0

    def units(self, transfer: SinkTransfer) -> list[int]:
        per = transfer.layout.block_bytes // UNIT
        return [block * per + i for block in transfer.block_ids for i in range(per)]

    @rule(per=st.sampled_from(sorted(LAYOUTS)), data=st.data())
    def order(self, per: int, data: st.DataObject) -> None:
        layout = LAYOUTS[per]
        blocks = [b for b in range(self.num_units // per) if all(o == "free" for o in self.owner[b * per : b * per + per])]
        if not blocks:
            return
        chosen = data.draw(st.lists(st.sampled_from(blocks), min_size=1, max_size=5, unique=True))
        command = prefill(self.next_id, chosen, layout)
        self.next_id += 1
        outstanding = self.books.transfers(EDGE)
        try:
            transfer = self.books.grant(EDGE, command, layout)
        except Overloaded:
            assert len(outstanding) == 3 or sum(t.num_bytes for t in outstanding) + len(chosen) * layout.block_bytes > 20 * UNIT
            return
        for unit in self.units(transfer):
            assert self.owner[unit] == "free"
            self.owner[unit] = transfer.transfer_id
        self.to_source.append((command, layout))

    @precondition(lambda self: self.to_source)
    @rule()
    def source_receives(self) -> None:
        item = self.to_source.popleft()
        if isinstance(item, Ended):
            self.source_ended(item)
            return
        command, layout = item
        order = SourceOrder(OrderRef(EDGE, command.grant.transfer_id), command, len(command.grant.block_ids) // 4)
        self.orders[order.ref.transfer_id] = order
        if order.num_blocks > self.source_free:
            order.state = SourceState.FAILED
            self.to_sink.append(Failed(transfer_id=order.ref.transfer_id, error=None))  # type: ignore[arg-type]
            return
        self.source_free -= order.num_blocks
        self.pinned[order.ref.transfer_id] = order.num_blocks
        order.accept(layout)

    def source_ended(self, ended: Ended) -> None:
        order = self.orders.pop(ended.transfer_id)
        order.state = SourceState.RELEASED
        self.source_free += self.pinned.pop(ended.transfer_id, 0)

    def active(self) -> list[SourceOrder]:
        return [order for order in self.orders.values() if order.is_active]

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def push(self, data: st.DataObject) -> None:
        order = data.draw(st.sampled_from(self.active()))
        assert order.layout is not None
        layers = sorted(data.draw(st.lists(st.integers(0, order.layout.num_layers), min_size=2, max_size=2, unique=True)))
        first = data.draw(st.integers(0, order.num_blocks - 1))
        count = data.draw(st.integers(1, order.num_blocks - first))
        try:
            order.push(layers[0], layers[1], list(range(count)), first, REGION_BYTES)
        except GrantViolation:
            return  # some of it was pushed before
        self.to_sink.append(move(self.seq, order.ref.transfer_id, (layers[0], layers[1]), first, count, order.layout))
        self.seq += 1

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def push_the_rest_and_commit(self, data: st.DataObject) -> None:
        order = data.draw(st.sampled_from(self.active()))
        assert order.layout is not None and order.coverage is not None
        for layer in range(order.layout.num_layers):
            for block in range(order.num_blocks):
                if not order.coverage._cells[layer][block]:
                    order.push(layer, layer + 1, [block], block, REGION_BYTES)
                    self.to_sink.append(move(self.seq, order.ref.transfer_id, (layer, layer + 1), block, 1, order.layout))
                    self.seq += 1
        order.commit()
        self.to_sink.append(commit(order.ref.transfer_id, order.num_blocks, order.layout))

    @precondition(lambda self: self.active())
    @rule(data=st.data())
    def source_fails(self, data: st.DataObject) -> None:
        order = data.draw(st.sampled_from(self.active()))
        order.state = SourceState.FAILED
        self.to_sink.append(Failed(transfer_id=order.ref.transfer_id, error=None))  # type: ignore[arg-type]

    @precondition(lambda self: self.to_sink)
    @rule()
    def sink_receives(self) -> None:
        item = self.to_sink.popleft()
        if isinstance(item, Move):
            transfer = self.books.admit(EDGE, item)
            if transfer is not None:
                assert all(self.owner[unit] == transfer.transfer_id for unit in self.units(transfer))
                self.books.land(transfer, item)
        elif isinstance(item, Commit):
            transfer = self.books.commit(EDGE, item)
            if transfer is not None:
                assert transfer.coverage.num_missing == 0
                self.give(transfer, "sequence")
                self.to_source.append(Ended(transfer_id=transfer.transfer_id, error=None))
        else:
            failed = self.books.find(EDGE, item.transfer_id)
            if failed is not None:
                self.end(failed)

    def give(self, transfer: SinkTransfer, owner: str) -> None:
        for unit in self.units(transfer):
            assert self.owner[unit] == transfer.transfer_id
            self.owner[unit] = owner

    def end(self, transfer: SinkTransfer) -> None:
        if self.books.fail(transfer):
            self.to_source.append(Ended(transfer_id=transfer.transfer_id, error=None))

    @rule(data=st.data())
    def cancel_or_time_out(self, data: st.DataObject) -> None:
        outstanding = self.books.transfers(EDGE)
        if outstanding:
            self.end(data.draw(st.sampled_from(outstanding)))

    @rule(data=st.data())
    def quiesce(self, data: st.DataObject) -> None:
        quarantined = [t for t in self.books.transfers(EDGE) if t.state is SinkState.QUARANTINED]
        if quarantined:
            transfer = data.draw(st.sampled_from(quarantined))
            self.books.quiesce(transfer)
            self.give(transfer, "free")

    @rule()
    def sequences_finish(self) -> None:
        self.owner = ["free" if owner == "sequence" else owner for owner in self.owner]

    @rule()
    def edge_lost(self) -> None:
        for transfer in self.books.transfers(EDGE):
            self.books.fail(transfer)
            self.books.quiesce(transfer)
            self.give(transfer, "free")
        self.books.close_edge(EDGE)
        self.source_free += sum(self.pinned.values())
        self.pinned.clear()
        self.connect()

    @invariant()
    def books_agree(self) -> None:
        self.books.check()
        held = {unit: t.transfer_id for t in self.books.transfers(EDGE) for unit in self.units(t)}
        assert held == {unit: owner for unit, owner in enumerate(self.owner) if owner not in ("free", "sequence")}
        assert 0 <= self.source_free == 24 - sum(self.pinned.values())
        assert 0 <= self.books.bytes_outstanding(EDGE) <= 20 * UNIT

    def teardown(self) -> None:
        """Whatever happened, once all messages are through and all sequences are done, both pools are whole."""
        for transfer in self.books.transfers(EDGE):
            self.end(transfer)
        while self.to_sink or self.to_source:
            if self.to_source:
                self.source_receives()
            for order in self.active():
                order.state = SourceState.FAILED
            if self.to_sink:
                self.sink_receives()
        for transfer in self.books.transfers(EDGE):
            self.books.quiesce(transfer)
            self.give(transfer, "free")
        self.sequences_finish()
        self.books_agree()
        assert self.owner == ["free"] * self.num_units
        assert (self.source_free, self.orders) == (24, {})


TransferMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, database=None)
TestTransferMachine = TransferMachine.TestCase
