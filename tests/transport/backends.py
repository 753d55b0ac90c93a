"""What the transport tests share: the backends that the conformance suite runs on, here and between processes, and patience."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from processes import address_of, until

from gpu.edges import SOCKETS

HOST_BACKENDS, GPU_BACKENDS = ["local", "shm", "tcp"], ["gpu+local", "cuda_ipc", "nccl"]
# Between instances: so many ranks at the source, and at the sink. Four hold each head twice.
BETWEEN_RANKS = ["shm@2:4", "tcp@4:1", "gpu+local@4:2", "cuda_ipc@2:1", "cuda_ipc@2:4", "nccl@1:2", "nccl@4:2"]
# With a peer that must confirm the quiet, and late messages.
WRAPPED = [f"fault+{name}" for name in ("shm", "tcp", "cuda_ipc", "nccl", "cuda_ipc@1:2", "nccl@2:2")]
ALL_BACKENDS = [*HOST_BACKENDS, *GPU_BACKENDS, *BETWEEN_RANKS, *WRAPPED]


def config_of(request: pytest.FixtureRequest, name: str) -> dict[str, Any]:
    """Either side's configuration for one backend."""
    wrapped, (name, _, ranks) = name.startswith("fault+"), name.removeprefix("fault+").partition("@")
    config: dict[str, Any] = {"settings": {"backend": name.removeprefix("gpu+")}}
    if wrapped:
        config |= {"faults": [{"step": "source.send.move", "action": "delay", "nth": 1, "delay_s": 0.01}], "peer_writes": True}
    if ranks:
        config["ranks"] = tuple(map(int, ranks.split(":")))
    if name in GPU_BACKENDS:
        request.getfixturevalue("at_rest")
        config["gpu"] = "stand-in"
    return config


def eventually(claim: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether the claim comes true in time."""
    until_s = time.monotonic() + within_s
    while not claim():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.002)
    return True


QUICK = {"silence_s": 1.2, "acknowledge_s": 1.0, "checksum_every": 1}
LIMITS = {"join_s": 20.0, "stall_s": 5.0, "abort_s": 5.0}


def between_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Either side's configuration for a parameter such as "stand-in+nccl"; `child=True` for the one in a process of its own.

    NCCL refuses two ranks on one GPU; on a real one each process therefore says that it is another host, and the bytes go over sockets.
    Where a worker would end its process, this one goes on, and the test fails.
    """
    device, backend = request.param.split("+")
    fenced: list[str] = []
    if device == "stand-in":
        request.getfixturevalue("at_rest")
    else:
        for name, value in (SOCKETS | {"NCCL_HOSTID": "polymux-parent"}).items():
            monkeypatch.setenv(name, value)

    def make(*, child: bool = False, **more: Any) -> dict[str, Any]:
        own = {"env": SOCKETS | {"NCCL_HOSTID": "polymux-child"}} if child else {"fence": fenced.append}
        return {"settings": QUICK | {"backend": backend}, "gpu": device, "limits": LIMITS} | own | more

    def check() -> None:
        assert not fenced, fenced

    request.addfinalizer(check)
    return make


def all_given_back(end: Any) -> bool:
    """No slab is out, and no task of an edge is left."""
    mover = end.region.mover
    return eventually(lambda: mover.num_slabs_out == 0 and mover.num_edges == 0, LIMITS["abort_s"] + 1)


def blocks_of_two_layouts_arrive(kv_peer: Any, child: Any, source_config: dict[str, Any], sink_config: dict[str, Any]) -> None:
    """From a source in a process of its own; afterwards nothing of the edge is left."""
    decoder = kv_peer.Decoder(**sink_config)
    try:
        with child(role="prefill", **source_config) as source:
            edge = decoder.sink.connect(address_of(source), 30)
            assert edge.backend == sink_config["settings"]["backend"]
            transfers = [decoder.order(edge, n, layout=shape, deadline_s=30) for n, shape in ((1, "small"), (9, "large"), (33, "small"))]
            assert decoder.until_over(*transfers, within_s=30) == ["committed"] * 3
            assert decoder.is_whole() and source.until("whole", True)["whole"]
        assert until(lambda: not edge.is_open)
        assert all_given_back(decoder)
    finally:
        decoder.close()


def a_lost_source_costs_its_transfers_only(
    kv_peer: Any, child: Any, source_config: dict[str, Any], sink_config: dict[str, Any], action: str
) -> None:
    """`action`: "kill" or "freeze", as it sends its first move."""
    decoder = kv_peer.Decoder(**sink_config)
    try:
        fault = {"step": "source.send.move", "action": action, "nth": 1}
        with child(role="prefill", **source_config, faults=[fault]) as victim:
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
