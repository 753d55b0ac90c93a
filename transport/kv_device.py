"""The decode side of an edge between GPUs, as far as `cuda_ipc`, `nccl` and `local` have it in common: moves in order, through slabs.

A move is admitted in the reactor's thread, goes through the mover's, and lands in the reactor's again. Each stage on the device is
awaited by looking, and the next one is begun only then: so what writes to granted blocks is always a short copy of this device's own,
which nobody else can hold up, and a transfer that ends meanwhile is not written any more once that copy is over.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from polymux.transport.cuda.mover import Mover
from polymux.transport.cuda.region import DeviceGrid
from polymux.transport.cuda.slab import PER_EDGE, Lane, Slab
from polymux.transport.errors import GrantViolation, PolymuxError
from polymux.transport.kv_backend import Landing
from polymux.transport.nccl.comm import Operation
from polymux.transport.protocol import MAX_MOVE_BLOCKS, MAX_MOVE_BYTES, Commit, Move
from polymux.transport.reactor import Reactor
from polymux.transport.transfer import SinkTransfer
from polymux.transport.units import TransferId


@dataclass(slots=True, eq=False)
class Arrival:
    """A move or commit on its way in. `transfer` None: nobody wants it any more."""

    item: Move | Commit
    transfer: SinkTransfer | None
    slab: Slab | None = None
    operation: Operation | None = None  # that brings it into the slab, where somebody else does that
    is_writing: bool = False  # to granted blocks
    since_s: float = 0.0  # the device has all that writes
    has_failed: bool = False
    is_over: bool = False


class Link(Protocol):
    """Where the bytes come from. Called in the mover's thread, but for `is_fenced`."""

    name: str
    takes_all: bool  # also what nobody wants must be taken off it

    def step(self, now_s: float) -> bool: ...

    @property
    def is_busy(self) -> bool: ...

    def can_begin(self, move: Move) -> bool: ...

    def begin(self, arrival: Arrival, now_s: float) -> None:
        """Bring it into its slab; `is_in` says when it is there."""

    def is_in(self, arrival: Arrival) -> bool: ...

    def fetch(self, arrival: Arrival) -> None:
        """On the present lane, just before the scatter: the last of what brings it into its slab."""

    def is_fenced(self) -> bool: ...

    def close(self, now_s: float) -> None: ...

    @property
    def is_gone(self) -> bool:
        """After `close`: nothing is brought in any more, and slabs may be used for others."""

    def release(self) -> None:
        """Gone, and the last copy is over."""


