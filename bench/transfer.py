"""64 MiB of KV between two workers: 2048 scattered blocks of 32 KiB, by each backend, against the same copy inside one process.

The prefill worker of `shm` and `tcp` is a process of its own; `local` has it in this one. A time is from the order to the commit that
the decode worker's engine sees, with everything between: command, moves, copy, checks. The blocks are computed before, so that nothing
else is timed. Cases take turns, round by round; every byte is compared after every transfer.

    python bench/transfer.py --out docs/results/transfer.md
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from machine import describe
from polymux.transport.kv import KVCommitted, KVEvent, KVSettings, KVSink, KVSource, OrderRef
from polymux.transport.messages import Grant, KVLayout, Peer, Prefill, Prefilled, SamplingParams
from polymux.transport.region import BlockGrid, Region, this_host
from polymux.transport.stream import WorkerServer
from polymux.transport.units import ClientId, Epoch, ModelName, SequenceId, WorkerId, pack_ids

TOKEN = "0123456789abcdef0123456789abcdef"
LAYOUT = KVLayout(num_layers=8, num_kv_heads=2, head_dim=32, dtype="bfloat16", block_size=16)  # 32 KiB a block
POOL_BLOCKS, MOVED_BLOCKS = 8192, 2048  # 256 MiB, of which 64 MiB move
EPOCH = Epoch(1)
MODES = ("whole", "layers")  # one push of everything; one per layer, as a forward pass of one chunk makes them
BACKENDS = ("shm", "tcp", "local")
PAGE = """# KV transfer: 64 MiB as 2048 scattered blocks of 32 KiB

{setting}; every byte compared after every transfer.

From the order to the commit, everything between included. `whole`: one push; `layers`: one push for each of the 8 layers. `copy` is a
loop over the blocks inside one process. Written by `bench/transfer.py`.

{table}

```json
{figures}
```
"""


def scattered(seed: int) -> list[int]:
    return [int(block) for block in np.random.default_rng(seed).permutation(POOL_BLOCKS)[:MOVED_BLOCKS]]


SOURCE_BLOCKS, TARGET_BLOCKS = scattered(1), scattered(2)


def fill(grid: BlockGrid, stamp: int) -> None:
    """Bytes that differ from block to block and from round to round."""
    cells = grid.array.reshape(POOL_BLOCKS, -1)
    cells[SOURCE_BLOCKS] = np.arange(MOVED_BLOCKS, dtype=np.uint64)[:, None] * np.uint64(1_000_003) + np.uint64(stamp)
    cells[SOURCE_BLOCKS, 0] += np.uint64(1)


def check(grid: BlockGrid, stamp: int) -> None:
    rows = grid.array.reshape(POOL_BLOCKS, -1)
    expected = np.arange(MOVED_BLOCKS, dtype=np.uint64) * np.uint64(1_000_003) + np.uint64(stamp)
    for number, block in enumerate(TARGET_BLOCKS):
        row = rows[block]
        if row[0] != expected[number] + np.uint64(1) or not (row[1:] == expected[number]).all():
            raise SystemExit(f"block {block} of round {stamp} arrived wrong")


class Prefiller:
    """A prefill worker whose blocks are ready: it pushes them as soon as they are ordered. The order's model says how."""

    def __init__(self, backend: str) -> None:
        self.region = Region.create(POOL_BLOCKS * LAYOUT.block_bytes)
        self.grid = BlockGrid(self.region.buffer, LAYOUT)
        self.server = WorkerServer(worker_id=WorkerId("prefill"), token=TOKEN, on_command=lambda *_: None, on_client_lost=lambda _: None)
        self.peer = Peer(worker_id=WorkerId("prefill"), epoch=EPOCH, address=self.server.start(), host_id=this_host())
        self._orders: queue.SimpleQueue[tuple[OrderRef, Prefill] | None] = queue.SimpleQueue()
        self.released: queue.SimpleQueue[OrderRef] = queue.SimpleQueue()
        self.source = KVSource(
            server=self.server,
            region=self.region,
            host_id=this_host(),
            on_order=lambda ref, prefill: self._orders.put((ref, prefill)),
            on_cancel=lambda *_: None,
            on_released=self.released.put,
            settings=KVSettings(backend=backend),
        )
        self.server.serve(EPOCH)
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while (order := self._orders.get()) is not None:
            ref, prefill = order
            self.source.accept(ref, LAYOUT)
            if prefill.model == "whole":
                self.source.push(ref, 0, LAYOUT.num_layers, SOURCE_BLOCKS, 0)
            else:
                for layer in range(LAYOUT.num_layers):
                    self.source.push(ref, layer, layer + 1, SOURCE_BLOCKS, 0)
            self.source.commit(ref, Prefilled(sequence_id=prefill.sequence_id, token_id=1, finish_reason=None))

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join()
        self.source.close()
        self.server.close()


