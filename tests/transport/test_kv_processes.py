"""Real processes killed and frozen at each step of the protocol, on either side. Nobody hangs, and both pools are whole."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from polymux.transport.messages import Peer
from polymux.transport.units import Epoch, WorkerId

SCRIPT = Path(__file__).with_name("kv_peer.py")
NAMESPACE = Path(__file__).parents[2] / ".namespace"


def spawn() -> subprocess.Popen[bytes]:
    """A peer that waits for its configuration."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(NAMESPACE), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


@pytest.fixture(scope="module")
def spares() -> Iterator[deque[subprocess.Popen[bytes]]]:
    """Peers that start while the tests before them wait."""
    waiting = deque(spawn() for _ in range(2))
    yield waiting
    for process in waiting:
        bury(process)


def bury(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(10)
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()


class Child:
    """A peer in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], config: dict[str, Any]) -> None:
        self.process = process
        self.say(config)
        self.hello = self.hear()

    def say(self, line: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(line).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self, within_s: float = 20.0) -> dict[str, Any]:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], within_s)
        assert ready, "the child said nothing"
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def ask(self, **question: Any) -> dict[str, Any]:
        self.say(question)
        return self.hear()

    def until(self, key: str, value: Any, within_s: float = 8.0) -> dict[str, Any]:
        until_s = time.monotonic() + within_s
        while (report := self.ask())[key] != value and time.monotonic() < until_s:
            time.sleep(0.02)
        return report

    def is_frozen(self) -> bool:
        state = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state == "T"

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@pytest.fixture
def child(spares: deque[subprocess.Popen[bytes]]) -> Any:
    """`with child(role=..., ...) as peer`."""

    @contextmanager
    def start(**config: Any) -> Iterator[Child]:
        process = spares.popleft()
        spares.append(spawn())
        try:
            yield Child(process, config)
        finally:
            bury(process)

    return start


def address_of(peer: Child) -> Peer:
    hello = peer.hello
    return Peer(worker_id=WorkerId("prefill-0"), epoch=Epoch(hello["epoch"]), address=hello["address"], host_id=hello["host_id"])


def until(claim: Any, within_s: float = 8.0) -> bool:
    until_s = time.monotonic() + within_s
    while not claim() and time.monotonic() < until_s:
        time.sleep(0.005)
    return bool(claim())


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
