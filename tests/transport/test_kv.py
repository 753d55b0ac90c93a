"""KV transfers: one suite for every backend. In each case bytes are exact where committed, and both pools are whole at the end."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from polymux.transport.errors import (
    GrantViolation,
    LayoutMismatch,
    ModelNotFound,
    Overloaded,
    StaleEpoch,
    TransferTimeout,
)
from polymux.transport.head_slices import sharded
from polymux.transport.kv_tcp import TcpSender
from polymux.transport.units import Epoch, TransferId, pack_ids

pytestmark = pytest.mark.usefixtures("nothing_left")


def test_scattered_blocks_arrive_exactly_layer_by_layer(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        for count in (1, 2, 7, 33):
            assert decoder.until_over(decoder.order(edge, count)) == ["committed"]
        assert prefiller.cancelled == []


def test_several_transfers_of_two_layouts_interleave(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        jobs: list[Any] = []
        started = threading.Barrier(5)

        def run_all_at_once(job: Any) -> None:
            def run() -> None:
                started.wait(5)
                prefiller.run(job)

            jobs.append(threading.Thread(target=run))
            jobs[-1].start()

        prefiller.on_job = run_all_at_once
        edge = decoder.sink.connect(prefiller.peer, 5)
        shapes = [(9, "small"), (5, "large"), (12, "small"), (3, "large"), (1, "small")]
        transfers = [decoder.order(edge, count, layout=layout) for count, layout in shapes]
        assert decoder.until_over(*transfers) == ["committed"] * 5
        for thread in jobs:
            thread.join()


def test_many_transfers_one_after_the_other_leave_nothing(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        for _ in range(14):
            decoder.until_over(decoder.order(edge, 8), decoder.order(edge, 3, layout="large"))
        assert {t.outcome for t in decoder.transfers.values()} == {"committed"}
        (stats,) = decoder.sink.snapshot()
        assert (stats.committed, stats.num_outstanding, stats.bytes_outstanding) == (28, 0, 0)
        assert stats.bytes == sum(len(t.blocks) * sharded(t.layout, 1).block_bytes for t in decoder.transfers.values())
        assert stats.seconds > 0 and stats.moves > 0 and stats.failed == ()


def test_blocks_pushed_whole_and_out_of_order_commit_too(joined: Any) -> None:
    with joined() as (prefiller, decoder):

        def backwards(job: Any) -> None:
            prefiller.source.accept(job.ref, job.layout)
            prefiller.take(job)
            assert prefiller.push(job, range(0), range(1))  # nothing is nothing
            for first in (6, 3, 0):
                for layers in (range(2, 4), range(2)):
                    assert prefiller.push(job, range(first, first + 3), layers)
            assert prefiller.commit(job)

        prefiller.on_job = backwards
        assert decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 9)) == ["committed"]


def test_a_commit_is_announced_only_after_the_last_layer(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        hold = threading.Event()

        def held(job: Any) -> None:
            prefiller.source.accept(job.ref, job.layout)
            prefiller.take(job)
            prefiller.push(job, range(4), range(3))
            hold.wait(5)
            prefiller.push(job, range(4), range(3, 4))
            prefiller.commit(job)

        prefiller.on_job = held
        transfer = decoder.order(decoder.sink.connect(prefiller.peer, 5), 4)
        time.sleep(0.1)
        assert transfer.events == []
        hold.set()
        assert decoder.until_over(transfer) == ["committed"]


@pytest.mark.parametrize(
    ("grant", "error", "why"),
    [
        ({"block_ids": pack_ids([])}, GrantViolation, "no blocks"),
        ({"block_ids": pack_ids([5, 6, 5])}, GrantViolation, "twice"),
        ({"block_ids": pack_ids([0, 256])}, GrantViolation, "outside the 256"),
        ({"layout_hash": "0123456789abcdef"}, LayoutMismatch, "layout"),
        ({"source_epoch": Epoch(2)}, StaleEpoch, "epochs 2"),
        ({"target_epoch": Epoch(4)}, StaleEpoch, "and 4"),
        ({"deadline_s": 0.0}, TransferTimeout, "has passed"),
    ],
)
def test_an_order_that_cannot_be_right_is_refused_at_once(joined: Any, grant: dict[str, Any], error: type[Exception], why: str) -> None:
    with joined() as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        with pytest.raises(error, match=why):
            decoder.order(edge, 2, **grant)
        assert edge.is_open and prefiller.ordered == []
        assert decoder.until_over(decoder.order(edge, 2)) == ["committed"]


def test_a_grant_that_overlaps_a_live_one_is_refused(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        hold = threading.Event()
        prefiller.on_job = lambda job: (hold.wait(5), prefiller.run(job))
        edge = decoder.sink.connect(prefiller.peer, 5)
        live = decoder.order(edge, 4)
        for blocks, layout in [([live.blocks[2]], "small"), ([live.blocks[0] // 4], "large")]:
            with pytest.raises(GrantViolation, match="overlap"):
                decoder.order(edge, 1, layout=layout, block_ids=pack_ids(blocks))
        hold.set()
        assert decoder.until_over(live) == ["committed"]


@pytest.mark.parametrize(
    ("layers", "blocks", "first", "why"),
    [
        ((0, 5), [0], 0, "layers"),
        ((0, 1), [0, 1, 2], 2, "exceed the grant"),
        ((0, 1), [256], 0, "exceed the region"),
        ((0, 1), [0], -1, "exceed"),
    ],
)
def test_a_push_outside_its_order_is_refused_to_the_engine(joined: Any, layers: Any, blocks: list[int], first: int, why: str) -> None:
    errors: list[Exception] = []
    with joined() as (prefiller, decoder):

        def wrong(job: Any) -> None:
            prefiller.source.accept(job.ref, job.layout)
            with pytest.raises(GrantViolation, match=why) as caught:
                prefiller.source.push(job.ref, *layers, blocks, first)
            errors.append(caught.value)
            prefiller.run(job)

        prefiller.on_job = wrong
        assert decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 4)) == ["committed"]
    assert len(errors) == 1


def test_pushing_twice_or_committing_too_early_is_refused_to_the_engine(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        caught: list[str] = []

        def twice(job: Any) -> None:
            prefiller.source.accept(job.ref, job.layout)
            prefiller.take(job)
            prefiller.push(job, range(2), range(4))
            with pytest.raises(GrantViolation) as again:
                prefiller.push(job, range(1, 2), range(1))
            with pytest.raises(GrantViolation) as early:
                prefiller.commit(job)
            caught.extend([str(again.value), str(early.value)])
            prefiller.push(job, range(2, 3), range(4))
            prefiller.commit(job)

        prefiller.on_job = twice
        assert decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 3)) == ["committed"]
        assert ["second time" in text for text in caught] == [True, False] and "not pushed" in caught[1]


def test_another_layout_on_the_prefill_side_is_a_mismatch_there_and_here(joined: Any, kv_peer: Any) -> None:
    with joined() as (prefiller, decoder):
        raised = threading.Event()

        def other(job: Any) -> None:
            with pytest.raises(LayoutMismatch):
                prefiller.source.accept(job.ref, kv_peer.LAYOUTS["large"])
            raised.set()

        prefiller.on_job = other
        assert decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 3)) == ["LayoutMismatch"]
        assert raised.wait(1)


def test_a_prefill_that_fails_says_why(joined: Any) -> None:
    with joined() as (prefiller, decoder):

        def fails(job: Any) -> None:
            prefiller.source.accept(job.ref, job.layout)
            prefiller.take(job)
            prefiller.push(job, range(1), range(2))
            assert prefiller.source.fail(job.ref, ModelNotFound("gone", param="model"))
            assert not prefiller.push(job, range(1), range(2, 3))
            assert not prefiller.source.fail(job.ref, ModelNotFound("again"))

        prefiller.on_job = fails
        transfer = decoder.order(decoder.sink.connect(prefiller.peer, 5), 3)
        assert decoder.until_over(transfer) == ["ModelNotFound"]
        assert (transfer.events[0].error.message, transfer.events[0].error.param) == ("gone", "model")
        assert prefiller.cancelled == []  # it knows already


def test_an_order_that_the_engine_refuses_fails_with_its_reason(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        prefiller.refusal = Overloaded("mailbox full", retry_after_s=1.5)
        transfer = decoder.order(decoder.sink.connect(prefiller.peer, 5), 3)
        assert decoder.until_over(transfer) == ["Overloaded"]
        assert transfer.events[0].error.retry_after_s == 1.5
        assert (prefiller.ordered, prefiller.released) == ([], [])


@pytest.mark.parametrize("step", ["ordered", "accepted", "some pushed", "all pushed", "committed"])
def test_a_cancel_at_any_step_gives_everything_back(joined: Any, step: str) -> None:
    with joined() as (prefiller, decoder):
        reached, go_on = threading.Event(), threading.Event()

        def pause(at: str) -> None:
            if at == step:
                reached.set()
                go_on.wait(5)

        def paused(job: Any) -> None:
            pause("ordered")
            prefiller.source.accept(job.ref, job.layout)
            pause("accepted")
            prefiller.take(job)
            prefiller.push(job, range(3), range(2))
            pause("some pushed")
            prefiller.push(job, range(3), range(2, 4))
            pause("all pushed")
            prefiller.commit(job)
            pause("committed")

        prefiller.on_job = paused
        edge = decoder.sink.connect(prefiller.peer, 5)
        transfer = decoder.order(edge, 3)
        assert reached.wait(5)
        if step == "committed":
            assert decoder.until_over(transfer) == ["committed"]
            assert not edge.cancel(transfer.transfer_id, "too late")
        else:
            assert edge.cancel(transfer.transfer_id, "the client went away")
            assert not edge.cancel(transfer.transfer_id, "again")
            assert decoder.until(lambda: transfer.outcome == "Cancelled")
            assert decoder.until(lambda: [reason for _, reason in prefiller.cancelled] == ["the client went away"])
        go_on.set()
        decoder.until_over(transfer)
        prefiller.on_job = prefiller.run
        assert decoder.until_over(decoder.order(edge, 5)) == ["committed"]


def test_a_cancel_in_the_middle_of_the_bytes_gives_everything_back(joined: Any) -> None:
    with joined({"pace_s": 0.001}) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        for wait_s in (0.0, 0.005, 0.01, 0.02, 0.03):
            doomed, other = decoder.order(edge, 12), decoder.order(edge, 6)
            time.sleep(wait_s)
            edge.cancel(doomed.transfer_id, "changed my mind")
            assert decoder.until_over(doomed, other)[1] == "committed"


def test_source_blocks_are_released_only_after_the_sender_has_forgotten_them(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    forget = TcpSender.forget

    def noted_forget(sender: TcpSender, transfer_id: TransferId, then: Any) -> None:
        happened.append("forgotten")
        forget(sender, transfer_id, then)

    monkeypatch.setattr(TcpSender, "forget", noted_forget)
    tcp = {"settings": {"backend": "tcp"}}
    with pair(tcp, tcp) as (prefiller, decoder):
        released = prefiller.source._context.on_released

        def noted_release(ref: Any) -> None:
            happened.append("released")
            released(ref)

        prefiller.source._context.on_released = noted_release
        edge = decoder.sink.connect(prefiller.peer, 5)
        decoder.until_over(decoder.order(edge, 4))
        prefiller.on_job = lambda job: prefiller.source.accept(job.ref, job.layout)
        edge.cancel(decoder.order(edge, 4).transfer_id, "not this one")
        assert decoder.until(lambda: len(happened) == 4)
    assert happened == ["forgotten", "released"] * 2


def test_a_transfer_that_nobody_fills_times_out_and_is_released_on_both_sides(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        prefiller.on_job = lambda job: prefiller.source.accept(job.ref, job.layout)
        edge = decoder.sink.connect(prefiller.peer, 5)
        started = time.monotonic()
        transfer = decoder.order(edge, 3, deadline_s=0.2)
        assert decoder.until_over(transfer) == ["TransferTimeout"]
        assert 0.15 < time.monotonic() - started < 1.0
        assert "12 of 12 layers of blocks missing" in str(transfer.events[0].error)
        assert edge.is_open


def test_credits_bound_what_is_outstanding(joined: Any, backend: dict[str, Any], kv_peer: Any) -> None:
    hold = threading.Event()
    layout = sharded(kv_peer.LAYOUTS["small"], backend.get("ranks", (1, 1))[1])
    for limits in ({"max_transfers": 2}, {"max_bytes": 6 * layout.block_bytes}):  # of each rank
        hold.clear()
        with joined(sink={"settings": limits}) as (prefiller, decoder):
            prefiller.on_job = lambda job, prefiller=prefiller: (hold.wait(5), prefiller.run(job))
            edge = decoder.sink.connect(prefiller.peer, 5)
            first = [decoder.order(edge, 3), decoder.order(edge, 3)]
            with pytest.raises(Overloaded):
                decoder.order(edge, 3)
            hold.set()
            assert decoder.until_over(*first) == ["committed"] * 2
            assert decoder.until_over(decoder.order(edge, 3)) == ["committed"]


def test_the_prefill_side_bounds_its_orders_too(joined: Any, backend: dict[str, Any]) -> None:
    with joined({"settings": backend["settings"] | {"max_transfers": 2}}) as (prefiller, decoder):
        hold = threading.Event()
        prefiller.on_job = lambda job: (hold.wait(5), prefiller.run(job))
        edge = decoder.sink.connect(prefiller.peer, 5)
        transfers = [decoder.order(edge, 3) for _ in range(3)]
        assert decoder.until_over(transfers[2]) == ["Overloaded"]
        hold.set()
        assert decoder.until_over(*transfers) == ["committed", "committed", "Overloaded"]
