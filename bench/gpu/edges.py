"""KV edges between two processes on one GPU: `cuda_ipc` as it serves, and `nccl` over loopback sockets, which only shows that it works.

The prefill worker is a process of its own. A time is from the order to the commit that the decode worker's engine sees, with
everything between; every byte of the first and the last transfer is compared. Then the prefill worker is killed in the middle of one.
The same between two instances of two ranks, whose second ranks are processes that only have memory, on the same GPU.

    python bench/gpu/edges.py source BACKEND [HANDLE]   # what `measure` starts for the other side
    python bench/gpu/edges.py memory                    # and for a second rank
"""

from __future__ import annotations

import json
import os
import queue
import select
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gpu.harness import Target, attempt, copy_bytes_per_s
from polymux.transport.cuda.region import DeviceGrid, DeviceRegion, MappedRegion
from polymux.transport.head_slices import heads_of, sharded
from polymux.transport.kv import KVCommitted, KVEvent, KVFailed, KVQuiesced, KVSettings, KVSink, KVSource, OrderRef
from polymux.transport.messages import Grant, KVLayout, Peer, Prefill, Prefilled, SamplingParams
from polymux.transport.region import this_host
from polymux.transport.stream import WorkerServer
from polymux.transport.units import ClientId, Epoch, ModelName, SequenceId, WorkerId, pack_ids

TARGETS = (
    Target(
        name="edges.cuda_ipc.share_of_copy_bandwidth",
        claim="256 MiB as 128 scattered blocks in one push, cuda_ipc between two processes: bytes read and written, over a plain copy's",
        at_least=0.25,
    ),
    Target(name="edges.cuda_ipc.layers_s", claim="the same, pushed layer by layer (32)", unit="s", at_most=0.02),
    Target(name="edges.cuda_ipc.block_s", claim="one block of 2 MiB, from the order to the commit", unit="s", at_most=0.003),
    Target(name="edges.cuda_ipc.death_s", claim="kill of the prefill worker until the granted blocks are free", unit="s", at_most=1.0),
    Target(
        name="edges.ranks.share_of_copy_bandwidth",
        claim="256 MiB in one push between two instances of two ranks each, cuda_ipc: bytes read and written, over a plain copy's",
        at_least=0.25,
    ),
    Target(name="edges.ranks.layers_s", claim="the same, pushed layer by layer (32)", unit="s", at_most=0.02),
    Target(name="edges.nccl.sockets_bytes_per_s", claim="256 MiB by nccl, two ranks on one GPU over sockets: test only", unit="B/s"),
    Target(name="edges.nccl.join_s", claim="first communicator of two processes, from the dial to an open edge", unit="s", at_most=15.0),
    Target(name="edges.nccl.death_s", claim="the same kill under nccl", unit="s", at_most=2.0),
    Target(name="edges.nccl.abort_s", claim="that kill until the communicator is aborted and its slabs are free", unit="s", at_most=5.0),
)
BUDGET_S = 60.0
LAYOUT = KVLayout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16", block_size=16)  # 2 MiB a block
POOL_BLOCKS, MOVED_BLOCKS = 512, 128
TOKEN, EPOCH = "0123456789abcdef0123456789abcdef", Epoch(1)
START_S = 60.0
SOCKETS = {
    "NCCL_NET": "Socket",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_MAX_NCHANNELS": "2",
}


def scattered(seed: int) -> list[int]:
    order: list[int] = torch.randperm(POOL_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:MOVED_BLOCKS]


SOURCE_BLOCKS, TARGET_BLOCKS = scattered(1), scattered(2)


