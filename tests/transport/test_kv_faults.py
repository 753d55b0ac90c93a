"""Messages lost, late, doubled and damaged at each step, and at random: every transfer ends once, and nothing wrong is ever committed."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from backends import GPU_BACKENDS, HOST_BACKENDS, config_of

from polymux.transport.errors import TransferError
from polymux.transport.frames import drive_blocking, frame, read_frame
from polymux.transport.handshake import Introduction, dial
from polymux.transport.protocol import EdgeOffer, EdgeOpen, EdgeTerms, PeerKind
from polymux.transport.sockets import parse_address
from polymux.transport.units import Epoch
from polymux.transport.wire import decode_as, encode

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(params=[*HOST_BACKENDS, *GPU_BACKENDS])
def backend(request: pytest.FixtureRequest) -> dict[str, Any]:
    config = config_of(request, request.param)
    config["settings"] |= {"silence_s": 0.6, "acknowledge_s": 0.4}
    return config


# Four blocks of four layers in chunks of two: the moves of the first transfer are numbers 0 to 7.
LOST = [
    ("sink.send.prefill", 0, "TransferTimeout"),
    ("source.send.move", 0, "TransferError"),  # the commit finds it missing
    ("source.send.move", 7, "TransferError"),
    ("source.send.commit", 0, "TransferTimeout"),
    ("sink.send.ended", 0, "committed"),
]


@pytest.mark.parametrize(("step", "nth", "outcome"), LOST)
def test_a_message_lost_at_any_step_costs_that_transfer_at_most_its_edge(
    pair: Any, backend: dict[str, Any], step: str, nth: int, outcome: str
) -> None:
    config = backend | {"faults": [{"step": step, "action": "drop", "nth": nth}], "peer_writes": nth == 7}
    with pair(config | {"pace_s": 0.01}, config) as (prefiller, decoder):
        first = decoder.order(decoder.sink.connect(prefiller.peer, 5), 4, deadline_s=0.3)
        assert decoder.until_over(first) == [outcome]
        edge = decoder.sink.connect(prefiller.peer, 5)
        assert decoder.until_over(decoder.order(edge, 4)) == ["committed"]


def test_a_failure_report_that_is_lost_ends_in_a_timeout(pair: Any, backend: dict[str, Any]) -> None:
    with pair(backend | {"faults": [{"step": "source.send.failed", "action": "drop"}]}, backend) as (prefiller, decoder):
        prefiller.on_job = lambda job: prefiller.source.fail(job.ref, TransferError("no"))
        edge = decoder.sink.connect(prefiller.peer, 5)
        assert decoder.until_over(decoder.order(edge, 2, deadline_s=0.3)) == ["TransferTimeout"]


def test_an_end_that_the_peer_does_not_confirm_drops_the_edge_and_only_then_frees_the_blocks(pair: Any, backend: dict[str, Any]) -> None:
    faults = {"faults": [{"step": "source.send.released", "action": "drop"}], "peer_writes": True}
    with pair(backend | faults, backend | faults) as (prefiller, decoder):
        prefiller.on_job = lambda job: prefiller.source.accept(job.ref, job.layout)
        edge = decoder.sink.connect(prefiller.peer, 5)
        transfer = decoder.order(edge, 3, deadline_s=0.2)
        assert decoder.until(lambda: transfer.outcome == "TransferTimeout")
        failed_s = time.monotonic()
        assert not transfer.is_over and not decoder.pool.is_whole  # in quarantine
        assert decoder.until_over(transfer) == ["TransferTimeout"]
        assert time.monotonic() - failed_s > 0.25
        assert "did not confirm" in str(edge.lost)


@pytest.mark.parametrize(
    "step", ["sink.send.prefill", "source.send.move", "source.send.commit", "sink.send.ended", "source.send.failed", "source.send.released"]
)
def test_a_late_message_is_only_late(pair: Any, backend: dict[str, Any], step: str) -> None:
    config = backend | {"faults": [{"step": step, "action": "delay", "delay_s": 0.1, "nth": n} for n in (0, 3)]}
    with pair(config, config) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        transfers = [decoder.order(edge, 4) for _ in range(4)]
        edge.cancel(transfers[1].transfer_id, "not this one")
        found = decoder.until_over(*transfers)
        assert found.pop(1) in ("Cancelled", "committed")  # it may have been over before
        assert found == ["committed"] * 3 and edge.is_open


@pytest.mark.parametrize("step", ["source.send.move", "source.send.commit", "sink.send.ended"])
def test_a_message_that_comes_twice_is_dropped_the_second_time(pair: Any, backend: dict[str, Any], step: str) -> None:
    config = backend | {"faults": [{"step": step, "action": "duplicate", "probability": 0.5}], "seed": 3}
    with pair(config, config) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        for _ in range(4):
            decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 4))
        if step != "source.send.move":  # a doubled move gets a number of its own, and is a violation
            assert edge.is_open and {t.outcome for t in decoder.transfers.values()} == {"committed"}


def test_a_damaged_byte_is_noticed_before_the_commit(pair: Any, backend: dict[str, Any]) -> None:
    if "gpu" in backend:
        pytest.skip("what lies on a GPU cannot be damaged from here; test_kv_gpu.py damages what is on its way")
    with pair(backend, backend | {"faults": [{"step": "sink.land.move", "action": "corrupt", "nth": 2}], "seed": 5}) as (
        prefiller,
        decoder,
    ):
        edge = decoder.sink.connect(prefiller.peer, 5)
        transfer = decoder.order(edge, 6)
        assert decoder.until_over(transfer) == ["TransferError"]
        assert "damaged" in str(transfer.events[0].error)
        assert edge.is_open
        assert decoder.until_over(decoder.order(edge, 6)) == ["committed"]


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_on_both_sides_never_commit_wrong_bytes_nor_lose_a_block(pair: Any, backend: dict[str, Any], seed: int) -> None:
    steps = {"source": ["send.move", "send.commit", "send.failed", "send.released"], "sink": ["send.prefill", "send.ended"]}
    actions = ["drop", "delay", "duplicate"]
    sides = {}
    for side, some in steps.items():
        faults = [{"step": f"{side}.{step}", "action": action, "probability": 0.02, "delay_s": 0.01} for step in some for action in actions]
        faults.append({"step": "sink.land.move", "action": "corrupt", "probability": 0.02})
        sides[side] = backend | {"faults": faults, "seed": seed, "peer_writes": seed % 2 == 1}
    with pair(sides["source"], sides["sink"]) as (prefiller, decoder):
        for round_number in range(3):
            edge = decoder.sink.connect(prefiller.peer, 5)
            for count in (3, 5, 8, 2):
                try:
                    transfer = decoder.order(edge, count, deadline_s=0.4)
                except Exception:
                    break  # the edge was lost under us
                if count == 5 and round_number == 1:
                    edge.cancel(transfer.transfer_id, "random")
            decoder.until_over()


class RawSink:
    """A decode worker that speaks the protocol by hand, and badly."""

    def __init__(self, prefiller: Any, decoder: Any) -> None:
        self.sock = socket.create_connection(parse_address(prefiller.peer.address))
        offer = EdgeOffer(sink=decoder.identity, backends=("tcp",))
        intro = Introduction(
            kind=PeerKind.DECODE, peer_id="decode-0", target=prefiller.peer.worker_id, epoch=prefiller.epoch, body=encode(offer)
        )
        drive_blocking(dial(intro, "0123456789abcdef0123"), self.sock, 5)
        self.terms = decode_as(EdgeTerms, drive_blocking(read_frame(), self.sock, 5))

    def say(self, payload: bytes) -> None:
        self.sock.sendall(frame(payload))

    def is_hung_up_on(self) -> bool:
        self.sock.settimeout(3)
        try:
            while self.sock.recv(4096):
                pass
        except ConnectionResetError:
            pass
        self.sock.close()
        return True


CRIMES = ["garbage", "order before open", "unknown backend", "tcp without data", "open twice", "twice ordered", "stale epochs", "no blocks"]


@pytest.mark.parametrize("crime", CRIMES)
def test_a_decode_worker_that_breaks_the_protocol_loses_its_edge_and_nothing_else(pair: Any, kv_peer: Any, crime: str) -> None:
    with pair() as (prefiller, decoder):
        prefiller.on_job = lambda job: prefiller.source.accept(job.ref, job.layout)
        raw = RawSink(prefiller, decoder)
        transfer = kv_peer.Transfer(decoder.sink.next_transfer_id(), "raw/0", kv_peer.LAYOUTS["small"], [1, 2, 3])
        order = decoder.prefill_of(transfer, prefiller.peer, 5.0)
        opened = encode(EdgeOpen(backend="shm", reason=""))
        stale = decoder.prefill_of(transfer, prefiller.peer, 5.0, source_epoch=Epoch(1))
        empty = decoder.prefill_of(transfer, prefiller.peer, 5.0, block_ids=b"")
        said = {
            "garbage": [b"\xc1\xc1"],
            "order before open": [encode(order)],
            "unknown backend": [encode(EdgeOpen(backend="pigeon", reason=""))],
            "tcp without data": [encode(EdgeOpen(backend="tcp", reason=""))],
            "open twice": [opened, opened],
            "twice ordered": [opened, encode(order), encode(order)],
            "stale epochs": [opened, encode(stale)],
            "no blocks": [opened, encode(empty)],
        }[crime]
        for payload in said:
            raw.say(payload)
        if crime in ("stale epochs", "no blocks"):
            answer = drive_blocking(read_frame(), raw.sock, 3)
            assert (b"StaleEpoch" if crime == "stale epochs" else b"GrantViolation") in answer
            raw.sock.close()
        else:
            assert raw.is_hung_up_on()
        prefiller.on_job = prefiller.run
        assert decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 4)) == ["committed"]
