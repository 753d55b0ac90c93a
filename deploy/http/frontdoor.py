"""The request path without HTTP: models and their tokenizers, admission, connections to workers, open requests, readiness.

One object per front-door replica, in one event loop. `deploy/http/api.py` puts HTTP on top; tests and benchmarks use it as it is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from polymux.actors.tokenizer import Tokenizer
from polymux.deploy.http.choice import Choice
from polymux.deploy.http.generation import Defaults, Generation
from polymux.deploy.http.links import Links
from polymux.deploy.http.request import OpenRequest
from polymux.deploy.http.settings import FrontDoorSettings
from polymux.deploy.metrics import Metrics
from polymux.transport.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    ModelNotFound,
    Overloaded,
    PeerLost,
    PolymuxError,
    Refused,
    WorkerLost,
)
from polymux.transport.messages import Admit, LookBack, ModelSpec, Placement, Release
from polymux.transport.units import ClientId, ModelName, WorkerId

log = logging.getLogger("polymux.frontdoor")

T = TypeVar("T")
RELEASE_ATTEMPTS = 3
TOPOLOGY_TTL_S = 0.5  # how long a snapshot serves /ready and /metrics
TOPOLOGY_TIMEOUT_S = 2.0
TIMELINE_TIMEOUT_S = 5.0  # its workers have two seconds each, all at once
UNKNOWN_MODEL_TTL_S = 0.2  # how long it is believed that there is no such model
NORMALIZER_SLACK = 4  # how many times shorter a tokenizer's normalizer may make a text
LAST_WORDS_S = 1.0  # for requests that a closing front door has ended to tell their clients


class ControlPlane(Protocol):
    """The controller, from where front doors stand. Every method may raise any PolymuxError; PeerLost means that nobody answers.

    `admit` of a request id that is in the books already is a replay: workers in `excluded` are replaced, the others stay.
    `release` of one that is not in the books does nothing: the front door sends one after every `admit`, refused ones included.
    `topology` is plain data: `is_ready`, `reasons`, `workers`, `models` of `cluster.topology.Topology`; `timeline` is `cluster.timelines`'.
    """

    async def admit(self, ask: Admit) -> Placement: ...

    async def release(self, release: Release) -> None: ...

    async def models(self) -> tuple[ModelSpec, ...]: ...

    async def topology(self) -> dict[str, Any]: ...

    async def timeline(self, look: LookBack) -> dict[str, Any]: ...

    async def drain(self, worker_id: WorkerId, timeout_s: float) -> None: ...

    async def heartbeat(self, client_id: ClientId) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model as the front door needs it to turn text into a plan."""

    spec: ModelSpec
    tokenizer: Tokenizer
    defaults: Defaults
    max_chars: int  # of a prompt, by far: not worth tokenizing beyond


def load_model(spec: ModelSpec) -> LoadedModel:
    """Raises CheckpointError."""
    tokenizer = Tokenizer.open(spec.path, spec.chat_template)
    return LoadedModel(
        spec=spec,
        tokenizer=tokenizer,
        defaults=Defaults.read(spec.path),
        max_chars=spec.max_model_len * tokenizer.longest_token() * NORMALIZER_SLACK,
    )


