"""Sequences that their worker gave up while they ran, kept with their KV for the worker that is to go on with them.

Each leaves in one of three ways: taken over, dropped because nobody wants it any more, or expired. All calls are the engine thread's.
"""

from __future__ import annotations

from dataclasses import dataclass

from polymux.actors.engine import Engine
from polymux.actors.sequence import Sequence
from polymux.transport.errors import TransferError
from polymux.transport.messages import Prefill
from polymux.transport.units import ClientId, SequenceId, unpack_ids

KEEP_S = 10.0  # for the front door to find another worker, and that one to find blocks


@dataclass(slots=True)
class _Kept:
    sequence: Sequence
    until_s: float


class KeptSequences:
    """Bounded by the blocks that they hold, and by `keep_s`."""

    def __init__(self, engine: Engine, keep_s: float = KEEP_S) -> None:
        self._engine = engine
        self._keep_s = keep_s
        self._kept: dict[SequenceId, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, sequence: Sequence) -> None:
        """From here on its blocks are ours."""
        self._kept[sequence.command.sequence_id] = _Kept(sequence, min(self._engine.clock() + self._keep_s, sequence.deadline_s))

    def take(self, command: Prefill) -> Sequence:
        """The sequence that this order is to carry on, with its blocks. Raises TransferError when it is gone, or another."""
        assert command.handover is not None
        kept = self._kept.get(command.handover)
        if kept is None:
            raise TransferError(f"sequence {command.handover} is not kept here any more")
        sequence = kept.sequence
        said = (command.model, unpack_ids(command.prompt_ids), unpack_ids(command.output_ids))
        if said != (sequence.spec.model, sequence.prompt_ids, sequence.output_ids):
            raise TransferError(f"sequence {command.handover} has {sequence.num_tokens} tokens here, and others than the order says")
        del self._kept[command.handover]
        return sequence

    def drop(self, sequence_id: SequenceId) -> None:
        """Nobody wants it any more. Unknown ones are ignored."""
        kept = self._kept.pop(sequence_id, None)
        if kept is not None:
            self._engine.pool(kept.sequence.spec.model).free(kept.sequence.block_ids)
            kept.sequence.block_ids = []

    def client_lost(self, client_id: ClientId) -> None:
        self._drop_all([key for key, kept in self._kept.items() if kept.sequence.client_id == client_id])

    def expire(self) -> None:
        now_s = self._engine.clock()
        self._drop_all([key for key, kept in self._kept.items() if kept.until_s <= now_s])

    def drop_all(self) -> None:
        self._drop_all(list(self._kept))

    def _drop_all(self, sequence_ids: list[SequenceId]) -> None:
        for sequence_id in sequence_ids:
            self.drop(sequence_id)

    def next_deadline_s(self) -> float | None:
        return min((kept.until_s for kept in self._kept.values()), default=None)
