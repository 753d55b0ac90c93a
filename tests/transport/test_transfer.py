"""The books of a transfer: each rule by itself. `test_transfer_machine.py` has them under any order of events."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transfer_books import EDGE, LARGE, REGION_BYTES, SMALL, commit, filled, ledger, move, prefill

from polymux.transport.errors import GrantViolation, LayoutMismatch, Overloaded, StaleEpoch, TransferError
from polymux.transport.kv_types import OrderRef
from polymux.transport.messages import KVLayout, Prefilled
from polymux.transport.protocol import Move
from polymux.transport.transfer import Coverage, SinkState, SourceOrder, SourceState, Spans, ranges_of
from polymux.transport.units import Epoch, SequenceId, TransferId, WorkerId


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
