"""What ranks on GPUs say to each other within a step: enqueued on the stream of their tensor operations, so no host waits for a sum."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from polymux.actors.parallel.collectives import Meeting
from polymux.transport.cuda.runtime import CudaRuntime
from polymux.transport.errors import NcclError, RankLost
from polymux.transport.nccl.api import Nccl, load_error
from polymux.transport.nccl.ranks import RankComm, RankLimits


class Queue(Protocol):
    """Where the calling thread's tensor operations go."""

    @property
    def stream(self) -> int: ...

    def catch_up(self, comm: RankComm) -> None:
        """Between what was enqueued on `stream` and the next tensor operation."""


class TorchQueue:
    """torch's present stream: operations come one after another there as it is."""

    @property
    def stream(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream)

    def catch_up(self, comm: RankComm) -> None:
        return


class NcclCollectives:
    """Over NCCL, on the calling thread's stream. A rank that is gone or silent is found by a watch, and raised by the next call.

    A first call with an amount of data may connect the ranks in a way that none did before, and waits for them on the host; so no graph
    may be captured with an amount that was not summed before.
    """

    def __init__(self, comm: RankComm, queue: Queue, *, in_order: bool = False) -> None:
        """`comm`: joined. `in_order`: as for gloo."""
        self.rank, self.num_ranks = comm.rank, comm.num_ranks
        self._comm, self._queue, self._nccl = comm, queue, comm.nccl
        self._in_order = in_order and self.num_ranks > 2  # two numbers have one sum

    def all_reduce(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        if self._in_order:
            return self._sum_in_order(x)
        with self._comm.calling() as comm:
            self._nccl.all_reduce(comm, x.data_ptr(), x.numel(), str(x.dtype).removeprefix("torch."), self._queue.stream)
        self._queue.catch_up(self._comm)
        return x

    def _sum_in_order(self, x: Tensor) -> Tensor:
        parts = torch.empty(self.num_ranks, *x.shape, dtype=x.dtype, device=x.device)
        with self._comm.calling() as comm:
            self._nccl.all_gather(comm, x.data_ptr(), parts.data_ptr(), x.nbytes, self._queue.stream)
        self._queue.catch_up(self._comm)
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def gather(self, x: Tensor) -> tuple[Tensor, ...]:
        assert x.is_contiguous()
        others = [torch.empty_like(x) for _ in range(1, self.num_ranks)] if self.rank == 0 else []
        with self._comm.calling() as comm, self._nccl.group():
            for peer, part in enumerate(others, start=1):
                self._nccl.recv(comm, part.data_ptr(), part.nbytes, peer, self._queue.stream)
            if self.rank:
                self._nccl.send(comm, x.data_ptr(), x.nbytes, 0, self._queue.stream)
        self._queue.catch_up(self._comm)
        return (x, *others) if self.rank == 0 else ()

    def broadcast(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        with self._comm.calling() as comm:
            self._nccl.broadcast(comm, x.data_ptr(), x.nbytes, self._queue.stream)
        self._queue.catch_up(self._comm)
        return x

    def end_step(self) -> None:
        self._comm.check()
        self._comm.mark(self._queue.stream)

    def check(self) -> None:
        self._comm.check()

    def abandon(self, reason: str) -> None:
        self._comm.lose(reason)

    def close(self) -> None:
        self._comm.close()

    def warm_up(self, device: torch.device) -> None:
        """One of each operation: on return the ranks are connected, and no capture is the first to connect them."""
        one = torch.zeros(1, dtype=torch.float32, device=device)
        self.broadcast(self.all_reduce(one))
        self.gather(one)
        self.end_step()
        self._comm.settle()


def load_nccl() -> Nccl:
    """Raises RankLost where there is none: without it no ranks on GPUs come up."""
    try:
        return Nccl.load()
    except (OSError, AttributeError, NcclError) as error:
        raise RankLost(f"several ranks on GPUs sum over NCCL: {load_error(error)}") from error


def join_by_nccl(meeting: Meeting, device: torch.device) -> NcclCollectives:
    """The ranks' GPUs, of which this process computes on `device`. Returns when every rank has come. Raises RankLost."""
    runtime, nccl = CudaRuntime.load(), load_nccl()
    limits, index = RankLimits(timeout_s=meeting.timeout_s), device.index or 0
    comm = RankComm(nccl, runtime, meeting.rank, meeting.num_ranks, limits, index=index, on_lost=meeting.on_lost)
    comm.join(meeting.place)
    found = NcclCollectives(comm, TorchQueue(), in_order=meeting.in_order)
    found.warm_up(device)
    return found
