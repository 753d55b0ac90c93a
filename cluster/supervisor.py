"""The supervisor: brings workers up, polls them for the controller, replaces those that die, and takes everything down.

It knows processes only through two protocols, so that Ray actors (`remote.py`) and plain objects in one process (`local.py`) are
supervised by the same code. The books are the controller's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from polymux.actors.weight_store import ModelSource
from polymux.actors.worker import WorkerSettings
from polymux.cluster.config import ClusterConfig, ModelConfig
from polymux.cluster.controller import Controller
from polymux.cluster.sizing import worker_settings
from polymux.transport.errors import PolymuxError, StaleEpoch, WorkerLost
from polymux.transport.messages import Admit, ModelSpec, Placement, Release, Role, WorkerHello, WorkerReport
from polymux.transport.units import ClientId, Epoch, ModelName, WorkerId

log = logging.getLogger("polymux.supervisor")

BOOT_S = 120.0  # for a worker's process to come up
CALL_S = 30.0  # for any other call to a worker
MAX_RESTARTS = 5  # of one worker within RESTART_WINDOW_S; then it stays down
RESTART_WINDOW_S = 300.0


class WorkerHandle(Protocol):
    """One worker's process. Every call may raise WorkerLost."""

    async def start(self, settings: WorkerSettings) -> WorkerHello: ...
    async def serve(self, epoch: Epoch) -> None: ...
    async def add_model(self, spec: ModelSpec) -> None: ...
    async def report(self) -> WorkerReport: ...
    async def stop(self) -> None: ...


class Launcher(Protocol):
    """Makes processes: the weight stores and the workers."""

    async def start_stores(self, budget_bytes: int | None, layout: str, token: str) -> None: ...
    async def register(self, source: ModelSource) -> ModelSpec: ...
    async def forget(self, model: ModelName) -> None: ...
    async def launch(self, role: Role, config: ClusterConfig) -> WorkerHandle: ...
    async def store_address(self, handle: WorkerHandle) -> str: ...
    async def stop(self) -> None: ...


@dataclass(slots=True)
class _Member:
    """One place in a pool, and the worker that fills it at present."""

    role: Role
    number: int
    handle: WorkerHandle | None = None
    worker_id: WorkerId | None = None
    epoch: Epoch | None = None
    restarts: deque[float] = field(default_factory=deque)


