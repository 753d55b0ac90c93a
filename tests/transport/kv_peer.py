"""The two ends of KV migration with engines that compute nothing: they fill blocks with a pattern, and check it on the other side.

Used inside a test process, and forked from the nursery for a peer that is to be killed or frozen: its configuration, and then its orders,
come as JSON lines on standard input, and its answers go as JSON lines to standard output.
"""

from __future__ import annotations

import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from kv_memories import LAYOUTS, NUM_BLOCKS, close_all, num_units, pattern, read, regions_of, write

from polymux.transport.errors import PolymuxError
from polymux.transport.head_slices import sharded
from polymux.transport.kv import KVCommitted, KVEdge, KVEvent, KVFailed, KVQuiesced, KVSettings, KVSink, KVSource, OrderRef
from polymux.transport.kv_fault import Action, Fault, Faults
from polymux.transport.messages import Grant, KVLayout, Peer, Prefill, Prefilled, SamplingParams
from polymux.transport.region import this_host
from polymux.transport.stream import WorkerServer
from polymux.transport.units import ClientId, Epoch, ModelName, SequenceId, TransferId, WorkerId, pack_ids

TOKEN = "0123456789abcdef0123"
SETTINGS = {"silence_s": 5.0, "acknowledge_s": 3.0, "checksum_every": 1}


