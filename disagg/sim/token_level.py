"""Token-level multiplexing by the policies of `disagg/` themselves: every worker does both phases, one model at a time, turn by turn.

A request is placed once, as the controller does it (`placement.py`), and waits there for room (`room.py`). Its prompt is computed in
the turns of its model, chunk by chunk, and decodes with the others. Policies see a worker's own predictions; time passes by what it takes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from polymux.disagg.batching import fill_step
from polymux.disagg.multiplex import Turn, TurnPolicy, is_over
from polymux.disagg.phase import Phase, next_phase
from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.kv import KvRoom
from polymux.disagg.sim.linked import LinkedSwitcher
from polymux.disagg.sim.links import Flow
from polymux.disagg.sim.loop import DECODE, PREFILL, SWITCH, Journal, Simulation
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.overheads import Overheads
from polymux.disagg.sim.placement import Placement
from polymux.disagg.sim.residency import ArtifactSwitcher, Link, PhysicalSwitcher, Reported, Switcher
from polymux.disagg.sim.room import Room
from polymux.disagg.sim.topology import Hosts
from polymux.disagg.sim.traffic import Traffic
from polymux.disagg.sim.work_views import WorkViews, prompt_view
from polymux.disagg.sim.worker import Prompt, SimWorker, Work
from polymux.disagg.sim.workload import SimRequest
from polymux.disagg.views import BatchView, DecodeView
from polymux.transport.units import ModelName, WorkerId

NO_OVERHEADS = Overheads()


class TokenLevel(Simulation[SimWorker]):
    """One pool of equal workers. `max_prefill_tokens` bounds one prefill step.

    With `weight_budget_bytes`, its arena's reserve, a worker keeps models and KV while they fit; without, it follows the published
    artifact: one model at a time, and KV comes in anew at each turn. Decode steps that nothing but an arrival could change are one event.
    With `hosts`, whatever is copied is a flow over links (`links.py`), and the step that waits for it ends when its layers have come.
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
        hosts: Hosts | None = None,
        max_quota_s: float = 4.0,
        overheads: Overheads = NO_OVERHEADS,
        excluded: frozenset[int] = frozenset(),
        journal: Journal | None = None,
    ) -> None:
        super().__init__(costs, targets, num_devices=num_workers, hosts=hosts, journal=journal)
        self._weight_budget_bytes = weight_budget_bytes
        self._keeps_kv = weight_budget_bytes is not None
        self._policy = policy
        self._max_prefill_tokens = max_prefill_tokens
        self._max_num_seqs = max_num_seqs
        self._views = WorkViews(costs, targets, max_num_seqs)
        self._overheads = overheads
        self.door_us = overheads.door_us
        self._kinds: dict[ModelName, str] = {}
        links = [Link() for _ in range(0, num_workers, devices_per_link)]
        self._workers = [self._worker(i, links[i // devices_per_link]) for i in range(num_workers)]
        self._placement = Placement(
            costs,
            self._views.tpot_s,
            [worker.worker_id for worker in self._workers],
            lambda number, now_us: self._workers[number].weights.known(now_us),
            max_num_seqs=max_num_seqs,
            max_quota_s=max_quota_s,
            kv_bytes=costs.arena_bytes() - (weight_budget_bytes or costs.arena_bytes() // 5),
            excluded=excluded,
        )
        self.room = Room(costs, max_num_seqs, lambda one, worker: self._left(one, worker))
        self.num_switches = self.num_decisions = self.num_steps = 0

    @property
    def num_held_bytes(self) -> int:
        """Of KV, by all sequences."""
        return sum(worker.kv.held_bytes for worker in self._workers if worker.kv is not None)

    def _worker(self, number: int, link: Link) -> SimWorker:
        kv = None
        if self._weight_budget_bytes is not None:
            kv = KvRoom(self._costs.arena_bytes(), self._weight_budget_bytes)
        return SimWorker(number, WorkerId(f"worker-{number:04d}"), self._policy.start(), self._switcher(number, link, kv), kv)

    def _switcher(self, number: int, link: Link, kv: KvRoom | None) -> Switcher:
        if kv is None:
            return ArtifactSwitcher(self._costs, self._kinds)
        reported, overhead_us = Reported(self._overheads.report_us), self._overheads.switch_us
        arena = (self._costs, self._kinds, kv.reserve_bytes, lambda: kv.weights_end, link, reported, overhead_us)
        return PhysicalSwitcher(*arena) if self.traffic is None else LinkedSwitcher(*arena, device=number, traffic=self.traffic)

    def _begin(self, requests: Sequence[SimRequest]) -> None:
        self._kinds |= {ModelName(request.model): request.kind for request in requests}
        self._placement.register(self._kinds)

    # -- requests -----------------------------------------------------------------------------------------------------

    def _arrive(self, one: Progress) -> None:
        now_us = one.request.arrival_us + self.door_us
        worker = self._place(one.request, now_us)
        if worker is None:
            one.has_failed = True
            return
        self._note_placement(one, worker.number)
        self._catch_up(worker, now_us)
        worker.line.append(Prompt(one, one.request.input_len))
        self.room.grant(worker)
        if worker.is_busy:
            self._interrupt(worker)
        else:
            self._start(worker, now_us)

    def _place(self, request: SimRequest, now_us: int) -> SimWorker | None:
        """None refuses it."""
        return self._workers[self._placement.place(request, now_us)]

    def _left(self, one: Progress, worker: SimWorker) -> None:
        """It was placed there, and has ended."""
        self._placement.ended(one.request, worker.number, one.num_tokens if one.is_done else None)

    # -- turns --------------------------------------------------------------------------------------------------------

    def _start(self, worker: SimWorker, now_us: int) -> None:
        """Begin the worker's next step, a switch before it where the turn wants one."""
        while not worker.is_busy:
            if not worker.work and worker.line:
                self.room.grant(worker)  # whoever ran last gave way
            if not worker.work:
                return
            turn = self._current_turn(worker, now_us)
            if turn is None:
                return
            work = worker.work[turn.model]
            took_us = self._switch_us(worker, turn, work, now_us)
            took_us += worker.weights.copied_us(worker.owed_us, now_us + took_us)
            worker.owed_us = 0
            if self.traffic is not None:
                self._copy(worker, self.traffic, now_us)
            again_us = None
            if turn.prefetch is not None:
                again_us = worker.weights.prefetch(turn.prefetch, now_us + took_us, worker.work.keys())
            self._note(worker.number, SWITCH, turn.model, now_us, now_us + took_us)
            worker.turn_began_us += took_us
            worker.began_us = now_us = now_us + took_us
            worker.ends_us = self._steps(worker, turn, work, again_us)
            if worker.ends_us:
                worker.is_busy = True
                if self.traffic is None or not self._is_held(worker, took_us):
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
            load_drag=self._overheads.load_drag,
            can_prefetch=worker.weights.can_prefetch(worker.turn.prefetch if worker.turn is not None else None, worker.work.keys()),
        )
        self.num_decisions += 1
        worker.turn, worker.memory = self._policy.next_turn(view, worker.memory)
        worker.turn_began_us, worker.has_news = now_us, False
        return worker.turn

    def _batch(self, worker: SimWorker, model: ModelName, work: Work, now_us: int) -> BatchView:
        switch_s = self._wait_us(worker, model, work, now_us) / SECOND
        if work.view is None or work.view.switch_s != switch_s:
            work.view = self._views.batch(model, work, switch_s) if work.view is None else replace(work.view, switch_s=switch_s)
        return work.view

    def _wait_us(self, worker: SimWorker, model: ModelName, work: Work, now_us: int) -> int:
        if model == worker.weights.active:
            return 0
        return worker.weights.wait_us(model, now_us) + self._kv_in_us(work)

    def _kv_in_us(self, work: Work) -> int:
        """What a turn's start pays for KV that went out of the way; nothing where it stays."""
        return 0 if self._keeps_kv else self._costs.kv_in_us(work.kind, work.kv_tokens)

    def _switch_us(self, worker: SimWorker, turn: Turn, work: Work, now_us: int) -> int:
        if worker.weights.active == turn.model:
            return 0
        self.num_switches += 1
        return worker.weights.switch(turn.model, now_us, worker.work.keys()) + self._kv_in_us(work)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _steps(self, worker: SimWorker, turn: Turn, work: Work, again_us: int | None) -> list[int]:
        """When the next steps end: one over prompts, as many as it may hold, or decode steps until something else may have to be done.

        That is: a sequence ends, the turn does, a prompt of the model waits, room runs out, or a prefetch can begin, at `again_us`. None
        at all where there was no room for one, and somebody gave way.
        """
        chunks = self._chunks(work)
        if chunks and self._phase(work, chunks, worker.began_us) is Phase.PREFILL:
            worker.prefilling = chunks
            took_us = self._costs.prefill_us(work.kind, [n for _, n in chunks], [prompt.num_done for prompt, _ in chunks])
            return [worker.began_us + self._paced_us(worker, worker.began_us, took_us, self._overheads.prefill_stretch, len(chunks))]
        most = 1 if chunks else min(one.num_left for one in work.running[: self._max_num_seqs])
        num_steps = self.room.with_room(worker, work, most)
        worker.decoding = work.running[: self._max_num_seqs] if num_steps else []
        quota_s = math.inf if len(worker.work) == 1 else turn.quota_s or 0.0
        num_seqs, kv_tokens, decode_us = len(worker.decoding), sum(one.context_len for one in worker.decoding), self._costs.decode_us
        at_us, ends_us, is_plain = worker.began_us, [], self._overheads is NO_OVERHEADS
        for _ in range(num_steps):
            step_us = decode_us(work.kind, num_seqs, kv_tokens)
            at_us += step_us if is_plain else self._paced_us(worker, at_us, step_us, self._overheads.decode_stretch, num_seqs)
            ends_us.append(at_us)
            kv_tokens += num_seqs
            if (at_us - worker.turn_began_us) / SECOND >= quota_s or (again_us is not None and at_us >= again_us):
                break
        return ends_us

    def _paced_us(self, worker: SimWorker, at_us: int, step_us: int, stretch: float, num_seqs: int) -> int:
        """A step as it really is: what its cost says, stretched, and what a worker does around it."""
        overheads = self._overheads
        if overheads is NO_OVERHEADS:
            return step_us
        paced_us = max(1, round((step_us * stretch + overheads.around_us(num_seqs)) * overheads.pace_at(at_us)))
        return overheads.dragged_us(paced_us, worker.weights.loading_us(at_us)) if overheads.load_drag else paced_us

    def _chunks(self, work: Work) -> list[tuple[Prompt, int]]:
        """Of the model's next prefill step: the earliest due first."""
        if not work.prompts:
            return []
        line = sorted(work.prompts, key=lambda prompt: (self._views.due_s(prompt.one), prompt.one.request.request_id))
        views = (prompt_view(i, prompt) for i, prompt in enumerate(line))
        return [(line[int(chunk.sequence_id)], chunk.num_tokens) for chunk in fill_step(views, self._max_prefill_tokens)]

    def _phase(self, work: Work, chunks: list[tuple[Prompt, int]], now_us: int) -> Phase:
        """What comes next in the turn of a model that has prompts."""
        if not work.running:
            work.passed_over.clear()
            return Phase.PREFILL
        phase = next_phase(self._views.phases(work, chunks, now_us))
        other = Phase.DECODE if phase is Phase.PREFILL else Phase.PREFILL
        work.passed_over[phase], work.passed_over[other] = 0, work.passed_over[other] + 1
        return phase

    def _interrupt(self, worker: SimWorker) -> None:
        """News: only the step under way is sure to be taken."""
        if len(worker.ends_us) > 1:
            worker.ends_us = worker.ends_us[:1]
            if not worker.held:
                self._at(worker.ends_us[0], worker)

    def _catch_up(self, worker: SimWorker, now_us: int) -> None:
        """Steps that ended before now are over."""
        if worker.is_busy and not worker.held and worker.ends_us[0] < now_us:
            self._done(worker, bisect_left(worker.ends_us, now_us))

    def _done(self, worker: SimWorker, count: int) -> None:
        """The first `count` of the steps under way are: their tokens are out."""
        assert worker.turn is not None
        worker.work[worker.turn.model].view = None
        ends_us, worker.ends_us = worker.ends_us[:count], worker.ends_us[count:]
        max_gap_us = max((after - before for before, after in pairwise(ends_us)), default=0)
        for prompt, num_tokens in worker.prefilling:
            prompt.num_done += num_tokens
        made = [prompt.one for prompt, _ in worker.prefilling if not prompt.num_left] or worker.decoding
        for one in made:
            one.tokens(ends_us, max_gap_us)
            if worker.kv is not None:
                worker.kv.hold(one.request.request_id, one.context_len, self._costs.kv_bytes(one.request.kind))
        self.num_steps += count
        worker.weights.computed(ends_us[-1] - worker.began_us)
        self._note(worker.number, PREFILL if worker.prefilling else DECODE, worker.turn.model, worker.began_us, ends_us[-1])
        worker.began_us = ends_us[-1]

    def _ended(self, worker: SimWorker, now_us: int) -> None:
        if not worker.is_busy or worker.held or worker.ends_us[-1] != now_us:
            return  # an event from before the news
        assert worker.turn is not None
        self._done(worker, len(worker.ends_us))
        worker.is_busy = False
        work = worker.work[worker.turn.model]
        if worker.prefilling:
            finished = [prompt for prompt, _ in worker.prefilling if not prompt.num_left]
            work.prompts = [prompt for prompt in work.prompts if prompt.num_left]
            work.running += [prompt.one for prompt in finished]
        has_left = [one for one in work.running if one.is_done]
        work.running = [one for one in work.running if not one.is_done]
        for one in has_left:
            self.room.release(worker, one)
            self._left(one, worker)
        worker.prefilling, worker.decoding = [], []
        worker.drop_idle()
        if has_left and worker.line:
            self.room.grant(worker)
        self._start(worker, now_us)

    # -- flows over links ---------------------------------------------------------------------------------------------

    def _copy(self, worker: SimWorker, traffic: Traffic, now_us: int) -> None:
        """KV that comes and goes begins to; the next step waits for both."""
        leaving, owed = worker.leaving_bytes, worker.owed_bytes
        worker.leaving_bytes = worker.owed_bytes = 0
        if leaving:
            worker.copies.append(traffic.copy_out(worker.number, leaving, now_us))
        if owed:
            worker.copies.append(traffic.copy_in(worker.number, owed, now_us))

    def _is_held(self, worker: SimWorker, late_us: int) -> bool:
        """Whether the step that is about to begin waits for flows. They began when it was decided, `late_us` before it can begin."""
        coming = worker.weights.coming()
        worker.held = [flow for flow in (*worker.copies, coming) if flow is not None and not flow.is_done]
        worker.copies = []
        worker.held_late_us = late_us
        return bool(worker.held)

    def _flow_ended(self, flow: Flow, traffic: Traffic, now_us: int) -> None:
        worker = self._workers[flow.owner]
        worker.weights.arrived(flow, now_us)
        if not worker.held:
            self._catch_up(worker, now_us)
        elif all(one.is_done for one in worker.held):
            self._release(worker, traffic, now_us)
        named = None if worker.turn is None else worker.turn.prefetch
        if worker.is_busy and named is not None and named not in worker.weights.resident:
            self._interrupt(worker)  # it asks for the prefetch again

    def _release(self, worker: SimWorker, traffic: Traffic, now_us: int) -> None:
        """The step under way has all that it waited for, and it is known when it ends, and those after it."""
        assert worker.turn is not None
        kind, began_us, first_us = self._kinds[worker.turn.model], worker.began_us, worker.ends_us[0]
        ends_us = [traffic.step_end_us(flow, kind, began_us, first_us - began_us, worker.held_late_us) for flow in worker.held]
        later_us = max(ends_us) - first_us
        worker.held = []
        worker.ends_us = [end_us + later_us for end_us in worker.ends_us]
        worker.turn_began_us += later_us
        worker.began_us = max(now_us, began_us + later_us)
        self._note(worker.number, SWITCH, worker.turn.model, began_us, worker.began_us)
        self._at(worker.ends_us[-1], worker)
