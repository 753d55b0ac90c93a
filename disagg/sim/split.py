"""Prefill and decode on workers of their own, as under `pools.split: fixed`: KV is handed over while it is computed, layer by layer.

A request's decode worker is chosen as ever, then its prefill worker by `choose_prefill`, with the seconds of the handover over the link
between them. It is sent there when its decode worker has room for it. Roles are dealt along the line of devices, so every host has both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from polymux.disagg.dispatch import Coefficients, choose_prefill
from polymux.disagg.multiplex import Turn, TurnPolicy
from polymux.disagg.placement import BYTES_PER_S, deal
from polymux.disagg.prefill import PrefillPolicy
from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.kv import blocks
from polymux.disagg.sim.links import Flow
from polymux.disagg.sim.loop import PREFILL, SWITCH
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.token_level import TokenLevel
from polymux.disagg.sim.traffic import HANDOVER, Traffic
from polymux.disagg.sim.worker import Prompt, SimWorker, Work
from polymux.disagg.sim.workload import SimRequest
from polymux.disagg.views import AskView, PrefillView, PrefillWorkerView, PromptView
from polymux.transport.messages import Role
from polymux.transport.units import ModelName, SequenceId, WorkerId


@dataclass(slots=True, eq=False)
class _Job:
    """One prompt at its prefill worker, until its KV is with its decode worker."""

    prompt: Prompt
    number: int  # in the order in which they came
    target: SimWorker
    flows: list[Flow] = field(default_factory=list)
    is_computed: bool = False

    @property
    def model(self) -> ModelName:
        return ModelName(self.prompt.one.request.model)

    @property
    def kind(self) -> str:
        return self.prompt.one.request.kind


@dataclass(slots=True, eq=False)
class _Prefills:
    """A worker's prefill role. `worker` steps; its turns are single steps."""

    worker: SimWorker
    memory: Any  # the prefill policy's
    busy_until_s: float = 0.0  # as the controller books it
    line: list[_Job] = field(default_factory=list)  # for room, oldest first
    jobs: list[_Job] = field(default_factory=list)  # with room, and something to compute
    stepping: list[tuple[_Job, int]] = field(default_factory=list)