class DeviceReceiver:
    """`take`, `abandon`, `is_writing`, `is_fenced` and `close` are the reactor's, `step` and `failed` the mover's."""

    def __init__(self, link: Link, mover: Mover, reactor: Reactor, landing: Landing) -> None:
        self.name = link.name
        self._link = link
        self._mover = mover
        self._reactor = reactor
        self._landing = landing
        self._lane: Lane | None = None
        self._lock = threading.Lock()  # of what follows
        self._queue: deque[Arrival] = deque()  # not begun
        self._flights: deque[Arrival] = deque()  # begun, in order
        self._is_closed = False
        mover.post(mover.add, self)

    def take(self, item: Move | Commit) -> None:
        transfer = None
        if isinstance(item, Move):
            if not 0 < item.num_bytes <= MAX_MOVE_BYTES or not 0 < len(item.src_block_ids) // 4 <= MAX_MOVE_BLOCKS:
                raise GrantViolation(f"a move of {item.num_bytes} bytes in {len(item.src_block_ids) // 4} blocks is too large, or nothing")
            transfer = self._landing.admit(item)
            if transfer is None and not self._link.takes_all:
                return
        with self._lock:
            self._queue.append(Arrival(item, transfer))
        self._mover.wake()

    def abandon(self, transfer_id: TransferId) -> bool:
        with self._lock:
            for arrival in (*self._queue, *self._flights):
                if arrival.item.transfer_id == transfer_id and not arrival.is_writing:
                    arrival.transfer = None
            return not self._writes(transfer_id)

    def is_writing(self, transfer_id: TransferId) -> bool:
        with self._lock:
            return self._writes(transfer_id)

    def is_fenced(self) -> bool:
        return self._link.is_fenced()

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.clear()
            for arrival in self._flights:
                if not arrival.is_writing:
                    arrival.transfer = None
        self._mover.post(self._shut)

    def _writes(self, transfer_id: TransferId) -> bool:
        return any(arrival.is_writing and arrival.item.transfer_id == transfer_id for arrival in self._flights)

    # In the mover's thread.

    @property
    def is_busy(self) -> bool:
        return bool(self._queue or self._flights or self._link.is_busy or self._is_closed)

    def step(self, now_s: float) -> bool:
        has_moved = self._link.step(now_s)
        for arrival in tuple(self._flights):
            has_moved |= self._advance(arrival, now_s)
        has_moved |= self._land()
        if self._is_closed:
            return self._end() or has_moved
        while self._begin(now_s):
            has_moved = True
        return has_moved

    def failed(self, why: PolymuxError) -> None:
        """Nothing can be said of what is on its way: the edge goes. What the device still does is looked after until it is over."""
        self._reactor.post(self._report, why)

    def _begin(self, now_s: float) -> bool:
        with self._lock:
            if not self._queue:
                return False
            arrival = self._queue[0]
            num_moves = sum(isinstance(one.item, Move) for one in self._flights)
        if isinstance(arrival.item, Move) and (arrival.transfer is not None or self._link.takes_all):
            if num_moves >= PER_EDGE or not self._link.can_begin(arrival.item):
                return False
            arrival.slab = self._mover.incoming.take()
            if arrival.slab is None:
                return False
        with self._lock:
            if not self._queue or self._queue[0] is not arrival:  # closed meanwhile
                self._give_back(arrival)
                return False
            self._flights.append(self._queue.popleft())
        if arrival.slab is not None:
            self._link.begin(arrival, now_s)
        return True

    def _advance(self, arrival: Arrival, now_s: float) -> bool:
        """One stage further, if the one before is over."""
        slab = arrival.slab
        if arrival.is_over or slab is None:
            return False
        if arrival.is_writing:
            if self._mover.runtime.is_done(slab.event):
                self._written(arrival, slab)
                return True
            if now_s - arrival.since_s > self._mover.limits.stall_s:
                self._mover.fence(f"a copy of {arrival.item.transfer_id} on this device has not ended")
            return False
        if not self._link.is_in(arrival):
            return False
        with self._lock:
            transfer = arrival.transfer
            arrival.is_writing = transfer is not None
            arrival.is_over = transfer is None
        if transfer is not None:
            self._write(arrival, transfer, slab)
        else:
            self._give_back(arrival)
        return True

    def _write(self, arrival: Arrival, transfer: SinkTransfer, slab: Slab) -> None:
        move = arrival.item
        assert isinstance(move, Move)
        grid = self._landing.target(transfer)
        assert isinstance(grid, DeviceGrid)
        layers = range(move.layer_lo, move.layer_hi)
        block_ids = transfer.block_ids[move.first_block : move.first_block + len(move.src_block_ids) // 4]
        if self._lane is None:
            self._lane = self._mover.lane()
        try:
            with self._lane.on():
                self._link.fetch(arrival)
                slab.scatter(grid, block_ids, layers)
                if move.num_checked_blocks:
                    slab.gather_back(grid, move.num_checked_blocks, layers)
                    slab.download(move.num_checked_bytes)
        except BaseException:
            arrival.has_failed = True  # what was enqueued is waited for all the same
            raise
        finally:
            self._mover.runtime.record(slab.event, self._lane.stream)
            arrival.since_s = time.monotonic()  # not before: kernels may have been compiled

    def _written(self, arrival: Arrival, slab: Slab) -> None:
        move, transfer = arrival.item, arrival.transfer
        assert isinstance(move, Move) and transfer is not None
        crc32 = slab.checksum(move.num_checked_bytes) if move.num_checked_blocks and not arrival.has_failed else 0
        with self._lock:
            arrival.is_writing, arrival.is_over = False, True
        self._give_back(arrival)
        arrival.operation = None
        self._reactor.post(self._landed, transfer, None if arrival.has_failed else move, crc32)

    def _land(self) -> bool:
        """Commits go behind the moves before them."""
        has_moved = False
        while self._flights and (self._flights[0].is_over or self._flights[0].slab is None):
            with self._lock:
                arrival = self._flights.popleft()
            if isinstance(arrival.item, Commit):
                self._reactor.post(self._committed, arrival.item)
            has_moved = True
        return has_moved

    def _give_back(self, arrival: Arrival) -> None:
        slab, arrival.slab = arrival.slab, None
        if slab is not None:
            self._mover.incoming.give(slab)

    def _shut(self) -> None:
        self._link.close(time.monotonic())

    def _end(self) -> bool:
        """Closed: once nothing is brought in or written any more, all goes back."""
        if not self._link.is_gone or any(arrival.is_writing for arrival in self._flights):
            return False
        for arrival in self._flights:
            self._give_back(arrival)
        with self._lock:
            self._flights.clear()
        if self._lane is not None:
            self._mover.return_lane(self._lane)
            self._lane = None
        self._mover.remove(self)
        self._link.release()
        return True

    # In the reactor's thread again.

    def _landed(self, transfer: SinkTransfer, move: Move | None, crc32: int) -> None:
        if not self.is_writing(transfer.transfer_id):
            self._landing.quiet(transfer.transfer_id)
        if move is not None and not self._is_closed:
            self._guarded(lambda: self._landing.landed(transfer, move, crc32))

    def _committed(self, commit: Commit) -> None:
        if not self._is_closed:
            self._guarded(lambda: self._landing.commit(commit))

    def _report(self, why: PolymuxError) -> None:
        if not self._is_closed:
            self._landing.broken(why)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except PolymuxError as error:
            self._landing.broken(error)
