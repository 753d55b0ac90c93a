"""Switching between batches with an oracle (SLLM+ of the Aegaeon artifact): true output lengths order each worker's line, shortest first.

Written from its description: a model's requests gather in batches of at most four; a new batch goes where its model is loaded, else
where there are fewest. When a request arrives, every line is sorted by what a batch still takes, and one with prompts to compute counts
with these alone. A switch drops KV, so whoever is overtaken computes its prompt and its tokens again, and counts as short again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from polymux.disagg.sim.costs import CostModel
from polymux.disagg.sim.links import Flow
from polymux.disagg.sim.loop import DECODE, PREFILL, SWITCH, Journal, Simulation
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.request_level import MAX_IN_ROW, PATIENCE_US
from polymux.disagg.sim.topology import Hosts
from polymux.disagg.sim.traffic import Traffic


@dataclass(slots=True, eq=False)
class _Batch:
    model: str
    kind: str
    members: list[Progress] = field(default_factory=list)
    computed: set[int] = field(default_factory=set)  # requests whose KV is on the device

    def uncomputed(self) -> list[Progress]:
        return [one for one in self.members if one.request.request_id not in self.computed]


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    line: list[_Batch] = field(default_factory=list)
    loaded: str | None = None
    stepping: _Batch | None = None
    members: list[Progress] = field(default_factory=list)  # in the step under way
    is_busy: bool = False


def _context_len(one: Progress) -> int:
    return one.request.input_len + one.num_tokens


class OracleLevel(Simulation[_Worker]):
    """Sees output lengths: the one policy here that does."""

    def __init__(
        self, costs: CostModel, targets: Targets, *, num_workers: int, hosts: Hosts | None = None, journal: Journal | None = None
    ) -> None:
        super().__init__(costs, targets, num_devices=num_workers, hosts=hosts, journal=journal)
        self._workers = [_Worker(i) for i in range(num_workers)]

    def _arrive(self, one: Progress) -> None:
        now_us = one.request.arrival_us
        for worker in self._workers:
            self._purge(worker, now_us)
        worker, batch = self._place(one)
        batch.members.append(one)
        self._note_placement(one, worker.number)
        for other in self._workers:
            other.line.sort(key=self._left_us)
        self._start(worker, now_us)

    @staticmethod
    def _purge(worker: _Worker, now_us: int) -> None:
        for batch in worker.line:
            for one in batch.members:
                one.has_failed = not one.num_tokens and now_us - one.request.arrival_us > PATIENCE_US
            batch.members = [one for one in batch.members if not one.has_failed]
        worker.line = [batch for batch in worker.line if batch.members]

    def _place(self, one: Progress) -> tuple[_Worker, _Batch]:
        model = one.request.model
        for worker in self._workers:
            for batch in worker.line:
                if batch.model == model and len(batch.members) < MAX_IN_ROW:
                    return worker, batch
        home = [w for w in self._workers if w.loaded == model]
        worker = min(home or self._workers, key=lambda w: (len(w.line), w.number))
        batch = _Batch(model, one.request.kind)
        worker.line.append(batch)
        return worker, batch

    def _left_us(self, batch: _Batch) -> int:
        if missing := batch.uncomputed():
            return self._costs.prefill_us(batch.kind, [_context_len(one) for one in missing])
        step_us = self._costs.decode_us(batch.kind, len(batch.members), sum(_context_len(one) for one in batch.members))
        return step_us * max(one.num_left for one in batch.members)

    def _start(self, worker: _Worker, now_us: int) -> None:
        if worker.is_busy or not worker.line:
            return
        batch = worker.line[0]
        worker.stepping = None
        worker.is_busy = True
        if worker.loaded != batch.model:
            for other in worker.line:
                other.computed.clear()
            worker.loaded, what = batch.model, SWITCH
            load_us = self._load(worker.number, batch.kind, now_us)
            if load_us is None:
                return
            took_us = load_us
        else:
            worker.stepping = batch
            missing = batch.uncomputed()
            what = PREFILL if missing else DECODE
            worker.members = missing or batch.members
            lengths = [_context_len(one) for one in worker.members]
            prefill_us, decode_us = self._costs.prefill_us, self._costs.decode_us
            took_us = prefill_us(batch.kind, lengths) if missing else decode_us(batch.kind, len(lengths), sum(lengths))
        self._note(worker.number, what, batch.model, now_us, now_us + took_us)
        self._at(now_us + took_us, worker)

    def _flow_ended(self, flow: Flow, traffic: Traffic, now_us: int) -> None:
        worker, ready_us = self._workers[flow.owner], now_us + traffic.overhead_us
        assert worker.loaded is not None
        self._note(worker.number, SWITCH, worker.loaded, flow.began_us, ready_us)
        self._at(ready_us, worker)

    def _ended(self, worker: _Worker, now_us: int) -> None:
        worker.is_busy = False
        batch = worker.stepping
        if batch is not None:
            for one in worker.members:
                batch.computed.add(one.request.request_id)
                if not one.has_failed:
                    one.token(now_us)
            batch.members = [one for one in batch.members if not one.is_done]
            worker.line = [other for other in worker.line if other.members]
        self._start(worker, now_us)
