"""Backend wrapper `fault`: any backend, with chosen messages lost, late, doubled or damaged, or with the process killed or frozen there.

For tests and for drills. A step is `<side>.<send|receive|land>.<message>`, for example "source.send.move" or "sink.receive.commit"; `nth`
counts its occurrences in this process. Killing and freezing happen before the step.
"""

from __future__ import annotations

import asyncio
import enum
import os
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polymux.transport.kv_backend import DeviceEvent, Receiver, Sender
from polymux.transport.protocol import Commit, Move
from polymux.transport.region import Grid
from polymux.transport.units import TransferId


class Action(enum.StrEnum):
    DROP = "drop"
    DELAY = "delay"  # this message and all behind it
    DUPLICATE = "duplicate"
    CORRUPT = "corrupt"  # one byte, where a move has landed
    KILL = "kill"
    FREEZE = "freeze"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    step: str
    action: Action
    nth: int = 0
    probability: float = 1.0  # below 1: at every occurrence, by the seeded generator, and `nth` is ignored
    delay_s: float = 0.05


class Faults:
    """A plan of faults for one side. Its methods are called in that side's reactor."""

    def __init__(self, plan: Sequence[Fault], *, seed: int = 0, peer_writes: bool = False) -> None:
        self.peer_writes = peer_writes  # quiesce as a backend does whose peer writes to the blocks
        self._plan = tuple(plan)
        self._random = random.Random(seed)
        self._counts: Counter[str] = Counter()
        self._held: deque[Callable[[], object]] = deque()
        self._is_holding = False

    def pass_on(self, step: str, deliver: Callable[[], object]) -> None:
        """Send a message, or do to it what the plan says."""
        fault = self._due(step)
        action = fault.action if fault else None
        if action is Action.DROP:
            return
        if action is Action.DELAY and fault is not None and not self._is_holding:
            self._is_holding = True
            asyncio.get_running_loop().call_later(fault.delay_s, self._let_go)
        _stop_here(action)
        for _ in range(2 if action is Action.DUPLICATE else 1):
            if self._is_holding:
                self._held.append(deliver)
            else:
                deliver()

    def strike(self, step: str) -> None:
        """At the receipt of a message: kill or freeze, if the plan says so."""
        fault = self._due(step)
        _stop_here(fault.action if fault else None)

    def damage(self, step: str, landed: memoryview) -> None:
        """Flip one bit of what has landed, if the plan says so."""
        fault = self._due(step)
        if fault is not None and fault.action is Action.CORRUPT:
            landed[self._random.randrange(landed.nbytes)] ^= 1 << self._random.randrange(8)

    def _due(self, step: str) -> Fault | None:
        nth = self._counts[step]
        self._counts[step] += 1
        for fault in self._plan:
            if fault.step == step and (fault.nth == nth if fault.probability >= 1 else self._random.random() < fault.probability):
                return fault
        return None

    def _let_go(self) -> None:
        self._is_holding = False
        while self._held and not self._is_holding:
            self._held.popleft()()


def _stop_here(action: Action | None) -> None:
    if action in (Action.KILL, Action.FREEZE):
        os.kill(os.getpid(), signal.SIGKILL if action is Action.KILL else signal.SIGSTOP)
        time.sleep(0.02)  # another thread may be the first to stop


class FaultySender:
    """Wraps a backend's sender."""

    def __init__(self, inner: Sender, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def send_move(self, move: Move, source: Grid, ready: DeviceEvent | None) -> None:
        self._faults.pass_on("source.send.move", lambda: self._inner.send_move(move, source, ready))

    def send_commit(self, commit: Commit) -> None:
        self._faults.pass_on("source.send.commit", lambda: self._inner.send_commit(commit))

    def forget(self, transfer_id: TransferId, then: Callable[[], None]) -> None:
        self._inner.forget(transfer_id, then)

    def close(self, then: Callable[[], None]) -> None:
        self._inner.close(then)


class FaultyReceiver:
    """Wraps a backend's receiver."""

    def __init__(self, inner: Receiver, faults: Faults) -> None:
        self.name = f"fault+{inner.name}"
        self._inner = inner
        self._faults = faults

    def take(self, item: Move | Commit) -> None:
        self._inner.take(item)

    def abandon(self, transfer_id: TransferId) -> bool:
        return self._inner.abandon(transfer_id) and not self._faults.peer_writes

    def is_writing(self, transfer_id: TransferId) -> bool:
        return self._inner.is_writing(transfer_id)

    def is_fenced(self) -> bool:
        return self._inner.is_fenced()

    def close(self) -> None:
        self._inner.close()
