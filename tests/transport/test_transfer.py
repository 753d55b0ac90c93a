"""The books of a transfer: each rule by itself, then all of them under any order of events."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polymux.transport.errors import GrantViolation, LayoutMismatch, Overloaded, StaleEpoch, TransferError
from polymux.transport.kv_types import OrderRef
from polymux.transport.messages import Grant, KVLayout, Prefill, Prefilled, SamplingParams
from polymux.transport.protocol import Commit, Ended, Failed, Move
from polymux.transport.transfer import Coverage, SinkLedger, SinkState, SinkTransfer, SourceOrder, SourceState, Spans, ranges_of
from polymux.transport.units import ClientId, Epoch, ModelName, SequenceId, TransferId, WorkerId, pack_ids

SMALL = KVLayout(num_layers=2, num_kv_heads=1, head_dim=1, dtype="bfloat16", block_size=4)  # 32 bytes a block
LARGE = KVLayout(num_layers=3, num_kv_heads=1, head_dim=1, dtype="float32", block_size=4)  # 96 bytes a block
SOURCE, SINK_EPOCH, SOURCE_EPOCH = WorkerId("p"), Epoch(5), Epoch(3)
REGION_BYTES = 960
EDGE = 1


def prefill(transfer_id: int, block_ids: list[int], layout: KVLayout = SMALL, **grant: Any) -> Prefill:
    granted = Grant(
        transfer_id=TransferId(transfer_id),
        layout_hash=layout.layout_hash,
        block_ids=pack_ids(block_ids),
        target_epoch=SINK_EPOCH,
        source_epoch=SOURCE_EPOCH,
    )
    return Prefill(
        sequence_id=SequenceId(f"s{transfer_id}"),
        client_id=ClientId("c"),
        model=ModelName("m"),
        prompt_ids=pack_ids([1]),
        output_ids=pack_ids([]),
        sampling=SamplingParams(max_tokens=1),
        grant=dataclasses.replace(granted, **grant),
        deadline_s=1.0,
        tpot_slo_s=0.1,
        due_in_s=1.0,
    )


def move(
    seq: int, transfer_id: int, layers: tuple[int, int], first_block: int, count: int, layout: KVLayout = SMALL, **change: Any
) -> Move:
    one = Move(
        seq=seq,
        transfer_id=TransferId(transfer_id),
        source_epoch=SOURCE_EPOCH,
        target_epoch=SINK_EPOCH,
        layer_lo=layers[0],
        layer_hi=layers[1],
        first_block=first_block,
        src_block_ids=pack_ids(range(count)),
        num_bytes=count * (layers[1] - layers[0]) * layout.layer_bytes,
        num_checked_blocks=0,
        crc32=0,
    )
    return dataclasses.replace(one, **change)


def commit(transfer_id: int, blocks: int, layout: KVLayout = SMALL, **change: Any) -> Commit:
    sequence_id = SequenceId(f"s{transfer_id}")
    one = Commit(
        transfer_id=TransferId(transfer_id),
        sequence_id=sequence_id,
        source_id=SOURCE,
        source_epoch=SOURCE_EPOCH,
        target_epoch=SINK_EPOCH,
        layout_hash=layout.layout_hash,
        num_layers=layout.num_layers,
        num_blocks=blocks,
        prefilled=Prefilled(sequence_id=sequence_id, token_id=1, finish_reason=None),
    )
    return dataclasses.replace(one, **change)


def ledger(**limits: int) -> SinkLedger:
    books = SinkLedger(REGION_BYTES, SINK_EPOCH, **{"max_transfers": 4, "max_bytes": REGION_BYTES} | limits)
    books.open_edge(EDGE, SOURCE, SOURCE_EPOCH)
    return books


def filled(books: SinkLedger, num_blocks: int = 2) -> SinkTransfer:
    transfer = books.grant(EDGE, prefill(1, list(range(num_blocks))), SMALL)
    one = move(0, 1, (0, 2), 0, num_blocks)
    assert books.admit(EDGE, one) is transfer
    books.land(transfer, one)
    return transfer


def test_a_filled_transfer_commits_and_leaves_the_books() -> None:
    books = ledger()
    transfer = filled(books)
    assert books.commit(EDGE, commit(1, 2)) is transfer
    assert transfer.state is SinkState.COMMITTED
    assert books.transfers(EDGE) == [] and books.bytes_outstanding(EDGE) == 0
    books.grant(EDGE, prefill(2, [0, 1]), SMALL)  # the blocks may be granted again
    books.check()


@pytest.mark.parametrize(
    ("block_ids", "why"),
    [
        ([], "no blocks"),
        ([3, 3], "granted twice"),
        ([1, 2, 3, 2], "granted twice"),
        ([30], "outside the 30 blocks"),
        ([2**32 - 1], "outside"),
    ],
)
def test_a_grant_that_no_region_can_hold_is_refused(block_ids: list[int], why: str) -> None:
    books = ledger()
    with pytest.raises(GrantViolation, match=why):
        books.grant(EDGE, prefill(1, block_ids), SMALL)
    assert books.transfers(EDGE) == []
    books.check()


@pytest.mark.parametrize(("layout", "block_id"), [(SMALL, 3), (SMALL, 4), (SMALL, 5), (LARGE, 1)])
def test_a_grant_that_overlaps_a_live_one_is_refused_even_in_another_layout(layout: KVLayout, block_id: int) -> None:
    books = ledger()
    books.grant(EDGE, prefill(1, [1], LARGE), LARGE)  # bytes 96..192
    with pytest.raises(GrantViolation, match="overlap"):
        books.grant(EDGE, prefill(2, [block_id], layout), layout)
    books.grant(EDGE, prefill(3, [2, 6], SMALL), SMALL)  # its neighbours on both sides
    books.check()


def test_a_grant_that_overlaps_in_its_second_range_books_nothing() -> None:
    books = ledger()
    books.grant(EDGE, prefill(1, [5]), SMALL)
    with pytest.raises(GrantViolation):
        books.grant(EDGE, prefill(2, [0, 5]), SMALL)
    books.grant(EDGE, prefill(3, [0]), SMALL)
    books.check()


def test_quarantined_blocks_cannot_be_granted_until_they_quiesce() -> None:
    books = ledger()
    transfer = books.grant(EDGE, prefill(1, [4]), SMALL)
    assert books.fail(transfer) and not books.fail(transfer)
    with pytest.raises(GrantViolation):
        books.grant(EDGE, prefill(2, [4]), SMALL)
    books.quiesce(transfer)
    books.grant(EDGE, prefill(2, [4]), SMALL)


@pytest.mark.parametrize(
    ("change", "error"),
    [({"layout_hash": "other"}, LayoutMismatch), ({"source_epoch": Epoch(2)}, StaleEpoch), ({"target_epoch": Epoch(4)}, StaleEpoch)],
)
def test_a_grant_for_another_layout_or_incarnation_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ledger().grant(EDGE, prefill(1, [0], **change), SMALL)


def test_credits_bound_transfers_and_bytes_and_come_back() -> None:
    books = ledger(max_transfers=2, max_bytes=5 * SMALL.block_bytes)
    first = books.grant(EDGE, prefill(1, [0, 1, 2]), SMALL)
    with pytest.raises(Overloaded):
        books.grant(EDGE, prefill(2, [3, 4, 5]), SMALL)
    books.grant(EDGE, prefill(2, [3]), SMALL)
    with pytest.raises(Overloaded):
        books.grant(EDGE, prefill(3, [4]), SMALL)
    books.fail(first)
    with pytest.raises(Overloaded):
        books.grant(EDGE, prefill(3, [4]), SMALL)  # quarantine still holds its credit
    books.quiesce(first)
    books.grant(EDGE, prefill(3, [4]), SMALL)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (move(0, 1, (0, 3), 0, 1), GrantViolation),
        (move(0, 1, (1, 1), 0, 1), GrantViolation),
        (move(0, 1, (0, 1), 1, 2), GrantViolation),
        (move(0, 1, (0, 1), -1, 1), GrantViolation),
        (move(0, 1, (0, 1), 0, 0), GrantViolation),
        (move(0, 1, (0, 1), 0, 1, num_bytes=1), GrantViolation),
        (move(0, 1, (0, 1), 0, 1, num_checked_blocks=2), GrantViolation),
        (move(1, 1, (0, 1), 0, 1), GrantViolation),
        (move(0, 1, (0, 1), 0, 1, source_epoch=Epoch(2)), StaleEpoch),
        (move(0, 1, (0, 1), 0, 1, target_epoch=Epoch(4)), StaleEpoch),
    ],
)
def test_a_move_outside_its_grant_is_a_violation(bad: Move, error: type[Exception]) -> None:
    books = ledger()
    books.grant(EDGE, prefill(1, [0, 1]), SMALL)
    with pytest.raises(error):
        books.admit(EDGE, bad)


def test_a_cell_may_land_once() -> None:
    books = ledger()
    filled(books)
    with pytest.raises(GrantViolation, match="second time"):
        books.admit(EDGE, move(1, 1, (1, 2), 1, 1))


def test_moves_for_an_ended_transfer_or_seen_before_are_dropped_and_counted() -> None:
    books = ledger()
    transfer = filled(books)
    assert books.admit(EDGE, move(0, 1, (0, 2), 0, 2)) is None
    books.fail(transfer)
    assert books.admit(EDGE, move(1, 1, (0, 1), 0, 1)) is None
    books.quiesce(transfer)
    assert books.admit(EDGE, move(2, 1, (0, 1), 0, 1)) is None
    assert books.commit(EDGE, commit(1, 2)) is None
    assert books.num_stale(EDGE) == 4


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"source_epoch": Epoch(2)}, StaleEpoch),
        ({"target_epoch": Epoch(6)}, StaleEpoch),
        ({"layout_hash": "x"}, LayoutMismatch),
        ({"sequence_id": SequenceId("other")}, GrantViolation),
        ({"source_id": WorkerId("q")}, GrantViolation),
        ({"num_layers": 3}, GrantViolation),
        ({"num_blocks": 3}, GrantViolation),
        ({"prefilled": Prefilled(sequence_id=SequenceId("other"), token_id=1, finish_reason=None)}, GrantViolation),
    ],
)
def test_a_commit_is_compared_in_every_field(change: dict[str, Any], error: type[Exception]) -> None:
    books = ledger()
    transfer = filled(books)
    with pytest.raises(error):
        books.commit(EDGE, commit(1, 2, **change))
    assert transfer.is_live


def test_a_commit_with_a_layer_missing_is_refused() -> None:
    books = ledger()
    transfer = books.grant(EDGE, prefill(1, [0, 1]), SMALL)
    for seq, one in enumerate([move(0, 1, (0, 1), 0, 2), move(1, 1, (1, 2), 0, 1)]):
        assert books.admit(EDGE, one) is transfer, seq
        books.land(transfer, one)
    with pytest.raises(TransferError, match="1 layers of blocks missing"):
        books.commit(EDGE, commit(1, 2))


def test_source_side_books_refuse_what_the_grant_does_not_hold() -> None:
    order = SourceOrder(OrderRef(1, TransferId(1)), prefill(1, [7, 8]), 2)
    with pytest.raises(GrantViolation, match="accept the order"):
        order.push(0, 1, [0], 0, REGION_BYTES)
    with pytest.raises(LayoutMismatch):
        order.accept(LARGE)
    order.accept(SMALL)
    for layers, ids, first in [((0, 3), [0], 0), ((0, 1), [0, 1, 2], 0), ((0, 1), [30], 0), ((0, 1), [-1], 0)]:
        with pytest.raises(GrantViolation):
            order.push(*layers, ids, first, REGION_BYTES)
    order.push(0, 2, [0], 0, REGION_BYTES)
    with pytest.raises(GrantViolation, match="second time"):
        order.push(1, 2, [5], 0, REGION_BYTES)
    with pytest.raises(GrantViolation, match="2 layers of blocks not pushed"):
        order.commit()
    order.push(0, 2, [1], 1, REGION_BYTES)
    order.commit()
    assert order.state is SourceState.COMMITTED and not order.is_active


def test_ranges_of_scattered_blocks_are_merged_runs() -> None:
    assert ranges_of([5, 4, 9, 3], SMALL, REGION_BYTES).tolist() == [[96, 192], [288, 320]]


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.sets(st.integers(0, 29), min_size=1, max_size=6), max_size=8))
def test_spans_refuse_exactly_what_overlaps_and_give_back_what_was_taken(grants: list[set[int]]) -> None:
    spans, taken = Spans(), set[int]()
    for blocks in grants:
        ranges = ranges_of(sorted(blocks), SMALL, REGION_BYTES)
        if blocks & taken:
            with pytest.raises(GrantViolation):
                spans.add(ranges)
        else:
            spans.add(ranges)
            taken |= blocks
            if len(blocks) % 2:
                spans.remove(ranges)
                taken -= blocks
        assert spans.num_bytes == len(taken) * SMALL.block_bytes


def test_coverage_counts_what_is_missing() -> None:
    coverage = Coverage(3, 4)
    coverage.mark(0, 2, 1, 2)
    assert coverage.num_missing == 8
    with pytest.raises(GrantViolation):
        coverage.check(0, 3, 2, 1)
    coverage.check(2, 3, 0, 4)


def test_what_is_said_twice_while_it_is_on_its_way_does_not_count_for_what_never_came() -> None:
    coverage = Coverage(1, 4)
    coverage.check(0, 1, 0, 2)
    coverage.claim(0, 1, 0, 2)
    with pytest.raises(GrantViolation, match="a second time"):
        coverage.check(0, 1, 0, 2)
    coverage.mark(0, 1, 0, 2)
    assert coverage.num_missing == 2


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
