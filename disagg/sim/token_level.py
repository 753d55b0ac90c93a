"""Token-level multiplexing by the policies of `disagg/` themselves: every worker does both phases, one model at a time, turn by turn.

A request is placed once, by `choose_decode`; its prompt is computed there in the next turn of its model, before that model's decode steps.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from polymux.disagg.dispatch import Coefficients, choose_decode, worker_view
from polymux.disagg.multiplex import Turn, TurnPolicy, is_over
from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.loop import DECODE, PREFILL, SWITCH, Journal, Simulation
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.residency import ArtifactSwitcher, Link, PhysicalSwitcher, Switcher
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
class SimWorker:
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
    began_us: int = 0  # the step under way, or the first of `ends_us` that is not done
    ends_us: list[int] = field(default_factory=list)  # of steps alike, of which nothing but news can be expected to change any
    view: DecodeWorkerView | None = None


class TokenLevel(Simulation[SimWorker]):
    """One pool of equal workers. `max_prefill_tokens` bounds one prefill step; a longer prompt takes one of its own.

    With `weight_budget_bytes` of its arena a worker keeps models and KV while they fit; without, it follows the published artifact: one
    model at a time, and KV comes in anew at each turn. Decode steps that nothing but an arrival could change are one event.
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
        devices_per_link: int = 1,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(targets, journal)
        self._costs = costs
        self._weight_budget_bytes = weight_budget_bytes
        self._keeps_kv = weight_budget_bytes is not None  # what is left of the arena holds it
        self._tpot_s = targets.tpot_us / SECOND
        self._policy = policy
        self._max_prefill_tokens = max_prefill_tokens
        self._max_num_seqs = max_num_seqs
        self._kinds: dict[ModelName, str] = {}
        links = [Link() for _ in range(0, num_workers, devices_per_link)]
        weights = [self._switcher(links[i // devices_per_link]) for i in range(num_workers)]
        self._workers = [SimWorker(i, WorkerId(f"worker-{i:04d}"), policy.start(), weights[i]) for i in range(num_workers)]
        self._decode_costs: dict[ModelName, Coefficients] = {}
        self._weight_bytes: dict[ModelName, int] = {}
        self._switch_bytes_per_s = 1.0
        self._output_len = EXPECTED_OUTPUT_LEN
        self.num_switches = self.num_decisions = self.num_steps = 0

    def _switcher(self, link: Link) -> Switcher:
        if self._weight_budget_bytes is None:
            return ArtifactSwitcher(self._costs, self._kinds)
        return PhysicalSwitcher(self._costs, self._kinds, self._weight_budget_bytes, link)

    def _begin(self, requests: Sequence[SimRequest]) -> None:
        """What a placement knows of each model's costs: a line through the cost model's answers."""
        kinds = {request.model: request.kind for request in requests}
        for name, kind in kinds.items():
            model = ModelName(name)
            self._kinds[model], self._weight_bytes[model] = kind, self._costs.weight_bytes(kind)
            base = self._costs.decode_us(kind, 1, 0)
            per_seq = (self._costs.decode_us(kind, 65, 0) - base) / 64
            per_token = (self._costs.decode_us(kind, 1, 100_000) - base) / 100_000
            self._decode_costs[model] = tuple(max(0.0, c) / SECOND for c in (base - per_seq, per_seq, per_token))  # type: ignore[assignment]
        if kinds:
            largest = max(sorted(set(kinds.values())), key=self._costs.weight_bytes)
            self._switch_bytes_per_s = self._costs.weight_bytes(largest) * SECOND / self._costs.load_us(largest)

    # -- placement ----------------------------------------------------------------------------------------------------

    def _arrive(self, one: Progress) -> None:
        now_us = one.request.arrival_us
        worker = self._place(one.request, now_us)
        if worker is None:
            one.has_failed = True
            return
        self._note_placement(one, worker.number)
        self._catch_up(worker, now_us)
        model = ModelName(one.request.model)
        work = worker.work.setdefault(model, _Work(one.request.kind))
        work.prompts.append(one)
        worker.has_news, worker.view = True, None
        if worker.is_busy:
            self._interrupt(worker)
        else:
            self._start(worker, now_us)

    def _place(self, request: SimRequest, now_us: int) -> SimWorker | None:
        """None refuses it."""
        ask = AskView(
            model=ModelName(request.model),
            num_prompt_tokens=request.input_len,
            num_output_tokens=max(1, round(self._output_len)),
            tpot_slo_s=self._tpot_s,
            kv_bytes=round(request.input_len + self._output_len) * self._costs.kv_bytes(request.kind),
            weight_bytes=self._costs.weight_bytes(request.kind),
        )
        choice = choose_decode(ask, (self._worker_view(worker, now_us) for worker in self._workers))
        assert choice is not None
        return self._workers[int(choice.worker_id.rpartition("-")[2])]

    def _worker_view(self, worker: SimWorker, now_us: int) -> DecodeWorkerView:
        if worker.view is None:
            self._catch_up(worker, now_us)
            worker.view = self._viewed(worker)
        return worker.view

    def _viewed(self, worker: SimWorker) -> DecodeWorkerView:
        models: dict[ModelName, DecodeModelView] = {}
        kv_bytes = 0
        for model, work in worker.work.items():
            num_seqs = len(work.running) + len(work.prompts)
            kv_tokens = work.kv_tokens + sum(one.request.input_len for one in work.prompts)
            kv_bytes += kv_tokens * self._costs.kv_bytes(work.kind)
            step_s = self._costs.decode_us(work.kind, num_seqs, kv_tokens) / SECOND
            models[model] = DecodeModelView(num_seqs=num_seqs, kv_tokens=kv_tokens, tpot_slo_s=self._tpot_s, step_s=step_s)
        return worker_view(
            worker.worker_id,
            models,
            resident=worker.weights.resident,
            costs=self._decode_costs,
            weight_bytes=self._weight_bytes,
            switch_bytes_per_s=self._switch_bytes_per_s,
            free_kv_bytes=self._costs.arena_bytes() * 8 // 10 - kv_bytes,
            max_num_seqs=self._max_num_seqs,
        )

    # -- turns --------------------------------------------------------------------------------------------------------

    def _start(self, worker: SimWorker, now_us: int) -> None:
        """Begin the worker's next step, a switch before it where the turn wants one."""
        if worker.is_busy or not worker.work:
            return
        turn = self._current_turn(worker, now_us)
        if turn is None:
            return
        work = worker.work[turn.model]
        took_us = self._switch_us(worker, turn, work, now_us)
        again_us = None
        if turn.prefetch is not None:
            again_us = worker.weights.prefetch(turn.prefetch, now_us + took_us, worker.work.keys())
        self._note(worker.number, SWITCH, turn.model, now_us, now_us + took_us)
        worker.turn_began_us += took_us
        worker.began_us = now_us + took_us
        worker.ends_us = self._steps(worker, turn, work, again_us)
        worker.is_busy = True
        self._at(worker.ends_us[-1], worker)

    def _current_turn(self, worker: SimWorker, now_us: int) -> Turn | None:
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
            can_prefetch=worker.weights.can_prefetch(worker.turn.prefetch if worker.turn is not None else None, worker.work.keys()),
        )
        self.num_decisions += 1
        worker.turn, worker.memory = self._policy.next_turn(view, worker.memory)
        worker.turn_began_us, worker.has_news = now_us, False
        return worker.turn

    def _batch(self, worker: SimWorker, model: ModelName, work: _Work, now_us: int) -> BatchView:
        both = (*work.running, *work.prompts)
        kv_tokens = sum(one.request.input_len + one.num_tokens for one in both)
        return BatchView(
            model=model,
            num_seqs=len(both),
            kv_tokens=kv_tokens,
            step_s=self._costs.decode_us(work.kind, len(both), kv_tokens) / SECOND,
            tpot_slo_s=self._tpot_s,
            switch_s=self._wait_us(worker, model, work, now_us) / SECOND,
            prefill_s=sum(self._costs.prefill_us(work.kind, (one.request.input_len,)) for one in work.prompts) / SECOND,
            dues=tuple([self._due(one) for one in both]),
        )

    def _due(self, one: Progress) -> Due:
        due_us = one.request.arrival_us + self._targets.due_us(one.num_tokens)
        return Due(due_us / SECOND, self._tpot_s, one.num_on_time == one.num_tokens, not one.num_tokens)

    def _wait_us(self, worker: SimWorker, model: ModelName, work: _Work, now_us: int) -> int:
        if model == worker.weights.active:
            return 0
        return worker.weights.wait_us(model, now_us) + self._kv_in_us(work)

    def _kv_in_us(self, work: _Work) -> int:
        """What a turn's start pays for KV that went out of the way; nothing where it stays."""
        return 0 if self._keeps_kv else self._costs.kv_in_us(work.kind, work.kv_tokens)

    def _switch_us(self, worker: SimWorker, turn: Turn, work: _Work, now_us: int) -> int:
        took_us = 0
        if worker.weights.active != turn.model:
            took_us = worker.weights.switch(turn.model, now_us, worker.work.keys()) + self._kv_in_us(work)
            worker.view = None
            self.num_switches += 1
        return took_us

    def _steps(self, worker: SimWorker, turn: Turn, work: _Work, again_us: int | None) -> list[int]:
        """When the next steps end: one over prompts, as many as it may hold, or decode steps until something else may have to be done.

        That is: a sequence ends, the turn does, or a prefetch can begin, at `again_us`.
        """
        if work.prompts and len(work.running) < self._max_num_seqs:
            lengths: list[int] = []
            for one in work.prompts:
                if lengths and sum(lengths) + one.request.input_len > self._max_prefill_tokens:
                    break
                lengths.append(one.request.input_len)
            worker.prefilling = work.prompts[: len(lengths)]
            return [worker.began_us + self._costs.prefill_us(work.kind, lengths)]
        worker.decoding = work.running[: self._max_num_seqs]
        quota_s = math.inf if len(worker.work) == 1 else turn.quota_s or 0.0
        num_seqs, kv_tokens, decode_us = len(worker.decoding), work.kv_tokens, self._costs.decode_us
        at_us, ends_us = worker.began_us, []
        for _ in range(min(one.num_left for one in worker.decoding)):
            at_us += decode_us(work.kind, num_seqs, kv_tokens)
            ends_us.append(at_us)
            kv_tokens += num_seqs
            if (at_us - worker.turn_began_us) / SECOND >= quota_s or (again_us is not None and at_us >= again_us):
                break
        return ends_us

    def _interrupt(self, worker: SimWorker) -> None:
        """News: only the step under way is sure to be taken."""
        if len(worker.ends_us) > 1:
            worker.ends_us = worker.ends_us[:1]
            self._at(worker.ends_us[0], worker)

    def _catch_up(self, worker: SimWorker, now_us: int) -> None:
        """Steps that ended before now are over."""
        if worker.is_busy and worker.ends_us[0] < now_us:
            self._done(worker, bisect_left(worker.ends_us, now_us))

    def _done(self, worker: SimWorker, count: int) -> None:
        """The first `count` of the steps under way are: their tokens are out."""
        assert worker.turn is not None
        ends_us = worker.ends_us[:count]
        worker.ends_us = worker.ends_us[count:]
        max_gap_us = max((after - before for before, after in pairwise(ends_us)), default=0)
        for one in worker.prefilling or worker.decoding:
            one.tokens(ends_us, max_gap_us)
        self.num_steps += count
        worker.weights.computed(ends_us[-1] - worker.began_us)
        self._note(worker.number, PREFILL if worker.prefilling else DECODE, worker.turn.model, worker.began_us, ends_us[-1])
        worker.began_us = ends_us[-1]

    def _ended(self, worker: SimWorker, now_us: int) -> None:
        if not worker.is_busy or worker.ends_us[-1] != now_us:
            return  # an event from before the news
        assert worker.turn is not None
        self._done(worker, len(worker.ends_us))
        worker.is_busy = False
        work = worker.work[worker.turn.model]
        for one in worker.prefilling or worker.decoding:
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
