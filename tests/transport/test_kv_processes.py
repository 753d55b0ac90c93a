"""Real processes killed and frozen at each step of the protocol, on either side. Nobody hangs, and both pools are whole."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest
from processes import address_of, until

QUICK = {"silence_s": 0.45, "acknowledge_s": 0.4}  # to notice a frozen peer
SOURCE_STEPS = [
    ("source.receive.prefill", 0),
    ("source.send.move", 0),
    ("source.send.move", 1),
    ("source.send.commit", 0),
    ("source.receive.ended", 0),
]
SINK_STEPS = [
    ("sink.send.prefill", 1),
    ("sink.receive.move", 0),
    ("sink.receive.move", 1),
    ("sink.receive.commit", 0),
    ("sink.send.ended", 0),
]


@pytest.mark.parametrize("backend", ["shm", "tcp"])
@pytest.mark.parametrize(("step", "nth"), SOURCE_STEPS)
@pytest.mark.parametrize("action", ["kill", "freeze"])
def test_a_prefill_worker_that_dies_or_freezes_costs_its_transfers_only(
    kv_peer: Any, child: Any, backend: str, step: str, nth: int, action: str
) -> None:
    settings = QUICK | {"backend": backend}
    decoder = kv_peer.Decoder(settings=settings)
    try:
        fault = {"step": step, "action": action, "nth": nth}
        with child(role="prefill", settings=settings, faults=[fault]) as victim:
            peer = address_of(victim)
            edge = decoder.sink.connect(peer, 5)
            assert edge.backend == backend
            transfers = [decoder.order(edge, 6, deadline_s=20), decoder.order(edge, 6, deadline_s=20)]
            started = time.monotonic()
            outcomes = decoder.until_over(*transfers)
            assert set(outcomes) <= {"PeerLost", "committed"}
            assert outcomes[0] == ("committed" if step == "source.receive.ended" else "PeerLost")
            assert time.monotonic() - started < 5  # long before the deadline
            assert decoder.is_whole()
            if action == "freeze":
                assert until(victim.is_frozen)
                if "PeerLost" in outcomes:
                    assert until(lambda: not edge.is_open)
                victim.thaw()
                assert victim.until("whole", True)["whole"]
            else:
                assert victim.process.wait(5) == -signal.SIGKILL
    finally:
        decoder.close()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_restarted_prefill_worker_is_used_at_once(kv_peer: Any, child: Any, backend: str) -> None:
    settings = {"backend": backend}
    decoder = kv_peer.Decoder(settings=settings)
    try:
        with child(role="prefill", settings=settings, faults=[{"step": "source.send.move", "action": "kill", "nth": 1}]) as victim:
            assert decoder.until_over(decoder.order(decoder.sink.connect(address_of(victim), 5), 6)) == ["PeerLost"]
        with child(role="prefill", settings=settings, epoch=4) as reborn:
            assert decoder.until_over(decoder.order(decoder.sink.connect(address_of(reborn), 5), 6)) == ["committed"]
            assert reborn.until("whole", True)["whole"]
        assert decoder.is_whole()
    finally:
        decoder.close()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
@pytest.mark.parametrize(("step", "nth"), SINK_STEPS)
@pytest.mark.parametrize("action", ["kill", "freeze"])
def test_a_decode_worker_that_dies_or_freezes_gives_the_prefill_worker_its_blocks_back(
    kv_peer: Any, child: Any, backend: str, step: str, nth: int, action: str
) -> None:
    settings = QUICK | {"backend": backend, "checksum_every": 0}  # so that nothing but the fence protects
    prefiller = kv_peer.Prefiller(settings=settings)
    peer = {name: getattr(prefiller.peer, name) for name in ("worker_id", "epoch", "address", "host_id")}
    try:
        fault = {"step": step, "action": action, "nth": nth}
        with child(role="decode", settings=settings, faults=[fault], peer=peer) as victim:
            assert victim.hello["backend"] == f"fault+{backend}"
            victim.say({"order": [6, 6], "deadline_s": 20})
            assert until(victim.is_frozen if action == "freeze" else lambda: victim.process.poll() is not None)
            assert until(prefiller.is_whole, 5), prefiller.report()  # and its blocks are scribbled over
            if action == "freeze":
                victim.thaw()
                victim.hear()
                report = victim.until("whole", True)
                assert (report["whole"], report["wrong"]) == (True, 0), report
                assert set(report["outcomes"]) <= {"PeerLost", "committed"}
                if backend == "shm" and step.startswith("sink.receive"):
                    assert report["outcomes"][0] == "PeerLost"  # what it copied after the thaw was not the sequence's any more
        second = kv_peer.Decoder(settings=settings, epoch=6)
        try:
            assert second.until_over(second.order(second.sink.connect(prefiller.peer, 5), 6)) == ["committed"]
        finally:
            second.close()
        assert until(prefiller.is_whole)
    finally:
        prefiller.close()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_a_worker_killed_at_a_random_moment_under_load_leaves_the_other_whole(kv_peer: Any, child: Any, backend: str) -> None:
    settings = QUICK | {"backend": backend}
    decoder = kv_peer.Decoder(settings=settings)
    try:
        for epoch, wait_s in enumerate((0.004, 0.03), 3):
            with child(role="prefill", settings=settings, epoch=epoch, pace_s=0.0005) as victim:
                edge = decoder.sink.connect(address_of(victim), 5)
                transfers = [decoder.order(edge, 6, deadline_s=20) for _ in range(8)]
                time.sleep(wait_s)
                victim.process.kill()
                assert set(decoder.until_over(*transfers)) <= {"PeerLost", "committed"}
        assert decoder.is_whole()
    finally:
        decoder.close()
