"""Edges between instances on GPUs, each rank's memory in a process of its own: on the stand-in, and with `-m gpu` on a real one.

Peers are killed and frozen, as are ranks that only have memory.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from backends import QUICK, a_lost_source_costs_its_transfers_only, between_processes, blocks_of_two_layouts_arrive
from kv_memories import region_bytes
from processes import address_of
from rank_memory import RankMemory, rank_memories

from polymux.transport.errors import ProtocolMismatch


@pytest.fixture(params=["stand-in+cuda_ipc", "stand-in+nccl", pytest.param("cuda+cuda_ipc", marks=pytest.mark.gpu)])
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    return between_processes(request, monkeypatch)


DEGREES = ((2, 1), (1, 2), (2, 2))  # of two heads; more ranks than heads are in the suite of one process


@contextmanager
def sides(config: Any, ranks: tuple[int, int]) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[RankMemory]]]:
    """Configurations of a source in a process of its own and of a sink, whose other ranks' memory is of processes again: the source's."""
    device = config()["gpu"]
    with (
        rank_memories(region_bytes(ranks[0]), ranks[0] - 1, device) as of_source,
        rank_memories(region_bytes(ranks[1]), ranks[1] - 1, device) as of_sink,
    ):
        source = config(child=True, ranks=ranks, handles=[one.handle for one in of_source])
        yield source, config(ranks=ranks, handles=[one.handle for one in of_sink]), of_source


@pytest.mark.parametrize("ranks", DEGREES, ids=str)
def test_blocks_arrive_exactly_between_instances_whose_ranks_are_processes(
    kv_peer: Any, child: Any, config: Any, ranks: tuple[int, int]
) -> None:
    with sides(config, ranks) as (source_config, sink_config, _):
        blocks_of_two_layouts_arrive(kv_peer, child, source_config, sink_config)


@pytest.mark.parametrize("action", ["kill", "freeze"])
def test_an_instance_that_dies_or_freezes_costs_its_transfers_only(kv_peer: Any, child: Any, config: Any, action: str) -> None:
    with sides(config, (2, 2)) as (source_config, sink_config, _):
        a_lost_source_costs_its_transfers_only(kv_peer, child, source_config, sink_config, action)


def test_a_rank_that_is_frozen_keeps_nobody_from_its_memory(kv_peer: Any, child: Any, config: Any) -> None:
    """What it has computed is there: whether it computes any more is its instance's business."""
    with sides(config, (2, 1)) as (source_config, sink_config, (rank,)):
        decoder = kv_peer.Decoder(**sink_config)
        try:
            with child(role="prefill", **source_config) as source:
                rank.process.send_signal(signal.SIGSTOP)
                edge = decoder.sink.connect(address_of(source), 30)
                assert decoder.until_over(decoder.order(edge, 9, deadline_s=20), within_s=20) == ["committed"]
                assert source.until("whole", True)["whole"]
        finally:
            decoder.close()


def test_an_instance_whose_rank_is_dead_cannot_be_mapped(kv_peer: Any, child: Any, at_rest: Any) -> None:
    """On the stand-in: what becomes of such memory on a GPU the driver does not say."""
    settings = {"settings": QUICK | {"backend": "cuda_ipc"}, "gpu": "stand-in", "ranks": (2, 1)}
    with rank_memories(region_bytes(2), 1, "stand-in") as (rank,):
        decoder = kv_peer.Decoder(**settings, handles=[])
        try:
            with child(role="prefill", **settings, handles=[rank.handle]) as source:
                rank.process.kill()
                rank.process.wait(5)
                with pytest.raises(ProtocolMismatch, match=r"not cuda_ipc: .*cudaIpcOpenMemHandle"):
                    decoder.sink.connect(address_of(source), 10)
                assert at_rest.count("maps") == 0  # what was mapped before that is let go
        finally:
            decoder.close()
