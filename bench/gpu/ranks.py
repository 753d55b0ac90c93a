"""Sums of an instance's ranks over NCCL, on two GPUs where there are two; on one over loopback sockets, which only shows that it works.

Rank 1 is a process of its own that does what rank 0 does, step by step. A time is that of rank 0's stream, over many sums in a row; in a
graph they are captured and replayed as those of a decode step are. In the end rank 1 is killed, and rank 0 waits for a sum.

    python bench/gpu/ranks.py rank ...   # what `measure` starts for the other rank
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gpu.edges import SOCKETS
from gpu.harness import Target, attempt, note
from polymux.actors.parallel.collectives import Meeting
from polymux.actors.parallel.nccl_collectives import NcclCollectives, join_by_nccl
from polymux.transport.errors import RankLost
from polymux.transport.nccl.api import Nccl

TARGETS = (
    Target(name="ranks.sum.8_kib_s", claim="two GPUs: one sum of [1, 4096] bf16, of 64 in a graph", unit="s", at_most=20e-6),
    Target(name="ranks.sum.256_kib_s", claim="the same of [32, 4096]", unit="s", at_most=40e-6),
    Target(name="ranks.sum.64_mib_bytes_per_s", claim="two GPUs: bytes of one tensor a second", unit="B/s"),
    Target(name="ranks.broadcast_s", claim="two GPUs: 64 token ids from rank 0, of 64 in a graph", unit="s", at_most=20e-6),
    Target(name="ranks.join_s", claim="communicator of two processes, warmed up", unit="s", at_most=15.0),
    Target(name="ranks.death_s", claim="a sum with a rank that was killed, beyond the deadline of 2 s", unit="s", at_most=2.0),
)
BUDGET_S = 40.0
TIMEOUT_S = 2.0
WIDTH = 4096
SUMS_A_GRAPH = 64


def sums(ranks: NcclCollectives, *, is_alone: bool) -> dict[str, float]:
    """What both ranks do. `is_alone`: each on its own GPU; else once, to see that the sums are right."""
    figures: dict[str, float] = {}
    x = torch.full((WIDTH,), ranks.rank + 1.0, dtype=torch.bfloat16, device="cuda")
    ids = torch.full((64,), ranks.rank, dtype=torch.int64, device="cuda")
    parts = ranks.gather(x.clone())
    if (
        not torch.all(ranks.all_reduce(x.clone()) == 3.0)
        or ranks.broadcast(ids).any()
        or [float(part[0]) for part in parts] not in ([], [1, 2])
    ):
        raise RuntimeError("a sum, a gather or a broadcast is wrong")
    if not is_alone:
        return {}
    for name, rows in (("8_kib", 1), ("256_kib", 32)):
        x = torch.zeros(rows, WIDTH, dtype=torch.bfloat16, device="cuda")
        figures[f"ranks.sum.{name}_s"] = in_graph_s(lambda x=x: ranks.all_reduce(x))  # type: ignore[misc]
    figures["ranks.broadcast_s"] = in_graph_s(lambda: ranks.broadcast(ids))
    x = torch.zeros(8192, WIDTH, dtype=torch.bfloat16, device="cuda")
    ranks.all_reduce(x)
    figures["ranks.sum.64_mib_bytes_per_s"] = x.nbytes / seconds(lambda: ranks.all_reduce(x), 20)
    return figures


def in_graph_s(once: Callable[[], object]) -> float:
    """Of one call among many in a captured graph."""
    once()
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    for _ in range(SUMS_A_GRAPH):
        once()
    graph.capture_end()
    graph.replay()
    return seconds(graph.replay, 20) / SUMS_A_GRAPH


def seconds(run: Callable[[], object], rounds: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / rounds


def join(unique_id: bytes, rank: int) -> NcclCollectives:
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    meeting = Meeting(place=unique_id, rank=rank, num_ranks=2, timeout_s=TIMEOUT_S if rank == 0 else 60.0, in_order=False)
    joined = join_by_nccl(meeting, torch.device("cuda", 0))
    torch.cuda.synchronize()
    return joined


def death(ranks: NcclCollectives, process: subprocess.Popen[bytes]) -> float:
    """Seconds beyond the deadline until the host that waits for a sum has a typed error."""
    torch.cuda.synchronize()
    process.kill()
    process.wait(10)
    began_s = time.perf_counter()
    try:
        x = ranks.all_reduce(torch.zeros(WIDTH, device="cuda"))
        ranks.end_step()
        x.cpu()
        ranks.check()
    except RankLost:
        return max(time.perf_counter() - began_s - TIMEOUT_S, 0.0)
    raise RuntimeError("a sum with a dead rank came to an end")


def measure(budget_s: float) -> dict[str, float]:
    is_alone = torch.cuda.device_count() > 1
    if is_alone:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1"
        environment = {"CUDA_VISIBLE_DEVICES": visible.split(",")[1]}
    else:
        os.environ.update(SOCKETS | {"NCCL_HOSTID": "polymux-rank-0"})
        environment = {"NCCL_HOSTID": "polymux-rank-1"}
        note("ranks: one GPU here, so its two ranks sum over sockets, and the figures of two GPUs are left out")
    unique_id = Nccl.load().unique_id()
    words = [sys.executable, str(Path(__file__)), "rank", unique_id.hex(), "alone" if is_alone else "together"]
    with subprocess.Popen(words, env=os.environ | environment) as process:
        try:
            began_s = time.perf_counter()
            ranks = join(unique_id, 0)
            figures = {"ranks.join_s": time.perf_counter() - began_s}
            figures |= attempt("ranks.sums", partial(sums, ranks, is_alone=is_alone))
            figures |= attempt("ranks.death", lambda: {"ranks.death_s": death(ranks, process)})
        finally:
            process.kill()
    return figures


def main() -> None:
    """The other rank, until it is killed."""
    ranks = join(bytes.fromhex(sys.argv[2]), 1)
    sums(ranks, is_alone=sys.argv[3] == "alone")
    time.sleep(60.0)


if __name__ == "__main__":
    main()
