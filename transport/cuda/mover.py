"""The one thread of a GPU's transfers: it makes every device and NCCL call of every edge, and never waits inside one.

One thread, so that the order in which kernels of several communicators are launched is the same for all who could wait for each other, and
so that two calls never meet inside NCCL. It turns through its tasks as long as one is busy, a little slower each time that nothing
moved, and sleeps when none is. A second thread watches it: a call that does not return fences the process.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from polymux.transport.cuda.region import DeviceRegion
from polymux.transport.cuda.slab import Lane, SlabPool, warm_up
from polymux.transport.errors import CudaError, PolymuxError, TransferTimeout
from polymux.transport.nccl.api import Nccl, load_error
from polymux.transport.nccl.aside import ThreadAside
from polymux.transport.nccl.comm import Comm, CommLimits
from polymux.transport.nccl.fence import fence_process

log = logging.getLogger(__name__)
T = TypeVar("T")

_NUM_SLABS = 4  # of each pool: two edges at full speed
_SHORTEST_S, _LONGEST_S = 20e-6, 500e-6  # pauses between turns in which nothing moved
_STUCK_S = 30.0  # no call takes so long that returns, nor the compiling of a kernel that is used for the first time
_WATCH_S = 1.0


class Task(Protocol):
    """Something that goes on in the mover's thread."""

    @property
    def is_busy(self) -> bool:
        """Look again soon; else not before something is posted."""

    def step(self, now_s: float) -> bool:
        """Do what can be done without waiting; whether anything was."""

    def failed(self, why: PolymuxError) -> None:
        """A step raised."""


