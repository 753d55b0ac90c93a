"""The cluster on Ray: the controller's actor, the launcher that makes worker and store actors, and typed calls to all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from polymux.actors.remote import ACTOR_THREADS, StoreActor, WorkerActor
from polymux.actors.weight_store import ModelSource
from polymux.actors.weights import builder
from polymux.actors.worker import WorkerSettings
from polymux.cluster.config import ClusterConfig, ModelConfig, PoolConfig
from polymux.cluster.devices import Seating
from polymux.cluster.gangs import ENVIRONMENT, Gangs
from polymux.cluster.processes import WorkerHandle, WorkerPlace
from polymux.cluster.sizing import num_threads, store_bytes
from polymux.cluster.supervisor import Supervisor
from polymux.transport import bulk_copy
from polymux.transport.errors import PeerLost, PolymuxError, WorkerLost
from polymux.transport.messages import Admit, LookBack, ModelSpec, Placement, Release, WorkerHello, WorkerReport, WorkerTimeline
from polymux.transport.units import ClientId, Epoch, ModelName, WorkerId

NAMESPACE = "polymux"
CPU_SHARE = 0.8  # of the cluster's CPUs that workers reserve where the configuration does not say; front doors need some
T = TypeVar("T")


async def call(reference: Awaitable[T]) -> T:
    """Await an actor's answer. A typed error comes out as it was raised there; a dead actor is WorkerLost."""
    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, PolymuxError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise WorkerLost(f"an actor is gone: {error}".splitlines()[0]) from error


class RayHandle:
    """A worker actor, as the supervisor sees it."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def start(self, settings: WorkerSettings) -> WorkerHello:
        hello: WorkerHello = await call(self.actor.start.remote(settings))
        return hello

    async def serve(self, epoch: Epoch) -> None:
        await call(self.actor.serve.remote(epoch))

    async def add_model(self, spec: ModelSpec) -> None:
        await call(self.actor.add_model.remote(spec))

    async def report(self) -> WorkerReport:
        report: WorkerReport = await call(self.actor.report.remote())
        return report

    async def timeline(self, look: LookBack) -> WorkerTimeline:
        timeline: WorkerTimeline = await call(self.actor.timeline.remote(look))
        return timeline

    async def move(self, model: ModelName | None) -> None:
        await call(self.actor.move.remote(model))

    async def stop(self) -> None:
        """Ask, then make sure: a frozen process is killed all the same."""
        try:
            async with asyncio.timeout(5.0):
                await call(self.actor.stop.remote())
        except (PolymuxError, RayTaskError, TimeoutError) as error:
            logging.getLogger("polymux.remote").warning("worker.stop_failed reason=%s", error or "no answer")
        finally:
            ray.kill(self.actor)


class RayLauncher:
    """Worker actors where Ray places them, and one weight store on each node that has a worker."""

    def __init__(self) -> None:
        self._gangs = Gangs()
        self._stores: dict[str, Any] = {}  # by node id; each knows every model of `_sources`
        self._lock = asyncio.Lock()  # a store that comes up and a model that is added must not miss each other
        self._sources: dict[ModelName, ModelSource] = {}
        self._store_arguments: tuple[int | None, int | None, str, str] = (None, None, "auto", "")

    async def start_stores(self, budget_bytes: int | None, kv_bytes: int | None, layout: str, token: str) -> None:
        """The store of the controller's own node; others come with the workers of their nodes."""
        self._store_arguments = (budget_bytes, kv_bytes, layout, token)
        await self._store(str(ray.get_runtime_context().get_node_id()))

    async def _store(self, node_id: str) -> Any:
        async with self._lock:
            if node_id not in self._stores:
                budget_bytes, kv_bytes, layout, token = self._store_arguments
                sizes = store_bytes(budget_bytes, kv_bytes)
                on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
                options = {"num_cpus": 0, "max_concurrency": ACTOR_THREADS, "scheduling_strategy": on_node}
                environment = {"env_vars": dict(builder.ENVIRONMENT)}
                store = ray.remote(StoreActor).options(runtime_env=environment, **options).remote(*sizes, layout, token)
                for source in self._sources.values():
                    await call(store.register.remote(source))
                self._stores[node_id] = store
            return self._stores[node_id]

    async def register(self, source: ModelSource) -> ModelSpec:
        async with self._lock:
            answers = (call(store.register.remote(source)) for store in self._stores.values())
            specs: list[ModelSpec | BaseException] = await asyncio.gather(*answers, return_exceptions=True)  # no store is still at it
            for spec in specs:
                if isinstance(spec, BaseException):
                    raise spec
            described = [spec for spec in specs if isinstance(spec, ModelSpec)]
            if len({spec.digest for spec in described}) > 1:
                raise PolymuxError(f"models.{source.model}: {source.path} holds different weights on different nodes; copy the same to all")
            self._sources[source.model] = source
            return described[0]

    async def forget(self, model: ModelName) -> None:
        async with self._lock:
            self._sources.pop(model, None)
            await asyncio.gather(*(call(store.forget.remote(model)) for store in self._stores.values()))

    async def seat(self, config: ClusterConfig, places: Sequence[WorkerPlace]) -> Seating:
        return await self._gangs.seat(config, places)

    async def launch(self, place: WorkerPlace, config: ClusterConfig) -> WorkerHandle:
        options = self._gangs.options(place.worker_id) or _cpu_options(config, config.pools.of(place.role))
        environment = {**bulk_copy.TUNABLES, **ENVIRONMENT, **self._gangs.environment(place.worker_id)}
        actor = (
            ray.remote(WorkerActor)
            .options(max_concurrency=ACTOR_THREADS, runtime_env={"env_vars": environment}, **options)
            .remote(config.log_level)
        )
        await call(actor.node_id.remote())
        return RayHandle(actor)

    async def store_address(self, handle: WorkerHandle) -> str:
        assert isinstance(handle, RayHandle)
        store = await self._store(await call(handle.actor.node_id.remote()))
        address: str = await call(store.address.remote())
        return address

    async def stop(self) -> None:
        for store in self._stores.values():
            ray.kill(store)
        self._stores.clear()
        self._gangs.close()


