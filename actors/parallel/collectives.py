"""What the ranks of an instance say to each other within a step: sums and gathers that end, or fail with RankLost, within a deadline.

Every rank calls the same operations in the same order. Once one has failed nothing can be known of the other ranks' state: the instance is
fenced, and only a new one goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from polymux.transport.errors import RankLost


class Collectives(Protocol):
    """Of one rank. Not thread-safe; tensors are contiguous. Every method raises RankLost when a rank is gone or silent for too long."""

    rank: int
    num_ranks: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; may be `x` itself, overwritten."""

    def gather(self, x: Tensor) -> tuple[Tensor, ...]:
        """On rank 0 every rank's `x`, in their order; on the others nothing."""

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, on every rank; may be `x` itself, overwritten."""

    def end_step(self) -> None:
        """All of a step is handed to the device: from now on it must come to an end in time."""

    def check(self) -> None:
        """Raise what has become of the ranks: numbers that were waited for before this call are good."""

    def abandon(self, reason: str) -> None:
        """A rank is lost: whoever waits for it, on host or device, is let go. From any thread."""

    def close(self) -> None:
        """The last call. From any thread, and twice too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """How one rank finds the others of its instance."""

    place: bytes  # where, as rank 0's device has named it
    rank: int
    num_ranks: int
    timeout_s: float  # of every sum, gather and step
    in_order: bool  # sums do not depend on where in the tensor a number stands, as `batch_invariant` wants it; dearer from 3 ranks on
    on_lost: Callable[[str], object] = lambda reason: None  # told once if it is found out beside the calls; from any thread


class GlooCollectives:
    """Over TCP on this host, by torch's gloo. The ranks find each other through a file that only they know."""

    def __init__(self, meeting: Meeting) -> None:
        """Returns when every rank has come. Raises RankLost when one does not."""
        rank, num_ranks, timeout_s = meeting.rank, meeting.num_ranks, meeting.timeout_s
        self.rank, self.num_ranks = rank, num_ranks
        self._in_order = meeting.in_order and num_ranks > 2  # two numbers have one sum
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        try:
            store = dist.FileStore(meeting.place.decode(), num_ranks)  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=timeout_s))
            self._group: Any = dist.ProcessGroupGloo(store, rank, num_ranks, options)
        except RuntimeError as error:
            raise self._lost(error) from error
        self.all_reduce(torch.zeros(1))

    def all_reduce(self, x: Tensor) -> Tensor:
        try:
            if not self._in_order:
                self._group.allreduce([x]).wait()
                return x
            parts = [torch.empty_like(x) for _ in range(self.num_ranks)]
            self._group.allgather([parts], [x]).wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def gather(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(x) for _ in range(self.num_ranks)] if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        try:
            self._group.gather([parts] if parts else [], [x], options).wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        return tuple(parts)

    def broadcast(self, x: Tensor) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            self._group.broadcast([x], options).wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        return x

    def end_step(self) -> None:
        return

    def check(self) -> None:
        return

    def abandon(self, reason: str) -> None:
        return  # whoever waits hears the end of the other side's sockets

    def close(self) -> None:
        return

    def _lost(self, error: RuntimeError) -> RankLost:
        return RankLost(f"rank {self.rank} of {self.num_ranks} heard no more of the others: {str(error).splitlines()[0][-160:]}")
