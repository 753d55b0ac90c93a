"""Switching between requests rather than tokens, as the systems before token-level multiplexing do: the baseline that ours is measured by.

ServerlessLLM's policy (OSDI '24), as the artifact of Aegaeon (SOSP '25) simulates it: every worker has a line of runs, a run being requests
of one model; the first run's requests have the worker until all of them have ended. `choose_line` says whose line a request joins.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from polymux.disagg.multiplex import Turn
from polymux.disagg.views import DecodeView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName, SequenceId, WorkerId

PUBLISHED_SLOTS = 4  # requests of one run that a further one may join


@dataclass(frozen=True, slots=True)
class Run:
    """Requests of one model that follow each other in a worker's line, those that have ended left out. Never empty."""

    model: ModelName
    members: tuple[SequenceId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What one worker has been given and has not finished, as a value: `joined` and `ended` return the next one."""

    worker_id: WorkerId
    runs: tuple[Run, ...] = ()
    run_ended_at_s: float | None = None  # when it last finished a run; None: never

    def joined(self, member: SequenceId, model: ModelName) -> Line:
        """With one request more: in the last run if that is of its model, else in a new one behind."""
        if self.runs and self.runs[-1].model == model:
            last = replace(self.runs[-1], members=(*self.runs[-1].members, member))
            return replace(self, runs=(*self.runs[:-1], last))
        return replace(self, runs=(*self.runs, Run(model, (member,))))

    def ended(self, member: SequenceId, now_s: float) -> Line:
        """Without this request, whether it ran or waited. Unknown ones are ignored."""
        left = [replace(run, members=tuple(m for m in run.members if m != member)) for run in self.runs]
        first_is_done = bool(left) and not left[0].members
        return replace(
            self,
            runs=tuple(run for run in left if run.members),
            run_ended_at_s=now_s if first_is_done else self.run_ended_at_s,
        )

    @property
    def served(self) -> tuple[SequenceId, ...]:
        """Requests that have the worker now."""
        return self.runs[0].members if self.runs else ()


def choose_line(model: ModelName, lines: Iterable[Line], *, slots: int = PUBLISHED_SLOTS, idle_first: bool = False) -> WorkerId:
    """Whose line a request of this model joins. Raises ValueError when there is no worker.

    The published rule: where the runs of this model that end a line have slots left between them, the shortest of them; else the worker of
    another model that finished a run longest ago, one that never did first. A worker that loads its first model counts as one
    that never did, so new models pile up on it while others idle; with `idle_first`, a worker without requests goes before that rule.
    """
    ordered = sorted(lines, key=lambda line: line.worker_id)
    matching = [line for line in ordered if line.runs and line.runs[-1].model == model]
    others = [line for line in ordered if line not in matching]
    num_free = sum(max(0, slots - len(line.runs[-1].members)) for line in matching)
    if others and num_free < 1:
        if idle_first:
            others = [line for line in others if not line.runs] or others
        return min(others, key=lambda line: (line.run_ended_at_s is not None, line.run_ended_at_s or 0.0, line.worker_id)).worker_id
    return min(matching, key=lambda line: (len(line.runs[-1].members), line.worker_id)).worker_id


@dataclass(frozen=True, slots=True)
class RequestLevelMemory:
    line: tuple[ModelName, ...] = ()  # models with work, first come first served; the first one has the worker


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLevel:
    """As a turn policy of a decode worker: a model keeps it while any of its sequences can step; then the one that waited longest."""

    max_quota_s: float = 4.0  # of no effect: a turn ends with its last request

    def __post_init__(self) -> None:
        if not self.max_quota_s > 0:
            raise ConfigError(f"max_quota_s={self.max_quota_s} must be above 0; 4.0 suits", param="max_quota_s")

    def start(self) -> RequestLevelMemory:
        return RequestLevelMemory()

    def next_turn(self, view: DecodeView, memory: RequestLevelMemory) -> tuple[Turn | None, RequestLevelMemory]:
        """Asked after every step while others wait, so that each model's place in the line is the step at which it came."""
        present = {batch.model for batch in view.batches}
        kept = tuple(model for model in memory.line if model in present)
        line = kept + tuple(sorted(present.difference(kept)))
        return (Turn(model=line[0], quota_s=None) if line else None), RequestLevelMemory(line)
