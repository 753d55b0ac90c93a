"""What the supervisor supervises: processes behind two protocols, and the places in the pools that they fill.

Ray actors (`remote.py`) and plain objects in one process (`local.py`) are both behind them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from polymux.actors.weight_store import ModelSource
from polymux.actors.worker import WorkerSettings
from polymux.cluster.config import ClusterConfig
from polymux.cluster.devices import Seating
from polymux.transport.errors import WorkerLost
from polymux.transport.messages import LookBack, ModelSpec, Role, WorkerHello, WorkerReport, WorkerTimeline
from polymux.transport.units import Epoch, ModelName, WorkerId

MAX_RESTARTS = 5  # of one worker within RESTART_WINDOW_S; then it stays down
RESTART_WINDOW_S = 300.0


class WorkerHandle(Protocol):
    """One worker's process. Every call may raise WorkerLost."""

    async def start(self, settings: WorkerSettings) -> WorkerHello: ...
    async def serve(self, epoch: Epoch) -> None: ...
    async def add_model(self, spec: ModelSpec) -> None: ...
    async def report(self) -> WorkerReport: ...
    async def timeline(self, look: LookBack) -> WorkerTimeline: ...
    async def move(self, model: ModelName | None) -> None: ...
    async def stop(self) -> None: ...


class Launcher(Protocol):
    """Makes processes: the weight stores and the workers. `seat` comes first: it says what each worker computes on, and sets that aside."""

    async def seat(self, config: ClusterConfig, places: Sequence[WorkerPlace]) -> Seating: ...
    async def start_stores(self, budget_bytes: int | None, kv_bytes: int | None, layout: str, token: str) -> None: ...
    async def register(self, source: ModelSource) -> ModelSpec: ...
    async def forget(self, model: ModelName) -> None: ...
    async def launch(self, place: WorkerPlace, config: ClusterConfig) -> WorkerHandle: ...
    async def store_address(self, handle: WorkerHandle) -> str: ...
    async def stop(self) -> None: ...


@dataclass(slots=True)
class WorkerPlace:
    """One place in a pool, and the worker that serves there at present."""

    role: Role
    number: int
    handle: WorkerHandle | None = None  # set once it serves every model
    epoch: Epoch | None = None
    restarts: deque[float] = field(default_factory=deque)
    is_leaving: bool = False  # it is drained, and nobody takes its place

    @property
    def worker_id(self) -> WorkerId:
        return WorkerId(f"{self.role}-{self.number}")

    def may_restart(self, now_s: float) -> bool:
        """Counts the restart that it allows."""
        while self.restarts and self.restarts[0] < now_s - RESTART_WINDOW_S:
            self.restarts.popleft()
        if len(self.restarts) >= MAX_RESTARTS:
            return False
        self.restarts.append(now_s)
        return True


def first(error: BaseException) -> BaseException:
    """The error inside a group of one kind: users are to see the cause, not the task tree."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def within(call: Awaitable[Any], seconds: float, what: str) -> Any:
    """Raises WorkerLost, naming what took too long."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await call
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise WorkerLost(f"{what} took more than {seconds:g} s; see its log") from error