class Pool:
    """Free blocks of the small layout; a block of another is so many neighbours."""

    def __init__(self, seed: int) -> None:
        self.free = set(range(NUM_BLOCKS))
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def take(self, count: int, layout: KVLayout) -> list[int]:
        """Scattered, in random order. Raises IndexError when there are not enough."""
        per = num_units(layout)
        with self._lock:
            able = [b for b in range(NUM_BLOCKS // per) if all(b * per + i in self.free for i in range(per))]
            if len(able) < count:
                raise IndexError(f"{len(able)} free blocks, not {count}")
            blocks = self._random.sample(able, count)
            self.free -= {b * per + i for b in blocks for i in range(per)}
        return blocks

    def give(self, blocks: list[int], layout: KVLayout) -> None:
        per = num_units(layout)
        units = {b * per + i for b in blocks for i in range(per)}
        with self._lock:
            assert not units & self.free, "given back twice"
            self.free |= units

    @property
    def is_whole(self) -> bool:
        return len(self.free) == NUM_BLOCKS


def faults_of(config: dict[str, Any]) -> Faults | None:
    if "faults" not in config:
        return None
    plan = [Fault(**{**fault, "action": Action(fault["action"])}) for fault in config["faults"]]
    return Faults(plan, seed=config.get("seed", 0), peer_writes=config.get("peer_writes", False))


@dataclass
class _Job:
    ref: OrderRef
    prefill: Prefill
    layout: KVLayout
    blocks: list[int]
    is_cancelled: bool = False
    is_released: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Prefiller:
    """A prefill worker. Chunks of two blocks, layer by layer; a job's blocks are scribbled over once the transport lets go of them."""

    def __init__(self, **config: Any) -> None:
        self.epoch = Epoch(config.get("epoch", 3))
        self.pool = Pool(seed=1)
        self.regions = regions_of(config, 0)
        self.region = self.regions[0]
        self.server = WorkerServer(
            worker_id=WorkerId(config.get("worker_id", "prefill-0")),
            token=config.get("token", TOKEN),
            on_command=lambda *_: None,
            on_client_lost=lambda _: None,
        )
        self.host_id = config.get("host_id", this_host())
        self.peer = Peer(worker_id=self.server.worker_id, epoch=self.epoch, address=self.server.start(), host_id=self.host_id)
        self.on_job: Callable[[_Job], None] = self.run  # tests replace it
        self.refusal: PolymuxError | None = None
        self.pace_s = config.get("pace_s", 0.0)
        self.ordered: list[OrderRef] = []
        self.cancelled: list[tuple[OrderRef, str]] = []
        self.released: list[OrderRef] = []
        self._jobs: dict[OrderRef, _Job] = {}
        self._queue: queue.Queue[_Job | None] = queue.Queue()
        self.source = KVSource(
            server=self.server,
            region=self.region,
            followers=self.regions[1:],
            host_id=self.host_id,
            on_order=self._on_order,
            on_cancel=self._on_cancel,
            on_released=self._on_released,
            settings=KVSettings(**{**SETTINGS, **config.get("settings", {})}),
            faults=faults_of(config),
        )
        self.server.serve(self.epoch)
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _on_order(self, ref: OrderRef, prefill: Prefill) -> None:
        if self.refusal:
            raise self.refusal
        self.ordered.append(ref)
        job = _Job(ref, prefill, sharded(LAYOUTS[prefill.model], len(self.regions)), [])
        self._jobs[ref] = job
        self._queue.put(job)

    def _on_cancel(self, ref: OrderRef, reason: str) -> None:
        self.cancelled.append((ref, reason))
        self._jobs[ref].is_cancelled = True

    def _on_released(self, ref: OrderRef) -> None:
        job = self._jobs.pop(ref)
        with job.lock:
            job.is_cancelled = job.is_released = True
            if job.blocks:
                write(self.regions, job.layout, job.blocks, range(job.layout.num_layers), np.uint64(0xDEAD))
            self.pool.give(job.blocks, job.layout)
        self.released.append(ref)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            self.on_job(job)

    def run(self, job: _Job) -> None:
        """Compute nothing, in chunks, and push each layer as it is done."""
        try:
            self.source.accept(job.ref, job.layout)
            self.take(job)
        except (PolymuxError, IndexError) as error:
            self.source.fail(job.ref, error if isinstance(error, PolymuxError) else PolymuxError(str(error)))
            return
        for first in range(0, len(job.blocks), 2):
            for layer in range(job.layout.num_layers):
                time.sleep(self.pace_s)
                if not self.push(job, range(first, min(first + 2, len(job.blocks))), range(layer, layer + 1)):
                    return
        self.commit(job)

    def take(self, job: _Job) -> None:
        """Blocks for a job, unless it has ended meanwhile."""
        with job.lock:
            if not job.is_released:
                job.blocks = self.pool.take(len(job.prefill.grant.block_ids) // 4, job.layout)

    def push(self, job: _Job, blocks: range, layers: range) -> bool:
        with job.lock:
            if job.is_cancelled:
                return False
            ids, cells = job.blocks[blocks.start : blocks.stop], pattern(job.prefill.sequence_id, len(job.blocks), job.layout)
            some = cells[blocks.start : blocks.stop, layers.start : layers.stop]
            ready = write(self.regions, job.layout, ids, layers, some) if ids else None
        return self.source.push(job.ref, layers.start, layers.stop, ids, blocks.start, ready)

    def commit(self, job: _Job) -> bool:
        return self.source.commit(job.ref, Prefilled(sequence_id=job.prefill.sequence_id, token_id=42, finish_reason=None))

    def is_whole(self) -> bool:
        return self.pool.is_whole and sorted(map(str, self.ordered)) == sorted(map(str, self.released))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self.source.close()
        self.server.close()
        close_all(self.regions)

    def report(self) -> dict[str, Any]:
        return {"whole": self.is_whole(), "ordered": len(self.ordered), "released": len(self.released), "free": len(self.pool.free)}


@dataclass
class Transfer:
    """One order, as the decode side sees it."""

    transfer_id: TransferId
    sequence_id: SequenceId
    layout: KVLayout
    blocks: list[int]
    events: list[KVEvent] = field(default_factory=list)

    @property
    def outcome(self) -> str:
        """ "committed", the class of the error, or "" while it runs."""
        for event in self.events:
            if isinstance(event, KVCommitted):
                return "committed"
            if isinstance(event, KVFailed):
                return type(event.error).__name__
        return ""

    @property
    def is_over(self) -> bool:
        """It committed, or it failed and then quiesced; nothing more, and in this order."""
        kinds = [type(event) for event in self.events]
        assert kinds in ([], [KVCommitted], [KVFailed], [KVFailed, KVQuiesced]), kinds
        return kinds in ([KVCommitted], [KVFailed, KVQuiesced])


class Decoder:
    """A decode worker. Blocks come back at commit, after their bytes were checked, or when the quarantine is over."""

    def __init__(self, **config: Any) -> None:
        self.pool = Pool(seed=2)
        self.regions = regions_of(config, 1)
        self.region = self.regions[0]
        self.epoch = Epoch(config.get("epoch", 5))
        worker_id = WorkerId(config.get("worker_id", "decode-0"))
        self.identity = Peer(worker_id=worker_id, epoch=self.epoch, address="", host_id=config.get("host_id", this_host()))
        self.transfers: dict[TransferId, Transfer] = {}
        self.num_wrong = 0
        self._lock = threading.Lock()
        self.sink = KVSink(
            region=self.region,
            followers=self.regions[1:],
            identity=self.identity,
            token=config.get("token", TOKEN),
            on_event=self._on_event,
            settings=KVSettings(**{**SETTINGS, **config.get("settings", {})}),
            faults=faults_of(config),
        )

    def prefill_of(self, transfer: Transfer, peer: Peer, deadline_s: float, **grant: Any) -> Prefill:
        model = next(name for name, layout in LAYOUTS.items() if layout.layout_hash == transfer.layout.layout_hash)
        granted = {
            "transfer_id": transfer.transfer_id,
            "layout_hash": transfer.layout.layout_hash,
            "block_ids": pack_ids(transfer.blocks),
            "target_epoch": self.epoch,
            "source_epoch": peer.epoch,
        }
        return Prefill(
            sequence_id=transfer.sequence_id,
            client_id=ClientId("front-0"),
            model=ModelName(model),
            prompt_ids=pack_ids(range(3)),
            output_ids=pack_ids([]),
            sampling=SamplingParams(max_tokens=4),
            grant=Grant(**{**granted, **grant}),
            deadline_s=deadline_s,
            tpot_slo_s=0.1,
            due_in_s=1.0,
        )

    def order(self, edge: KVEdge, count: int, *, layout: str = "small", deadline_s: float = 5.0, **grant: Any) -> Transfer:
        """Grant `count` scattered blocks. What `edge.order` raises is raised, and then nothing is held."""
        shape = sharded(LAYOUTS[layout], len(self.regions))
        transfer_id = self.sink.next_transfer_id()
        transfer = Transfer(transfer_id, SequenceId(f"r{transfer_id}/0"), shape, self.pool.take(count, shape))
        self.transfers[transfer_id] = transfer
        try:
            edge.order(self.prefill_of(transfer, edge.peer, deadline_s, **grant), shape)
        except BaseException:
            del self.transfers[transfer_id]
            self.pool.give(transfer.blocks, shape)
            raise
        return transfer

    def _on_event(self, event: KVEvent) -> None:
        with self._lock:
            transfer = self.transfers[event.transfer_id]
            if isinstance(event, KVCommitted):
                assert event.sequence_id == event.prefilled.sequence_id == transfer.sequence_id
                expected = pattern(transfer.sequence_id, len(transfer.blocks), transfer.layout)
                self.num_wrong += not np.array_equal(read(self.regions, transfer.layout, transfer.blocks), expected)
            if not isinstance(event, KVFailed):
                self.pool.give(transfer.blocks, transfer.layout)
            transfer.events.append(event)

    def until(self, claim: Callable[[], bool], within_s: float = 8.0) -> bool:
        """Whether the claim comes true in time."""
        until_s = time.monotonic() + within_s
        while not claim():
            if time.monotonic() > until_s:
                return False
            time.sleep(0.002)
        return True

    def until_over(self, *transfers: Transfer, within_s: float = 8.0) -> list[str]:
        """Wait for these transfers' ends; their outcomes."""
        wanted = transfers or tuple(self.transfers.values())
        assert self.until(lambda: all(t.is_over for t in wanted), within_s), [(t.transfer_id, t.events) for t in wanted]
        return [t.outcome for t in wanted]

    def is_whole(self) -> bool:
        self.sink.check()
        return self.pool.is_whole and all(t.is_over for t in self.transfers.values()) and not self.num_wrong

    def close(self) -> None:
        self.sink.close()
        close_all(self.regions)

    def report(self) -> dict[str, Any]:
        is_whole = self.is_whole()  # first: outcomes that are read before may be older
        outcomes = [t.outcome for t in self.transfers.values()]
        return {"whole": is_whole, "outcomes": outcomes, "wrong": self.num_wrong, "free": len(self.pool.free)}


def main() -> None:
    """Serve one role until standard input ends."""
    first = sys.stdin.readline()
    if not first:
        return
    config = json.loads(first)
    os.environ.update(config.pop("env", {}))
    if config.pop("role") == "prefill":
        prefiller = Prefiller(**config)
        say({"address": prefiller.peer.address, "epoch": prefiller.epoch, "host_id": prefiller.host_id})
        for _ in sys.stdin:
            say(prefiller.report())
        prefiller.close()
        return
    peer = Peer(**config.pop("peer"))
    decoder = Decoder(**config)
    edge = decoder.sink.connect(peer, 30.0)  # the first communicator of a process takes seconds on a GPU
    say({"backend": edge.backend, "reason": edge.reason})
    for line in sys.stdin:
        ask = json.loads(line)
        if "order" in ask:
            for count in ask["order"]:
                decoder.order(decoder.sink.open(peer, 5.0), count, deadline_s=ask["deadline_s"])
        say(decoder.report())
    decoder.close()


def say(answer: dict[str, Any]) -> None:
    os.write(1, json.dumps(answer).encode() + b"\n")