class Memories:
    """One side's blocks: on one rank, or on a second one's too, which is mapped by its handle."""

    def __init__(self, handle: str = "") -> None:
        self.layout = sharded(LAYOUT, 2 if handle else 1)
        nbytes = POOL_BLOCKS * self.layout.block_bytes
        self.first = DeviceRegion.create(nbytes)
        runtime, index, device = self.first.runtime, self.first.index, self.first.device
        self.followers = [MappedRegion(runtime, index, bytes.fromhex(handle), nbytes, device)] if handle else []

    def heads(self, rank: int) -> torch.Tensor:
        """[block, layer, k|v, head, 64-bit word]"""
        tensor = self.followers[0].tensor if rank else self.first.tensor
        layout = self.layout
        kv = DeviceGrid(tensor, layout).kv.view(-1).view(torch.int64)
        return kv.view(POOL_BLOCKS, layout.num_layers, 2, layout.rank_kv_heads, -1)

    def content(self, count: int, rank: int) -> torch.Tensor:
        """What the first so many moved blocks hold on a rank."""
        device, num_words = self.first.device, LAYOUT.block_bytes // 8
        whole = torch.arange(count, device=device)[:, None] * 1_000_003 + torch.arange(num_words, device=device)
        held = heads_of(self.layout, rank)
        return whole.view(count, LAYOUT.num_layers, 2, LAYOUT.num_kv_heads, -1)[:, :, :, held.start : held.stop]

    def fill(self) -> None:
        for rank in range(self.layout.num_ranks):
            self.heads(rank)[SOURCE_BLOCKS] = self.content(MOVED_BLOCKS, rank)
        torch.cuda.synchronize()

    def clear(self) -> None:
        for rank in range(self.layout.num_ranks):
            self.heads(rank).zero_()
        torch.cuda.synchronize()

    def check(self, count: int) -> None:
        for rank in range(self.layout.num_ranks):
            if not torch.equal(self.heads(rank)[TARGET_BLOCKS[:count]], self.content(count, rank)):
                raise RuntimeError(f"{count} blocks arrived wrong on rank {rank}")

    def close(self) -> None:
        self.first.mover.close()
        for follower in self.followers:
            follower.close()
        self.first.close()


class Source:
    """A prefill worker whose blocks are ready. The order's model says how it pushes them: `whole`, `layers`, or `slow`ly."""

    def __init__(self, backend: str, handle: str) -> None:
        self.memories = Memories(handle)
        self.memories.fill()
        self.server = WorkerServer(worker_id=WorkerId("prefill"), token=TOKEN, on_command=lambda *_: None, on_client_lost=lambda _: None)
        self.address = self.server.start()
        self._orders: queue.SimpleQueue[tuple[OrderRef, Prefill]] = queue.SimpleQueue()
        self.source = KVSource(
            server=self.server,
            region=self.memories.first,
            followers=self.memories.followers,
            host_id=this_host(),
            on_order=lambda ref, prefill: self._orders.put((ref, prefill)),
            on_cancel=lambda *_: None,
            on_released=lambda _: None,
            settings=KVSettings(backend=backend),
        )
        self.server.serve(EPOCH)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            ref, prefill = self._orders.get()
            blocks = SOURCE_BLOCKS[: len(prefill.grant.block_ids) // 4]
            step = LAYOUT.num_layers if prefill.model == "whole" else 1
            self.source.accept(ref, self.memories.layout)
            for layer in range(0, LAYOUT.num_layers, step):
                self.source.push(ref, layer, layer + step, blocks, 0)
                time.sleep(0.05 if prefill.model == "slow" else 0.0)
            self.source.commit(ref, Prefilled(sequence_id=prefill.sequence_id, token_id=1, finish_reason=None))


class Sink:
    """A decode worker that waits for one transfer at a time."""

    def __init__(self, backend: str, source: Peer, handle: str) -> None:
        self.memories = Memories(handle)
        self._events: queue.SimpleQueue[tuple[KVEvent, float]] = queue.SimpleQueue()
        self.sink = KVSink(
            region=self.memories.first,
            followers=self.memories.followers,
            identity=Peer(worker_id=WorkerId("decode"), epoch=EPOCH, address="", host_id=this_host()),
            token=TOKEN,
            on_event=lambda event: self._events.put((event, time.perf_counter())),
            settings=KVSettings(backend=backend),
        )
        began_s = time.perf_counter()
        self._edge = self.sink.connect(source, START_S)
        self.join_s = time.perf_counter() - began_s

    def begin(self, count: int, how: str, deadline_s: float = 10.0) -> float:
        transfer_id = self.sink.next_transfer_id()
        grant = Grant(
            transfer_id=transfer_id,
            layout_hash=LAYOUT.layout_hash,
            block_ids=pack_ids(TARGET_BLOCKS[:count]),
            target_epoch=EPOCH,
            source_epoch=EPOCH,
        )
        prefill = Prefill(
            sequence_id=SequenceId(f"r{transfer_id}/0"),
            client_id=ClientId("front"),
            model=ModelName(how),
            prompt_ids=pack_ids([1]),
            output_ids=pack_ids([]),
            sampling=SamplingParams(max_tokens=1),
            grant=grant,
            deadline_s=deadline_s,
            tpot_slo_s=0.1,
            due_in_s=1.0,
        )
        began_s = time.perf_counter()
        self._edge.order(prefill, self.memories.layout)
        return began_s

    def next(self) -> tuple[KVEvent, float]:
        return self._events.get(timeout=20.0)

    def seconds(self, count: int, how: str) -> float:
        began_s = self.begin(count, how)
        event, ended_s = self.next()
        if not isinstance(event, KVCommitted):
            raise RuntimeError(f"a transfer of {count} blocks failed: {event}")
        return ended_s - began_s

    def close(self) -> None:
        self.sink.close()
        self.memories.close()


@contextmanager
def other_process(*role: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, str]]]:
    """A process of this file, and what it says of itself."""
    env = os.environ | SOCKETS | {"NCCL_HOSTID": "polymux-source"}
    process = subprocess.Popen([sys.executable, str(Path(__file__)), *role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    try:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], START_S)[0]:
            raise RuntimeError(f"the process of {role} did not start")
        yield process, json.loads(process.stdout.readline() or b"{}")
    finally:
        process.kill()
        process.wait(10)