class Supervisor:
    """Runs in one event loop. `start` returns when every worker serves every model."""

    def __init__(self, config: ClusterConfig, launcher: Launcher, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.controller = Controller(config, clock=clock, next_epoch=time.time_ns)
        self._launcher = launcher
        self._clock = clock
        self._members = [
            _Member(role, number)
            for role, pool in ((Role.PREFILL, config.pools.prefill), (Role.DECODE, config.pools.decode))
            for number in range(pool.workers)
        ]
        self._specs: dict[ModelName, ModelSpec] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: asyncio.Task[None] | None = None
        self.stopped = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Stores, models and workers, side by side where they may be. Raises what any of them raised; then nothing is left running."""
        try:
            await self._launcher.start_stores(self.config.store.budget_bytes, self.config.engine.weight_layout, self._token)
            async with asyncio.TaskGroup() as group:
                launches = [group.create_task(self._launch(member)) for member in self._members]
                for model in self.config.models:
                    self._specs[ModelName(model.name)] = await self._launcher.register(_source(model))
            assert all(task.done() for task in launches)
            async with asyncio.TaskGroup() as group:
                for member in self._members:
                    group.create_task(self._serve(member))
            for spec in self._specs.values():
                self.controller.register(spec)
        except BaseException as error:
            await self.stop()
            raise _first(error) from error
        self._spawn(self._watch())

    async def stop(self) -> None:
        """Stop polling, stop every worker, give every image back. May be called twice."""
        for task in list(self._tasks):
            task.cancel()
        handles = [member.handle for member in self._members if member.handle is not None]
        await asyncio.gather(*(_within(handle.stop(), CALL_S) for handle in handles), return_exceptions=True)
        for member in self._members:
            member.handle = None
        await self._launcher.stop()
        self.stopped.set()

    @property
    def _token(self) -> str:
        return self.config.security.cluster_token

    async def _launch(self, member: _Member) -> None:
        member.handle = await _within(self._launcher.launch(member.role, self.config), BOOT_S)

    async def _serve(self, member: _Member) -> None:
        """Give a worker its settings, its models and its epoch."""
        assert member.handle is not None
        member.worker_id = WorkerId(f"{member.role}-{member.number}")
        store_address = await self._launcher.store_address(member.handle)
        settings = worker_settings(self.config, member.role, member.worker_id, store_address, tuple(self._specs.values()))
        hello = await _within(member.handle.start(settings), CALL_S)
        for spec in self._specs.values():
            await _within(member.handle.add_model(spec), CALL_S)
        joined = self.controller.join(hello)
        member.epoch = joined.epoch
        await _within(member.handle.serve(joined.epoch), CALL_S)
        log.info("worker.joined worker=%s epoch=%d address=%s", member.worker_id, joined.epoch, hello.address)

    # -- watching -----------------------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        """Poll every worker once an interval; sweep leases; stop when no front door has called for too long."""
        while True:
            await asyncio.gather(*(self._poll(member) for member in self._members))
            expired = self.controller.expired()
            for worker_id in expired.workers:
                log.warning("worker.lost worker=%s reason=lease", worker_id)
                self._replace(worker_id)
            if expired.is_orphaned:
                log.info("supervisor.orphaned")
                self._ending = asyncio.create_task(self.stop())
                return
            await asyncio.sleep(self.config.liveness.report_interval_s)

    async def _poll(self, member: _Member) -> None:
        if member.handle is None:
            return
        try:
            self.controller.report(await _within(member.handle.report(), self.config.liveness.worker_lease_s / 2))
        except WorkerLost as error:
            assert member.worker_id is not None
            log.warning("worker.lost worker=%s reason=%s", member.worker_id, error)
            self.controller.lost(member.worker_id, member.epoch)
            self._replace(member.worker_id)
        except (TimeoutError, StaleEpoch) as error:
            log.warning("worker.silent worker=%s reason=%s", member.worker_id, error or "no answer to a poll")

    def _replace(self, worker_id: WorkerId) -> None:
        member = next((m for m in self._members if m.worker_id == worker_id and m.handle is not None), None)
        if member is None:
            return
        handle, member.handle = member.handle, None
        self._spawn(self._restart(member, handle))

    async def _restart(self, member: _Member, dead: WorkerHandle | None) -> None:
        """A new process in the old one's place; a worker that keeps dying stays down, and the log says so."""
        if dead is not None:
            await asyncio.gather(_within(dead.stop(), CALL_S), return_exceptions=True)
        now_s = self._clock()
        while member.restarts and member.restarts[0] < now_s - RESTART_WINDOW_S:
            member.restarts.popleft()
        if len(member.restarts) >= MAX_RESTARTS:
            log.error("worker.abandoned worker=%s restarts=%d window_s=%.0f", member.worker_id, len(member.restarts), RESTART_WINDOW_S)
            return
        member.restarts.append(now_s)
        try:
            await self._launch(member)
            await self._serve(member)
        except (PolymuxError, TimeoutError) as error:
            log.warning("worker.restart_failed worker=%s reason=%s", member.worker_id, error)
            handle, member.handle = member.handle, None
            self._spawn(self._restart(member, handle))

    # -- the control plane of the front doors -------------------------------------------------------------------------

    async def admit(self, ask: Admit) -> Placement:
        return self.controller.admit(ask)

    async def release(self, release: Release) -> None:
        self.controller.release(release)

    async def heartbeat(self, client_id: ClientId) -> None:
        self.controller.client_seen(client_id)

    async def models(self) -> tuple[ModelSpec, ...]:
        return self.controller.models()

    async def topology(self) -> dict[str, Any]:
        """Workers, models and totals as plain data, for /ready, the console and metrics."""
        return {**asdict(self.controller.topology()), "stats": asdict(self.controller.stats())}

    async def add_model(self, model: ModelConfig) -> ModelSpec:
        """Register a model while serving. Raises CheckpointError or ConfigError, and then nothing is registered anywhere."""
        spec = await self._launcher.register(_source(model))
        try:
            for member in self._members:
                if member.handle is not None:
                    await _within(member.handle.add_model(spec), CALL_S)
            kept = self.controller.register(spec)
        except BaseException:
            await self._launcher.forget(spec.model)
            raise
        self._specs[spec.model] = kept
        return kept


def _source(model: ModelConfig) -> ModelSource:
    ttft_slo_s, tpot_slo_s = model.slos
    return ModelSource(
        model=ModelName(model.name),
        path=model.path,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        ttft_slo_s=ttft_slo_s,
        tpot_slo_s=tpot_slo_s,
        is_pinned=model.pin,
        chat_template=model.chat_template,
    )


def _first(error: BaseException) -> BaseException:
    """The error inside a group of one kind: users are to see the cause, not the task tree."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _within(call: Awaitable[Any], seconds: float) -> Any:
    async with asyncio.timeout(seconds):
        return await call
