"""A rank that only sums, in steps that it enqueues on a stand-in's stream: here, and forked from the nursery to be killed and frozen.

Arguments: the unique id in hex, its rank, how many there are, the deadline of a step. Then, as lines on standard input, steps to enqueue.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field

import stand_in

from polymux.transport.cuda.runtime import CudaRuntime
from polymux.transport.nccl.api import Nccl
from polymux.transport.nccl.ranks import RankComm, RankLimits

COUNT = 64
SUMS_A_STEP = 4


@dataclass
class Rank:
    """Steps of sums in a row, which nobody waits for on the host."""

    unique_id: bytes
    rank: int
    num_ranks: int
    timeout_s: float
    abort_s: float = 5.0
    join_s: float = 60.0
    lost: list[str] = field(default_factory=list)
    fenced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        path = stand_in.library()
        self.runtime = CudaRuntime.load(path)
        limits = RankLimits(timeout_s=self.timeout_s, join_s=self.join_s, abort_s=self.abort_s)
        ends = {"on_lost": self.lost.append, "fence": self.fenced.append}
        self.comm = RankComm(Nccl.load(path), self.runtime, self.rank, self.num_ranks, limits, **ends)  # type: ignore[arg-type]
        self.comm.join(self.unique_id)
        self.stream = self.runtime.stream()
        self.comm.settle()
        self.numbers = (ctypes.c_float * COUNT)(*([float(self.rank + 1)] * COUNT))

    def step(self) -> None:
        for _ in range(SUMS_A_STEP):
            with self.comm.calling() as comm:
                self.comm.nccl.all_reduce(comm, ctypes.addressof(self.numbers), COUNT, "float32", self.stream)
        self.comm.mark(self.stream)


def main() -> None:
    rank = Rank(bytes.fromhex(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    for _ in sys.stdin:
        rank.step()
