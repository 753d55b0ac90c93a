"""The prefill role: orders come from decode workers with a grant of blocks; chunks are computed, layers pushed, the first token sent.

A job's blocks here are the transfer's until the other side has them or can no longer read them (`released`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch

from polymux.actors.drawn import Ask, Token
from polymux.actors.engine import Engine
from polymux.actors.kept import KeptSequences
from polymux.actors.local_orders import LocalOrders, is_local
from polymux.actors.meter import Meter
from polymux.actors.model_runner import ForwardBatch, SequenceSlice
from polymux.actors.outbox import Outbox
from polymux.actors.prefill_job import Job
from polymux.actors.sampler import SampledToken, SamplerState
from polymux.actors.turns import switch_left_s
from polymux.actors.updates import token_update
from polymux.disagg.prefill import PrefillPolicy, PrefillStep
from polymux.disagg.views import PrefillView, PromptView
from polymux.transport.errors import Cancelled, DeadlineExceeded, NoFreeBlocks, PolymuxError
from polymux.transport.head_slices import sharded
from polymux.transport.kv import OrderRef
from polymux.transport.messages import FinishReason, ModelLoad, ModelSpec, Prefill, Prefilled, SpanKind
from polymux.transport.prefix import TOKEN_BYTES, chain
from polymux.transport.units import ModelName, SequenceId, unpack_ids

PATIENCE_S = 0.5  # of a prompt whose blocks only this worker's own sequences could give


class PrefillRole:
    """Driven by the engine thread: `accept`, `cancel`, `released` for what came in, then `step` while it returns True."""

    def __init__(
        self,
        engine: Engine,
        source: LocalOrders,
        policy: PrefillPolicy[Any],
        meter: Meter,
        outbox: Outbox,
        kept: KeptSequences,
        *,
        on_prompt: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._on_prompt = on_prompt  # one more waits
        self._source = source
        self._policy = policy
        self._memory = policy.start()
        self._meter = meter
        self._outbox = outbox
        self._kept = kept
        self._jobs: dict[SequenceId, Job] = {}
        self._leaving: dict[OrderRef, Job] = {}  # done here; the other side may still read their blocks
        self._num_accepted = 0

    @property
    def num_open(self) -> int:
        return len(self._jobs)

    @property
    def models(self) -> frozenset[ModelName]:
        """Of all prompts here."""
        return frozenset(job.spec.model for job in self._jobs.values())

    def accept(self, command: Prefill, order: OrderRef) -> None:
        """Take an order in. One that cannot be served fails at once, to the decode worker, which tells the client."""
        try:
            spec = self._engine.spec(command.model)
            self._source.accept(order, spec.kv)
            if command.handover is not None:
                self._hand_over(command, order, spec)
                return
        except PolymuxError as error:
            self._source.fail(order, error)
            return
        if (older := self._jobs.get(command.sequence_id)) is not None:  # its decode worker was given up, and does not know it yet
            self._fail(older, Cancelled(f"sequence {command.sequence_id} was ordered anew"))
        self._num_accepted += 1
        packed_ids = command.prompt_ids + command.output_ids
        job = Job(
            order=order,
            command=command,
            spec=spec,
            place=self._num_accepted,
            deadline_s=self._engine.clock() + command.deadline_s,
            due_at_s=self._engine.clock() + command.due_in_s,
            prompt_ids=unpack_ids(command.prompt_ids),
            output_ids=unpack_ids(command.output_ids),
            packed_ids=packed_ids,
            digests=chain(spec, command.cache_salt, packed_ids) if self._engine.settings.prefix_caching else [],
        )
        if is_local(order):  # its own decode role's blocks: computed where they are wanted
            job.block_ids = unpack_ids(command.grant.block_ids)
            job.num_done = job.num_cached = command.num_in_place
            self._engine.pool(command.model).share(job.block_ids)
        self._jobs[command.sequence_id] = job
        self._on_prompt()

    def _hand_over(self, command: Prefill, order: OrderRef, spec: ModelSpec) -> None:
        """Push what is kept of a sequence as it is. Raises TransferError when it is not kept here."""
        kept = self._kept.take(command)
        now_s = self._engine.clock()
        job = Job(
            order=order,
            command=command,
            spec=spec,
            place=0,
            deadline_s=kept.deadline_s,
            due_at_s=now_s + command.due_in_s,
            prompt_ids=kept.prompt_ids,
            output_ids=kept.output_ids,
            block_ids=kept.block_ids,
            num_done=kept.num_cached,
        )
        self._leaving[order] = job
        job.pushed_s = now_s
        self._source.push(order, 0, spec.kv.num_layers, job.block_ids[: spec.kv.num_blocks(kept.num_cached)], 0)
        self._source.commit(order, Prefilled(sequence_id=command.sequence_id, token_id=None, finish_reason=None))
        self._meter.handed_over()

    def cancel(self, order: OrderRef, reason: str) -> None:
        """The decode worker no longer wants this one, or is gone. Unknown orders are ignored: they have ended already."""
        for job in [job for job in self._jobs.values() if job.order == order]:
            self._fail(job, Cancelled(f"sequence {job.command.sequence_id} was cancelled: {reason}"))

    def released(self, order: OrderRef, at_s: float) -> None:
        """Nobody has read this order's blocks since `at_s`, on the engine's clock: they go back."""
        job = self._leaving.pop(order, None)
        if job is None:
            job = next((job for job in self._jobs.values() if job.order == order), None)
            if job is None:
                return
            del self._jobs[job.command.sequence_id]
        if job.pushed_s is not None and not is_local(order):
            nbytes = job.spec.kv.num_blocks(job.num_done) * sharded(job.spec.kv, 1).block_bytes
            self._meter.timeline.add(
                SpanKind.KV_OUT, job.spec.model, job.pushed_s, at_s, nbytes=nbytes, num_seqs=1, num_tokens=job.num_done
            )
        self._engine.pool(job.spec.model).free(job.block_ids)
        job.block_ids = []

    def step(self) -> bool:
        """Run one forward pass of the policy's choice; False when nothing waits that could run."""
        budget = self._engine.settings.max_num_batched_tokens
        view = PrefillView(
            now_s=self._engine.clock(), active=self._engine.residency.active, prompts=self.prompts(), max_num_batched_tokens=budget
        )
        step, self._memory = self._policy.next_step(view, self._memory)
        if step is None:
            return False
        self.run(step, self.models)
        return True

    def prompts(self) -> tuple[PromptView, ...]:
        """Those that could run now; what is past its deadline is ended first."""
        self._expire()
        return tuple(
            PromptView(
                sequence_id=job.command.sequence_id,
                model=job.spec.model,
                order=job.place,
                num_tokens=job.num_tokens,
                num_done=job.num_done,
                due_at_s=job.due_at_s,
                tpot_slo_s=job.command.tpot_slo_s,
                prefill_s=self._meter.predict_prefill_s(job.spec.model, [(job.num_done, job.num_tokens - job.num_done)]),
                switch_s=switch_left_s(self._engine, self._meter, job.spec.model),
            )
            for job in self._ready()
        )

    def run(self, step: PrefillStep, wanted: Collection[ModelName], on_switch: Callable[[], None] = lambda: None) -> None:
        """One forward pass over these chunks; an error ends their jobs.

        Models in `wanted` have work on this worker: their weights leave last. `on_switch` is called where a switch was needed, and is done.
        """
        jobs = [self._jobs[chunk.sequence_id] for chunk in step.chunks]
        try:
            self._run(step, jobs, wanted, on_switch)
        except PolymuxError as error:
            for job in jobs:
                if job.command.sequence_id in self._jobs:
                    self._fail(job, error)

    def _ready(self) -> list[Job]:
        """Those that hold blocks, which are taken in line: a prompt that lacks some is overtaken by nobody, or short ones would starve it.

        A prompt takes all its blocks before its first chunk, so that no two half-done ones wait for each other. One whose next block
        is the same as that of one that is due earlier waits for it, and goes on with the cached block.
        """
        for job in list(self._jobs.values()):
            try:
                if not job.block_ids:
                    self._take_blocks(job)
                elif (digest := job.next_digest) is not None and self._engine.prefixes.has(digest):
                    self._adopt(job)
            except NoFreeBlocks as error:
                self._pass_on(job, error)
                break
            except PolymuxError as error:
                self._fail(job, error)
        begun: set[bytes] = set()
        ready = sorted((job for job in self._jobs.values() if job.block_ids), key=lambda job: (job.due_at_s, job.place))
        return [job for job in ready if _is_first(job.next_digest, begun)]

    def _pass_on(self, job: Job, error: NoFreeBlocks) -> None:
        """Give the first in line back to its decode worker, which can always compute it in the blocks that it granted.

        Only where no order here will free any: this worker's own sequences hold them all, and may wait for that decode worker in turn.
        """
        if self._leaving or any(other.block_ids for other in self._jobs.values() if not is_local(other.order)):
            job.short_since_s = None
        elif job.short_since_s is None:
            job.short_since_s = self._engine.clock()
        elif self._engine.clock() - job.short_since_s >= PATIENCE_S:
            self._fail(job, error)

    def _take_blocks(self, job: Job) -> None:
        """All that it needs, cached ones first. Raises NoFreeBlocks, and takes none."""
        pool = self._engine.pool(job.spec.model)
        found = self._engine.prefixes.match(job.spec, job.command.cache_salt, job.packed_ids)
        try:
            job.block_ids = found + pool.allocate(job.spec.kv.num_blocks(job.num_tokens) - len(found))
        except NoFreeBlocks:
            pool.free(found)
            raise
        self._skip(job, found)

    def _adopt(self, job: Job) -> None:
        """Go on with what is cached beyond this job's own blocks, which are given up for it; granted ones get the bytes instead."""
        first = job.num_done // job.spec.kv.block_size
        found = self._engine.prefixes.match(job.spec, job.command.cache_salt, job.packed_ids, first_block=first)
        pool = self._engine.pool(job.spec.model)
        if is_local(job.order):
            try:
                self._skip(job, found)
            finally:
                pool.free(found)
            return
        pool.free(job.block_ids[first : first + len(found)])
        job.block_ids[first : first + len(found)] = found
        self._skip(job, found)

    def _skip(self, job: Job, found: list[int]) -> None:
        """The next blocks need no computing: push them, all layers at once."""
        if not found:
            return
        first = job.num_done // job.spec.kv.block_size
        num_done = (first + len(found)) * job.spec.kv.block_size
        job.num_cached += num_done - job.num_done
        job.num_done = num_done
        job.pushed_s = job.pushed_s or self._engine.clock()
        self._source.push(job.order, 0, job.spec.kv.num_layers, found, first)

    def _run(self, step: PrefillStep, jobs: list[Job], wanted: Collection[ModelName], on_switch: Callable[[], None]) -> None:
        switch = self._engine.activate(step.model, wanted=wanted)
        if switch is not None:
            self._meter.switched(switch)
            on_switch()
        started_s = self._engine.clock()
        slices: list[SequenceSlice] = []
        tokens: list[int] = []
        last_rows: list[int] = []
        for chunk, job in zip(step.chunks, jobs, strict=True):
            slices.append(SequenceSlice(start=len(tokens), num_tokens=chunk.num_tokens, context_len=chunk.start, block_ids=job.block_ids))
            tokens += job.tokens(chunk.start, chunk.num_tokens)
            if chunk.is_last:
                last_rows.append(len(tokens) - 1)
        batch = ForwardBatch(token_ids=torch.tensor(tokens), slices=tuple(slices), logits_rows=torch.tensor(last_rows, dtype=torch.int64))
        self._engine.prefetch(step.prefetch, wanted=wanted)
        finished = [job for chunk, job in zip(step.chunks, jobs, strict=True) if chunk.is_last]
        states = [self._sampler_state(job) for job in finished]
        drawn = self._engine.decode(batch, [Ask(state) for state in states], on_layer=lambda layer: self._push(layer, step, jobs))
        for chunk, job in zip(step.chunks, jobs, strict=True):
            job.num_done = chunk.start + chunk.num_tokens
            done = job.packed_ids[: job.num_done * TOKEN_BYTES]
            self._engine.prefixes.insert(job.spec, job.command.cache_salt, done, job.block_ids)
        made = drawn.tokens()
        self._engine.device.mark().wait()
        seconds = self._engine.clock() - started_s - self._engine.stalled_s
        chunks = [(chunk.start, chunk.num_tokens) for chunk in step.chunks]
        self._meter.prefilled(step.model, chunks, seconds, is_typical=not self._engine.is_streaming)
        self._finish(finished, states, made)

    def _push(self, layer: int, step: PrefillStep, jobs: list[Job]) -> None:
        """Offer this layer of the blocks that the chunk filled, and of the one that it leaves partly filled only when it is the last."""
        for chunk, job in zip(step.chunks, jobs, strict=True):
            size = job.spec.kv.block_size
            first = chunk.start // size
            end = job.spec.kv.num_blocks(chunk.start + chunk.num_tokens) if chunk.is_last else (chunk.start + chunk.num_tokens) // size
            if end > first:
                if job.pushed_s is None:
                    job.pushed_s = self._engine.clock()
                self._source.push(job.order, layer, layer + 1, job.block_ids[first:end], first)

    def _finish(self, jobs: list[Job], states: list[SamplerState], tokens: list[Token]) -> None:
        """Send each job's next token to its client, and commit its transfer."""
        if not jobs:
            return
        for job, state, token in zip(jobs, states, tokens, strict=True):
            if isinstance(token, PolymuxError):
                self._fail(job, token)
                continue
            index = len(job.output_ids)
            state.append(token.token_id)
            reason = state.finish_reason(max_model_len_reached=job.num_tokens + 1 >= job.spec.max_model_len)
            self._commit(job, index, token, reason)
        self._meter.sampled_first(len(jobs))

    def _sampler_state(self, job: Job) -> SamplerState:
        return SamplerState(job.command.sampling, job.prompt_ids, job.output_ids, job.spec.eos_token_ids, job.spec.vocab_size)

    def _commit(self, job: Job, index: int, token: SampledToken, reason: FinishReason | None) -> None:
        sequence_id = job.command.sequence_id
        cached = min(job.num_cached, len(job.prompt_ids)) if index == 0 else 0  # a replay or a resumption is not the user's prompt
        self._outbox.add(job.command.client_id, token_update(sequence_id, index, token, reason, cached_tokens=cached))
        if self._engine.settings.prefix_caching:
            self._meter.reused(job.num_tokens, job.num_cached)
        self._leave(job)
        self._source.commit(job.order, Prefilled(sequence_id=sequence_id, token_id=token.token_id, finish_reason=reason))

    def _fail(self, job: Job, error: PolymuxError) -> None:
        self._leave(job)
        self._source.fail(job.order, error)

    def _leave(self, job: Job) -> None:
        del self._jobs[job.command.sequence_id]
        self._leaving[job.order] = job

    def _expire(self) -> None:
        now = self._engine.clock()
        for job in [job for job in self._jobs.values() if job.deadline_s <= now]:
            self._fail(job, DeadlineExceeded(f"sequence {job.command.sequence_id} was not prefilled before its deadline"))

    def fail_all(self, error: PolymuxError) -> None:
        """End everything with one error: the worker cannot go on with what it has."""
        for job in list(self._jobs.values()):
            self._fail(job, error)

    def next_deadline_s(self) -> float | None:
        """When `step` next has something to expire, on the engine's clock."""
        deadlines = [job.deadline_s for job in self._jobs.values()]
        deadlines += [job.short_since_s + PATIENCE_S for job in self._jobs.values() if job.short_since_s is not None]
        return min(deadlines, default=None)

    def loads(self) -> tuple[ModelLoad, ...]:
        waiting: dict[ModelName, list[Job]] = defaultdict(list)
        for job in self._jobs.values():
            waiting[job.spec.model].append(job)
        return tuple(
            ModelLoad(
                model=model,
                is_resident=model in self._engine.residency.residents,
                num_waiting=len(waiting[model]),
                num_running=0,
                waiting_tokens=sum(job.num_tokens - job.num_done for job in waiting[model]),
                kv_tokens=sum(len(job.block_ids) * job.spec.kv.block_size for job in waiting[model]),
            )
            for model in sorted(waiting)
        )


def _is_first(digest: bytes | None, begun: set[bytes]) -> bool:
    """Does no job before this one compute that block? Notes it."""
    if digest is None:
        return True
    if digest in begun:
        return False
    begun.add(digest)
    return True
