"""Token-level sharing of a decode worker: whose turn is next, and for how long.

A policy is asked for the next turn when the present one is over (`is_over`, tested after every step), and never in between.
Its memory is a value: `start()` makes the first, `next_turn` returns the next.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from polymux.disagg.views import BatchView, DecodeView
from polymux.transport.errors import ConfigError
from polymux.transport.units import ModelName

Memory = TypeVar("Memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One model's slice of a decode worker.

    `quota_s` counts from the start of the turn's first step: the switch is not charged, every step is. None: as long as it is alone.
    `prefetch` is the next model whose weights are not resident, worth loading meanwhile. A turn that `ends_on_news` ends at the first
    token boundary after another sequence has come, so that the policy can weigh it; it may well go on with the same model.
    """

    model: ModelName
    quota_s: float | None
    prefetch: ModelName | None = None
    ends_on_news: bool = False


class TurnPolicy(Protocol[Memory]):
    """Names the next turn. None when no batch can step; else a model of the view."""

    def start(self) -> Memory: ...

    def next_turn(self, view: DecodeView, memory: Memory) -> tuple[Turn | None, Memory]: ...


def is_over(turn: Turn, elapsed_s: float, *, can_step: bool, others_can_step: bool, has_news: bool = False) -> bool:
    """Whether the turn ends at this token boundary. Ask after each step, so a turn has at least one.

    A model that is alone never stops, whatever its quota; one that had no quota stops when company comes.
    """
    if not can_step:
        return True
    if not others_can_step:
        return False
    return turn.quota_s is None or elapsed_s >= turn.quota_s or (has_news and turn.ends_on_news)


@dataclass(frozen=True, slots=True)
class WrrMemory:
    rest: tuple[tuple[ModelName, float], ...] = ()  # of this round, with quotas
    last: ModelName | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedRoundRobin:
    """The published rule (Aegaeon, SOSP '25): rounds of turns, each model's quota in proportion to the time that its SLO needs.

    With n_i = TPOT / step time and S = sum 1/n_k over the round: alpha = max(c / (min n * QMAX) + S, 0.5) is the round's length over the
    time that its tokens may take, and quota_i = c / (n_i * (alpha - S)), so that the round lasts c + sum quota. Rounds are
    rebuilt only at round start; a model that comes later waits for the next.

    Where it differs from the public artifact, on purpose:
    - c counts the switches that will happen, not one for each model: resident weights cost nothing. With c = 0 the formula is 0/0 or
      0; turns are then as short as one step of the loosest model allows, in the same proportions.
    - The first step of a turn is charged (there, the clock starts after it).
    - The order is by name, cyclic, going on after the model served last (there, by memory address).
    - Step times are of the real batch size (there, every caller passes -1).
    - A model alone has no quota at all.
    """

    max_quota_s: float = 4.0
    min_alpha: float = 0.5

    def __post_init__(self) -> None:
        if not self.max_quota_s > 0:
            raise ConfigError(f"max_quota_s={self.max_quota_s} must be above 0; 4.0 is the published value", param="max_quota_s")
        if not self.min_alpha > 0:
            raise ConfigError(f"min_alpha={self.min_alpha} must be above 0; 0.5 is the published value", param="min_alpha")

    def start(self) -> WrrMemory:
        return WrrMemory()

    def next_turn(self, view: DecodeView, memory: WrrMemory) -> tuple[Turn | None, WrrMemory]:
        """A model with work is passed over for the rest of one round at most, the one in which it came."""
        batches = {batch.model: batch for batch in view.batches}
        if len(batches) <= 1:
            turn = Turn(model=view.batches[0].model, quota_s=None) if batches else None
            return turn, WrrMemory(last=turn.model if turn else memory.last)
        rest = tuple(entry for entry in memory.rest if entry[0] in batches)
        if not rest:
            quotas = self.quotas(view.batches)
            rest = tuple((model, quotas[model]) for model in _cycle(batches, after=memory.last, first=view.active))
        model, quota_s = rest[0]
        ahead = [entry[0] for entry in rest[1:]] + _cycle(batches, after=rest[-1][0])
        prefetch = next((other for other in ahead if other != model and batches[other].switch_s > 0), None)
        return Turn(model=model, quota_s=quota_s, prefetch=prefetch), WrrMemory(rest=rest[1:], last=model)

    def quotas(self, batches: Sequence[BatchView]) -> dict[ModelName, float]:
        """Seconds for each model of a round, none above `max_quota_s`."""
        steps = {batch.model: batch.tpot_slo_s / max(batch.step_s, 1e-6) for batch in batches}
        switch_s = math.fsum(batch.switch_s for batch in batches)  # exact, so the order of the view does not matter
        if switch_s <= 0:
            loosest_s = max(batch.tpot_slo_s for batch in batches)
            return {b.model: min(b.step_s * loosest_s / b.tpot_slo_s, self.max_quota_s) for b in batches}
        load = math.fsum(1 / n for n in steps.values())
        least = min(steps.values())
        in_round = round_load(load, num_models=len(batches), switch_s=switch_s, min_steps=least, max_quota_s=self.max_quota_s)
        alpha = max(in_round, self.min_alpha)
        return {model: switch_s / (n * (alpha - load)) for model, n in steps.items()}


def _cycle(models: Mapping[ModelName, object], *, after: ModelName | None, first: ModelName | None = None) -> list[ModelName]:
    """The models by name, beginning behind `after`; where nobody was served yet, with `first`."""
    ordered = sorted(models)
    if after is not None:
        start = next((i for i, model in enumerate(ordered) if model > after), 0)
    else:
        start = ordered.index(first) if first is not None and first in models else 0
    return ordered[start:] + ordered[:start]


def round_load(shares: float, *, num_models: int, switch_s: float, min_steps: float, max_quota_s: float) -> float:
    """How much of a round's allowed time it takes at the longest turns; above 1, some SLO of the worker cannot hold.

    `shares` is the sum over its models of step time / TPOT, `min_steps` the smallest TPOT / step time, `switch_s` the round's switches:
    a model that is alone has none.
    """
    return shares if num_models < 2 else shares + switch_s / (min_steps * max_quota_s)
