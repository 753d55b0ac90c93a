"""What the controller has promised of each worker, between that worker's reports.

A report is about a second old and knows nothing of what was placed since. So every placement is booked at once as a promise, and a
report settles the promises that it must have seen: those older than `SETTLE_S`. One that it may have seen already counts twice until
the next report, which is better than not at all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from polymux.disagg.cost import Roofline
from polymux.disagg.dispatch import Coefficients, step_s, worker_view
from polymux.disagg.views import DecodeModelView, DecodeWorkerView, PrefillWorkerView
from polymux.transport.messages import Peer, WorkerHello, WorkerReport
from polymux.transport.prefix import MAX_CACHED_MARKS
from polymux.transport.units import NO_IDS, Epoch, ModelName, PackedIds, SequenceId, unpack_ids

SETTLE_S = 0.25  # a placement reaches its workers well within it


@dataclass(frozen=True, slots=True)
class Promise:
    """One sequence's claim on one worker."""

    at_s: float
    model: ModelName
    num_prompt_tokens: int
    num_tokens: int  # of prompt and expected output
    kv_bytes: int  # of those
    tpot_slo_s: float
    busy_s: float = 0.0  # of a prefill worker: computing, and switching where it must


class PrefixMarks:
    """What a worker has cached, by its last report, and what it will have of the prompts that it was given in the last two."""

    def __init__(self) -> None:
        self._packed: PackedIds = NO_IDS
        self._reported = self._older = self._expected = frozenset[int]()

    @property
    def sets(self) -> tuple[frozenset[int], ...]:
        return self._reported, self._older, self._expected

    def expect(self, marks: tuple[int, ...]) -> bool:
        """False when there is nothing new in them."""
        new = frozenset(marks).difference(*self.sets)
        if len(self._expected) + len(new) > MAX_CACHED_MARKS:
            self._older, self._expected = self._expected, frozenset()
        self._expected |= new
        return bool(new)

    def report(self, packed: PackedIds) -> None:
        self._older, self._expected = self._expected, frozenset()
        if packed != self._packed:
            self._packed = packed
            self._reported = frozenset(unpack_ids(packed[: MAX_CACHED_MARKS * 4]))


class WorkerBook:
    """One incarnation of a worker. `placed` are the sequences given to it that have not ended, `unsettled` those not in a report yet.

    `weight_bytes` is the controller's own table of all models, read when it is needed.
    """

    def __init__(
        self,
        hello: WorkerHello,
        epoch: Epoch,
        weight_bytes: Mapping[ModelName, int],
        *,
        now_s: float,
        lease_s: float,
    ) -> None:
        self.hello = hello
        self._weight_bytes = weight_bytes
        self.peer = Peer(worker_id=hello.worker_id, epoch=epoch, address=hello.address, host_id=hello.host_id, pid=hello.pid)
        self.costs: Mapping[ModelName, Coefficients] = {}  # replaced, never changed in place: views hold it, and alike workers the same one
        self.is_lost = False
        self.lease_until_s = now_s + lease_s
        self.reported: WorkerReport | None = None
        self.reported_at_s = now_s
        self.resident: frozenset[ModelName] = frozenset()
        self.switch_bytes_per_s = Roofline().copy_bytes_per_s
        self.placed: dict[SequenceId, Promise] = {}
        self.unsettled: dict[SequenceId, Promise] = {}
        self.unsettled_prompt_tokens = 0
        self.unsettled_kv_bytes = 0
        self.marks = PrefixMarks()

    def promise(self, sequence_id: SequenceId, promise: Promise) -> None:
        self.placed[sequence_id] = self.unsettled[sequence_id] = promise
        self.unsettled_prompt_tokens += promise.num_prompt_tokens
        self.unsettled_kv_bytes += promise.kv_bytes

    def end(self, sequence_id: SequenceId) -> None:
        """The sequence is no longer this worker's, whatever the way. Harmless when it never was."""
        if sequence_id in self.unsettled:
            self._settle(sequence_id)
        self.placed.pop(sequence_id, None)

    def _settle(self, sequence_id: SequenceId) -> Promise:
        promise = self.unsettled.pop(sequence_id)
        self.unsettled_prompt_tokens -= promise.num_prompt_tokens
        self.unsettled_kv_bytes -= promise.kv_bytes
        return promise

    def learn(self, costs: Mapping[ModelName, Coefficients], switch_bytes_per_s: float) -> None:
        """What its steps and switches are taken to cost from now on."""
        self.costs, self.switch_bytes_per_s = costs, switch_bytes_per_s

    def report(self, report: WorkerReport, *, now_s: float, lease_s: float) -> None:
        self.reported, self.reported_at_s, self.lease_until_s = report, now_s, now_s + lease_s
        self.resident = frozenset(load.model for load in (*report.loads, *report.prefills) if load.is_resident)
        self.marks.report(report.cached_prefixes)
        for sequence_id, promise in list(self.unsettled.items()):  # in the order in which they were made
            if promise.at_s > now_s - SETTLE_S:
                break
            self._settle(sequence_id)

    def step_age_s(self, now_s: float) -> float | None:
        """Seconds since its engine last advanced; None while it is idle or not yet heard of."""
        if self.reported is None or self.reported.last_step_age_s is None:
            return None
        return self.reported.last_step_age_s + now_s - self.reported_at_s

    def check(self) -> None:
        """Assert that the sums are those of the entries."""
        assert self.unsettled.keys() <= self.placed.keys()
        assert self.unsettled_prompt_tokens == sum(p.num_prompt_tokens for p in self.unsettled.values())
        assert self.unsettled_kv_bytes == sum(p.kv_bytes for p in self.unsettled.values())