def _cpu_options(config: ClusterConfig, pool: PoolConfig) -> dict[str, Any]:
    """What Ray reserves for a worker without a GPU: as many CPUs as it has threads, if the cluster has so many."""
    num_ranks = config.pools.num_ranks
    cluster: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    share = CPU_SHARE * cluster.get("CPU", 1.0) / num_ranks
    num_cpus = pool.num_cpus if pool.num_cpus is not None else round(min(num_threads(pool, num_ranks), share), 3)
    return {"num_cpus": pool.tensor_parallel * num_cpus, "resources": dict(pool.resources)}


class ControllerActor:
    """The one named actor: the supervisor with the controller's books, behind Ray calls."""

    def __init__(self, config: ClusterConfig) -> None:
        logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(message)s")
        self._supervisor = Supervisor(config, RayLauncher())
        self._starting: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bring everything up. Called by several front doors at once: they wait for the same start, and see the same error."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._supervisor.start())
            self._leave()
        await asyncio.shield(self._starting)
        if self._supervisor.is_stopping:
            raise WorkerLost("this controller has stopped, and its name is free in a second; try again")

    def _leave(self) -> None:
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._exit_when_stopped())

    async def _exit_when_stopped(self) -> None:
        """A controller without workers has nothing left to do; its name becomes free for the next."""
        await self._supervisor.stopped.wait()
        await asyncio.sleep(1.0)  # for the answers on their way
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    async def stop(self) -> None:
        self._leave()
        await self._supervisor.stop()

    async def config(self) -> ClusterConfig:
        return self._supervisor.config

    async def admit(self, ask: Admit) -> Placement:
        return await self._supervisor.admit(ask)

    async def release(self, release: Release) -> None:
        await self._supervisor.release(release)

    async def heartbeat(self, client_id: ClientId) -> None:
        await self._supervisor.heartbeat(client_id)

    async def models(self) -> tuple[ModelSpec, ...]:
        return await self._supervisor.models()

    async def topology(self) -> dict[str, Any]:
        return await self._supervisor.topology()

    async def timeline(self, look: LookBack) -> dict[str, Any]:
        return await self._supervisor.timeline(look)

    async def drain(self, worker_id: WorkerId, timeout_s: float) -> None:
        await self._supervisor.drain(worker_id, timeout_s)

    async def add_model(self, model: ModelConfig) -> ModelSpec:
        return await self._supervisor.add_model(model)


class RayControlPlane:
    """The controller, as a front door sees it."""

    def __init__(self, actor: Any, deadline_s: float = 30.0) -> None:
        self._actor = actor
        self._deadline_s = deadline_s

    async def admit(self, ask: Admit) -> Placement:
        placement: Placement = await self._call(self._actor.admit.remote(ask))
        return placement

    async def release(self, release: Release) -> None:
        await self._call(self._actor.release.remote(release))

    async def heartbeat(self, client_id: ClientId) -> None:
        await self._call(self._actor.heartbeat.remote(client_id))

    async def models(self) -> tuple[ModelSpec, ...]:
        models: tuple[ModelSpec, ...] = await self._call(self._actor.models.remote())
        return models

    async def topology(self) -> dict[str, Any]:
        topology: dict[str, Any] = await self._call(self._actor.topology.remote())
        return topology

    async def timeline(self, look: LookBack) -> dict[str, Any]:
        timeline: dict[str, Any] = await self._call(self._actor.timeline.remote(look))
        return timeline

    async def drain(self, worker_id: WorkerId, timeout_s: float) -> None:
        await self._call(self._actor.drain.remote(worker_id, timeout_s), timeout_s + self._deadline_s)

    async def _call(self, reference: Awaitable[T], deadline_s: float | None = None) -> T:
        deadline_s = deadline_s or self._deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                return await call(reference)
        except WorkerLost as error:
            raise PeerLost("the controller is gone; it is started again with the next front door") from error
        except TimeoutError:
            raise PeerLost(f"the controller did not answer within {deadline_s:.0f} s") from None
