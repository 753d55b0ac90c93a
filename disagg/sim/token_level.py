"""Token-level multiplexing by the policies of `disagg/` themselves: every worker does both phases, one model at a time, turn by turn.

A request is placed once, by `choose_decode`; its prompt is computed there in the next turn of its model, before that model's decode steps.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from polymux.disagg.dispatch import choose_decode
from polymux.disagg.multiplex import Turn, TurnPolicy, is_over
from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.residency import ArtifactSwitcher, PhysicalSwitcher, Switcher
from polymux.disagg.sim.workload import SimRequest
from polymux.disagg.views import AskView, BatchView, DecodeModelView, DecodeView, DecodeWorkerView, Due
from polymux.transport.units import ModelName, WorkerId

EXPECTED_OUTPUT_LEN = 128.0  # until requests have ended
OUTPUT_SMOOTHING = 0.1


@dataclass(slots=True, eq=False)
class _Work:
    """One model's requests on one worker."""

    kind: str
    prompts: list[Progress] = field(default_factory=list)
    running: list[Progress] = field(default_factory=list)

    @property
    def kv_tokens(self) -> int:
        return sum(one.request.input_len + one.num_tokens for one in self.running)

    @property
    def is_empty(self) -> bool:
        return not self.prompts and not self.running


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    worker_id: WorkerId
    memory: Any  # the policy's
    weights: Switcher
    work: dict[ModelName, _Work] = field(default_factory=dict)
    turn: Turn | None = None
    turn_began_us: int = 0
    has_news: bool = False
    is_busy: bool = False
    prefilling: list[Progress] = field(default_factory=list)
    decoding: list[Progress] = field(default_factory=list)
    view: DecodeWorkerView | None = None