class PrefillBook(WorkerBook):
    """A prefill worker: when it would be done with all that it was given."""

    def __init__(
        self,
        hello: WorkerHello,
        epoch: Epoch,
        weight_bytes: Mapping[ModelName, int],
        *,
        now_s: float,
        lease_s: float,
    ) -> None:
        super().__init__(hello, epoch, weight_bytes, now_s=now_s, lease_s=lease_s)
        self.busy_until_s = now_s
        self._waiting: Counter[ModelName] = Counter()  # of the unsettled
        self._view: PrefillWorkerView | None = None

    def promise(self, sequence_id: SequenceId, promise: Promise) -> None:
        super().promise(sequence_id, promise)
        self.busy_until_s = max(self.busy_until_s, promise.at_s) + promise.busy_s
        self._waiting[promise.model] += 1
        self._view = None

    def end(self, sequence_id: SequenceId) -> None:
        promise = self.unsettled.get(sequence_id)
        if promise is not None:
            self.busy_until_s -= promise.busy_s
        super().end(sequence_id)

    def _settle(self, sequence_id: SequenceId) -> Promise:
        promise = super()._settle(sequence_id)
        self._waiting[promise.model] -= 1
        if not self._waiting[promise.model]:
            del self._waiting[promise.model]
        self._view = None
        return promise

    def expect(self, prefix_marks: tuple[int, ...]) -> None:
        """A prompt that begins so was given to it, and leaves its KV there."""
        if self.marks.expect(prefix_marks):
            self._view = None

    def learn(self, costs: Mapping[ModelName, Coefficients], switch_bytes_per_s: float) -> None:
        if costs is not self.costs or switch_bytes_per_s != self.switch_bytes_per_s:
            super().learn(costs, switch_bytes_per_s)
            self._view = None

    def report(self, report: WorkerReport, *, now_s: float, lease_s: float) -> None:
        super().report(report, now_s=now_s, lease_s=lease_s)
        work_s = sum(promise.busy_s for promise in self.unsettled.values())
        for load in report.prefills:
            if load.num_waiting > 0 and load.model in self.costs:
                base, per_token, per_square = self.costs[load.model]
                mean_tokens = load.waiting_tokens / load.num_waiting
                work_s += load.num_waiting * (base + mean_tokens * (per_token + mean_tokens * per_square))
                work_s += 0.0 if load.is_resident else self._weight_bytes[load.model] / self.switch_bytes_per_s
        self.busy_until_s = now_s + work_s
        self._view = None

    def view(self) -> PrefillWorkerView:
        if self._view is None:
            waiting = dict(self._waiting)
            for load in self.reported.prefills if self.reported else ():
                if load.num_waiting:
                    waiting[load.model] = waiting.get(load.model, 0) + load.num_waiting
            self._view = PrefillWorkerView(
                worker_id=self.hello.worker_id,
                busy_until_s=self.busy_until_s,
                waiting=waiting,
                resident=self.resident,
                costs=self.costs,
                switch_bytes_per_s=self.switch_bytes_per_s,
                cached=self.marks.sets,
            )
        return self._view

    def check(self) -> None:
        super().check()
        assert self._waiting == Counter(promise.model for promise in self.unsettled.values())
        assert math.isfinite(self.busy_until_s)


@dataclass(slots=True)
class _Work:
    """One model's sequences on a decode worker."""

    num_seqs: int = 0
    kv_tokens: int = 0
    tpots: Counter[float] = field(default_factory=Counter)  # SLOs of those sequences


