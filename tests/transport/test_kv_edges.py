"""KV edges on every backend: who may join, which incarnation is meant, and what closing one ends."""

from __future__ import annotations

import dataclasses
import logging
import resource
import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest
from backends import ALL_BACKENDS, config_of

from polymux.transport.errors import (
    AuthenticationFailed,
    PeerLost,
    ProtocolMismatch,
    StaleEpoch,
)
from polymux.transport.kv import KVCommitted, KVSink
from polymux.transport.region import BlockGrid
from polymux.transport.units import Epoch

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("who", ["edge", "sink", "source", "server"])
def test_closing_either_side_ends_everything_on_the_edge(joined: Any, who: str) -> None:
    with joined() as (prefiller, decoder):
        hold = threading.Event()
        prefiller.on_job = lambda job: (prefiller.source.accept(job.ref, job.layout), prefiller.take(job), hold.wait(5))
        edge = decoder.sink.connect(prefiller.peer, 5)
        transfers = [decoder.order(edge, 3), decoder.order(edge, 2)]
        assert decoder.until(lambda: len(prefiller.ordered) == 2)
        {"edge": edge, "sink": decoder.sink, "source": prefiller.source, "server": prefiller.server}[who].close()
        assert decoder.until_over(*transfers) == ["PeerLost", "PeerLost"]
        hold.set()
        assert not edge.is_open
        with pytest.raises(PeerLost):
            decoder.order(edge, 1)


