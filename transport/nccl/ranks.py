"""The communicator of an instance's ranks: one thread enqueues on a stream, another watches that what was enqueued comes to an end.

A rank that is gone is a hang and not an error, and it hangs on the device, where no host thread waits. So an event follows each step, and
the watch looks at events: where one stays away for too long a rank is lost. The communicator is then aborted aside, which lets go whoever
waits for the others, with nothing of worth in hand: what is read of a device counts only if `lost` is still None after the wait for it.

The calls block until they have enqueued. A communicator that does not block would start a thread for each of them, two a layer, and a
captured graph would be launched into from a thread other than its own.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from polymux.transport.cuda.runtime import CudaRuntime
from polymux.transport.errors import CudaError, NcclError, PolymuxError, RankLost
from polymux.transport.nccl.api import IN_PROGRESS, SUCCESS, Nccl
from polymux.transport.nccl.aside import ThreadAside
from polymux.transport.nccl.fence import fence_process

LOOK_S = 0.02  # between two looks at a step under way
LOCK_S = 1.0  # for a call to return before an abort; one that stands still holds its lock for ever


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLimits:
    timeout_s: float  # a step after the one before it, or a call
    join_s: float = 120.0  # for every rank to come
    abort_s: float = 10.0  # for the device to let go once a rank is lost; then this process is fenced


@dataclass(slots=True)
class Pending:
    """Events of the steps that are not known to have ended, in order, and since when the first of them is waited for. Pure."""

    events: deque[int] = field(default_factory=deque)
    since_s: float = 0.0

    def add(self, event: int, now_s: float) -> None:
        if not self.events:
            self.since_s = now_s
        self.events.append(event)

    def drop_done(self, is_done: Callable[[int], bool], now_s: float) -> list[int]:
        """The events that have happened, which can be used again."""
        found = []
        while self.events and is_done(self.events[0]):
            found.append(self.events.popleft())
            self.since_s = now_s
        return found

    def age_s(self, now_s: float) -> float:
        """How long the first one has been awaited."""
        return now_s - self.since_s if self.events else 0.0


class RankComm:
    """One rank's end. One thread enqueues and marks; `lose` and `close` are for any. Once a rank is lost every call raises RankLost."""

    def __init__(
        self,
        nccl: Nccl,
        runtime: CudaRuntime,
        rank: int,
        num_ranks: int,
        limits: RankLimits,
        *,
        index: int = 0,
        on_lost: Callable[[str], object] = lambda reason: None,
        fence: Callable[[str], None] = fence_process,
    ) -> None:
        """`index`: of this process's GPUs. `on_lost`: told what the watch has found out, from its thread. `fence` ends the process."""
        self.nccl, self.runtime, self.rank, self.num_ranks = nccl, runtime, rank, num_ranks
        self.lost: RankLost | None = None
        self._limits, self._index, self._on_lost, self._fence = limits, index, on_lost, fence
        self._handle = 0
        self._calling = threading.Lock()  # held in every call of the library but the abort
        self._called_s: float | None = None  # when the call under way began
        self._changed = threading.Condition()  # of what follows
        self._pending = Pending()
        self._patience_s = limits.join_s  # for a step or a call; `timeout_s` once all have computed together
        self._spare: list[int] = []
        self._is_closing = False
        self._aborted_s: float | None = None  # when the abort began
        self._watch = threading.Thread(target=self._run, name="polymux-ranks-watch", daemon=True)

    def join(self, unique_id: bytes) -> None:
        """Return when every rank has come. Raises RankLost when one does not within `join_s`."""
        init = ThreadAside(lambda: self._init(unique_id), "polymux-ranks-join")
        if not init.wait(self._limits.join_s):
            self.lost = RankLost(f"rank {self.rank} of {self.num_ranks} waited {self._limits.join_s:g} s for the others")
            raise self.lost
        try:
            self._handle = init.result()
        except PolymuxError as error:
            raise RankLost(f"rank {self.rank} of {self.num_ranks} cannot join: {error}") from error
        self._watch.start()

    def _init(self, unique_id: bytes) -> int:
        self.runtime.set_device(self._index)
        return self.nccl.init(unique_id, self.rank, self.num_ranks, is_blocking=True)

    @contextmanager
    def calling(self) -> Iterator[int]:
        """The communicator, for the calls of one operation. Raises RankLost."""
        with self._calling:
            self.check()
            self._called_s = time.monotonic()
            try:
                yield self._handle
            except NcclError as error:
                raise RankLost(f"rank {self.rank} of {self.num_ranks}: {error}") from error
            finally:
                self._called_s = None

    def mark(self, stream: int) -> None:
        """The end of a step, which the watch waits for from now on."""
        with self._changed:
            event = self._spare.pop() if self._spare else self.runtime.event()
        self.runtime.record(event, stream)
        with self._changed:
            if not self._pending.events:
                self._changed.notify_all()
            self._pending.add(event, time.monotonic())

    def settle(self) -> None:
        """Return when the first steps, which load code and connect the ranks, have come to an end. Raises RankLost."""
        while self.num_pending:
            self.check()
            time.sleep(LOOK_S)
        self.check()
        self._patience_s = self._limits.timeout_s

    def check(self) -> None:
        """Raise RankLost once a rank is: what has come from the device since then may be worth nothing."""
        if self.lost is not None:
            raise self.lost

    @property
    def num_pending(self) -> int:
        """Steps that were marked and have not ended, as far as the watch has seen."""
        with self._changed:
            return len(self._pending.events)

    def lose(self, reason: str) -> None:
        """A rank is lost: nobody waits for it any more. May be called twice."""
        with self._changed:
            if self.lost is None:
                self.lost = RankLost(f"rank {self.rank} of {self.num_ranks}: {reason}")
        self._begin_abort()

    def close(self) -> None:
        """Nothing is enqueued any more. The communicator goes by an abort, which ends with the last graph that uses it; nobody waits."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._watch.ident is not None and self._watch is not threading.current_thread():
            self._watch.join(self._limits.abort_s)
        self._begin_abort()

    def _begin_abort(self) -> None:
        had_lock = self._calling.acquire(timeout=LOCK_S)  # a call that stands still is what the abort is to end
        try:
            with self._changed:
                handle, self._handle = self._handle, 0
                if handle:
                    ThreadAside(lambda: self.nccl.abort(handle), "polymux-ranks-abort")
                    self._aborted_s = time.monotonic()
                    self._changed.notify_all()
        finally:
            if had_lock:
                self._calling.release()

    # -- the watch ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self.runtime.set_device(self._index)
        while not self._rest():
            aborted_s = self._aborted_s  # before the look: a loss that another thread finds meanwhile is no device that does not let go
            reason = self._look(aborted_s)
            if reason is None or self._is_closing:
                continue
            if aborted_s is not None:
                self._fence(f"{reason}; {self.lost}")
                return
            self._on_lost(reason)  # before anything is let go: who looks at what the device brought must know it by then
            self.lose(reason)

    def _rest(self) -> bool:
        """Until something may have happened; whether this is the end."""
        with self._changed:
            if not self._is_closing:
                self._changed.wait(LOOK_S if self._pending.events else self._limits.timeout_s / 4)
            return self._is_closing or (self._aborted_s is not None and not self._pending.events)

    def _look(self, aborted_s: float | None) -> str | None:
        """What is wrong."""
        now_s, timeout_s = time.monotonic(), self._patience_s
        try:
            with self._changed:
                self._spare += self._pending.drop_done(self.runtime.is_done, now_s)
                age_s = self._pending.age_s(now_s)
        except CudaError as error:
            return str(error)
        if aborted_s is not None:
            is_stuck = age_s > 0 and now_s - aborted_s > self._limits.abort_s
            return f"the device did not let go {self._limits.abort_s:g} s after a rank was lost" if is_stuck else None
        called_s = self._called_s
        if called_s is not None and now_s - called_s > timeout_s:
            return f"a call of NCCL has stood still for {timeout_s:g} s"
        if age_s > timeout_s:
            return f"heard no more of the others for {timeout_s:g} s"
        return self._complaint()

    def _complaint(self) -> str | None:
        """What NCCL itself has noticed."""
        if not self._calling.acquire(blocking=False):
            return None
        try:
            code = self.nccl.async_error(self._handle) if self._handle else SUCCESS
            return None if code in (SUCCESS, IN_PROGRESS) else f"NCCL: {self.nccl.text(code, self._handle)}"
        except NcclError as error:
            return str(error)
        finally:
            self._calling.release()