class Mover:
    """`post` and `ask` may be called from any thread, the rest in the mover's own."""

    def __init__(
        self,
        region: DeviceRegion,
        *,
        nccl_path: str | None = None,
        num_slabs: int = _NUM_SLABS,
        limits: CommLimits | None = None,
        fence: Callable[[str], None] = fence_process,
    ) -> None:
        self.runtime = region.runtime
        self.nccl: Nccl | None = None
        self.no_nccl = ""  # why there is none
        self.limits = limits or CommLimits()
        self.incoming, self.outgoing = SlabPool(region, num_slabs), SlabPool(region, num_slabs)
        self.fence = fence
        self._region = region
        self._lanes: list[Lane] = []
        self._tasks: list[Task] = []
        self._posted: list[Callable[[], object]] = []
        self._wake = threading.Condition()
        self._is_closing = False
        self._beat_s: float | None = None  # when the turn that is going on began
        self._load_nccl(nccl_path)
        self._thread = threading.Thread(target=self._run, name="polymux-mover", daemon=True)
        self._thread.start()
        self._watcher = threading.Thread(target=self._watch, name="polymux-mover-watch", daemon=True)
        self._watcher.start()

    def _load_nccl(self, path: str | None) -> None:
        try:
            self.nccl = Nccl.load(path)
        except (OSError, AttributeError, PolymuxError) as error:
            self.no_nccl = load_error(error).message

    def post(self, function: Callable[..., object], *args: object) -> None:
        """Run it in the mover's thread, soon; dropped once that has ended."""
        with self._wake:
            self._posted.append(partial(function, *args))
            self._wake.notify_all()

    def wake(self) -> None:
        """A task has work that it had not."""
        with self._wake:
            self._wake.notify_all()

    async def ask(self, function: Callable[[], T], within_s: float) -> T:
        """What it returns, or raises, in the mover's thread. Raises TransferTimeout where that is too busy to answer."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def run() -> None:
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(function())
                except Exception as error:  # it is the asker's
                    answer.set_exception(error)

        self.post(run)
        try:
            async with asyncio.timeout(within_s):
                return await asyncio.wrap_future(answer)
        except TimeoutError as error:
            raise TransferTimeout(f"the mover has not answered within {within_s:g} s") from error

    def lane(self) -> Lane:
        """A stream of its own; streams are few, so its user gives it back."""
        return self._lanes.pop() if self._lanes else Lane(self._region)

    def return_lane(self, lane: Lane) -> None:
        """Nothing is on it any more."""
        self._lanes.append(lane)

    def add(self, task: Task) -> None:
        self._tasks.append(task)

    def remove(self, task: Task) -> None:
        if task in self._tasks:
            self._tasks.remove(task)

    @property
    def num_edges(self) -> int:
        """Ends of edges that are open, or closed and not yet quiet."""
        return len(self._tasks)

    @property
    def num_slabs_out(self) -> int:
        return self.incoming.num_out + self.outgoing.num_out

    def comm(self, lane: Lane, unique_id: bytes, rank: int) -> Comm:
        """Begin to join. Whoever asks has seen that there is NCCL."""
        assert self.nccl is not None
        return Comm(
            self.nccl,
            self.runtime,
            lane.stream,
            unique_id,
            rank,
            aside=self.aside,
            fence=self.fence,
            limits=self.limits,
            now_s=time.monotonic(),
        )

    def close(self) -> bool:
        """Stop once no task is busy, and give the slabs back. False when that took too long: the device may still use the memory."""
        with self._wake:
            self._is_closing = True
            self._wake.notify_all()
        self._thread.join(self.limits.abort_s + 2.0)
        self._watcher.join(2 * _WATCH_S)
        return not self._thread.is_alive() and not self.num_slabs_out

    def aside(self, call: Callable[[], int | None]) -> ThreadAside[int | None]:
        """Begin a call that may take long, on this GPU, in a thread of its own."""

        def run() -> int | None:
            self.runtime.set_device(self._region.index)
            return call()

        return ThreadAside(run, "polymux-aside")

    def _run(self) -> None:
        self.runtime.set_device(self._region.index)
        self._guarded(self._warm_up)
        pause_s = _SHORTEST_S
        while True:
            posted = self._next(pause_s)
            if posted is None:
                break
            self._beat_s = time.monotonic()
            has_moved = bool(posted)
            for function in posted:
                self._guarded(function)
            for task in list(self._tasks):
                has_moved |= bool(self._guarded(partial(task.step, time.monotonic()), task))
            pause_s = _SHORTEST_S if has_moved else min(2 * pause_s, _LONGEST_S)
            self._beat_s = None
        for lane in self._lanes:
            lane.close()
        if not self.num_slabs_out:
            self.incoming.close()
            self.outgoing.close()

    def _warm_up(self) -> None:
        """Before there is an edge: the peer of one that is busy compiling takes it for dead."""
        lane = self.lane()
        with lane.on():
            warm_up(self._region.device)
        self.return_lane(lane)

    def _next(self, pause_s: float) -> list[Callable[[], object]] | None:
        """What was posted, perhaps nothing; None at the end."""
        with self._wake:
            is_busy = any(task.is_busy for task in self._tasks)
            if not self._posted:
                if self._is_closing and not is_busy:
                    return None
                self._wake.wait(pause_s if is_busy else None)
            posted, self._posted = self._posted, []
            return posted

    def _guarded(self, work: Callable[[], T], task: Task | None = None) -> T | None:
        try:
            return work()
        except CudaError as error:
            if error.is_sticky:
                self.fence(str(error))
            self._blame(task, error)
        except PolymuxError as error:
            self._blame(task, error)
        except Exception as error:  # torch's way to report what the device says
            log.exception("mover.step_failed")
            self._blame(task, PolymuxError(f"{type(error).__name__}: {error}"))
        return None

    def _blame(self, task: Task | None, error: PolymuxError) -> None:
        if task is not None:
            task.failed(error)
        else:
            log.error("mover.call_failed error=%s", error)

    def _watch(self) -> None:
        while self._thread.is_alive():
            self._thread.join(_WATCH_S)
            began_s = self._beat_s
            if began_s is not None and time.monotonic() - began_s > _STUCK_S:
                self.fence(f"a device or NCCL call has not returned for {_STUCK_S:g} s")
                return
