"""The supervisor: brings workers up, polls them for the controller, replaces those that die, and takes everything down.

It knows processes only through two protocols (`processes.py`). The books are the controller's.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any

from polymux.actors.weight_store import ModelSource
from polymux.cluster.config import ClusterConfig, ModelConfig
from polymux.cluster.controller import Controller
from polymux.cluster.devices import Seating, weight_layout
from polymux.cluster.processes import RESTART_WINDOW_S, Launcher, WorkerHandle, WorkerPlace, first, within
from polymux.cluster.sizing import worker_settings
from polymux.cluster.timelines import gather
from polymux.transport.errors import DeadlineExceeded, InvalidRequest, PolymuxError, StaleEpoch, WorkerLost
from polymux.transport.messages import Admit, LookBack, ModelSpec, Placement, Release, Role
from polymux.transport.units import ClientId, ModelName, WorkerId

log = logging.getLogger("polymux.supervisor")

BOOT_S = 120.0  # for a worker's process to come up
CALL_S = 30.0  # for any other call to a worker
TEACH_S = 300.0  # for one in which it learns of a model: the first process of a machine compiles kernels, half a minute beside others
STORE_S = 600.0  # for a node's store, which packs every model before its first worker starts
DRAIN_S = 60.0  # for a worker's sequences to move or end
DRAIN_STEP_S = 0.1  # between two looks at a worker that is being drained
IDLE_AFTER = 10  # report intervals without work


class Supervisor:
    """Runs in one event loop. `start` returns when every worker serves every model."""

    def __init__(self, config: ClusterConfig, launcher: Launcher, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        self.controller = Controller(config, clock=clock, next_epoch=time.time_ns)
        self._launcher = launcher
        self._clock = clock
        self._places = [
            WorkerPlace(role, number)
            for role, pool in ((Role.PREFILL, config.pools.prefill), (Role.DECODE, config.pools.decode))
            for number in range(pool.workers)
        ]
        self._handles: set[WorkerHandle] = set()  # every process that was launched and not stopped, whether it serves or not
        self._seating = Seating(devices={}, seats={})  # until `seat` has said
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
            raise first(error) from error

    async def stop(self) -> None:
        """Stop polling, stop every worker, give every image back. May be called at any time, and twice."""
        await asyncio.shield(self._end())

    @property
    def is_stopping(self) -> bool:
        return self._ending is not None

    async def _bring_up(self) -> None:
        self._seating = await self._launcher.seat(self.config, self._places)
        log.info("devices.chosen %s", self._seating.describe())
        if any(seat.slot is not None for seat in self._seating.seats.values()):
            self.controller.place_near(self._seating.link)
        layout, store = weight_layout(self.config, self._seating.devices), self.config.store
        await self._launcher.start_stores(store.budget_bytes, store.kv_bytes, layout, self.config.security.cluster_token)
        async with asyncio.TaskGroup() as group:
            launches = [group.create_task(self._launch(place)) for place in self._places]
            for model in self.config.models:
                self._specs[ModelName(model.name)] = await self._launcher.register(_source(model, self.config.pools.degrees))
        async with asyncio.TaskGroup() as group:
            for place, launch in zip(self._places, launches, strict=True):
                group.create_task(self._serve(place, launch.result()))
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
            for place in self._places:
                place.handle = None
            await asyncio.gather(*(self._discard(handle) for handle in list(self._handles)))
            await self._launcher.stop()
        finally:
            self.stopped.set()

    async def _launch(self, place: WorkerPlace) -> WorkerHandle:
        launch = self._launcher.launch(place, self.config)
        handle: WorkerHandle = await within(launch, BOOT_S, f"the launch of worker {place.worker_id}")
        self._handles.add(handle)
        return handle

    async def _discard(self, handle: WorkerHandle) -> None:
        """Stop a process, whatever state it is in."""
        try:
            await within(handle.stop(), CALL_S, "the stop of a worker")
        except Exception as error:
            log.warning("worker.stop_failed reason=%r", error)
        self._handles.discard(handle)

    async def _serve(self, place: WorkerPlace, handle: WorkerHandle) -> None:
        """Give a worker its settings, its models and its epoch. From its last line on it is polled, and told of new models."""
        name = f"worker {place.worker_id}"
        store_address = await within(self._launcher.store_address(handle), STORE_S, f"the weight store of {name}")
        seat = self._seating.seats[place.worker_id]
        settings = worker_settings(self.config, place.role, place.worker_id, store_address, tuple(self._specs.values()), seat)
        hello = await within(handle.start(settings), TEACH_S, f"the start of {name}")
        known: set[ModelSpec] = set()
        await self._teach(handle, known)
        place.epoch = self.controller.join(hello).epoch
        await within(handle.serve(place.epoch), CALL_S, f"the first step of {name}")
        await self._teach(handle, known)
        place.handle = handle
        log.info("worker.joined worker=%s epoch=%d address=%s", place.worker_id, place.epoch, hello.address)

    async def _teach(self, handle: WorkerHandle, known: set[ModelSpec]) -> None:
        """Every model that it does not know, those that come meanwhile included: on return there is none."""
        while missing := [spec for spec in self._specs.values() if spec not in known]:
            for spec in missing:
                await within(handle.add_model(spec), TEACH_S, f"adding {spec.model} to a worker")
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
        await asyncio.gather(*(self._poll(place) for place in self._places))
        expired = self.controller.expired()
        for place in self._places:
            if place.worker_id in expired.workers:
                self._lose(place, "its lease is over")
        self._steer()
        orphan_s = self.config.liveness.orphan_timeout_s
        if expired.is_orphaned and orphan_s is not None and self._clock() - self._serving_since_s > orphan_s:  # the start may take longer
            log.info("supervisor.orphaned")
            self._end()

    def _steer(self) -> None:
        move = self.controller.steer()
        if move is not None:
            log.info("batch.move model=%s source=%s target=%s gain=%.2f", move.model, move.source, move.target, move.gain)
            self._spawn(self._move(self._place(move.source), move.model))

    async def _move(self, place: WorkerPlace | None, model: ModelName | None) -> None:
        """Ask a worker to give up a model's sequences, or all. One that does not answer loses its lease, not this call's patience."""
        if place is None or place.handle is None:
            return
        try:
            await within(place.handle.move(model), self.config.liveness.worker_lease_s, f"the move from worker {place.worker_id}")
        except PolymuxError as error:
            log.warning("batch.move_failed worker=%s reason=%s", place.worker_id, error)

    def _place(self, worker_id: WorkerId) -> WorkerPlace | None:
        return next((place for place in self._places if place.worker_id == worker_id), None)

    async def _poll(self, place: WorkerPlace) -> None:
        """Its report for the books. A silent worker has its lease to come back; one that is not in the books is replaced."""
        if place.handle is None:
            return
        try:
            async with asyncio.timeout(self.config.liveness.worker_lease_s / 2):
                self.controller.report(await place.handle.report())
        except (WorkerLost, StaleEpoch) as error:
            self._lose(place, str(error))
        except TimeoutError:
            log.warning("worker.silent worker=%s", place.worker_id)
        except Exception:
            log.exception("worker.poll_failed worker=%s", place.worker_id)

    def _lose(self, place: WorkerPlace, reason: str) -> None:
        """Take a worker out of the books, and start the next one in its place."""
        if place.handle is None:
            return  # on its way already
        log.warning("worker.lost worker=%s reason=%s", place.worker_id, reason)
        self.controller.lost(place.worker_id, place.epoch)
        handle, place.handle = place.handle, None
        self._spawn(self._discard(handle) if place.is_leaving else self._restart(place, handle))

    async def _restart(self, place: WorkerPlace, dead: WorkerHandle) -> None:
        """A new process in the old one's place; a worker that keeps dying stays down, and the log says so."""
        await self._discard(dead)
        while place.may_restart(self._clock()):
            handle: WorkerHandle | None = None
            try:
                handle = await self._launch(place)
                await self._serve(place, handle)
                return
            except Exception as error:  # whatever it was, the place is not to stay empty without a word
                log.warning("worker.restart_failed worker=%s reason=%r", place.worker_id, error)
                self.controller.lost(place.worker_id, place.epoch)
                if handle is not None:
                    await self._discard(handle)
        log.error("worker.abandoned worker=%s restarts=%d window_s=%.0f", place.worker_id, len(place.restarts), RESTART_WINDOW_S)

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
        topology, stats = asdict(self.controller.topology()), asdict(self.controller.stats())
        return {**topology, "devices": self._seating.plain(), "stats": stats}

    async def timeline(self, look: LookBack) -> dict[str, Any]:
        """What every worker did lately, as plain data (`timelines.py`): they are asked when somebody looks, not with each poll."""
        return await gather({one.worker_id: (one.role, one.handle.timeline if one.handle else None) for one in self._places}, look)

    async def drain(self, worker_id: WorkerId, timeout_s: float = DRAIN_S) -> None:
        """Empty a worker, then stop it: what runs there moves with its KV, what waits is placed elsewhere, and no client notices.

        Raises InvalidRequest for a worker that is not there or that nobody could stand in for, and DeadlineExceeded, it then goes on as
        before, when something would not leave it in time.
        """
        place = self._place(worker_id)
        if place is None or place.handle is None or place.is_leaving:
            raise InvalidRequest(f"worker {worker_id!r} is not serving, or is being drained already", param="worker")
        self.controller.drain(worker_id)
        place.is_leaving = True
        log.info("worker.draining worker=%s", worker_id)
        try:
            async with asyncio.timeout(timeout_s):
                while place.handle is not None and not self.controller.is_drained(worker_id):
                    await self._move(place, None)
                    await asyncio.sleep(DRAIN_STEP_S)
                    await self._poll(place)
        except TimeoutError:
            place.is_leaving = False
            self.controller.undrain(worker_id)
            raise DeadlineExceeded(f"worker {worker_id} still has work after {timeout_s:g} s, and goes on serving") from None
        except BaseException:
            place.is_leaving = False
            self.controller.undrain(worker_id)
            raise
        handle, place.handle = place.handle, None
        self.controller.lost(worker_id, place.epoch)
        if handle is not None:
            await self._discard(handle)
        log.info("worker.drained worker=%s", worker_id)

    async def add_model(self, model: ModelConfig) -> ModelSpec:
        """Register a model while serving. Raises CheckpointError or ConfigError, and then no new one is registered anywhere."""
        name = ModelName(model.name)
        async with self._adding:
            try:
                spec = await self._launcher.register(_source(model, self.config.pools.degrees))
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
        while left := [one for one in self._places if one.handle is not None and one.handle not in told]:
            place, handle = left[0], left[0].handle
            assert handle is not None
            told.add(handle)
            try:
                await within(handle.add_model(spec), TEACH_S, f"adding {spec.model} to worker {place.worker_id}")
            except WorkerLost as error:
                if place.handle is handle:
                    self._lose(place, str(error))

    async def _forget(self, model: ModelName) -> None:
        try:
            await self._launcher.forget(model)
        except Exception as error:  # the first error is the one to show
            log.warning("supervisor.forget_failed model=%s reason=%r", model, error)


def _source(model: ModelConfig, degrees: tuple[int, ...]) -> ModelSource:
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
        degrees=degrees,
    )
