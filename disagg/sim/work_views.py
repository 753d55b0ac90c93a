"""What a simulated worker tells the policies of its work: when tokens are due by the targets, what steps take by its own predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from polymux.disagg.phase import Phase
from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.worker import Prompt, Work
from polymux.disagg.views import BatchView, Due, PhaseView, PromptView, WorkView
from polymux.transport.units import ModelName, SequenceId


@dataclass(frozen=True, slots=True)
class WorkViews:
    """Of all workers of a pool."""

    costs: CostModel
    targets: Targets
    max_num_seqs: int

    @property
    def tpot_s(self) -> float:
        return self.targets.tpot_us / SECOND

    def due_s(self, one: Progress) -> float:
        """Of its next token."""
        return (one.request.arrival_us + self.targets.due_us(one.num_tokens)) / SECOND

    def batch(self, model: ModelName, work: Work, switch_s: float) -> BatchView:
        kv_tokens = work.kv_tokens + sum(prompt.num_tokens for prompt in work.prompts)
        dues = [self._due(one, False) for one in work.running] + [self._due(prompt.one, True) for prompt in work.prompts]
        return BatchView(
            model=model,
            num_seqs=len(dues),
            kv_tokens=kv_tokens,
            step_s=self._decode_s(work.kind, len(dues), kv_tokens),
            tpot_slo_s=self.tpot_s,
            switch_s=switch_s,
            prefill_s=sum(self.costs.prefill_us(work.kind, (p.num_left,), (p.num_done,)) for p in work.prompts) / SECOND,
            dues=tuple(dues),
        )

    def phases(self, work: Work, chunks: Sequence[tuple[Prompt, int]], now_us: int) -> PhaseView:
        """Of one model's turn: a prefill step of these chunks against a decode step of what runs."""
        prefill_s = self.costs.prefill_us(work.kind, [n for _, n in chunks], [prompt.num_done for prompt, _ in chunks]) / SECOND
        num_last = sum(prompt.num_left == n for prompt, n in chunks)
        prompts = [prompt.one for prompt in work.prompts]
        decode_s = self._decode_s(work.kind, len(work.running), work.kv_tokens)
        return PhaseView(
            now_s=now_us / SECOND,
            prefill=self._work(prompts, prefill_s, max(1, num_last), work.passed_over[Phase.PREFILL], now_us),
            decode=self._work(work.running, decode_s, len(work.running), work.passed_over[Phase.DECODE], now_us),
        )

    def _due(self, one: Progress, is_prompt: bool) -> Due:
        return Due(self.due_s(one), self.tpot_s, one.num_on_time == one.num_tokens, is_prompt)

    def _decode_s(self, kind: str, num_seqs: int, kv_tokens: int) -> float:
        return self.costs.decode_us(kind, min(num_seqs, self.max_num_seqs), kv_tokens) / SECOND

    def _work(self, of: Sequence[Progress], step_s: float, num_tokens: int, num_passed_over: int, now_us: int) -> WorkView:
        ready_s = now_us / SECOND + step_s
        due_at_s = min((due_s for one in of if (due_s := self.due_s(one)) >= ready_s), default=math.inf)
        return WorkView(due_at_s=due_at_s, step_s=step_s, switch_s=0.0, num_tokens=num_tokens, num_passed_over=num_passed_over)


def prompt_view(number: int, prompt: Prompt) -> PromptView:
    return PromptView(
        sequence_id=SequenceId(str(number)),
        model=ModelName(prompt.one.request.model),
        order=number,
        num_tokens=prompt.num_tokens,
        num_done=prompt.num_done,
    )
