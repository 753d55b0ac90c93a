"""Edges between the GPUs of two processes: on the stand-in, and with `-m gpu` on a real one. Peers are killed and frozen on either side.

NCCL refuses two ranks on one GPU; on a real one each process therefore says that it is another host, and the bytes go over sockets.
That is for tests only.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from backends import all_given_back, between_processes
from processes import address_of, until

REAL = pytest.mark.gpu


@pytest.fixture(
    params=[
        "stand-in+cuda_ipc",
        "stand-in+nccl",
        pytest.param("cuda+cuda_ipc", marks=REAL),
        pytest.param("cuda+nccl", marks=REAL),
    ]
)
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Either side's configuration; `child=True` for the one in a process of its own."""
    return between_processes(request, monkeypatch)


def test_blocks_of_two_layouts_arrive_exactly_from_another_process(kv_peer: Any, child: Any, config: Any) -> None:
    decoder = kv_peer.Decoder(**config())
    try:
        with child(role="prefill", **config(child=True)) as source:
            edge = decoder.sink.connect(address_of(source), 30)
            assert edge.backend == config()["settings"]["backend"]
            transfers = [decoder.order(edge, n, layout=shape, deadline_s=30) for n, shape in ((1, "small"), (9, "large"), (33, "small"))]
            assert decoder.until_over(*transfers, within_s=30) == ["committed"] * 3
            assert decoder.is_whole() and source.until("whole", True)["whole"]
        assert until(lambda: not edge.is_open)
        assert all_given_back(decoder)
    finally:
        decoder.close()


@pytest.mark.parametrize("action", ["kill", "freeze"])
def test_a_prefill_worker_that_dies_or_freezes_costs_its_transfers_only(kv_peer: Any, child: Any, config: Any, action: str) -> None:
    decoder = kv_peer.Decoder(**config())
    try:
        fault = {"step": "source.send.move", "action": action, "nth": 1}
        with child(role="prefill", **config(child=True, faults=[fault])) as victim:
            edge = decoder.sink.connect(address_of(victim), 30)
            transfers = [decoder.order(edge, 6, deadline_s=30) for _ in range(2)]
            began_s = time.monotonic()
            assert set(decoder.until_over(*transfers, within_s=20)) <= {"PeerLost", "NcclError"}
            assert time.monotonic() - began_s < 15  # long before the deadline
            assert decoder.is_whole() and all_given_back(decoder)
            if action == "freeze":
                assert until(victim.is_frozen)
                victim.thaw()
                assert victim.until("whole", True)["whole"]
            else:
                assert victim.process.wait(5) == -signal.SIGKILL
    finally:
        decoder.close()


@pytest.mark.parametrize("action", ["kill", "freeze"])
def test_a_decode_worker_that_dies_or_freezes_gives_the_prefill_worker_its_blocks_back(
    kv_peer: Any, child: Any, config: Any, action: str
) -> None:
    prefiller = kv_peer.Prefiller(**config())
    peer = {name: getattr(prefiller.peer, name) for name in ("worker_id", "epoch", "address", "host_id")}
    try:
        fault = {"step": "sink.receive.move", "action": action, "nth": 1}
        with child(role="decode", **config(child=True, faults=[fault]), peer=peer) as victim:
            victim.say({"order": [6, 6], "deadline_s": 30})
            assert until(victim.is_frozen if action == "freeze" else lambda: victim.process.poll() is not None, 20)
            assert until(prefiller.is_whole, 15), prefiller.report()  # and its blocks are scribbled over
            assert all_given_back(prefiller)
            if action == "freeze":
                victim.thaw()
                victim.hear()
                report = victim.until("whole", True)
                assert (report["whole"], report["wrong"]) == (True, 0), report
                assert set(report["outcomes"]) <= {"PeerLost", "NcclError", "committed"}
    finally:
        prefiller.close()