class DecodeBook(WorkerBook):
    """A decode worker: whose sequences run there, and how loaded that makes its rounds."""

    def __init__(
        self,
        hello: WorkerHello,
        epoch: Epoch,
        weight_bytes: Mapping[ModelName, int],
        *,
        now_s: float,
        lease_s: float,
        max_num_seqs: int,
    ) -> None:
        super().__init__(hello, epoch, weight_bytes, now_s=now_s, lease_s=lease_s)
        self._max_num_seqs = max_num_seqs
        self._work: dict[ModelName, _Work] = {}
        self._reported_queue = (0, 0)
        self._view: DecodeWorkerView | None = None

    def promise(self, sequence_id: SequenceId, promise: Promise) -> None:
        super().promise(sequence_id, promise)
        work = self._work.setdefault(promise.model, _Work())
        work.num_seqs += 1
        work.kv_tokens += promise.num_tokens
        work.tpots[promise.tpot_slo_s] += 1
        self._view = None

    def end(self, sequence_id: SequenceId) -> None:
        promise = self.placed.get(sequence_id)
        super().end(sequence_id)
        if promise is None:
            return
        work = self._work[promise.model]
        work.num_seqs -= 1
        work.kv_tokens -= promise.num_tokens
        work.tpots[promise.tpot_slo_s] -= 1
        if not work.tpots[promise.tpot_slo_s]:
            del work.tpots[promise.tpot_slo_s]
        if not work.num_seqs:
            del self._work[promise.model]
        self._view = None

    def learn(self, costs: Mapping[ModelName, Coefficients], switch_bytes_per_s: float) -> None:
        if costs is not self.costs or switch_bytes_per_s != self.switch_bytes_per_s:
            super().learn(costs, switch_bytes_per_s)
            self._view = None

    def report(self, report: WorkerReport, *, now_s: float, lease_s: float) -> None:
        super().report(report, now_s=now_s, lease_s=lease_s)
        self._reported_queue = (sum(load.num_waiting for load in report.loads), sum(load.waiting_tokens for load in report.loads))
        self._view = None

    def queued(self) -> tuple[int, int]:
        """Sequences without committed KV, and the tokens of their prompts."""
        return self._reported_queue[0] + len(self.unsettled), self._reported_queue[1] + self.unsettled_prompt_tokens

    def running(self) -> dict[ModelName, DecodeModelView]:
        """What decoded at the last report. A sequence whose prompt still waits is no load here yet, unlike in `view`."""
        found: dict[ModelName, DecodeModelView] = {}
        for load in self.reported.loads if self.reported else ():
            if load.num_running and (work := self._work.get(load.model)) is not None:
                found[load.model] = self._model_view(load.model, load.num_running, load.kv_tokens, min(work.tpots))
        return found

    def _model_view(self, model: ModelName, num_seqs: int, kv_tokens: int, tpot_slo_s: float) -> DecodeModelView:
        seconds = step_s(self.costs[model], min(num_seqs, self._max_num_seqs), kv_tokens)
        return DecodeModelView(num_seqs=num_seqs, kv_tokens=kv_tokens, tpot_slo_s=tpot_slo_s, step_s=seconds)

    def view(self) -> DecodeWorkerView:
        if self._view is None:
            self._view = self._viewed()
        return self._view

    def free_bytes(self) -> int | None:
        """For KV, in arena and host tier together; None where there is no host tier, or nothing is known yet."""
        if self.reported is None or self.reported.num_free_host_bytes is None:
            return None
        return self.view().free_kv_bytes + self.reported.num_free_host_bytes

    def _viewed(self) -> DecodeWorkerView:
        free_bytes = self.reported.num_free_kv_bytes if self.reported else self.hello.arena_bytes
        return worker_view(
            self.hello.worker_id,
            {model: self._model_view(model, work.num_seqs, work.kv_tokens, min(work.tpots)) for model, work in self._work.items()},
            resident=self.resident,
            costs=self.costs,
            weight_bytes=self._weight_bytes,
            switch_bytes_per_s=self.switch_bytes_per_s,
            free_kv_bytes=free_bytes - self.unsettled_kv_bytes,
            max_num_seqs=self._max_num_seqs,
        )

    def check(self) -> None:
        super().check()
        for model in {promise.model for promise in self.placed.values()} | self._work.keys():
            placed = [promise for promise in self.placed.values() if promise.model == model]
            work = self._work[model]
            assert (work.num_seqs, work.kv_tokens) == (len(placed), sum(p.num_tokens for p in placed))
            assert work.tpots == Counter(p.tpot_slo_s for p in placed)
