"""The decode role: it owns each sequence from Generate to its last token, grants the blocks, and steps one model's batch at a time.

Everything that ends a sequence goes through `_drop`: finished, cancelled, expired, failed, its client gone. Blocks of a transfer that
failed stay in quarantine until the transport says that nobody writes to them any more.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from polymux.actors.copier import Copier
from polymux.actors.drawn import Ask
from polymux.actors.engine import Engine
from polymux.actors.flight import Flight, batch_of
from polymux.actors.grants import Grants
from polymux.actors.host_tier import HostTier
from polymux.actors.kept import KeptSequences
from polymux.actors.meter import Meter
from polymux.actors.outbox import Outbox
from polymux.actors.room import Room
from polymux.actors.sequence import Phase, Sequence
from polymux.actors.swap import Swapper
from polymux.actors.turns import Turns
from polymux.actors.updates import failure, moved, token_update
from polymux.disagg.multiplex import Turn
from polymux.transport.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    NoFreeBlocks,
    Overloaded,
    PolymuxError,
    TransferError,
)
from polymux.transport.head_slices import sharded
from polymux.transport.kv import KVCommitted, KVEvent, KVFailed
from polymux.transport.messages import Generate, ModelLoad, Peer, SpanKind
from polymux.transport.prefix import TOKEN_BYTES
from polymux.transport.units import ClientId, ModelName, SequenceId


class DecodeRole:
    """Driven by the engine thread: `accept`, `cancel`, `client_lost`, `kv_event` for what came in, `prepare`, `step` in a model's turn."""

    def __init__(
        self,
        engine: Engine,
        grants: Grants,
        turns: Turns,
        meter: Meter,
        outbox: Outbox,
        kept: KeptSequences,
        tier: HostTier | None = None,
        copier: Copier | None = None,
    ) -> None:
        self._engine = engine
        self._meter = meter
        self._outbox = outbox
        self._grants = grants
        self._kept = kept  # those that were given up here, until another worker has them
        self._sequences: dict[SequenceId, Sequence] = {}
        self._turns = turns
        self._swaps = Swapper(engine, meter, tier, copier, on_back=turns.came)
        self._room = Room(engine, self._swaps, meter)
        self._num_accepted = 0
        self._flight: Flight | None = None  # the last step, while its tokens are not read
        self._landed_s = 0.0

    @property
    def num_open(self) -> int:
        return len(self._sequences) + len(self._kept)

    @property
    def models(self) -> frozenset[ModelName]:
        """Of all sequences here, whether they could step now or not."""
        return frozenset(s.spec.model for s in self._sequences.values())

    def check(self) -> None:
        """Assert that the books of swaps are whole."""
        self._swaps.check(self._sequences.values())

    # -- what came in -------------------------------------------------------------------------------------------------

    def accept(self, command: Generate, client_id: ClientId) -> None:
        """Take a sequence in, to wait for its blocks. What cannot be served is answered at once."""
        try:
            if command.sequence_id in self._sequences:
                raise PolymuxError(f"sequence {command.sequence_id} is already being decoded here")
            spec = self._engine.spec(command.model)
            self._num_accepted += 1
            sequence = Sequence.from_command(command, client_id, spec, self._num_accepted, self._engine.clock())
            if sequence.num_tokens >= spec.max_model_len:  # it could wait for blocks forever, and everybody behind it
                raise ContextLengthExceeded(
                    f"sequence {command.sequence_id} has {sequence.num_tokens} tokens; {spec.model} takes {spec.max_model_len} in all"
                )
        except PolymuxError as error:
            self._outbox.add(client_id, failure(command.sequence_id, len(command.output_ids) // 4, error))
            return
        self._sequences[command.sequence_id] = sequence

    def cancel(self, sequence_id: SequenceId, reason: str) -> None:
        """The client wants no more of it, and no answer. Unknown sequences are ignored: they have ended already."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._drop(sequence, reason)
        self._kept.drop(sequence_id)

    def client_lost(self, client_id: ClientId) -> None:
        for sequence in [s for s in self._sequences.values() if s.client_id == client_id]:
            self._drop(sequence, "the front door's connection was lost")
        self._kept.client_lost(client_id)

    def move(self, model: ModelName | None = None) -> None:
        """Give up all sequences, or those of one model, for the front door to place elsewhere; at a token boundary, as every call here.

        One that runs is kept with its KV. One that waits has none, and is told so; one that is swapped out loses its own. One whose KV is
        on its way, or waits for it at the worker that it came from, stays: ask again.
        """
        self.settle()
        for sequence in [s for s in self._sequences.values() if model in (None, s.spec.model)]:
            if sequence.phase is Phase.RUNNING:
                del self._sequences[sequence.command.sequence_id]
                self._kept.add(sequence)
                self._outbox.add(sequence.client_id, moved(sequence.command.sequence_id, len(sequence.output_ids)))
            elif sequence.phase not in (Phase.PREFILLING, Phase.SWAPPING_IN) and sequence.handover is None:
                self._fail(sequence, Draining(f"sequence {sequence.command.sequence_id} is to run on another worker"))

    def kv_event(self, event: KVEvent) -> None:
        """A transfer was committed, failed, or came to rest."""
        sequence = self._grants.settle(event)
        if sequence is None:
            return
        if self._sequences.get(sequence.command.sequence_id) is not sequence:  # dropped while its KV was on its way
            self._engine.pool(sequence.spec.model).free(sequence.block_ids)
            sequence.block_ids = []
        elif isinstance(event, KVCommitted):
            self._note_arrival(sequence, event)
            if event.prefilled.token_id is not None:
                sequence.append(event.prefilled.token_id, self._engine.clock())
            if sequence.handover is not None:  # whoever had it may be gone when it is wanted again
                sequence.handover = sequence.prefill = None
            sequence.phase = Phase.RUNNING
            self._turns.came()
            if event.prefilled.finish_reason is not None:
                self._drop(sequence, "finished")
        elif isinstance(event, KVFailed):
            self._not_filled(sequence, event.error)

    def _not_filled(self, sequence: Sequence, error: PolymuxError) -> None:
        """Its KV will not come. What was to be handed over, or found no room at its prefill worker, is computed here instead.

        Anything else is the front door's to place anew.
        """
        is_gone = sequence.handover is not None and isinstance(error, TransferError)
        if is_gone or (sequence.prefill is not None and isinstance(error, NoFreeBlocks)):
            sequence.handover = sequence.prefill = None
            sequence.phase = Phase.WAITING
        else:
            self._fail(sequence, error)

    def _note_arrival(self, sequence: Sequence, event: KVCommitted) -> None:
        if event.ended_s == event.began_s:  # computed here: nothing came
            return
        nbytes = len(sequence.block_ids) * sharded(sequence.spec.kv, 1).block_bytes
        self._meter.timeline.add(
            SpanKind.KV_IN, sequence.spec.model, event.began_s, event.ended_s, nbytes=nbytes, num_seqs=1, num_tokens=sequence.num_tokens
        )

    # -- one step -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """End what is past its deadline, and grant what can be granted."""
        self._expire()
        self._grant()

    def running(self) -> list[Sequence]:
        """Those whose KV is here and whose next token can be computed."""
        return [s for s in self._sequences.values() if s.phase is Phase.RUNNING]

    def step(self, turn: Turn, wanted: Collection[ModelName]) -> bool:
        """One step of the turn's model; False when its oldest sequence lacks a block that nobody younger could give.

        Models in `wanted` have work on this worker: their weights leave last.
        """
        if self._flight is not None and not self._can_run_ahead(self._flight, turn.model):
            self.settle()
        batch = self._room.form(turn.model, self._sequences.values())
        if not batch:
            return self.settle()
        self._run(turn, batch, wanted)
        return True

    def settle(self) -> bool:
        """Take in the tokens of the step that the device was handed last, if any. False when there is none."""
        flight, self._flight = self._flight, None
        if flight is not None:
            self._land(flight)
        return flight is not None

    def _can_run_ahead(self, flight: Flight, model: ModelName) -> bool:
        """Whether the next step needs nothing that only the tokens of the last one tell."""
        return (
            flight.model == model == self._engine.residency.active
            and all(s.sampler.counts is None for s in flight.batch)
            and self._room.is_ample(model, self._sequences.values())
        )

    def _run(self, turn: Turn, batch: list[Sequence], wanted: Collection[ModelName]) -> None:
        before, started_s = self._flight, self._engine.clock()
        try:
            switch = self._engine.activate(turn.model, wanted=wanted)
            if switch is not None:
                self._meter.switched(switch)
                self._turns.began()
                started_s = self._engine.clock()
            self._engine.prefetch(turn.prefetch, wanted=wanted)
            drawn = self._engine.decode(batch_of(batch, before), [Ask(s.sampler, s.num_ahead) for s in batch])
        except PolymuxError as error:  # weights that did not arrive; nothing else fails a whole batch on purpose
            self._turns.end()
            self.settle()
            for sequence in batch:
                if not self._has_ended(sequence):
                    self._fail(sequence, error)
            return
        self._flight = Flight.of(turn.model, batch, drawn, started_s, self._engine)
        if before is not None:
            self._land(before)
        if not self._engine.device.is_async:
            self.settle()

    def _land(self, flight: Flight) -> None:
        """Each sequence of the step gets its token; those that have ended meanwhile give their blocks back."""
        ended = [s for s in flight.batch if self._has_ended(s)]
        for sequence in flight.batch:
            sequence.num_ahead -= 1
        try:
            tokens = flight.drawn.tokens()
        finally:
            for sequence in ended:
                if not sequence.num_ahead:
                    self._give_back(sequence)
        now_s = self._engine.clock()
        seconds = now_s - max(flight.started_s, self._landed_s) - flight.stalled_s
        self._landed_s = now_s
        self._meter.decoded(flight.model, len(flight.batch), flight.kv_tokens, seconds, is_typical=flight.is_typical)
        for sequence, token in zip(flight.batch, tokens, strict=True):
            if self._has_ended(sequence):
                continue
            if isinstance(token, PolymuxError):
                self._fail(sequence, token)
                continue
            index = len(sequence.output_ids)
            sequence.append(token.token_id, now_s)
            reason = sequence.sampler.finish_reason(max_model_len_reached=sequence.num_tokens >= sequence.spec.max_model_len)
            self._outbox.add(sequence.client_id, token_update(sequence.command.sequence_id, index, token, reason))
            if reason is not None:
                self._drop(sequence, "finished")

    # -- grants and endings -------------------------------------------------------------------------------------------

    def _grant(self) -> None:
        """Give blocks to those in line: swapped sequences come back, others are prefilled, once their prefill worker has room."""
        full: set[Peer | None] = set()
        while (sequence := self._room.next_in_line(self._sequences.values(), full)) is not None:
            if sequence.phase is Phase.SWAPPED:
                if not self._swaps.swap_in(sequence):
                    return  # the end of some copy wakes us
                continue
            try:
                self._grants.order(sequence)
            except PolymuxError as error:
                if not isinstance(error, Overloaded) or self._grants.is_idle:
                    self._not_filled(sequence, error)
                    continue
                full.add(sequence.prefill)  # the end of one of its transfers wakes us

    def _fail(self, sequence: Sequence, error: PolymuxError) -> None:
        self._outbox.add(sequence.client_id, failure(sequence.command.sequence_id, len(sequence.output_ids), error))
        self._drop(sequence, error.message)

    def _drop(self, sequence: Sequence, reason: str) -> None:
        """The one release path: whatever ended it, its blocks go back, or into quarantine while a transfer or a step may still write."""
        del self._sequences[sequence.command.sequence_id]
        if sequence.phase is Phase.PREFILLING:
            self._grants.cancel(sequence, reason)
            sequence.block_ids = []
        elif not sequence.num_ahead:
            self._give_back(sequence)

    def _has_ended(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.command.sequence_id) is not sequence

    def _give_back(self, sequence: Sequence) -> None:
        self._keep_prefix(sequence)
        self._swaps.release(sequence)

    def _keep_prefix(self, sequence: Sequence) -> None:
        """Its full blocks stay for prompts that begin alike, once nobody holds them; they are computed or verified."""
        if sequence.phase is Phase.RUNNING:
            done = sequence.packed_ids[: sequence.num_cached * TOKEN_BYTES]
            self._engine.prefixes.insert(sequence.spec, sequence.command.cache_salt, done, sequence.block_ids)

    def _expire(self) -> None:
        self._kept.expire()
        now_s = self._engine.clock()
        for sequence in [s for s in self._sequences.values() if s.deadline_s <= now_s]:
            self._fail(sequence, DeadlineExceeded(f"sequence {sequence.command.sequence_id} was not finished before its deadline"))

    def _abandon(self) -> None:
        """Forget the step under way: its tokens are nobody's."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        with suppress(RuntimeError):  # of a device that no longer answers: nothing of it is used again
            self._engine.device.mark().wait()
        for sequence in flight.batch:
            sequence.num_ahead = 0
            if self._has_ended(sequence):
                self._give_back(sequence)

    def fail_all(self, error: PolymuxError) -> None:
        """End everything with one error: the worker cannot go on with what it has."""
        self._abandon()
        for sequence in list(self._sequences.values()):
            self._fail(sequence, error)
        self._kept.drop_all()

    def next_deadline_s(self) -> float | None:
        """When `step` next has something to expire, on the engine's clock."""
        deadlines = [s.deadline_s for s in self._sequences.values()]
        if (kept_s := self._kept.next_deadline_s()) is not None:
            deadlines.append(kept_s)
        return min(deadlines, default=None)

    def loads(self) -> tuple[ModelLoad, ...]:
        """This worker's work by model, for the controller."""
        residents = self._engine.residency.residents
        by_model: dict[ModelName, list[Sequence]] = {model: [] for model in residents}
        for sequence in self._sequences.values():
            by_model.setdefault(sequence.spec.model, []).append(sequence)
        return tuple(
            ModelLoad(
                model=model,
                is_resident=model in residents,
                num_waiting=sum(s.phase is not Phase.RUNNING for s in sequences),
                num_running=sum(s.phase is Phase.RUNNING for s in sequences),
                waiting_tokens=sum(s.num_tokens for s in sequences if s.phase in (Phase.WAITING, Phase.PREFILLING)),
                kv_tokens=sum(s.num_cached for s in sequences if s.phase is Phase.RUNNING),
            )
            for model, sequences in sorted(by_model.items())
        )
