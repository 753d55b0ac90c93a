"""Edges between the GPUs of two processes: on the stand-in, and with `-m gpu` on a real one. Peers are killed and frozen on either side.

NCCL refuses two ranks on one GPU; on a real one each process therefore says that it is another host, and the bytes go over sockets.
That is for tests only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from backends import a_lost_source_costs_its_transfers_only, all_given_back, between_processes, blocks_of_two_layouts_arrive
from processes import until

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
    blocks_of_two_layouts_arrive(kv_peer, child, config(child=True), config())


@pytest.mark.parametrize("action", ["kill", "freeze"])
def test_a_prefill_worker_that_dies_or_freezes_costs_its_transfers_only(kv_peer: Any, child: Any, config: Any, action: str) -> None:
    a_lost_source_costs_its_transfers_only(kv_peer, child, config(child=True), config(), action)


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
