"""Who has room for KV on a simulated worker, who waits for it, and who gives way: first come, first served, as on a live one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.kv import Key, blocks
from polymux.disagg.sim.outcome import Progress
from polymux.disagg.sim.worker import Prompt, SimWorker, Work
from polymux.disagg.sim.workload import SimRequest
from polymux.disagg.swap import SwapView, pays
from polymux.transport.units import BLOCK_SIZE, ModelName


@dataclass(slots=True)
class Room:
    """Of all workers. `gone` is told of requests that can never have any."""

    costs: CostModel
    max_num_seqs: int
    gone: Callable[[Progress, SimWorker], None]
    elsewhere: Callable[[Prompt, SimWorker], None] | None = None  # is told of new prompts that have room, and has them computed
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # that needed no computing

    def grant(self, worker: SimWorker) -> None:
        """Room to those in line, oldest first: one that lacks it is overtaken by nobody, one whose batch is full waits aside."""
        waiting: list[Prompt] = []
        is_short = False
        for prompt in worker.line:
            model = ModelName(prompt.one.request.model)
            work = worker.work.get(model)
            if work is not None and work.num_seqs >= self.max_num_seqs:
                waiting.append(prompt)
                continue
            is_short = is_short or not self._has_room(worker, prompt)
            if not is_short:
                self._admit(worker, prompt, worker.work.setdefault(model, Work(prompt.one.request.kind)))
            elif worker.kv is not None and not worker.kv.held_bytes:  # nobody will leave any
                prompt.one.has_failed, is_short = True, False
                self.gone(prompt.one, worker)
            else:
                waiting.append(prompt)
        worker.line = waiting

    def _has_room(self, worker: SimWorker, prompt: Prompt) -> bool:
        return worker.kv is None or blocks(prompt.num_tokens + 1) * self.costs.kv_bytes(prompt.one.request.kind) <= worker.kv.free_bytes

    def _admit(self, worker: SimWorker, prompt: Prompt, work: Work) -> None:
        if self.elsewhere is not None and not prompt.one.num_tokens:
            if worker.kv is not None:
                worker.kv.hold(prompt.one.request.request_id, prompt.num_tokens + 1, self.costs.kv_bytes(work.kind))
            self.elsewhere(prompt, worker)
            worker.drop_idle()
            return
        worker.has_news, work.view = True, None
        self.hold(worker, prompt)
        if prompt.is_copied:
            worker.owed_us += self.costs.kv_in_us(work.kind, prompt.num_left)
            worker.owed_bytes += prompt.num_left * self.costs.kv_bytes(work.kind)
            work.running.append(prompt.one)
        else:
            work.prompts.append(prompt)

    def hold(self, worker: SimWorker, prompt: Prompt) -> None:
        """Its room is taken; what is cached of it needs no computing."""
        if worker.kv is None:
            return
        key = _key(prompt.one.request)
        cached = worker.kv.cached_tokens(key, prompt.num_tokens)
        if cached:
            worker.kv.take(key)
            prompt.num_done = cached
            self.num_cached_tokens += cached
        worker.kv.hold(prompt.one.request.request_id, prompt.num_tokens + 1, self.costs.kv_bytes(prompt.one.request.kind))

    def with_room(self, worker: SimWorker, work: Work, num_steps: int) -> int:
        """For how many steps of the model's batch there is room. Where there is none for one, the youngest gives way, and it is 0."""
        if worker.kv is None:
            return num_steps
        token_bytes = self.costs.kv_bytes(work.kind)
        batch = work.running[: self.max_num_seqs]
        room = worker.kv.free_bytes + sum(worker.kv.held(one.request.request_id) for one in batch)
        if room >= sum(one.context_len + num_steps + BLOCK_SIZE for one in batch) * token_bytes:
            return num_steps
        while num_steps and sum(blocks(one.context_len + num_steps) for one in batch) * token_bytes > room:
            num_steps //= 2
        if not num_steps:
            self._preempt(worker, work)
        return num_steps

    def _preempt(self, worker: SimWorker, work: Work) -> None:
        """The youngest of the batch loses its room, or of all where it is alone: to host memory where that pays, else for good."""
        everybody = [one for other in worker.work.values() for one in other.running]
        victim = max(work.running if len(work.running) > 1 else everybody, key=_age)
        model, kind = ModelName(victim.request.model), victim.request.kind
        assert worker.kv is not None
        worker.kv.release(victim.request.request_id)
        worker.work[model].running.remove(victim)
        worker.work[model].view = None
        num_tokens = victim.context_len
        copy_s = self.costs.kv_in_us(kind, num_tokens) / SECOND
        swap = SwapView(
            num_bytes=num_tokens * self.costs.kv_bytes(kind),
            free_host_bytes=num_tokens * self.costs.kv_bytes(kind),
            copy_s=copy_s,
            recompute_s=self.costs.prefill_us(kind, (num_tokens,)) / SECOND,
        )
        is_copied = pays(swap)
        worker.leaving_bytes += swap.num_bytes if is_copied else 0
        worker.line = sorted([*worker.line, Prompt(victim, num_tokens, is_copied=is_copied)], key=lambda prompt: _age(prompt.one))
        self.num_preemptions += 1
        worker.drop_idle()

    def release(self, worker: SimWorker, one: Progress) -> None:
        request = one.request
        if worker.kv is not None:
            token_bytes = self.costs.kv_bytes(request.kind)
            worker.kv.release(request.request_id, _key(request), one.context_len, token_bytes)


def _key(request: SimRequest) -> Key:
    return ModelName(request.model), request.request_id if request.session is None else request.session, request.session is not None


def _age(one: Progress) -> tuple[int, int]:
    return one.request.arrival_us, one.request.request_id