class FrontDoor:
    """`start` it in the loop that serves; `drain` refuses what is new; `aclose` waits for what is open, then lets go."""

    def __init__(self, settings: FrontDoorSettings, control: ControlPlane, *, metrics: Metrics | None = None) -> None:
        self.settings = settings
        self.metrics = metrics or Metrics()
        self._control = control
        self._links = Links(settings)
        self._open: set[OpenRequest] = set()
        self._is_draining = False
        self._has_ended = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._heartbeat: asyncio.Task[None] | None = None
        self._specs: tuple[ModelSpec, ...] = ()
        self._specs_at_s: float | None = None  # when the list came
        self._refreshing: asyncio.Task[tuple[ModelSpec, ...]] | None = None
        self._loaded: dict[ModelName, asyncio.Task[LoadedModel]] = {}
        self._topology: dict[str, Any] | None = None
        self._topology_until_s = 0.0

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to tell the controller that this front door lives. May be called twice."""
        if self._heartbeat is None:
            self._heartbeat = asyncio.get_running_loop().create_task(self._beat())

    def drain(self) -> None:
        """Refuse new requests from now on; open ones go on."""
        self._is_draining = True

    async def aclose(self) -> None:
        """Wait for open requests within the drain time-out, end the rest, close all connections. May be called twice."""
        self.drain()
        if not await self._is_empty(self.settings.drain_timeout_s):
            for request in list(self._open):
                request.fail(Draining("the server is shutting down"))
            await self._is_empty(LAST_WORDS_S)
        if self._refreshing is not None:
            self._refreshing.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.gather(self._heartbeat, return_exceptions=True)
        await self._links.close()

    async def _is_empty(self, within_s: float) -> bool:
        """Whether the last open request ends in time."""
        try:
            async with asyncio.timeout(within_s):
                while self._open:
                    self._has_ended.clear()
                    await self._has_ended.wait()
        except TimeoutError:
            return False
        return True

    @property
    def num_open_requests(self) -> int:
        return len(self._open)

    @property
    def num_open_links(self) -> int:
        return self._links.num_open

    # -- models -------------------------------------------------------------------------------------------------------

    async def models(self) -> tuple[ModelSpec, ...]:
        """Every registered model, parked ones too. A list past its time still serves while a new one is on its way, or cannot be had."""
        if self._specs_at_s is None:
            await self._refresh()
        elif time.monotonic() - self._specs_at_s > self.settings.models_ttl_s and not self._is_refreshing:
            self._spawn(self._refresh_quietly())
        return self._specs

    async def spec(self, name: str) -> ModelSpec:
        """Asks anew for a name that is not known. Raises ModelNotFound."""
        found = [spec for spec in await self.models() if spec.model == name]
        if not found and time.monotonic() - (self._specs_at_s or 0.0) > UNKNOWN_MODEL_TTL_S:
            await self._refresh()
            found = [spec for spec in self._specs if spec.model == name]
        if not found:
            raise ModelNotFound(f"model {name[:100]!r} is not registered here; GET /v1/models lists those that are", param="model")
        return found[0]

    @property
    def _is_refreshing(self) -> bool:
        return self._refreshing is not None and not self._refreshing.done()

    async def _refresh(self) -> None:
        """Get the list; those who ask at once share one call."""
        if self._refreshing is None or not self._is_refreshing:
            self._refreshing = asyncio.get_running_loop().create_task(self._call(self._control.models(), self.settings.control_timeout_s))
        self._specs = await asyncio.shield(self._refreshing)
        self._specs_at_s = time.monotonic()

    async def _refresh_quietly(self) -> None:
        try:
            await self._refresh()
        except PolymuxError as error:
            log.warning("controller.no_models reason=%s", error)

    async def model(self, name: str) -> LoadedModel:
        """A registered model with its tokenizer, read at its first use. Raises ModelNotFound, CheckpointError."""
        spec = await self.spec(name)
        task = self._loaded.get(spec.model)
        if task is not None and task.done() and (task.cancelled() or task.exception() or task.result().spec != spec):
            task = None
        if task is None:
            task = self._loaded[spec.model] = asyncio.get_running_loop().create_task(self._load(spec))
            self._forget_unregistered()
        return await asyncio.shield(task)

    async def _load(self, spec: ModelSpec) -> LoadedModel:
        model = await asyncio.to_thread(load_model, spec)
        log.info("model.loaded model=%s path=%s", spec.model, spec.path)
        return model

    def _forget_unregistered(self) -> None:
        for name in self._loaded.keys() - {spec.model for spec in self._specs}:
            del self._loaded[name]

    # -- requests -----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def open(self, generation: Generation, tokenizer: Tokenizer) -> AsyncIterator[OpenRequest]:
        """An admitted request, to iterate. Leaving the context ends it, whatever the way: workers stop, the controller is told once.

        Raises Draining, Overloaded, and what the controller refuses with.
        """
        self._check_room(generation.model)
        request = OpenRequest(
            generation,
            [Choice(i, one, tokenizer.detokenizer(), generation.stop) for i, one in enumerate(generation.sequences)],
            settings=self.settings,
            links=self._links,
            admission=self,
            metrics=self.metrics,
        )
        self._open.add(request)
        error: BaseException | None = None
        try:
            await request.start()
            yield request
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._open.discard(request)
            self._has_ended.set()
            request.close(self._outcome(request, error or request.error))

    def _check_room(self, model: ModelName) -> None:
        refusal: Refused | None = None
        if self._is_draining:
            refusal = Draining("the server is shutting down; try another", retry_after_s=5.0)
        elif len(self._open) >= self.settings.max_open_requests:
            refusal = Overloaded(f"{len(self._open)} requests are open here; try again", retry_after_s=1.0)
        if refusal is not None:
            self.metrics.rejected(model, refusal.code or "")
            raise refusal

    def _outcome(self, request: OpenRequest, error: BaseException | None) -> str:
        if request.is_finished:
            return "finished"
        if isinstance(error, Refused) and not request.is_admitted:
            self.metrics.rejected(request.generation.model, error.code or "")
            return "refused"
        if error is None or isinstance(error, Cancelled | asyncio.CancelledError | GeneratorExit):
            return "cancelled"
        return "failed"

    async def admit(self, ask: Admit, timeout_s: float) -> Placement:
        """For open requests. Raises DeadlineExceeded or Overloaded when the controller does not answer in time."""
        late = DeadlineExceeded("the request's deadline passed while it waited to be admitted")
        if timeout_s < self.settings.control_timeout_s:
            return await self._call(self._control.admit(ask), timeout_s, late)
        return await self._call(self._control.admit(ask), self.settings.control_timeout_s)

    def release(self, release: Release) -> None:
        """For open requests: goes out in the background, a few times if need be; the controller's reaper has the last word."""
        self._spawn(self._release(release))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Something that nobody waits for, until the front door closes."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _release(self, release: Release) -> None:
        for attempt in range(RELEASE_ATTEMPTS):
            try:
                return await self._call(self._control.release(release), self.settings.control_timeout_s)
            except PolymuxError as error:
                log.warning("request.release_failed request=%s attempt=%d reason=%s", release.request_id, attempt, error)
                await asyncio.sleep(0.2 * 2**attempt)
        return None

    # -- the controller -----------------------------------------------------------------------------------------------

    async def topology(self) -> dict[str, Any] | None:
        """The controller's snapshot, at most half a second old; None when it does not answer."""
        if time.monotonic() >= self._topology_until_s:
            try:
                self._topology = await self._call(self._control.topology(), TOPOLOGY_TIMEOUT_S)
            except PolymuxError as error:
                log.warning("controller.no_topology reason=%s", error)
                self._topology = None
            self._topology_until_s = time.monotonic() + TOPOLOGY_TTL_S
        return self._topology

    async def timeline(self, look: LookBack) -> dict[str, Any]:
        """What every worker did lately, with `now_s`, the wall-clock time from which its ages count. Raises Overloaded."""
        timeline = await self._call(self._control.timeline(look), TIMELINE_TIMEOUT_S)
        return {"now_s": time.time(), **timeline}

    async def drain_worker(self, worker_id: WorkerId, timeout_s: float) -> None:
        """Have a worker emptied and stopped. Raises InvalidRequest, DeadlineExceeded, Overloaded."""
        self._topology_until_s = 0.0
        await self._call(self._control.drain(worker_id, timeout_s), timeout_s + self.settings.control_timeout_s)

    async def unready(self) -> tuple[str, ...]:
        """Why this front door cannot serve now; empty when it can."""
        if self._is_draining:
            return ("draining",)
        topology = await self.topology()
        if topology is None:
            return ("the controller does not answer",)
        if not topology.get("is_ready"):
            return tuple(topology.get("reasons", ())) or ("the cluster is not ready",)
        return ()

    async def _beat(self) -> None:
        """Tell the controller that we live; say once when it stops answering, once when it answers again."""
        is_heard = True
        while True:
            try:
                await self._call(self._control.heartbeat(self.settings.client_id), self.settings.control_timeout_s)
                if not is_heard:
                    log.info("controller.back")
                is_heard = True
            except PolymuxError as error:
                if is_heard:
                    log.warning("controller.silent reason=%s", error)
                is_heard = False
            await asyncio.sleep(self.settings.heartbeat_interval_s)

    async def _call(self, call: Awaitable[T], timeout_s: float, late: PolymuxError | None = None) -> T:
        """A call to the controller that ends in time. Raises Overloaded when nobody answers, so that clients try again; or `late`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except TimeoutError:
            raise late or Overloaded(f"the controller did not answer within {timeout_s:g} s; try again", retry_after_s=1.0) from None
        except (PeerLost, WorkerLost) as error:
            raise Overloaded(f"the controller cannot be reached: {error.message}; try again", retry_after_s=1.0) from error
