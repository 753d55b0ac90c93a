"""KV that moves between instances of different tensor-parallel degrees, over every backend: each rank gets its heads, to the byte."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from polymux.transport.head_slices import heads_of, sharded
from polymux.transport.kv import KVCommitted, KVEvent, KVSettings, KVSink, KVSource, OrderRef
from polymux.transport.messages import Grant, KVLayout, Peer, Prefill, Prefilled, SamplingParams
from polymux.transport.region import BlockGrid, Region, this_host
from polymux.transport.stream import WorkerServer
from polymux.transport.units import ClientId, Epoch, ModelName, SequenceId, WorkerId, pack_ids

pytestmark = pytest.mark.usefixtures("nothing_left")

TOKEN = "0123456789abcdef0123"
MODEL = KVLayout(num_layers=3, num_kv_heads=4, head_dim=4, dtype="bfloat16")
NUM_BLOCKS = 12
SOURCE_IDS, TARGET_IDS = [7, 2, 3, 11, 0], [1, 9, 8, 4, 10]
DEGREES = ((2, 1), (1, 2), (2, 2), (4, 2), (2, 4), (1, 8), (8, 1), (8, 2))


def whole_kv() -> NDArray[np.uint64]:
    """[block, layer, k|v, head, word]: every word another."""
    shape = (len(SOURCE_IDS), MODEL.num_layers, 2, MODEL.num_kv_heads, MODEL.head_bytes // 8)
    return np.arange(np.prod(shape), dtype=np.uint64).reshape(shape)


def grid_of(regions: list[Region]) -> BlockGrid:
    return BlockGrid(regions[0].buffer, sharded(MODEL, len(regions)), [region.buffer for region in regions[1:]])


@contextmanager
def instance(num_ranks: int) -> Iterator[list[Region]]:
    regions = [Region.create(NUM_BLOCKS * sharded(MODEL, num_ranks).block_bytes) for _ in range(num_ranks)]
    yield regions
    for region in regions:
        region.close()


def push_all(source: KVSource, layout: KVLayout, orders: queue.Queue[tuple[OrderRef, Prefill]]) -> None:
    """Two blocks layer by layer, the rest at once."""
    ref, prefill = orders.get(timeout=5)
    source.accept(ref, layout)
    for layer in range(layout.num_layers):
        source.push(ref, layer, layer + 1, SOURCE_IDS[:2], 0)
    source.push(ref, 0, layout.num_layers, SOURCE_IDS[2:], 2)
    source.commit(ref, Prefilled(sequence_id=prefill.sequence_id, token_id=1, finish_reason=None))


def prefill_of(layout: KVLayout, sink: KVSink) -> Prefill:
    grant = Grant(
        transfer_id=sink.next_transfer_id(),
        layout_hash=layout.layout_hash,
        block_ids=pack_ids(TARGET_IDS),
        target_epoch=Epoch(2),
        source_epoch=Epoch(1),
    )
    return Prefill(
        sequence_id=SequenceId("r/0"),
        client_id=ClientId("front-0"),
        model=ModelName("m"),
        prompt_ids=pack_ids([1]),
        output_ids=pack_ids([]),
        sampling=SamplingParams(max_tokens=1),
        grant=grant,
        deadline_s=5.0,
        tpot_slo_s=0.1,
        due_in_s=1.0,
    )


@pytest.mark.parametrize("backend", ["local", "shm", "tcp"])
@pytest.mark.parametrize(("from_ranks", "to_ranks"), DEGREES)
def test_each_rank_gets_its_heads(backend: str, from_ranks: int, to_ranks: int) -> None:
    orders: queue.Queue[tuple[OrderRef, Prefill]] = queue.Queue()
    released: queue.Queue[OrderRef] = queue.Queue()
    events: queue.Queue[KVEvent] = queue.Queue()
    settings = KVSettings(backend=backend, checksum_every=1)
    with instance(from_ranks) as source_regions, instance(to_ranks) as target_regions:
        whole, given, got = whole_kv(), grid_of(source_regions), grid_of(target_regions)
        for rank, grid in enumerate(given.ranks):
            grid.heads[SOURCE_IDS] = whole[:, :, :, list(heads_of(given.layout, rank))]
        server = WorkerServer(worker_id=WorkerId("p"), token=TOKEN, on_command=lambda *_: None, on_client_lost=lambda _: None)
        peer = Peer(worker_id=WorkerId("p"), epoch=Epoch(1), address=server.start(), host_id=this_host())
        source = KVSource(
            server=server,
            region=source_regions[0],
            followers=source_regions[1:],
            host_id=this_host(),
            on_order=lambda ref, prefill: orders.put((ref, prefill)),
            on_cancel=lambda *_: None,
            on_released=released.put,
            settings=settings,
        )
        server.serve(Epoch(1))
        identity = Peer(worker_id=WorkerId("d"), epoch=Epoch(2), address="", host_id=this_host())
        sink = KVSink(
            region=target_regions[0],
            followers=target_regions[1:],
            identity=identity,
            token=TOKEN,
            on_event=events.put,
            settings=settings,
        )
        edge = sink.connect(peer, 5.0)
        assert edge.backend == backend
        edge.order(prefill_of(got.layout, sink), got.layout)
        push_all(source, given.layout, orders)
        event = events.get(timeout=5)
        assert isinstance(event, KVCommitted), event
        released.get(timeout=5)
        for rank, grid in enumerate(got.ranks):
            assert np.array_equal(grid.heads[TARGET_IDS], whole[:, :, :, list(heads_of(got.layout, rank))]), rank
            others = [i for i in range(NUM_BLOCKS) if i not in TARGET_IDS]
            assert not grid.heads[others].any()
        assert sum(stats.bytes for stats in sink.snapshot()) == len(TARGET_IDS) * MODEL.block_bytes
        sink.close()
        source.close()
        server.close()
        del given, got, grid
