"""The supervisor: brings workers up, polls them for the controller, replaces those that die, and takes everything down.

It knows processes only through two protocols, so that Ray actors (`remote.py`) and plain objects in one process (`local.py`) are
supervised by the same code. The books are the controller's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from polymux.actors.weight_store import ModelSource
from polymux.actors.worker import WorkerSettings
from polymux.cluster.config import ClusterConfig, ModelConfig
from polymux.cluster.controller import Controller
from polymux.cluster.sizing import worker_settings
from polymux.cluster.timelines import gather
from polymux.transport.errors import DeadlineExceeded, InvalidRequest, PolymuxError, StaleEpoch, WorkerLost
from polymux.transport.messages import (
    Admit,
    LookBack,
    ModelSpec,
    Placement,
    Release,
    Role,
    WorkerHello,
    WorkerReport,
    WorkerTimeline,
)
from polymux.transport.units import ClientId, Epoch, ModelName, WorkerId

log = logging.getLogger("polymux.supervisor")

BOOT_S = 120.0  # for a worker's process to come up
CALL_S = 30.0  # for any other call to a worker
STORE_S = 600.0  # for a node's store, which packs every model before its first worker starts
DRAIN_S = 60.0  # for a worker's sequences to move or end
DRAIN_STEP_S = 0.1  # between two looks at a worker that is being drained
IDLE_AFTER = 10  # report intervals without work
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
    """Makes processes: the weight stores and the workers."""

    async def start_stores(self, budget_bytes: int | None, kv_bytes: int | None, layout: str, token: str) -> None: ...
    async def register(self, source: ModelSource) -> ModelSpec: ...
    async def forget(self, model: ModelName) -> None: ...
    async def launch(self, role: Role, config: ClusterConfig) -> WorkerHandle: ...
    async def store_address(self, handle: WorkerHandle) -> str: ...
    async def stop(self) -> None: ...


@dataclass(slots=True)
class _Member:
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
        self._handles: set[WorkerHandle] = set()  # every process that was launched and not stopped, whether it serves or not
        self._specs: dict[ModelName, ModelSpec] = {}
        self._adding = asyncio.Lock()
        self._serving_since_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy_s = clock()
        self._ending: asyncio.Task[None] | None = None
        self.stopped = asyncio.Event()

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Stores, models and workers, side by side where they may be. Raises what any of them raised; then nothing is left running."""
        if self._ending is not None:
            raise WorkerLost("this cluster was stopped; start a new one")
        try:
            await self._spawn(self._bring_up())
        except BaseException as error:
            was_stopped = self._ending is not None
            await self.stop()
            if was_stopped:
                raise WorkerLost("this cluster was stopped while it started; start a new one") from None
            raise _first(error) from error

    async def stop(self) -> None:
        """Stop polling, stop every worker, give every image back. May be called at any time, and twice."""
        await asyncio.shield(self._end())

    @property
    def is_stopping(self) -> bool:
        return self._ending is not None

    async def _bring_up(self) -> None:
        await self._launcher.start_stores(
            self.config.store.budget_bytes, self.config.store.kv_bytes, self.config.engine.weight_layout, self.config.security.cluster_token
        )
        async with asyncio.TaskGroup() as group:
            launches = [group.create_task(self._launch(member)) for member in self._members]
            for model in self.config.models:
                self._specs[ModelName(model.name)] = await self._launcher.register(_source(model))
        async with asyncio.TaskGroup() as group:
            for member, launch in zip(self._members, launches, strict=True):
                group.create_task(self._serve(member, launch.result()))
        for spec in self._specs.values():
            self.controller.register(spec)
        self._serving_since_s = self._clock()
        self._spawn(self._watch())

    def _end(self) -> asyncio.Task[None]:
        if self._ending is None:
            self._ending = asyncio.create_task(self._take_down())
        return self._ending

    async def _take_down(self) -> None:
        try:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for member in self._members:
                member.handle = None
            await asyncio.gather(*(self._discard(handle) for handle in list(self._handles)))
            await self._launcher.stop()
        finally:
            self.stopped.set()

    async def _launch(self, member: _Member) -> WorkerHandle:
        launch = self._launcher.launch(member.role, self.config)
        handle: WorkerHandle = await _within(launch, BOOT_S, f"the launch of worker {member.worker_id}")
        self._handles.add(handle)
        return handle

    async def _discard(self, handle: WorkerHandle) -> None:
        """Stop a process, whatever state it is in."""
        try:
            await _within(handle.stop(), CALL_S, "the stop of a worker")
        except Exception as error:
            log.warning("worker.stop_failed reason=%r", error)
        self._handles.discard(handle)

    async def _serve(self, member: _Member, handle: WorkerHandle) -> None:
        """Give a worker its settings, its models and its epoch. From its last line on it is polled, and told of new models."""
        name = f"worker {member.worker_id}"
        store_address = await _within(self._launcher.store_address(handle), STORE_S, f"the weight store of {name}")
        settings = worker_settings(self.config, member.role, member.worker_id, store_address, tuple(self._specs.values()))
        hello = await _within(handle.start(settings), CALL_S, f"the start of {name}")
        known: set[ModelSpec] = set()
        await self._teach(handle, known)
        member.epoch = self.controller.join(hello).epoch
        await _within(handle.serve(member.epoch), CALL_S, f"the first step of {name}")
        await self._teach(handle, known)
        member.handle = handle
        log.info("worker.joined worker=%s epoch=%d address=%s", member.worker_id, member.epoch, hello.address)

    async def _teach(self, handle: WorkerHandle, known: set[ModelSpec]) -> None:
        """Every model that it does not know, those that come meanwhile included: on return there is none."""
        while missing := [spec for spec in self._specs.values() if spec not in known]:
            for spec in missing:
                await _within(handle.add_model(spec), CALL_S, f"adding {spec.model} to a worker")
                known.add(spec)

    # -- watching -----------------------------------------------------------------------------------------------------

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch(self) -> None:
        """Once an interval: poll every worker, sweep leases, and stop when no front door has called for too long."""
        while True:
            try:
                await self._look()
            except Exception:  # a poll fails by itself; whatever this is, the next round must come
                log.exception("supervisor.watch_failed")
            if self._ending is not None:
                return
            await asyncio.sleep(self._pause_s())

    def _pause_s(self) -> float:
        """One report interval; two once nothing has run for a while, since polls are most of what an idle cluster costs."""
        interval_s, stats = self.config.liveness.report_interval_s, self.controller.stats()
        if stats.num_inflight or stats.num_blocks_out:
            self._busy_s = self._clock()
        return interval_s if self._clock() - self._busy_s < IDLE_AFTER * interval_s else 2 * interval_s

    async def _look(self) -> None:
        await asyncio.gather(*(self._poll(member) for member in self._members))
        expired = self.controller.expired()
        for member in self._members:
            if member.worker_id in expired.workers:
                self._lose(member, "its lease is over")
        self._steer()
        orphan_s = self.config.liveness.orphan_timeout_s
        if expired.is_orphaned and orphan_s is not None and self._clock() - self._serving_since_s > orphan_s:  # the start may take longer
            log.info("supervisor.orphaned")
            self._end()

    def _steer(self) -> None:
        move = self.controller.steer()
        if move is not None:
            log.info("batch.move model=%s source=%s target=%s gain=%.2f", move.model, move.source, move.target, move.gain)
            self._spawn(self._move(self._member(move.source), move.model))

    async def _move(self, member: _Member | None, model: ModelName | None) -> None:
        """Ask a worker to give up a model's sequences, or all. One that does not answer loses its lease, not this call's patience."""
        if member is None or member.handle is None:
            return
        try:
            await _within(member.handle.move(model), self.config.liveness.worker_lease_s, f"the move from worker {member.worker_id}")
        except PolymuxError as error:
            log.warning("batch.move_failed worker=%s reason=%s", member.worker_id, error)

    def _member(self, worker_id: WorkerId) -> _Member | None:
        return next((member for member in self._members if member.worker_id == worker_id), None)

    async def _poll(self, member: _Member) -> None:
        """Its report for the books. A silent worker has its lease to come back; one that is not in the books is replaced."""
        if member.handle is None:
            return
        try:
            async with asyncio.timeout(self.config.liveness.worker_lease_s / 2):
                self.controller.report(await member.handle.report())
        except (WorkerLost, StaleEpoch) as error:
            self._lose(member, str(error))
        except TimeoutError:
            log.warning("worker.silent worker=%s", member.worker_id)
        except Exception:
            log.exception("worker.poll_failed worker=%s", member.worker_id)

    def _lose(self, member: _Member, reason: str) -> None:
        """Take a worker out of the books, and start the next one in its place."""
        if member.handle is None:
            return  # on its way already
        log.warning("worker.lost worker=%s reason=%s", member.worker_id, reason)
        self.controller.lost(member.worker_id, member.epoch)
        handle, member.handle = member.handle, None
        self._spawn(self._discard(handle) if member.is_leaving else self._restart(member, handle))

    async def _restart(self, member: _Member, dead: WorkerHandle) -> None:
        """A new process in the old one's place; a worker that keeps dying stays down, and the log says so."""
        await self._discard(dead)
        while self._may_restart(member):
            handle: WorkerHandle | None = None
            try:
                handle = await self._launch(member)
                await self._serve(member, handle)
                return
            except Exception as error:  # whatever it was, the place is not to stay empty without a word
                log.warning("worker.restart_failed worker=%s reason=%r", member.worker_id, error)
                self.controller.lost(member.worker_id, member.epoch)
                if handle is not None:
                    await self._discard(handle)
        log.error("worker.abandoned worker=%s restarts=%d window_s=%.0f", member.worker_id, len(member.restarts), RESTART_WINDOW_S)

    def _may_restart(self, member: _Member) -> bool:
        """Counts the restart that it allows."""
        now_s = self._clock()
        while member.restarts and member.restarts[0] < now_s - RESTART_WINDOW_S:
            member.restarts.popleft()
        if len(member.restarts) >= MAX_RESTARTS:
            return False
        member.restarts.append(now_s)
        return True

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

    async def timeline(self, look: LookBack) -> dict[str, Any]:
        """What every worker did lately, as plain data (`timelines.py`): they are asked when somebody looks, not with each poll."""
        return await gather({m.worker_id: (m.role, m.handle.timeline if m.handle else None) for m in self._members}, look)

    async def drain(self, worker_id: WorkerId, timeout_s: float = DRAIN_S) -> None:
        """Empty a worker, then stop it: what runs there moves with its KV, what waits is placed elsewhere, and no client notices.

        Raises InvalidRequest for a worker that is not there or that nobody could stand in for, and DeadlineExceeded, it then goes on as
        before, when something would not leave it in time.
        """
        member = self._member(worker_id)
        if member is None or member.handle is None or member.is_leaving:
            raise InvalidRequest(f"worker {worker_id!r} is not serving, or is being drained already", param="worker")
        self.controller.drain(worker_id)
        member.is_leaving = True
        log.info("worker.draining worker=%s", worker_id)
        try:
            async with asyncio.timeout(timeout_s):
                while member.handle is not None and not self.controller.is_drained(worker_id):
                    await self._move(member, None)
                    await asyncio.sleep(DRAIN_STEP_S)
                    await self._poll(member)
        except TimeoutError:
            member.is_leaving = False
            self.controller.undrain(worker_id)
            raise DeadlineExceeded(f"worker {worker_id} still has work after {timeout_s:g} s, and goes on serving") from None
        except BaseException:
            member.is_leaving = False
            self.controller.undrain(worker_id)
            raise
        handle, member.handle = member.handle, None
        self.controller.lost(worker_id, member.epoch)
        if handle is not None:
            await self._discard(handle)
        log.info("worker.drained worker=%s", worker_id)

    async def add_model(self, model: ModelConfig) -> ModelSpec:
        """Register a model while serving. Raises CheckpointError or ConfigError, and then no new one is registered anywhere."""
        name = ModelName(model.name)
        async with self._adding:
            try:
                spec = await self._launcher.register(_source(model))
                await self._tell_all(spec)
                kept = self.controller.register(spec)
            except BaseException:
                if name not in self._specs:  # else it is served, and goes on
                    await self._forget(name)
                raise
            self._specs[name] = kept
            return kept

    async def _tell_all(self, spec: ModelSpec) -> None:
        """Tell every worker that serves, those that come up meanwhile included; one that does not answer is replaced."""
        told: set[WorkerHandle] = set()
        while left := [m for m in self._members if m.handle is not None and m.handle not in told]:
            member, handle = left[0], left[0].handle
            assert handle is not None
            told.add(handle)
            try:
                await _within(handle.add_model(spec), CALL_S, f"adding {spec.model} to worker {member.worker_id}")
            except WorkerLost as error:
                if member.handle is handle:
                    self._lose(member, str(error))

    async def _forget(self, model: ModelName) -> None:
        try:
            await self._launcher.forget(model)
        except Exception as error:  # the first error is the one to show
            log.warning("supervisor.forget_failed model=%s reason=%r", model, error)


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


async def _within(call: Awaitable[Any], seconds: float, what: str) -> Any:
    """Raises WorkerLost, naming what took too long."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await call
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise WorkerLost(f"{what} took more than {seconds:g} s; see its log") from error
