"""A cluster with a process for each worker and no Ray: the real supervisor, controller and workers, and one weight store for all clusters.

Several clusters stand side by side and take turns, so that policies meet the same machine in the same minutes; those that wait sleep.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from polymux.actors.store_server import StoreServer
from polymux.actors.weight_store import ModelSource
from polymux.cluster.config import ClusterConfig
from polymux.cluster.devices import Seat, Seating, choose
from polymux.cluster.processes import WorkerPlace
from polymux.cluster.supervisor import Supervisor
from polymux.transport.errors import WorkerLost
from polymux.transport.messages import ModelSpec, Peer, WorkerHello
from polymux.transport.units import Epoch, ModelName, WorkerId

STOP_S = 10.0
KV_FRACTION = 0.3  # of an arena; the rest holds weights
PREFILL = {"slack": "deadline", "wrr": "grouped_fcfs"}  # each turn policy with the prefill policy it belongs to


def plain_worker(*settings: Any) -> Any:
    from polymux.actors.worker import Worker

    return Worker(*settings)


def serve_worker(calls: Connection, make: Callable[..., Any]) -> None:
    """What a worker's process runs: methods of `Worker` by name, until the pipe closes. `make` builds it, from its settings."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    worker: Any = None
    while True:
        try:
            name, arguments = calls.recv()
        except EOFError:
            break
        try:
            if name == "start":
                worker = make(*arguments)
            answer: Any = getattr(worker, name)(*arguments if name != "start" else ())
        except Exception as error:
            answer = error
        calls.send(answer)
    if worker is not None:
        worker.stop()


class ProcessHandle:
    """A worker in a process of its own. Any method of `Worker` may be awaited; `peer` is what others dial."""

    def __init__(self, make: Callable[..., Any] = plain_worker) -> None:
        context = multiprocessing.get_context("forkserver")
        self._calls, theirs = context.Pipe()
        self._process = context.Process(target=serve_worker, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._lock = threading.Lock()  # one call at a time in the pipe
        self._hello: WorkerHello | None = None
        self.peer: Peer | None = None

    async def start(self, settings: Any) -> WorkerHello:
        self._hello = await self._call("start", settings)
        return self._hello

    async def serve(self, epoch: Epoch) -> None:
        await self._call("serve", epoch)
        hello = self._hello
        assert hello is not None
        self.peer = Peer(worker_id=hello.worker_id, epoch=epoch, address=hello.address, host_id=hello.host_id, pid=hello.pid)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self._call(name, *arguments)

    async def stop(self) -> None:
        """Close the pipe, which ends the process; kill it where that takes too long."""
        self._calls.close()
        await asyncio.to_thread(self._process.join, STOP_S)
        if self._process.is_alive():
            self._process.kill()

    async def _call(self, name: str, *arguments: Any) -> Any:
        return await asyncio.to_thread(self._exchange, name, arguments)

    def _exchange(self, name: str, arguments: Sequence[Any]) -> Any:
        try:
            with self._lock:
                self._calls.send((name, arguments))
                answer = self._calls.recv()
        except (EOFError, OSError) as error:
            raise WorkerLost(f"the worker's process is gone: {error!r}") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


class SharedStore:
    """The node's weight store. Every cluster registers the same models; each image is built once."""

    def __init__(self, budget_bytes: int, token: str) -> None:
        self.token = token
        self._server = StoreServer(budget_bytes=budget_bytes, layout="auto", token=token)
        self._specs: dict[ModelName, ModelSpec] = {}

    @property
    def address(self) -> str:
        return self._server.address

    def register(self, source: ModelSource) -> ModelSpec:
        if source.model not in self._specs:
            self._specs[source.model] = self._server.register(source)
        return self._specs[source.model]

    def close(self) -> None:
        self._server.close()


class ProcessLauncher:
    """For a supervisor: workers in processes, images from the shared store."""

    def __init__(self, store: SharedStore, make: Callable[..., Any] = plain_worker) -> None:
        self._store = store
        self._make = make
        self.handles: list[ProcessHandle] = []

    async def seat(self, config: ClusterConfig, places: Sequence[WorkerPlace]) -> Seating:
        """All on the CPU."""
        return Seating(devices=choose(config, ()), seats={place.worker_id: Seat() for place in places})

    async def start_stores(self, *_: Any) -> None:
        return None

    async def register(self, source: ModelSource) -> ModelSpec:
        return await asyncio.to_thread(self._store.register, source)

    async def forget(self, model: ModelName) -> None:
        return None

    async def launch(self, place: WorkerPlace, config: ClusterConfig) -> ProcessHandle:
        handle = ProcessHandle(self._make)
        self.handles.append(handle)
        return handle

    async def store_address(self, handle: ProcessHandle) -> str:
        return self._store.address

    async def stop(self) -> None:
        return None


class Cluster(Supervisor):
    """`async with` it. `peers` are its workers, by id."""

    def __init__(self, config: ClusterConfig, store: SharedStore, make: Callable[..., Any] = plain_worker) -> None:
        self._processes = ProcessLauncher(store, make)
        super().__init__(config, self._processes)  # type: ignore[arg-type]

    async def ask(self, name: str) -> list[Any]:
        """Every worker's answer to a method of this name."""
        return await asyncio.gather(*(getattr(handle, name)() for handle in self._processes.handles))

    @property
    def peers(self) -> dict[WorkerId, Peer]:
        found = (handle.peer for handle in self._processes.handles)
        return {peer.worker_id: peer for peer in found if peer is not None}

    async def reports(self) -> dict[WorkerId, dict[str, float]]:
        """Every worker's counters at this moment."""
        handles = [handle for handle in self._processes.handles if handle.peer is not None]
        answers = await asyncio.gather(*(handle.report() for handle in handles))
        return {report.worker_id: dict(report.counters) for report in answers}

    async def __aenter__(self) -> Cluster:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


_numbers = itertools.count()


def make_config(
    models: dict[str, Path], policy: str, arena_bytes: int, token: str, max_quota_s: float, *, costs_path: Path | None = None
) -> ClusterConfig:
    """Two workers with one thread each, both computing prompts and tokens. With `costs_path` what they learn is kept, and no batch moves.

    Nothing is refused: what comes too late is counted as late, for every policy alike.
    """
    pool = {"workers": 1, "num_threads": 1, "arena_bytes": arena_bytes}
    return ClusterConfig.from_dict(
        {
            "name": f"bench-multiplex-{next(_numbers)}",
            "models": [{"name": name, "path": str(path)} for name, path in models.items()],
            "pools": {"prefill": pool, "decode": pool, "split": "shared"},
            "engine": {"kv_fraction": KV_FRACTION, "probe_interval_s": 3600, "max_num_seqs": 64},
            "policies": {"decode": policy, "prefill": PREFILL[policy], "max_quota_s": max_quota_s, "rebalance": costs_path is None},
            "costs": {"path": str(costs_path) if costs_path else None},
            "limits": {"max_queued_requests": 100_000, "max_queued_tokens": 1 << 24, "ttft_refusal_factor": None},
            "liveness": {"report_interval_s": 0.5, "orphan_timeout_s": None, "worker_lease_s": 60.0, "client_lease_s": 600.0},
            "security": {"cluster_token": token},
        }
    )
