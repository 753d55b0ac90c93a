"""Thousands of switches between small models, in a process of its own: does anything grow?"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from switch_store import MODELS, A, B, Bench, step

from polymux.actors.arena import Arena
from polymux.transport.units import KIB, MIB

CHECKPOINTS = 10
UNCACHED = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"}


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]  # noqa: SIM905


_libc = ctypes.CDLL(None)
_libc.mallinfo2.restype = _MallInfo


@dataclass(frozen=True)
class Footprint:
    """What must not grow."""

    num_switches: int
    allocated_bytes: int  # handed out by the C allocator and not given back
    private_bytes: int  # of the process's resident memory, what is its own: allocator pages that were touched, in use or not
    num_fds: int
    weight_spans: int
    weight_bytes: int

    @classmethod
    def of(cls, arena: Arena, num_switches: int) -> Footprint:
        gc.collect()
        _libc.malloc_trim(0)
        heap = _libc.mallinfo2()
        rss = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return cls(
            num_switches=num_switches,
            allocated_bytes=heap.uordblks + heap.hblkhd,
            private_bytes=int(rss.split()[1]) * KIB,
            num_fds=sum(1 for _ in Path("/proc/self/fd").iterdir()),
            weight_spans=len(arena.weight_spans),
            weight_bytes=sum(span.nbytes for span in arena.weight_spans),
        )


@dataclass(frozen=True)
class Growth:
    """Footprints at the start and at each tenth of the switches."""

    footprints: list[Footprint]
    switch_and_step_s: float

    def total(self, name: str) -> int:
        return int(getattr(self.footprints[-1], name) - getattr(self.footprints[0], name))

    def slope(self, name: str) -> float:
        """Bytes a switch: of the line that fits all footprints best."""
        return statistics.linear_regression([f.num_switches for f in self.footprints], [getattr(f, name) for f in self.footprints]).slope


def measure_growth(count: int) -> Growth:
    """In a process of its own whose C allocator caches nothing for its threads: such caches fill for thousands of switches, are bounded,
    and count as allocated."""
    found = json.loads(
        subprocess.run([sys.executable, __file__, str(count)], env={**os.environ, **UNCACHED}, stdout=subprocess.PIPE, check=True).stdout
    )
    return Growth([Footprint(**values) for values in found["footprints"]], found["switch_and_step_s"])


def count_growth(count: int) -> Growth:
    """So many switches that each copy, with a decode step after each, on the demo models; after a fifth as many that warm up."""
    bench = Bench({A: MODELS / "llama-small", B: MODELS / "qwen3-small"}, "float32")
    engine = bench.engine(1, kv_bytes=2 * MIB)
    tenth = 2 * max(count // (2 * CHECKPOINTS), 1)

    def work(num_switches: int) -> None:
        for number in range(num_switches):
            model = (A, B)[number % 2]
            engine.activate(model)
            step(engine, model)

    work(2 * tenth)
    footprints = [Footprint.of(engine.arena, 0)]
    busy_s = 0.0
    for number in range(1, CHECKPOINTS + 1):
        began = time.perf_counter()
        work(tenth)
        busy_s += time.perf_counter() - began
        footprints.append(Footprint.of(engine.arena, number * tenth))
    engine.residency.check()
    engine.blocks.check()
    assert engine.blocks.num_out == 0
    assert len(engine.residency.residents) == 1, "both models fit, so nothing was copied"
    engine.close()
    bench.close()
    return Growth(footprints, busy_s / (CHECKPOINTS * tenth))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(asdict(count_growth(int(sys.argv[1])))))
