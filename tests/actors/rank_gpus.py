"""GPUs of an instance's ranks without a GPU: planned steps on host memory that the others map by its handle, graphs that replay, and sums
over the stand-in of NCCL.

Run as a script it is a rank other than the first.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import stand_in
import torch
from planning_device import PlanningDevice

from polymux.actors.parallel import follower
from polymux.actors.parallel.collectives import Collectives, Meeting
from polymux.actors.parallel.nccl_collectives import NcclCollectives
from polymux.kernels import choice
from polymux.transport.cuda.region import DeviceRegion, MappedRegion
from polymux.transport.cuda.runtime import CudaRuntime
from polymux.transport.nccl.api import Nccl
from polymux.transport.nccl.ranks import RankComm, RankLimits
from polymux.transport.rank_messages import RankMemory
from polymux.transport.region import Region

KERNELS = "RANK_GPU_KERNELS"  # for `choice.override`, in every rank
PROGRAM = (str(Path(__file__)),)


class StandInQueue:
    """A stream beside the CPU's operations, which come when it has come to its end."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self._runtime = runtime
        self.stream = runtime.stream()
        self._event = runtime.event()

    def catch_up(self, comm: RankComm) -> None:
        comm.mark(self.stream)  # on a GPU the host would be at the step's end by now, and mark it there
        self._runtime.record(self._event, self.stream)
        while not self._runtime.is_done(self._event):
            time.sleep(2e-5)
        comm.check()


class RankGpu(PlanningDevice):
    def __init__(self, *, captures: bool = False, abort_s: float = 5.0) -> None:
        super().__init__(captures=captures)
        self._abort_s = abort_s
        self._borrowed: list[MappedRegion] = []

    def create(self, nbytes: int) -> Region:
        address = CudaRuntime.load(stand_in.library()).malloc(nbytes)  # until this process ends
        return Region(memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B"), None)

    def migrating(self, region: Region) -> DeviceRegion:
        path = stand_in.library()
        return DeviceRegion(CudaRuntime.load(path), 0, self.tensor(region), is_owned=False, nccl_path=path)

    def lend(self, region: Region) -> RankMemory:
        runtime = CudaRuntime.load(stand_in.library())
        return RankMemory(gpu=runtime.uuid(0), handle=runtime.memory_handle(self.tensor(region).data_ptr()))

    def borrow(self, memory: RankMemory, nbytes: int) -> MappedRegion:
        self._borrowed.append(MappedRegion(CudaRuntime.load(stand_in.library()), 0, memory.handle, nbytes, self.torch_device))
        return self._borrowed[-1]

    def close(self) -> None:
        """Here the process goes on, with what a lost instance had mapped."""
        super().close()
        for region in self._borrowed:
            region.close()

    def meeting_place(self, folder: Path) -> bytes:
        return Nccl.load(stand_in.library()).unique_id()

    def join(self, meeting: Meeting) -> Collectives:
        runtime, nccl = CudaRuntime.load(stand_in.library()), Nccl.load(stand_in.library())
        limits = RankLimits(timeout_s=meeting.timeout_s, join_s=20.0, abort_s=self._abort_s)
        comm = RankComm(nccl, runtime, meeting.rank, meeting.num_ranks, limits, on_lost=meeting.on_lost)
        comm.join(meeting.place)
        found = NcclCollectives(comm, StandInQueue(runtime), in_order=meeting.in_order)
        found.warm_up(self.torch_device)
        return found


if __name__ == "__main__":
    kernels = os.environ.get(KERNELS, "all=torch")
    with choice.override(kernels):
        torch.set_num_threads(1)
        follower.main(RankGpu(captures="attend=triton" in kernels))
    sys.exit(0)