def test_a_lost_edge_is_dialled_anew_by_the_next_open(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        first = decoder.sink.connect(prefiller.peer, 5)
        decoder.until_over(decoder.order(first, 2))
        first.close()
        assert decoder.until(lambda: not first.is_open)
        second = decoder.sink.connect(prefiller.peer, 5)
        assert second is not first
        assert decoder.until_over(decoder.order(second, 2)) == ["committed"]
        assert sum(stats.committed for stats in decoder.sink.snapshot()) == 2  # totals never fall


def test_orders_wait_while_the_edge_is_being_dialled(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        edge = decoder.sink.open(prefiller.peer, 5)
        transfers = [decoder.order(edge, 2) for _ in range(5)]
        gone = decoder.order(edge, 2)
        edge.cancel(gone.transfer_id, "not after all")
        assert decoder.until_over(*transfers) == ["committed"] * 5
        assert decoder.until_over(gone) == ["Cancelled"]
        assert decoder.sink.open(prefiller.peer, 5) is edge


def test_nobody_at_the_address_is_a_lost_peer_for_every_order(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        nowhere = dataclasses.replace(prefiller.peer, address="tcp://127.0.0.1:1")
        with pytest.raises(PeerLost, match="cannot be reached"):
            decoder.sink.connect(nowhere, 2)
        edge = decoder.sink.open(nowhere, 2)
        try:
            assert decoder.until_over(decoder.order(edge, 2)) == ["PeerLost"]
        except PeerLost:
            assert not edge.is_open  # refused at once: it was lost already


def test_an_older_incarnation_of_the_prefill_worker_is_stale(joined: Any) -> None:
    with joined() as (prefiller, decoder):
        for epoch in (Epoch(2), Epoch(4)):
            with pytest.raises(StaleEpoch):
                decoder.sink.connect(dataclasses.replace(prefiller.peer, epoch=epoch), 5)
        edge = decoder.sink.connect(prefiller.peer, 5)
        with pytest.raises(StaleEpoch):
            decoder.sink.open(dataclasses.replace(prefiller.peer, epoch=Epoch(2)), 5)
        assert edge.is_open


def test_a_newer_incarnation_replaces_the_edge_to_the_older_one(joined: Any, kv_peer: Any, backend: dict[str, Any]) -> None:
    with joined() as (prefiller, decoder):
        prefiller.on_job = lambda job: prefiller.source.accept(job.ref, job.layout)
        old = decoder.order(decoder.sink.connect(prefiller.peer, 5), 2)
        restarted = kv_peer.Prefiller(**backend | {"epoch": 9})
        try:
            edge = decoder.sink.connect(restarted.peer, 5)
            assert decoder.until_over(old) == ["StaleEpoch"]
            assert decoder.until_over(decoder.order(edge, 2)) == ["committed"]
        finally:
            restarted.close()


def test_an_older_incarnation_of_the_decode_worker_is_refused(joined: Any, kv_peer: Any, backend: dict[str, Any]) -> None:
    with joined() as (prefiller, decoder):
        decoder.sink.connect(prefiller.peer, 5)
        ghost = kv_peer.Decoder(**backend | {"epoch": 4})
        try:
            with pytest.raises(StaleEpoch, match="has epoch 5; 4 is gone"):
                ghost.sink.connect(prefiller.peer, 5)
        finally:
            ghost.close()


def test_a_decode_worker_with_another_token_is_refused(joined: Any, kv_peer: Any, backend: dict[str, Any]) -> None:
    with joined() as (prefiller, _):
        stranger = kv_peer.Decoder(**backend | {"token": "not the cluster's token"})
        try:
            with pytest.raises(AuthenticationFailed):
                stranger.sink.connect(prefiller.peer, 5)
        finally:
            stranger.close()


def test_several_decode_workers_share_one_prefill_worker(joined: Any, kv_peer: Any, backend: dict[str, Any]) -> None:
    with joined() as (prefiller, decoder):
        second = kv_peer.Decoder(**backend | {"worker_id": "decode-1"})
        try:
            transfers = [(d, d.order(d.sink.connect(prefiller.peer, 5), 6)) for d in (decoder, second) for _ in range(4)]
            assert [d.until_over(transfer) for d, transfer in transfers] == [["committed"]] * 8
            assert second.is_whole()
        finally:
            second.close()


def test_an_engine_callback_that_crashes_does_not_unsettle_the_books(joined: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "polymux.transport.kv_sink")  # a log record would keep the traceback, and all it holds
    with joined() as (prefiller, decoder):
        keep = decoder.sink._on_event

        def crash(event: Any) -> None:
            keep(event)
            raise KeyError("engine bug")

        decoder.sink._on_event = crash
        edge = decoder.sink.connect(prefiller.peer, 5)
        assert decoder.until_over(decoder.order(edge, 3), decoder.order(edge, 3)) == ["committed"] * 2


def test_idle_edges_of_all_backends_together_use_no_cpu(pair: Any, request: pytest.FixtureRequest) -> None:
    with ExitStack() as stack:
        for name in ALL_BACKENDS:
            config = config_of(request, name)
            prefiller, decoder = stack.enter_context(pair(config, config))
            assert decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 3)) == ["committed"]
        time.sleep(0.3)
        before = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(0.5)
        after = resource.getrusage(resource.RUSAGE_SELF)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.02


def test_the_backend_is_the_nearest_that_works_and_says_why(pair: Any) -> None:
    cases = [
        ({}, {}, "local", "first choice"),
        ({"host_id": "elsewhere"}, {"settings": {"backend": "shm"}}, "", "another host"),
        ({"plain": True}, {"settings": {"backend": "shm"}}, "", "the source does not offer it"),
        ({"settings": {"backend": "tcp"}}, {}, "tcp", "not local: the source does not offer it; not shm: the source does not offer it"),
    ]
    for source, sink, backend, reason in cases:
        with pair(source, sink) as (prefiller, decoder):
            if not backend:
                with pytest.raises(ProtocolMismatch, match=reason):
                    decoder.sink.connect(prefiller.peer, 5)
                continue
            edge = decoder.sink.connect(prefiller.peer, 5)
            assert (edge.backend, edge.reason) == (backend, reason)
            assert decoder.until_over(decoder.order(edge, 3)) == ["committed"]


def test_in_one_region_a_block_that_is_in_place_is_handed_over_as_it_is(kv_peer: Any) -> None:
    prefiller = kv_peer.Prefiller()
    events: list[Any] = []
    done = threading.Event()

    def on_event(event: Any) -> None:
        events.append(event)
        done.set()

    decoder = kv_peer.Decoder(worker_id="prefill-0", epoch=3)
    decoder.sink.close()
    sink = KVSink(
        region=prefiller.region,
        identity=prefiller.peer,
        token=kv_peer.TOKEN,
        on_event=on_event,
    )
    try:
        layout, blocks = kv_peer.LAYOUTS["small"], [7, 3, 11]

        def in_place(job: Any) -> None:
            """Computes straight into the granted blocks, but for the last."""
            prefiller.source.accept(job.ref, job.layout)
            job.blocks = [7, 3, 40]
            prefiller.pool.free -= set(job.blocks)
            prefiller.push(job, range(3), range(4))
            prefiller.commit(job)

        prefiller.on_job = in_place
        edge = sink.connect(prefiller.peer, 5)
        transfer = kv_peer.Transfer(sink.next_transfer_id(), "r/0", layout, blocks)
        keep = prefiller._on_released
        prefiller.source._context.on_released = lambda ref: None
        edge.order(decoder.prefill_of(transfer, prefiller.peer, 5.0, target_epoch=Epoch(3)), layout)
        assert done.wait(5)
        assert isinstance(events[0], KVCommitted)
        grid = BlockGrid(prefiller.region.buffer, layout)
        assert (grid.array[blocks] == kv_peer.pattern("r/0", 3, layout)).all()
        keep(prefiller.ordered[0])
    finally:
        sink.close()
        decoder.close()
        prefiller.close()