class SplitLevel(TokenLevel):
    """`num_prefill` of the workers prefill. The other settings are `TokenLevel`'s."""

    def __init__(
        self,
        costs: CostModel,
        targets: Targets,
        policy: TurnPolicy[Any],
        *,
        num_prefill: int,
        num_workers: int,
        prefill: PrefillPolicy[Any],
        **settings: Any,
    ) -> None:
        roles = deal(num_prefill, num_workers - num_prefill)
        numbers = [number for number, role in enumerate(roles) if role is Role.PREFILL]
        super().__init__(costs, targets, policy, num_workers=num_workers, excluded=frozenset(numbers), **settings)
        self._prefill = prefill
        self._prefills = {number: _Prefills(self._workers[number], prefill.start()) for number in numbers}
        self._numbers = {worker.worker_id: worker.number for worker in self._workers}
        self._prefill_costs: dict[ModelName, Coefficients] = {}
        self._sent_to: dict[int, int] = {}  # prefill workers by request, until it is ordered
        self._orders: list[tuple[Prompt, SimWorker]] = []  # that have room where they will decode
        self._num_jobs = 0
        self.room.elsewhere = lambda prompt, worker: self._orders.append((prompt, worker))

    def _begin(self, requests: Sequence[SimRequest]) -> None:
        super()._begin(requests)
        by_kind = {kind: _parabola(self._costs, kind) for kind in self._kinds.values()}
        self._prefill_costs = {model: by_kind[kind] for model, kind in self._kinds.items()}

    # -- placement ----------------------------------------------------------------------------------------------------

    def _place(self, request: SimRequest, now_us: int) -> SimWorker | None:
        ask = self._placement.ask(request)
        target = super()._place(request, now_us)
        assert target is not None
        now_s = now_us / SECOND
        views = [self._prefill_view(one, now_us) for one in self._prefills.values()]
        choice = choose_prefill(ask, views, now_s=now_s, handover_s=self._handover_s(ask, target))
        assert choice is not None
        source = self._prefills[self._numbers[choice.worker_id]]
        source.busy_until_s = max(source.busy_until_s, now_s) + choice.prefill_s + choice.switch_s
        self._sent_to[request.request_id] = source.worker.number
        return target

    def _prefill_view(self, one: _Prefills, now_us: int) -> PrefillWorkerView:
        return PrefillWorkerView(
            worker_id=one.worker.worker_id,
            busy_until_s=one.busy_until_s,
            waiting=Counter(job.model for job in (*one.line, *one.jobs)),
            resident=one.worker.weights.known(now_us),
            costs=self._prefill_costs,
            switch_bytes_per_s=self._placement.switch_bytes_per_s,
        )

    def _handover_s(self, ask: AskView, target: SimWorker) -> dict[WorkerId, float]:
        """As the live dispatcher has it; empty where no links are known."""
        if self.traffic is None:
            return {}
        nbytes = ask.kv_bytes * ask.num_prompt_tokens / (ask.num_prompt_tokens + ask.num_output_tokens)
        link = self.traffic.topology.link
        return {one.worker.worker_id: nbytes / BYTES_PER_S[link(number, target.number)] for number, one in self._prefills.items()}

    # -- prompts ------------------------------------------------------------------------------------------------------

    def _arrive(self, one: Progress) -> None:
        super()._arrive(one)
        self._send(one.request.arrival_us + self.door_us)

    def _ended(self, worker: SimWorker, now_us: int) -> None:
        source = self._prefills.get(worker.number)
        if source is None:
            super()._ended(worker, now_us)
        else:
            self._prefilled(source, now_us)
        self._send(now_us)

    def _send(self, now_us: int) -> None:
        """Those that have room now go to their prefill workers."""
        orders, self._orders = self._orders, []
        for prompt, target in orders:
            source = self._prefills[self._sent_to.pop(prompt.one.request.request_id)]
            self._num_jobs += 1
            source.line.append(_Job(prompt, self._num_jobs, target))
            self._step(source, now_us)

    def _step(self, source: _Prefills, now_us: int) -> None:
        """Begin the next step of a prefill worker, if there is one."""
        worker = source.worker
        self._take_room(source, now_us)
        if worker.is_busy or not source.jobs:
            return
        view = PrefillView(
            now_s=now_us / SECOND,
            active=worker.weights.active,
            prompts=tuple(self._viewed_prompt(worker, job, now_us) for job in source.jobs),
            max_num_batched_tokens=self._max_prefill_tokens,
        )
        self.num_decisions += 1
        step, source.memory = self._prefill.next_step(view, source.memory)
        assert step is not None
        jobs = {str(job.number): job for job in source.jobs}
        source.stepping = [(jobs[chunk.sequence_id], chunk.num_tokens) for chunk in step.chunks]
        wanted = {job.model for job in source.jobs}
        took_us = 0
        if worker.weights.active != step.model:
            self.num_switches += 1
            took_us = worker.weights.switch(step.model, now_us, wanted)
        if step.prefetch is not None:
            worker.weights.prefetch(step.prefetch, now_us + took_us, wanted)
        self._note(worker.number, SWITCH, step.model, now_us, now_us + took_us)
        worker.turn = Turn(model=step.model, quota_s=None, prefetch=step.prefetch)
        worker.began_us, worker.is_busy = now_us + took_us, True
        step_us = self._costs.prefill_us(
            self._kinds[step.model], [n for _, n in source.stepping], [job.prompt.num_done for job, _ in source.stepping]
        )
        paced_us = self._paced_us(worker, worker.began_us, step_us, self._overheads.prefill_stretch, len(source.stepping))
        worker.ends_us = [worker.began_us + paced_us]
        if self.traffic is None:
            self._at(worker.ends_us[0], worker)
        elif not self._is_held(worker, took_us):
            self._at(worker.ends_us[0], worker)
            self._push(source, self.traffic, now_us)

    def _take_room(self, source: _Prefills, now_us: int) -> None:
        """Blocks for all of a prompt, oldest first. One that would never have them is computed where it decodes."""
        kv = source.worker.kv
        while source.line:
            job = source.line[0]
            token_bytes = self._costs.kv_bytes(job.kind)
            if kv is not None:
                nbytes = blocks(job.prompt.num_tokens + 1) * token_bytes
                if nbytes > kv.arena_bytes - kv.reserve_bytes:
                    source.line.pop(0)
                    self._deliver(job, now_us)
                    continue
                if nbytes > kv.free_bytes:
                    return
            self.room.hold(source.worker, job.prompt)
            source.jobs.append(source.line.pop(0))
            if self.traffic is not None and job.prompt.num_done:
                self._send_kv(self.traffic, source, job, job.prompt.num_done * token_bytes, now_us)

    def _viewed_prompt(self, worker: SimWorker, job: _Job, now_us: int) -> PromptView:
        prompt, model = job.prompt, job.model
        return PromptView(
            sequence_id=SequenceId(str(job.number)),
            model=model,
            order=job.number,
            num_tokens=prompt.num_tokens,
            num_done=prompt.num_done,
            due_at_s=self._views.due_s(prompt.one),
            tpot_slo_s=self._views.tpot_s,
            prefill_s=self._costs.prefill_us(job.kind, (prompt.num_left,), (prompt.num_done,)) / SECOND,
            switch_s=0.0 if model == worker.weights.active else worker.weights.wait_us(model, now_us) / SECOND,
        )

    def _prefilled(self, source: _Prefills, now_us: int) -> None:
        """A step of a prefill worker has ended."""
        worker = source.worker
        assert worker.turn is not None
        worker.is_busy = False
        worker.weights.computed(now_us - worker.began_us)
        self._note(worker.number, PREFILL, worker.turn.model, worker.began_us, now_us)
        self.num_steps += 1
        stepped, source.stepping = source.stepping, []
        for job, num_tokens in stepped:
            job.prompt.num_done += num_tokens
            if not job.prompt.num_left:
                self._computed(source, job, num_tokens, now_us)
        source.busy_until_s = (now_us + self._left_us(source)) / SECOND
        self._step(source, now_us)

    def _left_us(self, source: _Prefills) -> int:
        """What its prompts still take, and the loads for them."""
        jobs = (*source.jobs, *source.line)
        cold = {job.model for job in jobs} - source.worker.weights.resident
        rest_us = sum(self._costs.prefill_us(job.kind, (job.prompt.num_left,), (job.prompt.num_done,)) for job in jobs)
        return rest_us + sum(self._costs.load_us(self._kinds[model]) for model in cold)

    # -- handover -----------------------------------------------------------------------------------------------------

    def _send_kv(self, traffic: Traffic, source: _Prefills, job: _Job, nbytes: int, now_us: int) -> None:
        job.flows.append(traffic.hand_over(source.worker.number, job.target.number, nbytes, now_us, (source, job)))

    def _push(self, source: _Prefills, traffic: Traffic, now_us: int) -> None:
        """The KV of a step's chunks goes as layers are computed: all but the last layer of a prompt's last chunk, beside the step."""
        for job, num_tokens in source.stepping:
            nbytes = num_tokens * self._costs.kv_bytes(job.kind)
            if num_tokens == job.prompt.num_left:
                nbytes -= nbytes // traffic.num_layers(job.kind)
            self._send_kv(traffic, source, job, nbytes, now_us)

    def _computed(self, source: _Prefills, job: _Job, num_tokens: int, now_us: int) -> None:
        """Its first token is out; its KV is there when the last layer's has gone."""
        source.jobs.remove(job)
        job.is_computed = True
        job.prompt.one.tokens([now_us], 0)
        if self.traffic is not None:
            last_bytes = num_tokens * self._costs.kv_bytes(job.kind) // self.traffic.num_layers(job.kind)
            self._send_kv(self.traffic, source, job, last_bytes, now_us)
        self._handed_over(source, job, now_us)

    def _release(self, worker: SimWorker, traffic: Traffic, now_us: int) -> None:
        super()._release(worker, traffic, now_us)
        source = self._prefills.get(worker.number)
        if source is not None:
            self._push(source, traffic, now_us)

    def _flow_ended(self, flow: Flow, traffic: Traffic, now_us: int) -> None:
        if flow.kind == HANDOVER:
            source, job = flow.owner
            self._handed_over(source, job, now_us)
            self._step(source, now_us)  # there may be room now
        else:
            super()._flow_ended(flow, traffic, now_us)
        self._send(now_us)

    def _handed_over(self, source: _Prefills, job: _Job, now_us: int) -> None:
        """If all of it is, its blocks here go back, and it decodes."""
        if job.is_computed and all(flow.is_done for flow in job.flows):
            self.room.release(source.worker, job.prompt.one)
            self._deliver(job, now_us)

    def _deliver(self, job: _Job, now_us: int) -> None:
        """To its decode worker, to go on with, or to compute where nothing of it is."""
        one, target = job.prompt.one, job.target
        if one.is_done:
            self.room.release(target, one)
            self._left(one, target)
            self._catch_up(target, now_us)
            self.room.grant(target)
        else:
            self._catch_up(target, now_us)
            work = target.work.setdefault(job.model, Work(job.kind))
            if job.prompt.num_left:
                work.prompts.append(job.prompt)
            else:
                work.running.append(one)
            target.has_news, work.view = True, None
        if target.is_busy:
            self._interrupt(target)
        else:
            self._start(target, now_us)


def _parabola(costs: CostModel, kind: str) -> Coefficients:
    """Seconds of a prefill by tokens and their square, through three of the cost model's answers."""
    none, some, more = (costs.prefill_us(kind, [n]) / SECOND for n in (0, 1000, 2000))
    square = max(0.0, (more - 2 * some + none) / 2e6)
    return max(0.0, none), max(0.0, (some - none) / 1e3 - square * 1e3), square
