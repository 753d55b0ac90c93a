"""Turns on a worker: what the policy sees of its sequences and prompts, the turn under way, and which phase comes next in it.

A turn belongs to a model, not to a phase: a prompt is computed in the turn of its model and decodes with the others from then on, so that
both phases share one switch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from polymux.actors.engine import Engine
from polymux.actors.meter import Meter
from polymux.actors.sequence import Sequence
from polymux.disagg.batching import Chunk, fill_step
from polymux.disagg.multiplex import Turn, TurnPolicy, is_over
from polymux.disagg.phase import Phase, next_phase
from polymux.disagg.views import BatchView, DecodeView, Due, PhaseView, PromptView, WorkView
from polymux.transport.units import ModelName


@dataclass(slots=True)
class Work:
    """One model's work on a worker: sequences that could take a decode step, and prompts that could be computed."""

    running: list[Sequence] = field(default_factory=list)
    prompts: list[PromptView] = field(default_factory=list)


def by_model(running: Iterable[Sequence], prompts: Iterable[PromptView]) -> dict[ModelName, Work]:
    """Only models with some."""
    work: dict[ModelName, Work] = {}
    for sequence in running:
        work.setdefault(sequence.spec.model, Work()).running.append(sequence)
    for prompt in prompts:
        work.setdefault(prompt.model, Work()).prompts.append(prompt)
    return work


def switch_left_s(engine: Engine, meter: Meter, model: ModelName) -> float:
    """Predicted seconds until its first step could start: 0 when its weights are there, the rest when they are on their way."""
    resident = engine.residency.residents.get(model)
    if resident is not None and resident.load is None:
        return 0.0
    switch_s = meter.predict_switch_s(engine.spec(model).weight_bytes)
    if resident is None or resident.load is None:
        return switch_s
    return max(switch_s - (engine.clock() - resident.load.began_s), 0.0)


class Turns:
    """Ask `current` before every step, and `phase` where its model has work of both kinds. Belongs to the engine thread."""

    def __init__(self, engine: Engine, meter: Meter, policy: TurnPolicy[Any]) -> None:
        self._engine = engine
        self._meter = meter
        self._policy = policy
        self._memory = policy.start()
        self._turn: Turn | None = None
        self._began_s = 0.0
        self._has_news = False
        self._passed_over: Counter[tuple[ModelName, Phase]] = Counter()  # steps that the other phase had, while this one waited

    def current(self, work: Mapping[ModelName, Work]) -> Turn | None:
        """The turn that goes on, or the policy's next one; None when there is no work."""
        if self._turn is not None:
            can_step = self._turn.model in work
            elapsed_s = self._engine.clock() - self._began_s
            if not is_over(self._turn, elapsed_s, can_step=can_step, others_can_step=len(work) > can_step, has_news=self._has_news):
                return self._turn
        view = DecodeView(
            now_s=self._engine.clock(),
            active=self._engine.residency.active,
            batches=tuple(self._batch(model, one) for model, one in work.items()),
            load_drag=self._engine.device.load_drag,
            can_prefetch=self._can_prefetch(work),
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
        """A sequence can step from now on, or a prompt be computed, that could not before."""
        self._has_news = True

    def _can_prefetch(self, models: Iterable[ModelName]) -> bool:
        """Whether any two of their weights fit beside each other, and what was named for prefetch last is there or on its way."""
        named = self._turn.prefetch if self._turn is not None else None
        if named is not None and named not in self._engine.residency.residents:
            return False
        largest = sorted((self._engine.spec(model).weight_bytes for model in models), reverse=True)[:2]
        return sum(largest) <= self._engine.arena.weight_reserve_bytes

    def phase(self, model: ModelName, work: Work) -> Phase:
        """What comes next in this model's turn."""
        chunks = self.chunks(work)
        view = PhaseView(now_s=self._engine.clock(), prefill=self._prefill_view(model, work, chunks), decode=self._decode_view(model, work))
        phase = next_phase(view)
        other = Phase.DECODE if phase is Phase.PREFILL else Phase.PREFILL
        has_waited = view.prefill is not None and view.decode is not None
        self._passed_over[model, phase] = 0
        self._passed_over[model, other] = self._passed_over[model, other] + 1 if has_waited else 0
        return phase

    def chunks(self, work: Work) -> tuple[Chunk, ...]:
        """Of this model's next prefill step: the earliest due first."""
        line = sorted(work.prompts, key=lambda prompt: (prompt.due_at_s, prompt.order))
        return fill_step(line, self._engine.settings.max_num_batched_tokens)

    def _prefill_view(self, model: ModelName, work: Work, chunks: tuple[Chunk, ...]) -> WorkView | None:
        if not chunks:
            return None
        step_s = self._meter.predict_prefill_s(model, [(chunk.start, chunk.num_tokens) for chunk in chunks])
        ready_s = self._engine.clock() + step_s
        return WorkView(
            due_at_s=min((prompt.due_at_s for prompt in work.prompts if prompt.due_at_s >= ready_s), default=inf),
            step_s=step_s,
            switch_s=0.0,
            num_tokens=max(1, sum(chunk.is_last for chunk in chunks)),
            num_passed_over=self._passed_over[model, Phase.PREFILL],
        )

    def _decode_view(self, model: ModelName, work: Work) -> WorkView | None:
        if not work.running:
            return None
        step_s = self._decode_s(model, len(work.running), sum(s.num_cached for s in work.running))
        ready_s = self._engine.clock() + step_s
        return WorkView(
            due_at_s=min((s.due_s for s in work.running if s.due_s >= ready_s), default=inf),
            step_s=step_s,
            switch_s=0.0,
            num_tokens=len(work.running),
            num_passed_over=self._passed_over[model, Phase.DECODE],
        )

    def _batch(self, model: ModelName, work: Work) -> BatchView:
        num_seqs = len(work.running) + len(work.prompts)
        kv_tokens = sum(s.num_cached for s in work.running) + sum(prompt.num_tokens for prompt in work.prompts)
        dues = [Due(s.due_s, s.command.tpot_slo_s, s.is_kept) for s in work.running]
        dues += [Due(prompt.due_at_s, prompt.tpot_slo_s, is_prompt=True) for prompt in work.prompts]
        return BatchView(
            model=model,
            num_seqs=num_seqs,
            kv_tokens=kv_tokens,
            step_s=self._decode_s(model, num_seqs, kv_tokens),
            tpot_slo_s=min(due.every_s for due in dues),
            switch_s=switch_left_s(self._engine, self._meter, model),
            prefill_s=sum(prompt.prefill_s for prompt in work.prompts),
            dues=tuple(dues),
        )

    def _decode_s(self, model: ModelName, num_seqs: int, kv_tokens: int) -> float:
        return self._meter.predict_decode_s(model, min(num_seqs, self._engine.settings.max_num_seqs), kv_tokens)