def death(sink: Sink, process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Kill the other side in the middle of a transfer: seconds until its blocks are free, and until nothing of the edge is left."""
    sink.begin(MOVED_BLOCKS, "slow")
    time.sleep(0.3)
    killed_s = time.perf_counter()
    process.kill()
    (failed, _), (quiet, free_s) = sink.next(), sink.next()
    if not isinstance(failed, KVFailed) or not isinstance(quiet, KVQuiesced):
        raise RuntimeError(f"the kill ended in {failed} and {quiet}")
    mover = sink.memories.first.mover
    while mover.num_slabs_out or mover.num_edges:
        if time.perf_counter() - killed_s > 20.0:
            raise RuntimeError("slabs are still out 20 s after the kill")
        time.sleep(0.002)
    return free_s - killed_s, time.perf_counter() - killed_s


def measure_backend(backend: str, rounds: int, handles: tuple[str, str] = ("", "")) -> dict[str, float]:
    """`handles`: of the second rank of the source, and of the sink."""
    moved = MOVED_BLOCKS * LAYOUT.block_bytes
    figures: dict[str, float] = {}
    with other_process("source", backend, handles[0]) as (process, said):
        peer = Peer(worker_id=WorkerId("prefill"), epoch=EPOCH, address=said["address"], host_id=this_host())
        sink = Sink(backend, peer, handles[1])
        try:
            figures["join_s"] = sink.join_s
            sink.seconds(MOVED_BLOCKS, "whole")
            sink.memories.check(MOVED_BLOCKS)
            whole_s = statistics.median(sink.seconds(MOVED_BLOCKS, "whole") for _ in range(rounds))
            figures["whole_s"], figures["bytes_per_s"] = whole_s, moved / whole_s
            sink.seconds(MOVED_BLOCKS, "layers")
            figures["layers_s"] = statistics.median(sink.seconds(MOVED_BLOCKS, "layers") for _ in range(rounds))
            figures["block_s"] = statistics.median(sink.seconds(1, "whole") for _ in range(3 * rounds))
            sink.memories.clear()
            sink.seconds(MOVED_BLOCKS, "layers")
            sink.memories.check(MOVED_BLOCKS)
            figures["death_s"], figures["abort_s"] = death(sink, process)
        finally:
            sink.close()
    return figures


def by_cuda_ipc() -> dict[str, float]:
    return _with_share(measure_backend("cuda_ipc", 20))


def between_ranks() -> dict[str, float]:
    with other_process("memory") as (_, one), other_process("memory") as (_, other):
        return _with_share(measure_backend("cuda_ipc", 10, (one["handle"], other["handle"])))


def by_nccl() -> dict[str, float]:
    found = measure_backend("nccl", 3)
    found["sockets_bytes_per_s"] = found.pop("bytes_per_s")
    return found


def _with_share(found: dict[str, float]) -> dict[str, float]:
    return found | {"share_of_copy_bandwidth": 2 * found["bytes_per_s"] / copy_bytes_per_s()}


def measure(budget_s: float) -> dict[str, float]:
    """Both backends, and instances, in turn; what fails leaves its figures out."""
    os.environ.update(SOCKETS | {"NCCL_HOSTID": "polymux-sink"})
    figures: dict[str, float] = {}
    for name, take in (("cuda_ipc", by_cuda_ipc), ("ranks", between_ranks), ("nccl", by_nccl)):
        figures |= {f"edges.{name}.{figure}": value for figure, value in attempt(f"edges.{name}", take).items()}
    return figures


def main() -> None:
    """The other side, or a rank of either, until standard input ends."""
    if sys.argv[1] == "memory":
        region = DeviceRegion.create(POOL_BLOCKS * sharded(LAYOUT, 2).block_bytes)
        said = {"handle": region.handles()[0].hex()}
    else:
        said = {"address": Source(sys.argv[2], sys.argv[3]).address}
    os.write(1, json.dumps(said).encode() + b"\n")
    sys.stdin.read()


if __name__ == "__main__":
    main()