class Decoder:
    """The other end, with one edge."""

    def __init__(self, backend: str, region: Region, peer: Peer) -> None:
        identity = Peer(worker_id=WorkerId(f"decode-{backend}"), epoch=EPOCH, address="", host_id=this_host())
        self._events: queue.SimpleQueue[tuple[float, KVEvent]] = queue.SimpleQueue()
        self.sink = KVSink(
            region=region,
            identity=identity,
            token=TOKEN,
            on_event=lambda event: self._events.put((time.perf_counter(), event)),
            settings=KVSettings(backend=backend),
        )
        self.edge = self.sink.connect(peer, 10.0)

    def move(self, mode: str) -> float:
        """Seconds from order to commit."""
        transfer_id = self.sink.next_transfer_id()
        grant = Grant(
            transfer_id=transfer_id,
            layout_hash=LAYOUT.layout_hash,
            block_ids=pack_ids(TARGET_BLOCKS),
            target_epoch=EPOCH,
            source_epoch=EPOCH,
        )
        prefill = Prefill(
            sequence_id=SequenceId(f"r{transfer_id}/0"),
            client_id=ClientId("front"),
            model=ModelName(mode),
            prompt_ids=pack_ids(range(MOVED_BLOCKS * LAYOUT.block_size)),
            output_ids=pack_ids([]),
            sampling=SamplingParams(max_tokens=1),
            grant=grant,
            deadline_s=30.0,
            tpot_slo_s=0.1,
            due_in_s=1.0,
        )
        started_s = time.perf_counter()
        self.edge.order(prefill, LAYOUT)
        ended_s, event = self._events.get(timeout=30)
        if not isinstance(event, KVCommitted):
            raise SystemExit(f"the transfer failed: {event}")
        return ended_s - started_s


def serve_as_child(backend: str) -> None:
    """A prefill worker in its own process: "N" on standard input fills the blocks with round N."""
    prefiller = Prefiller(backend)
    print(json.dumps({"address": prefiller.peer.address}), flush=True)
    for line in sys.stdin:
        fill(prefiller.grid, int(line))
        print("filled", flush=True)
    prefiller.close()


@contextmanager
def child(backend: str) -> Iterator[tuple[Peer, Any]]:
    """A prefill worker elsewhere, and how to have it fill its blocks."""
    command = [sys.executable, __file__, "--child", backend]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdin is not None and process.stdout is not None
    address = json.loads(process.stdout.readline())["address"]

    def fill_there(stamp: int) -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{stamp}\n")
        process.stdin.flush()
        assert process.stdout.readline() == "filled\n"

    yield Peer(worker_id=WorkerId("prefill"), epoch=EPOCH, address=address, host_id=this_host()), fill_there
    process.stdin.close()
    process.wait(10)


def copy_in_process(source: BlockGrid, target: BlockGrid) -> float:
    """The yardstick: a loop over the blocks, one assignment each, both regions in this process."""
    from_rows, to_rows = source.array.reshape(POOL_BLOCKS, -1), target.array.reshape(POOL_BLOCKS, -1)
    started_s = time.perf_counter()
    for src, dst in zip(SOURCE_BLOCKS, TARGET_BLOCKS, strict=True):
        to_rows[dst] = from_rows[src]
    return time.perf_counter() - started_s


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds by case; the first two rounds warm up and are left out."""
    target = Region.create(POOL_BLOCKS * LAYOUT.block_bytes)
    grid, here, times = BlockGrid(target.buffer, LAYOUT), Prefiller("local"), dict[str, list[float]]()
    with child("shm") as (shm_peer, fill_shm), child("tcp") as (tcp_peer, fill_tcp):
        peers = {"shm": shm_peer, "tcp": tcp_peer, "local": here.peer}
        fills = {"shm": fill_shm, "tcp": fill_tcp, "local": lambda stamp: fill(here.grid, stamp)}
        decoders = {backend: Decoder(backend, target, peers[backend]) for backend in BACKENDS}
        stamp = 0
        for round_number in range(-2, rounds):
            cases = [("copy", ""), *((backend, mode) for backend in BACKENDS for mode in MODES)]
            for backend, mode in cases:
                stamp += 1
                fills.get(backend, fills["local"])(stamp)
                took_s = copy_in_process(here.grid, grid) if backend == "copy" else decoders[backend].move(mode)
                check(grid, stamp)
                if round_number >= 0:
                    times.setdefault(f"{backend} {mode}".strip(), []).append(took_s)
        for decoder in decoders.values():
            decoder.sink.close()
    here.close()
    return times


def table(times: dict[str, list[float]]) -> str:
    num_bytes = MOVED_BLOCKS * LAYOUT.block_bytes
    lines = ["| case | median ms | min ms | GiB/s at the median | median / copy |", "| --- | --- | --- | --- | --- |"]
    for case, seconds in times.items():
        median_s = statistics.median(seconds)
        rate, ratio = num_bytes / median_s / 2**30, median_s / statistics.median(times["copy"])
        lines.append(f"| {case} | {median_s * 1e3:.2f} | {min(seconds) * 1e3:.2f} | {rate:.1f} | {ratio:.2f} |")
    return "\n".join(lines)


def figures(times: dict[str, list[float]]) -> dict[str, float]:
    """Ratios of medians to the in-process copy, by case; `shm_vs_copy` is the whole push."""
    copy_s = statistics.median(times["copy"])
    ratios = {f"{backend}_vs_copy": statistics.median(times[f"{backend} whole"]) / copy_s for backend in BACKENDS}
    ratios |= {f"{backend}_layers_vs_copy": statistics.median(times[f"{backend} layers"]) / copy_s for backend in BACKENDS}
    return {"copy_ms": round(copy_s * 1e3, 3)} | {name: round(ratio, 3) for name, ratio in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write the table here too, as Markdown")
    parser.add_argument("--child", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve_as_child(options.child)
        return
    setting = f"{describe()}; load average before the run {os.getloadavg()[0]:.1f}; {options.rounds} rounds in turns"
    print(setting, flush=True)
    times = measure(options.rounds)
    text, result = table(times), json.dumps(figures(times))
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(PAGE.format(setting=setting, table=text, figures=result))
    print(result)


if __name__ == "__main__":
    main()
