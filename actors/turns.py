"""Turns on a decode worker: what the policy sees of its sequences, and the turn under way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from polymux.actors.engine import Engine
from polymux.actors.meter import Meter
from polymux.actors.sequence import Phase
from polymux.actors.sequence import Sequence as Seq
from polymux.disagg.multiplex import Turn, TurnPolicy, is_over
from polymux.disagg.views import BatchView, DecodeView, Due
from polymux.transport.units import ModelName


class Turns:
    """Ask `current` before every step. Belongs to the engine thread."""

    def __init__(self, engine: Engine, meter: Meter, policy: TurnPolicy[Any]) -> None:
        self._engine = engine
        self._meter = meter
        self._policy = policy
        self._memory = policy.start()
        self._turn: Turn | None = None
        self._began_s = 0.0
        self._has_news = False

    def current(self, sequences: Iterable[Seq]) -> Turn | None:
        """The turn that goes on, or the policy's next one; None when no sequence can step."""
        running: dict[ModelName, list[Seq]] = {}
        for sequence in sequences:
            if sequence.phase is Phase.RUNNING:
                running.setdefault(sequence.spec.model, []).append(sequence)
        if self._turn is not None:
            can_step = self._turn.model in running
            elapsed_s = self._engine.clock() - self._began_s
            if not is_over(self._turn, elapsed_s, can_step=can_step, others_can_step=len(running) > can_step, has_news=self._has_news):
                return self._turn
        view = DecodeView(
            now_s=self._engine.clock(),
            active=self._engine.residency.active,
            batches=tuple(self._batch(model, sequences) for model, sequences in running.items()),
            can_prefetch=self._can_prefetch(running),
        )
        self._turn, self._memory = self._policy.next_turn(view, self._memory)
        self._has_news = False
        self._began_s = view.now_s
        return self._turn

    def began(self) -> None:
        """The model's weights are there, and the first step starts: the switch is not charged to the turn."""
        self._began_s = self._engine.clock()

    def end(self) -> None:
        """The turn is over, whatever is left of its quota: its batch cannot step, or its model cannot be had."""
        self._turn = None

    def came(self) -> None:
        """A sequence can step from now on that could not before."""
        self._has_news = True

    def _can_prefetch(self, models: Iterable[ModelName]) -> bool:
        """Whether the weights of any two of them fit beside each other."""
        largest = sorted((self._engine.spec(model).weight_bytes for model in models), reverse=True)[:2]
        return sum(largest) <= self._engine.arena.weight_reserve_bytes

    def _batch(self, model: ModelName, sequences: Sequence[Seq]) -> BatchView:
        kv_tokens = sum(s.num_cached for s in sequences)
        is_resident = model in self._engine.residency.residents
        return BatchView(
            model=model,
            num_seqs=len(sequences),
            kv_tokens=kv_tokens,
            step_s=self._meter.predict_decode_s(model, min(len(sequences), self._engine.settings.max_num_seqs), kv_tokens),
            tpot_slo_s=min(s.command.tpot_slo_s for s in sequences),
            switch_s=0.0 if is_resident else self._meter.predict_switch_s(self._engine.spec(model).weight_bytes),
            dues=tuple([Due(s.due_s, s.command.tpot_slo_s, s.is_kept) for s in sequences]),
        )
