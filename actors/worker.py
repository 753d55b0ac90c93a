"""A worker: one process, one arena, one engine thread, both roles of the pipeline, and the sockets around it. No Ray in here.

The transport's threads only post into the mailbox; the engine thread alone touches engine and roles. Which role a worker plays is what it
is sent: prompts from decode workers, sequences from front doors, or both.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from polymux.actors.copier import Copier
from polymux.actors.costs import CostFile, device_kind
from polymux.actors.decode import DecodeRole
from polymux.actors.device import open_device
from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.grants import Grants
from polymux.actors.host_prefixes import HostPrefixes
from polymux.actors.host_tier import HostTier
from polymux.actors.kept import KEEP_S, KeptSequences
from polymux.actors.local_orders import LocalOrders
from polymux.actors.mailbox import Mailbox
from polymux.actors.meter import Meter
from polymux.actors.outbox import Outbox
from polymux.actors.parallel.leader import Ranks, RankSettings
from polymux.actors.prefill import PrefillRole
from polymux.actors.store_client import StoreClient
from polymux.actors.turns import Turns, Work, by_model
from polymux.actors.updates import failure
from polymux.disagg.multiplex import Turn
from polymux.disagg.phase import Phase
from polymux.disagg.prefill import PrefillStep, prefill_policy
from polymux.disagg.turn_policies import turn_policy
from polymux.transport.errors import Overloaded, PolymuxError, WorkerLost
from polymux.transport.kv import KVSettings, KVSink, KVSource, OrderRef
from polymux.transport.messages import (
    Cancel,
    Generate,
    LookBack,
    ModelLoad,
    ModelSpec,
    Peer,
    Prefill,
    Role,
    Shard,
    WorkerHello,
    WorkerReport,
    WorkerTimeline,
)
from polymux.transport.region import this_host
from polymux.transport.stream import WorkerServer
from polymux.transport.units import NO_IDS, ClientId, Epoch, ModelName, PackedIds, WorkerId

log = logging.getLogger("polymux.worker")

STOP_S = 10.0  # for the engine thread to finish its step
MARKS_S = 0.5  # how old its list of cached prefixes may be
SAVE_S = 60.0  # between two writes of the costs
PUBLISH_S = 0.1  # how old a busy worker's snapshot may be


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What the engine thread last said of itself."""

    num_free_kv_bytes: int
    num_used_kv_bytes: int = 0
    num_free_host_bytes: int | None = None
    num_blocks_out: int = 0
    active: ModelName | None = None
    loads: tuple[ModelLoad, ...] = ()
    prefills: tuple[ModelLoad, ...] = ()
    num_open: int = 0
    cached_prefixes: PackedIds = NO_IDS


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Everything a worker needs to know, in one value that crosses the process once."""

    worker_id: WorkerId
    role: Role  # its first assignment; the controller may give it the other, or both
    arena_bytes: int
    engine: EngineSettings
    token: str = field(repr=False)  # the cluster's shared secret
    store_address: str
    host: str = "127.0.0.1"
    num_threads: int = 1  # of each rank
    num_ranks: int = 1  # processes of this instance, which share every model; arena and engine are those of each
    rank_timeout_s: float = 30.0  # a rank that answers no other for so long is lost, and the instance with it
    prefill_policy: str = "deadline"  # of `disagg.prefill`
    prefill_settings: tuple[tuple[str, float], ...] = ()
    decode_policy: str = "slack"  # of `disagg.turn_policies`
    decode_settings: tuple[tuple[str, float], ...] = ()
    kv: KVSettings = field(default_factory=KVSettings)
    keep_s: float = KEEP_S  # how long a sequence that was given up here waits with its KV for the worker that goes on
    costs_path: str | None = None  # folder of the costs that outlive a worker
    probe_interval_s: float = 10.0  # how often an idle engine proves that it still computes


class Worker:
    """`start` listens and says hello; `serve` begins under the epoch that the controller gave; `stop` frees everything."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._device = open_device(settings.engine.device)
        self._region = self._device.create(settings.arena_bytes)
        self._store = StoreClient(settings.store_address, settings.token, Shard(rank=0, num_ranks=settings.num_ranks))
        self._mailbox: Mailbox[Callable[[], None]] = Mailbox()
        self._ranks = Ranks(_rank_settings(settings), self._mailbox.wake, self._device) if settings.num_ranks > 1 else None
        self._engine = Engine(self._region, settings.engine, self._store, device=self._device, ranks=self._ranks)
        device = self._device.torch_device
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._device_kind = device_kind(settings.num_threads, settings.num_ranks, gpu=gpu)
        self._cost_file = CostFile(settings.costs_path, self._device_kind) if settings.costs_path else None
        self._meter = Meter(saved_costs=self._cost_file.load() if self._cost_file is not None else None)
        self._saved_s = self._engine.clock()
        self._engine.residency.on_loaded = self._meter.loaded
        self._tier = HostTier.attach(settings.store_address, settings.token)
        copy_blocks = self._engine.device.copy_blocks
        self._copier = Copier(self._mailbox.tell, copy=copy_blocks) if self._tier is not None else None
        if self._tier is not None and settings.engine.prefix_caching:
            self._engine.prefixes.host = HostPrefixes(self._tier, copy_blocks)
        self._server = WorkerServer(
            worker_id=settings.worker_id,
            token=settings.token,
            on_command=self._on_command,
            on_client_lost=lambda client_id: self._mailbox.tell(lambda: self._client_lost(client_id)),
            host=settings.host,
        )
        self._prefill: PrefillRole  # the roles and their ends of KV migration: from `serve` on
        self._decode: DecodeRole
        self._turns: Turns
        self._outbox: Outbox
        self._source: KVSource | None = None
        self._sink: KVSink | None = None
        self._migrating = self._device.migrating(self._region)
        self._thread = threading.Thread(target=self._run, name="polymux-engine", daemon=True)
        self._stopping = threading.Event()
        self._beat_s = self._engine.clock()
        self._published = _Snapshot(self._engine.blocks.num_free_bytes)
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
        hello = self._hello()
        peer = Peer(worker_id=hello.worker_id, epoch=epoch, address=self.address, host_id=hello.host_id, pid=hello.pid)
        self._epoch = epoch
        self._outbox = Outbox(peer, self._server.send)
        self._source = self._make_source(hello.host_id)
        self._sink = KVSink(
            region=self._migrating,
            followers=self._ranks.regions if self._ranks is not None else (),
            identity=peer,
            token=self.settings.token,
            on_event=lambda event: self._mailbox.tell(lambda: self._decode.kv_event(event)),
            settings=self.settings.kv,
        )
        self._make_roles(peer, self._source, self._sink)
        self._server.serve(epoch)
        self._thread.start()

    def _make_source(self, host_id: str) -> KVSource:
        def order(ref: OrderRef, prefill: Prefill) -> None:
            try:
                self._mailbox.post(lambda: self._prefill.accept(prefill, ref))
            except Overloaded as error:
                source.fail(ref, error)

        source = KVSource(
            server=self._server,
            region=self._migrating,
            followers=self._ranks.regions if self._ranks is not None else (),
            host_id=host_id,
            on_order=order,
            on_cancel=lambda ref, reason: self._mailbox.tell(lambda: self._prefill.cancel(ref, reason)),
            on_released=lambda ref: self._mailbox.tell(partial(self._prefill.released, ref, self._engine.clock())),
            settings=self.settings.kv,
        )
        return source

    def _make_roles(self, peer: Peer, source: KVSource, sink: KVSink) -> None:
        settings, engine = self.settings, self._engine
        local, kept = LocalOrders(engine, source, self._mailbox.tell), KeptSequences(engine, settings.keep_s)
        self._turns = Turns(engine, self._meter, turn_policy(settings.decode_policy, **dict(settings.decode_settings)))
        whole = {name: int(value) for name, value in settings.prefill_settings}
        policy = prefill_policy(settings.prefill_policy, **whole)
        self._prefill = PrefillRole(engine, local, policy, self._meter, self._outbox, kept, on_prompt=self._turns.came)
        grants = Grants(engine, sink, local, peer)
        self._decode = DecodeRole(engine, grants, self._turns, self._meter, self._outbox, kept, self._tier, self._copier)
        local.connect(self._prefill, self._decode)

    def add_model(self, spec: ModelSpec) -> None:
        """Make a model known here. Raises ConfigError when it could never run in this arena, or has no weights for so many ranks."""
        spec = spec.on_ranks(self.settings.num_ranks)
        self._engine.add_model(spec)
        self._meter.add_model(spec)

    def move(self, model: ModelName | None = None) -> None:
        """Give up the sequences of one model, or all, at the next token boundary; their clients place them elsewhere. Returns at once.

        Raises Overloaded when the worker is too far behind.
        """
        self._mailbox.post(lambda: self._decode.move(model))

    def stop(self) -> None:
        """Finish the step under way, drop every connection, free the arena. May be called twice."""
        self._stopping.set()
        self._mailbox.wake()
        if self._thread.is_alive():
            self._thread.join(STOP_S)
        has_copied = self._copier is None or self._copier.close()
        for end in (self._sink, self._source):
            if end is not None:
                end.close()
        self._server.close()
        if self._migrating is not self._region:
            self._migrating.close()
        self._save_costs(0.0)
        if not self._thread.is_alive() and has_copied:
            if self._tier is not None:
                self._tier.close()
            self._engine.close()

    # -- from the transport's threads ---------------------------------------------------------------------------------

    def _on_command(self, client_id: ClientId, command: Generate | Cancel) -> None:
        if isinstance(command, Cancel):
            self._mailbox.tell(partial(self._cancel, command))
            return
        try:
            self._mailbox.post(partial(self._decode.accept, command, client_id))
        except PolymuxError as error:
            self._outbox.send_now(client_id, failure(command.sequence_id, len(command.output_ids) // 4, error))

    def _cancel(self, command: Cancel) -> None:
        self._decode.cancel(command.sequence_id, command.reason)

    def _client_lost(self, client_id: ClientId) -> None:
        self._decode.client_lost(client_id)

    # -- the engine thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Until `stop`, or an engine that no longer computes: `report` then says that this worker is lost, and another takes its place."""
        try:
            self._device.enter()
            while not self._stopping.is_set():
                self._beat_s = self._engine.clock()
                is_well = self._turn() or self._rest() or self._probe()
                if self._engine.lost is not None:
                    self._give_up(self._engine.lost)
                    return
                if not is_well:
                    log.error("worker.probe_failed worker=%s", self.settings.worker_id)
                    return
        except Exception:
            log.exception("worker.engine_died worker=%s", self.settings.worker_id)

    def _give_up(self, error: PolymuxError) -> None:
        """Nothing will be computed here any more: everybody is told, and hung up on, and places anew what was here."""
        self._prefill.fail_all(error)
        self._decode.fail_all(error)
        self._outbox.flush()
        self._publish()
        for end in (self._sink, self._source, self._server):
            assert end is not None
            end.close()
        for event in self._mailbox.drain():  # what the ends had still to say: every block is free again
            self._guarded(event)

    def _rest(self) -> bool:
        """Wait for what comes. True when something did; a stop whose wake-up was drained with the rest counts."""
        return self._stopping.is_set() or self._mailbox.wait(self._pause_s())

    def _turn(self) -> bool:
        """Take in what came, and step once. False when there was nothing to step."""
        self._take_in()
        worked = self._guarded(self._step)
        self._outbox.flush()
        if not worked or self._engine.clock() - self._published_s > PUBLISH_S:
            self._publish()
        return worked is not False

    def _take_in(self) -> bool:
        events = self._mailbox.drain()
        for event in events:
            self._guarded(event)
        return bool(events)

    def _step(self) -> bool:
        """One step of the model whose turn it is. A worker that only prefills has no turns: there its prefill policy decides."""
        self._decode.prepare()
        if self._take_in():  # its orders to this worker: prompts before the turn is chosen, not a step later
            self._decode.prepare()
        if not self._decode.num_open:
            has_settled = self._decode.settle()
            return self._prefill.step() or has_settled
        work = by_model(self._decode.running(), self._prefill.prompts())
        wanted = self._decode.models | self._prefill.models
        while (turn := self._turns.current(work)) is not None:
            if self._step_in(turn, work[turn.model], wanted):
                return True
            work[turn.model].running.clear()  # no block for its oldest: another model's turn
            if not work[turn.model].prompts:
                del work[turn.model]
            self._turns.end()
        return self._decode.settle()

    def _step_in(self, turn: Turn, work: Work, wanted: frozenset[ModelName]) -> bool:
        if self._turns.phase(turn.model, work) is Phase.DECODE:
            return self._decode.step(turn, wanted)
        self._decode.settle()
        step = PrefillStep(model=turn.model, chunks=self._turns.chunks(work), prefetch=turn.prefetch)
        self._prefill.run(step, wanted, on_switch=self._turns.began)
        return True

    def _guarded(self, work: Callable[[], bool | None]) -> bool | None:
        """Do it. An unexpected error ends every open sequence with its reason; what was posted behind it is still done."""
        try:
            return work()
        except Exception as error:
            log.exception("worker.step_failed worker=%s", self.settings.worker_id)
            reason = PolymuxError(f"worker {self.settings.worker_id}: {type(error).__name__}: {error}")
            self._prefill.fail_all(reason)
            self._decode.fail_all(reason)
            return None

    def _pause_s(self) -> float:
        now_s, probe_s = self._engine.clock(), self.settings.probe_interval_s
        deadlines = (self._prefill.next_deadline_s(), self._decode.next_deadline_s())
        until_s = min((deadline_s - now_s for deadline_s in deadlines if deadline_s is not None), default=probe_s)
        return min(max(until_s, 0.001), probe_s)

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
        self._save_costs(SAVE_S)
        seen, ranks = self._published, self.settings.num_ranks
        age_s = self._engine.clock() - self._beat_s
        is_idle = seen.num_open == 0 and age_s < 2 * self.settings.probe_interval_s
        return WorkerReport(
            worker_id=self.settings.worker_id,
            epoch=self._epoch,
            active_model=seen.active,
            loads=seen.loads,
            prefills=seen.prefills,
            costs=self._meter.costs(),
            switch_bytes_per_s=ranks * self._meter.switch_bytes_per_s,
            num_free_kv_bytes=ranks * seen.num_free_kv_bytes,
            num_used_kv_bytes=ranks * seen.num_used_kv_bytes,
            num_free_host_bytes=seen.num_free_host_bytes,
            num_blocks_out=seen.num_blocks_out,
            cached_prefixes=seen.cached_prefixes,
            last_step_age_s=None if is_idle else age_s,
            edges=self._sink.edges() if self._sink is not None else (),
            counters=self._meter.counters(self._sink.snapshot() if self._sink is not None else ()),  # one side counts a transfer
        )

    def timeline(self, look: LookBack) -> WorkerTimeline:
        """What this worker did lately. Safe from any thread."""
        spans = self._meter.timeline.spans(look.within_s, look.max_spans)
        return WorkerTimeline(worker_id=self.settings.worker_id, epoch=self._epoch, spans=spans)

    def _save_costs(self, interval_s: float) -> None:
        now_s = self._engine.clock()
        if self._cost_file is not None and now_s - self._saved_s >= interval_s:
            self._saved_s = now_s
            self._cost_file.save(self._meter.learned.observed())

    def _publish(self) -> None:
        """Swap in a new snapshot; one assignment, so that readers see the old one or the new one."""
        engine = self._engine
        num_open = self._prefill.num_open + self._decode.num_open
        self._published = _Snapshot(
            num_free_kv_bytes=engine.blocks.num_free_bytes,
            num_used_kv_bytes=engine.blocks.num_used_bytes,
            num_free_host_bytes=self._tier.num_free_bytes if self._tier is not None else None,
            num_blocks_out=engine.blocks.num_out + (self._tier.blocks.num_out if self._tier is not None else 0),
            active=engine.residency.active,
            loads=self._decode.loads(),
            prefills=self._prefill.loads(),
            num_open=num_open,
            cached_prefixes=engine.prefixes.marks(MARKS_S if num_open else 0.0),
        )
        self._published_s = engine.clock()

    def _hello(self) -> WorkerHello:
        return WorkerHello(
            worker_id=self.settings.worker_id,
            role=self.settings.role,
            address=self.address,
            host_id=this_host(),
            pid=os.getpid(),
            arena_bytes=self.settings.num_ranks * self.settings.arena_bytes,
            num_threads=self.settings.num_threads,
            num_ranks=self.settings.num_ranks,
            device_kind=self._device_kind,
        )


def _rank_settings(settings: WorkerSettings) -> RankSettings:
    return RankSettings(
        worker_id=settings.worker_id,
        num_ranks=settings.num_ranks,
        device=settings.engine.device,
        arena_bytes=settings.arena_bytes,
        weight_reserve_bytes=settings.engine.weight_reserve_bytes,
        max_num_seqs=settings.engine.max_num_seqs,
        num_threads=settings.num_threads,
        batch_invariant=settings.engine.batch_invariant,
        store_address=settings.store_address,
        token=settings.token,
        timeout_s=settings.rank_timeout_s,
    )
