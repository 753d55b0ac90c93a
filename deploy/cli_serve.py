"""Serving from the command line: a Ray of our own or a cluster that is there, up until a signal, then drained and taken down."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import ray

from polymux.actors.weights.checkpoint import Checkpoint
from polymux.cluster.bootstrap import find_controller, require_ray, start_local_ray
from polymux.cluster.config import ClusterConfig
from polymux.cluster.remote import RayControlPlane
from polymux.deploy.app import start_serving, stop_serving
from polymux.deploy.doctor import MAX_SOCKET_PATH, RAY_SOCKET
from polymux.deploy.listener import bind
from polymux.transport.errors import CheckpointError, ConfigError, PolymuxError, WorkerLost

log = logging.getLogger("polymux.serve")

WATCH_S = 5.0  # how often the cluster's state is compared with the last one seen
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal came while the cluster was starting, or a second one while it drained."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


class Signals:
    """What SIGINT and SIGTERM do: interrupt a start, end the wait, cut a drain short."""

    def __init__(self) -> None:
        self._came = threading.Event()
        self._is_waiting = False
        self._before: dict[signal.Signals, Any] = {}
        self.name = ""

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def install(self) -> None:
        """Again after Ray has come up, which takes SIGTERM for itself."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._is_waiting or self._came.is_set():
            raise Interrupted(number)
        self.name = signal.Signals(number).name
        self._came.set()

    def wait(self, seconds: float) -> bool:
        """Whether a signal came within so long. From the first call on, one ends the wait and interrupts nothing."""
        self._is_waiting = True
        return self._came.wait(seconds)


def serve(config: ClusterConfig, *, address: str | None) -> None:
    """Serve until SIGINT or SIGTERM, then drain; a second signal does not wait for open streams.

    Raises Interrupted for a signal during the start, WorkerLost when the controller dies, and what the start raises.
    """
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout, force=True)
    began_s = time.monotonic()
    models, pools = ",".join(model.name for model in config.models), config.pools
    log.info("serve.starting models=%s prefill=%d decode=%d ray=%s", models, pools.prefill.workers, pools.decode.workers, address or "own")
    with Signals() as signals, serving(config, address=address, on_joined=signals.install) as url:
        log.info("serve.ready url=%s seconds=%.1f models=%s", url, time.monotonic() - began_s, models)
        _watch(config, signals)
        log.info("serve.draining signal=%s", signals.name)
    log.info("serve.stopped")


@contextmanager
def serving(config: ClusterConfig, *, address: str | None = None, on_joined: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The base URL of a cluster that is up for as long as the block lasts. Without an address it runs on a Ray of its own."""
    if address is None:  # what can be found wrong in a second is not to cost the start of a Ray
        for model in config.models:
            Checkpoint.open(model.path)
        config = with_free_port(config)
    with _own_ray(config) if address is None else _joined(address):
        is_own = address is None
        on_joined()
        try:
            yield start_serving(config)
        except BaseException:
            with suppress(Exception):  # the first error is the one to show
                stop_serving(config, keep_serve=is_own)
            raise
        stop_serving(config, keep_serve=is_own)


def with_free_port(config: ClusterConfig) -> ClusterConfig:
    """The configuration with port 0 replaced by a free one. Raises ConfigError for a taken one, before Ray is started for nothing."""
    with bind(config.serve.host, config.serve.port, is_shared=False) as probe:
        port = probe.getsockname()[1]
    return config.model_copy(update={"serve": config.serve.model_copy(update={"port": port})})


def require_listener(address: str, deadline_s: float = 5.0) -> None:
    """Raise PolymuxError when nobody listens at "HOST:PORT": Ray would try for minutes. Other forms of address are Ray's to judge."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), deadline_s).close()
    except (OSError, OverflowError) as error:
        raise PolymuxError(f"no Ray cluster answers at {address}: {error}; start one (ray start --head), or leave --address out") from None


@contextmanager
def _joined(address: str) -> Iterator[None]:
    require_listener(address)
    require_ray(address)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_ray(config: ClusterConfig) -> Iterator[None]:
    """Its logs go with it, unless something went wrong that they may explain."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder + RAY_SOCKET)) > MAX_SOCKET_PATH and Path("/tmp").is_dir():
        folder = "/tmp"
    temp_dir = tempfile.mkdtemp(prefix="polymux-ray-", dir=folder)
    is_kept = False
    try:
        start_local_ray(config.pools.num_ranks, temp_dir)
        yield
    except (ConfigError, CheckpointError):
        raise
    except Exception:
        is_kept = True
        raise
    finally:
        ray.shutdown()
        if is_kept:
            log.error("ray.logs_kept path=%s", Path(temp_dir) / "session_latest" / "logs")
        else:
            shutil.rmtree(temp_dir, ignore_errors=True)


def _watch(config: ClusterConfig, signals: Signals) -> None:
    """Log what workers compute on, and then what changes, until a signal comes. Raises WorkerLost when the controller is gone."""
    actor = find_controller(config)
    if actor is None:
        raise WorkerLost("the controller ended as soon as it had started; see Ray's logs")
    control, seen, edges = RayControlPlane(actor, deadline_s=10.0), dict[str, str](), frozenset[str]()
    while not signals.wait(WATCH_S):
        try:
            topology = asyncio.run(control.topology())
        except TimeoutError:
            log.warning("controller.silent seconds=10")
            continue
        states = _states(topology)
        if not seen:
            log.info("devices.chosen %s", topology["devices"]["summary"])
        for name, state in states.items():
            if seen and seen.get(name) != state:
                log.info("%s state=%s was=%s", name, state, seen.get(name, "unknown"))
        for edge in sorted(_edges(topology) - edges):
            log.info(edge)
        seen, edges = states, _edges(topology)


def _states(topology: Mapping[str, Any]) -> dict[str, str]:
    """What is worth a log line when it changes."""
    states = {f"worker.state worker={worker['worker_id']} epoch={worker['epoch']}": str(worker["state"]) for worker in topology["workers"]}
    ready = "yes" if topology["is_ready"] else "no: " + "; ".join(topology["reasons"])
    return states | {"cluster.ready": ready}


def _edges(topology: Mapping[str, Any]) -> frozenset[str]:
    """How KV comes to each worker, and why so."""
    return frozenset(
        f"kv.edge worker={worker['worker_id']} peer={edge['peer']} backend={edge['backend']} reason={edge['reason']!r}"
        for worker in topology["workers"]
        for edge in worker["edges"]
    )
