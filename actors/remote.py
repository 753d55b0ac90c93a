"""The Ray shells of the plain classes: the only file of this folder that imports Ray. Each method takes one message and returns one.

Methods are synchronous on a few threads, so that a report is never stuck behind a model that is being added.
"""

from __future__ import annotations

import logging

import ray
import torch

from polymux.actors.store_server import StoreServer
from polymux.actors.weight_store import ModelSource
from polymux.actors.worker import Worker, WorkerSettings
from polymux.transport.errors import WorkerLost
from polymux.transport.messages import LookBack, ModelSpec, WorkerHello, WorkerReport, WorkerTimeline
from polymux.transport.units import Epoch, ModelName

ACTOR_THREADS = 4


class WorkerActor:
    """One worker process. It exists before its settings do, so that processes boot while checkpoints are being packed."""

    def __init__(self, log_level: str) -> None:
        logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(message)s")
        self._worker: Worker | None = None

    @ray.method
    def node_id(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    @ray.method
    def start(self, settings: WorkerSettings) -> WorkerHello:
        torch.set_num_threads(settings.num_threads)
        self._worker = Worker(settings)
        return self._worker.start()

    @ray.method
    def serve(self, epoch: Epoch) -> None:
        self._started.serve(epoch)

    @ray.method
    def add_model(self, spec: ModelSpec) -> None:
        self._started.add_model(spec)

    @ray.method
    def report(self) -> WorkerReport:
        return self._started.report()

    @ray.method
    def move(self, model: ModelName | None) -> None:
        self._started.move(model)

    @ray.method
    def timeline(self, look: LookBack) -> WorkerTimeline:
        return self._started.timeline(look)

    @ray.method
    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop()

    @property
    def _started(self) -> Worker:
        if self._worker is None:
            raise WorkerLost("this worker was not started")
        return self._worker


class StoreActor:
    """One node's weight store and host tier."""

    def __init__(self, budget_bytes: int, kv_bytes: int, layout: str, token: str) -> None:
        self._store = StoreServer(budget_bytes=budget_bytes, layout=layout, token=token, kv_bytes=kv_bytes)

    @ray.method
    def address(self) -> str:
        return self._store.address

    @ray.method
    def register(self, source: ModelSource) -> ModelSpec:
        return self._store.register(source)

    @ray.method
    def forget(self, model: ModelName) -> None:
        self._store.forget(model)

    @ray.method
    def images(self) -> dict[ModelName, int]:
        return self._store.images()

    @ray.method
    def close(self) -> None:
        self._store.close()
