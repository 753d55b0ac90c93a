"""One communicator of two ranks, from its making to its end: a state machine that never waits.

    JOINING --> READY <--> POSTING          one operation is posted at a time, several may be on their way
        \\         |          /
         '----> ABORTING <--'               an error, a deadline that passed, or nobody needs it any more
                   |
                  GONE                      only now may its slabs be used again

A dead peer is a hang and not an error wherever memory is mapped, so every state but READY without work has a deadline here. Joining and
aborting are calls that may block, and run aside, each in its own thread: aborts must not wait for each other, since giving
memory back waits for the whole device, and so for the kernel of the other edge whose peer died too. An abort that takes longer than
its budget fences the process. There is one way to end, and the peer need not take part in it.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from polymux.transport.errors import NcclError, PolymuxError
from polymux.transport.nccl.api import IN_PROGRESS, NUM_RANKS, SUCCESS
from polymux.transport.nccl.aside import Aside

_SLOWEST_BYTES_PER_S = 64 * 2**20  # an operation may take its stall time and its bytes at this rate


class NcclCalls(Protocol):
    """What is needed of `Nccl`."""

    def init(self, unique_id: bytes, rank: int) -> int: ...
    def async_error(self, comm: int) -> int: ...
    def send(self, comm: int, address: int, nbytes: int, peer: int, stream: int) -> None: ...
    def recv(self, comm: int, address: int, nbytes: int, peer: int, stream: int) -> None: ...
    def abort(self, comm: int) -> None: ...
    def text(self, code: int, comm: int = 0) -> str: ...


class Events(Protocol):
    """What is needed of the device."""

    def record(self, event: int, stream: int) -> None: ...
    def is_done(self, event: int) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CommLimits:
    join_s: float = 15.0  # the first one of a process loads code into the device
    stall_s: float = 10.0  # an operation that goes nowhere for so long never will
    abort_s: float = 5.0  # then the process is fenced


class CommState(enum.Enum):
    JOINING = "joining"
    READY = "ready"
    POSTING = "posting"
    ABORTING = "aborting"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Operation:
    """Bytes at an address, to or from the other rank. `event` is whoever's memory it is's, and free until `is_done` or the comm is GONE."""

    is_send: bool
    address: int
    nbytes: int
    event: int
    is_recorded: bool = False
    is_done: bool = False


class Comm:
    """Used by one thread. `aside` starts a call in another one; `fence` ends the process."""

    def __init__(
        self,
        nccl: NcclCalls,
        events: Events,
        stream: int,
        unique_id: bytes,
        rank: int,
        *,
        aside: Callable[[Callable[[], int | None]], Aside[int | None]],
        fence: Callable[[str], None],
        limits: CommLimits,
        now_s: float,
    ) -> None:
        self.state = CommState.JOINING
        self.why: PolymuxError | None = None  # why it ended; None: it was wanted
        self._nccl = nccl
        self._events = events
        self._stream = stream
        self._peer = NUM_RANKS - 1 - rank
        self._aside = aside
        self._fence = fence
        self._limits = limits
        self._since_s = now_s  # when what it waits for began: joining, the head operation, aborting
        self._handle = 0
        self._operations: deque[Operation] = deque()  # posted, in order; the last one is being posted in POSTING
        self._has_fenced = False
        self._abort: Aside[int | None] | None = None
        self._init: Aside[int | None] | None = aside(lambda: nccl.init(unique_id, rank))

    @property
    def is_usable(self) -> bool:
        """It can still become, or is, READY."""
        return self.state in (CommState.JOINING, CommState.READY, CommState.POSTING)

    @property
    def num_posted(self) -> int:
        return len(self._operations)

    @property
    def has_work(self) -> bool:
        """Something goes on that must be looked after."""
        return self.state in (CommState.JOINING, CommState.POSTING, CommState.ABORTING) or bool(self._operations)

    def post(self, operation: Operation, now_s: float) -> None:
        """Begin a send or receive; only in READY. It `is_done` after some step, or never, if the comm breaks."""
        assert self.state is CommState.READY
        if not self._operations:
            self._since_s = now_s
        self._operations.append(operation)
        self.state = CommState.POSTING
        call = self._nccl.send if operation.is_send else self._nccl.recv
        try:
            call(self._handle, operation.address, operation.nbytes, self._peer, self._stream)
        except NcclError as error:
            self._break(error, now_s)

    def close(self, now_s: float) -> None:
        """Nobody needs it any more."""
        if self.is_usable:
            self._break(None, now_s)

    def step(self, now_s: float) -> bool:
        """Look at what goes on; whether anything has changed."""
        if self.state is CommState.GONE:
            return False
        if self.state is CommState.ABORTING:
            return self._step_abort(now_s)
        if self.state is CommState.JOINING and self._is_initializing(now_s):
            return False
        if not self.is_usable:
            return True
        try:
            code = self._nccl.async_error(self._handle)
        except NcclError as error:
            self._break(error, now_s)
            return True
        if code not in (SUCCESS, IN_PROGRESS):
            self._break(NcclError(f"NCCL: {self._nccl.text(code, self._handle)}"), now_s)
            return True
        moved = self._step_state(now_s) if code == SUCCESS else False
        moved |= self._step_operations(now_s)
        if not moved:
            self._check_deadline(now_s)
        return moved or not self.is_usable

    def _is_initializing(self, now_s: float) -> bool:
        """Whether the first call is still going on; afterwards there is a handle, or the end."""
        if self._init is None:
            return False
        if not self._init.is_done:
            self._check_deadline(now_s)
            return self.is_usable
        init, self._init = self._init, None
        try:
            self._handle = init.result() or 0
        except PolymuxError as error:
            self._break(error, now_s)
        return False

    def _step_state(self, now_s: float) -> bool:
        if self.state is CommState.JOINING:
            self.state = CommState.READY
            return True
        if self.state is CommState.POSTING:  # it is on the stream now, and not before
            operation = self._operations[-1]
            self._events.record(operation.event, self._stream)
            operation.is_recorded = True
            self.state = CommState.READY
            return True
        return False

    def _step_operations(self, now_s: float) -> bool:
        moved = False
        while self._operations and self._operations[0].is_recorded and self._events.is_done(self._operations[0].event):
            self._operations.popleft().is_done = True
            self._since_s = now_s
            moved = True
        return moved

    def _check_deadline(self, now_s: float) -> None:
        if self.state is CommState.JOINING:
            if now_s - self._since_s > self._limits.join_s:
                self._break(NcclError(f"NCCL: the other rank did not join within {self._limits.join_s:g} s"), now_s)
        elif self._operations:
            head = self._operations[0]
            may_take_s = self._limits.stall_s + head.nbytes / _SLOWEST_BYTES_PER_S
            if now_s - self._since_s > may_take_s:
                what = "send" if head.is_send else "receive"
                self._break(NcclError(f"NCCL: a {what} of {head.nbytes} bytes has gone nowhere for {may_take_s:.1f} s"), now_s)

    def _break(self, why: PolymuxError | None, now_s: float) -> None:
        self.why = why
        self.state = CommState.ABORTING
        self._since_s = now_s
        self._step_abort(now_s)

    def _step_abort(self, now_s: float) -> bool:
        """The first call must have returned, then the abort, and then the device must have let go of every operation's memory."""
        if self._init is not None and self._init.is_done:
            init, self._init = self._init, None
            try:
                self._handle = init.result() or 0
            except PolymuxError:
                self._handle = 0
        if self._init is None and self._abort is None and self._handle:
            handle = self._handle
            self._abort = self._aside(lambda: self._nccl.abort(handle))
        if self._init is None and (self._abort is None or self._abort.is_done) and self._is_drained():
            self.state = CommState.GONE
            self._operations.clear()
            return True
        if now_s - self._since_s > self._limits.abort_s and not self._has_fenced:
            self._has_fenced = True
            self._fence(f"an abort of NCCL did not end within {self._limits.abort_s:g} s; it was begun because: {self.why or 'close'}")
        return False

    def _is_drained(self) -> bool:
        for operation in self._operations:
            if not operation.is_recorded:
                self._events.record(operation.event, self._stream)
                operation.is_recorded = True
        return all(self._events.is_done(operation.event) for operation in self._operations)
