"""A worker: one process, one arena, one engine thread, one role of the pipeline, and the sockets around it. No Ray in here.

The transport's threads only post into the mailbox; the engine thread alone touches engine and role.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from polymux.actors.decode import DecodeRole
from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.grants import Grants
from polymux.actors.mailbox import Mailbox
from polymux.actors.meter import Meter
from polymux.actors.outbox import Outbox
from polymux.actors.prefill import PrefillRole
from polymux.actors.store_client import StoreClient
from polymux.actors.updates import failure
from polymux.disagg.prefill import prefill_policy
from polymux.disagg.turn_policies import turn_policy
from polymux.transport.errors import Overloaded, PolymuxError, WorkerLost
from polymux.transport.kv import KVEvent, KVSettings, KVSink, KVSource, OrderRef
from polymux.transport.messages import (
    Cancel,
    Generate,
    LookBack,
    ModelLoad,
    ModelSpec,
    Peer,
    Prefill,
    Role,
    WorkerHello,
    WorkerReport,
    WorkerTimeline,
)
from polymux.transport.region import Region, this_host
from polymux.transport.stream import WorkerServer
from polymux.transport.units import ClientId, Epoch, ModelName, WorkerId

log = logging.getLogger("polymux.worker")

STOP_S = 10.0  # for the engine thread to finish its step
PUBLISH_S = 0.1  # how old a busy worker's snapshot may be

_Snapshot = tuple[tuple[ModelLoad, ...], ModelName | None, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Everything a worker needs to know, in one value that crosses the process once."""

    worker_id: WorkerId
    role: Role
    arena_bytes: int
    engine: EngineSettings
    token: str = field(repr=False)  # the cluster's shared secret
    store_address: str
    host: str = "127.0.0.1"
    num_threads: int = 1
    policy: str  # of `disagg.prefill` or `disagg.multiplex`, by role
    policy_settings: tuple[tuple[str, float], ...] = ()
    kv: KVSettings = field(default_factory=KVSettings)
    probe_interval_s: float = 10.0  # how often an idle engine proves that it still computes


