"""Room on a decode worker: which sequences step, whose blocks go when they run out, and who waits in line for some.

What gives way first costs least: blocks that swapped sequences still have on the device, then the youngest that run. Blocks on their way
to the host are counted as coming, so that nobody else is preempted for the same need; who waits for them sits the step out, and the
others go on.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable

from polymux.actors.engine import Engine
from polymux.actors.kv_blocks import BlockPool
from polymux.actors.meter import Meter
from polymux.actors.sequence import Phase, Sequence
from polymux.actors.swap import Swapper
from polymux.disagg.batching import choose_victims, form_batch, next_grant
from polymux.disagg.views import HolderView, RunningView, WaitingView
from polymux.transport.messages import KVLayout, Peer
from polymux.transport.units import ModelName

IN_LINE = (Phase.WAITING, Phase.SWAPPED)  # for room, by age
PARTED = (Phase.WAITING, Phase.SWAPPED, Phase.SWAPPING_OUT)  # not in their model's batch, nor about to be


class Room:
    """The engine thread's. `sequences` is always all of the worker's."""

    def __init__(self, engine: Engine, swaps: Swapper, meter: Meter) -> None:
        self._engine = engine
        self._swaps = swaps
        self._meter = meter

    def form(self, model: ModelName, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those of a model that step now, each with room for its token. Empty when they wait for room that is coming or cannot be had."""
        sequences = list(sequences)
        pool, layout = self._engine.pool(model), self._engine.spec(model).kv
        running = {s.command.sequence_id: s for s in sequences if s.can_step and s.spec.model == model}
        views = [
            RunningView(sequence_id=key, order=s.order, context_len=s.num_launched, num_blocks=len(s.block_ids))
            for key, s in running.items()
        ]
        max_num_seqs = self._engine.settings.max_num_seqs
        parked = self._parked(sequences, layout)
        ready = self._swaps.num_coming(layout)
        spare = ready + sum(len(s.block_ids) for s in parked)
        batch = form_batch(views, max_num_seqs=max_num_seqs, num_free_blocks=pool.num_free + spare)
        if batch.num_short_blocks and self._take_slabs(model, batch.num_short_blocks, min(s.order for s in running.values()), sequences):
            batch = form_batch(views, max_num_seqs=max_num_seqs, num_free_blocks=pool.num_free + spare)
        victims = [*parked, *(running[key] for key in batch.preempt)]
        self._take(victims, batch.num_new_blocks - ready - pool.num_free, spare_blocks=len(batch.step))
        return self._with_room([running[key] for key in batch.step], pool)

    def is_ample(self, model: ModelName, sequences: Iterable[Sequence]) -> bool:
        """Whether all that run have a block for their next token, without taking anybody's."""
        running = (s for s in sequences if s.can_step and s.spec.model == model)
        return sum(max(s.num_blocks_wanted, 0) for s in running) <= self._engine.pool(model).num_free

    def serve_running(self, sequences: Iterable[Sequence]) -> float:
        """Give those that run the block for their next token, oldest first; the place in line of the first one that cannot have it.

        Nobody behind it is granted blocks before. And room that was made for one that runs is its own at once, or whoever gave it would
        be first to take it back.
        """
        for sequence in sorted((s for s in sequences if s.can_step), key=lambda s: s.order):
            if (wanted := sequence.num_blocks_wanted) > 0:
                pool = self._engine.pool(sequence.spec.model)
                if wanted > pool.num_free:
                    return sequence.order
                sequence.block_ids += pool.allocate(wanted)
        return math.inf

    def next_in_line(self, sequences: Collection[Sequence], full: Collection[Peer | None]) -> Sequence | None:
        """Who gets blocks now, oldest first; `full` are the prefill workers that take no more orders at present.

        While the oldest lacks some, swapped sequences give up what they still have on the device.
        """
        short = self.serve_running(sequences)
        line = {
            s.command.sequence_id: s
            for s in sequences
            if s.phase in IN_LINE and s.order < short and (s.phase is Phase.SWAPPED or s.prefill not in full)
        }
        if not line:
            return None
        held = Counter(s.spec.model for s in sequences if s.phase not in PARTED)
        free = {s.spec.model: self._engine.pool(s.spec.model).num_free for s in line.values()}
        max_num_seqs = self._engine.settings.max_num_seqs
        chosen = next_grant([_waiting(s) for s in line.values()], num_held=held, num_free_blocks=free, max_num_seqs=max_num_seqs)
        if chosen is not None:
            return line[chosen]
        able = [s for s in line.values() if held[s.spec.model] < max_num_seqs]
        if able and self._unpark(min(able, key=lambda s: s.order), sequences, is_idle=not held):
            return self.next_in_line(sequences, full)
        return None

    def preempt(self, sequence: Sequence, num_blocks: int | None = None) -> None:
        """Take its blocks, or its last `num_blocks`: to the host where that pays; else all are free at once, and computed again."""
        if sequence.phase is Phase.RUNNING:
            sequence.num_preemptions += 1
            self._meter.preempted()
        if not self._swaps.swap_out(sequence, len(sequence.block_ids) if num_blocks is None else num_blocks):
            self._swaps.release(sequence)
            sequence.phase = Phase.WAITING
            self._meter.gave_up(sequence.num_tokens)

    def _take(self, victims: Iterable[Sequence], num_blocks: int, spare_blocks: int) -> None:
        """Preempt in this order until `num_blocks` are free or coming. The last gives a few more, which the batch will want soon."""
        for victim in victims:
            if num_blocks <= 0:
                return
            held = len(victim.block_ids)
            self.preempt(victim, num_blocks + spare_blocks)
            num_blocks -= held - len(victim.block_ids)

    def _with_room(self, step: Iterable[Sequence], pool: BlockPool) -> list[Sequence]:
        """Give each its block. Once one has to wait for a coming block, nobody younger takes another before it."""
        ready, is_short = [], False
        for sequence in step:
            wanted = sequence.num_blocks_wanted
            if wanted > 0:
                is_short = is_short or wanted > pool.num_free
                if is_short:
                    continue
                sequence.block_ids += pool.allocate(wanted)
            ready.append(sequence)
        return ready

    def _take_slabs(self, model: ModelName, num_blocks: int, order: int, sequences: list[Sequence]) -> bool:
        """Preempt sequences of other models until this model's oldest has its block; False while it has not.

        Bytes alone do not tell: a slab changes its model only when all of it is free, and it may hold blocks of several sequences. So
        after each copy to the host one looks again.
        """
        pool, layout = self._engine.pool(model), self._engine.spec(model).kv
        others = [s for s in sequences if s.spec.model != model]
        while pool.num_free < num_blocks and not self._swaps.is_leaving:
            parked = [s for s in others if s.phase is Phase.SWAPPED and s.block_ids]
            holders = [_holder(s) for s in others if s.phase is Phase.RUNNING]
            chosen = choose_victims(holders, needed_bytes=num_blocks * layout.block_bytes, order=order)
            victims = [max(parked, key=lambda s: s.order)] if parked else [s for s in others if s.command.sequence_id in chosen]
            if not victims:
                return False
            for victim in victims:
                self.preempt(victim)
        return pool.num_free >= num_blocks

    def _parked(self, sequences: Iterable[Sequence], layout: KVLayout) -> list[Sequence]:
        """Swapped sequences with blocks of this layout on the device, youngest first."""
        parked = (s for s in sequences if s.phase is Phase.SWAPPED and s.block_ids and s.spec.kv == layout)
        return sorted(parked, key=lambda s: -s.order)

    def _unpark(self, head: Sequence, sequences: Collection[Sequence], *, is_idle: bool) -> bool:
        """Make room for the first in line out of what swapped sequences have on the device. True when some of it is free at once."""
        if self._swaps.is_leaving:
            return False
        pool = self._engine.pool(head.spec.model)
        parked = [s for s in self._parked(sequences, head.spec.kv) if s is not head]
        missing = _waiting(head).num_blocks + 1 - pool.num_free
        if missing <= sum(len(s.block_ids) for s in parked):
            self._take(parked, missing, spare_blocks=0)
        elif is_idle:  # nobody runs who would end and leave room: all of it, of every layout
            parked = [s for s in sequences if s.phase is Phase.SWAPPED and s.block_ids and s is not head]
            for sequence in parked:
                self.preempt(sequence)
        return any(s.phase is Phase.WAITING for s in parked)


def _waiting(sequence: Sequence) -> WaitingView:
    num_blocks = sequence.spec.kv.num_blocks(sequence.num_tokens + 1) - len(sequence.block_ids)
    return WaitingView(sequence_id=sequence.command.sequence_id, model=sequence.spec.model, order=sequence.order, num_blocks=num_blocks)


def _holder(sequence: Sequence) -> HolderView:
    kv_bytes = len(sequence.block_ids) * sequence.spec.kv.block_bytes
    return HolderView(sequence_id=sequence.command.sequence_id, model=sequence.spec.model, order=sequence.order, kv_bytes=kv_bytes)
