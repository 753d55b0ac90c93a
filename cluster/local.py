"""The same cluster in one process: stores and workers as plain objects with their own threads and real sockets, no Ray.

For tests, notebooks and debuggers. What is saved is processes, not parts: every byte goes the way that it goes between actors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from polymux.actors.store_server import StoreServer
from polymux.actors.weight_store import ModelSource
from polymux.actors.worker import Worker, WorkerSettings
from polymux.cluster.config import ClusterConfig
from polymux.cluster.devices import Seat, Seating, Slot, choose, seat, this_host
from polymux.cluster.processes import WorkerHandle, WorkerPlace
from polymux.cluster.sizing import store_bytes
from polymux.cluster.supervisor import Supervisor
from polymux.transport.errors import WorkerLost
from polymux.transport.messages import LookBack, ModelSpec, WorkerHello, WorkerReport, WorkerTimeline
from polymux.transport.units import Epoch, ModelName

T = TypeVar("T")


class LocalHandle:
    """A worker in this process. Its blocking calls run in threads, so that the supervisor's loop goes on."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self._starting: asyncio.Task[WorkerHello] | None = None

    async def start(self, settings: WorkerSettings) -> WorkerHello:
        self._starting = asyncio.create_task(self._start(settings))
        return await asyncio.shield(self._starting)  # a thread cannot be cancelled; `stop` waits for it

    async def _start(self, settings: WorkerSettings) -> WorkerHello:
        self.worker = await asyncio.to_thread(Worker, settings)
        return await asyncio.to_thread(self.worker.start)

    async def serve(self, epoch: Epoch) -> None:
        await self._call(lambda worker: worker.serve(epoch))

    async def add_model(self, spec: ModelSpec) -> None:
        await self._call(lambda worker: worker.add_model(spec))

    async def report(self) -> WorkerReport:
        return await self._call(lambda worker: worker.report())

    async def timeline(self, look: LookBack) -> WorkerTimeline:
        return await self._call(lambda worker: worker.timeline(look))

    async def move(self, model: ModelName | None) -> None:
        await self._call(lambda worker: worker.move(model))

    async def stop(self) -> None:
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        worker, self.worker = self.worker, None
        if worker is not None:
            await asyncio.to_thread(worker.stop)

    async def _call(self, method: Callable[[Worker], T]) -> T:
        if self.worker is None:
            raise WorkerLost("this worker was stopped")
        return await asyncio.to_thread(method, self.worker)


class LocalLauncher:
    """One store and any number of workers, all here."""

    def __init__(self) -> None:
        self._store: StoreServer | None = None

    async def start_stores(self, budget_bytes: int | None, kv_bytes: int | None, layout: str, token: str) -> None:
        budget, tier = store_bytes(budget_bytes, kv_bytes)
        self._store = StoreServer(budget_bytes=budget, layout=layout, token=token, kv_bytes=tier)

    async def register(self, source: ModelSource) -> ModelSpec:
        assert self._store is not None
        return await asyncio.to_thread(self._store.register, source)

    async def forget(self, model: ModelName) -> None:
        assert self._store is not None
        self._store.forget(model)

    async def seat(self, config: ClusterConfig, places: Sequence[WorkerPlace]) -> Seating:
        """On the CPU, unless a pool asks for this process's GPU by name, which its workers then share."""
        hosts = (this_host(),) if "cuda" in (config.pools.prefill.device, config.pools.decode.device) else ()
        devices = choose(config, hosts)
        slots = [Slot(host=host, gpus=(0,)) for host in hosts]
        return Seating(
            devices=devices,
            seats={place.worker_id: seat(devices[place.role], slots[0]) if slots else Seat() for place in places},
        )

    async def launch(self, place: WorkerPlace, config: ClusterConfig) -> WorkerHandle:
        return LocalHandle()

    async def store_address(self, handle: WorkerHandle) -> str:
        assert self._store is not None
        return self._store.address

    async def stop(self) -> None:
        if self._store is not None:
            await asyncio.to_thread(self._store.close)
            self._store = None


class LocalCluster(Supervisor):
    """`async with LocalCluster(config) as cluster:` and it serves; it is its own control plane."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__(config, LocalLauncher())

    @property
    def workers(self) -> list[Worker]:
        return [m.handle.worker for m in self._places if isinstance(m.handle, LocalHandle) and m.handle.worker is not None]

    async def __aenter__(self) -> LocalCluster:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> Any:
        await self.stop()
