"""Who is alive, which model is where, and where each request runs: the controller, as a plain class that one Ray actor wraps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from polymux.cluster import snapshots
from polymux.cluster.config import ClusterConfig
from polymux.cluster.dispatcher import Dispatcher
from polymux.cluster.ledger import Ledger, Request
from polymux.cluster.pool import Pool
from polymux.cluster.registry import Registry
from polymux.cluster.snapshots import ModelRecord, both_roles
from polymux.cluster.steering import Steering
from polymux.cluster.topology import Expired, Stats, Topology
from polymux.disagg.admission import AdmissionLimits, Verdict, decide
from polymux.disagg.balance import BatchMove
from polymux.disagg.placement import Link
from polymux.disagg.slo import SLO
from polymux.disagg.views import DoorView
from polymux.transport.errors import DeadlineExceeded, InvalidRequest, PolymuxError, StaleEpoch
from polymux.transport.messages import Admit, Joined, ModelLoad, ModelSpec, Placement, Release, Reported, WorkerHello, WorkerReport
from polymux.transport.units import ClientId, Epoch, ModelName, WorkerId

OUTCOMES = ("finished", "refused", "cancelled", "failed")  # of a Release
MISSES = ("refused", "failed", "expired")  # of the service, not of the client


class Controller:
    """Not thread-safe: one actor's event loop calls it. Every method returns at once.

    `clock` is monotonic seconds. `next_epoch` gives numbers above all that any controller of this cluster gave (nanoseconds since 1970).
    """

    def __init__(self, config: ClusterConfig, *, clock: Callable[[], float], next_epoch: Callable[[], int]) -> None:
        self._config = config
        self._clock = clock
        self._next_epoch = next_epoch
        self._started_at_s = self._called_at_s = clock()
        self._last_epoch = self._first_epoch = next_epoch()
        self._limits = AdmissionLimits(
            max_queued_requests=config.limits.max_queued_requests,
            max_queued_tokens=config.limits.max_queued_tokens,
            max_inflight_requests=config.limits.max_inflight_requests,
            ttft_refusal_factor=config.limits.ttft_refusal_factor,
        )
        self._registry = Registry(max_models=config.limits.max_models)
        self._records: dict[ModelName, ModelRecord] = {}
        self._pool = Pool(config)
        self._steering = Steering(config, self._pool)
        self._dispatcher = Dispatcher(config, self._pool, self._steering)
        self._ledger = Ledger()
        self._outcomes: Counter[str] = Counter()

    def place_near(self, link: Callable[[WorkerId, WorkerId], Link | None]) -> None:
        """From now on prompts are computed near the workers that decode them, where `link` knows what joins two."""
        self._dispatcher.link = link

    # -- models -------------------------------------------------------------------------------------------------------

    def register(self, spec: ModelSpec) -> ModelSpec:
        """The spec as kept. Raises ConfigError for a bad name, for one that is taken by other weights, and for KV that the workers' ranks
        could not give to each other; the same again is fine."""
        self._pool.check(spec)
        self._registry.register(spec)
        record = self._records.get(spec.model)
        if record is None:
            self._records[spec.model] = ModelRecord(spec, spec.kv.block_bytes)
        else:
            record.spec = spec
        self._pool.add_model(spec)
        return spec

    def models(self) -> tuple[ModelSpec, ...]:
        """All registered, in the order in which they came."""
        return self._registry.specs()

    # -- workers ------------------------------------------------------------------------------------------------------

    def join(self, hello: WorkerHello) -> Joined:
        """A new incarnation of a worker; one of the same id that was alive is lost by this.

        A hello with an epoch that an earlier controller gave keeps it: the worker and its streams outlived that controller.
        """
        known = self._pool.get(hello.worker_id)
        if known is None or hello.epoch != known.peer.epoch:
            self._pool.remove(hello.worker_id)
            self._pool.add(hello, self._epoch_for(hello), self._clock())
            if self._config.pools.split == "shared":
                self._steering.split(self._clock())
        book = self._pool.get(hello.worker_id)
        assert book is not None
        return Joined(
            epoch=book.peer.epoch,
            lease_s=self._config.liveness.worker_lease_s,
            report_interval_s=self._config.liveness.report_interval_s,
            catalogue=self._registry.catalogue,
            models=self._registry.specs(),
        )

    def _epoch_for(self, hello: WorkerHello) -> Epoch:
        was_lost = any(book.hello.worker_id == hello.worker_id for book in self._pool.lost)
        if hello.epoch is not None and hello.epoch < self._first_epoch and not was_lost:
            return hello.epoch
        self._last_epoch = max(self._next_epoch(), self._last_epoch + 1)
        return Epoch(self._last_epoch)

    def report(self, report: WorkerReport) -> Reported:
        """Renew the lease, correct the books. Raises StaleEpoch for an incarnation that is gone or was never known: join again."""
        book = self._pool.get(report.worker_id)
        if book is None or book.peer.epoch != report.epoch:
            present = f"its present one is {book.peer.epoch}" if book else "no such worker is alive"
            raise StaleEpoch(f"worker {report.worker_id} reports for epoch {report.epoch}, {present}; join again")
        self._pool.report(report, self._clock())
        return Reported(lease_s=self._config.liveness.worker_lease_s, catalogue=self._registry.catalogue)

    def lost(self, worker_id: WorkerId, epoch: Epoch | None = None) -> bool:
        """A worker left or died; with an epoch, only if that incarnation is the present one. False when there was nothing to do."""
        book = self._pool.get(worker_id)
        if book is None or (epoch is not None and book.peer.epoch != epoch):
            return False
        return self._pool.remove(worker_id)

    # -- requests -----------------------------------------------------------------------------------------------------

    def admit(self, ask: Admit) -> Placement:
        """Place every sequence of a request, or raise.

        ModelNotFound, ContextLengthExceeded and InvalidRequest are the client's; Overloaded, ModelLoading and DeadlineExceeded are the
        hour's; OutOfMemory is the operator's: no arena is large enough.

        The same ask again gives the same placement. With `excluded`, or where a worker was lost since, the sequences that were there are
        placed anew and the others stay, as do all in `staying`: that is a replay, and it is never refused for load. Excluded workers are
        used again only where no other is alive. Sequences in `moving` get another decode worker, and no prefill: their KV is handed over.
        An id that another client holds, or that had another shape, is InvalidRequest.
        """
        now_s = self._clock()
        try:
            self.client_seen(ask.client_id)
            request = self._ledger.get(ask.request_id)
            if request is None:
                request = self._admit_new(ask, now_s)
                self._outcomes["admitted"] += 1
            else:
                self._admit_again(request, ask, now_s)
        except PolymuxError as error:
            error.request_id = ask.request_id
            self._outcomes["refused"] += 1
            raise
        return Placement(
            request_id=ask.request_id,
            prefill=tuple(sequence.prefill.peer for sequence in request.sequences),
            decode=tuple(sequence.decode.peer for sequence in request.sequences),
            ttft_slo_s=request.slo.ttft_s,
            tpot_slo_s=request.slo.tpot_s,
        )

    def _admit_new(self, ask: Admit, now_s: float) -> Request:
        spec = self._registry.get(ask.model)
        self._check(ask)
        able = self._dispatcher.able(spec, now_s)
        slo = SLO(ttft_s=ask.ttft_slo_s or spec.ttft_slo_s, tpot_s=ask.tpot_slo_s or spec.tpot_slo_s)
        deadline_s = min(ask.deadline_s, self._config.limits.request_timeout_s)
        request = Request(ask, slo, now_s + deadline_s + self._config.liveness.reap_grace_s)
        queued = [book.queued() for book in self._pool.decode.values()]
        forecast = self._dispatcher.place(request, ask, range(ask.num_sequences), self._records[ask.model], able, now_s)
        free = [book.free_bytes() for book in self._pool.decode.values()]
        door = DoorView(
            num_queued=sum(num_seqs for num_seqs, _ in queued),
            num_queued_tokens=sum(num_tokens for _, num_tokens in queued),
            num_inflight=len(self._ledger),
            num_sequences=ask.num_sequences,
            num_prompt_tokens=ask.num_prompt_tokens,
            num_total_tokens=ask.num_prompt_tokens + ask.max_tokens,
            max_model_len=spec.max_model_len,
            max_kv_tokens=able.max_kv_tokens,
            deadline_s=deadline_s,
            ttft_slo_s=slo.ttft_s,
            is_idle=forecast.is_idle,
            kv_bytes=ask.num_sequences * spec.kv.num_blocks(ask.num_prompt_tokens + 1) * spec.kv.block_bytes,
            free_kv_bytes=None if None in free else max((n for n in free if n is not None), default=None),
            ttft_s=forecast.ttft_s,
            switch_s=forecast.switch_s,
        )
        admission = decide(door, self._limits)
        if admission.verdict is Verdict.REFUSE:
            for sequence in request.sequences:
                sequence.end()
            assert admission.error is not None
            raise admission.error
        self._ledger.add(request)
        self._records[ask.model].num_inflight += 1
        return request

    def _admit_again(self, request: Request, ask: Admit, now_s: float) -> None:
        old = request.ask
        if (old.client_id, old.model, old.num_sequences) != (ask.client_id, ask.model, ask.num_sequences):
            raise InvalidRequest(f"request id {ask.request_id!r} is in use for another request; choose a new one", param="request_id")
        moving = [i for i in sorted(set(ask.moving)) if 0 <= i < len(request.sequences)]
        others = set(range(len(request.sequences))).difference(moving, ask.staying)
        lost = [i for i in sorted(others) if request.sequences[i].must_move(ask.excluded)]
        if not moving and not lost:
            return
        able, record = self._dispatcher.able(self._registry.get(ask.model), now_s), self._records[ask.model]
        for i in moving:
            self._dispatcher.move(request, ask, i, record, able, now_s)
            self._outcomes["moved"] += 1
        for i in lost:
            request.sequences[i].end()
        if lost:
            self._dispatcher.place(request, ask, lost, record, able, now_s)
            self._outcomes["replayed"] += 1

    def _check(self, ask: Admit) -> None:
        limit = self._config.limits.max_choices
        if not 1 <= ask.num_sequences <= limit:
            raise InvalidRequest(f"n={ask.num_sequences} must be between 1 and {limit} (limits.max_choices)", param="n")
        for name, least in (("num_prompt_tokens", 1), ("max_tokens", 1)):
            if getattr(ask, name) < least:
                raise InvalidRequest(f"{name}={getattr(ask, name)} must be at least {least}", param=name)
        for name in ("ttft_slo_s", "tpot_slo_s"):
            value = getattr(ask, name)
            if value is not None and not value > 0:
                raise InvalidRequest(f"{name}={value} must be above 0", param=name)
        if not ask.deadline_s > 0:
            raise DeadlineExceeded(f"the deadline passed {-ask.deadline_s:.3f} s before admission")

    def release(self, release: Release) -> bool:
        """The request has ended. False, and no harm done, when it is not in the books."""
        request = self._end(release.request_id, release.outcome if release.outcome in OUTCOMES else "failed")
        if request is None:
            return False
        record = self._records[request.ask.model]
        record.num_output_tokens += max(0, release.num_output_tokens)
        if release.outcome == "finished":
            record.num_finished += 1
            record.num_attained += request.slo.is_met(release.ttft_s, release.tpot_s)
            mean = release.num_output_tokens / request.ask.num_sequences
            record.mean_output_tokens += 0.05 * (max(1.0, mean) - record.mean_output_tokens)
        return True

    def _end(self, request_id: str, outcome: str) -> Request | None:
        request = self._ledger.end(request_id)
        if request is not None:
            self._outcomes[outcome] += 1
            record = self._records[request.ask.model]
            record.num_inflight -= 1
            record.num_failed += outcome in MISSES
        return request

    # -- time ---------------------------------------------------------------------------------------------------------

    def client_seen(self, client_id: ClientId) -> None:
        """A front door is alive; `admit` says so too."""
        self._called_at_s = self._clock()
        self._ledger.seen(client_id, self._called_at_s)

    def expired(self) -> Expired:
        """Sweep: worker leases, client leases, request deadlines. Call it about once a second."""
        now_s, liveness = self._clock(), self._config.liveness
        workers = tuple(book.hello.worker_id for book in self._pool.books() if book.lease_until_s < now_s)
        for worker_id in workers:
            self._pool.remove(worker_id)
        clients = self._ledger.gone_clients(now_s - liveness.client_lease_s)
        gone = [request_id for request_ids in clients.values() for request_id in request_ids]
        for request_id in gone:
            self._end(request_id, "client_lost")
        overdue = self._ledger.overdue(now_s)
        for request_id in overdue:
            self._end(request_id, "expired")
        orphan_s = liveness.orphan_timeout_s
        is_orphaned = orphan_s is not None and now_s - self._called_at_s > orphan_s
        return Expired(workers=workers, clients=tuple(clients), requests=(*gone, *overdue), is_orphaned=is_orphaned)

    # -- roles and moves ----------------------------------------------------------------------------------------------

    def steer(self) -> BatchMove | None:
        """Give roles as the load wants them, and name the batch that should move now, if any. Call it about once a second."""
        return self._steering.steer(self._records.values(), self._clock())

    def drain(self, worker_id: WorkerId) -> None:
        """Give a worker nothing more, so that it may stop. Raises InvalidRequest for one that nobody could stand in for."""
        self._steering.drain(worker_id, self._clock())

    def undrain(self, worker_id: WorkerId) -> None:
        """It stays after all, in the role of its hello."""
        self._steering.undrain(worker_id)

    def is_drained(self, worker_id: WorkerId) -> bool:
        """Whether a worker has nothing left, as far as its last report and what was placed since say. One that is gone has nothing."""
        member = self._pool.members.get(worker_id)
        if member is None:
            return True
        report = member.main.reported
        is_told = not member.prefill.unsettled and not member.decode.unsettled
        return is_told and report is not None and not report.num_blocks_out and all(_is_idle(load) for load in both_roles(report))

    # -- what it shows ------------------------------------------------------------------------------------------------

    def topology(self) -> Topology:
        return snapshots.topology(self._records.values(), self._pool, now_s=self._clock())

    def stats(self) -> Stats:
        queued = [book.queued() for book in self._pool.decode.values()]
        return Stats(
            uptime_s=self._clock() - self._started_at_s,
            num_inflight=len(self._ledger),
            num_queued=sum(num_seqs for num_seqs, _ in queued),
            num_queued_tokens=sum(num_tokens for _, num_tokens in queued),
            num_clients=self._ledger.num_clients,
            num_workers_alive=len(self._pool),
            num_workers_lost=self._pool.num_lost,
            num_blocks_out=sum(book.reported.num_blocks_out for book in self._pool.books() if book.reported),
            outcomes=dict(sorted(self._outcomes.items())),
            counters=snapshots.summed_counters(self._pool),
        )

    def check(self) -> None:
        """Assert that the books agree with each other."""
        self._ledger.check()
        placed = {sequence.sequence_id: sequence for request in self._ledger for sequence in request.sequences}
        for member in self._pool.members.values():
            for book in (member.prefill, member.decode):
                book.check()
                assert not book.is_lost
                assert book.placed.keys() <= placed.keys()
        for model, record in self._records.items():
            assert record.num_inflight == sum(request.ask.model == model for request in self._ledger)


def _is_idle(load: ModelLoad) -> bool:
    return not (load.num_waiting or load.num_running)