class Worker:
    """`start` listens and says hello; `serve` begins under the epoch that the controller gave; `stop` frees everything."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._region = Region.create(settings.arena_bytes)
        self._store = StoreClient(settings.store_address, settings.token)
        self._engine = Engine(self._region, settings.engine, self._store)
        self._meter = Meter()
        self._mailbox: Mailbox[Callable[[], None]] = Mailbox()
        self._server = WorkerServer(
            worker_id=settings.worker_id,
            token=settings.token,
            on_command=self._on_command,
            on_client_lost=lambda client_id: self._mailbox.tell(lambda: self._client_lost(client_id)),
            host=settings.host,
        )
        self._role: PrefillRole | DecodeRole | None = None
        self._outbox: Outbox | None = None
        self._kv: KVSource | KVSink | None = None
        self._thread = threading.Thread(target=self._run, name="polymux-engine", daemon=True)
        self._stopping = threading.Event()
        self._beat_s = self._engine.clock()
        self._published: _Snapshot = ((), None, self._engine.blocks.num_free_bytes, 0, 0)
        self._published_s = 0.0
        self._epoch = Epoch(0)
        self.address = ""

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> WorkerHello:
        """Listen, and describe this worker for the controller."""
        self.address = self._server.start()
        return self._hello()

    def serve(self, epoch: Epoch) -> None:
        """Let peers in as this incarnation, and step."""
        settings = self.settings
        hello = self._hello()
        peer = Peer(worker_id=settings.worker_id, epoch=epoch, address=self.address, host_id=hello.host_id, pid=hello.pid)
        self._epoch = epoch
        self._outbox = Outbox(peer, self._server.send)
        if settings.role is Role.PREFILL:
            source = KVSource(
                server=self._server,
                region=self._region,
                host_id=hello.host_id,
                on_order=self._on_order,
                on_cancel=lambda ref, reason: self._mailbox.tell(lambda: self._prefill.cancel(ref, reason)),
                on_released=lambda ref: self._mailbox.tell(partial(self._prefill.released, ref, self._engine.clock())),
                settings=settings.kv,
            )
            self._kv = source
            whole = {name: int(value) for name, value in settings.policy_settings}
            self._role = PrefillRole(self._engine, source, prefill_policy(settings.policy, **whole), self._meter, self._outbox)
        else:
            sink = KVSink(region=self._region, identity=peer, token=settings.token, on_event=self._on_kv_event, settings=settings.kv)
            self._kv = sink
            policy = turn_policy(settings.policy, **dict(settings.policy_settings))
            self._role = DecodeRole(self._engine, Grants(self._engine, sink, epoch), policy, self._meter, self._outbox)
        self._server.serve(epoch)
        self._thread.start()

    def add_model(self, spec: ModelSpec) -> None:
        """Make a model known here. Raises ConfigError when it could never run in this arena."""
        self._engine.add_model(spec)
        self._meter.add_model(spec)

    def stop(self) -> None:
        """Finish the step under way, drop every connection, free the arena. May be called twice."""
        self._stopping.set()
        self._mailbox.wake()
        if self._thread.is_alive():
            self._thread.join(STOP_S)
        if self._kv is not None:
            self._kv.close()
        self._server.close()
        if not self._thread.is_alive():
            self._engine.close()

    # -- from the transport's threads ---------------------------------------------------------------------------------

    def _on_command(self, client_id: ClientId, command: Generate | Cancel) -> None:
        if isinstance(command, Cancel):
            self._mailbox.tell(partial(self._cancel, command))
            return
        try:
            if not isinstance(self._role, DecodeRole):
                raise PolymuxError(f"worker {self.settings.worker_id} is a prefill worker and takes no Generate")
            self._mailbox.post(partial(self._role.accept, command, client_id))
        except PolymuxError as error:
            update = failure(command.sequence_id, len(command.output_ids) // 4, error)
            assert self._outbox is not None
            self._outbox.send_now(client_id, update)

    def _on_order(self, ref: OrderRef, prefill: Prefill) -> None:
        try:
            self._mailbox.post(partial(self._prefill.accept, prefill, ref))
        except Overloaded as error:
            assert isinstance(self._kv, KVSource)
            self._kv.fail(ref, error)

    def _on_kv_event(self, event: KVEvent) -> None:
        self._mailbox.tell(lambda: self._decode.kv_event(event))

    # -- the engine thread --------------------------------------------------------------------------------------------

    @property
    def _prefill(self) -> PrefillRole:
        assert isinstance(self._role, PrefillRole)
        return self._role

    @property
    def _decode(self) -> DecodeRole:
        assert isinstance(self._role, DecodeRole)
        return self._role

    def _cancel(self, command: Cancel) -> None:
        if isinstance(self._role, DecodeRole):
            self._role.cancel(command.sequence_id, command.reason)

    def _client_lost(self, client_id: ClientId) -> None:
        if isinstance(self._role, DecodeRole):
            self._role.client_lost(client_id)

    def _run(self) -> None:
        """Until `stop`, or an engine that no longer computes: `report` then says that this worker is lost, and another takes its place."""
        try:
            while not self._stopping.is_set():
                self._beat_s = self._engine.clock()
                if not self._turn() and not self._rest() and not self._probe():
                    log.error("worker.probe_failed worker=%s", self.settings.worker_id)
                    return
        except Exception:
            log.exception("worker.engine_died worker=%s", self.settings.worker_id)

    def _rest(self) -> bool:
        """Wait for what comes. True when something did; a stop whose wake-up was drained with the rest counts."""
        return self._stopping.is_set() or self._mailbox.wait(self._pause_s())

    def _turn(self) -> bool:
        """Take in what came, and step once. False when there was nothing to step."""
        assert self._role is not None and self._outbox is not None
        for event in self._mailbox.drain():
            self._guarded(event)
        worked = self._guarded(self._role.step)
        self._outbox.flush()
        if not worked or self._engine.clock() - self._published_s > PUBLISH_S:
            self._publish()
        return worked is not False

    def _guarded(self, work: Callable[[], bool | None]) -> bool | None:
        """Do it. An unexpected error ends every open sequence with its reason; what was posted behind it is still done."""
        assert self._role is not None
        try:
            return work()
        except Exception as error:
            log.exception("worker.step_failed worker=%s", self.settings.worker_id)
            self._role.fail_all(PolymuxError(f"worker {self.settings.worker_id}: {type(error).__name__}: {error}"))
            return None

    def _pause_s(self) -> float:
        assert self._role is not None
        deadline_s = self._role.next_deadline_s()
        until_s = self.settings.probe_interval_s if deadline_s is None else deadline_s - self._engine.clock()
        return min(max(until_s, 0.001), self.settings.probe_interval_s)

    def _probe(self) -> bool:
        try:
            return self._engine.probe()
        except Exception:
            log.exception("worker.probe worker=%s", self.settings.worker_id)
            return False

    # -- reports ------------------------------------------------------------------------------------------------------

    def report(self) -> WorkerReport:
        """What the controller is told. Safe from any thread: it reads what the engine thread last published, and how old its beat is.

        Raises WorkerLost when that thread has ended by itself.
        """
        has_started = self._thread.ident is not None
        if has_started and not self._thread.is_alive() and not self._stopping.is_set():
            raise WorkerLost(f"the engine thread of worker {self.settings.worker_id} has ended; its log says why")
        loads, active, free_bytes, blocks_out, num_open = self._published
        age_s = self._engine.clock() - self._beat_s
        is_idle = num_open == 0 and age_s < 2 * self.settings.probe_interval_s
        return WorkerReport(
            worker_id=self.settings.worker_id,
            epoch=self._epoch,
            active_model=active,
            loads=loads,
            costs=self._meter.costs(),
            switch_bytes_per_s=self._meter.switch_bytes_per_s,
            num_free_kv_bytes=free_bytes,
            num_blocks_out=blocks_out,
            last_step_age_s=None if is_idle else age_s,
            counters=self._meter.counters(self._kv.snapshot() if isinstance(self._kv, KVSink) else ()),  # one side counts a transfer
        )

    def timeline(self, look: LookBack) -> WorkerTimeline:
        """What this worker did lately. Safe from any thread."""
        spans = self._meter.timeline.spans(look.within_s, look.max_spans)
        return WorkerTimeline(worker_id=self.settings.worker_id, epoch=self._epoch, spans=spans)

    def _publish(self) -> None:
        """Swap in a new snapshot; one assignment, so that readers see the old one or the new one."""
        assert self._role is not None
        engine = self._engine
        self._published = (
            self._role.loads(),
            engine.residency.active,
            engine.blocks.num_free_bytes,
            engine.blocks.num_out,
            self._role.num_open,
        )
        self._published_s = engine.clock()

    def _hello(self) -> WorkerHello:
        return WorkerHello(
            worker_id=self.settings.worker_id,
            role=self.settings.role,
            address=self.address,
            host_id=this_host(),
            pid=os.getpid(),
            arena_bytes=self.settings.arena_bytes,
            num_threads=self.settings.num_threads,
        )