class TokenLevel:
    """One pool of equal workers. `max_prefill_tokens` bounds one prefill step; a longer prompt takes one of its own.

    With `weight_budget_bytes` of its arena a worker keeps models and KV while they fit; without, it follows the published artifact: one
    model at a time, and KV comes in anew at each turn.
    """

    def __init__(
        self,
        costs: CostModel,
        targets: Targets,
        policy: TurnPolicy[Any],
        *,
        num_workers: int,
        max_prefill_tokens: int = 2048,
        max_num_seqs: int = 256,
        weight_budget_bytes: int | None = None,
    ) -> None:
        self._costs = costs
        self._weight_budget_bytes = weight_budget_bytes
        self._keeps_kv = weight_budget_bytes is not None  # what is left of the arena holds it
        self._targets = targets
        self._policy = policy
        self._max_prefill_tokens = max_prefill_tokens
        self._max_num_seqs = max_num_seqs
        self._kinds: dict[ModelName, str] = {}
        self._workers = [_Worker(i, WorkerId(f"worker-{i:04d}"), policy.start(), self._switcher()) for i in range(num_workers)]
        self._decode_costs: dict[ModelName, tuple[float, float, float]] = {}
        self._switch_bytes_per_s = 1.0
        self._output_len = EXPECTED_OUTPUT_LEN
        self._events: list[tuple[int, int, _Worker]] = []
        self._num_events = 0
        self.num_switches = 0

    def run(self, requests: Sequence[SimRequest]) -> list[Progress]:
        """Serve them all, in arrival order. Returns their progress, in the same order."""
        self._learn({request.model: request.kind for request in requests})
        served = [Progress(request, self._targets) for request in requests]
        waiting = iter(served)
        arriving = next(waiting, None)
        while arriving is not None or self._events:
            if arriving is not None and (not self._events or arriving.request.arrival_us <= self._events[0][0]):
                self._arrive(arriving)
                arriving = next(waiting, None)
            else:
                now_us, _, worker = heapq.heappop(self._events)
                self._ended(worker, now_us)
        return served

    def _switcher(self) -> Switcher:
        if self._weight_budget_bytes is None:
            return ArtifactSwitcher(self._costs, self._kinds)
        return PhysicalSwitcher(self._costs, self._kinds, self._weight_budget_bytes)

    def _learn(self, kinds: dict[str, str]) -> None:
        """What a placement knows of each model's costs: a line through the cost model's answers."""
        for name, kind in kinds.items():
            model = ModelName(name)
            self._kinds[model] = kind
            base = self._costs.decode_us(kind, 1, 0)
            per_seq = (self._costs.decode_us(kind, 65, 0) - base) / 64
            per_token = (self._costs.decode_us(kind, 1, 100_000) - base) / 100_000
            self._decode_costs[model] = tuple(max(0.0, c) / SECOND for c in (base - per_seq, per_seq, per_token))  # type: ignore[assignment]
        some = next(iter(kinds.values()))
        self._switch_bytes_per_s = self._costs.weight_bytes(some) * SECOND / self._costs.load_us(some)

    # -- placement ----------------------------------------------------------------------------------------------------

    def _arrive(self, one: Progress) -> None:
        worker = self._place(one.request)
        model = ModelName(one.request.model)
        work = worker.work.setdefault(model, _Work(one.request.kind))
        work.prompts.append(one)
        worker.has_news, worker.view = True, None
        self._start(worker, one.request.arrival_us)

    def _place(self, request: SimRequest) -> _Worker:
        ask = AskView(
            model=ModelName(request.model),
            num_prompt_tokens=request.input_len,
            num_output_tokens=max(1, round(self._output_len)),
            tpot_slo_s=self._targets.tpot_us / SECOND,
            kv_bytes=round(request.input_len + self._output_len) * self._costs.kv_bytes(request.kind),
            weight_bytes=self._costs.weight_bytes(request.kind),
        )
        choice = choose_decode(ask, (self._worker_view(worker) for worker in self._workers))
        assert choice is not None
        return self._workers[int(choice.worker_id.rpartition("-")[2])]

    def _worker_view(self, worker: _Worker) -> DecodeWorkerView:
        if worker.view is None:
            worker.view = self._viewed(worker)
        return worker.view

    def _viewed(self, worker: _Worker) -> DecodeWorkerView:
        tpot_s = self._targets.tpot_us / SECOND
        models: dict[ModelName, DecodeModelView] = {}
        resident = worker.weights.resident
        load, switch_s, min_steps, kv_bytes = 0.0, 0.0, math.inf, 0
        for model, work in worker.work.items():
            num_seqs = len(work.running) + len(work.prompts)
            kv_tokens = work.kv_tokens + sum(one.request.input_len for one in work.prompts)
            step_s = self._costs.decode_us(work.kind, num_seqs, kv_tokens) / SECOND
            models[model] = DecodeModelView(num_seqs=num_seqs, kv_tokens=kv_tokens, tpot_slo_s=tpot_s, step_s=step_s)
            load += step_s / tpot_s
            min_steps = min(min_steps, tpot_s / step_s)
            kv_bytes += kv_tokens * self._costs.kv_bytes(work.kind)
            if model not in resident:
                switch_s += self._costs.load_us(work.kind) / SECOND
        return DecodeWorkerView(
            worker_id=worker.worker_id,
            models=models,
            resident=resident,
            costs=self._decode_costs,
            load=load,
            round_switch_s=switch_s,
            min_steps=min_steps,
            num_seqs=sum(view.num_seqs for view in models.values()),
            free_kv_bytes=max(0, self._costs.arena_bytes() * 8 // 10 - kv_bytes),
            max_num_seqs=self._max_num_seqs,
            switch_bytes_per_s=self._switch_bytes_per_s,
        )

    # -- turns --------------------------------------------------------------------------------------------------------

    def _start(self, worker: _Worker, now_us: int) -> None:
        """Begin the worker's next step, a switch before it where the turn wants one."""
        if worker.is_busy or not worker.work:
            return
        turn = self._current_turn(worker, now_us)
        if turn is None:
            return
        work = worker.work[turn.model]
        took_us = self._switch_us(worker, turn, work, now_us)
        worker.turn_began_us += took_us
        step_us = self._step(worker, work)
        worker.weights.computed(step_us)
        worker.is_busy = True
        self._num_events += 1
        heapq.heappush(self._events, (now_us + took_us + step_us, self._num_events, worker))

    def _current_turn(self, worker: _Worker, now_us: int) -> Turn | None:
        if worker.turn is not None:
            can_step = worker.turn.model in worker.work
            others = len(worker.work) > can_step
            elapsed_s = (now_us - worker.turn_began_us) / SECOND
            if not is_over(worker.turn, elapsed_s, can_step=can_step, others_can_step=others, has_news=worker.has_news):
                return worker.turn
        view = DecodeView(
            now_s=now_us / SECOND,
            active=worker.weights.active,
            batches=tuple(self._batch(worker, model, work, now_us) for model, work in worker.work.items()),
        )
        worker.turn, worker.memory = self._policy.next_turn(view, worker.memory)
        worker.turn_began_us, worker.has_news = now_us, False
        return worker.turn

    def _batch(self, worker: _Worker, model: ModelName, work: _Work, now_us: int) -> BatchView:
        both = (*work.running, *work.prompts)
        kv_tokens = sum(one.request.input_len + one.num_tokens for one in both)
        tpot_s = self._targets.tpot_us / SECOND
        return BatchView(
            model=model,
            num_seqs=len(both),
            kv_tokens=kv_tokens,
            step_s=self._costs.decode_us(work.kind, len(both), kv_tokens) / SECOND,
            tpot_slo_s=tpot_s,
            switch_s=self._wait_us(worker, model, work, now_us) / SECOND,
            dues=tuple([self._due(one, tpot_s) for one in both]),
        )

    def _due(self, one: Progress, tpot_s: float) -> Due:
        due_us = one.request.arrival_us + self._targets.due_us(one.num_tokens)
        return Due(due_us / SECOND, tpot_s, one.num_on_time == one.num_tokens)

    def _wait_us(self, worker: _Worker, model: ModelName, work: _Work, now_us: int) -> int:
        if model == worker.weights.active:
            return 0
        return worker.weights.wait_us(model, now_us) + self._kv_in_us(work)

    def _kv_in_us(self, work: _Work) -> int:
        """What a turn's start pays for KV that went out of the way; nothing where it stays."""
        return 0 if self._keeps_kv else self._costs.kv_in_us(work.kind, work.kv_tokens)

    def _switch_us(self, worker: _Worker, turn: Turn, work: _Work, now_us: int) -> int:
        took_us = 0
        if worker.weights.active != turn.model:
            took_us = worker.weights.switch(turn.model, now_us, worker.work.keys()) + self._kv_in_us(work)
            worker.view = None
            self.num_switches += 1
        if turn.prefetch is not None:
            worker.weights.prefetch(turn.prefetch, now_us + took_us, worker.work.keys())
        return took_us

    def _step(self, worker: _Worker, work: _Work) -> int:
        """Prompts first, as many as a step may hold; then the batch."""
        if work.prompts and len(work.running) < self._max_num_seqs:
            lengths: list[int] = []
            for one in work.prompts:
                if lengths and sum(lengths) + one.request.input_len > self._max_prefill_tokens:
                    break
                lengths.append(one.request.input_len)
            worker.prefilling = work.prompts[: len(lengths)]
            return self._costs.prefill_us(work.kind, lengths)
        worker.decoding = work.running[: self._max_num_seqs]
        return self._costs.decode_us(work.kind, len(worker.decoding), work.kv_tokens)

    def _ended(self, worker: _Worker, now_us: int) -> None:
        """A step's tokens are out."""
        worker.is_busy = False
        assert worker.turn is not None
        work = worker.work[worker.turn.model]
        for one in (*worker.prefilling, *worker.decoding):
            one.token(now_us)
            if one.is_done:
                worker.view = None
                self._output_len += OUTPUT_SMOOTHING * (one.num_tokens - self._output_len)
        if worker.prefilling:
            work.prompts = work.prompts[len(worker.prefilling) :]
            work.running += [one for one in worker.prefilling if not one.is_done]
        else:
            work.running = [one for one in work.running if not one.is_done]
        worker.prefilling, worker.decoding = [], []
        if work.is_empty:
            del worker.work[worker.turn.model]
        self._start(worker, now_us)
